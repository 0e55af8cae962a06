"""The multiplications of a network, counted by torch itself: what architectures.py, prune.py and distill.py state as GMACs."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def gmacs(model: nn.Module, resolution: int) -> float:
    """Billions of multiplications, each with an addition, for one image of so many pixels a side; 2 FLOPs each, as torch counts them."""
    image = torch.zeros(1, 3, resolution, resolution, device=next(model.parameters()).device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # MATH: attention as products that are counted
        model(image)
    return counter.get_total_flops() / 2e9
