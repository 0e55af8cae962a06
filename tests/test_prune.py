"""prune.py and what belongs to it: zeros counted, formats read back, channels cut out without changing a number, and bad input."""

import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from cifar10 import ConvNet, Images
from errors import InputError
from m29_inference import prune as exercise
from m29_inference import prune_accuracy, prune_formats, prune_structured, training
from m29_inference.network import WhitenedNet
from m29_inference.prune import LeNet, make_permanent, prunable, remove_masks, sparsity, sparsity_by_layer
from m29_inference.prune_accuracy import prune_all
from m29_inference.prune_formats import break_even
from m29_inference.prune_structured import cut, cut_to
from m29_inference.shrink import links, rank, shrink, silence
from m29_inference.sparse_files import FORMATS, load_sparse, save_sparse
from m29_inference.student import WIDTHS, copy_of
from m29_inference.training import train
from timing import Timing

SCRIPT = "m29_inference/prune.py"
CPU = torch.device("cpu")


@pytest.fixture
def network() -> nn.Module:
    """The student with random weights and normalizations that are no identity."""
    torch.manual_seed(0)
    return unlike_identity(WhitenedNet(WIDTHS)).eval()


def unlike_identity(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.weight.data, module.bias.data):
                values.normal_()
            module.running_var.uniform_(0.5, 2)
    return network


def test_lenet_is_the_known_one():
    net = LeNet()
    assert sum(parameter.numel() for parameter in net.parameters()) == 61_706
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 1.0])
def test_sparsity_is_exact_to_the_weight(amount):
    net = LeNet()
    prune_all(net, amount)
    rows = sparsity_by_layer(net)
    assert rows[-1]["weights"] == 61_470 and rows[-1]["zeros"] == round(amount * 61_470)
    assert sum(row["zeros"] for row in rows[:-1]) == rows[-1]["zeros"]
    if amount == 0.3:  # the traps: zeros are not in the parameters, and layers lose different shares
        assert not any((parameter == 0).any() for name, parameter in net.named_parameters() if name.endswith("weight_orig"))
        assert max(row["sparsity"] for row in rows) > min(row["sparsity"] for row in rows) + 0.05


def test_a_fifth_of_each_convolution_and_two_fifths_of_each_linear_layer():
    net = LeNet()
    zeros = {row["layer"]: row["zeros"] for row in exercise.by_kind(net)}
    for name, module in prunable(net):  # by size in convolutions, at random in linear layers
        kept = module.weight_mask.bool()
        assert (module.weight_orig[~kept].abs().max() <= module.weight_orig[kept].abs().min()) == name.startswith("conv")
    assert zeros == {"conv1": 30, "conv2": 480, "fc1": 19_200, "fc2": 4_032, "fc3": 336, "all": 24_078}


@pytest.mark.parametrize("take", [exercise.all_together, prune_all])
def test_globally_the_smallest_go_wherever_they_are(take):
    net = LeNet()
    take(net, 0.3)
    weights = torch.cat([module.weight_orig.detach().abs().flatten() for _, module in prunable(net)])
    kept = torch.cat([module.weight_mask.bool().flatten() for _, module in prunable(net)])
    assert (~kept).sum() == round(0.3 * 61_470) and weights[~kept].max() <= weights[kept].min()


def test_l1_takes_the_smallest_of_the_bias(capsys):
    net = LeNet()
    net.conv1.bias.data = torch.tensor([0.5, -0.1, 0.3, -0.4, 0.2, 0.6])
    exercise.one_layer(net, 0.5)
    assert (net.conv1.bias == 0).tolist() == [False, True, True, False, True, False]
    assert "3 of 6 biases are 0" in capsys.readouterr().out


def test_the_traps_are_shown(capsys):
    exercise.traps()
    said = capsys.readouterr().out
    assert "amount=1: 1 of 840 weights" in said and "amount=1.0: 840 of 840 weights" in said
    assert "zeros in its parameters(): 0, in what fc3 computes with: 840" in said
    for call in ("copy.deepcopy of a pruned network", "global_unstructured on a network in channels_last"):
        assert f"{call}: RuntimeError, " in said


