"""Cut whole channels out of a network: rank them, silence them, and remove them from every tensor that knows them.

A channel of a convolution lives in three places: a filter of the convolution, one number in each of the normalization's four vectors, and
a slice of every filter of the layer that reads it. The channel is gone only when all three are cut. Zeroing the filter alone is not even
the same network: the normalization's bias (beta) still puts a constant into the channel.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from cifar10 import ConvNet
from errors import InputError


@dataclass
class Link:
    """A place where channels can be cut: a convolution, its normalization, and the only layer that reads what they put out."""

    name: str
    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    reader: nn.Module

    @property
    def width(self) -> int:
        return self.conv.out_channels


def links(network: nn.Module) -> list[Link]:
    """The places of a ConvNet, or of torchvision's residual networks: there only inside a block, as the shortcut adds up the rest."""
    if isinstance(network, ConvNet) and isinstance(network.stages[0].norm1, nn.BatchNorm2d):
        places = []
        for number, stage in enumerate(network.stages):
            after = network.stages[number + 1].conv1 if number + 1 < len(network.stages) else network.head
            places.append(Link(f"stages.{number}.conv1", stage.conv1, stage.norm1, stage.conv2))
            places.append(Link(f"stages.{number}.conv2", stage.conv2, stage.norm2, after))
        return places
    places = []
    for name, block in network.named_modules():
        if isinstance(block, BasicBlock | Bottleneck):
            places.append(Link(f"{name}.conv1", block.conv1, block.bn1, block.conv2))
        if isinstance(block, Bottleneck):
            places.append(Link(f"{name}.conv2", block.conv2, block.bn2, block.conv3))
    if not places or any(link.conv.groups * getattr(link.reader, "groups", 1) > 1 for link in places):
        raise InputError(
            f"{type(network).__name__}: only ConvNet with batch normalization, and residual networks without groups of channels, are cut"
        )
    return places


def rank(link: Link) -> torch.Tensor:
    """How much each channel counts, (width,): the length of its filter times the size of the normalization's weight (gamma)."""
    return link.conv.weight.detach().flatten(1).norm(dim=1) * link.norm.weight.detach().abs()


def silence(link: Link, channels: torch.Tensor) -> None:
    """Make `channels` put out zeros: scale and bias of the normalization, so that what follows cannot tell them from absent ones."""
    with torch.no_grad():
        link.norm.weight[channels] = 0
        link.norm.bias[channels] = 0


def shrink(link: Link, kept: torch.Tensor) -> None:
    """Cut all channels but `kept`, int64 and ascending, out. The network computes the same if the others were silent."""
    conv, norm, reader = link.conv, link.norm, link.reader
    conv.weight = nn.Parameter(conv.weight.detach()[kept].clone())
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.detach()[kept].clone())
    conv.out_channels = norm.num_features = len(kept)
    for name in ("weight", "bias"):
        setattr(norm, name, nn.Parameter(getattr(norm, name).detach()[kept].clone()))
    norm.running_mean, norm.running_var = norm.running_mean[kept].clone(), norm.running_var[kept].clone()
    reader.weight = nn.Parameter(reader.weight.detach()[:, kept].clone())
    if isinstance(reader, nn.Conv2d):
        reader.in_channels = len(kept)
    else:
        reader.in_features = len(kept)
