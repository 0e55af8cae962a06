"""What `prune.py -formats` does: whether a network with many zeros is a smaller file, and whether it is faster.

Sizes: the student, pruned to several sparsities, is written in each format of sparse_files.py, read again and compared bit by bit. Time:
a convolution multiplies by zeros as fast as by other numbers, and has no sparse form in PyTorch; a linear layer has one (CSR),
which pays from some sparsity on, and that depends on the batch. Both are drawn as times as fast as without zeros, or as dense.
"""

import itertools
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import normalize
from common import print_table, save_figure
from errors import InputError, first_line
from m29_inference import prune as exercise
from m29_inference.prune import remove_masks
from m29_inference.prune_accuracy import prune_all
from m29_inference.sparse_files import FORMATS, load_sparse, save_sparse, serialize
from m29_inference.student import copy_of, student_and_data
from timing import Timing, measure_alternately, times_as_fast

SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
QUICK_SPARSITIES = (0.0, 0.5, 0.8, 0.99)
TOLD = 0.8  # the sparsity whose file sizes are told in words
TIMED = (0.0, 0.5, 0.8, 0.95)  # sparsities of the student that is timed
LINEAR = 512  # inputs and outputs of the linear layer
ROUNDS = 9  # of a measurement
CPU = torch.device("cpu")


def pruned(network: nn.Module, sparsity: float) -> nn.Module:
    """A copy with the smallest weights at 0, the masks still in place."""
    copied = copy_of(network)
    prune_all(copied, sparsity)
    return copied


def sizes(network: nn.Module, folder: Path, sparsities: tuple[float, ...]) -> list[dict]:
    """A row for each format and sparsity: MB, after what was read again was found to be the same. "masked" is before remove()."""
    rows = []
    for sparsity in sparsities:
        net = pruned(network, sparsity)
        row = {"method": "global", "sparsity": sparsity}
        rows.append(row | {"format": "masked", "size_mb": len(serialize(net.state_dict())) / 1e6})
        remove_masks(net)
        state = net.state_dict()
        shapes = {name: value.shape for name, value in state.items()}
        for kind in FORMATS:
            size = save_sparse(state, folder / kind, kind)
            again = load_sparse(folder / kind, kind, shapes)
            if not all(same_bits(again[name], value) for name, value in state.items()):
                raise RuntimeError(f"the format {kind} did not give back what was written")
            rows.append(row | {"format": kind, "size_mb": size / 1e6})
    return rows


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """torch.equal() takes -0.0 and 0.0 for the same."""
    return torch.equal(one, other) and one.numpy().tobytes() == other.numpy().tobytes()


def break_even(rows: list[dict], kind: str) -> float | None:
    """The sparsity from which `kind` is smaller than the dense file, between two measured ones by a straight line."""
    dense = {row["sparsity"]: row["size_mb"] for row in rows if row["format"] == "dense"}
    gains = [(row["sparsity"], dense[row["sparsity"]] - row["size_mb"]) for row in rows if row["format"] == kind]
    if gains[0][1] > 0:
        return 0.0
    for (before, loss), (after, gain) in itertools.pairwise(gains):
        if gain > 0:
            return before + (after - before) * -loss / (gain - loss)
    return None


def time_convolutions(network: nn.Module, data: dict) -> list[dict]:
    """The student's latency over sparsity, its zeros computed with as any number is; batch 1 and 128."""
    rows, nets = [], {sparsity: pruned(network, sparsity) for sparsity in TIMED}
    for net in nets.values():
        remove_masks(net)
    for batch in (1, 128):
        images = normalize(data["test"].images[:batch])
        with torch.inference_mode():
            calls = {sparsity: (lambda net=net, images=images: net(images)) for sparsity, net in nets.items()}
            timings = measure_alternately(calls, CPU, ROUNDS)
        for sparsity, timing in timings.items():
            row = {"method": "global", "format": "dense", "layer": "student", "sparsity": sparsity, "batch": len(images)}
            rows.append(row | against(timing, timings[0.0], "no zeros"))
    return rows


def against(timing: Timing, other: Timing, name: str) -> dict:
    """Columns: the latency, whether it is another one than `other`'s, and the median ratio, above 1 where it is faster."""
    said = None if timing is other else times_as_fast(timing.runs_ms, other.runs_ms, name)
    ratios = [their / own for their, own in zip(other.runs_ms, timing.runs_ms, strict=True)]
    return {"latency_ms": timing.median_ms, "against_dense": said, "times_as_fast": statistics.median(ratios)}