@pytest.mark.parametrize(("epochs", "parts"), [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (5, [1, 2, 2])])
def test_the_last_cut_is_always_tuned(monkeypatch, epochs, parts):
    """Fewer epochs than steps go to the last steps, so that no network is measured right after a cut."""
    trained, seeds = [], []

    def record(network, images, epochs, seed, device, lr, file):
        trained.append(epochs)
        seeds.append(seed)

    monkeypatch.setattr(prune_accuracy, "train", record)
    monkeypatch.setattr(prune_accuracy, "accuracy", lambda *_: trained.append("measured"))
    data = dict.fromkeys(("train", "test"), Images(torch.zeros(1), torch.zeros(1), (), "none"))
    prune_accuracy.iterative(ConvNet((8, 8, 8), "batch"), data, SimpleNamespace(epochs=epochs, seed=0), 0.5)
    assert trained == [*parts, "measured"] and len(set(seeds)) == len(parts)  # each part sees other images than the one before
    before = seeds.copy()
    trained.clear()
    prune_accuracy.one_shot(ConvNet((8, 8, 8), "batch"), data, SimpleNamespace(epochs=epochs, seed=0), 0.5)
    assert trained == ["measured", *parts, "measured"] and seeds == 2 * before  # what differs is when it is pruned, and nothing else


def test_a_torch_without_products_with_csr_is_said(monkeypatch):
    def refuse(x, weight):
        raise RuntimeError("Calling addmm on a sparse CPU tensor requires Linux platform\nand MKL")

    monkeypatch.setattr(nn.functional, "linear", refuse)
    with pytest.raises(InputError, match=r"as CSR is left out, .* .Calling addmm on a sparse CPU tensor requires Linux"):
        prune_formats.time_csr(torch.ones(1, 4), torch.eye(4))


def test_the_same_share_twice_takes_a_share_of_what_is_left():
    net = LeNet()
    prune_all(net, 0.5)
    prune_all(net, 0.5)
    assert sparsity_by_layer(net)[-1]["sparsity"] == pytest.approx(0.75, abs=1e-4)


def test_making_it_permanent_keeps_the_outputs_and_a_step_afterwards_loses_the_zeros(capsys):
    torch.manual_seed(0)
    net, images = LeNet(), torch.randn(64, 1, 32, 32)
    prune_all(net, 0.8)
    before = net(images)
    make_permanent(net, images, torch.arange(64) % 10)
    assert torch.equal(net(images), before) and not list(net.named_buffers())
    assert sparsity_by_layer(net)[-1]["zeros"] == round(0.8 * 61_470)
    left = float(re.search(r"one step of training now: ([\d.]+)% zeros are left", capsys.readouterr().out)[1])
    assert left < 40  # of 80: those of units that answer 0 to all images have no gradient


def test_fine_tuning_before_that_keeps_them():
    torch.manual_seed(0)
    net = ConvNet((8, 8, 8), "batch")
    prune_all(net, 0.7)
    zeros = {name: module.weight == 0 for name, module in prunable(net)}
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    before = net.head.weight_orig.detach().clone()
    train(net, Images(images, torch.arange(256) % 10, (), "noise"), 1, 0, CPU)
    assert not torch.equal(net.head.weight_orig, before)
    net(images[:2].float())  # computes each weight anew
    assert all(torch.equal(module.weight == 0, zeros[name]) for name, module in prunable(net))


def test_the_next_cut_sees_the_last_step_of_training():
    """`weight` of a masked layer is computed in a forward pass: after a step it is still the old one."""
    net = nn.Sequential(nn.Linear(4, 1, bias=False))
    net[0].weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    prune_all(net, 0.25)
    net[0].weight_orig.data = torch.tensor([[9.0, 9.0, 9.0, 0.1]])  # as a step would
    prune_all(net, 1 / 3)
    assert (net[0].weight == 0).tolist() == [[True, False, False, True]]


def test_bits_are_compared_and_not_values():
    assert not prune_formats.same_bits(torch.tensor([-0.0]), torch.tensor([0.0])) and torch.equal(torch.tensor([-0.0]), torch.tensor([0.0]))
    net = LeNet()
    prune_all(net, 0.5)
    remove_masks(net)
    assert not any(torch.signbit(layer.weight[layer.weight == 0]).any() for _, layer in prunable(net))


