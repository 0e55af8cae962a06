"""How many bytes a training step moves between devices, by formula: DataParallel, DistributedDataParallel and sharded training.

k devices, P bytes of parameters (the gradients are as large), B of buffers, X of a whole batch, Y of the network's output for it.
A ring all-reduce passes k - 1 pieces of size P / k around twice, once to add them up and once to hand out the sums
(https://doi.org/10.1016/j.jpdc.2008.09.002). Sharded training gathers the parameters for the forward pass and again for the
backward pass, and adds the gradients up without handing all of them out (https://arxiv.org/abs/1910.02054).
"""

import matplotlib.pyplot as plt
from torch import nn


def parameter_bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def dp_bytes(k: int, P: int, B: int, X: int, Y: int) -> dict[str, int]:
    """Bytes through device 0 in one DataParallel step, by stage: it sends or receives every one of them."""
    return {
        "scatter inputs": (k - 1) * X // k,
        "replicate": (k - 1) * (P + B),
        "gather outputs": (k - 1) * Y // k,
        "scatter gradients": (k - 1) * Y // k,
        "reduce": (k - 1) * P,
    }


def ddp_bytes(k: int, P: int) -> int:
    """Bytes that each process sends in one DistributedDataParallel step, by a ring all-reduce: never 2 P."""
    return 2 * (k - 1) * P // k


def fsdp_bytes(k: int, P: int) -> int:
    """Bytes that each process sends in one fully sharded step: two all-gathers and one reduce-scatter, 1.5 times DDP's."""
    return 3 * (k - 1) * P // k


def traffic_table(P: int, B: int, X: int, Y: int, devices=(2, 4, 8)) -> list[dict]:
    """A row a number of devices: MB through DataParallel's device 0 by stage and in all, MB that each DDP process sends."""
    rows = []
    for k in devices:
        stages = dp_bytes(k, P, B, X, Y)
        dp, ddp = sum(stages.values()), ddp_bytes(k, P)
        megabytes = {f"{name.replace(' ', '_')}_mb": count / 1e6 for name, count in stages.items()}
        rows.append({"devices": k, **megabytes, "dp_root_mb": dp / 1e6, "ddp_each_mb": ddp / 1e6, "dp_over_ddp": dp / ddp})
    return rows


def plot_traffic(P: int, B: int, X: int, Y: int) -> plt.Figure:
    """MB a step over the number of devices: DataParallel's device 0 grows with k - 1, a DDP process stays below 2 P."""
    devices = list(range(2, 17))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    root = [sum(dp_bytes(k, P, B, X, Y).values()) / 1e6 for k in devices]
    axes.plot(devices, root, "o-", color="tab:red", label="DataParallel: through device 0")
    axes.plot(devices, [ddp_bytes(k, P) / 1e6 for k in devices], "o-", color="tab:blue", label="DDP: sent by each process")
    axes.plot(devices, [fsdp_bytes(k, P) / 1e6 for k in devices], "o-", color="tab:green", label="sharded: sent by each process")
    axes.axhline(2 * P / 1e6, color="tab:blue", linestyle=":", linewidth=1)
    axes.text(1.01, 2 * P / 1e6, "2 P", color="tab:blue", fontsize=8, va="center", transform=axes.get_yaxis_transform())
    axes.set(xlabel="devices", ylabel="MB a training step", ylim=(0, None), xticks=devices[::2])
    axes.set_title(f"P = {P / 1e6:.1f} MB of parameters, batch X = {X / 1e6:.1f} MB", fontsize=10)
    axes.legend()
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure
