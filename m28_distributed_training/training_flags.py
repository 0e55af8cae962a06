"""The flags that ddp_train.py and fsdp_train.py have in common, and what is refused before any process is started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import load_cifar10
from common import new_parser, positive_int, positive_number
from errors import InputError
from m28_distributed_training.checkpoint import add_checkpoint_flags, check_file
from m28_distributed_training.launch import add_launch_flags, settle_device, world_size

MANY = 8  # processes: more of them would each find out alone that the data are too few


def training_parser(doc: str, steps: int | None = None):
    """The parser of both scripts; `steps`: how many the script takes where no flag says it, None for three epochs."""
    parser = new_parser(doc)
    flag = parser.add_argument
    flag("-data", help="folder or hub id of CIFAR-10 (default: data/cifar10 where it was downloaded, else drawn shapes)")
    epochs, steps_said = ("", f" (default: {steps})") if steps else (" (default: 3)", "")
    flag("-epochs", type=positive_int, default=None if steps else 3, help=f"passes over the training images{epochs}")
    flag("-steps", type=positive_int, help=f"steps, instead of epochs{steps_said}")
    flag("-batch_size", type=positive_int, default=128, help="images a step, of all processes together (default: 128)")
    flag("-accumulate", type=positive_int, default=1, help="micro-batches a process before each all-reduce (default: 1)")
    flag("-micro_batches", type=positive_int, help="instead: micro-batches a step of all processes, however many they are just now")
    flag("-widths", type=positive_int, nargs=3, default=[32, 64, 128], help="channels of the three stages (default: 32 64 128)")
    flag("-lr", type=positive_number, default=0.001, help="highest learning rate of the schedule (default: 0.001)")
    flag("-bf16", action="store_true", help="compute in bfloat16 where it is safe (autocast)")
    add_launch_flags(parser)
    add_checkpoint_flags(parser)
    return parser


def check(args) -> None:
    """Settle what follows from other flags and the machine; InputError for what cannot work."""
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
    if world_size(args) > MANY:
        load_cifar10(args.data, args.batch_size)
    if args.max_restarts and not args.checkpoint:
        raise InputError("-max_restarts starts from a checkpoint: give -checkpoint FILE, too")
    if args.resume and not args.checkpoint:
        raise InputError("-resume goes on from a checkpoint: give -checkpoint FILE, too")
    if args.checkpoint:
        check_file(args.checkpoint)


def share_micro_batches(args) -> int:
    """Micro-batches a process when -micro_batches says how many all have together: the world may then change, the bits may not."""
    if args.accumulate > 1:
        raise InputError("-accumulate counts the micro-batches of a process, -micro_batches those of all: give one of the two")
    if args.micro_batches % world_size(args):
        raise InputError(f"-micro_batches {args.micro_batches} cannot be shared out evenly among {world_size(args)} processes")
    return args.micro_batches // world_size(args)
