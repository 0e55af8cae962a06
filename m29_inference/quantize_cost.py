"""What fewer bits cost and save: outputs that differ, answers that differ, megabytes; for quantize_model.py and quantize_layers.py."""

import copy
import math
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import normalize
from errors import InputError
from m29_inference.int8 import compile_to_file, load_compiled
from m29_inference.int8_file import load_graph, save_graph
from m29_inference.quantize_peers import load_peers
from m29_inference.torchvision_networks import size_of_weights
from m29_inference.training import CPU, answers, fingerprint
from paths import display_path

NOT_COMPILED = "int8, not compiled"  # the row where there is no compiler, or it fails
ACCURACY_BATCH = 250  # images at most; compiled code takes one size alone, so it must divide the test images


class InBfloat16(nn.Module):
    """A network computed in bfloat16, float32 outside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).to(torch.bfloat16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.to(torch.bfloat16)).float()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Size of the difference against the size of what is right."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def margin(difference: torch.Tensor) -> float:
    """Half of the 95 % interval of the mean of differences -1, 0 and 1; where all are 0 by the rule of three: 3 / n."""
    return 1.96 * difference.std().item() / math.sqrt(len(difference)) if difference.any() else 3 / len(difference)


def compare_accuracy(network: nn.Module, variants: dict, peers: dict, data: dict, compile_them: bool) -> dict[str, dict]:
    """Right answers of each variant and peer on all test images, image by image against float32; prints each difference and its interval.

    By name, "eager" too: accuracy, accuracy_difference and its accuracy_margin, and same_class, the share of images on which both agree.
    """
    batch = next(size for size in range(ACCURACY_BATCH, 0, -1) if len(data["test"]) % size == 0)
    labels, images = data["test"].labels, normalize(data["test"].images[:batch])
    theirs = answers(network, data["test"], CPU, batch)
    found = {"eager": {"accuracy": (theirs == labels).double().mean().item()}}
    print()
    for name, variant in tqdm({**variants, **load_peers(peers, images)}.items(), "right answers", unit="variant", leave=False):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            function = variant
            if compile_them and name in variants and name != "channels_last":
                try:
                    function = load_compiled(compile_to_file(variant, images, Path(folder, "accuracy.pt2")))
                except InputError as error:
                    tqdm.write(f"{name}: answers of the graph that is not compiled, {error}")
            ours = answers(function, data["test"], CPU, batch)
        difference, same = (ours == labels).double() - (theirs == labels).double(), (ours == theirs).double().mean().item()
        points, half = difference.mean().item(), margin(difference)
        said = f"{name} {points * 100:+.2f} points (95 % interval +- {half * 100:.2f}), the same class as float32 for {same:.2%}"
        tqdm.write(f"{len(labels):,} test images: {said}")
        found[name] = {"accuracy": (ours == labels).double().mean().item(), "accuracy_difference": points}
        found[name] |= {"accuracy_margin": half, "same_class": same}
    return found


def sizes_mb(network: nn.Module, variants: dict[str, nn.Module], images: torch.Tensor, kept: Path | None) -> dict[str, float]:
    """MB as saved, by variant: the weights, or the int8 graph, which must compute the same bits when it is loaded again."""
    dynamic = {name: variant for name, variant in variants.items() if "dynamic" in name}
    sizes = {name: size_of_weights(variant) for name, variant in dynamic.items()}
    sizes |= dict.fromkeys(("eager", "channels_last", "compiled float32"), size_of_weights(network))
    sizes |= dict.fromkeys(("compiled bfloat16", "compiled bfloat16, plain attention"), size_of_weights(InBfloat16(network).network))
    graphs = [name for name in variants if "int8" in name and name not in dynamic]  # one and the same, compiled in several ways
    int8 = variants[graphs[0]]
    with tempfile.TemporaryDirectory() as folder:
        file = save_graph(int8, images, kept or Path(folder, "int8.pt2"), fingerprint(network))
        with torch.no_grad():
            if not torch.equal(load_graph(file)[0](images), int8(images)):
                raise RuntimeError("the int8 network that was saved computes something else")
        size = file.stat().st_size / 1e6
    print(f"saved: {sizes['eager']:.2f} MB in float32, {size:.2f} in int8, {size / sizes['eager']:.3f}x", end="")
    print(f"; loaded again it computes the same bits{f'; kept in {display_path(kept)}' if kept else ''}")
    return sizes | dict.fromkeys([*graphs, NOT_COMPILED], size)
