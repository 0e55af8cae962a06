"""CIFAR-10 as tensors and the small convolutional networks that learn it: what the scripts of M28 and M29 have in common.

All images stay one uint8 tensor in memory (184 MB for the real set), so a batch is an indexing operation and no worker process
is needed. Where the images come from, first match: `-data` (a folder or an id of the Hugging Face hub), data/cifar10 where
data/download.py put it, the drawn sample otherwise.
"""

import contextlib
import functools
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data.fetch import online
from data.sample import SAMPLE_CLASSES, cifar10_sample
from errors import InputError
from paths import DATA, atomic_path

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
OTHER_NAMES = {"plane": "airplane", "aeroplane": "airplane", "car": "automobile", "auto": "automobile"}  # that some data sets use
HUB, HUB_ID = "https://huggingface.co", "uoft-cs/cifar10"
SAMPLE_NAME = "the drawn sample"
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)  # of the real training images, a value a channel
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)
DAMAGED = (OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)  # an npz file


@dataclass
class Images:
    """uint8 images (n, 3, 32, 32), int64 labels (n,), the names of the classes, and which data this is."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: slice) -> "Images":
        return Images(self.images[part], self.labels[part], self.classes, self.name)


# ---- where the images come from --------------------------------------------------------------------------------------


def load_cifar10(data: str | None = None, batch_size: int = 1) -> dict[str, Images]:
    """{"train": Images, "test": Images}; InputError where they cannot be had, or the training images do not fill one batch."""
    found = find_cifar10(data)
    if len(found["train"]) < batch_size:
        raise InputError(
            f"a batch of {batch_size} images is more than the {len(found['train']):,} training images of {found['train'].name}"
        )
    return found


def find_cifar10(data: str | None) -> dict[str, Images]:
    """Both splits from a folder, a hub id, the download or the sample."""
    if data is None:
        data = DATA / "cifar10" if (DATA / "cifar10" / "cifar-10-batches-py").is_dir() else cifar10_sample()
    folder = Path(data)
    if folder.name == "cifar-10-batches-py":
        folder = folder.parent
    if (folder / "cifar-10-batches-py").is_dir():
        return {split: from_torchvision(folder, split) for split in ("train", "test")}
    if (folder / "train.npz").is_file():
        return {split: from_sample(folder, split) for split in ("train", "test")}
    return from_datasets(str(data))


def from_torchvision(folder: Path, split: str) -> Images:
    from torchvision.datasets import CIFAR10

    try:
        found = CIFAR10(folder, train=split == "train")
    except RuntimeError as error:
        raise InputError(f"{folder} is not complete: fetch it anew with python data/download.py cifar10 -force") from error
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()  # (n, 32, 32, 3) -> (n, 3, 32, 32)
    return Images(images, torch.tensor(found.targets), tuple(found.classes), "CIFAR-10")


def from_sample(folder: Path, split: str) -> Images:
    with np.load(folder / f"{split}.npz") as arrays:
        return Images(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]), SAMPLE_CLASSES, SAMPLE_NAME)


def from_datasets(source: str) -> dict[str, Images]:
    """Through the library `datasets`: an id of the hub, or a folder of parquet files with the columns img and label."""
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
        where = "no data set in this folder" if here else "no such folder, and not to be had from the hub"
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise InputError(f"-data {source}: {where} ({reason}); {hint}") from error
    return {split: from_rows(found, split, source) for split in ("train", "test")}


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


def from_rows(found, split: str, source: str) -> Images:
    """Decode one split of a `datasets.DatasetDict` once, after its columns and labels were checked."""
    if split not in found:
        raise InputError(f"-data {source} has no split {split!r}, it has: {', '.join(found)}")
    rows = found[split]
    if missing := {"img", "label"} - set(rows.column_names):
        columns = ", ".join(rows.column_names)
        raise InputError(f"-data {source} has no column {' and '.join(sorted(missing))}, it has: {columns}; CIFAR-10 has img and label")
    classes, labels = number_labels(rows, source)
    images = decode_once(rows, source)
    if images.shape[1:] != (3, 32, 32) or len(classes) != 10:
        height, width = images.shape[2:]
        raise InputError(f"-data {source} holds {width}x{height} images of {len(classes)} classes: 32x32 images of 10 are expected")
    return Images(torch.from_numpy(images), labels, classes, name_by_classes(source, split, classes))


def number_labels(rows, source: str) -> tuple[tuple[str, ...], torch.Tensor]:
    """The names of the classes, and the number of each row's, int64 (n,); the column may hold numbers from 0 on, others, or names."""
    values, names = list(rows["label"]), getattr(rows.features["label"], "names", None)
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
    """All images of a `datasets.Dataset`, uint8 (n, 3, height, width); kept on disk, as decoding takes seconds."""
    file = DATA / "decoded_cifar10" / f"{rows._fingerprint}.npz"  # of the rows' content and history, made by the library
    with contextlib.suppress(*DAMAGED), np.load(file) as arrays:
        return arrays["images"]
    pictures = []
    try:
        for image in tqdm(rows["img"], f"decoding {len(rows):,} images", leave=False):
            pictures.append(np.asarray(image.convert("RGB")))
    except (OSError, SyntaxError, ValueError, AttributeError) as error:  # Pillow's, and that of something that is no image
        raise InputError(f"-data {source}: image {len(pictures):,} cannot be read ({str(error).splitlines()[0][:100]})") from error
    if len({picture.shape for picture in pictures}) > 1:
        raise InputError(f"the images of -data {source} differ in size: 32x32 images are expected")
    images = np.stack(pictures).transpose(0, 3, 1, 2).copy()
    with contextlib.suppress(OSError, InputError), atomic_path(file) as temporary:  # no place to keep them is no reason to stop
        np.savez(temporary, images=images)
    return images


