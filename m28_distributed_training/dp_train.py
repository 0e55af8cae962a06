"""Train one network on several GPUs from one process, nn.DataParallel, and count what that moves.

    python m28_distributed_training/dp_train.py                            a short training; the bytes by stage; a figure
    python m28_distributed_training/dp_train.py -device_ids 0 1            on GPU 0 and 1, timed against GPU 0 alone
    python m28_distributed_training/dp_train.py -devices 4                 the traced step cut into 4 parts

In each step DataParallel cuts the batch into k parts (scatter), copies the whole network k - 1 times (replicate), computes in k
threads of one process (parallel_apply), collects the outputs on device 0 (gather), and on the way back adds up k gradients there
(reduce), and the copies are thrown away after the step. Device 0 sends or receives all of it where tensors are copied device by device
(Windows); with nccl (Linux) the others hand the network on and add gradients up on the way. Without a GPU nn.DataParallel calls the
network directly, so its speed there says nothing; the same step is then taken apart by hand and every byte is counted.
"""

import collections
import copy
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import ConvNet, Images, augment, epoch_order, load_cifar10, normalize
from common import new_parser, non_negative_int, parse, positive_int, print_table, save_figure, save_results
from errors import InputError
from m28_distributed_training.dp_timing import plot_steps, time_on_gpus
from m28_distributed_training.traffic import dp_bytes, parameter_bytes, plot_traffic, traffic_table
from m28_distributed_training.training_flags import learning_rate

NO_GPU = "no CUDA device is in use here"
TOLERANCE = 3e-3  # of the gradient's norm: a value next to 0 may pass a ReLU on the one side alone; one image of 128 left out is twice that

# ---- data ------------------------------------------------------------------------------------------------------------


def batch_of(data: Images, step: int, args) -> tuple[torch.Tensor, torch.Tensor]:
    """The images (n, 3, 32, 32) and labels (n,) of a step, on the first device."""
    epoch, place = divmod(step, len(data) // args.batch_size)
    indices = epoch_order(args.seed, epoch, len(data))[place * args.batch_size :][: args.batch_size]
    images = normalize(augment(data.images[indices], indices, args.seed, epoch, len(data)).to(args.device))
    return images.to(memory_format=torch.channels_last), data.labels[indices].to(args.device)


# ---- training --------------------------------------------------------------------------------------------------------


def train(args, data: dict) -> dict:
    """Train for `-steps` and evaluate; compare with ddp_train.py, where the lines marked 'distributed' are others."""
    network = ConvNet(args.widths, "group").to(args.device, memory_format=torch.channels_last)
    spared = args.device.type == "cpu" and torch.cuda.is_available()  # -device cpu beside GPUs, which DataParallel would take all the same
    model = network if spared else nn.DataParallel(network, device_ids=args.device_ids)  # without a GPU this is the network itself
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    clock, losses = None, collections.deque(maxlen=10)
    for step in (bar := tqdm(range(args.steps), "training", unit="step")):
        images, labels = batch_of(data["train"], step, args)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.detach())
        if step % 10 == 0:  # the first step, in which memory is asked for, among them
            bar.set_postfix(loss=f"{loss.item():.3f}")
        clock = clock or time.perf_counter()
    loss, seconds = torch.stack(list(losses)).mean().item(), time.perf_counter() - clock  # item() waits for a GPU
    if not math.isfinite(loss):
        raise InputError(f"the training failed, its loss is {loss} after {args.steps} steps: lower its -lr, {args.lr:g}")
    accuracy = evaluate(network, data["test"], args) / len(data["test"])
    devices = max(1, len(args.device_ids or []))
    rate = (args.steps - 1) * args.batch_size / seconds or None  # the clock runs from the end of the first step
    row = {"measured": "training", "devices": devices, "steps": args.steps, "images_per_s": rate}
    return row | {"loss": loss, "accuracy": accuracy}


def evaluate(network: nn.Module, data: Images, args) -> int:
    """Right answers on all of `data`."""
    network.eval()
    correct = 0
    with torch.inference_mode():
        for part in torch.arange(len(data)).split(500):
            logits = network(normalize(data.images[part].to(args.device)))
            correct += int((logits.argmax(1) == data.labels[part].to(args.device)).sum())
    network.train()
    return correct


# ---- without GPUs: the step by hand, every byte counted --------------------------------------------------------------


def traced_step(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, k: int) -> dict[str, int]:
    """What DataParallel does with k devices, all of them this one; leaves the gradients in `network`, returns bytes by stage.

    Only what would leave or reach device 0 is counted: its own part of the batch stays where it is.
    """
    chunks = images.chunk(k)
    replicas = [network, *(copy.deepcopy(network) for _ in chunks[1:])]
    outputs = [replica(chunk) for replica, chunk in zip(replicas, chunks, strict=True)]  # parallel_apply: k threads in DataParallel
    for output in outputs:
        output.retain_grad()
    loss = nn.functional.cross_entropy(torch.cat(outputs), labels)  # gather, then the loss on device 0 alone
    loss.backward()
    for replica in replicas[1:]:
        for parameter, copied in zip(network.parameters(), replica.parameters(), strict=True):
            parameter.grad += copied.grad
    copies = [tensor for replica in replicas[1:] for tensor in [*replica.parameters(), *replica.buffers()]]
    return {
        "scatter inputs": sum(chunk.nbytes for chunk in chunks[1:]),
        "replicate": sum(tensor.nbytes for tensor in copies),
        "gather outputs": sum(output.nbytes for output in outputs[1:]),
        "scatter gradients": sum(output.grad.nbytes for output in outputs[1:]),
        "reduce": sum(copied.grad.nbytes for replica in replicas[1:] for copied in replica.parameters()),
    }


