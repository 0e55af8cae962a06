"""What `prune.py -accuracy` does: how many weights a trained network can lose, at once or step by step, before and after fine-tuning.

All are fine-tuned alike: for `-epochs` epochs altogether, in STEPS parts, in each of which the learning rate rises and falls anew; where
there are fewer epochs than parts, the last parts get them. The unpruned network is, too, because more training alone may help.
"One-shot" prunes before the first part, "iterative" a step before each part. Each step takes a share of what is left (half, and then
half again, leaves a quarter), so the share is chosen for the steps to end at the sparsity asked for.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.utils import prune
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import print_table, save_figure
from m29_inference import prune as exercise
from m29_inference.prune import prunable, sparsity_by_layer
from m29_inference.student import copy_of, student_and_data
from m29_inference.training import CPU, accuracy, fingerprint, train, training_file

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
STEPS = 3
EPOCHS = 3  # of fine-tuning, where -epochs does not say it
LEARNING_RATE = 0.05  # a quarter of the training's: the weights shall settle, not start again


def prune_all(network: nn.Module, amount: float) -> None:
    """The smallest weights of the whole network become 0; `amount` is a share of those that are not 0 yet."""
    network.to(memory_format=torch.contiguous_format)  # training leaves it channels_last, which prune cannot flatten
    layers = [(module, "weight") for _, module in prunable(network)]
    # weight_orig, where there is one: a step of training changes it, `weight` follows only in the next forward pass
    sizes = {layer: getattr(layer[0], "weight_orig", layer[0].weight).detach().contiguous() for layer in layers}
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, importance_scores=sizes, amount=amount)


def tune(network: nn.Module, data: dict, args, epochs: int, lr: float = LEARNING_RATE, part: int = 0) -> None:
    """Go on training, at most at `lr`. Where there are masks, they hold the zeros: every forward pass computes `weight` from them anew.

    It is kept after every epoch, as all trainings are. Each `part` of one fine-tuning has its own order of images and its own augmentation.
    """
    if epochs:
        seed = args.seed + 1 + part
        file = training_file(data, CPU, epochs, seed, lr, fingerprint(network))
        train(network, data["train"], epochs, seed, CPU, lr, file=file)


def tune_in_parts(network: nn.Module, data: dict, args, before_each=lambda: None) -> float:
    """Accuracy after the whole fine-tuning; `before_each` part of it something may be done to the network."""
    for part in range(STEPS):
        before_each()
        tune(network, data, args, (args.epochs + part) // STEPS, part=part)  # together all epochs; 1 of them: 0, 0, 1
    return accuracy(network, data["test"])


def one_shot(network: nn.Module, data: dict, args, sparsity: float) -> tuple[float, float]:
    """Accuracy right after pruning, and after the fine-tuning."""
    prune_all(network, sparsity)
    return accuracy(network, data["test"]), tune_in_parts(network, data, args)


def iterative(network: nn.Module, data: dict, args, sparsity: float) -> tuple[None, float]:
    """Accuracy after the fine-tuning, a step of the pruning before each part of it."""
    kept = (1 - sparsity) ** (1 / STEPS)  # of what is left, at each step
    return None, tune_in_parts(network, data, args, lambda: prune_all(network, 1 - kept))


def measure(args) -> list[dict]:
    """A row for each method and sparsity: accuracy right after pruning, and after fine-tuning."""
    args.epochs = args.epochs or (1 if args.quick else EPOCHS)
    network, data = student_and_data(args)
    if args.epochs < STEPS:
        print(
            f"-epochs {args.epochs}: fewer than {STEPS} parts, so iterative's steps follow each other without training and are nearly one"
        )
    untouched = copy_of(network)
    row = {"method": "unpruned", "sparsity": 0.0, "accuracy": accuracy(network, data["test"])}
    rows = [row | {"accuracy_tuned": tune_in_parts(network, data, args)}]
    for sparsity in tqdm(SPARSITIES[2:3] if args.quick else SPARSITIES, "sparsities"):
        for name, method in {"one-shot": one_shot, "iterative": iterative}.items():
            fresh = copy_of(untouched)
            before, after = method(fresh, data, args, sparsity)
            reached = sparsity_by_layer(fresh)[-1]["sparsity"]
            rows.append({"method": name, "sparsity": reached, "accuracy": before, "accuracy_tuned": after})
    print_table(rows)
    say(rows)
    save_figure(plot(rows), exercise.__file__, "accuracy", args, f"{len(data['test']):,} test images, {args.epochs} epochs of fine-tuning")
    return rows


def say(rows: list[dict]) -> None:
    """The highest sparsity that costs little, against the unpruned network with the same fine-tuning."""
    reference = rows[0]["accuracy_tuned"]
    for points in (0.5, 1.5):
        fine = [row for row in rows[1:] if reference - row["accuracy_tuned"] <= points / 100]
        most = max(fine, key=lambda row: row["sparsity"], default=None)
        text = f"{most['sparsity']:.0%} of the weights, {most['method']}" if most else "none of those tried"
        print(f"within {points} points of the unpruned network after the same fine-tuning, one seed: {text}")


def plot(rows: list[dict]) -> plt.Figure:
    """Accuracy over sparsity, right after pruning and after fine-tuning, at once and step by step; right: fine-tuned alone, from near."""
    figure, both = plt.subplots(1, 2, figsize=(11, 4.5))
    pruned = [row for row in rows if row["method"] == "one-shot"]
    both[0].plot([row["sparsity"] for row in pruned], [row["accuracy"] for row in pruned], "o:", color="tab:grey", label="not fine-tuned")
    for axes in both:
        for method, colour in {"one-shot": "tab:blue", "iterative": "tab:orange"}.items():
            mine = [row for row in rows if row["method"] == method]
            axes.plot([r["sparsity"] for r in mine], [r["accuracy_tuned"] for r in mine], "o-", color=colour, label=f"{method}, fine-tuned")
        axes.axhline(rows[0]["accuracy_tuned"], color="black", linestyle="--", linewidth=1, label="unpruned, fine-tuned")
        axes.set(xlabel="sparsity: share of weights that are 0", ylabel="accuracy on the test images")
    both[0].set(xlim=(0, 1), title="before and after fine-tuning")
    both[1].set(title="after it, enlarged")
    both[0].legend()
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure
