"""A loader near the machine's limit: threads, a compiled augmentation, and memory that is used again.

    loader = FastLoader("data/lfw", batch_size=512, seed=0)
    for epoch in range(3):
        loader.set_epoch(epoch)
        for images in loader:                  # float32 (n, 3, height, width) in [0, 1]
            ...                                # valid until the next batch is asked for; images.clone() keeps it

It yields what the exercise's DataLoader yields, shuffled and with the same augmentation, RandomAffine(5, (0.1, 0.1), (0.5, 2.0)).
Four things make it fast; `loading_ladder.py` measures each of them:

* Threads, not processes: JPEG decoder and augmentation release the GIL, and nothing has to be sent from one process to another.
* simplejpeg (libjpeg-turbo) decodes into a buffer that stays; PIL allocates and copies.
* One compiled loop (numba) does warp, conversion to float and change of layout; PIL and torch need four passes over the image.
* The batches lie in a ring of buffers. A fresh batch of 512 images is 384 MB that the operating system has to map and clear,
  page by page, before the first number can be written.
"""

import os
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from errors import InputError
from m27_data_loading.affine import as_words, inverse_matrices, random_affine, warp_into
from m27_data_loading.image_folder import find_images
from m27_data_loading.lfw_dataset import load_rgb
from m27_data_loading.pixel_cache import open_cache
from machine import usable_cpus

try:
    from simplejpeg import decode_jpeg
except ImportError:  # PIL decodes then, somewhat slower
    decode_jpeg = None

RING = 3  # one batch in use, two being filled
TASK = 64  # images a thread takes at once, at most: every task costs the main thread a wake-up, but each thread wants some of a batch
READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # Windows would translate line ends


# ---- pixels ----------------------------------------------------------------------------------------------------------


def read_file(path: str) -> bytes:
    """All bytes of a small file with four system calls; open() makes more and takes twice as long, 5 us of an image's 250."""
    descriptor = os.open(path, READ)
    try:
        return os.read(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def decode_into(path: str, pixels: np.ndarray) -> None:
    """Decode a file into `pixels`, (height, width, 3) uint8; what libjpeg-turbo does not take is left to PIL."""
    try:
        shape = decode_jpeg(read_file(path), "RGB", buffer=pixels).shape if decode_jpeg else None
    except (ValueError, OSError):  # no JPEG, CMYK, truncated, or larger than the buffer
        shape = None
    if shape is None:
        image = np.asarray(load_rgb(path))
        shape = image.shape
        if shape == pixels.shape:
            pixels[:] = image
    if shape != pixels.shape:
        (height, width), (wanted_height, wanted_width) = shape[:2], pixels.shape[:2]
        differ = f"{path} has {width}x{height} pixels, the first image {wanted_width}x{wanted_height}"
        raise InputError(f"{differ}: bring the files to one size first (PIL's resize), or load them with lfw_dataset.py -resize 250")


# ---- the loader ------------------------------------------------------------------------------------------------------


class FastLoader:
    """Iterable of shuffled, augmented float32 batches (n, 3, height, width) in [0, 1] of the .jpg files below `folder`.

    A batch is valid until the next one is asked for: its memory is then filled again. `images.clone()` keeps it.
    What comes is a pure function of (seed, epoch), whatever the number of threads; 0 threads means one for each CPU that this
    process may use, limit=n the first n images only. With cache=True the decoded pixels are read
    from a file of raw pixels, made on first use. One iteration at a time; a broken image ends it with an InputError.
    """

    def __init__(self, folder, batch_size=512, threads=0, seed=0, shuffle=True, cache=False, limit=None):
        self.files = find_images(folder)[:limit].tolist()
        self.batch_size, self.seed, self.shuffle = min(batch_size, len(self.files)), seed, shuffle
        self.threads = threads or usable_cpus()
        self.task = max(1, min(TASK, self.batch_size // (4 * self.threads)))
        self.epoch = 0
        self.width, self.height = load_rgb(self.files[0]).size
        self.cache = open_cache(folder, self.files, (self.height, self.width, 3), decode_into, self.threads, limit) if cache else None
        self.ring = None  # made when it is first needed
        self.own = threading.local()  # a decoding buffer for each thread
        self.busy = False

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields: its order and its augmentation."""
        self.epoch = epoch

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        n = len(self.files)
        order = rng.permutation(n) if self.shuffle else np.arange(n)
        matrices = inverse_matrices(random_affine(rng, n, self.height, self.width), self.height, self.width)
        return self.batches(order, matrices)

    def batches(self, order: np.ndarray, matrices: np.ndarray):
        """Yield the images `order`, each warped by its row of `matrices`, in batches; RING - 1 batches are filled ahead."""
        if self.busy:
            raise RuntimeError("this FastLoader is being iterated over already: its memory serves one iteration at a time")
        self.busy = True
        pool = ThreadPoolExecutor(self.threads)
        waiting = deque()
        try:
            for number, start in enumerate(range(0, len(order), self.batch_size)):
                chosen = slice(start, start + self.batch_size)
                waiting.append(self.start_batch(pool, self.buffer(number), order[chosen], matrices[chosen]))
                if len(waiting) == RING:
                    yield finished(*waiting.popleft())
            while waiting:
                yield finished(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)
            self.busy = False

    def buffer(self, number: int) -> torch.Tensor:
        """Memory for batch `number`: that of the batch RING before it, which nobody may use any more."""
        if self.ring is None:
            shape = self.batch_size, 3, self.height, self.width
            self.ring = [torch.from_numpy(np.zeros(shape, np.float32)) for _ in range(RING)]
        return self.ring[number % RING]

    def start_batch(self, pool: ThreadPoolExecutor, buffer: torch.Tensor, chosen: np.ndarray, matrices: np.ndarray) -> tuple:
        """Hand a batch to the threads, some images at a time; the batch and what to wait for."""
        batch = buffer[: len(chosen)]
        out = batch.numpy()
        parts = [slice(start, start + self.task) for start in range(0, len(chosen), self.task)]
        return batch, [pool.submit(self.fill, out[part], chosen[part], matrices[part]) for part in parts]

    def fill(self, out: np.ndarray, chosen: np.ndarray, matrices: np.ndarray) -> None:
        """A thread's work: decode the images `chosen` one by one and warp each into its place in the batch.

        Everything that can be is done before the loop: inside it the threads wait for each other, since Python lets one run at a time.
        """
        if self.cache is not None:
            for image, index, matrix in zip(out, chosen.tolist(), matrices, strict=True):
                warp_into(as_words(self.cache, self.height, self.width, index * self.height * self.width * 3), matrix, image)
            return
        files, (pixels, words) = self.files, self.own_buffer()
        for image, index, matrix in zip(out, chosen.tolist(), matrices, strict=True):
            decode_into(files[index], pixels)
            warp_into(words, matrix, image)

    def own_buffer(self) -> tuple[np.ndarray, np.ndarray]:
        """This thread's memory for one decoded image, as (height, width, 3) bytes and as 32-bit words."""
        if not hasattr(self.own, "buffer"):
            memory = np.empty(self.height * self.width * 3 + 1, np.uint8)
            pixels = memory[:-1].reshape(self.height, self.width, 3)
            self.own.buffer = pixels, as_words(memory, self.height, self.width)
        return self.own.buffer


def finished(batch: torch.Tensor, tasks: list) -> torch.Tensor:
    """The batch, once all its tasks have ended; an error in one of them is raised here."""
    for task in tasks:
        task.result()
    return batch