def trace(args, data: dict) -> list[dict]:
    """Compare the gradients of the traced step with one device's, then print the bytes counted beside the formula's."""
    network, k = ConvNet(args.widths, "group").to(args.device), args.devices
    images, labels = batch_of(data["train"], 0, args)
    nn.functional.cross_entropy(network(images), labels).backward()
    alone = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    counted = traced_step(network, images, labels, k)
    flat = torch.cat([grad.flatten() for grad in alone])
    off = torch.cat([parameter.grad.flatten() for parameter in network.parameters()]) - flat
    difference, largest = off.abs().max().item(), flat.abs().max().item()
    print(
        f"\nthe same step on {k} devices, by hand: gradients differ from one device's by at most {difference:.1e} (largest {largest:.1e})"
    )
    if not off.norm() <= TOLERANCE * flat.norm():
        raise RuntimeError("the traced step does not compute what one device computes")
    formula = dp_bytes(k, *sizes(network, images))
    print_table([{"stage": stage, "counted_bytes": count, "formula_bytes": formula[stage]} for stage, count in counted.items()])
    return [{"measured": "traced step", "devices": k, "gradient_difference": difference, "bytes": counted}]


def sizes(network: nn.Module, images: torch.Tensor) -> tuple[int, int, int, int]:
    """P, B, X, Y of traffic.py: bytes of parameters, buffers, a batch of images, and the logits for it."""
    buffers = sum(buffer.nbytes for buffer in network.buffers())
    with torch.no_grad():
        return parameter_bytes(network), buffers, images.nbytes, network(images).nbytes


def main(args) -> list[dict]:
    gpus = torch.cuda.device_count() if args.device.type == "cuda" else 0
    if len(set(args.device_ids or [])) < len(args.device_ids or []):
        raise InputError(f"-device_ids {' '.join(map(str, args.device_ids))}: each GPU can be given once")
    if absent := [index for index in args.device_ids or [] if index >= gpus]:
        raise InputError(f"-device_ids {absent[0]}: {f'there are {gpus} GPUs here, counted from 0' if gpus else NO_GPU}")
    if gpus and args.devices:
        raise InputError("-devices cuts the step that is traced without GPUs: give -device_ids, or -device cpu")
    args.devices = args.devices or 2
    args.device_ids = (args.device_ids or list(range(gpus))) if gpus else None
    if gpus:
        args.device = torch.device("cuda", args.device_ids[0])
        torch.cuda.set_device(args.device)  # the one that is waited for
    if not gpus and args.batch_size % args.devices:
        raise InputError(f"-devices {args.devices} does not divide -batch_size {args.batch_size}: every device takes an equal part")
    args.steps = min(args.steps, 8) if args.quick else args.steps
    data = load_cifar10(args.data, args.batch_size)
    rows = [train(args, data)]
    print_table(rows)
    if gpus:
        timed = time_on_gpus(args, data["train"])
        print_table([{key: value for key, value in row.items() if key != "peak_mb_by_gpu"} for row in timed])
        print(f"peak memory by GPU at the largest batch, MB: {', '.join(f'{peak:,.0f}' for peak in timed[-1]['peak_mb_by_gpu'])}")
        if gpus == 1 or len(args.device_ids) == 1:
            print("One GPU: DataParallel has nothing to share out, so the ratio is 1 up to the cost of asking.")
        rows += timed
        save_figure(plot_steps(timed), __file__, "steps", args, f"GPUs {args.device_ids}, 5 repeats")
    else:
        spared = "it was left out, as it would take the GPUs" if torch.cuda.is_available() else "nn.DataParallel calls the network directly"
        print(f"\nNo CUDA device in use: {spared}; images/s above are one device's, not DataParallel's.")
        rows += trace(args, data)
    network = ConvNet(args.widths, "group")
    measures = sizes(network, batch_of(data["train"], 0, args)[0].cpu())
    print("\nMB a step: DataParallel, through device 0 (device by device, and with nccl), against what each DDP process sends;")
    print("it receives as much, so dp_over_ddp is dp_root_mb over twice ddp_each_mb")
    table = traffic_table(*measures)
    print_table(table)
    save_figure(plot_traffic(*measures), __file__, "traffic", args, f"batch {args.batch_size}, by formula; counted: see the table")
    return rows + [{"measured": "bytes by formula", **row} for row in table]


if __name__ == "__main__":
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("-data", help="folder or hub id of CIFAR-10 (default: data/cifar10 where it was downloaded, else drawn shapes)")
    flag("-device_ids", type=non_negative_int, nargs="+", help="GPUs to use, the first one is the root (default: all)")
    flag("-devices", type=positive_int, help="parts of the traced step, without GPUs (default: 2)")
    flag("-steps", type=positive_int, default=78, help="training steps (default: 78, once over the sample)")
    flag("-batch_size", type=positive_int, default=128, help="images a step (default: 128)")
    flag("-widths", type=positive_int, nargs=3, default=[32, 64, 128], help="channels of the three stages (default: 32 64 128)")
    flag("-lr", type=learning_rate, default=0.001, help="highest learning rate of the schedule (default: 0.001)")
    args = parse(parser)
    rows = main(args)
    save_results(__file__, args, rows)
