"""What the peers of loading_peers.py share: epochs, the images of a folder, and the tasks of our loader for threads of theirs."""

import queue
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from m27_data_loading import affine
from m27_data_loading import fast_loader as ours
from m27_data_loading.image_folder import find_images
from m27_data_loading.lfw_dataset import load_rgb


class Epochs:
    """What to iterate over for an epoch, again and again, out of a function that yields the batches of one epoch."""

    def __init__(self, epoch: Callable[[], Iterator[torch.Tensor]]) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.epoch()


def images_of(folder: Path) -> tuple[list[str], int, int]:
    """Paths of the images, and height and width of the first one; a peer takes all to be of this size."""
    files = find_images(folder).tolist()
    width, height = load_rgb(files[0]).size
    return files, height, width


class Tasks:
    """The tasks and the memory of our FastLoader without its threads, for the peers whose own threads do the work.

    A task is (buffer, rows to fill, indices of the files, their matrices, and the batch's images if this is its last task, else 0).
    A buffer comes round again only when the consumer has asked for the next batch.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.loader = ours.FastLoader(folder, batch_size)

    def __iter__(self) -> Iterator[tuple]:
        """The tasks of one epoch: a new order, new matrices."""
        loader, rng = self.loader, np.random.default_rng()
        self.free = free = queue.SimpleQueue()
        for number in range(ours.RING):
            free.put(number)
        order = rng.permutation(len(loader.files))
        matrices = affine.inverse_matrices(affine.random_affine(rng, len(order), loader.height, loader.width), loader.height, loader.width)
        for start in range(0, len(order), loader.batch_size):
            number, count = free.get(), min(loader.batch_size, len(order) - start)
            for row in range(0, count, loader.task):
                end = min(row + loader.task, count)
                part = slice(start + row, start + end)
                yield number, slice(row, end), order[part], matrices[part], count if end == count else 0

    def run(self, task: tuple) -> tuple[int, int]:
        """One task, in a thread of the peer's."""
        number, rows, chosen, matrices, complete = task
        self.loader.fill(self.loader.buffer(number).numpy()[rows], chosen, matrices)
        return number, complete

    def batches(self, done: Iterable[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """The batches, out of the results of `run` in the order of the tasks."""
        for number, complete in done:
            if complete:
                try:
                    yield self.loader.buffer(number)[:complete]
                finally:
                    self.free.put(number)
