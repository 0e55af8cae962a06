"""What a loader can reach at most on this machine: the fast loader with work left out, for loading_ladder.py."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from m27_data_loading.fast_loader import FastLoader, decode_into


class DecodeOnly(FastLoader):
    def fill(self, out: np.ndarray, chosen: np.ndarray, matrices: np.ndarray) -> None:
        files, (pixels, _) = self.files, self.own_buffer()
        for index in chosen.tolist():
            decode_into(files[index], pixels)


class WriteOnly(FastLoader):
    def fill(self, out: np.ndarray, chosen: np.ndarray, matrices: np.ndarray) -> None:
        for image in out:
            image.fill(0.5)


class DecodeAndWrite(FastLoader):
    def fill(self, out: np.ndarray, chosen: np.ndarray, matrices: np.ndarray) -> None:
        files, (pixels, _) = self.files, self.own_buffer()
        for image, index in zip(out, chosen.tolist(), strict=True):
            decode_into(files[index], pixels)
            image.fill(0.5)


def build_ceilings(folder: str, batch_size: int, workers: int, seed: int, limit: int | None = None) -> dict:
    """What can be reached at most: decoding alone, writing alone, both."""
    kinds = {"decode alone": DecodeOnly, "write alone": WriteOnly, "decode and write": DecodeAndWrite}
    return {name: kind(folder, batch_size, workers, seed, limit=limit) for name, kind in kinds.items()}