def stratified(data: Images, n: int) -> Images:
    """The first n images with as many of each class, in their order."""
    if n > len(data):
        raise InputError(f"-limit {n}: there are only {len(data):,} training images")
    order = torch.sort(data.labels, stable=True).indices
    ranks = torch.empty_like(order)  # how many of its class stand before each image
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), data.labels.bincount().cumsum(0)[:-1]])
    ranks[order] = torch.arange(len(data)) - starts[data.labels[order]]
    picked = torch.sort(ranks, stable=True).indices[:n].sort().values
    return Images(data.images[picked], data.labels[picked], data.classes, data.name)


# ---- batches ---------------------------------------------------------------------------------------------------------


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (n, 3, 32, 32) -> float32 of about mean 0 and standard deviation 1 in each channel."""
    return (images.float() / 255 - MEAN.to(images.device)) / STD.to(images.device)


def epoch_order(seed: int, epoch: int, n: int) -> torch.Tensor:
    """The order of the n training images in this epoch, int64 (n,): a pure function of (seed, epoch)."""
    return torch.from_numpy(np.random.default_rng([seed, epoch, 0]).permutation(n))


def augment(images: torch.Tensor, indices: torch.Tensor, seed: int, epoch: int, n: int) -> torch.Tensor:
    """Shift each image by up to 2 pixels (edges mirrored) and flip half of them; a pure function of (seed, epoch, index).

    `images` are those at `indices` of n training images, in any type. Which process asks, and with which others in the batch,
    changes nothing: that is what makes training on 1 and on N processes comparable, and an interrupted run resumable.
    """
    draws = np.random.default_rng([seed, epoch, 1]).integers(0, 50, n)[indices.numpy()]  # 5 x 5 shifts, flipped or not
    down, right, flip = (torch.from_numpy(part).to(images.device) for part in (draws // 5 % 5, draws % 5, draws // 25))
    padded = nn.functional.pad(images.float(), (2, 2, 2, 2), mode="reflect").to(images.dtype)  # (n, 3, 36, 36)
    places = torch.arange(32, device=images.device)
    rows = down[:, None] + places  # (n, 32)
    columns = right[:, None] + torch.where(flip[:, None] == 1, places.flip(0), places)
    picked = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[picked, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


# ---- networks --------------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """Two 3x3 convolutions at half the resolution: (n, inputs, height, width) -> (n, width, height / 2, width / 2).

    Pooling stands before normalization and activation, which then have a quarter of the values to work on.
    """

    def __init__(self, inputs: int, width: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)  # the normalization adds a bias of its own
        self.pool = nn.MaxPool2d(2)
        self.norm1 = normalization(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = normalization(norm, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.pool(self.conv1(x))))
        return torch.relu(self.norm2(self.conv2(x)))


class ConvNet(nn.Module):
    """Three stages, the mean over the image, a linear layer: images (n, inputs, height, width) -> logits (n, classes).

    norm="group" treats every image by itself, so that a batch may be cut among processes; norm="batch" does not.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128), norm: str = "batch", classes: int = 10, inputs: int = 3) -> None:
        super().__init__()
        before = (inputs, *widths[:-1])
        self.stages = nn.Sequential(*(Stage(channels, width, norm) for channels, width in zip(before, widths, strict=True)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(images).mean((2, 3)))


def normalization(norm: str, width: int) -> nn.Module:
    if norm == "group" and width % 8:
        raise InputError(f"a stage of {width} channels cannot be normalized in groups of 8: give a multiple of 8")
    return nn.GroupNorm(width // 8, width) if norm == "group" else nn.BatchNorm2d(width)
