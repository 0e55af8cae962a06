"""Files of a network with many zeros, format by format: which one is smaller than the plain file, and from how many zeros on.

dense       torch.save of the weights: zeros cost as much as other numbers
COO         for each nonzero weight its value and the indices of all its dimensions, 8 bytes each
CSR         the weight as a matrix: for each nonzero its value and its column, 8 bytes, for each row where it begins
gzip        the dense file compressed: the runs of zero bytes shrink, the other numbers hardly do
bitmask     one bit a weight, zero or not, and the values of those that are not
"""

import gzip
import io
from pathlib import Path

import numpy as np
import torch

FORMATS = ("dense", "COO", "CSR", "gzip", "bitmask")


def is_weight(tensor: torch.Tensor) -> bool:
    return tensor.ndim > 1 and tensor.is_floating_point()


def pack(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """One bit a value, and the values that are not 0."""
    nonzero = tensor != 0
    bits = torch.from_numpy(np.packbits(nonzero.flatten().numpy()))
    return {"bits": bits, "values": tensor[nonzero].clone(), "shape": torch.tensor(tensor.shape)}


def unpack(packed: dict[str, torch.Tensor]) -> torch.Tensor:
    shape = packed["shape"].tolist()
    nonzero = torch.from_numpy(np.unpackbits(packed["bits"].numpy(), count=int(np.prod(shape)))).bool()
    flat = torch.zeros(nonzero.shape, dtype=packed["values"].dtype)
    flat[nonzero] = packed["values"]
    return flat.view(shape)


def to_csr(tensor: torch.Tensor) -> torch.Tensor:
    """The weight as a matrix in CSR, its columns copied: torch's are a view of pairs (row, column), and torch.save keeps what is viewed."""
    csr = tensor.flatten(1).to_sparse_csr()
    return torch.sparse_csr_tensor(csr.crow_indices(), csr.col_indices().clone(), csr.values(), csr.shape, check_invariants=False)


def serialize(state: dict[str, torch.Tensor], kind: str = "dense") -> bytes:
    """A state_dict as a file in one of FORMATS."""
    convert = {
        "COO": lambda tensor: tensor.to_sparse(),
        "CSR": to_csr,
        "bitmask": pack,
    }.get(kind, lambda tensor: tensor)
    content = {name: convert(tensor.contiguous()) if is_weight(tensor) else tensor for name, tensor in state.items()}
    written = io.BytesIO()
    torch.save(content, written)
    return gzip.compress(written.getvalue()) if kind == "gzip" else written.getvalue()


def save_sparse(state: dict[str, torch.Tensor], file: Path, kind: str) -> int:
    """Write a state_dict in one of FORMATS; its bytes."""
    return file.write_bytes(serialize(state, kind))


def load_sparse(file: Path, kind: str, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """What save_sparse wrote, dense again."""
    data = file.read_bytes()
    content = torch.load(io.BytesIO(gzip.decompress(data) if kind == "gzip" else data), weights_only=True)
    restore = {"COO": lambda kept: kept.to_dense(), "CSR": lambda kept: kept.to_dense(), "bitmask": unpack}
    state = {}
    for name, kept in content.items():
        changed = isinstance(kept, dict) or kept.layout != torch.strided
        state[name] = restore[kind](kept).view(shapes[name]) if changed else kept
    return state
