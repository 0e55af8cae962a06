"""The multiplications of a network, counted by torch itself: what architectures.py, quantize.py, prune.py and distill.py state as GMACs."""

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


def gmacs_by_layer(model: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """The same for each convolution and linear layer that runs, by name, for all of `images`, in the order in which they first run."""
    names = {f"{type(model).__name__}.{name}": name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(images[:1])
    counted = counter.get_flop_counts()
    return {names[key]: sum(flops.values()) / 2e9 * len(images) for key, flops in counted.items() if key in names}
