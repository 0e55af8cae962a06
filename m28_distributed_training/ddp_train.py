"""Train one network with several processes that compute exactly what one would: DistributedDataParallel.

    python m28_distributed_training/ddp_train.py                                     two processes on this machine
    python m28_distributed_training/ddp_train.py -num_threads 1                      ... of one thread each
    python m28_distributed_training/ddp_train.py -num_threads 1 -nproc 1 -accumulate 2     one process, the same bits
    python m28_distributed_training/ddp_train.py -benchmark                          speed-up, all-reduce, bytes a step; a figure
    python m28_distributed_training/ddp_train.py -checkpoint ddp.pt -resume -max_restarts 3     survives kill -9
    torchrun --nproc-per-node 2 m28_distributed_training/ddp_train.py                the same file as a job; several machines: README

Every process holds the whole network and takes its share of each batch. The batch is fixed for the whole job (`-batch_size`) and cut
into micro-batches, one or `-accumulate N` a process. While backward() runs, DDP adds the gradients up over all processes (all-reduce),
bucket by bucket; then each process takes the same step, so that the networks stay equal without ever being sent again. Order and
augmentation are a pure function of (seed, epoch, index). Lines that make one training of several processes are marked  # distributed
"""

import collections
import contextlib
import hashlib
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import ConvNet, Images, augment, epoch_order, load_cifar10, normalize
from common import parse, print_table, save_results
from errors import InputError, under_torchrun
from m28_distributed_training.checkpoint import load_checkpoint, save_checkpoint
from m28_distributed_training.group import Stopped, print0, said_once
from m28_distributed_training.launch import launch
from m28_distributed_training.training_flags import check, run_settings, training_parser

REPORT_STEPS, REPORT_S = 10, 5  # from one global loss to the next at most so many steps, and about so many seconds; so is SIGTERM noticed
# Flags that -benchmark does not look at.
UNUSED = ("epochs", "steps", "accumulate", "micro_batches", "lr", "bf16", "checkpoint", "every", "resume", "max_restarts")


# ---- data ------------------------------------------------------------------------------------------------------------


