"""The network that M29 trains, converts, prunes and distils: the ConvNet of cifar10.py behind a stem of filters that are never trained.

Neighbouring pixels are nearly alike, and so are the three colours of one. The stem takes that likeness away: its filters are the principal
components of 2x2 patches of the training images, scaled to variance 1 (the finest to less, see SMALLEST_VARIANCE), and the negatives of
these filters, because the ReLU behind them lets only positive values pass. Keller Jordan 2024, arxiv.org/abs/2404.00498.
"""

import torch
from torch import nn

from cifar10 import ConvNet, Images, normalize

PATCH = 2  # pixels each way
FILTERS = 2 * 3 * PATCH**2  # a component for each of a patch's numbers, and its negative
SMALLEST_VARIANCE = 5e-4  # so that components which hardly occur are not blown up


class WhitenedNet(ConvNet):
    """The stem, then ConvNet: images (n, 3, 32, 32) -> logits (n, classes)."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__(widths, inputs=FILTERS)
        self.stem = nn.Conv2d(3, FILTERS, PATCH, bias=False).requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.relu(self.stem(images)))


def whitening_filters(images: torch.Tensor) -> torch.Tensor:
    """The stem's filters for uint8 images (n, 3, height, width): float32 (FILTERS, 3, PATCH, PATCH)."""
    patches = normalize(images).unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # (n, 3, height - 1, width - 1, PATCH, PATCH)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, FILTERS // 2)
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))  # columns: the components
    scaled = components / torch.sqrt(variances + SMALLEST_VARIANCE)
    filters = scaled.T.reshape(-1, 3, PATCH, PATCH)
    return torch.cat([filters, -filters])


def new_network(widths: tuple[int, int, int], data: Images, seed: int) -> WhitenedNet:
    """An untrained network with the first weights of `seed` and the stem for these images."""
    torch.manual_seed(seed)
    network = WhitenedNet(widths)
    with torch.no_grad():
        network.stem.weight.copy_(whitening_filters(data.images[:5000]))
    return network
