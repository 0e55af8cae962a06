"""quantize.py -model: int8 graphs against float, their files, compiled code, attention in plain linear layers, and bad input."""

import contextlib
import copy
import functools
import io
import json
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import PATIENCE_S
from torch import nn

from cifar10 import ConvNet, Images, normalize
from errors import InputError
from m29_inference import int8, int8_file, quantize_model, quantize_profile, quantize_report, quantize_setup, student, training
from m29_inference.macs import gmacs, gmacs_by_layer
from m29_inference.network import WhitenedNet
from m29_inference.quantize_cost import compare_accuracy, margin, relative, size_of_weights, sizes_mb
from m29_inference.quantize_layers import sensitivity
from m29_inference.quantize_linear import PlainAttention, dynamic_int8, with_plain_attention
from m29_inference.quantize_model import compiled, find_variants
from m29_inference.quantize_peers import Peer, convert_for_peers, load_peers
from m29_inference.quantize_setup import load_converted, load_network, say_what_is_missing
from machine import cpu_has
from timing import Timing

SCRIPT = "m29_inference/quantize.py"
X86 = platform.machine().lower() in ("x86_64", "amd64")  # torch has int8 kernels for these alone
needs_compiler = pytest.mark.skipif(not int8.has_compiler(), reason="there is no C++ compiler")


def batches(n: int = 2) -> list[torch.Tensor]:
    return list(torch.randn(32 * n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(32))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet((16, 16, 32), "batch").eval()


@pytest.fixture(scope="module")
def graph(network):
    return int8.quantize_network(network, batches())


def test_int8_is_close_to_float_and_a_quarter_of_its_weights(network, graph):
    images = torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(1))  # not those that set the scales, another batch size
    with torch.inference_mode():
        ours, theirs = graph(images), network(images)
    assert 0 < relative(ours, theirs) < 0.05
    weights = sum(parameter.numel() for name, parameter in network.named_parameters() if parameter.ndim > 1)
    kept = [tensor for _, tensor in [*graph.named_parameters(), *graph.named_buffers()]]
    assert sum(tensor.numel() for tensor in kept if tensor.dtype == torch.int8) == weights
    assert not any(tensor.ndim in (2, 4) for tensor in kept if tensor.dtype == torch.float32)  # no weight is kept in float as well


def test_scales_are_as_fine_as_small_activations_need():
    torch.manual_seed(0)
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        tiny[0].weight *= 1e-4  # activations of 1e-4: torchao's smallest scale, 2**-12, would round them all to 0
        tiny[0].bias *= 1e-4
        for layer in (tiny[2], tiny[4]):
            layer.bias.zero_()
    with torch.inference_mode():
        assert relative(int8.quantize_network(tiny, batches())(batches()[0]), tiny(batches()[0])) < 0.05


def test_a_mobilenet_is_off_by_a_twentieth_at_most(monkeypatch):
    monkeypatch.setattr(int8, "has_vnni", lambda: True)  # 8 bits for activations, not 7
    args = SimpleNamespace(model="mobilenet_v3_small", quick=True, calibration=32, pretrained=False, seed=0, load=None)
    network, calibration, _ = load_network(args)  # random weights: its activations become smaller from layer to layer
    images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert 0 < relative(int8.quantize_network(network, calibration)(images), network(images)) <= 0.05


def test_a_normalization_that_is_not_behind_a_convolution_stays_what_it_was():
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.Flatten(), nn.BatchNorm1d(8 * 15 * 15)).eval()
    for norm in (alone[2], alone[4]):
        for values in (norm.running_mean, norm.weight.data, norm.bias.data):
            values.normal_()
        norm.running_var.uniform_(0.5, 2)
    images = batches()[0]
    with torch.no_grad():
        exported = int8.export_network(alone, images).module()
        assert torch.allclose(int8.norms_to_products(exported)(images), alone(images), atol=1e-5)
    assert not any("batch_norm" in str(node.target) for node in exported.graph.nodes if node.op == "call_function")


def test_a_layer_that_is_kept_stays_float(network):
    whole, graph = (int8.quantize_network(network, batches(), kept) for kept in ((), ("stages.2.conv1",)))
    shapes = [[tuple(value.shape) for value in one.state_dict().values() if value.dtype == torch.int8] for one in (whole, graph)]
    kept = tuple(network.stages[2].conv1.weight.shape)
    assert shapes[0].count(kept) == 1 and sorted(shapes[0]) == sorted([*shapes[1], kept])  # this one is missing, and no other


def test_what_is_saved_comes_back_bit_for_bit(graph, tmp_path):
    file = int8_file.save_graph(graph, batches()[0], tmp_path / "net.pt2")
    with torch.inference_mode():
        assert torch.equal(int8_file.load_graph(file)[0](batches()[1][:7]), graph(batches()[1][:7]))
    assert list(tmp_path.iterdir()) == [file] and file.stat().st_size < 50_000  # no example images, no source lines, compressed text


def test_times_as_fast_as_eager_are_eagers_time_over_ones_own(network, monkeypatch, tmp_path):
    times = {"eager": Timing([8.0, 9.0, 30.0]), "channels_last": Timing([4.0, 3.0, 10.0])}
    monkeypatch.setattr(quantize_model, "measure_alternately", lambda calls, *_: times if torch.is_inference_mode_enabled() else None)
    progress = SimpleNamespace(set_postfix_str=str, update=lambda: None)
    eager, last = quantize_model.time_variants(SimpleNamespace(model="student"), network, {}, {}, batches()[0][:2], progress)
    assert (eager["x_eager"], last["x_eager"], last["latency_ms"]) == (1.0, 3.0, 4.0)  # the median of 2, 3 and 3


