"""Choose the network before anything else: parameters, multiplications, latency and accuracy of four architectures side by side.

    python m29_inference/architectures.py                                              a ResNet, an EfficientNet, a MobileNet, a Swin
    python m29_inference/architectures.py -models resnet50 vit_b_16 -batch_sizes 1 8 32
    python m29_inference/architectures.py -resolution 160                              fewer pixels, fewer multiplications
    python m29_inference/architectures.py -budget_ms 20                                the best network for 20 ms

A MAC is one multiplication and one addition; papers call it a FLOP, and others count two FLOPs for it. A convolution of k x k costs k * k *
inputs * outputs MACs for every pixel of its output. MACs are not time: a network with few of them may keep the multipliers waiting for
memory, so the achieved rate, GMAC/s, stands beside what a plain matrix product reaches here. Nothing is downloaded: latency does not
depend on the weights' values, and the accuracies are those that torchvision publishes with its weights.
"""

import copy
import sys
from pathlib import Path

import torch
from ptflops import get_model_complexity_info
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import new_parser, parse, positive_int, positive_number, print_table, save_figure, save_results
from errors import InputError
from m29_inference.architectures_report import advise, plot_accuracy, plot_rates, who_is_level
from m29_inference.macs import gmacs
from m29_inference.torchvision_networks import (
    build,
    check_name,
    fitting_batch,
    outline,
    published_resolution,
    size_of_weights,
    uses_attention,
    weight_bytes,
)
from timing import measure, measure_alternately, times_as_fast

MODELS = ("resnet18", "efficientnet_b0", "mobilenet_v3_large", "swin_t")
BATCH_SIZES = [1, 8]  # where -batch_sizes does not say it
REPEATS = 7  # in which one of 64 pairs that are level is called faster or slower, by chance
TOLERANCE, ROUNDED = 0.005, 0.0005  # counts that differ by a larger share are marked; GMACs are published in thousandths


# ---- one network -----------------------------------------------------------------------------------------------------


def count_macs(model: nn.Module, resolution: int) -> dict[str, float]:
    """GMACs of one image by two counters. ptflops' aten backend does not see inside attention, torch's counter does."""
    shape = (3, resolution, resolution)
    options = {"backend": "aten", "as_strings": False, "print_per_layer_stat": False, "verbose": False}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # attention as one operation, of which ptflops would not count anything
    try:
        with torch.no_grad():  # else all that backward() would need were kept
            # on a copy, for it leaves its hooks; with an outline it would see attention, which its users do not
            macs, _ = get_model_complexity_info(copy.deepcopy(model), shape, **options)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    if macs is None:
        raise InputError("ptflops could not count this network's MACs, perhaps for lack of memory: see what it says above")
    return {"ptflops": macs / 1e9, "flop_counter": gmacs(outline(model), resolution)}


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
    return {
        "model": name,
        "resolution": resolution,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "size_mb": size_of_weights(model),
        "gmacs": taken,
        "gmacs_ptflops": macs["ptflops"],
        "gmacs_flop_counter": macs["flop_counter"],
        "gmacs_published": published,
        "accuracy_published": weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100 if as_published else None,
        "note": "; ".join(marks) or None,
    }


# ---- time ------------------------------------------------------------------------------------------------------------


def layouts_of(model: nn.Module, images: torch.Tensor) -> dict:
    """{memory layout: function that computes `images` in it}, after both were seen to compute the same."""
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    calls, outputs = {}, {}
    for layout, memory_format in layouts.items():
        copied = model if layout == "contiguous" else copy.deepcopy(model).to(memory_format=memory_format)
        arranged = images.to(memory_format=memory_format)
        calls[layout] = lambda copied=copied, arranged=arranged: copied(arranged)
        outputs[layout] = calls[layout]()
    difference = (outputs["contiguous"] - outputs["channels_last"]).abs().max() / outputs["contiguous"].abs().max()
    if not difference <= (1e-2 if images.is_cuda else 1e-3):  # a GPU may take another algorithm for one of them
        raise RuntimeError(f"channels_last computes something else: relative difference {difference:.1e}")
    return calls


def time_in_turn(inputs: dict[str, tuple[nn.Module, torch.Tensor]], device: torch.device) -> dict[str, dict]:
    """Time networks on their images, all of them in turn; of each the faster layout, and how many times as fast as the other it is."""
    with torch.inference_mode():
        calls = {(name, layout): call for name, given in inputs.items() for layout, call in layouts_of(*given).items()}
        timings = measure_alternately(calls, device, REPEATS, "networks and layouts in turn")
    found = {}
    for name in inputs:
        layout, other = sorted(("contiguous", "channels_last"), key=lambda layout: timings[name, layout].median_ms)
        ours, theirs = timings[name, layout], timings[name, other]
        gain = times_as_fast(ours.runs_ms, theirs.runs_ms, other)
        found[name] = {"latency_ms": ours.median_ms, "latency_sd_ms": ours.sd_ms, "layout": layout, "layout_gain": gain}
        found[name]["runs_ms"] = ours.runs_ms
    return found


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


def measure_all(args) -> list[dict]:
    """A row for each network and batch size, the smaller batches first."""
    batches = sorted(set(args.batch_sizes or ([1] if args.quick else BATCH_SIZES)))
    models, described = {}, {}
    for name in args.models:
        check_name(name)
    for name in tqdm(dict.fromkeys(args.models), "networks"):
        models[name], weights = build(name, args.pretrained, args.device)
        pixels = args.resolution or published_resolution(weights)
        fitting_batch(models[name], name, pixels, 1, args.device)  # or a sentence
        described[name] = describe(name, models[name], weights, pixels)
    second = sum(weight_bytes(model) for model in models.values())  # in the other memory layout
    for name, row in described.items():  # all get the same batches, so that they can be compared
        batches = sorted({fitting_batch(models[name], name, row["resolution"], batch, args.device, second) for batch in batches})
    rows = []
    for batch in batches:
        shapes = {name: (batch, 3, row["resolution"], row["resolution"]) for name, row in described.items()}
        inputs = {name: (models[name], torch.randn(shape, device=args.device)) for name, shape in shapes.items()}
        for name, timed in time_in_turn(inputs, args.device).items():
            per_s = batch / timed["latency_ms"] * 1e3
            rates = {"images_per_s": per_s, "gmacs_per_s": described[name]["gmacs"] * per_s}
            rows.append({**described[name], "batch": batch, **timed, **rates})
    return rows


def main(args) -> list[dict]:
    torch.backends.cudnn.allow_tf32 = False  # or a GPU would round what convolutions compute, and not what linear layers do
    rows, rates = measure_all(args), ceilings(args.device)
    best = max(rates, key=rates.get)
    firsts = [next(row for row in rows if row["model"] == name) for name in dict.fromkeys(args.models)]
    counted = ("model", "resolution", "parameters", "size_mb", "gmacs", "gmacs_ptflops", "gmacs_flop_counter", "gmacs_published", "note")
    print_table([{key: row[key] for key in counted} for row in firsts])
    print(f"\nGMAC/s here: {', '.join(f'{name} {rate:,.0f}' for name, rate in rates.items())}; of_ceiling is the share of {best}")
    timed = ("model", "batch", "latency_ms", "latency_sd_ms", "images_per_s", "gmacs_per_s", "layout", "accuracy_published")
    rows = [row | {"of_ceiling": row["gmacs_per_s"] / rates[best]} for row in rows]
    print_table([{key: row[key] for key in (*timed, "of_ceiling", "layout_gain")} for row in rows])
    print(who_is_level(rows), end="")
    known = [row for row in firsts if row["accuracy_published"]]
    if unknown := [row["model"] for row in firsts if not row["accuracy_published"]]:
        print(f"at this resolution no accuracy is published for {', '.join(unknown)}: left out of what follows")
    print(advise(known, args.budget_ms))
    if known:
        save_figure(plot_accuracy(known), __file__, "accuracy", args, f"{REPEATS} repeats in turn, accuracy as published by torchvision")
    save_figure(plot_rates(firsts, best, rates[best]), __file__, "rates", args, f"{REPEATS} repeats in turn, median")
    return rows


if __name__ == "__main__":
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("-models", nargs="+", default=list(MODELS), help=f"torchvision's names (default: {' '.join(MODELS)})")
    flag("-resolution", type=positive_int, help="pixels a side (default: each network's own)")
    flag("-batch_sizes", type=positive_int, nargs="+", help="images at a time (default: 1 8)")
    flag(
        "-budget_ms", type=positive_number, default=50.0, help="milliseconds that you can afford, at the smallest batch size (default: 50)"
    )
    flag("-pretrained", action="store_true", help="download the published weights; changes no latency")
    args = parse(parser)
    rows = main(args)
    save_results(__file__, args, rows)
