"""What `prune.py -structured` does: cut whole channels out of the trained student, so that it is smaller and faster without special code.

The channels that count least (shrink.py says how they are ranked) are first made silent. Then they are cut out of every tensor, and the
smaller network must compute what the silent one does before it is fine-tuned and timed. The unpruned network gets the same
fine-tuning. Widths stay multiples of UNIT.
"""

import copy
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torchvision.models import resnet18
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import normalize
from common import print_table, save_figure
from errors import InputError
from m29_inference import prune as exercise
from m29_inference.macs import gmacs
from m29_inference.prune_accuracy import tune
from m29_inference.shrink import Link, links, rank, shrink, silence
from m29_inference.sparse_files import serialize
from m29_inference.student import copy_of, student_and_data
from m29_inference.training import accuracy
from timing import measure_alternately, times_as_fast

UNIT = 16  # channels: as many float32 numbers as the widest vector registers hold
SHARES = (0.5, 0.35)  # of the multiplications
BATCHES = (1, 128)
EPOCHS = 6  # of fine-tuning, where -epochs does not say it
LEARNING_RATE = 0.1  # half of the training's: where whole channels are gone, the others have more to learn anew


def kept_channels(link: Link, share: float) -> torch.Tensor:
    """Those of a link's channels that count most, ascending: `share` of them, a multiple of UNIT."""
    width = min(link.width, max(UNIT, round(link.width * share / UNIT) * UNIT))
    return rank(link).topk(width).indices.sort().values


def cut(network: nn.Module, share: float, only: str | None = None) -> tuple[nn.Module, float]:
    """A copy in which each link, or only the one of this name, has `share` of its channels; the logits' difference from the silenced."""
    silent, small = copy.deepcopy(network).eval(), copy.deepcopy(network).eval()
    for quiet, link in zip(links(silent), links(small), strict=True):
        if only in (None, link.name):
            kept = kept_channels(link, share)
            silence(quiet, torch.tensor(sorted(set(range(link.width)) - set(kept.tolist())), dtype=torch.int64))
            shrink(link, kept)
    right = outputs(silent)
    difference = (outputs(small) - right).abs().max().item()
    if difference > 1e-5 * max(1.0, right.abs().max().item()):
        raise RuntimeError(f"the smaller network computes something else than the silenced one: the logits differ by {difference:.1g}")
    return small, difference


def outputs(network: nn.Module) -> torch.Tensor:
    """What it answers to the same 8 images of noise each time, (8, 10)."""
    with torch.inference_mode():
        return network(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def say_why_the_bias_counts(network: nn.Module) -> None:
    """Cut half of the first layer's channels; compare with the network whose channels are silent, and with one whose filters are 0."""
    small, silent, zeroed = (copy_of(network) for _ in range(3))
    link = links(small)[0]
    gone, kept = rank(link).argsort()[: link.width // 2], rank(link).argsort()[link.width // 2 :].sort().values
    shrink(link, kept)
    silence(links(silent)[0], gone)
    with torch.no_grad():
        links(zeroed)[0].conv.weight[gone] = 0
    exact, constant = ((outputs(small) - outputs(other)).abs().max().item() for other in (silent, zeroed))
    print(f"half of {link.name}'s channels cut out: the logits differ by {exact:.0e} from those with the channels silent,", end=" ")
    print(f"by {constant:.1g} from those with only their filters at 0: the normalization's bias is left then")


def say_that_blocks_are_cut_inside() -> None:
    """Cut torchvision's resnet18, untrained, where that is possible, and say how much of it is left."""
    network = resnet18()
    small, difference = cut(network, 0.5)
    left = gmacs(small, 224) / gmacs(network.eval(), 224)
    print(f"resnet18, half of the channels inside each block cut out: {left:.2f} of the multiplications are left,", end=" ")
    print(f"the logits differ by {difference:.0e}; between blocks none can go, because the shortcut adds the channels up there")


def cut_to(network: nn.Module, macs: float) -> tuple[nn.Module, float]:
    """The largest cut() that leaves at most `macs` of the multiplications, all layers losing the same share of their channels.

    InputError where even the narrowest layers, of UNIT channels, leave more.
    """
    full = gmacs(network, 32)
    for share in (step / 64 for step in range(63, 0, -1)):
        small = cut(network, share)
        left = gmacs(small[0], 32) / full
        if left <= macs:
            return small
    raise InputError(f"with UNIT {UNIT} at least {left:.2f} of the multiplications are left, not {macs}: take a smaller one")


def time_both(full: nn.Module, small: nn.Module, data: dict) -> list[dict]:
    """Latency of the smaller network against the full one, batch 1 and 128: a row each, with the median ratio and the verdict."""
    rows = []
    for batch in BATCHES:
        images = normalize(data["test"].images[:batch])
        calls = {name: (lambda net=net, images=images: net(images)) for name, net in {"full": full, "small": small}.items()}
        with torch.inference_mode():
            timings = measure_alternately(calls, torch.device("cpu"), repeats=9)
        ratios = [own / whole for own, whole in zip(timings["small"].runs_ms, timings["full"].runs_ms, strict=True)]
        row = {"batch": len(images), "latency_ms": timings["small"].median_ms, "of_full": statistics.median(ratios)}
        rows.append(row | {"against_full": times_as_fast(timings["small"].runs_ms, timings["full"].runs_ms, "full")})
    return rows


def sensitivity(network: nn.Module, data: dict) -> list[dict]:
    """Accuracy with half of one layer's channels cut and nothing tuned, layer by layer."""
    rows = []
    for link in tqdm(links(network), "layers", leave=False):
        small, _ = cut(network, 0.5, link.name)
        [left] = [its.width for its in links(small) if its.name == link.name]  # half of them where UNIT divides that
        row = {"method": "half of one layer", "layer": link.name, "channels": f"{left} of {link.width}"}
        rows.append(row | {"accuracy": accuracy(small, data["test"])})
    return rows


def measure(args) -> list[dict]:
    """Rows by share of the multiplications and batch size, then by layer; two figures."""
    args.epochs = args.epochs or (1 if args.quick else EPOCHS)
    network, data = student_and_data(args)
    say_why_the_bias_counts(network)
    say_that_blocks_are_cut_inside()
    layers = sensitivity(network, data)
    full_macs, whole = gmacs(network, 32), sum(parameter.numel() for parameter in network.parameters())
    nets = [(copy_of(network), 0.0), *(cut_to(network, share) for share in (SHARES[:1] if args.quick else SHARES))]
    rows = []
    for net, difference in tqdm(nets, "fine-tuning"):
        widths = " ".join(str(link.width) for link in links(net))
        row = {
            "method": "structured",
            "widths": widths,
            "macs_left": gmacs(net, 32) / full_macs,
            "differs_by": difference,
            "accuracy": accuracy(net, data["test"]),
        }
        tune(net, data, args, args.epochs, LEARNING_RATE)
        row["parameters"] = sum(parameter.numel() for parameter in net.parameters())
        row["sparsity"] = 1 - row["parameters"] / whole  # here of what is gone, not of zeros
        row |= {"format": "dense", "size_mb": len(serialize(net.state_dict())) / 1e6}
        row["accuracy_tuned"] = accuracy(net.to(memory_format=torch.contiguous_format), data["test"])
        rows += [row | times for times in time_both(network, net, data)]
    print_table([{key: value for key, value in row.items() if key not in ("method", "sparsity", "format")} for row in rows])
    print("differs_by: the logits with the channels cut out, against those with them silent. accuracy_tuned, against the first row's:")
    tuned = rows[0]["accuracy_tuned"]
    for row in rows[len(BATCHES) :: len(BATCHES)]:
        print(f"  {row['macs_left']:.2f} of the multiplications: {100 * (row['accuracy_tuned'] - tuned):+.2f} points, one seed")
    print_table(layers)
    worst = min(layers, key=lambda row: row["accuracy"])
    left = f"{worst['accuracy']:.1%} are left of {rows[0]['accuracy']:.1%}"
    print(f"half of one layer's channels, not fine-tuned: {worst['layer']} costs most, {left}")
    save_figure(plot(rows), exercise.__file__, "structured", args, f"{args.epochs} epochs of fine-tuning, 9 repeats")
    save_figure(plot_layers(layers, rows[0]["accuracy"]), exercise.__file__, "layers", args, f"{len(data['test']):,} test images")
    return rows + layers


def plot(rows: list[dict]) -> plt.Figure:
    """Left: latency over multiplications, both as shares of the full network; right: accuracy before and after fine-tuning."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5))
    for batch in BATCHES:
        mine = [row for row in rows if row["batch"] == batch]
        left.plot([r["macs_left"] for r in mine], [r["of_full"] for r in mine], "o-", label=f"batch {batch}")
    left.plot([0, 1], [0, 1], "--", color="grey", label="in step with the multiplications")
    left.set(xlabel="share of the multiplications left", ylabel="latency / latency of the full network", xlim=(0, None), ylim=(0, None))
    mine = [row for row in rows if row["batch"] == BATCHES[0]]
    right.plot([r["macs_left"] for r in mine], [r["accuracy"] for r in mine], "o:", color="tab:grey", label="not fine-tuned")
    right.plot([r["macs_left"] for r in mine], [r["accuracy_tuned"] for r in mine], "o-", label="fine-tuned")
    right.set(xlabel="share of the multiplications left", ylabel="accuracy on the test images", xlim=(0, None))
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def plot_layers(rows: list[dict], full: float) -> plt.Figure:
    """Bars: the accuracy with half of one layer's channels gone, against that of the full network."""
    figure, axes = plt.subplots(figsize=(8, 3.5))
    axes.barh([row["layer"] for row in rows], [row["accuracy"] for row in rows], color="tab:blue")
    axes.axvline(full, color="tab:red", linestyle="--", label="all channels")
    axes.invert_yaxis()
    axes.set(xlabel="accuracy on the test images, not fine-tuned", ylabel="layer that lost half of its channels")
    figure.legend(*axes.get_legend_handles_labels(), loc="upper center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 0.95))
    return figure