def micro_batches(data: Images, step: int, args) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This process's micro-batches of a step, `-accumulate` pairs of images (n, 3, 32, 32) and labels (n,), on the device."""
    epoch, place = divmod(step, len(data) // args.batch_size)
    indices = epoch_order(args.seed, epoch, len(data))[place * args.batch_size :][: args.batch_size]  # the whole batch
    parts = indices.chunk(dist.get_world_size() * args.accumulate)
    mine = parts[dist.get_rank() * args.accumulate :][: args.accumulate]  # distributed
    pairs = []
    for part in mine:
        images = normalize(augment(data.images[part], part, args.seed, epoch, len(data)).to(args.device))
        pairs.append((images.to(memory_format=torch.channels_last), data.labels[part].to(args.device)))
    return pairs


# ---- training --------------------------------------------------------------------------------------------------------


def train(args) -> None:
    """Train to the last step and evaluate. Every process runs this, and all of them run it in step."""
    with said_once():
        data = load_cifar10(args.data, args.batch_size)
    steps = args.steps or args.epochs * (len(data["train"]) // args.batch_size)
    settings = run_settings(args, data["train"], steps)
    network = ConvNet(args.widths, "group").to(args.device, memory_format=torch.channels_last)
    model = DistributedDataParallel(network)  # distributed: the parameters of rank 0 are sent to all, once
    sent = count_bytes(model)  # distributed
    settle_buckets(model, *micro_batches(data["train"], 0, args)[0], sent)  # distributed
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    reports = Reports(args, catch_sigterm())
    first = resume(args, settings, network, optimizer, scheduler)
    mean_loss, clock, stopped, kept = None, None, False, False
    for step in (bar := tqdm(range(first, steps), "training", unit="step", disable=dist.get_rank() != 0, initial=first, total=steps)):
        for number, (images, labels) in enumerate(micro_batches(data["train"], step, args), 1):
            # distributed: the all-reduce runs during the last backward(); the gradients are then the mean over all processes
            with contextlib.nullcontext() if number == args.accumulate else model.no_sync():
                with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                    loss = nn.functional.cross_entropy(model(images), labels) / args.accumulate
                loss.backward()
            reports.losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        due = (step + 1) % args.every == 0 or step + 1 == steps
        if step >= reports.next or due:
            mean_loss, stopped = reports.agree(step, network.parameters())  # distributed
            bar.set_postfix(loss=f"{mean_loss:.3f}")
        clock = clock or time.perf_counter()  # after the first step, in which memory is asked for; agree() has waited for a GPU
        if args.checkpoint and (due or stopped):
            kept = save_checkpoint(args.checkpoint, {"step": step + 1, "settings": settings, **state_of(network, optimizer, scheduler)})
        if stopped:
            raise Stopped(step + 1, steps, kept)
    timed, seconds = max(0, steps - first - 1), time.perf_counter() - (clock or 0)
    correct = evaluate(network, data["test"], args)
    row = {"processes": dist.get_world_size(), "steps": steps, "images_per_s": timed * args.batch_size / seconds or None, "loss": mean_loss}
    row |= {"accuracy": correct / len(data["test"]), "bytes_per_step": sent["bytes"] // max(1, steps - first)}
    report(args, data, network, row)


def count_bytes(model: DistributedDataParallel) -> dict[str, int]:
    """Count what DDP hands to the all-reduce, then do what it does without this hook: divide by the processes and add up."""
    sent = {"bytes": 0}

    def hook(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent["bytes"] += bucket.buffer().nbytes
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)
    return sent


def settle_buckets(model: DistributedDataParallel, images: torch.Tensor, labels: torch.Tensor, sent: dict[str, int]) -> None:
    """Throw away one backward pass. After its first DDP arranges its buckets anew, in the order in which the gradients came.

    Three or more processes are added up in an order that depends on the place in the bucket. A run that goes on after a kill would take
    its first step with the first arrangement, where the undisturbed run has the second one, and would end with other bits.
    """
    nn.functional.cross_entropy(model(images), labels).backward()
    model.zero_grad()
    sent["bytes"] = 0


class Reports:
    """What the processes tell each other every few steps, all of them after the same ones."""

    def __init__(self, args, stop: list) -> None:
        self.args, self.stop = args, stop
        self.clock, self.before, self.next = time.perf_counter(), None, 0  # when and after which step they last agreed, when they will
        self.losses = collections.deque(maxlen=REPORT_STEPS * args.accumulate)  # of the last steps, one for each micro-batch

    def agree(self, step: int, parameters) -> tuple[float, bool]:
        """The mean loss of all processes in the last steps, and whether any of them was told to stop: all know the same afterwards.

        InputError when the loss, or one of this process's `parameters`, is no finite number any more: a checkpoint of that would be
        written over a good one.
        """
        loss = torch.stack(list(self.losses)).mean().item() * self.args.accumulate  # item() waits for a GPU
        now = time.perf_counter()
        seconds = (now - self.clock) / (1 if self.before is None else step - self.before)  # a step
        broken = not all(parameter.isfinite().all() for parameter in parameters)
        ours = torch.tensor([loss, len(self.stop), seconds, broken], device=self.args.device)
        dist.all_reduce(ours)
        loss, stops, seconds, broken = (ours / dist.get_world_size()).tolist()
        if broken or not math.isfinite(loss):
            found = f"{'not all parameters are' if broken else f'the loss, {loss}, is not'} finite after step {step + 1}"
            raise InputError(f"the training failed, {found}: lower its -lr, {self.args.lr:g}")
        self.clock, self.before, self.next = now, step, step + max(1, min(REPORT_STEPS, int(REPORT_S / seconds)))
        return loss, stops > 0


def catch_sigterm() -> list:
    """A list that is no longer empty once SIGTERM came: a job system sends it before it takes the machine away."""
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    return stop


def evaluate(network: nn.Module, data: Images, args) -> int:
    """Right answers on all of `data`, each image counted once for any number of processes, as one integer that all know."""
    mine = torch.arange(len(data))[dist.get_rank() :: dist.get_world_size()]  # distributed: every world-th image
    correct = torch.zeros((), dtype=torch.int64, device=args.device)
    network.eval()
    with torch.inference_mode():
        for part in mine.split(500):
            logits = network(normalize(data.images[part].to(args.device)))
            correct += (logits.argmax(1) == data.labels[part].to(args.device)).sum()
    dist.all_reduce(correct)  # distributed
    network.train()
    return int(correct)


# ---- what is kept, what is said --------------------------------------------------------------------------------------


def state_of(network, optimizer, scheduler) -> dict:
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    return state | {"rng": torch.get_rng_state()}


def resume(args, settings: dict, network, optimizer, scheduler) -> int:
    """Put the newest checkpoint's state into place, on request; the step to go on with."""
    state = load_checkpoint(args.checkpoint, settings) if args.checkpoint and args.resume else None
    if state is None:
        return 0
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])
    print0(f"resumed at step {state['step']} from {args.checkpoint}")
    return state["step"]


def fingerprint(network: nn.Module) -> str:
    """SHA-256 over the bits of all parameters: equal only if every one of them is."""
    digest = hashlib.sha256()
    for parameter in network.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def report(args, data: dict, network: nn.Module, row: dict) -> None:
    """Print and save what the training reached; the first process does it for all."""
    if dist.get_rank():
        return
    parameters = sum(parameter.numel() for parameter in network.parameters())
    row |= {"parameters": parameters, "parameters_sha256": fingerprint(network)}
    print(f"{row['processes']} processes x {args.accumulate} micro-batches of {data['train'].name}, {args.num_threads} threads each")
    print_table([{key: value for key, value in row.items() if key != "parameters_sha256"}])
    if row["bytes_per_step"]:  # a run that was resumed after its last step sent nothing
        each = row["bytes_per_step"] / parameters
        print(f"to the all-reduce: {row['bytes_per_step']:,} bytes a step, {each:g} for each of {parameters:,} parameters")
    print(f"parameters sha256 {row['parameters_sha256']}")
    save_results(__file__, args, [row])


if __name__ == "__main__":
    parser = training_parser(__doc__)
    parser.add_argument("-benchmark", action="store_true", help="measure 1 to -nproc processes instead of training to the end")
    args = parse(parser)
    if idle := [f"-{name}" for name in UNUSED if args.benchmark and getattr(args, name) != parser.get_default(name)]:
        parser.error(f"argument {', '.join(idle)}: has no effect with -benchmark")
    if args.show and not args.benchmark:
        parser.error("argument -show: only -benchmark draws a picture")
    if args.benchmark and under_torchrun():
        raise InputError("-benchmark starts its processes itself: run it without torchrun")
    check(args)
    if args.benchmark:
        from m28_distributed_training.ddp_benchmark import benchmark  # which imports this file

        benchmark(args)
    else:
        launch(train, args)
