"""Networks made of linear layers, Vision Transformers above all: what has to be changed before int8 reaches them.

torchvision's Vision Transformers compute attention with nn.MultiheadAttention, which keeps its weights as bare parameters: nothing that
looks for nn.Linear finds them, and a third of the network stays float. PlainAttention is the same computation with linear layers.
"Dynamic" means that the scale of an activation is taken from the very numbers that come, so that nothing need be calibrated.
"""

import copy

import torch
from torch import nn

from m29_inference.int8 import import_quantizer, quiet, sums_overflow


class PlainAttention(nn.Module):
    """Self-attention (n, tokens, width) -> (n, tokens, width), computed as nn.MultiheadAttention does, its weights in nn.Linear."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.inputs = nn.Linear(attention.embed_dim, 3 * attention.embed_dim)  # queries, keys and values side by side
        self.inputs.weight, self.inputs.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = nn.Linear(attention.embed_dim, attention.embed_dim)
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, need_weights: bool = False) -> tuple[torch.Tensor, None]:
        """Called like nn.MultiheadAttention with query, key and value, which are one and the same in self-attention."""
        n, tokens, width = x.shape
        parts = self.inputs(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])  # (n, heads, tokens, width / heads)
        return self.out_proj(mixed.transpose(1, 2).reshape(n, tokens, width)), None


def with_plain_attention(network: nn.Module) -> nn.Module:
    """A copy of `network` with PlainAttention where nn.MultiheadAttention was; the network itself where there is none."""
    if not any(isinstance(module, nn.MultiheadAttention) for module in network.modules()):
        return network
    copied = copy.deepcopy(network).eval()
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, PlainAttention(child))
    return copied.eval()


def dynamic_int8(network: nn.Module) -> nn.Module:
    """A copy whose nn.Linear layers hold int8 weights and quantize what comes in as it comes, by torchao."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    import_quantizer()  # whose patterns the compiler needs to find these layers
    copied = copy.deepcopy(network).eval()
    with quiet():
        quantize_(copied, Int8DynamicActivationInt8WeightConfig(reduce_range=sums_overflow()))
    return copied
