"""What `quantize.py -model NAME` does: a whole network in int8, beside every float variant that this CPU offers.

int8 pays twice: a quarter of the bytes, and instructions that multiply four times as many numbers at once. But only where compiled code
uses them, so int8 is compared with *compiled* float32 and bfloat16 as well, and not with eager code alone. Every output is compared
with eager float32 before anything is timed, and the compiled file is searched for int8 operations. How a network is
converted stands in int8.py.
"""

import copy
import re
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import print_table, save_figure
from errors import InputError, first_line
from m29_inference import quantize
from m29_inference.int8 import (
    compile_to_file,
    has_compiler,
    import_quantizer,
    int8_calls,
    load_compiled,
    quantize_network,
    quiet,
)
from m29_inference.int8_file import check_graph_file
from m29_inference.quantize_cost import NOT_COMPILED, InBfloat16, compare_accuracy, relative, sizes_mb
from m29_inference.quantize_linear import dynamic_int8, with_plain_attention
from m29_inference.quantize_peers import convert_for_peers, load_peers
from m29_inference.quantize_report import plot_speed, say
from m29_inference.quantize_setup import BATCH_SIZES, load_converted, load_network, say_what_is_missing
from m29_inference.torchvision_networks import fitting_batch, uses_attention, weight_bytes
from m29_inference.training import CPU, fast_format
from paths import check_file_place
from timing import measure_alternately

REPEATS = 9


# ---- what is compared ------------------------------------------------------------------------------------------------


def find_variants(network: nn.Module, int8: nn.Module, quick: bool) -> dict[str, nn.Module]:
    """What is compiled, by name: float32, bfloat16 where the processor has it, and the ways to int8."""
    if not has_compiler():
        return {NOT_COMPILED: int8}
    if quick:  # one to compile
        return {"int8": int8}
    plain = with_plain_attention(network)
    ways = {"": network} if plain is network else {"": network, ", plain attention": plain}
    variants = {"compiled float32": network}
    if fast_format(torch.device("cpu"))["enabled"]:
        variants |= {f"compiled bfloat16{way}": InBfloat16(ours) for way, ours in ways.items()}
    variants["int8"] = int8
    if not uses_attention(network):
        return variants | {"int8, torch.compile": int8}
    return variants | {f"int8, dynamic{way}": dynamic_int8(ours) for way, ours in ways.items()}


# ---- measured --------------------------------------------------------------------------------------------------------


def compiled(name: str, variant: nn.Module, images: torch.Tensor, folder: Path):
    """(function of a batch, number of int8 operations) by AOTInductor, by torch.compile where the name says so; InputError if it fails."""
    if name == NOT_COMPILED:
        return variant, None
    if "dynamic" in name or "torch.compile" in name:
        return compiled_in_memory(variant, images)
    file = compile_to_file(variant, images, folder / f"{name}_{len(images)}_{torch.get_num_threads()}.pt2".replace(" ", "_"))
    return load_compiled(file), len(int8_calls(file))


def compiled_in_memory(variant: nn.Module, images: torch.Tensor):
    """The same by torch.compile."""
    torch._inductor.config.freezing = True  # weights become constants of the code; the option of torch.compile does not do it
    function = torch.compile(variant, dynamic=False)  # for this batch size alone, as AOTInductor's code is
    try:
        with quiet(), torch.inference_mode():  # as it is timed: in another mode it would be compiled once more
            _, sources = run_and_get_code(function, images)
    except RuntimeError as error:  # torch's compiler raises kinds of it
        raise InputError(f"it cannot be compiled here ({first_line(error)})") from error
    return function, len(re.findall(r"\bonednn\.q(?:conv|linear)\w*\.|\b_int_mm\(", "\n".join(sources)))


def time_variants(args, network: nn.Module, variants: dict, peers: dict, images: torch.Tensor, progress: tqdm) -> list[dict]:
    """A row a variant for this batch and the threads set now: latency, ratio to eager, difference of the output from eager's."""
    copied = copy.deepcopy(network).to(memory_format=torch.channels_last)
    arranged = images.contiguous(memory_format=torch.channels_last)
    calls = {"eager": lambda: network(images), "channels_last": lambda: copied(arranged)}
    counts = {}
    torch._dynamo.reset()  # it would go on with what it compiled for another batch size, and for more or fewer threads
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps a library that is in use
        for name, variant in variants.items():
            progress.set_postfix_str(f"{name}, batch {len(images)}, threads {torch.get_num_threads()}")
            try:
                function, count = compiled(name, variant, images, Path(folder))
            except InputError as error:
                tqdm.write(f"{name} is left out: {error}")
                if name != "int8":
                    continue
                name, function, count = NOT_COMPILED, variant, None
            calls[name], counts[name] = (lambda function=function: function(images)), count
            progress.update()
        calls |= {name: lambda function=function: function(images) for name, function in load_peers(peers, images).items()}
        with torch.inference_mode():
            differences = compare_outputs({name: call().float() for name, call in calls.items()})
            timings = measure_alternately(calls, CPU, REPEATS, f"timing {len(calls)} variants")
    rows = []
    for name in calls:
        runs = [theirs / own for theirs, own in zip(timings["eager"].runs_ms, timings[name].runs_ms, strict=True)]
        row = {"model": args.model, "variant": name, "batch": len(images), "threads": torch.get_num_threads()}
        row |= {"latency_ms": timings[name].median_ms, "latency_sd_ms": timings[name].sd_ms}
        row |= {"x_eager": statistics.median(runs), "relative_difference": differences[name]}
        rows.append(row | {"int8_operations": counts.get(name) if "int8" in name else None, "runs_ms": timings[name].runs_ms})
    return rows


