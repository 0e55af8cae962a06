"""Compute with integers instead of floats: what quantization does to one tensor, and what it costs.

    python m29_inference/quantize.py                       scale, zero point, error, saturation, bits, channels, sums; two figures
    python m29_inference/quantize.py -bits 4               the same with 16 levels
    python m29_inference/quantize.py -clip 0.99            a range that leaves out the rarest 1 % of the values
    python m29_inference/quantize.py -model student        a whole network, trained first: latency, size, accuracy of int8 and floats
    python m29_inference/quantize.py -model resnet18       one of torchvision's; vit_b_16 for a network of linear layers
    python m29_inference/quantize.py -model student -layers        which layer adds most to the error
    python m29_inference/quantize.py -model resnet18 -profile      which layer costs most time

A real number x is kept as a whole number q of few bits: q = clamp(round(x / scale) + zero_point), and comes back as (q - zero_point) *
scale. The scale is the distance of two neighbouring levels, the zero point the level that stands for 0 exactly. Inside the range the
error is at most scale / 2; outside the values saturate. A product of two such numbers needs only integer arithmetic, and the errors of
a sum of n products have both signs: they grow like sqrt(n), not like n. That is why a network survives it.
"""

import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import parse, positive_int, print_table, save_figure, save_results, share_above_0, thread_count
from m29_inference.student import cpu_parser
from machine import usable_cores

# ---- the arithmetic --------------------------------------------------------------------------------------------------


def levels(bits: int) -> tuple[int, int]:
    """Smallest and largest whole number of `bits` bits, two's complement: -128 and 127 for 8."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def scale_and_zero_point(low: torch.Tensor, high: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point for values from `low` to `high`, tensors of any one shape: one pair a tensor or one a channel."""
    smallest, largest = levels(bits)
    low, high = low.clamp(max=0), high.clamp(min=0)  # 0 must have a level: padding and ReLU make many of them
    scale = ((high - low) / (largest - smallest)).clamp(min=torch.finfo(torch.float32).tiny)  # a tensor of zeros has no range
    return scale, (smallest - torch.round(low / scale)).clamp(smallest, largest).to(torch.int32)


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Real numbers to whole ones, int8 of the shape of x; what is outside the range ends on its border."""
    return (torch.round(x / scale) + zero_point).clamp(*levels(bits)).to(torch.int8)


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Whole numbers back to real ones, float32."""
    return (q.to(torch.int32) - zero_point) * scale


def integer_product(q: torch.Tensor, zero_point: torch.Tensor, p: torch.Tensor, p_zero_point: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension of the products, in int32: as an int8 kernel accumulates; 33,000 products of 8 bits always fit."""
    return ((q.to(torch.int32) - zero_point) * (p.to(torch.int32) - p_zero_point)).sum(-1, dtype=torch.int32)


# ---- the exercises ---------------------------------------------------------------------------------------------------


def in_the_courses_way(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> str:
    """torch.quantize_per_tensor and .dequantize() against the arithmetic above; deprecated, so it may be gone one day."""
    if not hasattr(torch, "quantize_per_tensor"):
        return "torch.quantize_per_tensor is gone from this torch: the arithmetic above and torchao take its place"
    with warnings.catch_warnings(action="ignore"):  # says that torchao takes its place
        theirs = torch.quantize_per_tensor(x, scale.item(), zero_point.item(), torch.qint8)
        steps = (theirs.int_repr().int() - quantize(x, scale, zero_point).int()).abs()
        back = (theirs.dequantize() - dequantize(quantize(x, scale, zero_point), scale, zero_point)).abs().max().item()
    if steps.max() > 1:
        raise RuntimeError("torch.quantize_per_tensor computes something else")
    text = f"torch.quantize_per_tensor: {int((steps > 0).sum())} of {x.numel():,} values on a neighbouring level (ties)"
    return f"{text}, .dequantize() differs by at most {back / scale.item():.0f} step; it is deprecated, torchao takes its place"


def errors_by_bits(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> list[dict]:
    """A row for 8, 4 and 2 bits for values from `low` to `high`: scale, largest and root-mean-square error, signal to noise in dB, size."""
    rows = []
    for bits in (8, 4, 2):
        scale, zero_point = scale_and_zero_point(low, high, bits)
        error = dequantize(quantize(x, scale, zero_point, bits), scale, zero_point) - x
        rms = error.square().mean().sqrt()
        row = {"measured": "bits", "bits": bits, "scale": scale.item(), "largest_error": error.abs().max().item(), "rms_error": rms.item()}
        rows.append(row | {"snr_db": (20 * torch.log10(x.std() / rms)).item(), "size_mb": x.numel() * bits / 8e6})
    return rows


def errors_by_granularity(bits: int, generator: torch.Generator) -> list[dict]:
    """One scale for a convolution's weight against one for each of its output channels, where these differ in size as trained ones do."""
    weight = torch.randn(64, 32, 3, 3, generator=generator) * torch.logspace(-2, 0, 64).view(-1, 1, 1, 1)
    flat = weight.flatten(1)
    ranges = {"a tensor": (flat.min(), flat.max()), "a channel": (flat.amin(1, keepdim=True), flat.amax(1, keepdim=True))}
    rows = []
    for name, (low, high) in ranges.items():
        scale, zero_point = scale_and_zero_point(low, high, bits)
        error = dequantize(quantize(flat, scale, zero_point, bits), scale, zero_point) - flat
        relative = error.norm(dim=1) / flat.norm(dim=1)  # a value a channel
        rows.append(
            {
                "measured": "granularity",
                "one_scale_for": name,
                "median_error": relative.median().item(),
                "worst_channel_error": relative.max().item(),
            }
        )
    return rows


def errors_of_sums(bits: int, generator: torch.Generator, trials: int = 256) -> list[dict]:
    """Root-mean-square error of a sum of n products of quantized numbers, over n; sqrt(n) is what independent errors add up to."""
    rows = []
    scale, zero_point = scale_and_zero_point(torch.tensor(-5.0), torch.tensor(5.0), bits)  # one range for all n: it holds practically all
    for n in (2**k for k in range(4, 15, 2)):
        x, w = torch.randn(2, trials, n, generator=generator)
        sums = (
            integer_product(quantize(x, scale, zero_point, bits), zero_point, quantize(w, scale, zero_point, bits), zero_point) * scale**2
        )
        error = (sums.double() - (x.double() * w.double()).sum(1)).square().mean().sqrt()
        rows.append({"measured": "sum", "products": n, "rms_error": error.item(), "sqrt_products": n**0.5})
    return rows


# ---- the pictures ----------------------------------------------------------------------------------------------------


def plot_error(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> plt.Figure:
    """Left: the levels as steps over the values; right: the histogram of the error against its bound, half a scale."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    smallest, largest = dequantize(torch.tensor(levels(bits)), scale, zero_point).tolist()
    beyond = 0.15 * (largest - smallest)  # shown on either side of the range
    line = torch.linspace(smallest - beyond, largest + beyond, 2000)
    left.plot(line, line, "--", color="grey", linewidth=1, label="x")
    left.plot(line, dequantize(quantize(line, scale, zero_point, bits), scale, zero_point), color="tab:blue", label=f"x in {bits} bits")
    left.axvspan(largest, largest + beyond, color="tab:red", alpha=0.1, label="saturates")
    left.axvspan(smallest - beyond, smallest, color="tab:red", alpha=0.1)
    left.set(xlabel="x", ylabel="x quantized and back")
    left.legend()
    inside = x[(x >= smallest) & (x <= largest)]
    error = (dequantize(quantize(inside, scale, zero_point, bits), scale, zero_point) - inside) / scale
    right.hist(error.tolist(), bins=80, range=(-0.8, 0.8), color="tab:blue")
    for side in (-0.5, 0.5):
        right.axvline(side, color="tab:red", linestyle="--", label="scale / 2" if side > 0 else None)
    right.set(xlabel="error / scale, inside the range", ylabel="values")
    right.legend(loc="lower center")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def plot_sums(rows: list[dict]) -> plt.Figure:
    """Error of a sum over its number of products, with the lines that it would follow if errors averaged out, and if they did not."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    products, errors = [row["products"] for row in rows], [row["rms_error"] for row in rows]
    axes.plot(products, errors, "o-", label="measured")
    axes.plot(products, [errors[0] * (n / products[0]) ** 0.5 for n in products], "--", color="grey", label="like sqrt(n)")
    axes.plot(products, [errors[0] * n / products[0] for n in products], ":", color="tab:red", label="like n: all errors of one sign")
    axes.set(xlabel="products in the sum, n", ylabel="root-mean-square error of the sum", xscale="log", yscale="log")
    axes.legend()
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def main(args) -> list[dict]:
    generator = torch.Generator().manual_seed(args.seed)
    x = 1 + torch.randn(10_000 if args.quick else 1_000_000, generator=generator)  # not around 0, so that the zero point is not 0 either
    low, high = (x.sort().values[round(part * (len(x) - 1))] for part in ((1 - args.clip) / 2, (1 + args.clip) / 2))
    scale, zero_point = scale_and_zero_point(low, high, args.bits)
    low, high = low.clamp(max=0), high.clamp(min=0)  # as it has widened them
    q = quantize(x, scale, zero_point, args.bits)
    inside, error = (x >= low) & (x <= high), (dequantize(q, scale, zero_point) - x).abs() / scale
    print(f"{len(x):,} random numbers from {x.min():.3f} to {x.max():.3f}, first of them: {', '.join(f'{v:.4f}' for v in x[:4])}")
    print(f"scale {scale:.6f}, zero point {zero_point}; as {args.bits}-bit integers: {q[:4].tolist()}")
    back = ", ".join(f"{value:.4f}" for value in dequantize(q, scale, zero_point)[:4])
    print(f"back: {back}; error at most {error[inside].max():.2f} scale")
    if not inside.all():
        print(f"{int((~inside).sum()):,} values outside the range saturate: they are off by up to {error.max():.0f} scale")
    print(in_the_courses_way(x, scale, zero_point) if args.bits == 8 else "torch.quantize_per_tensor knows 8 bits alone: left out")
    bits, granularity, sums = (
        errors_by_bits(x, low, high),
        errors_by_granularity(args.bits, generator),
        errors_of_sums(args.bits, generator),
    )
    for rows in (bits, granularity, sums):
        print()
        print_table([{key: value for key, value in row.items() if key != "measured"} for row in rows])
    growth = sums[-1]["rms_error"] / sums[0]["rms_error"]
    ratio = sums[-1]["products"] / sums[0]["products"]
    print(f"\n{ratio:,.0f} times as many products: {growth:,.0f} times the error; sqrt would be {ratio**0.5:,.0f}, worst case {ratio:,.0f}")
    save_figure(plot_error(x, scale, zero_point, args.bits), __file__, "error", args, f"{len(x):,} normal random numbers, {args.bits} bits")
    save_figure(plot_sums(sums), __file__, "sums", args, f"256 sums a point, {args.bits} bits")
    return bits + granularity + sums


ONE_TENSOR = ("bits", "clip")
NETWORK = ("layers", "profile", "batch_sizes", "threads", "calibration", "pretrained", "data", "save", "load", "peers")
UNUSED = {"layers": ("batch_sizes", "threads", "save", "load", "peers"), "profile": ("save", "load", "peers")}


def refuse_idle_flags(parser, args) -> None:
    """End with exit code 2 where a flag was given that this run would not look at."""
    mode = next((name for name in UNUSED if getattr(args, name)), None)
    given = [name for name in (ONE_TENSOR if args.model else NETWORK) if getattr(args, name) != parser.get_default(name)]
    flags = ", ".join(f"-{name}" for name in given)
    if given and args.model:
        parser.error(f"argument {flags}: about one tensor, so it has no effect with -model")
    if given:
        parser.error(f"argument {flags}: about a whole network: give -model, too")
    if args.load and args.calibration and not args.peers:
        parser.error("argument -calibration: the scales of -load are set already, so it has no effect")
    if args.save and args.load:
        parser.error("argument -save: with -load it would only copy the file")
    if args.model not in (None, "student") and args.data:
        parser.error(f"argument -data: images for the student, so it has no effect with -model {args.model}")
    if args.model == "student" and args.pretrained:
        parser.error("argument -pretrained: torchvision has no student; it is trained here")
    if idle := [f"-{name}" for name in UNUSED.get(mode, ()) if getattr(args, name) != parser.get_default(name)]:
        parser.error(f"argument {', '.join(idle)}: has no effect with -{mode}")


if __name__ == "__main__":
    parser = cpu_parser(__doc__)
    flag = parser.add_argument
    flag("-bits", type=positive_int, choices=range(2, 9), metavar="2..8", default=8, help="bits a number (default: 8)")
    flag("-clip", type=share_above_0, default=1.0, help="share of the values that the range holds, the others saturate (default: 1.0)")
    flag("-model", help="convert a whole network: student (trained here), or a name of torchvision's")
    part = parser.add_mutually_exclusive_group().add_argument
    part("-layers", action="store_true", help="with -model: keep one layer at a time in float32")
    part("-profile", action="store_true", help="with -model: time each layer in int8, for the first of -batch_sizes and of -threads")
    flag("-batch_sizes", type=positive_int, nargs="+", help="with -model: images at a time (default: 1 32)")
    flag("-threads", type=thread_count, nargs="+", help="with -model: threads to time with (default: -num_threads, else 1 and all)")
    flag("-calibration", type=positive_int, help="with -model: images that set the scales (default: 320)")
    flag("-pretrained", action="store_true", help="with -model: download torchvision's weights; changes no latency")
    flag("-data", help="for the student: folder or hub id of CIFAR-10 (default: data/cifar10 where it was downloaded, else drawn shapes)")
    flag("-save", type=Path, help="with -model: keep the int8 network in this file")
    flag("-load", type=Path, help="with -model: take the int8 network from this file, one that you kept yourself, instead of converting")
    flag("-peers", action="store_true", help="with -model: also ONNX Runtime and OpenVINO, where they are installed")
    args = parse(parser)
    refuse_idle_flags(parser, args)
    every = [1] if args.quick else sorted({1, usable_cores()})
    args.threads = list(dict.fromkeys(args.threads or ([args.num_threads] if args.num_threads else every)))
    run = main
    if args.model:
        from m29_inference.quantize_layers import sensitivity  # which imports this file
        from m29_inference.quantize_model import compare
        from m29_inference.quantize_profile import profile

        run = sensitivity if args.layers else profile if args.profile else compare
    rows = run(args)
    save_results(__file__, args, rows)
