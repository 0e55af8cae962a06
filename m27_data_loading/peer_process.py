"""Peers of `loading_peers.py`, each in a process of its own, where its threads and its copies of OpenCV and OpenMP meet nobody else's."""

import multiprocessing
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from m27_data_loading.loading_peers import PEERS, installed
from m27_data_loading.peer_tasks import images_of

OPENED = {}  # in a peer's own process: the loader that was opened there


def open_here(name: str, *args) -> None:
    if "fork" in multiprocessing.get_all_start_methods():  # a spawned process would spawn, too, and that takes no local function
        multiprocessing.set_start_method("fork", force=True)
    OPENED[name] = PEERS[name](*args)


def time_here(name: str, shape: tuple[int, int, int] | None) -> dict:
    """One whole epoch of an opened peer: images, images/s. With the `shape` of an image the first batch is looked at, which takes time."""
    images, begin = 0, time.perf_counter()
    for batch in OPENED[name]:
        if shape and not images:
            check_batch(batch, shape)
        images += len(batch)
    return {"images": images, "images_per_s": images / (time.perf_counter() - begin), "page_faults": None}


def check_batch(batch: torch.Tensor, shape: tuple[int, int, int]) -> None:
    """Raise RuntimeError unless a batch is what the rungs deliver: float32 (n, *shape) that reaches from 0 to about 1."""
    low, high = (value.item() for value in torch.aminmax(batch))
    if batch.dtype != torch.float32 or tuple(batch.shape[1:]) != shape or not (0 <= low < 0.5 < high < 1.001):  # a library may round
        raise RuntimeError(f"delivers {tuple(batch.shape)}, {batch.dtype}, {low:.3f} to {high:.3f}, not (n, {shape}), float32, 0 to 1")


class Peer:
    """One peer, opened and timed in its own process; the process lives until this object is gone."""

    def __init__(self, name: str, folder: Path, work: Path, batch_size: int, threads: int) -> None:
        files, height, width = images_of(folder)
        self.name, self.images, self.shape = name, len(files), (3, height, width)
        self.process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.process.submit(open_here, name, Path(folder), work / name, batch_size, threads).result()

    def time_epoch(self) -> dict:
        run = self.process.submit(time_here, self.name, self.shape).result()
        self.shape = None  # looked at in the first epoch, which does not count
        return run


def start_peers(folder: Path, work: Path, batch_size: int, threads: int) -> dict[str, Peer]:
    """All peers found here, ready to be timed; one that is missing or does not start is named with the reason and left out."""
    peers = {}
    for name in PEERS:
        try:
            if name not in installed():
                raise ImportError("not installed, see requirements-peers.txt")
            peers[f"peer: {name}"] = Peer(name, folder, work, batch_size, threads)
        except Exception as error:  # whatever a library may raise, or its process die of
            print(f"peer {name} is left out: {reason(error)}")
    return peers


def reason(error: Exception) -> str:
    """Kind and beginning of an error, in one line."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200) or 'no reason given'}"
