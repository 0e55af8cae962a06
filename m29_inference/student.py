"""The small CIFAR-10 networks that the exercises of M29 convert, prune and distil: trained once, then kept.

    python m29_inference/student.py                        train one to convergence: accuracy over epochs, speed against plain float32
    python m29_inference/student.py -epochs 8              for eight epochs, as the scripts do that convert and prune it
    python m29_inference/student.py -widths 64 128 384     a network of two million parameters, the teacher of distill.py

Convolutions compute in bfloat16 where the processor has instructions for it, and in the layout channels_last: together some three times
as fast as plain float32. After every epoch the training is kept, and goes on from there when it is started again.
"""

import hashlib
import statistics
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import ConvNet, Images, augment, epoch_order, load_cifar10, normalize
from common import (
    DATA,
    atomic_path,
    display_path,
    measure_alternately,
    new_parser,
    parse,
    positive_int,
    print_table,
    save_figure,
    save_results,
)
from machine import cpu_has

CPU = torch.device("cpu")
BATCH, WIDTHS, EPOCHS, LEARNING_RATE = 256, (32, 64, 128), 8, 0.2
PLATEAU = 0.02  # the loss fell by less than this share in two epochs: time to lower the learning rate


def fast_format(device: torch.device) -> dict:
    """Arguments for torch.autocast: bfloat16 where the device computes with it in hardware, float32 otherwise."""
    capable = device.type == "cuda" or cpu_has("avx512_bf16")
    return {"device_type": device.type, "dtype": torch.bfloat16, "enabled": capable}


# ---- training --------------------------------------------------------------------------------------------------------


def hard_loss(logits: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
    """Cross-entropy with the true labels; logits (n, classes) -> a scalar.

    Without label smoothing, which makes a teacher keep what it knows of the other classes to itself (https://arxiv.org/abs/1906.02629).
    """
    return nn.functional.cross_entropy(logits, labels)


def rate(progress: float, epochs: int | None) -> float:
    """Share of the full learning rate after `progress` epochs: up in the first one, level, down to 0 in the second half."""
    return min(1.0, progress) if epochs is None else min(1.0, progress, 2 * (epochs - progress) / epochs)


def converged_at(rows: list[dict]) -> int | None:
    """Epochs of a training to convergence: twice those up to the plateau of the training loss; None before that is reached."""
    for epoch in range(4, len(rows) + 1):
        if rows[epoch - 1]["loss"] > (1 - PLATEAU) * rows[epoch - 3]["loss"]:
            return 2 * epoch
    return None


def train(network, data, epochs, seed, device, lr=LEARNING_RATE, loss_of=hard_loss, views=None, test=None, file=None) -> list[dict]:
    """Train in place on Images; a row an epoch: epoch, loss (its mean), train_s (so far, without testing), accuracy on `test` if given.

    epochs=None trains to convergence: at the full learning rate up to the plateau, then as many epochs again while it falls to 0. The same
    seed gives the same network on the same machine, also when the training was killed and goes on from `file`. `views` is the
    augmentation's seed, where it shall be another than the order's.
    """
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    rows = restore(file, network, optimizer, device)
    steps, views = len(data) // BATCH, seed if views is None else views
    bar = tqdm(unit="step", leave=False, initial=len(rows) * steps)
    while (total := epochs or converged_at(rows)) is None or len(rows) < total:
        bar.total, epoch = total and total * steps, len(rows)
        bar.set_description(f"training, epoch {epoch + 1} of {total or '?'}")
        order, losses, begin = epoch_order(seed, epoch, len(data)), [], time.perf_counter()
        network.train()
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * rate(epoch + (step + 0.5) / steps, total)
            indices = order[step * BATCH :][:BATCH]
            images = normalize(augment(data.images[indices], indices, views, epoch, len(data)).to(device))
            with torch.autocast(**fast_format(device)):
                logits = network(images.contiguous(memory_format=torch.channels_last))
            loss = loss_of(logits.float(), data.labels[indices].to(device), indices, epoch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            bar.update()
        row = {"epoch": epoch + 1, "loss": torch.stack(losses).mean().item()}
        row["train_s"] = time.perf_counter() - begin + (rows[-1]["train_s"] if rows else 0)
        rows.append(row | ({"accuracy": accuracy(network, test, device)} if test else {}))
        bar.set_postfix(loss=f"{row['loss']:.3f}")
        keep(file, network, optimizer, rows)
    bar.close()
    network.eval()
    return rows


def keep(file: Path | None, network: nn.Module, optimizer: torch.optim.Optimizer, rows: list[dict]) -> None:
    """Write what a training needs to go on; a kill leaves the file of the epoch before."""
    if file:
        with atomic_path(file) as temporary:
            torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows}, temporary)


