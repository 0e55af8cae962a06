"""Decoded images in one file of raw pixels: written once, then mapped into memory instead of decoded again.

The file's name holds a fingerprint of the folder: names, sizes and modification times of all its images. A folder that changed
has another fingerprint, so a stale file is never read; it is removed when its successor is complete. 13,233 LFW images of
250 x 250 take 2.5 GB, against 0.1 GB of JPEGs: the price of not decoding.
"""

import contextlib
import glob
import hashlib
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from errors import InputError
from paths import DATA, atomic_path, check_writable, display_path, remove_left


class NoPlace(InputError):
    """The decoded pixels cannot be kept, for lack of space or of permission; everything that decodes works without them."""


def fingerprint(folder: str | Path, files: list[str]) -> str:
    """16 hexadecimal digits that change when an image is added, removed, renamed or rewritten, however the folder is spelled."""
    digest = hashlib.sha256()
    for file in files:
        status = os.stat(file)  # noqa: PTH116 - 13,000 Path objects take longer than the calls
        digest.update(os.fsencode(f"{os.path.relpath(file, folder)}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]


def open_cache(folder, files: list[str], shape: tuple[int, int, int], decode_into, threads: int, limit: int | None) -> np.ndarray:
    """Map the pixels of `files`, each `shape` (height, width, 3), into memory; write them first where they are missing or stale.

    Returns uint8, image after image and one byte more (see affine.as_words). decode_into(file, pixels) decodes one image; `limit`
    says that `files` are only the first so many of the folder.
    """
    place = Path(folder).resolve()
    family = f"{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}-{'all' if limit is None else limit}"
    path = DATA / "cache" / f"{family}-{fingerprint(folder, files)}.rgb"
    size = len(files) * int(np.prod(shape)) + 1
    if not path.is_file() or path.stat().st_size != size:
        relatives = f"{glob.escape(family)}-*.rgb"  # earlier states of this folder
        make_room(path.parent, relatives, size)
        write_cache(path, files, shape, decode_into, threads)
        for old in path.parent.glob(relatives):
            if old != path:
                with contextlib.suppress(PermissionError):  # Windows: another process has it mapped
                    old.unlink()
    return np.memmap(path, np.uint8, mode="r")


def make_room(place: Path, relatives: str, size: int) -> None:
    """Remove what killed runs left of such files; NoPlace where `size` bytes cannot be written into the folder `place`."""
    try:
        check_writable(place)
    except InputError as error:
        raise NoPlace(f"decoded pixels cannot be kept: {error}") from error
    remove_left(place, relatives)
    if (free := shutil.disk_usage(place).free) < size:
        lack = f"decoded pixels need {size / 1e9:.1f} GB in {display_path(place)}, {free / 1e9:.1f} are free"
        raise NoPlace(f"{lack}: set COURSE_DATA to a folder on another disk")


def write_cache(path: Path, files: list[str], shape: tuple[int, int, int], decode_into, threads: int) -> None:
    """Decode `files` on all threads and write them in order; the file appears under its name only when it is complete."""

    def decoded(file: str) -> np.ndarray:
        pixels = np.empty(shape, np.uint8)
        decode_into(file, pixels)
        return pixels

    with atomic_path(path) as temporary, temporary.open("wb") as out, ThreadPoolExecutor(threads) as pool:
        with tqdm(total=len(files), desc="writing decoded pixels", unit="image") as progress:
            for start in range(0, len(files), 256):  # in portions, so that memory stays small
                for pixels in pool.map(decoded, files[start : start + 256]):
                    out.write(pixels)
                    progress.update()
        out.write(b"\0")
