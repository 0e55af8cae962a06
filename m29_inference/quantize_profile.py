"""What `quantize.py -model NAME -profile` does: the milliseconds of the int8 network, layer by layer.

AOTInductor can write a mark into its C++ around each call (cpp.enable_kernel_profile, Linux and Windows), which torch.profiler then
times. The C++ also says which layer a call belongs to, by the name of its bias. Everything else that is marked is no layer: pooling,
additions, quantizing the image, attention's products. What lies between the marks is a whole run, timed without the profiler, less
their sum in a run timed with it, in turn: as uncertain as both.
"""

import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import print_table, save_figure
from errors import InputError
from m29_inference import quantize
from m29_inference.int8 import (
    compile_to_file,
    has_compiler,
    import_quantizer,
    int8_calls,
    load_compiled,
    quantize_network,
    quiet,
    why_not_compiled,
)
from m29_inference.macs import gmacs_by_layer
from m29_inference.quantize_linear import with_plain_attention
from m29_inference.quantize_setup import BATCH_SIZES, load_network, say_seven_bits
from m29_inference.torchvision_networks import fitting_batch
from m29_inference.training import CPU

REPEATS = 15
BIAS = re.compile(r"temporary_reference\((\w+?)(?:_weight)?_bias\w*\.get")


def layers_of_calls(calls: list[str], layers: list[str]) -> list[str]:
    """The layer of each int8 call, given as C++, out of `layers` in the order in which the network runs them.

    A layer without a bias has no name in the C++: it is known by its place, where those with a name are at theirs. InputError otherwise.
    """
    known = {name.replace(".", "_"): name for name in layers}
    names = [known.get(found[1]) if (found := BIAS.search(call)) else None for call in calls]
    in_order = len(names) == len(layers) and all(name in (None, layer) for name, layer in zip(names, layers, strict=True))
    if any(names) and in_order:
        return layers
    if None in names or sorted(names) != sorted(layers):
        raise InputError(f"the compiled code does not tell which int8 operation is which layer ({len(names)} of {len(layers)}): no profile")
    return names


