"""Knowledge distillation: a small network learns from what a large one thinks of each image, and not from the labels alone.

    python m29_inference/distill.py                              our own teacher; students alone and distilled, two seeds each
    python m29_inference/distill.py -data FOLDER -seeds 0 1 2    on the real CIFAR-10, three seeds, to convergence: hours
    python m29_inference/distill.py -data uoft-cs/cifar10 -limit 10000 -teacher aaraki/vit-base-patch16-224-in21k-finetuned-cifar10
                                                                 the course's Vision Transformer as the teacher, a fifth of the images
    python m29_inference/distill.py -losses                      the loss written wrong in four ways that raise no error
    python m29_inference/distill.py -sweep -epochs 4             which temperature, which alpha?
    torchrun --nproc-per-node 2 m29_inference/distill.py -data FOLDER -teacher VIT_FOLDER
                                                                 only computes the teacher's logits, in two processes

A label says "cat". The teacher says "cat, perhaps a dog, surely no truck": its logits, divided by a temperature T > 1 to make the small
ones count, are a probability for every class. The student's, divided by the same T, shall be like them.

Both kinds of student have the same first weights and the same order of images, seed by seed, and all the same augmentation and the same
teacher, so that the difference is the loss's alone. The loop is train() in training.py. Without -epochs the first student, which learns
alone, decides how long all train: up to the plateau of its loss at the full learning rate, and as many epochs again while it falls to 0.
"""

import argparse
import inspect
import itertools
import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import SAMPLE_NAME, Images, load_cifar10, normalize, stratified
from common import new_parser, parse, positive_int, positive_number, print_table, save_figure, save_results, share
from common import seed as seed_number
from errors import InputError, under_torchrun
from m29_inference.distill_report import ALONE, DISTILLED, costs, plot_curves, plot_knowledge, plot_sweep, say, say_cost
from m29_inference.network import new_network
from m29_inference.student import EPOCHS, WIDTHS, quick_part, training_step
from m29_inference.teacher import (
    UNCHANGED,
    VIEWS_SEED,
    Teacher,
    cache_folder,
    cached_logits,
    find_teacher,
    load_pretrained,
    share_logits,
)
from m29_inference.training import BATCH, hard_loss, say_convergence, train, training_file
from paths import DATA, check_writable

SMALL_WIDTHS = (16, 32, 64)  # 76,000: the student on the drawn sample, where that network is the teacher
SHORT_EPOCHS = 4  # of the students on the drawn sample, which is learnt soon, and where only their losses are compared
TEMPERATURE, ALPHA = 4.0, 0.9
COLDEST, HOTTEST = 0.1, 100.0  # temperatures: beyond them differences of float32 numbers are lost
TEMPERATURES, ALPHAS = (1.0, 2.0, 4.0, 8.0), (0.5, 0.9)  # of the sweep
QUICK_IMAGES = 1024  # that the students see with -quick
MIN_ACCURACY, QUICK_MIN_ACCURACY = 0.6, 0.2  # of the teacher, where -min_teacher_accuracy does not say it


def temperature(text: str) -> float:
    """The type of -temperature."""
    if not COLDEST <= (number := positive_number(text)) <= HOTTEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a number from {COLDEST:g} to {HOTTEST:g} is expected")
    return number


# ---- the loss --------------------------------------------------------------------------------------------------------


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 times the divergence of the student's classes from the teacher's, both at temperature T; logits (n, classes) -> a scalar >= 0.

    The gradient of the softened classes is about T^2 times as small as at T = 1; the factor makes up for that, so that alpha means
    the same at every temperature. Equal logits give 0, up to rounding. Hinton, Vinyals and Dean 2015, arxiv.org/abs/1503.02531.
    """
    ours = nn.functional.log_softmax(student / temperature, dim=1)
    theirs = nn.functional.log_softmax(teacher / temperature, dim=1)
    divergence = (theirs.exp() * (theirs - ours)).sum(1)  # sum over classes of p log(p / q), for each image
    return temperature**2 * divergence.mean()


def mixed_loss(logits, labels, indices, epoch, views: dict[int, torch.Tensor], args, soft=distillation_loss) -> torch.Tensor:
    """alpha of it is about the teacher's opinion of these images as this epoch shows them, the rest about the labels; a scalar."""
    teacher = views[epoch if epoch in views else UNCHANGED][indices].float().to(logits.device)
    hard = hard_loss(logits, labels, indices, epoch)
    return args.alpha * soft(logits, teacher, args.temperature) + (1 - args.alpha) * hard


# Another loss is another training; read now, as RECIPE is.
LOSS_CODE = [inspect.getsource(part) for part in (mixed_loss, distillation_loss)]
DISTILLATION_CODE = inspect.getsource(distillation_loss)


# ---- teacher and students --------------------------------------------------------------------------------------------


