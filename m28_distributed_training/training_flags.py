"""The flags that ddp_train.py and fsdp_train.py have in common, and what is refused before a step is taken."""

import argparse
import contextlib
import io
import os
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import Images, load_cifar10
from common import new_parser, non_negative_int, positive_int, positive_number
from errors import InputError, under_torchrun
from m28_distributed_training.checkpoint import EVERY, add_checkpoint_flags, check_file
from m28_distributed_training.group import check_variables, local_processes, world_size
from machine import computes_with

FASTEST = 1e30  # learning rate: beyond it a step overflows before the optimizer could take it
BITS = ("num_threads", "machine")  # decide the last bits only: they may differ where no checkpoint is kept


def training_parser(doc: str, steps: int | None = None):
    """The parser of both scripts; `steps`: how many the script takes where no flag says it, None for three epochs."""
    parser = new_parser(doc)
    flag = parser.add_argument
    flag("-data", help="folder or hub id of CIFAR-10 (default: data/cifar10 where it was downloaded, else drawn shapes)")
    epochs, steps_said = ("", f" (default: {steps})") if steps else (" (default: 3)", "")
    length = parser.add_mutually_exclusive_group().add_argument
    length("-epochs", type=positive_int, default=None if steps else 3, help=f"passes over the training images{epochs}")
    length("-steps", type=positive_int, help=f"steps, instead of epochs{steps_said}")
    flag("-batch_size", type=positive_int, default=128, help="images a step, of all processes together (default: 128)")
    flag("-accumulate", type=positive_int, default=1, help="micro-batches a process before each all-reduce (default: 1)")
    flag("-micro_batches", type=positive_int, help="instead: micro-batches a step of all processes, however many they are just now")
    flag("-widths", type=positive_int, nargs=3, default=[32, 64, 128], help="channels of the three stages (default: 32 64 128)")
    flag("-lr", type=learning_rate, default=0.001, help="highest learning rate of the schedule (default: 0.001)")
    flag("-bf16", action="store_true", help="compute in bfloat16 where it is safe (autocast)")
    add_launch_flags(parser)
    add_checkpoint_flags(parser)
    return parser


def learning_rate(text: str) -> float:
    """The type of -lr."""
    if (number := positive_number(text)) > FASTEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a number of at most {FASTEST:g} is expected, and better far below 1")
    return number


def patience(text: str) -> int:
    """The type of -timeout_s."""
    if (seconds := positive_int(text)) > 24 * 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: at most a day, {24 * 3600}, is expected")
    return seconds


def add_launch_flags(parser) -> None:
    """The flags that say how many processes there are and how long they wait for each other."""
    parser._option_string_actions["-num_threads"].help = "threads of each process (default: usable cores / processes)"
    parser.add_argument(
        "-nproc", type=positive_int, help="processes on this machine, without torchrun (default: 2, with nccl at most one for each GPU)"
    )
    parser.add_argument(
        "-max_restarts", type=non_negative_int, default=0, help="start all again, from the checkpoint, when one dies (default: 0)"
    )
    parser.add_argument("-timeout_s", type=patience, default=60, help="seconds a process waits for the others (default: 60)")
    parser.add_argument("-backend", choices=["gloo", "nccl"], help="how processes talk (default: nccl with CUDA, gloo otherwise)")


def check(args) -> None:
    """Settle what follows from other flags and the machine; InputError for what cannot work."""
    check_variables()
    refuse_idle(args)
    settle_device(args)
    if args.quick:
        args.steps = min(args.steps or 20, 20)
    if args.micro_batches:
        args.accumulate = share_micro_batches(args)
    micro = world_size(args) * args.accumulate
    if args.batch_size % micro:
        raise InputError(
            f"-batch_size {args.batch_size} does not divide into {micro} equal micro-batches ({world_size(args)} processes x "
            f"-accumulate {args.accumulate}): give a multiple of {micro}"
        )
    args.every = args.every or EVERY
    if args.checkpoint:
        check_file(args.checkpoint, args.resume)
    # found, fetched or drawn before a process waits for the others; under torchrun train() says which
    with contextlib.redirect_stdout(io.StringIO()) if under_torchrun() else contextlib.nullcontext():
        load_cifar10(args.data, args.batch_size)


