"""Networks of torchvision by name, and how many images at a time fit into memory; for architectures.py and quantize.py."""

import copy
import difflib
import pickle
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from data.fetch import online
from errors import InputError, first_line
from machine import available_memory

SMALLEST = 32  # pixels a side
LIVE = 3  # a layer's input and output, beside them those that a shortcut waits for, and the library's own copies
AS_PUBLISHED = {"googlenet": {"aux_logits": False}, "vit_h_14": {"image_size": 518}}  # as the published weights want it, who bring it along


def build(name: str, pretrained: bool, device: torch.device, others: tuple[str, ...] = ()) -> tuple[nn.Module, object]:
    """A torchvision network in eval mode and the description of its published weights; downloads them only if asked to.

    InputError for an unknown name, with those that are like it; `others`: names that the script knows besides torchvision's.
    """
    check_name(name, others)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    fetched = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name).exists()
    if pretrained and not fetched and not online(weights.url):
        raise InputError(f"-pretrained: the weights of {name} are on a server that cannot be reached: leave the flag out")
    try:
        with warnings.catch_warnings(action="ignore"):  # of networks whose initialization will change
            options = {} if pretrained else AS_PUBLISHED.get(name, {})
            model = torchvision.models.get_model(name, weights=weights if pretrained else None, **options)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # urllib's are of the first kind; the others: a damaged file
        if not pretrained:
            raise
        clear = "" if isinstance(error, OSError) else f", or clear {torch.hub.get_dir()}/checkpoints"
        raise InputError(
            f"-pretrained: the weights of {name} cannot be fetched or read ({first_line(error)}): leave the flag out{clear}"
        ) from error
    if isinstance(model, torchvision.models.VisionTransformer) and not pretrained:
        nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # they are all 0 before, and so would be all outputs
    return model.eval().to(device), weights


def check_name(name: str, others: tuple[str, ...] = ()) -> None:
    """InputError for a name that torchvision does not know, with those that are like it."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, [*others, *known], n=3, cutoff=0.5)
        raise InputError(f"torchvision has no network {name}{', did you mean ' + ' or '.join(near) if near else ''}")


def published_resolution(weights) -> int:
    return weights.transforms().crop_size[0]


def uses_attention(model: nn.Module) -> bool:
    return any("Attention" in type(module).__name__ for module in model.modules())


def outline(model: nn.Module) -> nn.Module:
    """A copy without numbers, on torch's device "meta": sizes and operations can be followed there in no memory and no time."""
    parameters = {id(tensor): nn.Parameter(tensor.to("meta"), tensor.requires_grad) for tensor in model.parameters()}
    return copy.deepcopy(model, {**parameters, **{id(tensor): tensor.to("meta") for tensor in model.buffers()}})


def activation_bytes(model: nn.Module, resolution: int) -> int:
    """Bytes that are alive at once while an image passes, about: LIVE times what the largest layer reads and writes."""
    largest, model = 0, outline(model)

    def look(module: nn.Module, inputs, output) -> None:
        nonlocal largest
        largest = max(largest, sum(value.nbytes for value in (*inputs, output) if isinstance(value, torch.Tensor)))

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    with torch.inference_mode():
        model(torch.empty(1, 3, resolution, resolution, device="meta"))
    return LIVE * largest


def size_of_weights(network: nn.Module) -> float:
    """MB of a network's numbers as saved."""
    with tempfile.TemporaryFile() as file:
        torch.save(network.state_dict(), file)
        return file.tell() / 1e6


def weight_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def fitting_batch(model: nn.Module, name: str, resolution: int, batch: int, device: torch.device, reserved: int = 0) -> int:
    """The largest batch up to `batch` whose activations fit into the free memory, by an estimate from one image; says so when smaller.

    `reserved`: bytes that will be taken before. InputError where not even one image fits.
    """
    if resolution < SMALLEST:
        raise InputError(f"-resolution {resolution} is too small: these networks halve it five times, so {SMALLEST} is the least")
    try:
        each = activation_bytes(model, resolution)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[-1][:100]
        raise InputError(f"{name} does not work at -resolution {resolution} ({reason}): {hint_resolution(name)}") from error
    free = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()) - reserved
    most = int(0.8 * free // each)
    beside = f" beside {reserved / 1e6:,.0f} MB for copies of the weights" if reserved else ""
    needs = f"{name} needs about {each / 1e6:,.0f} MB an image, {max(0, free) / 1e6:,.0f} MB are free{beside}"
    if most < 1:
        raise InputError(f"{needs}: take smaller networks or fewer pixels")
    if most < batch:
        print(f"warning: {needs}: batch {most} instead of {batch}")
    return min(batch, most)


def hint_resolution(name: str) -> str:
    trained = published_resolution(torchvision.models.get_model_weights(name).DEFAULT)
    return f"it was made for {trained}, some networks take no other, the rest none much smaller"