def restore(file: Path | None, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> list[dict]:
    """The rows of the epochs that are done, network and optimizer as after them; no rows where there is no whole file of this network."""
    try:
        kept = torch.load(file or "", map_location=device, weights_only=True)
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        print(f"{len(kept['rows'])} epochs were trained before: {display_path(file)}")
        return kept["rows"]
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError):  # not there yet, or not whole, or of other widths
        return []


# ---- what was trained ------------------------------------------------------------------------------------------------


def answers(network, data: Images, device: torch.device, batch: int = 250) -> torch.Tensor:
    """The class that `network` gives each image, int64 (n,); it is called with `batch` images at a time."""
    with torch.inference_mode():
        return torch.cat([network(normalize(images.to(device))).argmax(1).cpu() for images in data.images.split(batch)])


def accuracy(network: nn.Module, data: Images, device: torch.device = CPU) -> float:
    """Share of the images that `network`, put into eval mode, answers right."""
    return (answers(network.eval(), data, device) == data.labels).double().mean().item()


def training_file(data: Images, *key) -> Path:
    """Where the training of these images with these other properties is kept."""
    digest = hashlib.sha256(data.images.numpy().tobytes() + data.labels.numpy().tobytes() + repr(key).encode())
    return DATA / "students" / f"{digest.hexdigest()[:16]}.pt"


def trained_student(data: dict[str, Images], epochs: int | None, seed: int, device: torch.device, widths=WIDTHS):
    """The network trained for so many epochs (None: to convergence), in eval mode, and a row an epoch; trained once, then kept."""
    file = training_file(data["train"], tuple(widths), epochs, seed)
    torch.manual_seed(seed)
    network = ConvNet(widths, "batch")
    rows = train(network, data["train"], epochs, seed, device, test=data["test"], file=file)
    return network.eval(), rows


def copy_of(network: nn.Module) -> nn.Module:
    """Another student with the same numbers, in eval mode; deepcopy would fail on a network that was pruned."""
    copied = ConvNet(WIDTHS, "batch").eval()
    copied.load_state_dict(network.state_dict())
    return copied


def quick_part(data: dict[str, Images]) -> dict[str, Images]:
    """Fewer images, for -quick."""
    return {"train": data["train"][:4096], "test": data["test"][:500]}


def student_and_data(args) -> tuple[nn.Module, dict[str, Images]]:
    """The student trained on `-data`, in PyTorch's own memory layout, and the data; with -quick fewer images and epochs."""
    data = load_cifar10(args.data, BATCH)
    data = quick_part(data) if args.quick else data
    network, _ = trained_student(data, 4 if args.quick else EPOCHS, args.seed, CPU)
    return network.to(memory_format=torch.contiguous_format), data


# ---- the curve, and what bfloat16 and channels_last are worth --------------------------------------------------------


def training_step(widths, data: Images, device: torch.device, fast: bool):
    """A function that makes one step of training on the same 256 images and returns the loss, in the fast format or in plain float32."""
    torch.manual_seed(0)
    layout = torch.channels_last if fast else torch.contiguous_format
    network = ConvNet(widths, "batch").to(device, memory_format=layout).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=5e-4)
    indices = torch.arange(BATCH)

    def step() -> float:
        images = normalize(augment(data.images[indices], indices, 0, 0, len(data)).to(device))
        with torch.autocast(**fast_format(device) | ({} if fast else {"enabled": False})):
            logits = network(images.contiguous(memory_format=layout))
        loss = hard_loss(logits.float(), data.labels[indices].to(device), indices, 0)
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
    rates = {name: BATCH / timing.median_ms * 1e3 for name, timing in timings.items()}
    print(f"\na step of {BATCH} images, first losses {first['plain']:.4f} in plain float32 and {first['fast']:.4f} in the fast format:")
    gain = f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f} in 9 rounds in turn)"
    print(f"{rates['fast']:,.0f} images/s against {rates['plain']:,.0f}: {gain}")
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
    epochs = 2 if args.quick else args.epochs
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
    parser.add_argument("-epochs", type=positive_int, help="epochs of training (default: to convergence)")
    args = parse(parser)
    save_results(__file__, args, main(args))
