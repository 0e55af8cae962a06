"""What `quantize.py -model NAME -layers` does: find the layers that int8 costs most, by keeping one at a time in float32."""

import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from cifar10 import normalize
from common import print_table, save_figure
from errors import InputError
from m29_inference import quantize
from m29_inference.int8 import import_quantizer, quantize_network
from m29_inference.quantize_cost import relative
from m29_inference.quantize_linear import with_plain_attention
from m29_inference.quantize_report import plot_layers
from m29_inference.quantize_setup import load_network, say_seven_bits

CALIBRATION, HELD_OUT = 64, 1000  # images; the graphs are not compiled here, so they are slow


def sensitivity(args) -> list[dict]:
    """A row for all layers in int8 and one for each layer kept in float32: error of the logits, answers that agree, accuracy."""
    import_quantizer()
    network, calibration, data = load_network(args)
    say_seven_bits()
    network, found = with_plain_attention(network), torch.cat(calibration)
    calibration = list(found[:CALIBRATION].split(32))
    if len(found) > CALIBRATION:
        print(f"{CALIBRATION} of the {len(found)} images to calibrate with are taken: a network is converted for each layer")
    images = normalize(data["test"].images[: 32 if args.quick else HELD_OUT]) if data else torch.randn_like(calibration[0])
    labels = data["test"].labels[: len(images)] if data else None
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with torch.inference_mode():
        logits = network(images)
    rows, untouched = [], []
    for kept in tqdm([None, *(layers[:2] if args.quick else layers)], "layers"):
        int8 = quantize_network(network, calibration, (kept,) if kept else ())
        weights = sum(value.dtype == torch.int8 for value in int8.state_dict().values())
        if kept and weights == rows[0]["int8_weights"]:  # it does not run, or only its weights are used, as in torchvision's Swin
            untouched.append(kept)
            continue
        with torch.inference_mode():
            ours = int8(images)
        row = {"measured": "layer", "model": args.model, "kept_float32": kept or "none", "error": relative(ours, logits)}
        row |= {"int8_weights": weights, "same_class": (ours.argmax(1) == logits.argmax(1)).double().mean().item()}
        rows.append(row | {"accuracy": (ours.argmax(1) == labels).double().mean().item() if data else None})
    shown = [rows[0], *sorted(rows[1:], key=lambda row: row["error"])]
    print_table([{key: value for key, value in row.items() if key not in ("measured", "model")} for row in shown])
    if untouched:
        print(f"left out, because the graph does not call them as layers, so that nothing changes: {', '.join(untouched)}")
    if not rows[1:]:
        raise InputError("none of these layers can be kept in float32: leave -quick out to try all")
    best = min(rows[1:], key=lambda row: row["error"])
    saved = 1 - best["error"] / rows[0]["error"]
    others = "of the two that were tried" if args.quick else "layer"
    print(f"kept in float32, {best['kept_float32']} takes away {saved:.0%} of the error of the logits; any other {others} less")
    save_figure(plot_layers(rows, "relative error of the logits"), quantize.__file__, "layers", args, f"{len(images)} images")
    return rows
