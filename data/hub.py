"""Data sets of the Hugging Face hub, or a folder in its form, through the library `datasets`; images are decoded once and kept."""

import contextlib
import functools
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from data.fetch import online
from errors import FULL_DISK, InputError, first_line
from paths import DAMAGED, DATA, atomic_path

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
OTHER_NAMES = {"plane": "airplane", "aeroplane": "airplane", "car": "automobile", "auto": "automobile"}  # that some data sets use
HUB, HUB_ID = "https://huggingface.co", "uoft-cs/cifar10"


def read_dataset(source: str) -> dict[str, tuple]:
    """The splits train and test of an id of the hub, or of a folder of parquet files with the columns img and label.

    A split is images uint8 (n, 3, 32, 32), labels int64 (n,), the classes' names, and the name of the data; InputError where they
    cannot be had, or are not 32x32 images of ten classes.
    """
    here = Path(source).exists()
    source = HUB_ID if source == "cifar10" and not here else source  # as older tutorials call it
    hint = f"give a folder of parquet files, {HUB_ID}, or leave -data out"
    if not here and not hub_reached() and not fetched_before(source, "datasets"):
        raise InputError(f"-data {source}: no such folder, and the Hugging Face hub cannot be reached; {hint}")
    from datasets import disable_progress_bars, load_dataset  # seconds to import, so only where it is needed

    try:
        if not sys.stderr.isatty():
            disable_progress_bars()
        found = load_dataset(source)
    except Exception as error:  # the library raises its own classes of many modules
        refuse_full_disk(error)
        where = "no data set in this folder" if here else "no such folder, and not to be had from the hub"
        raise InputError(f"-data {source}: {where} ({first_line(reasons(error)[-1])}); {hint}") from error
    splits = {split: from_rows(found, split, source) for split in ("train", "test")}
    if (train := splits["train"][2]) != (test := splits["test"][2]):
        raise InputError(f"-data {source}: the classes of train are {', '.join(train)}, those of test {', '.join(test)}")
    return splits


def refuse_full_disk(error: Exception) -> None:
    """InputError where this is what a library, or the system below it, says of a full disk."""
    for reason in reasons(error):
        if getattr(reason, "errno", None) in FULL_DISK or "enough disk space" in str(reason):
            raise InputError(f"the disk is full ({first_line(reason)}): free some space and run again") from error


def reasons(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on."""
    return [error, *(reasons(error.__cause__) if error.__cause__ else [])]


@functools.cache
def hub_reached() -> bool:
    """Whether the Hugging Face hub can be reached. Call it before its libraries are imported, which ask the variable set here only then.

    With it they find at once what was fetched before; without it they would try for half a minute.
    """
    if not (reached := online(os.environ.get("HF_ENDPOINT") or HUB)):  # its libraries' variable for a mirror
        os.environ["HF_HUB_OFFLINE"] = "1"
    return reached


def fetched_before(source: str, kind: str) -> bool:
    """Whether something of this id of the hub, kind "models" or "datasets", lies in its libraries' folders."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets"), source.replace("/", "___"))
    return Path(HF_HUB_CACHE, f"{kind}--{source.replace('/', '--')}").is_dir() or (kind == "datasets" and prepared.is_dir())


def class_name(text: str) -> str:
    """The name of a class as CLASSES has it: "Car" -> "automobile"."""
    name = text.lower().strip()
    return OTHER_NAMES.get(name, name)


def from_rows(found, split: str, source: str) -> tuple:
    """Decode one split of a `datasets.DatasetDict` once, after its columns and labels were checked."""
    if split not in found:
        raise InputError(f"-data {source} has no split {split!r}, it has: {', '.join(found)}")
    rows = found[split]
    if missing := {"img", "label"} - set(rows.column_names):
        columns = ", ".join(rows.column_names)
        raise InputError(f"-data {source} has no column {' and '.join(sorted(missing))}, it has: {columns}; CIFAR-10 has img and label")
    classes, labels = number_labels(rows, source)
    if len(classes) != 10:
        raise InputError(f"-data {source} has {len(classes)} classes: ten are expected")
    return torch.from_numpy(decode_once(rows, source)), labels, classes, name_by_classes(source, split, classes)


def number_labels(rows, source: str) -> tuple[tuple[str, ...], torch.Tensor]:
    """The names of the classes, and the number of each row's, int64 (n,); the column may hold numbers from 0 on, others, or names."""
    values, names = list(rows["label"]), getattr(rows.features["label"], "names", None)
    if values and not isinstance(values[0], int | str | None):
        raise InputError(f"-data {source}: the column label holds {values[0]!r:.40}, where whole numbers or names are expected")
    kinds = range(len(names)) if names else sorted({value for value in values if value is not None})
    number = {kind: place for place, kind in enumerate(kinds)}
    if unknown := [place for place, value in enumerate(values) if value not in number]:
        label = values[unknown[0]]
        raise InputError(f"-data {source}: row {unknown[0]:,} has the label {label}, which is none of the {len(number)} classes")
    return tuple(names or map(str, kinds)), torch.tensor([number[value] for value in values])


def name_by_classes(source: str, split: str, classes: tuple[str, ...]) -> str:
    """CIFAR-10 where the classes are its ten, in any order; otherwise the data's own name, and a sentence."""
    if {class_name(name) for name in classes} == set(CLASSES):
        return "CIFAR-10"
    name = Path(source).resolve().name if Path(source).exists() else source
    if split == "train":
        print(f"The classes of -data {source} are {', '.join(classes)}: it is not CIFAR-10 and is called {name} here")
    return name


def decode_once(rows, source: str) -> np.ndarray:
    """All images of a `datasets.Dataset`, uint8 (n, 3, 32, 32); kept on disk, as decoding takes seconds."""
    file = DATA / "decoded_cifar10" / f"{rows._fingerprint}.npz"  # of the rows' content and history, made by the library
    with contextlib.suppress(*DAMAGED), np.load(file) as arrays:
        if arrays["images"].shape[1:] == (3, 32, 32):
            return arrays["images"]
    pictures = []
    try:
        for image in tqdm(rows["img"], f"decoding {len(rows):,} images", leave=False):
            if image.size != (32, 32):
                width, height = image.size
                raise InputError(f"-data {source}: image {len(pictures):,} has {width}x{height} pixels: 32x32 are expected")
            pictures.append(np.asarray(image.convert("RGB")))
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, AttributeError) as error:  # Pillow's, and that of something that is no image
        raise InputError(f"-data {source}: image {len(pictures):,} cannot be read ({first_line(error)})") from error
    images = np.stack(pictures).transpose(0, 3, 1, 2).copy()
    with contextlib.suppress(OSError, InputError), atomic_path(file) as temporary:  # no place to keep them is no reason to stop
        np.savez(temporary, images=images)
    return images