def test_each_number_of_threads_and_each_batch_is_timed_and_memory_is_kept_for_the_variants(network, monkeypatch):
    asked, seen = [], []

    def fits(_, name, pixels, batch, device, reserved):
        asked.append((name, pixels, batch, reserved))
        return min(batch, 3)

    def time_variants(args, network, variants, peers, images, progress):
        seen.append((torch.get_num_threads(), len(images)))
        return []

    monkeypatch.setattr(quantize_model, "fitting_batch", fits)
    monkeypatch.setattr(quantize_model, "time_variants", time_variants)
    args = SimpleNamespace(model="student", batch_sizes=[1, 5], threads=[1, 2], quick=False)
    quantize_model.time_all(args, network, dict.fromkeys("abc"), {}, batches())
    assert seen == [(1, 1), (1, 3), (2, 1), (2, 3)]
    weights = sum(4 * parameter.numel() for parameter in network.parameters())
    assert asked == [("student", 32, batch, 3 * weights) for batch in (1, 5)]


def test_a_difference_is_judged_by_how_far_two_images_are_apart(capsys):
    images = torch.arange(4.0)[:, None]
    rows = [{"variant": "eager", "relative_difference": 0.0}, {"variant": "int8", "relative_difference": 0.01}]
    say = functools.partial(quantize_model.say_yardstick, rows, nn.Identity())
    say(1 + images, random_weights=True)
    assert "two images it is 0.63" in (said := capsys.readouterr().out) and "warning" not in said  # sqrt(1 + 1 + 1 + 9) / sqrt(30)
    for random_weights in (False, True):
        say(1 + images / 50, random_weights=random_weights)
        said = capsys.readouterr().out
        assert "it is 0.034" in said and "warning: int8 is off by up to 0.01, against that no little" in said
        assert ("with random weights all images get nearly the same answer" in said) == random_weights
    say(images[:1], random_weights=True)  # one image is not two
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("content", "said"), [(None, "no such file"), (b"", "damaged"), (b"PK\3\4 and then nothing", "damaged")])
def test_a_file_that_is_none_is_refused(content, said, tmp_path):
    with pytest.raises(InputError, match=f"-load {tmp_path} is a folder: give a file"):
        int8_file.load_graph(tmp_path)
    file = tmp_path / "net.pt2"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=said):
        int8_file.load_graph(file)


def test_a_file_with_a_part_that_could_run_code_is_refused_unread(graph, tmp_path):
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return Path.touch, (ran,)

    kept = int8_file.save_graph(graph, batches()[0], tmp_path / "net.pt2")
    pickled = io.BytesIO()
    torch.save(Trap(), pickled)
    with zipfile.ZipFile(kept) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    folder = next(iter(parts)).split("/")[0]
    listed = next(name for name in parts if name.endswith("model_weights_config.json"))
    cases = {
        f"{folder}/data/sample_inputs/model.pt": pickled.getvalue(),
        listed: parts[listed].replace(b'"use_pickle": false', b'"use_pickle": true', 1),
        f"{folder}/data/weights/model.pt": pickled.getvalue(),  # torch's older way to keep weights
        f"{folder}/data/constants/opaque_obj_0": pickled.getvalue(),
        f"{folder}/data/aotinductor/model/model.so": b"machine code",
        "serialized_state_dict.pt": pickled.getvalue(),  # a file of torch's older form
    }
    for wrong, content in cases.items():
        with zipfile.ZipFile(tmp_path / "wrong.pt2", "w") as new:
            for name, its in {**parts, wrong: content}.items():
                new.writestr(name, its)
        said = f"is not a network that was kept with -save: {re.escape(wrong)} could run any code when it is read"
        with pytest.raises(InputError, match=said):
            int8_file.load_graph(tmp_path / "wrong.pt2")
    for content in (b"[]", b'{"config": []}', b'{"config": {"name": {}}}'):
        with zipfile.ZipFile(tmp_path / "wrong.pt2", "w") as new:
            for name, its in {**parts, listed: content}.items():
                new.writestr(name, its)
        with pytest.raises(InputError, match="is damaged, or not a network that was kept with -save"):
            int8_file.load_graph(tmp_path / "wrong.pt2")
    assert not ran.exists()


@needs_compiler
def test_compiled_code_runs_int8_operations_and_needs_no_torchao(graph, tmp_path):
    images = batches()[0]
    loaded, _ = int8_file.load_graph(int8_file.save_graph(graph, images, tmp_path / "graph.pt2"))
    file = int8.compile_to_file(loaded, images, tmp_path / "net.pt2")
    assert len(int8.int8_calls(file)) == 7 or not X86  # six convolutions and the linear layer
    with torch.inference_mode():
        ours = int8.load_compiled(file)(images)
        assert relative(ours, graph(images)) < 0.02
    torch.save({"images": images, "ours": ours}, tmp_path / "expected.pt")
    elsewhere = f"""
import sys, torch
sys.modules["torchao"] = None  # as if it were not installed
kept = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
torch.set_num_threads({torch.get_num_threads()})
assert torch.equal(torch._inductor.aoti_load_package({str(file)!r})(kept["images"]), kept["ours"])
"""
    subprocess.run([sys.executable, "-c", elsewhere], check=True, timeout=PATIENCE_S)


def test_a_flipped_bit_in_a_weight_is_noticed(graph, tmp_path):
    file = int8_file.save_graph(graph, batches()[0], tmp_path / "net.pt2")
    content = bytearray(file.read_bytes())
    weight = next(value for value in graph.state_dict().values() if value.dtype == torch.int8 and value.numel() > 1000)
    content[content.index(weight.numpy().tobytes()) + 99] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        int8_file.load_graph(file)


def test_what_is_compared_is_the_same_network(capsys):
    eager = torch.ones(4)
    compare = quantize_model.compare_outputs
    assert compare({"eager": eager, "compiled float32": eager * 1.0001, "int8": eager * 1.1}) == pytest.approx(
        {"eager": 0, "compiled float32": 1e-4, "int8": 0.1}, rel=0.01
    )
    assert capsys.readouterr().out == ""
    compare({"eager": eager, "int8": torch.zeros(4)})
    assert "warning: int8 is off by 100%" in capsys.readouterr().out
    for broken in (eager * 1.01, eager * torch.nan):
        with pytest.raises(RuntimeError, match="channels_last computes something else than eager float32"):
            compare({"eager": eager, "channels_last": broken})


def test_older_processors_get_sums_that_do_not_overflow(network, monkeypatch):
    monkeypatch.setattr(int8, "cpu_has", lambda feature: False)
    largest = [
        node.args[4]
        for node in int8.quantize_network(network, batches(1)).graph.nodes
        if node.target is torch.ops.quantized_decomposed.quantize_per_tensor.default
    ]
    assert largest and set(largest) == {127}  # of activations; without VNNI two products of 8 bits are added up in 16


@needs_compiler
def test_torch_compile_is_the_second_way(network, graph, tmp_path):
    variants = find_variants(network, graph, quick=False)
    assert list(variants)[-2:] == ["int8", "int8, torch.compile"]
    function, operations = compiled("int8, torch.compile", graph, batches()[0], tmp_path)
    assert operations == 7 or not X86
    with torch.inference_mode():
        assert relative(function(batches()[0]), graph(batches()[0])) < 0.02
        if cpu_has("avx512_bf16"):
            assert relative(variants["compiled bfloat16"](batches()[0]), network(batches()[0])) < 0.03


def test_float_code_and_marks_are_no_int8_operations(tmp_path):
    mark = 'record_aoti_torch_cpu__qconv_pointwise_tensor_("aoti_torch_cpu__qconv_pointwise_tensor", nullptr);'
    lines = ["aoti_torch_cpu_mkldnn__convolution_pointwise(buf0, 1L);", mark, "aoti_torch_cpu__qlinear_pointwise_tensor(buf1, nullptr);"]
    for kept, calls in ((2, []), (3, ["aoti_torch_cpu__qlinear_pointwise_tensor(buf1, nullptr);"])):
        with zipfile.ZipFile(tmp_path / "net.pt2", "w") as package:
            package.writestr("net/data/aotinductor/model/abc.wrapper.cpp", "\n".join(lines[:kept]))
        assert int8.int8_calls(tmp_path / "net.pt2") == calls


def test_attention_in_plain_layers_computes_the_same():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 9, 32)
    with torch.inference_mode():
        assert torch.allclose(PlainAttention(attention)(x, x, x)[0], attention(x, x, x, need_weights=False)[0], atol=1e-6)


def test_dynamic_int8_reaches_every_linear_layer_of_plain_attention():
    torch.manual_seed(0)
    layers = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4, batch_first=True), "mlp": nn.Linear(64, 64)})

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return self.layers["mlp"](x + self.layers["attention"](x, x, x, need_weights=False)[0])

    block, x = Block().eval(), torch.randn(2, 9, 64)
    quantized = dynamic_int8(with_plain_attention(block))
    kinds = [type(module.weight).__name__ for module in quantized.modules() if isinstance(module, nn.Linear)]
    assert len(kinds) == 3 and all(kind != "Parameter" for kind in kinds)
    with torch.inference_mode():
        assert 0 < relative(quantized(x), block(x)) < 0.05
    assert with_plain_attention(ConvNet((8, 8, 8), "batch")).__class__ is ConvNet


class Undecided(nn.Module):
    """Which operations run depends on the numbers: not one graph."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * 2 if images.sum() > 0 else images


def test_a_network_that_is_not_one_graph_is_refused():
    with pytest.raises(InputError, match="cannot be exported as one graph"):
        int8.quantize_network(Undecided(), batches())


def test_a_network_that_torchao_fails_on_is_refused(network, monkeypatch):
    def fail(*_):
        raise AssertionError("no pattern for this")

    monkeypatch.setattr("torchao.quantization.pt2e.quantize_pt2e.convert_pt2e", fail)
    with pytest.raises(InputError, match=r"torchao cannot convert ConvNet to int8 \(no pattern for this\)"):
        int8.quantize_network(network, batches(1))


def test_without_torchao_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantizer", None)
    for use in (int8.int8_recipe, lambda: int8_file.load_graph("net.pt2")):
        with pytest.raises(InputError, match="torchao is missing"):
            use()


@needs_compiler
def test_the_run_of_a_learner(run_script, run_in_fork, results, tmp_path):
    kept = tmp_path / "student.pt2"
    # the number of threads decides in which order is added up, so it makes another student
    done = run_script(SCRIPT, "-model", "student", "-quick", "-save", kept, "-num_threads", "2")
    assert done.returncode == 0, done.stderr
    assert "loaded again it computes the same bits" in done.stdout and "test images: int8" in done.stdout and "Traceback" not in done.stderr
    rows = {row["variant"]: row for row in json.loads((results / "quantize.json").read_text())["rows"]}
    assert set(rows) == {"eager", "channels_last", "int8"}
    assert rows["int8"]["int8_operations"] == 8 or not X86
    assert rows["int8"]["accuracy_margin"] > 0 and rows["int8"]["same_class"] > 0.9
    assert rows["int8"]["size_mb"] <= 0.27 * rows["eager"]["size_mb"]
    assert {"model", "variant", "batch", "threads", "latency_ms", "size_mb", "accuracy"} <= set(rows["int8"])
    assert rows["eager"]["relative_difference"] == 0 < rows["int8"]["relative_difference"] < 0.2
    assert abs(rows["int8"]["accuracy"] - rows["eager"]["accuracy"]) < 0.05
    assert rows["channels_last"]["accuracy"] == pytest.approx(rows["eager"]["accuracy"], abs=0.01)
    assert (results / "quantize_speed.png").exists()

    nowhere = run_in_fork(SCRIPT, "-model", "student", "-quick", "-load", kept, "-num_threads", "2", CXX="no-such-compiler")
    assert nowhere.returncode == 0 and "There is no C++ compiler here (no-such-compiler)" in nowhere.stdout, nowhere.stderr
    again = {row["variant"]: row for row in json.loads((results / "quantize.json").read_text())["rows"]}
    assert set(again) == {"eager", "channels_last", "int8, not compiled"} and all(row["threads"] == 2 for row in again.values())
    assert again["int8, not compiled"]["accuracy"] == pytest.approx(rows["int8"]["accuracy"], abs=0.01)
    assert again["int8, not compiled"]["relative_difference"] == pytest.approx(rows["int8"]["relative_difference"], rel=0.2)


@pytest.fixture
def another_compiler(monkeypatch):
    """Take another C++ compiler and ask anew whether it works; afterwards once more."""

    def take(command: str) -> None:
        monkeypatch.setenv("CXX", command)
        int8.why_not_compiled.cache_clear()

    yield take
    int8.why_not_compiled.cache_clear()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("no-such-compiler", "There is no C++ compiler here (no-such-compiler): int8 is the graph, not compiled"),
        (f"{sys.executable} -c raise(SystemExit(7))", "does not work here (exit code 7): int8 is the graph, not compiled"),
    ],
)
def test_without_a_compiler_that_works_the_graph_runs_under_that_name(network, graph, another_compiler, tmp_path, capsys, command, said):
    another_compiler(command)
    say_what_is_missing()
    assert said in capsys.readouterr().out
    assert find_variants(network, graph, quick=False) == {"int8, not compiled": graph}
    assert compiled("int8, not compiled", graph, batches()[0], tmp_path) == (graph, None)


def test_what_the_compiler_fails_on_is_left_out_and_int8_runs_as_a_graph(network, graph, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("CppCompileError: C++ compile error\nand pages of it")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    monkeypatch.setattr(quantize_model, "measure_alternately", lambda calls, *_: dict.fromkeys(calls, Timing([1.0])))
    args, progress = SimpleNamespace(model="student"), SimpleNamespace(set_postfix_str=str, update=lambda: None)
    variants = {"compiled float32": network, "int8": graph, "int8, torch.compile": graph}
    with torch._inductor.config.patch(freezing=False):  # which puts it back afterwards
        rows = quantize_model.time_variants(args, network, variants, {}, batches()[0], progress)
    assert [row["variant"] for row in rows] == ["eager", "channels_last", "int8, not compiled"]
    said = capsys.readouterr().out
    for name in variants:
        assert f"{name} is left out: it cannot be compiled here (CppCompileError: C++ compile error)\n" in said
    quantize_report.say(rows)  # finds the row that stands for int8
    data = {"test": Images(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), (), "made")}
    assert compare_accuracy(network, {"int8": graph}, {}, data, compile_them=True)["int8"]["same_class"] == 1
    assert "int8: answers of the graph that is not compiled, it cannot be compiled here" in capsys.readouterr().out


def test_layers_that_stay_float_are_counted(capsys):
    rows = [{"variant": name, "int8_operations": count} for name, count in {"a": 3, "b": 0, "c": 7, "d": None}.items()]
    quantize_model.say_where_floats_are_left(rows, 7)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "a: 3 int8 operations for 7 convolutions and linear layers: the others compute with floats or do not run"
    assert second.startswith("warning: b contains no int8 operation")


def test_a_vision_transformer_is_int8_all_through():
    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(32, 16, 1, 2, 32, 64, num_classes=10).eval()
    nn.init.trunc_normal_(network.heads.head.weight, std=0.02)
    graph = int8.quantize_network(with_plain_attention(network), batches(1))
    weights = [value for value in graph.state_dict().values() if value.dtype == torch.int8]
    assert len(weights) == 6  # the patches, queries with keys and values, out of the attention, two of the block, the head
    with torch.inference_mode():
        assert 0 < relative(graph(batches()[0]), network(batches()[0])) < 0.05


def test_each_setting_is_compiled_for_its_own_batch_size(network, monkeypatch):
    """After batch 1 torch.compile would take batch 32 for a sign that any size may come, and write slower code."""
    sizes, compile_it = [], torch.compile

    def record(graph, inputs):
        assert not any(isinstance(x, torch.SymInt) for x in inputs)
        sizes.extend(len(x) for x in inputs if x.shape[1:] == (3, 32, 32))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda variant, **options: compile_it(variant, backend=record, **options))
    monkeypatch.setattr(quantize_model, "measure_alternately", lambda calls, *_: dict.fromkeys(calls, Timing([1.0])))
    args, progress = SimpleNamespace(model="student"), SimpleNamespace(set_postfix_str=str, update=lambda: None)
    with torch._inductor.config.patch(freezing=False):  # which puts it back afterwards
        for batch in (1, 32, 2):
            images = torch.randn(batch, 3, 32, 32)
            rows = quantize_model.time_variants(args, network, {"float, torch.compile": network}, {}, images, progress)
            assert [row["batch"] for row in rows] == [batch] * 3
    assert sizes == [1, 32, 2]


def test_a_peer_that_is_not_installed_is_left_out_by_its_name(network, monkeypatch, tmp_path, capsys):
    for module in ("onnxruntime", "nncf"):
        monkeypatch.setitem(sys.modules, module, None)
    assert convert_for_peers(network, batches(), tmp_path) == {}
    said = capsys.readouterr().out
    assert "int8, ONNX Runtime is left out: onnxruntime is not installed (requirements-peers.txt)" in said
    assert "int8, OpenVINO is left out: nncf is not installed (requirements-peers.txt)" in said


def test_a_peer_that_fails_is_left_out_with_its_reason(network, monkeypatch, tmp_path, capsys):
    def convert(*_):
        raise RuntimeError("unsupported operation\nand a trace")

    def load(shape, threads):
        raise ValueError("no kernel for this batch")

    monkeypatch.setattr("m29_inference.quantize_peers.onnx_runtime", convert)
    monkeypatch.setattr("m29_inference.quantize_peers.openvino", lambda *_: Peer(load, 1.0))
    found = convert_for_peers(network, batches(), tmp_path)
    assert list(found) == ["int8, OpenVINO"] and load_peers(found, batches()[0]) == {}
    said = capsys.readouterr().out
    assert "int8, ONNX Runtime is left out: it cannot convert this network (unsupported operation)" in said
    assert "int8, OpenVINO is left out at batch 32: it fails (no kernel for this batch)" in said


def test_every_row_has_the_size_of_what_would_be_saved(network, graph):
    linear = dynamic_int8(nn.Sequential(nn.Linear(256, 256)))
    sizes = sizes_mb(network, {"int8": graph, "int8, torch.compile": graph, "int8, dynamic": linear}, batches()[0], None)
    assert sizes["int8"] == sizes["int8, torch.compile"] < sizes["compiled bfloat16"] * 2 < sizes["eager"] * 1.2
    assert 0.065 < sizes["int8, dynamic"] == size_of_weights(linear) < 0.08  # a byte a weight


def test_no_image_that_differs_is_no_proof_of_none():
    assert margin(torch.zeros(100)) == 0.03  # the rule of three
    assert margin(torch.tensor([1.0, -1.0] + 98 * [0.0])) == pytest.approx(1.96 * (2 / 99) ** 0.5 / 10)


def test_a_layer_that_the_graph_does_not_know_is_left_out(monkeypatch, tmp_path, capsys):
    """torchvision's Swin takes the weights of `attn.qkv` without calling it: it is int8 whatever is said of it."""
    torch.manual_seed(0)
    swin = torchvision.models.SwinTransformer([4, 4], 16, [2], [2], [2, 2], num_classes=10, stochastic_depth_prob=0.0).eval()
    monkeypatch.setattr("m29_inference.quantize_layers.load_network", lambda args: (swin, [torch.randn(32, 3, 32, 32)], None))
    monkeypatch.setattr("common.RESULTS", tmp_path)
    args = SimpleNamespace(model="swin", quick=True, show=False, device=torch.device("cpu"))
    rows = sensitivity(args)
    assert [row["kept_float32"] for row in rows] == ["none", "features.0.0"]
    said = "left out, because the graph does not call them as layers, so that nothing changes: features.1.0.attn.qkv"
    assert said in capsys.readouterr().out


def test_answers_are_compared_image_by_image_with_one_layer_kept(network, monkeypatch, tmp_path):
    """The labels of the first images are the network's own answers, so that accuracy and agreement are the same number."""
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = network(normalize(images)).argmax(1)
    labels[32:] = (labels[32:] + 1) % 10  # of images that -quick does not look at
    data = {"test": Images(images, labels, tuple("abcdefghij"), "made")}
    monkeypatch.setattr("m29_inference.quantize_layers.load_network", lambda args: (network, [batches()[0]], data))
    monkeypatch.setattr("common.RESULTS", tmp_path)
    rows = sensitivity(SimpleNamespace(model="student", quick=True, show=False, device=torch.device("cpu")))
    assert all(row["accuracy"] == row["same_class"] > 0.5 for row in rows)


def test_layers_none_of_which_can_be_kept_are_said(network, graph, monkeypatch):
    monkeypatch.setattr("m29_inference.quantize_layers.load_network", lambda args: (network, batches(), None))
    monkeypatch.setattr("m29_inference.quantize_layers.quantize_network", lambda *_: graph)
    with pytest.raises(InputError, match="none of these layers can be kept in float32"):
        sensitivity(SimpleNamespace(model="student", quick=True, show=False, device=torch.device("cpu")))


@needs_compiler
def test_int8_of_linear_layers_is_counted_in_the_compiled_code(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    function, operations = compiled("int8, dynamic", dynamic_int8(network), batches()[0], tmp_path)
    assert operations == 2
    with torch.inference_mode():
        assert relative(function(batches()[0]), network(batches()[0])) < 0.05


def test_code_that_cannot_be_loaded_is_a_sentence(monkeypatch, tmp_path):
    def fail(file):
        raise RuntimeError("failed to map segment from shared object\nand more")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", fail)
    with pytest.raises(InputError, match=r"compiled code cannot be loaded here \(failed to map segment from shared object\)"):
        int8.load_compiled(tmp_path / "net.pt2")


def test_layers_are_kept_in_float_one_at_a_time(run_in_fork, results):
    done = run_in_fork(SCRIPT, "-model", "student", "-quick", "-layers")
    assert done.returncode == 0, done.stderr
    rows = json.loads((results / "quantize.json").read_text())["rows"]
    assert [row["kept_float32"] for row in rows] == ["none", "stages.0.conv1", "stages.0.conv2"]
    left = min(rows[1:], key=lambda row: row["error"])
    share = 1 - left["error"] / rows[0]["error"]
    assert f"kept in float32, {left['kept_float32']} takes away {share:.0%} of the error of the logits" in done.stdout
    assert (results / "quantize_layers.png").exists()


@needs_compiler
@pytest.mark.skipif(not X86 or sys.platform == "darwin", reason="int8 operations are for x86, marks not for macOS")
def test_the_profile_names_every_layer(run_in_fork, results):
    done = run_in_fork(SCRIPT, "-model", "student", "-quick", "-profile", "-batch_sizes", "8")
    assert done.returncode == 0 and "gpuGetDeviceCount" not in done.stderr, done.stderr
    rows = json.loads((results / "quantize.json").read_text())["rows"]
    layers = [row for row in rows if row["gmacs"]]
    convolutions = [f"stages.{stage}.conv{number}" for stage in range(3) for number in (1, 2)]
    assert [row["layer"] for row in layers] == ["stem", *convolutions, "head"]  # the stem is defined last and runs first
    assert sum(row["gmacs"] for row in layers) == pytest.approx(8 * gmacs(WhitenedNet(student.WIDTHS), 32))
    assert all(row["gmacs_per_s"] == pytest.approx(row["gmacs"] / row["latency_ms"] * 1e3) for row in layers)
    assert rows[-1]["layer"] == "between the calls" and len(rows) > len(layers) + 1
    assert "of the time is spent in int8 layers" in done.stdout and (results / "quantize_profile.png").exists()


def test_what_lies_between_the_calls_is_the_whole_less_the_calls(network, monkeypatch):
    runs = [[("aoti_torch_cpu__qconv_1", 2.0), ("graph_0_pool", 1.0)], [("aoti_torch_cpu__qconv_1", 4.0), ("graph_0_pool", 1.0)]]
    monkeypatch.setattr(quantize_profile, "measure", lambda *_: ([5.5, 6.5], runs, ["qconv(temporary_reference(conv_weight_bias.get()))"]))
    monkeypatch.setattr(quantize_profile, "gmacs_by_layer", lambda *_: {"conv": 6.0})
    conv, pool, between = quantize_profile.profile_rows(network, network, batches()[0], 2)
    assert (conv["layer"], conv["latency_ms"], conv["gmacs_per_s"], conv["share"]) == ("conv", 3.0, 2000.0, 0.5)
    assert (pool["layer"], pool["latency_ms"], between["layer"], between["latency_ms"]) == ("pool", 1.0, "between the calls", 2.0)
    assert between["runs_ms"] == [2.5, 1.5]


def test_what_the_profile_says_follows_from_its_rows(capsys):
    """Of 10 ms two layers take 4 each; the slower one computes at half the rate of the other, which would save 2 of its 4."""
    fast, slow = (
        {"layer": name, "share": 0.4, "gmacs": rate * 0.004, "gmacs_per_s": rate} for name, rate in (("fast", 200), ("slow", 100))
    )
    rest = {"layer": "between the calls", "share": 0.2, "gmacs": None, "gmacs_per_s": None}
    quantize_profile.say([fast, slow, rest | {"runs_ms": [1.0, 2.0, 4.0]}])
    said = capsys.readouterr().out
    assert "between the calls 2.000 ms (in 3 rounds 1.000 to 4.000)" in said
    assert "80.0% of the time is spent in int8 layers: if all the rest took none, it would be 1.25 times as fast" in said
    assert "the best layer is fast, 200 GMAC/s; with its rate everywhere 20% of the time would be saved, 20% in slow (100)" in said
    quantize_profile.say([fast, slow, rest | {"runs_ms": [-1.0, 2.0, 4.0]}])
    assert "-1.000 to 4.000: noise, no telling it from none" in capsys.readouterr().out


def test_layers_are_told_by_their_bias_or_by_their_place():
    stem, head = "qconv(buf0, nullptr)", "qlinear(buf1, nullptr, 1.0)"
    conv, other = (f"qconv(buf2, &temporary_reference({name}_weight_bias.get()))" for name in ("a_conv", "a_down"))
    told = quantize_profile.layers_of_calls
    assert told([stem, conv, head], ["stem", "a.conv", "head"]) == ["stem", "a.conv", "head"]
    assert told([other, conv], ["a.conv", "a.down"]) == ["a.down", "a.conv"]  # branches may run in another order than the network's
    for calls, layers in [([stem, head], 2), ([conv, stem], 2), ([conv, conv], 2), ([conv], 2), ([stem, conv, head], 2)]:
        with pytest.raises(InputError, match=f"which layer \\({len(calls)} of {layers}\\)"):
            told(calls, ["stem", "a.conv"])


@pytest.fixture
def profiler_sees(monkeypatch):
    """A function that lets torch.profiler see these calls, of 1, 2, 3 ... ms."""

    def see(calls):
        times = (SimpleNamespace(start=start) for start in range(len(calls)))
        events = [
            SimpleNamespace(name=name, cpu_parent=None, cpu_time_total=1000.0 * (time.start + 1), time_range=time)
            for name, time in zip(calls, times, strict=True)
        ]
        profile = SimpleNamespace(events=lambda: events[::-1])
        monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(profile))

    return see


