"""How many bytes a training step moves between devices: DataParallel, DistributedDataParallel, sharded training; by formula, and counted.

k devices, P bytes of parameters (the gradients are as large), B of buffers, X of a whole batch, Y of the network's output for it.
A ring all-reduce passes k - 1 pieces of size P / k around twice, once to add them up and once to hand out the sums
(https://doi.org/10.1016/j.jpdc.2008.09.002). Sharded training gathers the parameters for the forward pass and again for the
backward pass, and adds the gradients up without handing all of them out (https://arxiv.org/abs/1910.02054).

That is how nccl does it. Gloo, by which processes talk on CPUs, hands all of the sums out even where each process asks for its part, so
that sharded training moves more than by the formula: on_loopback() measures what really went by.
"""

import collections

import matplotlib.pyplot as plt
import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def parameter_bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def dp_bytes(k: int, P: int, B: int, X: int, Y: int, nccl: bool = False) -> dict[str, int]:
    """Bytes through device 0 in one DataParallel step, by stage: it sends or receives every one of them.

    `nccl`: of the network and of the gradients only one copy; the other devices hand them on and add them up on the way. In all as many
    bytes move, over the links between the others. Source: torch/nn/parallel/comm.py and torch/csrc/cuda/comm.cpp.
    """
    copies = min(1, k - 1) if nccl else k - 1
    return {
        "scatter inputs": (k - 1) * X // k,
        "replicate": copies * (P + B),
        "gather outputs": (k - 1) * Y // k,
        "scatter gradients": (k - 1) * Y // k,
        "reduce": copies * P,
    }


def ddp_bytes(k: int, P: int) -> int:
    """Bytes that each process sends in one DistributedDataParallel step, by a ring all-reduce: never 2 P."""
    return 2 * (k - 1) * P // k


def fsdp_bytes(k: int, P: int, micro_batches: int = 1) -> int:
    """Bytes that each process sends in one fully sharded step, by rings: two all-gathers a micro-batch and one reduce-scatter.

    With one micro-batch 1.5 times DDP's. FSDP2 sends a little less: the layers of the outermost group, here the head, are gathered once,
    for they are kept from the forward to the backward pass.
    """
    return (2 * micro_batches + 1) * (k - 1) * P // k


class BytesSent(TorchDispatchMode):
    """A with-block that looks at every operation of torch and counts the bytes handed to collective ones, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.handed = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            tensors = [tensor for value in args for tensor in (value if isinstance(value, list) else [value]) if torch.is_tensor(tensor)]
            # an all-gather and a reduce-scatter have a whole and a part, of which the whole counts
            self.handed[operation.__name__.partition(".")[0]] += max(tensor.nbytes for tensor in tensors)
        return operation(*args, **(kwargs or {}))

    def by_ring(self, k: int) -> int:
        """Bytes that each of k processes sends for them, where they pass pieces around a ring: once, for an all-reduce twice."""
        return sum(count * (2 if name == "allreduce_" else 1) for name, count in self.handed.items()) * (k - 1) // k


def on_loopback() -> int | None:
    """Bytes that have gone so far over the interface that leads back to this machine; None where nobody counts them (Windows)."""
    counted = psutil.net_io_counters(pernic=True)
    return next((counted[name].bytes_sent for name in ("lo", "lo0") if name in counted), None)


def traffic_table(P: int, B: int, X: int, Y: int, devices=(2, 4, 8)) -> list[dict]:
    """A row a number of devices: MB through DataParallel's device 0 by stage, in all, and with nccl; MB that each DDP process sends.

    It receives as many: `dp_over_ddp` is what device 0 sends and receives over what a DDP process sends and receives.
    """
    rows = []
    for k in devices:
        stages = dp_bytes(k, P, B, X, Y)
        dp, ddp = sum(stages.values()), ddp_bytes(k, P)
        megabytes = {f"{name.replace(' ', '_')}_mb": count / 1e6 for name, count in stages.items()}
        nccl = sum(dp_bytes(k, P, B, X, Y, nccl=True).values())
        row = {"devices": k, **megabytes, "dp_root_mb": dp / 1e6, "dp_root_nccl_mb": nccl / 1e6, "ddp_each_mb": ddp / 1e6}
        rows.append(row | {"dp_over_ddp": dp / (2 * ddp)})
    return rows


def plot_traffic(P: int, B: int, X: int, Y: int) -> plt.Figure:
    """MB a step over the number of devices: DataParallel's device 0 grows with k - 1 without nccl, a DDP process stays below 2 P."""
    devices = list(range(2, 17))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for label, style, nccl in (("device by device", "o-", False), ("handed on by nccl", "o--", True)):
        root = [sum(dp_bytes(k, P, B, X, Y, nccl).values()) / 1e6 for k in devices]
        axes.plot(devices, root, style, color="tab:red", label=f"DataParallel, {label}: through device 0")
    for name, colour, formula in (("DDP", "tab:blue", ddp_bytes), ("sharded", "tab:green", fsdp_bytes)):
        label = f"{name}: sent by each process, and as much received"
        axes.plot(devices, [formula(k, P) / 1e6 for k in devices], "o-", color=colour, label=label)
    axes.axhline(2 * P / 1e6, color="tab:blue", linestyle=":", linewidth=1)
    axes.text(1.01, 2 * P / 1e6, "2 P", color="tab:blue", fontsize=8, va="center", transform=axes.get_yaxis_transform())
    axes.set(xlabel="devices", ylabel="MB a training step", ylim=(0, None), xticks=devices[::2])
    axes.set_title(f"P = {P / 1e6:.1f} MB of parameters, batch X = {X / 1e6:.1f} MB", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure
