"""Choose the network before anything else: parameters, multiplications, latency and accuracy of four architectures side by side.

    python m29_inference/architectures.py                                              a ResNet, an EfficientNet, a MobileNet, a Swin
    python m29_inference/architectures.py -models resnet50 vit_b_16 -batch_sizes 1 8 32
    python m29_inference/architectures.py -resolution 160                              fewer pixels, fewer multiplications
    python m29_inference/architectures.py -budget_ms 20                                the best network for 20 ms an image

A MAC is one multiplication and one addition; papers call it a FLOP, and others count two FLOPs for it. A convolution of k x k costs k * k *
inputs * outputs MACs for every pixel of its output. MACs are not time: a network with few of them may keep the multipliers waiting for
memory, so the achieved rate, GMAC/s, stands beside what a plain matrix product reaches here. Nothing is downloaded: latency does not
depend on the weights' values, and the accuracies are those that torchvision publishes with its weights.
"""

import copy
import difflib
import io
import pickle
import sys
import warnings
from pathlib import Path

import torch
import torchvision
from ptflops import get_model_complexity_info
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import measure, measure_alternately, new_parser, parse, positive_int, positive_number, print_table, save_figure, save_results
from errors import InputError
from m29_inference.architectures_report import advise, plot_accuracy, plot_rates
from m29_inference.macs import gmacs
from machine import available_memory

MODELS = ("resnet18", "efficientnet_b0", "mobilenet_v3_large", "swin_t")
BATCH_SIZES = [1, 8]  # where -batch_sizes does not say it
SMALLEST = 32  # pixels a side
AS_PUBLISHED = {"googlenet": {"aux_logits": False}, "vit_h_14": {"image_size": 518}}  # as the published weights want it, who bring it along
TOLERANCE, ROUNDED = 0.005, 0.0005  # counts that differ by a larger share are marked; GMACs are published in thousandths


# ---- one network -----------------------------------------------------------------------------------------------------


def build(name: str, pretrained: bool, device: torch.device, others: tuple[str, ...] = ()) -> tuple[nn.Module, object]:
    """A torchvision network in eval mode and the description of its published weights; downloads them only if asked to.

    InputError for an unknown name, with those that are like it; `others`: names that the script knows besides torchvision's.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, [*others, *known], n=3, cutoff=0.5)
        raise InputError(f"torchvision has no network {name}{', did you mean ' + ' or '.join(near) if near else ''}")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        with warnings.catch_warnings(action="ignore"):  # of networks whose initialization will change
            options = {} if pretrained else AS_PUBLISHED.get(name, {})
            model = torchvision.models.get_model(name, weights=weights if pretrained else None, **options)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # urllib's are of the first kind; the others: a damaged file
        if not pretrained:
            raise
        reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        clear = "" if isinstance(error, OSError) else f", or clear {torch.hub.get_dir()}/checkpoints"
        raise InputError(f"-pretrained: the weights of {name} cannot be fetched or read ({reason}): leave the flag out{clear}") from error
    return model.eval().to(device), weights


def uses_attention(model: nn.Module) -> bool:
    return any("Attention" in type(module).__name__ for module in model.modules())


def count_macs(model: nn.Module, resolution: int) -> dict[str, float]:
    """GMACs of one image by two counters. ptflops' aten backend does not see inside attention, torch's counter does."""
    shape = (3, resolution, resolution)
    options = {"backend": "aten", "as_strings": False, "print_per_layer_stat": False, "verbose": False}
    macs, _ = get_model_complexity_info(model, shape, **options)
    return {"ptflops": macs / 1e9, "flop_counter": gmacs(model, resolution)}


def biases_added(model: nn.Module, resolution: int) -> int:
    """How many numbers of one image get a bias added in convolutions and linear layers: additions, no MACs, but ptflops counts them."""
    total = 0

    def add(module: nn.Module, inputs, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    with torch.inference_mode():
        model(torch.zeros(1, 3, resolution, resolution, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return total


def why_counters_differ(model: nn.Module, macs: dict[str, float], resolution: int) -> str:
    if uses_attention(model):
        return "ptflops sees attention in part"
    more = (macs["ptflops"] - macs["flop_counter"]) * 1e9
    return "ptflops counts biases, too" if round(more) == biases_added(model, resolution) else "counters differ"


def describe(name: str, model: nn.Module, weights, resolution: int) -> dict:
    """Size, MACs by both counters, and what is published, with a mark where the numbers disagree, and why."""
    macs = count_macs(model, resolution)
    as_published = resolution == published_resolution(weights)
    published = weights.meta["_ops"] if as_published else None
    marks = []
    if abs(macs["ptflops"] / macs["flop_counter"] - 1) > TOLERANCE:
        marks.append(why_counters_differ(model, macs, resolution))
    taken = macs["flop_counter"] if marks else macs["ptflops"]  # the former has neither fault
    if published and abs(taken - published) > max(TOLERANCE * published, ROUNDED):
        marks.append("not the published count")
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    return {
        "model": name,
        "resolution": resolution,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "size_mb": content.tell() / 1e6,
        "gmacs": taken,
        "gmacs_ptflops": macs["ptflops"],
        "gmacs_flop_counter": macs["flop_counter"],
        "gmacs_published": published,
        "accuracy_published": weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100 if as_published else None,
        "note": "; ".join(marks) or None,
    }


def published_resolution(weights) -> int:
    return weights.transforms().crop_size[0]


def activation_bytes(model: nn.Module, image: torch.Tensor) -> int:
    """Bytes that the layers put out for `image`; in inference only some of them are alive at a time, so this is an upper bound."""
    total = 0

    def add(module: nn.Module, inputs, output) -> None:
        nonlocal total
        total += output.nbytes if isinstance(output, torch.Tensor) else 0

    hooks = [module.register_forward_hook(add) for module in model.modules() if not list(module.children())]
    with torch.inference_mode():
        model(image)
    for hook in hooks:
        hook.remove()
    return total


def fitting_batch(model: nn.Module, name: str, resolution: int, batch: int, device: torch.device) -> int:
    """The largest batch up to `batch` whose activations fit into the free memory, by an estimate from one image; says so when smaller."""
    if resolution < SMALLEST:
        raise InputError(f"-resolution {resolution} is too small: these networks halve it five times, so {SMALLEST} is the least")
    try:
        each = activation_bytes(model, torch.zeros(1, 3, resolution, resolution, device=device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[-1][:100]
        raise InputError(f"{name} does not work at -resolution {resolution} ({reason}): {hint_resolution(name)}") from error
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    most = max(1, int(0.8 * free // each))
    if most < batch:
        print(f"warning: {name} needs about {each / 1e6:,.0f} MB an image, {free / 1e6:,.0f} MB are free: batch {most} instead of {batch}")
    return min(batch, most)


def hint_resolution(name: str) -> str:
    trained = published_resolution(torchvision.models.get_model_weights(name).DEFAULT)
    return f"it was made for {trained}, Vision Transformers take no other, the rest none much smaller"


# ---- time ------------------------------------------------------------------------------------------------------------


def time_forward(model: nn.Module, images: torch.Tensor) -> tuple[float, float, str]:
    """Median and sd in ms of a forward pass, in the faster of two memory layouts, after both were seen to compute the same."""
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    calls, outputs = {}, {}
    with torch.inference_mode():
        for layout, memory_format in layouts.items():
            copied = model if layout == "contiguous" else copy.deepcopy(model).to(memory_format=memory_format)
            arranged = images.to(memory_format=memory_format)
            calls[layout] = lambda copied=copied, arranged=arranged: copied(arranged)
            outputs[layout] = calls[layout]()
        difference = (outputs["contiguous"] - outputs["channels_last"]).abs().max() / outputs["contiguous"].abs().max()
        if difference > 1e-3:
            raise RuntimeError(f"channels_last computes something else: relative difference {difference:.1e}")
        timings = measure_alternately(calls, images.device)
    layout = min(timings, key=lambda name: timings[name].median_ms)
    return timings[layout].median_ms, timings[layout].sd_ms, layout


def ceilings(device: torch.device, n: int = 2048) -> dict[str, float]:
    """GMAC/s of an n x n matrix product and of a wide 3x3 convolution in float32, best of 5: what the multipliers can do here.

    Both, because they come from different libraries: on some CPUs one of them reaches twice the rate of the other.
    """
    a, b = torch.rand(2, n, n, device=device)
    convolution = nn.Conv2d(256, 256, 3, padding=1, bias=False, device=device).to(memory_format=torch.channels_last)
    images = torch.rand(8, 256, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    calls = {"a matrix product": (n**3, lambda: a @ b), "a 3x3 convolution": (8 * 32 * 32 * 9 * 256 * 256, lambda: convolution(images))}
    with torch.inference_mode():
        return {name: macs / 1e6 / min(measure(call, device).runs_ms) for name, (macs, call) in calls.items()}


def plan(row: dict, batch: int, timing: tuple[float, float, str]) -> dict:
    latency_ms, sd_ms, layout = timing
    rates = {"images_per_s": batch / latency_ms * 1e3, "gmacs_per_s": row["gmacs"] * batch / latency_ms * 1e3}
    return {**row, "batch": batch, "latency_ms": latency_ms, "latency_sd_ms": sd_ms, **rates, "layout": layout}


def main(args) -> list[dict]:
    batches = sorted(set(args.batch_sizes or ([1] if args.quick else BATCH_SIZES)))
    rows = []
    for name in tqdm(dict.fromkeys(args.models), "networks"):
        model, weights = build(name, args.pretrained, args.device)
        resolution = args.resolution or published_resolution(weights)
        fitting = {batch: fitting_batch(model, name, resolution, batch, args.device) for batch in batches}
        row = describe(name, model, weights, resolution)
        for batch in dict.fromkeys(fitting.values()):
            rows.append(plan(row, batch, time_forward(model, torch.randn(batch, 3, resolution, resolution, device=args.device))))
    rates = ceilings(args.device)
    best = max(rates, key=rates.get)
    firsts = [next(row for row in rows if row["model"] == name) for name in dict.fromkeys(args.models)]
    counted = ("model", "resolution", "parameters", "size_mb", "gmacs", "gmacs_ptflops", "gmacs_flop_counter", "gmacs_published", "note")
    print_table([{key: row[key] for key in counted} for row in firsts])
    print(f"\nGMAC/s here: {', '.join(f'{name} {rate:,.0f}' for name, rate in rates.items())}; of_ceiling is the share of {best}")
    timed = ("model", "batch", "latency_ms", "latency_sd_ms", "images_per_s", "gmacs_per_s", "layout", "accuracy_published")
    rows = [row | {"of_ceiling": row["gmacs_per_s"] / rates[best]} for row in rows]
    print_table([{key: row[key] for key in (*timed, "of_ceiling")} for row in rows])
    known = [row for row in firsts if row["accuracy_published"]]
    if unknown := [row["model"] for row in firsts if not row["accuracy_published"]]:
        print(f"at this resolution no accuracy is published for {', '.join(unknown)}: left out of what follows")
    print(advise(known, args.budget_ms))
    if known:
        save_figure(plot_accuracy(known), __file__, "accuracy", args, "5 repeats, accuracy as published by torchvision")
    save_figure(plot_rates(firsts, best, rates[best]), __file__, "rates", args, "5 repeats, median")
    return rows


if __name__ == "__main__":
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("-models", nargs="+", default=list(MODELS), help=f"torchvision's names (default: {' '.join(MODELS)})")
    flag("-resolution", type=positive_int, help="pixels a side (default: each network's own)")
    flag("-batch_sizes", type=positive_int, nargs="+", help="images at a time (default: 1 8)")
    flag("-budget_ms", type=positive_number, default=50.0, help="latency at the smallest batch that you can afford (default: 50)")
    flag("-pretrained", action="store_true", help="download the published weights; changes no latency")
    args = parse(parser)
    rows = main(args)
    save_results(__file__, args, rows)
