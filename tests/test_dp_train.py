"""dp_train.py and traffic.py: the bytes by hand, by formula and counted; one device's gradients; nothing said about DP's speed here."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cifar10 import ConvNet, Images
from m28_distributed_training import dp_train
from m28_distributed_training.dp_train import sizes, traced_step
from m28_distributed_training.traffic import ddp_bytes, dp_bytes, fsdp_bytes, traffic_table

SCRIPT = "m28_distributed_training/dp_train.py"
SMALL = ["-widths", "8", "16", "32", "-num_threads", "1"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (16, 3, 32, 32) of noise and their labels."""
    torch.manual_seed(0)
    return torch.randn(16, 3, 32, 32), torch.arange(16) % 10


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "stages", "ddp", "fsdp"),
    # 1000 bytes of parameters, 10 of buffers, a batch of 640 bytes, 80 bytes of outputs
    [
        (2, (320, 1_010, 40, 40, 1_000), 1_000, 1_500),
        (4, (480, 3_030, 60, 60, 3_000), 1_500, 2_250),
        (8, (560, 7_070, 70, 70, 7_000), 1_750, 2_625),
    ],
)
def test_the_formulas_by_hand(k, stages, ddp, fsdp):
    assert tuple(dp_bytes(k, 1_000, 10, 640, 80).values()) == stages
    inputs, _, outputs, gradients, _ = stages
    assert tuple(dp_bytes(k, 1_000, 10, 640, 80, nccl=True).values()) == (inputs, 1_010, outputs, gradients, 1_000)
    assert (ddp_bytes(k, 1_000), fsdp_bytes(k, 1_000)) == (ddp, fsdp)
    [row] = traffic_table(1_000_000, 10_000, 640_000, 80_000, devices=(k,))
    assert row["devices"] == k and row["dp_root_mb"] == pytest.approx(sum(stages) / 1e3) and row["ddp_each_mb"] == ddp / 1e3
    assert row["dp_over_ddp"] == pytest.approx(sum(stages) / (2 * ddp))  # sent and received, as through device 0


def test_ddp_never_reaches_twice_the_parameters_and_dataparallel_grows():
    assert all(ddp_bytes(k, 4_000_000) < 8_000_000 for k in range(2, 1_000))
    roots = [sum(dp_bytes(k, 1_000, 0, 0, 0).values()) for k in (2, 3, 4, 5)]
    assert roots == [2_000, 4_000, 6_000, 8_000]
    assert [sum(dp_bytes(k, 1_000, 0, 0, 0, nccl=True).values()) for k in (1, 2, 5)] == [0, 2_000, 2_000]


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("norm", ["group", "batch"])  # batch: with buffers, which are copied as well
def test_the_counted_bytes_are_the_formulas(batch, k, norm):
    network = ConvNet((8, 16, 32), norm)
    P, B, X, Y = sizes(network, batch[0])
    assert (P, X, Y) == (4 * 18_626, 16 * 3 * 32 * 32 * 4, 16 * 10 * 4)
    buffers = {"group": 0, "batch": 2 * (2 * 4 * (8 + 16 + 32)) + 6 * 8}  # mean and variance of each channel; a counter each
    assert buffers[norm] == B
    assert traced_step(network, *batch, k) == dp_bytes(k, P, B, X, Y)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_traced_gradients_are_one_devices(batch, k):
    network, (images, labels) = ConvNet((8, 16, 32), "group"), batch
    torch.nn.functional.cross_entropy(network(images), labels).backward()
    alone = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    traced_step(network, images, labels, k)
    for parameter, gradient in zip(network.parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize(("left_out", "k"), [(0, 2), (0, 128), (1, 2), (1, 128)])
def test_a_traced_step_that_leaves_an_image_out_is_noticed(monkeypatch, capsys, left_out, k):
    data = {"train": Images(torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8), torch.arange(128) % 10, (), "noise")}
    args = SimpleNamespace(widths=(8, 16, 32), device=torch.device("cpu"), devices=k, batch_size=128, seed=0)
    torch.manual_seed(0)

    def traced(network, images, labels, k):
        return traced_step(network, images[left_out:], labels[left_out:], k)

    monkeypatch.setattr(dp_train, "traced_step", traced)
    with pytest.raises(RuntimeError, match="does not compute what one device computes") if left_out else contextlib.nullcontext():
        assert dp_train.trace(args, data)[0]["devices"] == k


@no_gpu
def test_the_courses_two_lines_call_the_network_itself(batch):
    model = ConvNet((8, 16, 32), "group")
    parallel = torch.nn.DataParallel(model, device_ids=[0, 1])
    assert torch.equal(parallel(batch[0]), model(batch[0]))


# ---- as a learner runs it --------------------------------------------------------------------------------------------


@no_gpu
def test_the_bare_command_counts_bytes_and_says_nothing_about_dataparallels_speed(run_script, results):
    done = run_script(SCRIPT, "-quick")
    assert done.returncode == 0, done.stderr
    assert "nn.DataParallel calls the network directly; images/s above are one device's, not DataParallel's" in done.stdout
    assert "gradients differ from one device's by at most" in done.stdout
    rows = json.loads((results / "dp_train.json").read_text())["rows"]
    training, traced, *table = rows
    assert set(training) == {"measured", "devices", "steps", "images_per_s", "loss", "accuracy"}
    assert (training["measured"], training["devices"], training["steps"]) == ("training", 1, 8)
    assert not any("images_per_s" in row or "ratio" in row or row["measured"] == "DataParallel" for row in rows[1:])
    assert traced["devices"] == 2 and traced["bytes"]["reduce"] == 4 * 288_746
    assert [(row["measured"], row["devices"]) for row in table] == [("bytes by formula", k) for k in (2, 4, 8)]
    assert table[0]["reduce_mb"] == traced["bytes"]["reduce"] / 1e6
    assert Image.open(results / "dp_train_traffic.png").size[0] > 1000


@no_gpu
def test_what_cannot_work_is_said(check_refusals):
    cases = {
        (*SMALL, "-devices", "3"): (1, "error: -devices 3 does not divide -batch_size 128: every device takes an equal part\n"),
        (*SMALL, "-batch_size", "10002"): (1, "a batch of 10002 images is more than the 10,000 training images of the drawn sample\n"),
        (*SMALL, "-lr", "1e30", "-steps", "4"): (1, "error: the training failed, its loss is nan after 4 steps: lower its -lr, 1e+30\n"),
        (*SMALL, "-device_ids", "0", "0"): (1, "error: -device_ids 0 0: each GPU can be given once\n"),
        (*SMALL, "-device_ids", "0", "1"): (1, "error: -device_ids 0: no CUDA device is in use here\n"),
    }
    check_refusals(SCRIPT, cases)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_with_gpus_dataparallel_is_timed_against_one(run_script, results):
    done = run_script(SCRIPT, "-quick")
    assert done.returncode == 0, done.stderr
    rows = json.loads((results / "dp_train.json").read_text())["rows"]
    timed = [row for row in rows if row["measured"] == "DataParallel"]
    assert len(timed) == 3 and all(row["output_difference"] < 1e-3 and row["scatter_ms"] > 0 for row in timed)
    assert len(timed[0]["peak_mb_by_gpu"]) == torch.cuda.device_count() and (results / "dp_train_steps.png").exists()