def compare_outputs(outputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The relative difference of each variant's output from eager float32's, before anything is timed.

    RuntimeError where other float32 code computes something else; a warning where few bits leave little of what it was.
    """
    differences = {name: relative(output, outputs["eager"]) for name, output in outputs.items()}
    for name, difference in differences.items():
        if name in ("channels_last", "compiled float32") and not difference < 1e-3:
            raise RuntimeError(f"{name} computes something else than eager float32: relative difference {difference:.1e}")
        if not difference < 0.2:
            tqdm.write(f"warning: {name} is off by {difference:.0%}: however fast it is, it is no longer this network")
    return differences


def time_all(args, network: nn.Module, variants: dict, peers: dict, calibration: list[torch.Tensor]) -> list[dict]:
    """Rows for each batch size and number of threads."""
    batches, threads = args.batch_sizes or BATCH_SIZES[: 1 if args.quick else None], args.threads
    pixels, copies = calibration[0].shape[-1], 3 * weight_bytes(network)  # channels_last, and the constants of all that is compiled
    batches = list(dict.fromkeys(fitting_batch(network, args.model, pixels, batch, CPU, copies) for batch in batches))
    rows, images = [], torch.cat(calibration)
    total = len(variants) * len(batches) * len(threads)
    with tqdm(total=total, desc="compiling") as progress:
        for count in threads:
            torch.set_num_threads(count)
            for batch in batches:
                rows += time_variants(args, network, variants, peers, images[torch.arange(batch) % len(images)], progress)
    return rows


def say_yardstick(rows: list[dict], network: nn.Module, images: torch.Tensor, random_weights: bool) -> None:
    """How far apart the answers to two of the images, (n, 3, height, width), are: what a relative difference must be small against."""
    if len(images) < 2:
        return
    with torch.inference_mode():
        outputs = network(images)
    apart = relative(outputs.roll(1, 0), outputs)
    print(f"a yardstick for relative_difference: between the answers to two images it is {apart:.2g}")
    most = max(row["relative_difference"] for row in rows if "int8" in row["variant"])
    if most > apart / 4:
        print(f"warning: int8 is off by up to {most:.2g}, against that no little: it need not give all images the answers of before")
        if random_weights:
            print("with random weights all images get nearly the same answer; -model student and -pretrained have others")


def say_where_floats_are_left(rows: list[dict], layers: int) -> None:
    """A sentence for each variant whose compiled code has fewer int8 operations than the network has layers."""
    for name in dict.fromkeys(row["variant"] for row in rows):
        operations = {row["int8_operations"] for row in rows if row["variant"] == name} - {None}
        if 0 in operations:
            print(f"warning: {name} contains no int8 operation, torch has none for this processor: it computes with floats")
        elif operations and min(operations) < layers:
            others = "the others compute with floats or do not run"
            print(f"{name}: {min(operations)} int8 operations for {layers} convolutions and linear layers: {others}")


def compare(args) -> list[dict]:
    """Convert, save, time, count right answers; table, verdicts, figure."""
    import_quantizer()
    if args.load:
        check_graph_file(args.load)
    if args.save:
        check_file_place("-save", args.save)
    network, calibration, data = load_network(args)
    say_what_is_missing()
    images = sum(len(batch) for batch in calibration)
    print("reading the int8 network" if args.load else f"converting to int8: export, {images} images to calibrate with, convert")
    # nn.MultiheadAttention's weights would stay float32
    int8 = load_converted(args, network) if args.load else quantize_network(with_plain_attention(network), calibration)
    variants = find_variants(network, int8, args.quick)
    sizes = sizes_mb(network, variants, calibration[0], args.save)
    if args.save and args.pretrained and not data:
        print(f"warning: random numbers set the scales in {args.save}: good for measuring latency, not for answers about photographs")
    answering = {"channels_last": copy.deepcopy(network).to(memory_format=torch.channels_last)}
    answering |= {name: variants[name] for name in ("compiled float32", "compiled bfloat16", "int8", NOT_COMPILED) if name in variants}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        peers = convert_for_peers(network, calibration, Path(folder)) if args.peers else {}
        rows = time_all(args, network, variants, peers, calibration)
        accuracy = compare_accuracy(network, answering, peers, data, has_compiler() and not args.quick) if data else {}
    sizes |= {name: peer.size_mb for name, peer in peers.items()}
    accuracy["int8"] = accuracy.get("int8", accuracy.get(NOT_COMPILED, {}))
    for row in rows:
        same = "int8" if row["variant"] in ("int8, torch.compile", NOT_COMPILED) else row["variant"]  # the same graph, however it runs
        row |= {"size_mb": sizes.get(row["variant"]), "accuracy": None} | accuracy.get(same, {})
    said = ("runs_ms", "accuracy_difference", "accuracy_margin", "same_class")  # in sentences, here and below
    print_table([{key: value for key, value in row.items() if key not in said} for row in rows])
    say_yardstick(rows, network, calibration[0], random_weights=not (data or args.pretrained))
    say_where_floats_are_left(rows, sum(isinstance(module, nn.Conv2d | nn.Linear) for module in with_plain_attention(network).modules()))
    say(rows)
    save_figure(plot_speed(rows), quantize.__file__, "speed", args, f"{REPEATS} repeats in turn, median")
    return rows
