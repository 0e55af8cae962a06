"""What `distill.py -losses` does: the loss of distillation as it should be, and written wrong in four ways that raise no error.

A student is trained with each of them, from the same first weights, beside one that learns alone. Before that each loss is asked three
questions about logits alone: is it 0 where student and teacher say the same? Where does it end when the student's logits follow its
gradient, with no network between? And how large is its gradient, against that of the labels' cross-entropy, which alpha weighs it with?
"""

import inspect
import sys
import warnings
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import Images
from common import print_table, save_figure
from errors import InputError
from m29_inference import distill
from m29_inference.distill import distillation_loss, train_student, views_of
from m29_inference.distill_report import ALONE
from m29_inference.teacher import Teacher, cache_folder, cached_logits

FOLLOWED, STEP = 3000, 100.0  # steps down the gradient, and how far each goes


# ---- the losses ------------------------------------------------------------------------------------------------------


def mean_of_all(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """kl_div with reduction="mean", its default: divided by the classes as well, ten times too small. Of this one torch warns."""
    ours, theirs = (nn.functional.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    with warnings.catch_warnings(action="ignore"):
        return temperature**2 * nn.functional.kl_div(ours, theirs, reduction="mean", log_target=True)


def without_square(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Without T^2: at T = 4 sixteen times too small, so that the labels have nearly as much to say."""
    return distillation_loss(student, teacher, temperature) / temperature**2


def swapped(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """The divergence of the teacher from the student: another question, with the same answer where both agree."""
    return distillation_loss(teacher, student, temperature)


def logits_as_classes(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """cross_entropy takes any numbers for probabilities, logits too; it then has no lowest value."""
    return nn.functional.cross_entropy(student, teacher)


LOSSES = {
    "as it should be": distillation_loss,
    'reduction="mean"': mean_of_all,
    "without T^2": without_square,
    "swapped": swapped,
    "logits as classes": logits_as_classes,
}
CODE = {loss: inspect.getsource(loss) for loss in LOSSES.values()}  # read now, for the file may be edited while a training runs


# ---- asked about logits alone ----------------------------------------------------------------------------------------


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logits)[0]


def question(loss_of, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> dict:
    """Value where student and teacher are equal, value at the end of the gradient, size of the gradient against the labels'.

    `loss_of` takes student and teacher; logits (n, classes), labels (n,).
    """
    start = student.clone().requires_grad_()
    size = gradient(loss_of(start, teacher), start).norm() / gradient(nn.functional.cross_entropy(start, labels), start).norm()
    followed = student.clone().requires_grad_()
    for _ in range(FOLLOWED):
        followed = (followed - STEP * gradient(loss_of(followed, teacher), followed)).detach().requires_grad_()
    return {"at_equal": loss_of(teacher, teacher).item(), "followed": loss_of(followed, teacher).item(), "gradient_of_labels": size.item()}


# ---- and in a training -----------------------------------------------------------------------------------------------


def compare_losses(args, data: dict[str, Images], teacher: Teacher, epochs: int) -> list[dict]:
    """A row a loss: what it is on logits, and the accuracy of a student trained with it; table and figure."""
    seed = args.seeds[0]
    key = f"{cache_folder(teacher, data['train']).name} {args.views}"
    _, rows = train_student(args, data, seed, epochs, None, key)
    table = [{"loss": ALONE, "accuracy": rows[-1]["accuracy"], "epochs": epochs}]
    views = cached_logits(teacher, data["train"], views_of(args, epochs))
    some = next(iter(views.values()))[:256].float()
    untrained = torch.randn(some.shape, generator=torch.Generator().manual_seed(args.seed))
    for name, soft in list(LOSSES.items())[: 2 if args.quick else None]:
        asked = question(partial(soft, temperature=args.temperature), untrained, some, data["train"].labels[:256])
        reaches = reached(args, data, seed, epochs, views, key, soft, CODE[soft])
        pull = args.alpha * asked["gradient_of_labels"] / (1 - args.alpha) if args.alpha < 1 else None
        table.append({"loss": name, **asked, "pull": pull, "accuracy": reaches, "epochs": epochs})
    print_table(table)
    print(f"pull: how many times as hard as the labels' the teacher's part pulls, at alpha = {args.alpha:g}")
    print(f"one seed, T = {args.temperature:g}, alpha = {args.alpha:g}; followed: after {FOLLOWED:,} steps of the logits down the gradient")
    save_figure(plot(table), distill.__file__, "losses", args, f"one seed, {epochs} epochs: differences of a point may be noise")
    return table


def reached(*student) -> float | None:
    """Accuracy of a student, given as to train_student; None, and why, where its training fails."""
    try:
        return train_student(*student)[1][-1]["accuracy"]
    except InputError as error:
        print(str(error).partition(":")[0])
        return None


def plot(table: list[dict]) -> plt.Figure:
    """Bars: accuracy of a student by loss, none where its training failed, and the line of the one that learnt alone."""
    figure, axes = plt.subplots(figsize=(7.5, 3.2))
    said = ["training failed" if row["accuracy"] is None else f"{row['accuracy']:.1%}" for row in table[1:]]
    names = [f"{row['loss']}\n{text}" for row, text in zip(table[1:], said, strict=True)]
    axes.barh(names, [row["accuracy"] or 0 for row in table[1:]], color="tab:blue")
    axes.axvline(table[0]["accuracy"], color="black", linestyle="--", linewidth=1, label="alone")
    axes.set(xlabel="accuracy on the test images", xlim=(0, 1))
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="upper right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 0.95))
    return figure
