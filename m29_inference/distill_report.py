"""What distill.py says of its networks: what they cost, the table, the verdict and the pictures."""

import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import Images
from common import print_table
from m29_inference.macs import gmacs
from m29_inference.sparse_files import serialize
from timing import measure_alternately, spread, verdict

ALONE, DISTILLED = "student", "student + KD"
COLOURS = {ALONE: "tab:grey", DISTILLED: "tab:blue"}
STEP_ROUNDS = 9
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 95 % two-sided, 1 to 9 degrees of freedom


def costs(networks: dict[str, nn.Module], image: dict[str, torch.Tensor], device: torch.device) -> dict[str, dict]:
    """For each network what an image costs: parameters, GMACs, latency at batch 1 (measured in turn), MB of its file."""
    calls = {name: (lambda network=network, x=image[name]: network(x)) for name, network in networks.items()}
    with torch.inference_mode():
        timings = measure_alternately(calls, device)
    rows = {}
    for name, network in networks.items():
        rows[name] = {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "gmacs": gmacs(network, image[name].shape[-1]),
            "latency_ms": timings[name].median_ms,
            "size_mb": len(serialize(network.state_dict())) / 1e6,
        }
    return rows


def gain(differences: list[float]) -> tuple[float, float]:
    """Mean of the seeds' differences and half of its 95 % interval, by Student's t."""
    n = len(differences)
    return statistics.mean(differences), T95[min(n - 1, len(T95)) - 1] * spread(differences) / n**0.5


def say(table: list[dict], curves: dict[str, list]) -> dict:
    """Teacher, student alone, student distilled: mean and sd over the seeds; then whether the difference is one, which is returned."""
    summary = [table[0] | {"seeds": None}]
    for model in curves:
        mine = [row for row in table if row["model"] == model]
        own = [row["accuracy"] for row in mine]
        seconds = statistics.mean(row["train_s"] for row in mine)
        summary.append(mine[0] | {"accuracy": statistics.mean(own), "sd": spread(own), "seeds": len(own), "train_s": seconds})
    columns = ("model", "seeds", "epochs", "accuracy", "sd", "parameters", "gmacs", "latency_ms", "size_mb", "train_s")
    print()
    print_table([{key: row.get(key) for key in columns} for row in summary])
    pairs = list(zip(curves[DISTILLED], curves[ALONE], strict=True))
    differences = [distilled[-1]["accuracy"] - alone[-1]["accuracy"] for distilled, alone in pairs]
    mean, half = gain(differences)
    # two seeds that differ by as many images say nothing about chance
    judged = "better" if mean > half > 0 else "worse" if -mean > half > 0 else "cannot tell"
    print(f"distillation, seed by seed: {', '.join(f'{difference * 100:+.2f}' for difference in differences)} points")
    print(f"distillation: {mean * 100:+.2f} points, 95 % interval {(mean - half) * 100:+.2f} to {(mean + half) * 100:+.2f}: {judged}")
    return {"model": f"{DISTILLED} less {ALONE}", "accuracy": mean, "accuracy_margin": half, "accuracy_by_seed": differences}


def say_cost(steps: dict, device: torch.device) -> float:
    """How many times as long as a plain step of training a distilled one takes, both measured in turn."""
    timings = measure_alternately(steps, device, STEP_ROUNDS)
    ratios = [own / other for own, other in zip(timings[DISTILLED].runs_ms, timings[ALONE].runs_ms, strict=True)]
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    said = f"{low:.2f} to {high:.2f} in {STEP_ROUNDS} rounds in turn: {verdict(ratios, 'longer', 'less')}"
    print(f"a distilled step takes {median:.2f} times as long as a plain one ({said})")
    return median


def plot_curves(curves: dict[str, list], teacher: float) -> plt.Figure:
    """Accuracy over epochs: the mean of the seeds, and the band from the worst to the best."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for model, runs in curves.items():
        values = torch.tensor([[row["accuracy"] for row in rows] for rows in runs])  # (seeds, epochs)
        epochs = range(1, values.shape[1] + 1)
        axes.fill_between(epochs, values.amin(0), values.amax(0), color=COLOURS[model], alpha=0.25)
        axes.plot(epochs, values.mean(0), "o-", markersize=4, color=COLOURS[model], label=model)
    axes.axhline(teacher, color="black", linestyle="--", linewidth=1, label="teacher")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel="accuracy on the test images")
    axes.legend()
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def plot_knowledge(data: Images, logits: torch.Tensor, temperature: float) -> plt.Figure:
    """Left: the mean of the teacher's softened classes over the images of each class, without the class itself; right: unsure images."""
    soft = (logits / temperature).softmax(1)
    labels = data.labels[: len(soft)]
    similar = torch.stack([soft[labels == label].mean(0) for label in range(len(data.classes))]).nan_to_num(0)  # of a class without images
    similar.fill_diagonal_(0)
    tell_similar(similar, data.classes, temperature)
    figure = plt.figure(figsize=(11, 5.2))
    left, *places = figure.subplot_mosaic([["map", "map", "0", "1", "2"], ["map", "map", "3", "4", "5"]]).values()
    picture = left.imshow((similar / similar.sum(1, keepdim=True).clamp(min=1e-9)).numpy(), cmap="Blues")
    left.set(xticks=range(len(data.classes)), yticks=range(len(data.classes)), yticklabels=data.classes)
    left.set_xticklabels(data.classes, rotation=60, ha="right")
    left.set(ylabel="label", title="what else the teacher sees in it")
    figure.colorbar(picture, ax=left, label="share of what the label does not get", shrink=0.8)
    margin = soft.topk(2).values.diff(dim=1).abs().squeeze(1)
    for axes in places:
        axes.axis("off")
    for axes, number in zip(places, margin.argsort().tolist(), strict=False):  # there may be fewer images than places
        axes.imshow(data.images[number].permute(1, 2, 0).numpy())
        chances, best = soft[number].topk(3)
        said = "\n".join(f"{data.classes[kind]} {chance:.0%}" for chance, kind in zip(chances, best, strict=True))
        axes.set_title(f"label: {data.classes[labels[number]]}\n{said}", fontsize=7)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def tell_similar(similar: torch.Tensor, classes: tuple[str, ...], temperature: float) -> None:
    """Print the three pairs of classes that are most like each other to the teacher."""
    pairs = [(similar[a, b].item(), f"{one} is a bit like {other}") for a, one in enumerate(classes) for b, other in enumerate(classes)]
    print(
        f"to the teacher, at T = {temperature:g}, "
        + ", ".join(f"{text} ({chance:.1%})" for chance, text in sorted(pairs, reverse=True)[:3])
    )


def plot_sweep(table: list[dict]) -> plt.Figure:
    """Accuracy over temperature, a line an alpha, and the student that learnt alone."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for alpha in sorted({row["alpha"] for row in table[1:]}):
        mine = [row for row in table[1:] if row["alpha"] == alpha]
        axes.plot([row["temperature"] for row in mine], [row["accuracy"] for row in mine], "o-", label=f"alpha {alpha:g}")
    axes.axhline(table[0]["accuracy"], color="black", linestyle="--", linewidth=1, label="alone")
    axes.set(xlabel="temperature", ylabel="accuracy on the test images", xscale="log")
    axes.set_xticks([row["temperature"] for row in table[1:]], [f"{row['temperature']:g}" for row in table[1:]])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure
