"""CIFAR-10 as tensors and the small convolutional networks that learn it: what the scripts of M28 and M29 have in common.

All images stay one uint8 tensor in memory (184 MB for the real set), so a batch is an indexing operation and no worker process
is needed. Where the images come from, first match: `-data` (a folder or an id of the Hugging Face hub), data/cifar10 where
data/download.py put it, the drawn sample otherwise.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data.hub import read_dataset
from data.sample import SAMPLE_CLASSES, cifar10_sample
from errors import InputError
from paths import DAMAGED, DATA

SAMPLE_NAME = "the drawn sample"
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)  # of the real training images, a value a channel
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)


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
    return {split: Images(*arrays) for split, arrays in read_dataset(str(data)).items()}


def from_torchvision(folder: Path, split: str) -> Images:
    from torchvision.datasets import CIFAR10

    try:
        found = CIFAR10(folder, train=split == "train")
    except RuntimeError as error:
        raise InputError(f"{folder} is not complete: fetch it anew with python data/download.py cifar10 -force") from error
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()  # (n, 32, 32, 3) -> (n, 3, 32, 32)
    return Images(images, torch.tensor(found.targets), tuple(found.classes), "CIFAR-10")


def from_sample(folder: Path, split: str) -> Images:
    try:
        with np.load(folder / f"{split}.npz") as arrays:
            return Images(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]), SAMPLE_CLASSES, SAMPLE_NAME)
    except DAMAGED as error:
        raise InputError(f"{folder / split}.npz is missing or damaged: remove the folder, and leave -data out to draw it anew") from error


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
    places = torch.arange(32, device=images.device)
    mirrored = torch.cat([places[1:3].flip(0), places, places[29:31].flip(0)])  # 2 1 0 1 2 ... 30 31 30 29
    rows = mirrored[down[:, None] + places]  # (n, 32)
    columns = mirrored[right[:, None] + torch.where(flip[:, None] == 1, places.flip(0), places)]
    picked = torch.arange(len(images), device=images.device)[:, None, None]
    pixels = (picked * 32 + rows[:, :, None]) * 32 + columns[:, None, :]  # (n, 32, 32): which of all the n x 1024 pixels
    colours = images.permute(0, 2, 3, 1).reshape(-1, 3).index_select(0, pixels.flatten())
    return colours.view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()


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