def marked_run(function, images: torch.Tensor) -> list[tuple[str, float]]:
    """What torch.profiler saw of one run: (name, milliseconds) of each marked call."""
    with quiet(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(2):  # the first one behind the profiler's start is slower
            function(images)
    events = sorted((event for event in profile.events() if event.cpu_parent is None), key=lambda event: event.time_range.start)
    calls = [(event.name, event.cpu_time_total / 1e3) for event in events]  # microseconds -> milliseconds
    return same_calls([calls[: len(calls) // 2], calls[len(calls) // 2 :]])[1]


def same_calls(runs: list[list]) -> list[list]:
    """`runs` as they are; InputError where they are empty or do not all have calls of the same names."""
    if not runs[0] or any([name for name, _ in run] != [name for name, _ in runs[0]] for run in runs):
        raise InputError("torch.profiler did not see the same marked calls in every run: no profile")
    return runs


def whole_run(function, images: torch.Tensor) -> float:
    """Milliseconds of one run without the profiler, after another one that warms up."""
    function(images)
    begin = time.perf_counter()
    function(images)
    return (time.perf_counter() - begin) * 1e3


def measure(int8: nn.Module, images: torch.Tensor, repeats: int) -> tuple[list[float], list[list], list[str]]:
    """In turn, `repeats` times: milliseconds of a whole run, and the marked calls of another; and the C++ of the int8 calls."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library would talk about the GPU that is not there
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps a library that is in use
        file = compile_to_file(int8, images, Path(folder, "int8.pt2"), marked=True)
        function = load_compiled(file)
        with torch.inference_mode():
            rounds = [(whole_run(function, images), marked_run(function, images)) for _ in range(repeats + 1)][1:]  # the first warms up
        wholes, runs = zip(*rounds, strict=True)
        return wholes, same_calls(runs), int8_calls(file)


def profile_rows(network: nn.Module, int8: nn.Module, images: torch.Tensor, repeats: int) -> list[dict]:
    """A row for each marked call, and one for what lies between: median milliseconds of a batch, GMACs, their rate, share of the time.

    The last one has the rounds' differences, too (`runs_ms`), for they may be noise.
    """
    work = gmacs_by_layer(network, images)
    wholes, runs, calls = measure(int8, images, repeats)
    if not calls:
        raise InputError("the compiled code contains no int8 operation, torch has none for this processor: there is nothing to profile")
    layers, rows = iter(layers_of_calls(calls, list(work))), []
    for same in zip(*runs, strict=True):  # one call, in every run
        name, ms = same[0][0], statistics.median(ms for _, ms in same)
        layer = next(layers) if re.match("aoti_torch_cpu__q(conv|linear)", name) else None
        row = {"measured": "profile", "layer": layer or re.sub(r"^graph_\d+_", "", name), "latency_ms": ms}
        rows.append(row | {"gmacs": work.get(layer), "gmacs_per_s": work[layer] / ms * 1e3 if layer else None})
    between = [whole - sum(ms for _, ms in run) for whole, run in zip(wholes, runs, strict=True)]
    last = {"measured": "profile", "layer": "between the calls", "latency_ms": max(0.0, statistics.median(between))}
    rows.append(last | {"gmacs": None, "gmacs_per_s": None, "runs_ms": between})
    total = sum(row["latency_ms"] for row in rows)
    return [row | {"share": row["latency_ms"] / total} for row in rows]


def profile(args) -> list[dict]:
    """Convert, compile with marks, time each call; table, sentences, figure. One batch size, one number of threads."""
    if not has_compiler() or sys.platform not in ("linux", "win32"):
        raise InputError(
            f"{why_not_compiled() or 'PyTorch writes no marks into code for this system'}: -profile times marked, compiled code"
        )
    import_quantizer()
    network, calibration, _ = load_network(args)
    say_seven_bits()
    network, images = with_plain_attention(network), torch.cat(calibration)
    torch.set_num_threads(args.threads[0])
    batch = fitting_batch(network, args.model, images.shape[-1], (args.batch_sizes or BATCH_SIZES)[0], CPU)
    images = images[torch.arange(batch) % len(images)]
    setting, repeats = f"batch {batch}, threads {args.threads[0]}", 3 if args.quick else REPEATS
    print(f"{setting}: converting to int8, compiling, {repeats} runs")
    rows = profile_rows(network, quantize_network(network, calibration), images, repeats)
    print_table([{key: value for key, value in row.items() if key not in ("measured", "runs_ms")} for row in rows])
    say(rows)
    save_figure(plot(rows, args.model), quantize.__file__, "profile", args, f"{setting}, median of {repeats} runs")
    return [{"model": args.model, "batch": batch, "threads": args.threads[0], **row} for row in rows]


def say(rows: list[dict]) -> None:
    """What the layers' share means, and which layer loses most time against the rate of this network's best one."""
    layers = [row for row in rows if row["gmacs"]]
    share, between = sum(row["share"] for row in layers), rows[-1]["runs_ms"]
    told = "" if min(between) > 0 else ": noise, no telling it from none"
    print(
        f"between the calls {statistics.median(between):.3f} ms (in {len(between)} rounds {min(between):.3f} to {max(between):.3f}{told})"
    )
    print(f"{share:.1%} of the time is spent in int8 layers: if all the rest took none, it would be {1 / share:.2f} times as fast")
    best = max(layers, key=lambda row: row["gmacs_per_s"])
    lost = {row["layer"]: row["share"] * (1 - row["gmacs_per_s"] / best["gmacs_per_s"]) for row in layers}
    worst = max(layers, key=lambda row: lost[row["layer"]])
    print(f"the best layer is {best['layer']}, {best['gmacs_per_s']:,.0f} GMAC/s; with its rate everywhere", end=" ")
    print(
        f"{sum(lost.values()):.0%} of the time would be saved, {lost[worst['layer']]:.0%} in {worst['layer']} ({worst['gmacs_per_s']:,.0f})"
    )


def plot(rows: list[dict], model: str) -> plt.Figure:
    """Left: milliseconds of each call, in order; right: the rate of each layer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.5 + 0.24 * len(rows)), sharey=True)
    names = [f"{number}. {row['layer'].removeprefix('cpp_fused_')[:50]}" for number, row in enumerate(rows, 1)]
    left.barh(names, [row["latency_ms"] for row in rows], color=["tab:blue" if row["gmacs"] else "tab:grey" for row in rows])
    right.barh(names, [row["gmacs_per_s"] or 0 for row in rows], color="tab:blue")
    left.invert_yaxis()
    left.margins(y=0.01)
    left.tick_params(axis="y", labelsize=8)
    left.set(xlabel=f"{model} in int8: ms a batch (grey: no layer)")
    right.set(xlabel="GMAC/s")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure
