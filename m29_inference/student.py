"""The small CIFAR-10 networks that the exercises of M29 convert, prune and distil: trained once, then kept.

    python m29_inference/student.py                        on the drawn shapes, eight epochs; speed against plain float32
    python m29_inference/student.py -data FOLDER           on the real CIFAR-10, to convergence: accuracy over epochs
    python m29_inference/student.py -epochs 8              for eight epochs, as the scripts do that convert and prune it
    python m29_inference/student.py -widths 64 128 384     a network of two million parameters, as distill.py trains for a teacher

Convolutions compute in bfloat16 where the processor has instructions for it and in the layout channels_last, and the memory of one step
is kept for the next: the last lines say what that is worth against plain float32. After every epoch the training is kept, and goes on
from there when it is started again.
"""

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import SAMPLE_NAME, Images, augment, load_cifar10, normalize, stratified
from common import new_parser, parse, positive_int, print_table, save_figure, save_results
from m29_inference.network import WhitenedNet, new_network
from m29_inference.training import BATCH, CPU, fast_format, hard_loss, say_convergence, train, training_file
from machine import keep_memory
from timing import measure_alternately, times_as_fast

WIDTHS, EPOCHS = (32, 64, 128), 8


# ---- what is trained -------------------------------------------------------------------------------------------------


def trained_student(data: dict[str, Images], epochs: int | None, seed: int, device: torch.device, widths=WIDTHS):
    """The network trained for so many epochs (None: to convergence), in eval mode, and a row an epoch; trained once, then kept."""
    file = training_file(data, device, tuple(widths), epochs, seed)
    network = new_network(widths, data["train"], seed)
    rows = train(network, data["train"], epochs, seed, device, test=data["test"], file=file)
    say_convergence(rows, epochs)
    return network.eval(), rows


def copy_of(network: nn.Module) -> nn.Module:
    """Another student with the same numbers, in eval mode; from a network without masks."""
    copied = WhitenedNet(WIDTHS).eval()
    copied.load_state_dict(network.state_dict())
    return copied


def cpu_only(text: str) -> str:
    """The type of -device for a script about the CPU's own number formats and kernels."""
    if text not in ("auto", "cpu"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: this exercise computes on the CPU")
    return "cpu"


def cpu_parser(doc: str):
    """The parser of a script that computes on the CPU, whatever else there is."""
    parser = new_parser(doc)
    device = parser._option_string_actions["-device"]
    device.type, device.choices, device.metavar, device.default = cpu_only, None, "cpu", "cpu"
    device.help = "this exercise computes on the CPU alone"
    return parser


def quick_part(data: dict[str, Images]) -> dict[str, Images]:
    """Fewer images, for -quick, as many of each class: data may come sorted."""
    return {name: stratified(data[name], min(most, len(data[name]))) for name, most in (("train", 4096), ("test", 500))}


def student_and_data(args) -> tuple[nn.Module, dict[str, Images]]:
    """The student trained on `-data`, in PyTorch's own memory layout, and the data; with -quick fewer images and epochs."""
    data = load_cifar10(args.data, BATCH)
    data = quick_part(data) if args.quick else data
    network, _ = trained_student(data, 4 if args.quick else EPOCHS, args.seed, CPU)
    data["train"] = data["train"][:1024] if args.quick else data["train"]  # what comes after needs less
    return network.to(memory_format=torch.contiguous_format), data


# ---- the curve, and what the fast format is worth --------------------------------------------------------------------


def training_step(widths, data: Images, device: torch.device, fast: bool = True, loss_of=hard_loss):
    """A function that makes one step of training on the same 256 images and returns the loss.

    `fast`: in bfloat16 where the device computes with it, channels_last, memory kept; otherwise plain float32, as PyTorch does it unasked.
    """
    layout = torch.channels_last if fast else torch.contiguous_format
    network = new_network(widths, data, 0).to(device, memory_format=layout).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=5e-4)
    indices = torch.arange(BATCH)

    def step() -> float:
        keep_memory(fast)
        images = normalize(augment(data.images[indices], indices, 0, 0, len(data)).to(device))
        with torch.autocast(**fast_format(device) | ({} if fast else {"enabled": False})):
            logits = network(images.contiguous(memory_format=layout))
        loss = loss_of(logits.float(), data.labels[indices].to(device), indices, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def compare_formats(widths, data: Images, device: torch.device) -> dict:
    """Images/s in both formats, measured in turn, after the first losses were seen to be the same; prints the verdict."""
    steps = {name: training_step(widths, data, device, name == "fast") for name in ("plain", "fast")}
    first = {name: step() for name, step in steps.items()}
    if abs(first["fast"] / first["plain"] - 1) > 0.02:  # bfloat16 has 8 bits for a number
        raise RuntimeError(f"the two formats do not compute the same: losses {first}")
    timings = measure_alternately(steps, device, repeats=9)
    ratios = [slow / fast for slow, fast in zip(timings["plain"].runs_ms, timings["fast"].runs_ms, strict=True)]
    gain = times_as_fast(timings["fast"].runs_ms, timings["plain"].runs_ms, "plain float32")
    rates = {name: BATCH / timing.median_ms * 1e3 for name, timing in timings.items()}
    print(f"\na step of {BATCH} images, first losses {first['plain']:.4f} in plain float32 and {first['fast']:.4f} in the fast format:")
    print(f"{rates['fast']:,.0f} images/s against {rates['plain']:,.0f}: {gain}, 9 rounds in turn")
    return {"images_per_s": rates["fast"], "images_per_s_plain": rates["plain"], "x_plain": statistics.median(ratios)}


def plot(rows: list[dict]) -> plt.Figure:
    """Accuracy on the test images over the seconds of training."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    axes.plot([row["train_s"] for row in rows], [row["accuracy"] for row in rows], "o-", markersize=4)
    axes.set(xlabel="training, seconds (without the testing)", ylabel="accuracy on the test images", xlim=(0, None))
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def main(args) -> list[dict]:
    data = load_cifar10(args.data, BATCH)
    data = quick_part(data) if args.quick else data
    epochs = args.epochs or (2 if args.quick else EPOCHS if data["train"].name == SAMPLE_NAME else None)
    network, rows = trained_student(data, epochs, args.seed, args.device, args.widths)
    print_table(rows)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{parameters:,} parameters: {rows[-1]['accuracy']:.2%} of {len(data['test']):,} test images after {rows[-1]['train_s']:.0f} s")
    save_figure(plot(rows), __file__, "accuracy", args, f"{parameters:,} parameters, {data['train'].name}")
    speed = compare_formats(args.widths, data["train"], args.device)
    return [*rows, speed]


if __name__ == "__main__":
    parser = new_parser(__doc__)
    parser.add_argument("-data", help="folder or hub id of CIFAR-10 (default: data/cifar10 where it was downloaded, else drawn shapes)")
    parser.add_argument(
        "-widths", type=positive_int, nargs=3, default=WIDTHS, metavar="N", help="channels of the three stages (default: 32 64 128)"
    )
    parser.add_argument(
        "-epochs", type=positive_int, help=f"of training (default: to convergence; {EPOCHS} on drawn shapes, 2 with -quick)"
    )
    args = parse(parser)
    save_results(__file__, args, main(args))