@pytest.mark.parametrize("calls", [[], ["a", "b", "a"], ["a", "b", "b", "a"]])
def test_a_profile_whose_runs_differ_is_refused(calls, profiler_sees):
    profiler_sees(calls)
    with pytest.raises(InputError, match="did not see the same marked calls in every run"):
        quantize_profile.marked_run(lambda images: None, torch.zeros(1))


def test_a_whole_run_is_timed_in_milliseconds_after_a_warm_up(monkeypatch):
    seconds, called = [10.0], []

    def run(images):
        called.append(images)
        seconds[0] += 2.0 if len(called) == 1 else 0.25

    monkeypatch.setattr(quantize_profile, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    assert quantize_profile.whole_run(run, torch.zeros(1)) == 250 and len(called) == 2


def test_of_two_marked_runs_the_second_counts_in_milliseconds(profiler_sees):
    profiler_sees(["a", "b", "a", "b"])
    assert quantize_profile.marked_run(lambda images: None, torch.zeros(1)) == [("a", 3.0), ("b", 4.0)]


def test_a_layer_that_does_not_run_is_not_counted():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used, self.first = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(self.first(x))

    assert list(gmacs_by_layer(Idle(), torch.zeros(5, 4)).items()) == [("first", 80 / 1e9), ("used", 40 / 1e9)]


def test_bad_input_is_said(check_refusals, tmp_path):
    damaged = tmp_path / "damaged.pt2"
    damaged.write_bytes(b"no zip")
    cases = {
        ("-model", "resnet81"): (1, "did you mean resnet18"),
        ("-model", "studnet"): (1, "did you mean student or "),
        ("-model", "student", "-data", "nowhere"): (1, "-data nowhere"),
        ("-model", "mobilenet_v3_small", "-quick", "-load", "nowhere.pt2"): (1, "nowhere.pt2: no such file"),
        ("-model", "mobilenet_v3_small", "-quick", "-load", str(damaged)): (1, "damaged.pt2 is damaged, or not a network"),
        ("-model", "mobilenet_v3_small", "-quick", "-save", str(tmp_path)): (1, "is a folder: give a file"),
        ("-model", "student", "-load", "a.pt2", "-save", "b.pt2"): (2, "argument -save: with -load it would only copy the file"),
        ("-layers",): (2, "give -model, too"),
        ("-model", "student", "-layers", "-profile"): (2, "argument -profile: not allowed with argument -layers"),
        ("-model", "student", "-profile", "-save", "net.pt2"): (2, "argument -save: has no effect with -profile"),
        ("-model", "student", "-layers", "-threads", "7"): (2, "argument -threads: has no effect with -layers"),
        ("-model", "student", "-load", "x", "-calibration", "9"): (2, "argument -calibration: the scales of -load are set already"),
        ("-peers", "-batch_sizes", "1"): (2, "argument -batch_sizes, -peers: about a whole network: give -model, too"),
        ("-model", "resnet18", "-data", "nowhere"): (2, "argument -data: images for the student, so it has no effect with -model resnet18"),
        ("-model", "student", "-pretrained"): (2, "argument -pretrained: torchvision has no student"),
        ("-model", "student", "-bits", "4"): (2, "argument -bits: about one tensor, so it has no effect with -model"),
        ("-device", "cuda"): (2, "argument -device: 'cuda' is not allowed: this exercise computes on the CPU"),
    }
    check_refusals(SCRIPT, cases)
    assert not Path("nowhere.pt2").exists()


def row(variant: str, *runs_ms: float) -> dict:
    return {"variant": variant, "batch": 1, "threads": 1, "latency_ms": sorted(runs_ms)[len(runs_ms) // 2], "runs_ms": list(runs_ms)}


def test_the_verdict_follows_from_the_rounds(capsys):
    ours = row("int8", 2, 2, 2)
    assert quantize_report.against(ours, row("eager", 4, 6, 8)) == "3.00x eager (2.00 to 4.00, faster)"
    assert "cannot tell" in quantize_report.against(ours, row("compiled bfloat16", 1, 3, 3))
    quantize_report.say([row("eager", 8, 8, 8), row("compiled bfloat16", 1, 1, 1), ours, row("int8, OpenVINO", 1, 1, 1)])
    said = capsys.readouterr().out
    assert (
        "int8 is\n" in said
        and "0.50x int8, OpenVINO" in said
        and "int8 does not pay here: 0.50x compiled bfloat16 (0.50 to 0.50, slower)" in said
    )


@pytest.mark.parametrize("capable", [True, False])
def test_what_the_processor_lacks_is_said_and_left_out(network, graph, monkeypatch, capsys, capable):
    for module in (int8, training):
        monkeypatch.setattr(module, "cpu_has", lambda feature: capable)
    for module in (quantize_model, quantize_setup):
        monkeypatch.setattr(module, "has_compiler", lambda: True)
    say_what_is_missing()
    printed = capsys.readouterr().out
    assert ("activations are kept in 7, so that no sum overflows" in printed) is not capable
    assert ("compiled bfloat16 is left out: this processor has no instructions for it" in printed) is not capable
    assert ("compiled bfloat16" in find_variants(network, graph, quick=False)) is capable
    found = find_variants(
        torchvision.models.VisionTransformer(32, 16, 1, 2, 32, 64), graph, quick=False
    )  # int8, dynamic: the same two ways
    assert [name for name in found if "bfloat16" in name] == capable * ["compiled bfloat16", "compiled bfloat16, plain attention"]
    assert list(found)[-2:] == ["int8, dynamic", "int8, dynamic, plain attention"]


@pytest.mark.parametrize(("images", "said"), [(8, "few images to calibrate with (8)"), (64, "")])
def test_too_few_images_to_calibrate_with_are_warned_about(images, said, capsys):
    args = SimpleNamespace(model="mobilenet_v3_small", quick=False, calibration=images, pretrained=False, seed=0, load=None)
    network, calibration, data = load_network(args)
    assert sum(map(len, calibration)) == images and data is None and not network.training
    printed = capsys.readouterr().out
    assert said in printed and "mobilenet_v3_small is calibrated with random numbers" in printed


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.randn(1, 3, 8, 8).repeat(32, 1, 1, 1), ["all images to calibrate with are the same"]),
        (torch.randn(32, 3, 1, 1).repeat(1, 1, 8, 8), ["each image to calibrate with has one colour all over"]),
        (torch.randn(1, 3, 8, 8), ["few images to calibrate with (1)"]),
        (torch.randn(32, 3, 8, 8), []),
    ],
)
def test_images_that_set_no_good_scales_are_warned_about(capsys, images, said):
    quantize_setup.warn_about(images)
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == len(said) and all(part in line for part, line in zip(said, warnings, strict=True))


def test_more_images_to_calibrate_with_than_memory_are_refused(monkeypatch):
    monkeypatch.setattr(quantize_setup, "available_memory", lambda: 100 * 2 * 4 * 3 * 224**2)
    args = SimpleNamespace(model="mobilenet_v3_small", quick=False, calibration=101, pretrained=False, seed=0, load=None)
    with pytest.raises(InputError, match="-calibration 101: there is memory for 100 images of 224 pixels"):
        load_network(args)


def test_a_single_image_to_calibrate_with_makes_a_graph_for_any_batch(network):
    images = batches()[0]
    graph = int8.quantize_network(network, [images[:1]])
    with torch.inference_mode():
        assert torch.equal(graph(images)[3:5], graph(images[3:5]))
        assert graph(torch.zeros(5000, 3, 32, 32)).shape == (5000, 10)


def test_a_graph_whose_sums_would_overflow_here_is_refused(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(int8, "has_vnni", lambda: True)
    file = int8_file.save_graph(graph, batches()[0], tmp_path / "net.pt2")
    monkeypatch.setattr(int8, "has_vnni", lambda: False)
    with pytest.raises(InputError, match="has activations of 8 bits, for processors with VNNI: here their sums would overflow"):
        int8_file.load_graph(file)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")  # where there is no such sum
    int8_file.load_graph(file)
    assert int8.activation_bits() == 8


def test_an_untrained_vision_transformer_does_not_say_zero():
    args = SimpleNamespace(model="vit_b_32", quick=True, calibration=32, pretrained=False, seed=0, load=None)
    network, calibration, _ = load_network(args)
    with torch.inference_mode():
        assert network(calibration[0][:1]).abs().max() > 0


def test_training_is_done_once_and_a_damaged_file_is_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "DATA", tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = Images(torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(256) % 10, (), "noise")
    first, _ = student.trained_student({"train": images, "test": images}, 1, 0, torch.device("cpu"), (8, 8, 8))
    assert "1 epochs were trained before" not in capsys.readouterr().out
    again, _ = student.trained_student({"train": images, "test": images}, 1, 0, torch.device("cpu"), (8, 8, 8))
    assert "1 epochs were trained before" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    [file] = (tmp_path / "students").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    anew, _ = student.trained_student({"train": images, "test": images}, 1, 0, torch.device("cpu"), (8, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), anew.parameters(), strict=True))


def test_the_int8_of_this_very_network_is_taken_and_no_other(network, graph, tmp_path):
    args = SimpleNamespace(
        load=int8_file.save_graph(graph, batches()[0], tmp_path / "net.pt2", training.fingerprint(network)), model="student"
    )
    with torch.inference_mode():
        assert torch.equal(load_converted(args, network)(batches()[1]), graph(batches()[1]))
    other = copy.deepcopy(network)
    other.head.bias.data[0] += 1e-6  # as after one more step
    with pytest.raises(InputError, match="was made of another network or training than this student"):
        load_converted(args, other)
    int8_file.save_graph(graph, batches()[0], args.load)  # it does not say of which
    with pytest.raises(InputError, match="was made of another network or training than this student"):
        load_converted(args, network)


def test_the_difference_in_accuracy_is_paired_and_has_its_interval(capsys):
    """Of 400 images of class 0 the second network loses 4 that the first has and gains 2 that it had not; 20 both have wrong."""
    images = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(400) // 2  # tells the images apart: 200 kinds of two
    both = dict.fromkeys(range(3, 13), 1)
    kinds = {"first": {0: 1, **both}, "second": {1: 1, 2: 1, **both, 3: 2, 4: 2}}  # their wrong answers; four of them differ
    batches_seen = set()

    def network(wrong):
        answers = torch.tensor([wrong.get(kind, 0) for kind in range(200)])

        def classify(batch):
            batches_seen.add(len(batch))
            kind = torch.round((batch[:, 0, 0, 0] * 0.2470 + 0.4914) * 255).long()
            return nn.functional.one_hot(answers[kind], 3).float()

        return classify

    data = {"test": Images(images, torch.zeros(400, dtype=torch.int64), ("a", "b", "c"), "made")}
    peers = {"a peer": Peer(lambda shape, threads: network(kinds["second"]), 1.0)}
    found = compare_accuracy(network(kinds["first"]), {"int8": network(kinds["second"])}, peers, data, compile_them=False)
    assert [found[name]["accuracy"] for name in ("eager", "int8")] == pytest.approx([378 / 400, 376 / 400])
    assert found["int8"]["accuracy_margin"] == pytest.approx(0.0120, abs=5e-5) and found["int8"]["same_class"] == pytest.approx(390 / 400)
    assert batches_seen == {200}  # the largest up to 250 that divides 400: compiled code takes one size
    assert found["a peer"] == found["int8"]
    # differences: -1 four times, +1 twice, else 0: mean -0.5 points, sd 0.1224, so 1.96 * sd / 20 = 1.20 points
    assert "int8 -0.50 points (95 % interval +- 1.20), the same class as float32 for 97.50%" in capsys.readouterr().out
