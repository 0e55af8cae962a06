"""fsdp_train.py: DDP's bits from half of DDP's memory, and the same after kill -9."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import stress_ddp
import torch
import torch.distributed as dist
from conftest import PATIENCE_S, ROOT, end
from stress_ddp import EVERY, FLAGS, STEPS, parameters_of

from cifar10 import ConvNet, load_cifar10
from common import parse
from errors import InputError
from m28_distributed_training import checkpoint, ddp_train, fsdp_train, group, training_flags

SCRIPT = "m28_distributed_training/fsdp_train.py"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> SimpleNamespace:
    """What two processes say and save when nobody disturbs them; 40 steps are the script's own number."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, str(ROOT / SCRIPT), *FLAGS[2:]]
    done = subprocess.run(command, env={**os.environ, "COURSE_RESULTS": str(folder)}, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(said=done.stdout, rows=json.loads((folder / "fsdp_train.json").read_text())["rows"])


def test_sharded_training_ends_with_ddps_bits(undisturbed):
    assert "parameters of both after the last step: the same bits" in undisturbed.said
    ddp, sharded = undisturbed.rows
    assert (ddp["variant"], sharded["variant"]) == ("DDP", "sharded")
    for key in ("parameters_sha256", "accuracy", "loss", "processes"):
        assert ddp[key] == sharded[key]
    assert parameters_of(undisturbed.said) == ddp["parameters_sha256"]


def test_a_process_holds_two_fifths_of_what_ddps_does_and_a_ring_would_send_one_and_a_half_times_as_much(undisturbed):
    ddp, sharded = undisturbed.rows
    P, head = 4 * 18_626 / 1e6, 4 * (32 * 10 + 10) / 1e6
    assert ddp["parameters_mb"] == ddp["gradients_mb"] == P and sharded["parameters_mb"] == sharded["gradients_mb"] == P / 2
    assert ddp["optimizer_mb"] == pytest.approx(2 * P, rel=0.001)  # beside the two moments one step counter a parameter
    assert (ddp["buckets_mb"], sharded["buckets_mb"]) == (P, 0)
    assert sharded["held_mb"] == pytest.approx(0.4 * ddp["held_mb"], rel=0.001)
    assert (ddp["ring_mb"], ddp["formula_mb"], sharded["formula_mb"]) == (P, P, 1.5 * P)
    assert sharded["ring_mb"] == pytest.approx(1.5 * P - head / 2)  # the head is gathered once, not twice


@pytest.mark.skipif(sys.platform == "win32", reason="nobody counts what goes over the loopback interface there")
def test_what_really_went_by_is_the_formulas_for_ddp_and_twice_that_sharded(undisturbed, run_in_fork, tmp_path):
    """Gloo's reduce-scatter sends as much as an all-reduce. Other programs' bytes are counted as well: the least of three runs counts."""
    runs = [undisturbed.rows]
    for _ in range(2):
        assert run_in_fork(SCRIPT, *FLAGS[2:], COURSE_RESULTS=str(tmp_path)).returncode == 0
        runs.append(json.loads((tmp_path / "fsdp_train.json").read_text())["rows"])
    ddp, sharded = (min(rows[place]["wire_mb"] for rows in runs) for place in (0, 1))
    assert 1 < ddp / undisturbed.rows[0]["formula_mb"] < 1.3
    assert 1.8 < sharded / ddp < 2.2


def test_accumulating_in_bfloat16_gathers_for_every_micro_batch_and_ends_with_ddps_bits(run_in_fork, tmp_path):
    done = run_in_fork(SCRIPT, *FLAGS[2:], "-steps", 4, "-batch_size", 32, "-accumulate", 2, "-bf16", COURSE_RESULTS=str(tmp_path))
    assert done.returncode == 0 and "parameters of both after the last step: the same bits" in done.stdout, done.stderr
    ddp, sharded = json.loads((tmp_path / "fsdp_train.json").read_text())["rows"]
    P, head = 4 * 18_626 / 1e6, 4 * (32 * 10 + 10) / 1e6
    assert (ddp["ring_mb"], sharded["formula_mb"]) == (P, 2.5 * P)  # two micro-batches gather twice each, and one reduce-scatter
    assert sharded["ring_mb"] == pytest.approx(2.5 * P - 2 * head / 2)


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_stopped_while_it_compares_it_saves_no_half_of_it(start_in_fork, tmp_path):
    process = start_in_fork(SCRIPT, *FLAGS[2:], "-steps", 150, COURSE_RESULTS=str(tmp_path))
    while "DDP:" not in process.output()[1] and process.is_alive():
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said, _ = end(process)
    assert process.exitcode == 1 and "SIGTERM: stopped after step" in said and "parameters sha256" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_kill_9_changes_no_bit(undisturbed, forked_run):
    lost, when = stress_ddp.trial("fsdp_train.py", "nproc", False, parameters_of(undisturbed.said), random.Random(1), forked_run)
    assert lost <= EVERY and when == "between"  # Random(1) says step 9


@pytest.fixture
def alone(monkeypatch):
    """A group of this process alone, so that what processes do together can be called here."""
    monkeypatch.setattr(fsdp_train, "catch_sigterm", list)
    if sys.platform in group.LOOPBACK:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", group.LOOPBACK[sys.platform])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_run_resumed_after_its_last_step_ends_with_the_same_bits(alone, tmp_path):
    args = parse(training_flags.training_parser("Doc."), [*FLAGS, "-steps", "2", "-every", "1", "-checkpoint", str(tmp_path / "run.pt")])
    data = load_cifar10()
    runs = []
    for args.resume in (False, True):
        runs.append(fsdp_train.train_once(args, data, [], shard=True))
    first, again = (run["parameters"] for run in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert runs[1]["held"]["optimizer"] == runs[0]["held"]["optimizer"]


def test_a_checkpoint_of_ddp_is_refused_with_a_sentence(alone, tmp_path):
    args = parse(training_flags.training_parser("Doc."), [*FLAGS, "-resume", "-checkpoint", str(tmp_path / "ddp.pt")])
    network = ConvNet(args.widths, "group")
    optimizer = torch.optim.AdamW(network.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.001, total_steps=STEPS)
    settings, state = ddp_train.run_settings(args, load_cifar10()["train"], STEPS), ddp_train.state_of(network, optimizer, scheduler)
    checkpoint.save_checkpoint(args.checkpoint, {"step": 5, "settings": settings, **state})
    before = args.checkpoint.read_bytes()
    with pytest.raises(InputError, match=r"ddp.pt belongs to another run: script ddp_train there and fsdp_train here; give the same flags"):
        fsdp_train.train(args)
    assert args.checkpoint.read_bytes() == before