def run_settings(args, data: Images, steps: int, script: str = "ddp_train") -> dict:
    """What must be the same in all processes, and for a resumed run to end with the same bits; InputError where it is not."""
    settings = {key: getattr(args, key) for key in ("batch_size", "seed", "lr", "bf16", "num_threads")}
    settings |= {"data": f"{len(data):,} images of {data.name}, checksum {checksum(data):08x}", "device": args.device.type}
    settings |= {"widths": list(args.widths), "steps": steps, "micro_batches": dist.get_world_size() * args.accumulate}
    settings |= {"world": dist.get_world_size(), "script": script, "machine": computes_with(args.device)}
    order = {"checkpoint": bool(args.checkpoint), "resume": args.resume, "every": args.every}  # in which processes talk to each other
    refuse_differences(settings | order)
    return settings


def checksum(data: Images) -> int:
    """Of images and labels: another order of the images, or other numbers of the classes, makes another run."""
    return zlib.crc32(data.labels.numpy(), zlib.crc32(data.images.numpy()))


def refuse_differences(settings: dict) -> None:
    """InputError in all processes where one has other settings than the first: they would train another network each, without a word."""
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, settings)
    keys = [key for key in settings if key not in BITS or all(theirs["checkpoint"] for theirs in everybody)]
    for rank, theirs in enumerate(everybody):
        if other := [f"{key} {theirs[key]} instead of {everybody[0][key]}" for key in keys if theirs[key] != everybody[0][key]]:
            raise InputError(
                f"rank {rank} has not what rank 0 has: {', '.join(other)}; start all with the same data and flags, -num_threads among them"
            )


def refuse_idle(args) -> None:
    """InputError for flags that would be looked at by nobody; -nproc and -max_restarts have torchrun's own in their place."""
    if under_torchrun() and (args.nproc or args.max_restarts):
        given = "-nproc" if args.nproc else "-max_restarts"
        raise InputError(f"{given} is not looked at under torchrun: give torchrun --nproc-per-node and --max-restarts instead")
    if args.checkpoint and not args.resume and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise InputError("-checkpoint without -resume under torchrun --max-restarts: it starts with the same flags again, so give -resume")
    for flag in ("max_restarts", "resume", "every"):
        if getattr(args, flag) and not args.checkpoint:
            raise InputError(f"-{flag} is about a checkpoint: give -checkpoint FILE, too")


def settle_device(args) -> None:
    """Make -device, -backend and -nproc fit together; InputError where they cannot."""
    if args.device.type == "mps":
        print("gloo, by which the processes talk, has no way to mps devices: they compute on the CPU")
        args.device = torch.device("cpu")
    gpus = torch.cuda.device_count() if args.device.type == "cuda" and dist.is_nccl_available() else 0
    args.backend = args.backend or ("nccl" if gpus else "gloo")
    args.nproc = args.nproc or (min(2, gpus) if args.backend == "nccl" else 2) or 1
    if args.backend == "nccl" and not gpus:
        raise InputError("-backend nccl needs CUDA devices, a torch built with nccl, and no -device cpu: leave it out, gloo is used then")
    if args.backend == "nccl" and local_processes(args) > gpus:
        many, has = f"{local_processes(args)} processes", f"{gpus} GPU{'s' if gpus > 1 else ''}"
        raise InputError(
            f"nccl wants a GPU for each of the {many}, this machine has {has}: start fewer, or take -backend gloo or -device cpu"
        )


def share_micro_batches(args) -> int:
    """Micro-batches a process when -micro_batches says how many all have together: the world may then change, the bits may not."""
    if args.accumulate > 1:
        raise InputError("-accumulate counts the micro-batches of a process, -micro_batches those of all: give one of the two")
    if args.micro_batches % world_size(args):
        raise InputError(f"-micro_batches {args.micro_batches} cannot be shared out evenly among {world_size(args)} processes")
    return args.micro_batches // world_size(args)
