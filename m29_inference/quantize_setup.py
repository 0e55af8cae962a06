"""What stands before a network is quantized: the network, the images that set the scales, what this machine lacks."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import normalize
from errors import InputError
from m29_inference.int8 import has_compiler, sums_overflow, why_not_compiled
from m29_inference.int8_file import load_graph
from m29_inference.student import student_and_data
from m29_inference.torchvision_networks import build, published_resolution
from m29_inference.training import CPU, fast_format, fingerprint
from machine import available_memory

BATCH_SIZES, CALIBRATION = [1, 32], 320  # where no flag says it


def load_network(args) -> tuple[nn.Module, list[torch.Tensor], dict | None]:
    """The network in eval mode, batches of 32 images to calibrate with, and the data where there are labels to count right answers."""
    n = args.calibration or (32 if args.quick else CALIBRATION)
    if args.model == "student":
        network, data = student_and_data(args)
        picked = torch.randperm(len(data["train"]), generator=torch.Generator().manual_seed(args.seed))[:n]
        images = normalize(data["train"].images[picked])
    else:
        (network, weights), data = build(args.model, args.pretrained, CPU, others=("student",)), None
        resolution = published_resolution(weights)
        check_memory(n, resolution)
        images = torch.randn(n, 3, resolution, resolution, generator=torch.Generator().manual_seed(args.seed))
        if not args.load:
            print(f"{args.model} is calibrated with random numbers: its latencies are right, its scales would not be for photographs")
    if not args.load:
        warn_about(images)
    return network, list(images.split(32)), data


def check_memory(n: int, resolution: int) -> None:
    """InputError where so many images to calibrate with do not fit into memory, twice as float32."""
    most = available_memory() // (2 * 4 * 3 * resolution**2)
    if n > most:
        raise InputError(f"-calibration {n}: there is memory for {most:,} images of {resolution} pixels")


def warn_about(images: torch.Tensor) -> None:
    """Say what is wrong with images to calibrate with, (n, 3, height, width): too few, all the same, of one colour each."""
    if len(images) < 32:
        print(f"warning: few images to calibrate with ({len(images)}): the ranges of rarer values are missed; {CALIBRATION} are usual")
    if len(images) > 1 and (images.amax(0) - images.amin(0)).max() < 1e-6:
        print("warning: all images to calibrate with are the same: the scales fit this one image, not others")
    if (images.amax((2, 3)) - images.amin((2, 3))).max() < 1e-6:
        print("warning: each image to calibrate with has one colour all over: the scales fit no photograph")


def load_converted(args, network: nn.Module) -> nn.Module:
    """The int8 network out of -load, if it is one of this very network."""
    int8, made_of = load_graph(args.load)
    if made_of != fingerprint(network):
        likely = "other data, another number of threads" if args.model == "student" else "another -seed, -pretrained for one of them"
        another = f"another network or training than this {args.model} ({likely})"
        raise InputError(f"{args.load} was made of {another}: leave -load out to convert it")
    return int8


def say_what_is_missing() -> None:
    """What this machine lacks for int8 to be fast."""
    if not has_compiler():
        print(f"{why_not_compiled()}: int8 is the graph, not compiled; that shows accuracy, no speed.")
    say_seven_bits()
    if not fast_format(torch.device("cpu"))["enabled"]:
        print("compiled bfloat16 is left out: this processor has no instructions for it")


def say_seven_bits() -> None:
    if sums_overflow():
        print("torch finds no VNNI here, so int8 products may be added up in 16 bits: activations are kept in 7, so that no sum overflows.")
