"""The small CIFAR-10 network that the exercises of M29 convert, prune and distil: trained once, then kept.

On the drawn sample this takes seconds, on the real photographs some minutes. Convolutions compute in bfloat16 where the processor has
instructions for it, and in the layout channels_last, which together make training about three times as fast.
"""

import hashlib
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import ConvNet, Images, augment, epoch_order, load_cifar10, normalize
from common import DATA, atomic_path, display_path
from machine import cpu_has

BATCH, WIDTHS, EPOCHS, LEARNING_RATE = 256, (32, 64, 128), 8, 0.2


def fast_format(device: torch.device) -> dict:
    """Arguments for torch.autocast: bfloat16 where the device computes with it in hardware, float32 otherwise."""
    capable = device.type == "cuda" or cpu_has("avx512_bf16")
    return {"device_type": device.type, "dtype": torch.bfloat16, "enabled": capable}


def train(network: nn.Module, data: Images, epochs: int, seed: int, device: torch.device, lr: float = LEARNING_RATE) -> list[dict]:
    """Train in place; a row an epoch: epoch, loss, seconds so far. The same seed gives the same network on the same machine."""
    network.to(device, memory_format=torch.channels_last).train()
    steps = len(data) // BATCH
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    rows, begin = [], time.perf_counter()
    for epoch in (bar := tqdm(range(epochs), "training", unit="epoch", leave=False)):
        order = epoch_order(seed, epoch, len(data))
        for step in range(steps):
            indices = order[step * BATCH :][:BATCH]
            images = normalize(augment(data.images[indices], indices, seed, epoch, len(data)).to(device))
            with torch.autocast(**fast_format(device)):
                logits = network(images.contiguous(memory_format=torch.channels_last))
                loss = nn.functional.cross_entropy(logits, data.labels[indices].to(device), label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        rows.append({"epoch": epoch + 1, "loss": loss.item(), "train_s": time.perf_counter() - begin})
        bar.set_postfix(loss=f"{loss.item():.3f}")
    network.eval()
    return rows


def answers(network, data: Images, device: torch.device, batch: int = 250) -> torch.Tensor:
    """The class that `network` gives each image, int64 (n,); it is called with `batch` images at a time."""
    with torch.inference_mode():
        return torch.cat([network(normalize(images.to(device))).argmax(1).cpu() for images in data.images.split(batch)])


def trained_student(data: dict[str, Images], epochs: int, seed: int, device: torch.device, widths=WIDTHS) -> nn.Module:
    """The trained network in eval mode; trained on first use, for these data, epochs, seed and widths."""
    key = hashlib.sha256(data["train"].images[::97].numpy().tobytes() + repr((epochs, seed, tuple(widths), len(data["train"]))).encode())
    file = DATA / "students" / f"{key.hexdigest()[:16]}.pt"
    torch.manual_seed(seed)
    network = ConvNet(widths, "batch")
    try:
        network.load_state_dict(torch.load(file, map_location=device, weights_only=True))
        print(f"student: trained before, {display_path(file)}")
    except (OSError, RuntimeError, EOFError, ValueError, KeyError):  # not there yet, or not whole
        train(network, data["train"], epochs, seed, device)
        with atomic_path(file) as temporary:
            torch.save(network.state_dict(), temporary)
    return network.to(device, memory_format=torch.channels_last).eval()


def copy_of(network: nn.Module) -> nn.Module:
    """Another student with the same numbers, in eval mode; deepcopy would fail on a network that was pruned."""
    copied = ConvNet(WIDTHS, "batch").eval()
    copied.load_state_dict(network.state_dict())
    return copied


def student_and_data(args) -> tuple[nn.Module, dict[str, Images]]:
    """The student trained on `-data`, in PyTorch's own memory layout, and the data; with -quick fewer images and epochs."""
    data = load_cifar10(args.data, BATCH)
    if args.quick:
        data = {"train": data["train"][:4096], "test": data["test"][:500]}
    network = trained_student(data, 4 if args.quick else EPOCHS, args.seed, torch.device("cpu"))
    return network.to(memory_format=torch.contiguous_format), data
