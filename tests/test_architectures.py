"""architectures.py: the counters against hand-computed networks and published numbers, the advice, and bad input."""

import json
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from errors import InputError
from m29_inference import architectures, architectures_report, torchvision_networks
from timing import Timing

CPU = torch.device("cpu")
SCRIPT = "m29_inference/architectures.py"


class OneHead(nn.Module):
    """Attention of one head over 16 x 16 pixels: what one counter sees and the other does not."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(3, 12, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(images.flatten(2).transpose(1, 2)).chunk(3, dim=2)
        return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])


def test_macs_of_networks_counted_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False), nn.Flatten(), nn.Linear(512, 10, bias=False)).eval()
    by_hand = 8 * 8 * (3 * 3 * 3 * 8) + 512 * 10  # output pixels x (kernel x inputs x outputs), and inputs x outputs
    assert architectures.count_macs(net, 16) == {"ptflops": by_hand / 1e9, "flop_counter": by_hand / 1e9}
    attention = 256 * 3 * 12 + 2 * 256 * 256 * 4  # projections; q k' and the weights times v
    assert architectures.count_macs(OneHead().eval(), 16)["flop_counter"] == attention / 1e9


@pytest.mark.parametrize("name", architectures.MODELS)
def test_macs_are_the_published_ones(name):
    model, weights = torchvision_networks.build(name, False, CPU)
    row = architectures.describe(name, model, weights, torchvision_networks.published_resolution(weights))
    assert abs(row["gmacs"] / row["gmacs_published"] - 1) <= 0.005 and row["note"] is None
    assert row["parameters"] == weights.meta["num_params"] and not model.training
    assert row["size_mb"] == pytest.approx(4 * row["parameters"] / 1e6, rel=0.05)


def test_a_counter_that_misses_attention_is_marked():
    model, weights = torchvision_networks.build("vit_b_16", False, CPU)
    row = architectures.describe("vit_b_16", model, weights, 224)
    assert row["note"] == "ptflops sees attention in part" and row["gmacs"] == pytest.approx(17.564, abs=0.001)
    assert row["gmacs_published"] == 17.564
    products = 12 * 2 * 197 * 197 * 768 / 1e9  # of 12 layers: q k' and the weights times v, for 197 tokens of 768 numbers
    assert row["gmacs_ptflops"] == pytest.approx(17.564 - products, abs=0.02) and torch.backends.mha.get_fastpath_enabled()


def test_why_the_counters_differ_is_said():
    model, weights = torchvision_networks.build("squeezenet1_1", False, CPU)  # without batch normalization, so its convolutions have biases
    row = architectures.describe("squeezenet1_1", model, weights, 224)
    assert row["note"] == "ptflops counts biases, too" and row["gmacs"] == row["gmacs_flop_counter"] == pytest.approx(0.349, abs=0.0005)
    macs = {"ptflops": 2 * row["gmacs_ptflops"], "flop_counter": row["gmacs_flop_counter"]}
    assert architectures.why_counters_differ(model, macs, 224) == "counters differ"  # by more than the biases: no reason is known


@pytest.mark.parametrize("name", torchvision_networks.AS_PUBLISHED)
def test_what_is_built_without_weights_is_the_network_that_was_published(name):
    with torch.device("meta"):  # without numbers
        model, weights = torchvision_networks.build(name, False, torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == weights.meta["num_params"]
    assert getattr(model, "image_size", 224) == torchvision_networks.published_resolution(weights)


def test_a_published_count_is_known_to_a_thousandth():
    model, weights = torchvision_networks.build("shufflenet_v2_x0_5", False, CPU)  # 0.0405 GMACs, published as 0.04
    assert architectures.describe("shufflenet_v2_x0_5", model, weights, 224)["note"] is None


def test_the_front_and_the_advice():
    rows = [
        {"model": name, "batch": 1, "latency_ms": ms, "accuracy_published": accuracy}
        for name, ms, accuracy in [("slow", 50.0, 0.8), ("beaten", 20.0, 0.6), ("fast", 10.0, 0.7)]
    ]
    assert [row["model"] for row in architectures_report.pareto(rows)] == ["fast", "slow"]
    said = {budget: architectures_report.advise(rows, budget) for budget in (30, 60)}
    assert "take fast" in said[30] and "slow is more accurate and needs 50.0 ms" in said[30]
    assert "take slow" in said[60] and "the most accurate of 3, and it fits" in said[60]
    assert architectures_report.advise(rows, 5).startswith("None of 3 networks needs at most 5 ms at batch 1; the fastest, fast")
    nearest = [{"model": "slower", "batch": 1, "latency_ms": 90.0, "accuracy_published": 0.9}, *rows]
    assert "slow is more accurate and needs 50.0 ms" in architectures_report.advise(nearest, 30)
    assert "nothing to weigh the latencies against" in architectures_report.advise([], 30)


def test_a_rate_is_drawn_on_its_line_at_any_batch():
    for batch in (1, 8):
        row = {"model": "net", "gmacs": 2.0, "batch": batch, "latency_ms": 20.0 * batch, "gmacs_per_s": 100.0}
        axes = architectures_report.plot_rates([row], "a matrix product", 100.0).axes[0]
        ceiling, point = axes.lines[0], axes.lines[-1]
        assert point.get_ydata()[0] == pytest.approx(point.get_xdata()[0] * ceiling.get_ydata()[0] / ceiling.get_xdata()[0])


def test_an_accuracy_is_that_of_its_resolution():
    model, weights = torchvision_networks.build("mobilenet_v3_large", False, CPU)
    rows = [architectures.describe("mobilenet_v3_large", model, weights, pixels) for pixels in (64, 224)]
    assert [row["accuracy_published"] for row in rows] == [None, pytest.approx(0.75274)]
    assert [row["gmacs_published"] for row in rows] == [None, 0.217]


def test_rates_and_shares_follow_from_the_latency(monkeypatch, capsys):
    row = {
        "model": "resnet18",
        "resolution": 64,
        "parameters": 1,
        "size_mb": 1.0,
        "gmacs": 3.0,
        "gmacs_ptflops": 3.0,
        "gmacs_flop_counter": 3.0,
    }
    row |= {"gmacs_published": 3.0, "accuracy_published": 0.7, "note": None}
    timed = {"latency_ms": 200.0, "latency_sd_ms": 1.0, "layout": "contiguous", "layout_gain": "", "runs_ms": [200.0]}
    monkeypatch.setattr(architectures, "build", lambda *_: (nn.Linear(1, 1), None))
    monkeypatch.setattr(architectures, "published_resolution", lambda weights: 64)
    monkeypatch.setattr(architectures, "fitting_batch", lambda model, name, pixels, batch, *_: batch)
    monkeypatch.setattr(architectures, "describe", lambda *_: row)
    monkeypatch.setattr(architectures, "time_in_turn", lambda inputs, device: dict.fromkeys(inputs, timed))
    monkeypatch.setattr(architectures, "ceilings", lambda device: {"a matrix product": 100.0, "a 3x3 convolution": 240.0})
    monkeypatch.setattr(architectures, "save_figure", lambda *_: None)
    args = {"models": ["resnet18"], "resolution": None, "batch_sizes": [8], "quick": False, "pretrained": False, "budget_ms": 50.0}
    [found] = architectures.main(SimpleNamespace(**args, device=CPU))
    assert (found["images_per_s"], found["gmacs_per_s"], found["of_ceiling"]) == (40.0, 120.0, 0.5)  # 8 images in 0.2 s, 3 GMACs each
    assert "None of 1 networks needs at most 50 ms at batch 8; the fastest, resnet18, takes 200.0 ms" in capsys.readouterr().out


def test_the_ceiling_is_what_a_product_of_known_size_reaches(monkeypatch):
    monkeypatch.setattr(architectures, "measure", lambda call, device: Timing([2.0, 1.0]))
    assert architectures.ceilings(CPU, n=200) == {"a matrix product": 8.0, "a 3x3 convolution": 8 * 32 * 32 * 9 * 256 * 256 / 1e6}


def test_an_untrained_vision_transformer_whose_other_layout_is_wrong_is_noticed(monkeypatch):
    with torch.no_grad():
        model, _ = torchvision_networks.build("vit_b_32", False, CPU)
        images = torch.randn(1, 3, 224, 224)
        assert model(images).abs().max() > 0
        assert set(architectures.layouts_of(model, images)) == {"contiguous", "channels_last"}
        with pytest.raises(RuntimeError, match="relative difference nan"):  # of outputs that are all 0 nothing can be seen
            architectures.layouts_of(nn.Threshold(1e9, 0.0), images)
        monkeypatch.setattr(architectures.copy, "deepcopy", lambda network: torchvision_networks.build("vit_b_32", False, CPU)[0])
        with pytest.raises(RuntimeError, match="channels_last computes something else: relative difference"):
            architectures.layouts_of(model, images)


def test_what_needs_more_memory_than_there_is_is_said_without_taking_it():
    model, _ = torchvision_networks.build("mobilenet_v3_large", False, CPU)
    with pytest.raises(InputError, match=r"mobilenet_v3_large needs about [\d,]{11,} MB an image, [\d,]+ MB are free"):
        torchvision_networks.fitting_batch(model, "mobilenet_v3_large", 1_000_000, 1, CPU)
    assert next(model.parameters()).device == CPU  # it was an outline that was sent through


def test_a_wrong_name_is_said_before_any_network_is_built(monkeypatch):
    monkeypatch.setattr(architectures, "build", lambda *_: pytest.fail("built"))
    with pytest.raises(InputError, match="torchvision has no network resnet81, did you mean"):
        architectures.measure_all(SimpleNamespace(models=["mobilenet_v3_small", "resnet81"], batch_sizes=None, quick=True))


def test_a_batch_too_large_for_the_memory_is_made_smaller(monkeypatch, capsys):
    model, _ = torchvision_networks.build("mobilenet_v3_large", False, CPU)
    each = torchvision_networks.activation_bytes(model, 32)
    monkeypatch.setattr(torchvision_networks, "available_memory", lambda: 10 * each)
    assert torchvision_networks.fitting_batch(model, "mobilenet_v3_large", 32, 4, CPU) == 4 and capsys.readouterr().out == ""
    assert torchvision_networks.fitting_batch(model, "mobilenet_v3_large", 32, 64, CPU) == 8
    assert "batch 8 instead of 64" in capsys.readouterr().out
    assert torchvision_networks.fitting_batch(model, "mobilenet_v3_large", 32, 64, CPU, reserved=5 * each) == 4
    with pytest.raises(
        InputError, match=r"mobilenet_v3_large needs about [\d,]+ MB an image, 0 MB are free beside 4 MB for copies of the weights: take"
    ):
        torchvision_networks.fitting_batch(model, "mobilenet_v3_large", 32, 64, CPU, reserved=9 * each)


def test_all_networks_are_timed_with_the_batch_that_fits_all(monkeypatch):
    reserved = []

    def fitting(model, name, pixels, batch, device, bytes_before=0):
        reserved.append(bytes_before)
        return min(batch, 3 if name == "resnet18" else 9)

    monkeypatch.setattr(architectures, "fitting_batch", fitting)
    timed = {"latency_ms": 1.0, "runs_ms": [1.0]}
    monkeypatch.setattr(architectures, "time_in_turn", lambda inputs, device: dict.fromkeys(inputs, timed))
    args = SimpleNamespace(models=["mobilenet_v3_small", "resnet18"], resolution=64, batch_sizes=[1, 8], quick=False, pretrained=False)
    args.device = CPU
    rows = architectures.measure_all(args)
    assert [(row["batch"], row["model"]) for row in rows] == [(batch, name) for batch in (1, 3) for name in args.models]
    copies = sum(row["parameters"] for row in rows[:2]) * 4  # bytes of both networks' weights, once more in the other layout
    assert reserved[:2] == [0, 0] and set(reserved[2:]) == {copies}


def test_the_estimated_memory_is_three_times_what_the_largest_layer_reads_and_writes():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
    assert torchvision_networks.activation_bytes(net.eval(), 32) == 3 * 4 * 2 * (8 * 32 * 32)  # of the ReLU


def test_weights_on_a_server_that_is_not_reached_are_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torchvision_networks, "online", lambda url: False)
    with pytest.raises(InputError, match="-pretrained: the weights of resnet18 are on a server that cannot be reached: leave the flag out"):
        torchvision_networks.build("resnet18", True, CPU)


def test_layouts_are_compared_before_they_are_timed():
    class Depends(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images * (2 if images.is_contiguous() else 1)

    with pytest.raises(RuntimeError, match="channels_last computes something else"):
        architectures.time_in_turn({"net": (Depends(), torch.rand(2, 3, 8, 8))}, CPU)


def test_networks_are_timed_in_turn_each_in_its_faster_layout(monkeypatch):
    runs = {
        ("one", "contiguous"): [4.0, 6.0],
        ("one", "channels_last"): [2.0, 2.0],
        ("two", "contiguous"): [3.0],
        ("two", "channels_last"): [6.0],
    }
    together = []

    def timings(calls, device, repeats, said):
        assert repeats == 7 and torch.is_inference_mode_enabled()
        together.append(list(calls))
        return {name: Timing(runs[name]) for name in calls}

    monkeypatch.setattr(architectures, "measure_alternately", timings)
    net, images = nn.Conv2d(3, 4, 3), torch.rand(1, 3, 8, 8)
    found = architectures.time_in_turn({"one": (net, images), "two": (net, images)}, CPU)
    assert together == [list(runs)]  # all in one measurement
    assert [(timed["layout"], timed["layout_gain"], timed["latency_ms"]) for timed in found.values()] == [
        ("channels_last", "2.50x contiguous (2.00 to 3.00, faster)", 2.0),
        ("contiguous", "2.00x channels_last (2.00 to 2.00, faster)", 3.0),
    ]


def test_of_networks_that_are_level_it_is_said():
    rows = [
        {"model": name, "batch": 1, "latency_ms": runs[1], "runs_ms": runs}
        for name, runs in {"slow": [8.0, 9.0, 9.5], "second": [2.0, 2.1, 3.0], "first": [1.9, 2.0, 3.1]}.items()
    ]
    said = architectures_report.who_is_level(rows)
    assert said == "batch 1: first is 1.05x second (0.97 to 1.05, cannot tell)\n"


def test_bad_input_is_said():
    with pytest.raises(InputError, match=r"no network \w+, did you mean resnet18"):
        torchvision_networks.build("resnet81", False, CPU)
    model, _ = torchvision_networks.build("vit_b_16", False, CPU)
    with pytest.raises(InputError, match=r"vit_b_16 does not work at -resolution 160 .*made for 224"):
        torchvision_networks.fitting_batch(model, "vit_b_16", 160, 1, CPU)
    with pytest.raises(InputError, match="-resolution 16 is too small"):
        torchvision_networks.fitting_batch(model, "vit_b_16", 16, 1, CPU)


@pytest.mark.parametrize("error", [OSError("no route to host"), EOFError(), pickle.UnpicklingError("invalid load key, '<'")])
def test_weights_that_cannot_be_fetched_are_said(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(torchvision.models, "get_model", refuse)
    monkeypatch.setattr(torchvision_networks, "online", lambda url: True)
    said, clear = re.escape(str(error) or "EOFError"), "$" if isinstance(error, OSError) else ", or clear "
    with pytest.raises(InputError, match=rf"the weights of resnet18 cannot be fetched or read .{said}.: leave the flag out{clear}"):
        torchvision_networks.build("resnet18", True, CPU)
    with pytest.raises(type(error)):  # without -pretrained nothing was fetched
        torchvision_networks.build("resnet18", False, CPU)


def test_the_run_of_a_learner(run_script, results):
    done = run_script(SCRIPT, "-quick", "-models", "mobilenet_v3_large", "resnet18", "-budget_ms", "60000")
    assert done.returncode == 0, done.stderr
    assert "GMAC/s here: a matrix product" in done.stdout and "For 60000 ms at batch 1 take" in done.stdout
    rows = json.loads((results / "architectures.json").read_text())["rows"]
    keys = {"model", "parameters", "gmacs", "gmacs_published", "batch", "latency_ms", "images_per_s", "accuracy_published"}
    keys |= {"of_ceiling", "layout_gain"}
    assert [row["model"] for row in rows] == ["mobilenet_v3_large", "resnet18"] and keys <= set(rows[0])
    assert all((results / f"architectures_{name}.png").exists() for name in ("accuracy", "rates"))


def test_without_a_published_accuracy_there_is_no_picture_of_it(monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(architectures, "save_figure", lambda figure, file, name, *_: drawn.append(name))
    args = {"models": ["mobilenet_v3_small"], "resolution": 64, "batch_sizes": [1, 1], "budget_ms": 50.0, "quick": True}
    rows = architectures.main(SimpleNamespace(**args, device=CPU, pretrained=False))
    assert drawn == ["rates"] and len(rows) == 1 and rows[0]["accuracy_published"] is None
    assert "no accuracy is published for mobilenet_v3_small: left out" in capsys.readouterr().out


def test_a_wrong_name_ends_the_run(check_refusals):
    check_refusals(SCRIPT, {("-models", "mobilenet"): (1, "error: torchvision has no network mobilenet, did you mean mobilenet_v2")})