def train_student(args, data, seed, epochs, views, key, soft=distillation_loss, code=DISTILLATION_CODE) -> tuple[nn.Module, list[dict]]:
    """A student from the first weights of `seed`, distilled where there are views, else alone; the network and a row an epoch.

    `views`: the teacher's logits by view, and `key` says of which teacher; `soft`: the loss on both's logits, and `code` is its source.
    """
    how = f"distilled at T = {args.temperature:g}, alpha = {args.alpha:g}" if views else "alone"
    other = f", loss {soft.__name__}" if soft is not distillation_loss else ""
    print(f"student {how}{other}, seed {seed}", flush=True)
    network = new_network(args.widths, data["train"], seed)
    loss_of = partial(mixed_loss, views=views, args=args, soft=soft) if views else hard_loss
    setting = (LOSS_CODE, code, key, args.temperature, args.alpha) if views else "alone"
    file = training_file(data, args.device, tuple(args.widths), epochs, seed, VIEWS_SEED, setting)
    rows = train(network, data["train"], epochs, seed, args.device, loss_of=loss_of, views=VIEWS_SEED, test=data["test"], file=file)
    say_convergence(rows, epochs)
    return network, rows


def views_of(args, epochs: int | None) -> list[int]:
    """The views that the teacher sees."""
    if args.views == "once":
        return [UNCHANGED]
    if not epochs:
        raise InputError("how many views there are follows from the epochs: give -epochs, or -views once")
    return list(range(epochs))


# ---- the comparison --------------------------------------------------------------------------------------------------


def compare(args, data: dict[str, Images], teacher: Teacher, epochs: int | None) -> list[dict]:
    """Students alone and distilled, seed by seed: a row each, one for the teacher, one for the gain; table, verdict and figures."""
    curves, views, key = {ALONE: [], DISTILLED: []}, None, f"{cache_folder(teacher, data['train']).name} {args.views}"
    for seed in args.seeds:
        student, rows = train_student(args, data, seed, epochs, None, key)
        epochs = len(rows)
        views = views or cached_logits(teacher, data["train"], views_of(args, epochs))
        _, distilled = train_student(args, data, seed, epochs, views, key)
        curves[ALONE].append(rows)
        curves[DISTILLED].append(distilled)
    print(f"the teacher's answers to all {len(data['test']):,} test images", flush=True)
    answers = cached_logits(teacher, data["test"], [UNCHANGED])[UNCHANGED].float()
    image = data["test"].images[:1].to(args.device)
    images = {"teacher": teacher.prepare(image), ALONE: normalize(image).contiguous(memory_format=torch.channels_last)}
    cost = costs({"teacher": teacher.module, ALONE: student}, images, args.device)
    right = (answers.argmax(1) == data["test"].labels).double().mean().item()
    table = [{"model": "teacher", "accuracy": right, **teacher.training, **cost["teacher"]}]
    for model, runs in curves.items():
        for seed, rows in zip(args.seeds, runs, strict=True):
            last = {key: rows[-1][key] for key in ("accuracy", "train_s")}
            table.append({"model": model, "seed": seed, "epochs": epochs, **last, **cost[ALONE]})
    table.append(say(table, curves))
    losses = {ALONE: hard_loss, DISTILLED: partial(mixed_loss, views=views, args=args)}
    steps = {model: training_step(args.widths, data["train"], args.device, loss_of=loss) for model, loss in losses.items()}
    table[-1]["step_ratio"] = say_cost(steps, args.device)
    note = f"{len(args.seeds)} seeds, {len(data['train']):,} images of {data['train'].name}"
    save_figure(plot_curves(curves, table[0]["accuracy"]), __file__, "curves", args, note)
    note = f"{len(answers):,} test images, T = {args.temperature:g}"
    save_figure(plot_knowledge(data["test"], answers, args.temperature), __file__, "knowledge", args, note)
    return table


def sweep(args, data: dict[str, Images], teacher: Teacher, epochs: int | None) -> list[dict]:
    """One student for each temperature and alpha, all from the first seed, beside one that learnt alone; a figure."""
    key = f"{cache_folder(teacher, data['train']).name} {args.views}"
    _, rows = train_student(args, data, args.seeds[0], epochs, None, key)
    table = [{"model": ALONE, "accuracy": rows[-1]["accuracy"], "epochs": len(rows)}]
    views = cached_logits(teacher, data["train"], views_of(args, len(rows)))
    settings = list(itertools.product(TEMPERATURES, ALPHAS))
    for temperature, alpha in settings[:2] if args.quick else settings:
        setting = {"temperature": temperature, "alpha": alpha}
        its_args = argparse.Namespace(**{**vars(args), **setting})  # those given stay in the results as they were
        _, rows = train_student(its_args, data, args.seeds[0], len(rows), views, key)
        table.append({"model": DISTILLED, "accuracy": rows[-1]["accuracy"], "epochs": len(rows), **setting})
    print_table(table)
    print("these are the test images: to choose by them and then to report them would flatter; keep some training images apart for it")
    save_figure(plot_sweep(table), __file__, "sweep", args, f"one seed, {len(rows)} epochs: differences of a point may be noise")
    return table