def test_a_layer_that_is_never_trained_is_not_pruned(network):
    prune_all(network, 0.5)
    assert "stem" not in dict(prunable(network)) and not hasattr(network.stem, "weight_mask")
    assert len(prunable(network)) == 7 and all(hasattr(layer, "weight_mask") for _, layer in prunable(network))


# ---- channels --------------------------------------------------------------------------------------------------------


def test_a_shrunk_network_computes_what_the_silenced_one_does(network):
    for share in (0.75, 0.5, 0.25):
        small, difference = cut(network, share)
        assert difference < 1e-5
        assert [link.width for link in links(small)] == [max(16, round(width * share / 16) * 16) for width in (32, 32, 64, 64, 128, 128)]
    one, _ = cut(network, 0.5, "stages.1.conv2")
    assert [link.width for link in links(one)] == [32, 32, 64, 32, 128, 128]


def test_silence_needs_the_bias_as_well(network):
    """Zeroing the filters alone leaves what the normalization adds, so that removing them changes the outputs."""
    link, images = links(network)[0], torch.randn(2, 3, 32, 32)
    kept = rank(link).topk(16).indices.sort().values
    gone = torch.tensor([channel for channel in range(32) if channel not in kept])
    with torch.no_grad():
        link.conv.weight[gone] = 0
        filters = network(images)
        silence(link, gone)
        silent = network(images)
        shrink(link, kept)
        exact, constant = (network(images) - silent).abs().max(), (filters - silent).abs().max()
    assert exact < 1e-5 and constant > 100 * exact


def test_a_network_that_computes_something_else_is_not_timed(network, monkeypatch):
    def without_bias(link, channels):
        link.norm.weight.data[channels] = 0

    monkeypatch.setattr(prune_structured, "silence", without_bias)
    with pytest.raises(RuntimeError, match="computes something else than the silenced one: the logits differ by"):
        cut(network, 0.5)


@pytest.mark.parametrize(("name", "count"), [("resnet18", 8), ("resnet50", 32)])
def test_a_residual_network_shrinks_inside_its_blocks(name, count):
    torch.manual_seed(0)
    net, images = unlike_identity(getattr(torchvision.models, name)()).eval(), torch.randn(2, 3, 64, 64)
    places = links(net)
    assert len(places) == count
    kept = {}
    with torch.no_grad():
        for link in places:
            kept[link.name] = rank(link).topk(link.width // 2).indices.sort().values
            silence(link, torch.tensor([channel for channel in range(link.width) if channel not in kept[link.name]]))
        silent = net(images)
        for link in places:
            shrink(link, kept[link.name])
        assert torch.allclose(net(images), silent, rtol=1e-4, atol=1e-5 * silent.abs().max().item())


def test_bottlenecks_are_cut_in_two_places_and_what_cannot_be_is_refused():
    assert [link.name for link in links(torchvision.models.resnet50())[:3]] == ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"]
    for other in (torchvision.models.resnext50_32x4d, LeNet, partial(ConvNet, norm="group")):
        with pytest.raises(InputError, match="only ConvNet with batch normalization, and residual networks without groups of channels"):
            links(other())


@pytest.mark.parametrize("unit", [24, 48, 64])
def test_any_unit_is_possible(network, monkeypatch, unit):
    monkeypatch.setattr(prune_structured, "UNIT", unit)
    pairs = zip(links(cut(network, 0.5)[0]), links(network), strict=True)
    assert all(link.width == before.width or link.width % unit == 0 for link, before in pairs)


def test_half_the_multiplications_are_not_exceeded(network, monkeypatch):
    from m29_inference.macs import gmacs

    assert 0.35 < gmacs(cut_to(network, 0.5)[0], 32) / gmacs(network, 32) <= 0.5
    monkeypatch.setattr(prune_structured, "UNIT", 32)
    with pytest.raises(InputError, match=r"with UNIT 32 at least 0\.61 of the multiplications are left, not 0.5: take a smaller one"):
        cut_to(network, 0.5)


def test_a_fine_tuning_that_was_killed_ends_with_the_same_bits_and_zeros(network, monkeypatch, tmp_path):
    """Of two parts, two epochs each, the second is killed after its first epoch; then all begins again."""
    noise = Images(torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8), torch.arange(256) % 10, tuple("abcdefghij"), "noise")
    data, args, keep = {"train": noise, "test": noise[:50]}, SimpleNamespace(seed=0), training.keep

    def tuned(folder) -> dict:
        monkeypatch.setattr(training, "DATA", tmp_path / folder)
        pruned = copy_of(network)
        for part in range(2):
            prune_all(pruned, 0.5)
            prune_accuracy.tune(pruned, data, args, 2, part=part)
        return pruned.state_dict()

    def kill(file, *parts):
        keep(file, *parts)
        if len(list(file.parent.glob("[!.]*.pt"))) == 2:
            raise KeyboardInterrupt

    whole = tuned("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "keep", kill)
        tuned("killed")
    again = tuned("killed")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    masks = torch.cat([value.flatten() for name, value in whole.items() if "mask" in name])
    assert (masks == 0).double().mean().item() == pytest.approx(0.75, abs=1e-3)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_gives_back_every_bit(network, kind, tmp_path):
    prune_all(network, 0.8)
    remove_masks(network)
    state = network.state_dict()
    size = save_sparse(state, tmp_path / "file", kind)
    again = load_sparse(tmp_path / "file", kind, {name: value.shape for name, value in state.items()})
    assert all(prune_formats.same_bits(again[name], value) and again[name].dtype == value.dtype for name, value in state.items())
    dense = save_sparse(state, tmp_path / "dense", "dense")
    assert size == (tmp_path / "file").stat().st_size
    other, images = WhitenedNet(WIDTHS).eval(), torch.randn(4, 3, 32, 32)
    other.load_state_dict(again)
    assert torch.equal(other(images), network(images))
    if kind == "bitmask":
        assert size <= 0.3 * dense


@pytest.mark.parametrize(("kind", "each"), [("COO", 4 + 2 * 8), ("CSR", 4 + 8)])
def test_a_nonzero_costs_its_value_and_its_indices_and_no_more(kind, each, tmp_path):
    weight = torch.zeros(256, 256)
    weight.view(-1)[::5] = 1
    file = save_sparse({"weight": weight}, tmp_path / "file", kind)
    assert 0 < file - each * len(weight.nonzero()) < 257 * 8 + 4000  # where rows begin, and torch's own notes


def test_break_even_lies_between_two_sizes():
    def rows(kind, *sizes):
        return [{"format": kind, "sparsity": sparsity, "size_mb": size} for sparsity, size in zip((0.0, 0.5, 1.0), sizes, strict=True)]

    assert break_even(rows("dense", 1, 1, 1) + rows("COO", 5, 3, 1 / 3), "COO") == pytest.approx(0.875)
    assert break_even(rows("dense", 1, 1, 1) + rows("gzip", 0.9, 0.5, 0.1), "gzip") == 0
    assert break_even(rows("dense", 1, 1, 1) + rows("COO", 5, 3, 2), "COO") is None


# ---- the runs of a learner -------------------------------------------------------------------------------------------


def run(run_the_script, results, *flags) -> tuple[str, list[dict]]:
    done = run_the_script(SCRIPT, "-quick", *flags)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout, json.loads((results / "prune.json").read_text())["rows"]


def test_the_exercises_in_order(run_script, results):
    said, rows = run(run_script, results)
    assert "a loop over named_modules() stops: " in said and "has no attribute 'weight'" in said
    assert "conv1 before\n  parameters: weight (6, 1, 5, 5), bias (6,)\n  buffers:    none" in said
    assert "weight_orig (6, 1, 5, 5)" in said and "weight_mask (6, 1, 5, 5)" in said
    lenet = said[: said.index("the trained student")]
    assert "global_unstructured on a tuple of 5 pairs (layer, 'weight'): 30% is the total" in lenet
    assert "after remove(): 30.0% zeros, as before" in lenet
    assert float(re.search(r"one step of training now: (\S+)% zeros are left", lenet)[1]) < 15  # those before units that no image wakes
    assert [row["method"] for row in rows] == ["none", "by kind", "global", "global, removed"]
    assert rows[2]["accuracy"] == rows[3]["accuracy"] and rows[2]["sparsity"] == rows[3]["sparsity"] == pytest.approx(0.3, abs=1e-4)


def test_accuracy_over_sparsity(run_in_fork, results):
    said, rows = run(run_in_fork, results, "-accuracy", "-epochs", "1")
    assert all(set(row) == {"method", "sparsity", "accuracy", "accuracy_tuned"} for row in rows)
    assert [row["method"] for row in rows] == ["unpruned", "one-shot", "iterative"]
    assert all(row["sparsity"] == pytest.approx(0.8, abs=1e-3) for row in rows[1:])
    assert "-epochs 1: fewer than 3 parts" in said
    assert "of the unpruned network after the same fine-tuning" in said and (results / "prune_accuracy.png").exists()


def blank(n: int = 4) -> dict[str, Images]:
    images = Images(torch.zeros(n, 3, 32, 32, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), ("a",), "noise")
    return {"train": images, "test": images}


def count_epochs(network, images, epochs, *_, **__) -> None:
    """In place of train(): the network remembers how many it had; it is channels_last afterwards, as after train()."""
    network.to(memory_format=torch.channels_last).tuned = getattr(network, "tuned", 0) + epochs


def test_each_accuracy_is_of_the_network_that_its_column_says(network, monkeypatch, tmp_path):
    """Here an accuracy is a tenth for each epoch of fine-tuning, and a thousandth for each hundredth of zeros."""
    monkeypatch.setattr(prune_accuracy, "student_and_data", lambda args: (network, blank()))
    monkeypatch.setattr(prune_accuracy, "train", count_epochs)

    def measured(net, data):
        return getattr(net, "tuned", 0) / 10 + sparsity_by_layer(net)[-1]["sparsity"] / 10

    monkeypatch.setattr(prune_accuracy, "accuracy", measured)
    monkeypatch.setattr("common.RESULTS", tmp_path)
    unpruned, one_shot, iterative = prune_accuracy.measure(SimpleNamespace(epochs=3, quick=True, seed=0, show=False, device=CPU))
    assert (unpruned["accuracy"], unpruned["accuracy_tuned"]) == pytest.approx((0, 0.3))
    assert (one_shot["accuracy"], one_shot["accuracy_tuned"]) == pytest.approx((0.08, 0.38), abs=1e-4)
    assert iterative["accuracy"] is None and iterative["accuracy_tuned"] == pytest.approx(0.38, abs=1e-4)


def test_points_are_lost_against_the_fine_tuned_full_network_and_both_are_timed_alike(network, monkeypatch, tmp_path, capsys):
    """A full network has 90 % right here, one with one layer cut 70 or 50, a smaller one 30; each epoch of fine-tuning gives 5 more."""

    def measured(net, data):
        cut_layers = [
            number for number, (link, whole) in enumerate(zip(links(net), links(network), strict=True)) if link.width < whole.width
        ]
        right = {0: 0.9, 1: 0.5 if cut_layers == [2] else 0.7}.get(len(cut_layers), 0.3)
        return right + 0.05 * getattr(net, "tuned", 0)

    def timed(full, small, data):
        assert all(net.stages[0].conv2.weight.is_contiguous() for net in (full, small))
        return [{"batch": batch, "latency_ms": 1.0, "of_full": 0.5} for batch in prune_structured.BATCHES]

    monkeypatch.setattr(prune_structured, "student_and_data", lambda args: (network, blank()))
    monkeypatch.setattr(prune_accuracy, "train", count_epochs)
    monkeypatch.setattr(prune_structured, "accuracy", measured)
    monkeypatch.setattr(prune_structured, "time_both", timed)
    monkeypatch.setattr("common.RESULTS", tmp_path)
    rows = prune_structured.measure(SimpleNamespace(epochs=2, quick=True, seed=0, show=False, device=CPU))
    assert [(row["accuracy"], row["accuracy_tuned"]) for row in rows[::2][:2]] == [pytest.approx((0.9, 1.0)), pytest.approx((0.3, 0.4))]
    said = capsys.readouterr().out
    assert "of the multiplications: -60.00 points, one seed" in said
    assert "half of one layer's channels, not fine-tuned: stages.1.conv1 costs most, 50.0% are left of 90.0%" in said


def few_channels() -> prune_structured.Link:
    """Filters of size 3, 1, 2 and 4, which the normalization scales by 1, 10, 1 and 0.1: they count 3, 10, 2 and 0.4."""
    conv, norm, reader = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4).eval(), nn.Conv2d(4, 2, 1)
    conv.weight.data = torch.tensor([3.0, -1.0, 2.0, 4.0]).view(4, 1, 1, 1)
    norm.weight.data = torch.tensor([1.0, -10.0, 1.0, 0.1])
    return prune_structured.Link("few", conv, norm, reader)


def test_the_channels_that_count_most_are_kept(monkeypatch):
    monkeypatch.setattr(prune_structured, "UNIT", 1)
    assert rank(few_channels()).tolist() == pytest.approx([3, 10, 2, 0.4])
    assert prune_structured.kept_channels(few_channels(), 0.5).tolist() == [0, 1]


def test_a_bias_goes_with_its_channel():
    link, x = few_channels(), torch.randn(2, 1, 3, 3)
    silence(link, torch.tensor([0, 3]))
    right = link.reader(torch.relu(link.norm(link.conv(x))))
    shrink(link, torch.tensor([1, 2]))
    torch.testing.assert_close(link.reader(torch.relu(link.norm(link.conv(x)))), right)


def test_times_of_convolutions_are_of_a_network_with_zeros_against_one_without(network, monkeypatch):
    def timed(calls, *_):
        nets = {share: call.__defaults__[0] for share, call in calls.items()}
        assert all(sparsity_by_layer(net)[-1]["sparsity"] == pytest.approx(share, abs=1e-3) for share, net in nets.items())
        return {share: Timing([2.0, 1.0, 3.0] if share else [4.0, 4.0, 6.0]) for share in calls}

    monkeypatch.setattr(prune_formats, "measure_alternately", timed)
    without, *with_zeros = prune_formats.time_convolutions(network, blank())[:4]
    assert (without["latency_ms"], without["against_dense"], without["times_as_fast"]) == (4.0, None, 1.0)
    assert [row["sparsity"] for row in with_zeros] == [0.5, 0.8, 0.95]
    assert {row["against_dense"] for row in with_zeros} == {"2.00x no zeros (2.00 to 4.00, faster)"}
    assert {row["times_as_fast"] for row in with_zeros} == {2.0}


def test_times_are_of_the_pruned_network_against_the_full_one(network, monkeypatch):
    times = {"full": Timing([4.0, 4.0, 6.0]), "small": Timing([2.0, 1.0, 3.0])}
    monkeypatch.setattr(prune_structured, "measure_alternately", lambda calls, *_, repeats: {name: times[name] for name in calls})
    images = Images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ("a",), "noise")
    [row, _] = prune_structured.time_both(network, network, {"test": images})
    assert row == {"batch": 1, "latency_ms": 2.0, "of_full": 0.5, "against_full": "2.00x full (2.00 to 4.00, faster)"}


def test_times_of_csr_are_against_dense(monkeypatch):
    times = {"dense": Timing([4.0, 4.0, 6.0]), "CSR": Timing([8.0, 16.0, 12.0])}
    zeros = []

    def timed(x, weight):
        zeros.append((weight == 0).double().mean().item())
        return times

    monkeypatch.setattr(prune_formats, "time_csr", timed)
    row, _ = prune_formats.time_linear(torch.Generator(), (0.9,))
    assert zeros == pytest.approx([0.9, 0.9], abs=0.01)
    assert (row["latency_ms"], row["times_as_fast"], row["against_dense"]) == (12.0, 0.5, "0.50x dense (0.25 to 0.50, slower)")


def test_the_sensitivity_is_that_of_one_layer_at_a_time(network, monkeypatch):
    seen = []
    monkeypatch.setattr(prune_structured, "accuracy", lambda small, data: seen.append([link.width for link in links(small)]) or 0.5)
    rows = prune_structured.sensitivity(network, {"test": None})
    whole = [link.width for link in links(network)]
    assert [row["channels"] for row in rows] == [f"{width // 2} of {width}" for width in whole]
    assert seen == [[width // 2 if place == cut_one else width for place, width in enumerate(whole)] for cut_one in range(len(whole))]


def test_a_filter_of_zeros_is_not_a_silent_channel(network, capsys):
    prune_structured.say_why_the_bias_counts(network)
    found = re.search(
        r"differ by (\S+) from those with the channels silent, by (\S+) from those with only their filters at 0", capsys.readouterr().out
    )
    assert float(found[1]) < 1e-5 and float(found[2]) > 100 * float(found[1])


def test_what_can_go_is_told_by_half_a_point_and_one_and_a_half(capsys):
    rows = [{"method": "unpruned", "sparsity": 0.0, "accuracy_tuned": 0.8}]
    tuned = {(0.5, "one-shot"): 0.796, (0.8, "iterative"): 0.786, (0.9, "one-shot"): 0.784}
    prune_accuracy.say([*rows, *({"method": method, "sparsity": share, "accuracy_tuned": its} for (share, method), its in tuned.items())])
    half, more = capsys.readouterr().out.splitlines()
    assert half.startswith("within 0.5 points") and half.endswith("50% of the weights, one-shot")
    assert more.startswith("within 1.5 points") and more.endswith("80% of the weights, iterative")


def test_formats(run_in_fork, results):
    said, rows = run(run_in_fork, results, "-formats")
    assert re.search(r"bitmask: smaller than the dense file from \d% zeros on; with 80% zeros 0\.2\d of it; read again bit for bit", said)
    assert "x no zeros (" in said and "x dense (" in said
    masked = next(row["size_mb"] for row in rows if row["format"] == "masked")
    dense = next(row["size_mb"] for row in rows if row["format"] == "dense")
    assert masked > 1.8 * dense
    assert {row["layer"] for row in rows if "layer" in row} == {"student", "linear 512x512"}
    assert all({"method", "sparsity", "format"} <= set(row) for row in rows)
    assert all((results / f"prune_{name}.png").exists() for name in ("formats", "latency"))


def test_whole_channels(run_in_fork, results):
    said, rows = run(run_in_fork, results, "-structured", "-epochs", "1")
    assert "half of stages.0.conv1's channels cut out: the logits differ by " in said
    assert re.search(r"resnet18, half of the channels inside each block cut out: 0\.5\d of the multiplications are left", said)
    cut = [row for row in rows if row["method"] == "structured"]
    assert [row["macs_left"] <= 0.5 for row in cut] == [False, False, True, True]
    assert cut[0]["sparsity"] == 0 and cut[2]["sparsity"] == 1 - cut[2]["parameters"] / cut[0]["parameters"] > 0.4
    assert cut[2]["size_mb"] / cut[0]["size_mb"] == pytest.approx(cut[2]["parameters"] / cut[0]["parameters"], abs=0.05)
    assert len([row for row in rows if row["method"] == "half of one layer"]) == 6
    assert all((results / f"prune_{name}.png").exists() for name in ("structured", "layers"))


@pytest.mark.parametrize(("module", "epochs", "rate"), [(prune_accuracy, 1, 0.05), (prune_structured, 6, 0.1)])
def test_the_fine_tuning_that_the_readme_speaks_of(monkeypatch, module, epochs, rate):
    class Begun(Exception):
        pass

    def begin(network, images, epochs, seed, device, lr, file):
        raise Begun(epochs, seed, lr)

    images = Images(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ("a",), "noise")
    monkeypatch.setattr(module, "student_and_data", lambda args: (WhitenedNet(WIDTHS), {"train": images, "test": images}))
    monkeypatch.setattr(prune_accuracy, "train", begin)
    monkeypatch.setattr(prune_structured, "cut_to", lambda network, share: (network, 0.0))
    with pytest.raises(Begun) as begun:
        module.measure(SimpleNamespace(epochs=None, quick=False, seed=4))
    assert begun.value.args == (epochs, 5, rate)


def test_bad_input_is_said(check_refusals):
    cases = {("-amount", "1.5"): (2, "a share between 0 and 1"), ("-accuracy", "-formats"): (2, "not allowed with argument")}
    cases[("-formats", "-epochs", "2")] = (2, "argument -epochs: of fine-tuning, so it has no effect without -accuracy or -structured")
    cases[("-structured", "-amount", "0.3")] = (2, "argument -amount: of the exercises step by step, so it has no effect with -accuracy")
    cases[("-device", "cuda")] = (2, "argument -device: 'cuda' is not allowed: this exercise computes on the CPU")
    check_refusals(SCRIPT, cases)


def test_a_share_of_nothing_is_zero():
    module = nn.Linear(2, 2)
    assert sparsity(module) == 0 and exercise.share("0") == 0
