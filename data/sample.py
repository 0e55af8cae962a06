"""Drawn stand-ins for LFW and CIFAR-10, so that every exercise runs before anything is downloaded.

    python data/sample.py
    python data/sample.py -images 512     fewer faces; an exercise takes them with -path_to_folder data/sample_lfw, else draws its 2,048

The faces have LFW's layout, image size, kind of JPEG, bytes a file and uneven numbers of images a person: reading and decoding
them costs what it costs with LFW. The shapes have CIFAR-10's layout; a convolutional network can learn them, a linear model
cannot. An accuracy reached on either says nothing about photographs. Drawing takes seconds, once.
"""

import json
import shutil
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from uuid import uuid4

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import new_parser, parse, positive_int
from data.faces import people, save_face
from errors import InputError
from paths import DATA, ROOT, display_path, refuse_writing

VERSION = 1  # raise it when a drawing changes: samples made before are then made anew
IMAGES = 2048  # drawn faces, unless another number is asked for
MARKER = "sample.json"  # written last: a folder without it is not complete


def lfw_sample(folder: Path | None = None, images: int = IMAGES, seed: int = 0, force: bool = False) -> Path:
    """A folder of drawn faces, First_Last/First_Last_0001.jpg; made on first use. Raises InputError where it cannot write."""
    folder = Path(folder or DATA / "sample_lfw")
    jobs = {f"{name}/{name}_{number:04}.jpg": partial(save_face, seed, name, number) for name, number in people(images, seed)}
    make_once(folder, {"version": VERSION, "seed": seed, "images": images}, jobs, force)
    announce(f"{images:,} drawn sample faces", folder, "LFW", "lfw")
    return folder


# ---- shapes ----------------------------------------------------------------------------------------------------------

COUNTS = {"train": 10_000, "test": 2_000}
SHAPES = {  # positive inside; z = x + iy is the place in the shape's own turned coordinates, the shape about 1 in radius
    "disc": lambda z: 0.75 - abs(z),
    "ring": lambda z: 0.2 - abs(abs(z) - 0.75),
    "square": lambda z: 0.7 - np.maximum(abs(z.real), abs(z.imag)),
    "triangle": lambda z: 0.5 - np.maximum(z.real, abs(z.imag) * 0.866 - z.real / 2),
    "flower": lambda z: 0.7 + 0.3 * np.cos(5 * np.angle(z)) - abs(z),
    "cross": lambda z: np.minimum(0.27 - np.minimum(abs(z.real), abs(z.imag)), 0.95 - np.maximum(abs(z.real), abs(z.imag))),
    "crescent": lambda z: np.minimum(0.95 - abs(z), abs(z - 0.5) - 0.75),
    "heart": lambda z: 0.9 - abs(z.real + 1j * (1.1 * z.imag + 0.25 - 0.75 * np.sqrt(abs(z.real)))),
    "stripes": lambda z: np.minimum(0.95 - abs(z), np.sin(9 * z.real) / 9),
    "checks": lambda z: np.minimum(0.9 - np.maximum(abs(z.real), abs(z.imag)), np.sin(7 * z.real) * np.sin(7 * z.imag) / 3),
}
SAMPLE_CLASSES = tuple(SHAPES)


def places(n: int, reach: float, smallest: float, largest: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel in the coordinates of n shapes put down at random, (n, 32, 32), and the radii of these shapes in pixels."""
    x, y, turn, radius = rng.random((4, n, 1, 1), dtype=np.float32)
    radius = smallest + (largest - smallest) * radius
    axis = np.arange(32, dtype=np.float32) - 15.5
    z = (axis - reach * (2 * x - 1)) + 1j * (axis[:, None] - reach * (2 * y - 1))
    return z * np.exp(2j * np.pi * turn) / radius, radius


def draw_shapes(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 images (n, 3, 32, 32). Shape and ground get their colours by the same rule: no class is lighter or redder."""
    n, axis = len(labels), np.linspace(-1, 1, 32)
    middle, (across, down) = rng.uniform(0.3, 0.7, (n, 3, 1, 1)), rng.uniform(-0.2, 0.2, (2, n, 1, 1, 1))
    contrast = rng.normal(size=(n, 3, 1, 1))
    contrast *= rng.uniform(0.25, 0.5, (n, 1, 1, 1)) / np.linalg.norm(contrast, axis=1, keepdims=True)
    images = (middle - contrast + across * axis + down * axis[:, None]).astype(np.float32)
    clutter = [(np.zeros(n, int), 18, 1, 2.5, rng.uniform(0.1, 0.9, (n, 3, 1, 1))) for _ in range(5)]  # small discs
    for kinds, reach, smallest, largest, colour in [*clutter, (labels, 5, 7, 11, middle + contrast)]:
        z, radius = places(n, reach, smallest, largest, rng)
        inside = np.empty(z.shape, np.float32)
        for kind in np.unique(kinds):
            inside[kinds == kind] = SHAPES[SAMPLE_CLASSES[kind]](z[kinds == kind])
        images += np.clip(inside * radius + 0.5, 0, 1)[:, None] * (colour.astype(np.float32) - images)
    images += 0.04 * rng.standard_normal(images.shape, np.float32)
    return (255 * images.clip(0, 1)).astype(np.uint8)


def save_shapes(seed: int, count: int, path: Path) -> None:
    rng = np.random.default_rng([seed, count])
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    images = np.concatenate([draw_shapes(part, rng) for part in np.split(labels, count // 500)])
    np.savez(path, images=images, labels=labels.astype(np.int64))


def cifar10_sample(folder: Path | None = None, seed: int = 0, force: bool = False) -> Path:
    """A folder with train.npz and test.npz: images, uint8 (n, 3, 32, 32), and labels, int64 (n,), names in SAMPLE_CLASSES."""
    folder = Path(folder or DATA / "sample_cifar10")
    jobs = {f"{split}.npz": partial(save_shapes, seed, count) for split, count in COUNTS.items()}
    make_once(folder, {"version": VERSION, "seed": seed, **COUNTS}, jobs, force)
    announce(f"{sum(COUNTS.values()):,} drawn sample shapes", folder, "CIFAR-10", "cifar10")
    return folder


# ---- made once -------------------------------------------------------------------------------------------------------


def announce(what: str, folder: Path, real: str, name: str) -> None:
    fetch = f"python {display_path(ROOT / 'data' / 'download.py')} {name}"
    print(f"data: {what} in {display_path(folder)} - not the real {real}; fetch that with: {fetch}")


def make_once(folder: Path, key: dict, jobs: dict, force: bool) -> None:
    """Let every job(folder / name) write its file, unless the folder's marker shows that this was done before."""
    folder = folder.resolve()
    if not force and is_complete(folder, key, jobs):
        return
    part = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.part")  # each process its own: two may start at the same time
    try:
        clear(folder, part, jobs)
        fill(part, key, jobs)
        move(part, folder, key, jobs)
    except OSError as error:
        refuse_writing(folder, error)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def is_complete(folder: Path, key: dict, names) -> bool:
    with suppress(OSError, ValueError):  # a file is missing; the marker is no JSON
        return json.loads((folder / MARKER).read_text()) == {**key, "bytes": sum((folder / name).stat().st_size for name in names)}
    return False


def clear(folder: Path, part: Path, names) -> None:
    """Remove what killed runs left beside the folder, and the folder itself where it is a sample."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*.part"):
        with suppress(FileNotFoundError):  # the process it belonged to has just finished
            if time.time() - leftover.stat().st_mtime > 3600:
                shutil.rmtree(leftover, ignore_errors=True)
    with suppress(FileNotFoundError):  # there is none, or another process has just removed it
        found = {entry.name for entry in folder.iterdir()}
        strangers = found - {name.split("/")[0] for name in names}
        if strangers and MARKER not in found:
            raise InputError(f"{display_path(folder)} holds other things ({min(strangers)}): move them or name another folder")
        folder.rename(part)  # gone at once, so that nobody reads half of it
        shutil.rmtree(part)


def fill(part: Path, key: dict, jobs: dict) -> None:
    for parent in {(part / name).parent for name in jobs}:
        parent.mkdir(parents=True, exist_ok=True)
    for name, job in tqdm(jobs.items(), "drawing", leave=False):  # threads would wait for each other: drawing keeps Python's lock
        job(part / name)
    size = sum((part / name).stat().st_size for name in jobs)
    (part / MARKER).write_text(json.dumps({**key, "bytes": size}))


def move(part: Path, folder: Path, key: dict, names) -> None:
    """Rename part to folder unless another process was first; on Windows a virus scanner may hold a new folder for a moment."""
    for wait in (0.1, 0.2, 0.4, 0.8, None):
        try:
            part.rename(folder)
            return
        except OSError:
            if is_complete(folder, key, names):
                return
            if wait is None:
                raise
            time.sleep(wait)


if __name__ == "__main__":
    parser = new_parser(__doc__, computes=False)
    parser.add_argument("-images", type=positive_int, default=IMAGES, help=f"number of faces (default: {IMAGES})")
    parser.add_argument("-force", action="store_true", help="draw anew even if the data is there")
    args = parse(parser)
    lfw_sample(images=args.images, seed=args.seed, force=args.force)
    cifar10_sample(seed=args.seed, force=args.force)