def time_linear(generator: torch.Generator, sparsities: tuple[float, ...]) -> list[dict]:
    """One linear layer, dense and as CSR, over sparsity, batch 1 and 64: latency, and how many times as fast as dense."""
    rows = []
    for batch in (1, 64):
        x = torch.randn(batch, LINEAR, generator=generator)
        for sparsity in sparsities:
            weight = torch.randn(LINEAR, LINEAR, generator=generator)
            weight[torch.rand(LINEAR, LINEAR, generator=generator) < sparsity] = 0
            timings = time_csr(x, weight)
            row = {"method": "random", "format": "CSR", "layer": f"linear {LINEAR}x{LINEAR}", "sparsity": sparsity, "batch": batch}
            rows.append(row | against(timings["CSR"], timings["dense"], "dense"))
    return rows


def time_csr(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Timing]:
    """A linear layer with this weight, "dense" and "CSR", which compute the same; InputError where torch has no product with CSR here."""
    csr = weight.to_sparse_csr()
    calls = {"dense": lambda: nn.functional.linear(x, weight), "CSR": lambda: nn.functional.linear(x, csr)}
    with torch.no_grad():  # a CSR tensor does not work in inference_mode
        try:
            ours = calls["CSR"]()
        except RuntimeError as error:  # a build of torch without MKL
            raise InputError(f"a linear layer as CSR is left out, this torch cannot compute it ({first_line(error)})") from error
        if not torch.allclose(calls["dense"](), ours, atol=1e-3):
            raise RuntimeError("CSR computes something else")
        return measure_alternately(calls, CPU, ROUNDS)


def measure(args) -> list[dict]:
    """Sizes by format and sparsity, then latencies; two figures."""
    warnings.filterwarnings("ignore", message=".*[Ss]parse.*tensor")  # that CSR is in beta, that what is loaded is validated
    network, data = student_and_data(args)
    sparsities = QUICK_SPARSITIES if args.quick else SPARSITIES
    with tempfile.TemporaryDirectory() as folder:
        files = sizes(network, Path(folder), sparsities)
    table = [{"sparsity": sparsity} for sparsity in sparsities]
    for row in files:
        table[sparsities.index(row["sparsity"])][f"{row['format']}_mb"] = row["size_mb"]
    print_table(table)
    for kind in FORMATS[1:]:
        even, told = break_even(files, kind), table[sparsities.index(TOLD)]
        said = "never" if even is None else f"from {even:.0%} zeros on"
        share = told[f"{kind}_mb"] / told["dense_mb"]
        print(f"{kind}: smaller than the dense file {said}; with {TOLD:.0%} zeros {share:.2f} of it; read again bit for bit")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    save_figure(plot_sizes(files), exercise.__file__, "formats", args, f"the student of {parameters:,} parameters")
    times = time_convolutions(network, data)
    try:
        linear = time_linear(torch.Generator().manual_seed(args.seed), sparsities[-len(sparsities) // 2 :])
        times += linear
    except InputError as error:
        print(error)
    save_figure(plot_times(times), exercise.__file__, "latency", args, f"{ROUNDS} repeats in turn, median")
    print()
    print_table([{key: value for key, value in row.items() if key not in ("method", "times_as_fast")} for row in times])
    return files + times


def plot_sizes(rows: list[dict]) -> plt.Figure:
    """File size over sparsity, a line a format."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for kind in ("masked", *FORMATS):
        mine = [row for row in rows if row["format"] == kind]
        axes.plot([r["sparsity"] for r in mine], [r["size_mb"] for r in mine], "k--" if kind == "dense" else "o-", markersize=4, label=kind)
    axes.set(xlabel="sparsity: share of weights that are 0", ylabel="file, MB", ylim=(0, None))
    figure.legend(*axes.get_legend_handles_labels(), loc="upper center", ncols=6, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 0.95))
    return figure


def plot_times(rows: list[dict]) -> plt.Figure:
    """How many times as fast zeros make the student, and as CSR a linear layer, over sparsity, a line a batch size; below 1: slower."""
    figure, both = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    titles = {"dense": "the student, dense: zeros are multiplied", "CSR": f"a linear layer, {LINEAR}x{LINEAR}, as CSR: zeros are skipped"}
    for axes, (kind, title) in zip(both, titles.items(), strict=True):
        for batch in sorted({row["batch"] for row in rows if row["format"] == kind}):
            mine = [row for row in rows if row["format"] == kind and row["batch"] == batch]
            axes.plot([r["sparsity"] for r in mine], [r["times_as_fast"] for r in mine], "o-", label=f"batch {batch}")
        axes.axhline(1, color="black", linestyle="--", linewidth=1, label="no zeros" if kind == "dense" else "dense")
        axes.set(xlabel="sparsity: share of weights that are 0", title=title, yscale="log")
        axes.legend()
    both[0].set(ylabel="times as fast")
    both[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    both[0].yaxis.set_major_formatter("{x:g}")
    both[0].yaxis.set_minor_formatter("")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure
