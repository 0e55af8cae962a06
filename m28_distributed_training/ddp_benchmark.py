"""How `ddp_train.py -benchmark` measures 1 to N processes against each other, and draws it.

All groups of processes are started first and wait; then each in turn measures a few steps, round after round, so that a machine that
gets slower meanwhile gets slower for all of them. The global batch is the same for all: N processes do the same work as one.
What the all-reduce costs is the time of a step less the time of the same step with no_sync(), measured alternately: only the part
that is not hidden behind the backward pass counts. Beside it stands one all-reduce of as many bytes with nothing else to do.
What it costs to share the machine, its memory and its caches, and to wait for the slowest process, is the time of the step with no_sync()
less that of the same step in one process of the group while the others wait.
"""

import contextlib
import copy
import functools
import io
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import ConvNet, load_cifar10
from common import print_table, save_figure, save_results
from errors import InputError
from m28_distributed_training import ddp_train
from m28_distributed_training.ddp_benchmark_report import plot, say
from m28_distributed_training.group import run_rank
from m28_distributed_training.launch import start_quietly, wait_for_all
from m28_distributed_training.traffic import ddp_bytes, parameter_bytes
from machine import available_memory, usable_cores
from timing import spread

ROUNDS, STEPS = 7, 3  # rounds over all groups; steps of each kind a group measures in one round
PROCESS_BYTES = 400e6  # of memory that a process with torch and the small network takes for itself, beside the data


# ---- one process of a group ------------------------------------------------------------------------------------------


class Steps:
    """The training of ddp_train.py in one process of a group, a step at a time; numbers of steps choose the images."""

    def __init__(self, args) -> None:
        self.args = args
        with contextlib.redirect_stdout(io.StringIO()):  # the parent has said which data this is
            self.data = load_cifar10(args.data)["train"]
        network = ConvNet(args.widths, "group").to(args.device, memory_format=torch.channels_last)
        self.model = DistributedDataParallel(network)
        self.sent = ddp_train.count_bytes(self.model)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step(self, number: int, synchronized: bool) -> float:
        """Seconds of one whole step, data and optimizer included."""
        begin = time.perf_counter()
        [(images, labels)] = ddp_train.micro_batches(self.data, number, self.args)
        with contextlib.nullcontext() if synchronized else self.model.no_sync():
            nn.functional.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def slowest(self, number: int, synchronized: bool) -> float:
        """Seconds of such a step on the slowest process."""
        dist.barrier()
        seconds = torch.tensor(self.step(number, synchronized), device=self.args.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()

    def alone(self, number: int) -> float:
        """Seconds of such a step on the first process while the others wait; 0 on these."""
        dist.barrier()
        seconds = self.step(number, False) if dist.get_rank() == 0 else 0.0
        dist.barrier()
        return seconds

    def allreduce(self, size: int) -> float:
        """Seconds of an all-reduce of `size` bytes with nothing else to do."""
        gradients = torch.zeros(size // 4, device=self.args.device)
        begin = time.perf_counter()
        for _ in range(STEPS):
            dist.all_reduce(gradients)
            gradients[0].item()  # waits for a GPU
        return (time.perf_counter() - begin) / STEPS

    def measure(self) -> dict:
        """Medians of STEPS steps of each kind, and bytes a step."""
        self.sent["bytes"] = 0
        times = [(self.slowest(number, True), self.slowest(number, False), self.alone(number)) for number in range(STEPS)]
        step_s, compute_s, alone_s = map(statistics.median, zip(*times, strict=True))
        row = {"step_s": step_s, "compute_s": compute_s, "alone_s": alone_s, "bytes": self.sent["bytes"] // STEPS}
        return row | {"allreduce_s": self.allreduce(row["bytes"])}


def measure_on_demand(connection, args) -> None:
    """Build the training once, then measure a round for every True that comes; the first process sends what it measured."""
    steps = Steps(args)
    for number in range(2):  # warm-up: DDP arranges its buckets in the first step, memory is asked for
        steps.slowest(number, True)
    while connection.recv():
        measured = steps.measure()
        if dist.get_rank() == 0:
            connection.send(measured)


class Group:
    """`processes` processes of `threads` threads each that train together, asleep until round() is called."""

    def __init__(self, args, processes: int, threads: int, folder: Path) -> None:
        self.processes, self.threads = processes, threads
        mine = copy.copy(args)
        mine.nproc, mine.num_threads, mine.accumulate = processes, threads, 1
        context, store = multiprocessing.get_context("spawn"), folder / f"store{processes}x{threads}"
        self.members, self.connections = [], []
        for rank in range(processes):
            ours, theirs = context.Pipe()
            work = functools.partial(measure_on_demand, theirs)
            self.members.append(context.Process(target=run_rank, args=(work, mine, rank, store), daemon=True))
            self.connections.append(ours)
            start_quietly(self.members[-1:])
            theirs.close()

    def round(self) -> dict:
        """What the first process measured; InputError when one of them ended, also one that waited too long for another that hangs."""
        with contextlib.suppress(EOFError, ConnectionError):  # one has ended
            self.tell(True)
            wait([self.connections[0], *(member.sentinel for member in self.members)])
            if self.connections[0].poll():
                return self.connections[0].recv()
        wait([member.sentinel for member in self.members])
        codes = {rank: member.exitcode for rank, member in enumerate(self.members) if member.exitcode is not None}
        ways = [f"rank {rank} was killed by signal {-code}" for rank, code in codes.items() if code < 0]
        why = ways[0] if ways else "look above for the reason"
        raise InputError(f"a process of the group of {self.processes} ended: {why}")

    def tell(self, go_on: bool) -> None:
        """All its processes, to measure a round or to end."""
        for connection in self.connections:
            connection.send(go_on)


def end(groups: list[Group]) -> None:
    """End the processes of all groups; those that do not within a second, or hang, are killed."""
    for group in groups:
        with contextlib.suppress(ConnectionError):
            group.tell(False)
    members = [member for group in groups for member in group.members]
    wait_for_all([member.sentinel for member in members], seconds=1)
    for member in members:
        member.kill()
        member.join()


# ---- all groups in turn ----------------------------------------------------------------------------------------------


def benchmark(args) -> None:
    """Measure 1..N processes of one thread, and on a CPU one process of N threads, on the same global batch; table, figure, results."""
    with contextlib.redirect_stdout(io.StringIO()):  # check() has said which
        data = load_cifar10(args.data, args.batch_size)
    parameters = parameter_bytes(ConvNet(args.widths, "group"))
    counts = [n for n in range(1, args.nproc + 1) if args.batch_size % n == 0]
    threads = args.num_threads or max(1, usable_cores() // args.nproc)
    on_cpu = args.device.type == "cpu"
    shapes = [(n, threads) for n in counts] + ([(1, threads * args.nproc)] if args.nproc > 1 and on_cpu else [])
    warn(shapes, data, on_cpu)
    rounds = 2 if args.quick else ROUNDS
    print(f"{rounds} rounds of {STEPS} steps of {args.batch_size} images in turn; (processes, threads): {shapes}")
    with tempfile.TemporaryDirectory() as folder:
        groups, runs = [], {shape: [] for shape in shapes}
        try:
            for shape in shapes:
                groups.append(Group(args, *shape, Path(folder)))
            for _ in tqdm(range(rounds), "rounds"):
                for shape, group in zip(shapes, groups, strict=True):
                    runs[shape].append(group.round())
        finally:
            end(groups)
    rows = [summary(shape, runs, args.batch_size, parameters) for shape in shapes]
    print_table([{key: value for key, value in row.items() if not key.startswith("runs_")} for row in rows])
    say(rows)
    save_figure(plot(rows), ddp_train.__file__, "speedup", args, f"{args.batch_size} images a step, {rounds} rounds of {STEPS} steps")
    save_results(ddp_train.__file__, args, rows)


def warn(shapes: list[tuple[int, int]], data: dict, on_cpu: bool) -> None:
    """Say which numbers of processes are left out, and where there are too few cores, or too little memory for all at once."""
    counts = {n for n, _ in shapes}
    if left_out := sorted(set(range(1, max(counts))) - counts):
        print(f"left out: {', '.join(map(str, left_out))} processes, which cannot share out a batch evenly")
    busy, processes = max(n * threads for n, threads in shapes), sum(n for n, _ in shapes)
    if on_cpu and busy > usable_cores():
        print(f"{busy} threads compute at once on {usable_cores()} usable cores: the ideal line is out of reach")
    needed, free = processes * (PROCESS_BYTES + sum(part.images.nbytes for part in data.values())), available_memory()
    if needed > free:
        said = f"{processes} processes need about {needed / 1e9:.1f} GB together, {free / 1e9:.1f} GB are free"
        print(f"warning: {said}: the times may be those of swapping; give a smaller -nproc")


def summary(shape: tuple[int, int], runs: dict, batch_size: int, parameters: int) -> dict:
    """One row out of the rounds of one group; ratios are taken within a round, against one process of as many threads."""
    base, mine = runs[next(iter(runs))], runs[shape]
    speedups = [one["step_s"] / own["step_s"] for one, own in zip(base, mine, strict=True)]
    rates = [batch_size / run["step_s"] for run in mine]
    parts = {"sharing": ("compute_s", "alone_s"), "allreduce": ("step_s", "compute_s")}  # the longer time, the shorter one
    shares = {part: statistics.median((run[more] - run[less]) / run["step_s"] for run in mine) for part, (more, less) in parts.items()}
    shares = {part: min(1.0, max(0.0, of_step)) for part, of_step in shares.items()}  # noise may say less than nothing, or more than all
    if shape[0] == 1:  # which has nobody to wait for
        shares = dict.fromkeys(parts, 0.0)
    return {
        "processes": shape[0],
        "threads": shape[1],
        "images_per_s": statistics.median(rates),
        "images_per_s_sd": spread(rates),
        "speedup": statistics.median(speedups),
        "efficiency": statistics.median(speedups) / shape[0] if shape[1] == next(iter(runs))[1] else None,
        "alone_ms": statistics.median(run["alone_s"] for run in mine) * 1e3,
        "compute_ms": statistics.median(run["compute_s"] for run in mine) * 1e3,
        "step_ms": statistics.median(run["step_s"] for run in mine) * 1e3,
        "allreduce_alone_ms": statistics.median(run["allreduce_s"] for run in mine) * 1e3,
        "sharing_share": shares["sharing"],
        "allreduce_share": shares["allreduce"],
        "bytes_per_step": mine[0]["bytes"],
        "formula_bytes": parameters,
        "ring_bytes_each": ddp_bytes(shape[0], parameters),
        "runs_speedup": speedups,
    }