def main(args) -> list[dict]:
    if under_torchrun() and args.teacher == "train":
        raise InputError("-teacher train: every process would train it anew; it answers fast, so run without torchrun")
    if under_torchrun() and args.device.type == "cuda":
        args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) % torch.cuda.device_count())
    if not (DATA / "teacher_logits").exists():  # one that holds them already may be read-only
        check_writable(DATA / "teacher_logits")
    pretrained = None if args.teacher == "train" else load_pretrained(args.teacher)
    args.views = args.views or ("once" if pretrained else "every_epoch")
    data = load_cifar10(args.data, BATCH)
    if args.limit:
        data["train"] = stratified(data["train"], args.limit)
    data = quick_part(data) if args.quick else data
    if len(data["train"]) < BATCH:
        raise InputError(f"-limit {args.limit} is too small: a step of training takes {BATCH} images")
    real = data["train"].name != SAMPLE_NAME and not args.quick
    epochs = args.epochs or (2 if args.quick else SHORT_EPOCHS if args.losses or not real else None)
    args.widths = args.widths or (WIDTHS if real else SMALL_WIDTHS)
    if args.min_teacher_accuracy is None:
        args.min_teacher_accuracy = QUICK_MIN_ACCURACY if args.quick else MIN_ACCURACY
    teacher = find_teacher(args, data, real, pretrained)
    if args.quick:
        data["train"] = stratified(data["train"], min(QUICK_IMAGES, len(data["train"])))  # its training needed more
    if under_torchrun():
        compared = [] if args.sweep or args.losses else [(data["test"], [UNCHANGED])]
        share_logits(teacher, [(data["train"], views_of(args, epochs)), *compared])
    if args.losses:
        from m29_inference.distill_losses import compare_losses  # which imports this file

        return compare_losses(args, data, teacher, epochs)
    return (sweep if args.sweep else compare)(args, data, teacher, epochs)


if __name__ == "__main__":
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("-data", help="folder or hub id of CIFAR-10 (default: data/cifar10 where it was downloaded, else drawn shapes)")
    flag(
        "-teacher",
        default="train",
        help="folder or hub id of an image classifier (default: train, our own network: 2 million parameters, 295,000 on the drawn sample)",
    )
    said = f"refuse a teacher below (default: {MIN_ACCURACY}; with -quick {QUICK_MIN_ACCURACY}, for ours has hardly been trained then)"
    flag("-min_teacher_accuracy", type=share, help=said)
    flag("-seeds", type=seed_number, nargs="+", default=[0, 1], help="of the students, at least two (default: 0 1); -seed is the teacher's")
    wide, small = (" ".join(map(str, widths)) for widths in (WIDTHS, SMALL_WIDTHS))
    said = f"channels of the students (default: {wide}; {small} on the drawn sample and with -quick)"
    flag("-widths", type=positive_int, nargs=3, metavar="N", help=said)
    said = f"of the students (default: to convergence; {SHORT_EPOCHS} on the drawn sample and with -losses, 2 with -quick)"
    flag("-epochs", type=positive_int, help=said)
    said = f"of our own teacher (default: to convergence; {EPOCHS} on the drawn sample, 4 with -quick)"
    flag("-teacher_epochs", type=positive_int, help=said)
    flag("-temperature", type=temperature, default=TEMPERATURE, help=f"divides the logits of both, {COLDEST:g} to {HOTTEST:g} (default: 4)")
    flag("-alpha", type=share, default=ALPHA, help="weight of the teacher's opinion, the rest is the labels' (default: 0.9)")
    said = "what the teacher sees, every epoch's augmented images or each image once (default: every_epoch for our own, once for another)"
    flag("-views", choices=["every_epoch", "once"], help=said)
    flag("-limit", type=positive_int, help="train on so many images, as many of each class, our own teacher as well (default: all)")
    part = parser.add_mutually_exclusive_group().add_argument
    part("-sweep", action="store_true", help="a student for each of some temperatures and alphas")
    part("-losses", action="store_true", help="a student for each of some losses, four of which are wrong")
    args = parse(parser)
    mode = next((f"-{name}" for name in ("sweep", "losses") if getattr(args, name)), None)
    if mode and args.seeds != parser.get_default("seeds"):
        parser.error(f"argument -seeds: has no effect with {mode}, whose students all have the first weights of seed 0")
    if args.sweep and (args.temperature, args.alpha) != (TEMPERATURE, ALPHA):
        parser.error(f"argument -temperature, -alpha: have no effect with -sweep, which tries {TEMPERATURES} and {ALPHAS}")
    if args.teacher_epochs and args.teacher != "train":
        parser.error("argument -teacher_epochs: of our own teacher, so it has no effect with -teacher")
    if len(args.seeds) < 2 or len(set(args.seeds)) < len(args.seeds):
        parser.error("argument -seeds: at least two are needed to tell a gain from chance, each another one")
    rows = main(args)
    if args.quick:
        print("-quick shows how it runs: after so few steps accuracies and gains mean nothing")
    save_results(__file__, args, rows)
