"""The training loop of the small CIFAR-10 networks (student.py, distill.py), and what is kept of a training so that it can go on.

After every epoch network, optimizer and rows are kept in a file whose name stands for what the outcome depends on: the images, the code
of the loop, of the network and of the loss, the constants, the number format, the number of threads (more of them add up in another
order), torch's version and the processor. Change one of them, and it is another training.
"""

import copy
import hashlib
import inspect
import io
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import MEAN, STD, ConvNet, Images, Stage, augment, epoch_order, normalization, normalize
from errors import InputError
from m29_inference import network as networks
from machine import computes_with, cpu_has, keep_memory
from paths import DAMAGED, DATA, atomic_path, check_zip, display_path

CPU = torch.device("cpu")
BATCH, LEARNING_RATE = 256, 0.2
PLATEAU = 0.02  # the loss fell by less than this share in two epochs: time to lower the learning rate
MOST_EPOCHS = 200  # of a training to convergence; the networks here need 20 to 60


def fast_format(device: torch.device) -> dict:
    """Arguments for torch.autocast: bfloat16 where the device computes with it in hardware, float32 otherwise."""
    # the second on ARM, where PyTorch for macOS lacks the library that would use it
    cpu_capable = cpu_has("avx512_bf16") or (cpu_has("bf16") and torch.backends.mkldnn.is_available())
    capable = cuda_has_bfloat16() if device.type == "cuda" else device.type == "cpu" and cpu_capable
    return {"device_type": device.type, "dtype": torch.bfloat16, "enabled": capable}


def cuda_has_bfloat16() -> bool:
    """Whether the GPU computes with bfloat16 itself; older ones only imitate it, slowly."""
    try:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    except TypeError:  # an older torch, which does not count imitations
        return torch.cuda.is_bf16_supported()


# ---- the loop --------------------------------------------------------------------------------------------------------


def hard_loss(logits: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
    """Cross-entropy with the true labels; logits (n, classes) -> a scalar."""
    return nn.functional.cross_entropy(logits, labels)


def rate(progress: float, epochs: int | None) -> float:
    """Share of the full learning rate after `progress` epochs: up in the first one, level, down to 0 in the second half."""
    return min(1.0, progress) if epochs is None else min(1.0, progress, 2 * (epochs - progress) / epochs)


def converged_at(rows: list[dict]) -> int | None:
    """Epochs of a training to convergence: twice those up to the plateau of the training loss; None before that is reached.

    A loss that goes on falling is stopped at MOST_EPOCHS.
    """
    for epoch in range(4, len(rows) + 1):
        if rows[epoch - 1]["loss"] > (1 - PLATEAU) * rows[epoch - 3]["loss"] or 2 * epoch >= MOST_EPOCHS:
            return 2 * epoch
    return None


def say_convergence(rows: list[dict], epochs: int | None) -> None:
    """How long a training to convergence took, where `epochs` did not say it before."""
    if epochs is None:
        half, seconds = len(rows) // 2, rows[-1]["train_s"]
        stopped = len(rows) >= MOST_EPOCHS
        fell = "to the last" if stopped else f"by less than {PLATEAU:.0%} in the last two of them"
        said = f"{half} epochs at the full learning rate, the loss fell {fell}; {half} while the rate fell to 0; {seconds:,.0f} s"
        print(f"{'stopped before it had converged' if stopped else 'converged'}: {said}")


def train(network, data, epochs, seed, device, lr=LEARNING_RATE, loss_of=hard_loss, views=None, test=None, file=None) -> list[dict]:
    """Train in place on Images; a row an epoch: epoch, loss (its mean), train_s (so far, without testing), accuracy on `test` if given.

    epochs=None trains to convergence: at the full learning rate up to the plateau, then as many epochs again while it falls to 0. The same
    seed gives the same network on the same CPU, also when the training was killed and goes on from `file`. `views` is the
    augmentation's seed, where it shall be another than the order's. InputError when the loss is no finite number any more.
    """
    keep_memory()
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
        if not math.isfinite(row["loss"]):
            bar.close()
            keep_memory(False)
            raise InputError(f"the training failed, its loss is {row['loss']} in epoch {epoch + 1}: lower its LEARNING_RATE, {lr:g}")
        row["train_s"] = time.perf_counter() - begin + (rows[-1]["train_s"] if rows else 0)
        rows.append(row | ({"accuracy": accuracy(network, test, device)} if test else {}))
        bar.set_postfix(loss=f"{row['loss']:.3f}")
        keep(file, network, optimizer, rows)
    bar.close()
    keep_memory(False)  # what is measured next shall be PyTorch as it is
    network.eval()
    return rows


# ---- what was trained ------------------------------------------------------------------------------------------------


def answers(network, data: Images, device: torch.device, batch: int = 250) -> torch.Tensor:
    """The class that `network` gives each image, int64 (n,); it is called with `batch` images at a time."""
    with torch.inference_mode():
        return torch.cat([network(normalize(images.to(device))).argmax(1).cpu() for images in data.images.split(batch)])


def accuracy(network: nn.Module, data: Images, device: torch.device = CPU) -> float:
    """Share of the images that `network`, put into eval mode, answers right."""
    return (answers(network.eval(), data, device) == data.labels).double().mean().item()


# ---- what is kept ----------------------------------------------------------------------------------------------------


PARTS = (train, rate, converged_at, hard_loss, answers, accuracy, networks, ConvNet, Stage, normalization, augment, epoch_order, normalize)
RECIPE = [inspect.getsource(part) for part in PARTS]  # read now, for the files may be edited while a training runs


def training_file(data: dict[str, Images], device: torch.device, *key) -> Path:
    """Where a training on these images, with what else there is to say of it in `key`, is kept."""
    constants = (BATCH, LEARNING_RATE, PLATEAU, MOST_EPOCHS, MEAN.tolist(), STD.tolist(), fast_format(device), torch.get_num_threads())
    constants += (device.type, computes_with(device))
    digest = hashlib.sha256(repr((RECIPE, constants, key)).encode())
    for part in data.values():
        digest.update(part.images.numpy())
        digest.update(part.labels.numpy())
    return DATA / "students" / f"{digest.hexdigest()[:16]}.pt"


def keep(file: Path | None, network: nn.Module, optimizer: torch.optim.Optimizer, rows: list[dict]) -> None:
    """Write what a training needs to go on; a kill leaves the file of the epoch before, and so does a full disk, with a warning."""
    if not file:
        return
    content = io.BytesIO()  # torch's own writer says nothing of a full disk when it fails on one
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows}, content)
    try:
        with atomic_path(file) as temporary:
            temporary.write_bytes(content.getbuffer())
    except (OSError, InputError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        tqdm.write(f"warning: epoch {len(rows)} was not kept in {display_path(file)} ({reason}); the training goes on", file=sys.stderr)


def restore(file: Path | None, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> list[dict]:
    """The rows of the epochs that are done, network and optimizer as after them; no rows where there is no whole file of this network."""
    if not file or not file.exists():
        return []
    fresh = copy.deepcopy(network.state_dict())  # load_state_dict() takes what fits before it refuses the rest
    try:
        check_zip(file)
        kept = torch.load(file, map_location=device, weights_only=True)
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        print(f"{len(kept['rows'])} epochs were trained before: {display_path(file)}")
        return kept["rows"]
    except DAMAGED:
        print(f"{display_path(file)} is damaged or of another network: trained anew")
        network.load_state_dict(fresh)
        return []


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of all its numbers, masks and running means among them."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
