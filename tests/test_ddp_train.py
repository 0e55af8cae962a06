"""ddp_train.py, checkpoint.py, launch.py, group.py: the same bits from any number of processes, after any death."""

import contextlib
import errno
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import stress_ddp
import torch
import torch.distributed as dist
import torch.distributed.run as torch_run
from conftest import PATIENCE_S, ROOT, end
from PIL import Image
from stress_ddp import EVERY, FLAGS, STEPS, parameters_of

from cifar10 import ConvNet, Images, augment, epoch_order, normalize
from common import parse
from errors import InputError
from m28_distributed_training import checkpoint, ddp_benchmark, ddp_benchmark_report, ddp_train, fsdp_train, group, launch, training_flags

SCRIPT, FSDP = "m28_distributed_training/ddp_train.py", "m28_distributed_training/fsdp_train.py"
SMALL = [*FLAGS[2:], "-steps"]  # the stress command's network, so that its trials and these tests share one undisturbed run
posix = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
linux = pytest.mark.skipif(sys.platform != "linux", reason="gloo does not notice elsewhere that a process is gone")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    """The row that two processes reach in 40 steps when nobody disturbs them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, str(ROOT / SCRIPT), *FLAGS]
    done = subprocess.run(command, env={**os.environ, "COURSE_RESULTS": str(folder)}, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0 and done.stdout.count("data: 12,000 drawn") == 1, done.stderr
    [row] = json.loads((folder / "ddp_train.json").read_text())["rows"]
    assert parameters_of(done.stdout) == row["parameters_sha256"]
    return row


@pytest.fixture
def start_training(start_script, start_in_fork, tmp_path):
    """Start more steps than anybody waits for; the process and its ranks, once the first checkpoint is written."""

    def start(*flags, steps: int = 100_000, begin=start_in_fork, command=(SCRIPT,)) -> tuple:
        file = tmp_path / "run.pt"
        process = begin(*command, *SMALL, steps, "-checkpoint", file, "-every", EVERY, *flags, COURSE_RESULTS=str(tmp_path))
        deadline = time.time() + PATIENCE_S
        while not file.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.005)
        assert file.exists(), "no checkpoint was written"
        return process, stress_ddp.Run.ranks(SimpleNamespace(process=process))

    return start


@pytest.fixture
def start_under_torchrun(start_training, start_script):
    """As start_training; the process is a subprocess.Popen."""
    torchrun = (torch_run.__file__, "--standalone", "--nproc-per-node", 2, ROOT / SCRIPT)
    return functools.partial(start_training, begin=start_script, command=torchrun)


@pytest.fixture
def alone(monkeypatch):
    """A group of this process alone, so that what processes do together can be called here."""
    if sys.platform in group.LOOPBACK:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", group.LOOPBACK[sys.platform])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def arguments(*flags):
    """What the script's parser makes of some flags."""
    return parse(training_flags.training_parser("Doc."), ["-device", "cpu", *(str(flag) for flag in flags)])


# ---- the same computation --------------------------------------------------------------------------------------------


def test_ddp_hands_four_bytes_a_parameter_to_the_all_reduce(undisturbed):
    assert (undisturbed["processes"], undisturbed["steps"], undisturbed["parameters"]) == (2, STEPS, 18_626)
    assert undisturbed["bytes_per_step"] == 4 * 18_626
    assert undisturbed["images_per_s"] > 0 and undisturbed["loss"] < 2.5 and 0 < undisturbed["accuracy"] < 1


def test_one_process_with_two_micro_batches_computes_the_same_bits(undisturbed, run_in_fork, tmp_path):
    done = run_in_fork(SCRIPT, *FLAGS, "-nproc", "1", "-accumulate", "2", COURSE_RESULTS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    [row] = json.loads((tmp_path / "ddp_train.json").read_text())["rows"]
    same = ("parameters_sha256", "accuracy", "bytes_per_step")  # bytes: no_sync() keeps the first micro-batch's gradients here
    assert [row[key] for key in same] == [undisturbed[key] for key in same] and row["processes"] == 1
    assert row["loss"] == pytest.approx(undisturbed["loss"], rel=1e-6)  # of all images, not of those of one process


@posix  # torchrun's meeting place needs libuv, which torch for Windows lacks
def test_torchrun_starts_the_same_file_and_repeats_the_run(undisturbed, tmp_path):
    environment = {**os.environ, "COURSE_RESULTS": str(tmp_path)}
    command = stress_ddp.command("ddp_train.py", "torchrun", [])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert parameters_of(done.stdout) == undisturbed["parameters_sha256"]
    assert done.stdout.count("parameters sha256") == done.stdout.count("data: 12,000 drawn") == 1  # one process speaks for all


def test_micro_batches_cut_the_same_batch_in_any_way(monkeypatch):
    data = Images(torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8), torch.arange(40), (), "noise")  # a label says which image

    def cut(world: int, accumulate: int, step: int) -> tuple[torch.Tensor, list[int]]:
        monkeypatch.setattr(dist, "get_world_size", lambda: world)
        args = SimpleNamespace(batch_size=16, accumulate=accumulate, seed=0, device=torch.device("cpu"))
        pairs = []
        for rank in range(world):
            monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
            pairs += ddp_train.micro_batches(data, step, args)
        assert len(pairs) == world * accumulate
        return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs]).tolist()

    seen = []
    for step, (epoch, place) in enumerate([(0, 0), (0, 16), (1, 0)]):  # the third begins the second epoch: 8 images of each are left over
        images, labels = cut(1, 1, step)
        seen.append(labels)
        indices = epoch_order(0, epoch, 40)[place:][:16]
        assert labels == indices.tolist()
        assert torch.equal(images, normalize(augment(data.images[indices], indices, 0, epoch, 40)))
        for world, accumulate in ((2, 1), (1, 2), (4, 1), (2, 4)):
            other_images, other_labels = cut(world, accumulate, step)
            assert torch.equal(images, other_images) and labels == other_labels
    assert not set(seen[0]) & set(seen[1]) and seen[0] != seen[2]


def noise() -> tuple[torch.nn.Module, Images]:
    """An untrained network and 1001 images, which no number of processes divides evenly; its answers are the labels, so all are right."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1001, 3, 32, 32), dtype=torch.uint8, generator=generator)
    torch.manual_seed(0)
    network = ConvNet((8, 16, 32), "group")
    with torch.no_grad():
        labels = torch.cat([network(normalize(part)).argmax(1) for part in pixels.split(1)])  # one at a time: no batch rounds otherwise
    return network, Images(pixels, labels, (), "noise")


def work_in_groups(rank: int, folder: Path, counted, trained) -> None:
    """Evaluate in groups of 4, 3, 2 and 1 processes, one after the other; each puts (world, right answers). In the first also train."""
    torch.set_num_threads(1)
    if sys.platform in group.LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = group.LOOPBACK[sys.platform]
    network, data = noise()
    for world in range(4, rank, -1):
        store = dist.FileStore(str(folder / f"store{world}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        counted.put((world, ddp_train.evaluate(network, data, SimpleNamespace(device=torch.device("cpu")))))
        if world == 4:
            train_and_go_on(rank, folder / "run.pt", data, trained)
        dist.destroy_process_group()


def train_and_go_on(rank: int, file: Path, data: Images, trained) -> None:
    """Train 6 steps, of which the fourth is kept, then once more the last two from there; each run puts its parameters."""
    ddp_train.load_cifar10 = lambda *_: {"train": data, "test": data}
    keep = ddp_train.save_checkpoint
    ddp_train.save_checkpoint = lambda file, state: state["step"] < 6 and keep(file, state)  # after the last one nothing is left to do
    ddp_train.report = lambda args, data, network, row: rank or trained.put((ddp_train.fingerprint(network), *map(row.get, told)))
    told, cut, now = ("bytes_per_step", "images_per_s"), ddp_train.micro_batches, itertools.count()
    seconds = [next(now)]  # a clock on which every step takes one
    ddp_train.micro_batches = lambda *given: (seconds.append(next(now)), cut(*given))[1]
    ddp_train.time = SimpleNamespace(perf_counter=lambda: seconds[-1])
    args = arguments(*FLAGS, "-steps", 6, "-every", 4, "-batch_size", 64, "-accumulate", 2, "-checkpoint", file)
    for args.resume in (False, True):
        ddp_train.train(args)


@pytest.fixture(scope="module")
def groups(processes, tmp_path_factory) -> SimpleNamespace:
    """What groups of up to four processes counted and trained."""
    context, folder = processes, tmp_path_factory.mktemp("groups")
    counted, trained = context.SimpleQueue(), context.SimpleQueue()
    ranks = [context.Process(target=work_in_groups, args=(rank, folder, counted, trained)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE_S)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * 4
    return SimpleNamespace(counted=sorted(counted.get() for _ in range(10)), trained=[trained.get() for _ in range(2)])


def test_each_test_image_is_counted_once_by_any_number_of_processes(groups):
    assert groups.counted == [(world, 1001) for world in (1, 2, 3, 4) for _ in range(world)]


def test_four_processes_that_go_on_end_with_the_same_bits(groups):
    """Of two numbers there is one sum, of four there are several: DDP's buckets must be the same before and after."""
    whole, gone_on = groups.trained
    assert gone_on == whole and whole[1] == 4 * 18_626  # bytes a step, once for both micro-batches
    assert whole[2] == 64  # images a second: those of all processes, once


def test_an_all_reduce_is_timed_by_the_piece(alone, monkeypatch):
    seconds = iter((0.0, 6.0))
    monkeypatch.setattr(ddp_benchmark, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    steps = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu")))
    assert ddp_benchmark.Steps.allreduce(steps, 400) == 6.0 / ddp_benchmark.STEPS


def test_the_benchmark_measures_processes_against_threads(run_in_fork, tmp_path):
    done = run_in_fork(SCRIPT, "-quick", "-benchmark", *FLAGS[2:], COURSE_RESULTS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "ddp_train.json").read_text())["rows"]
    assert [(row["processes"], row["threads"]) for row in rows] == [(1, 1), (2, 1), (1, 2)]
    assert all({"processes", "images_per_s", "efficiency", "allreduce_share", "bytes_per_step"} <= set(row) for row in rows)
    assert all(row["bytes_per_step"] == row["formula_bytes"] == 4 * 18_626 for row in rows)
    assert all(row[key] > 0 for row in rows for key in ("images_per_s", "alone_ms", "compute_ms", "step_ms", "allreduce_alone_ms"))
    assert "a process's part takes" in done.stdout and done.stdout.count("data: 12,000 drawn") == 1
    assert rows[0]["efficiency"] == 1 and rows[1]["efficiency"] == rows[1]["speedup"] / 2
    assert re.search(r"2 processes of 1 threads against one of 2 threads: .* 2 rounds cannot tell", done.stdout)
    assert Image.open(tmp_path / "ddp_train_speedup.png").size[0] > 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("flags", [("-bf16",), ("-benchmark",)])
def test_with_a_gpu_nccl_is_taken(run_script, tmp_path, flags):
    done = run_script(SCRIPT, "-quick", *flags, COURSE_RESULTS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "ddp_train.json").read_text())
    assert content["flags"]["backend"] == "nccl" and content["rows"][-1]["images_per_s"] > 0


def test_the_benchmark_refuses_what_it_could_not_use(check_refusals):
    check_refusals(SCRIPT, {("-show",): (2, "argument -show: only -benchmark draws a picture")})
    idle = ("-benchmark", "-bf16", "-accumulate", "2", "-every", "5")
    said = "argument -accumulate, -bf16, -every: has no effect with -benchmark"
    check_refusals(
        SCRIPT, {("-quick", "-benchmark", "-widths", "9", "9", "9"): (1, "a stage of 9 channels cannot be normalized"), idle: (2, said)}
    )


@posix
@pytest.mark.parametrize("stop", [psutil.Process.kill, psutil.Process.suspend])
def test_a_process_of_the_benchmark_that_ends_or_hangs_is_a_sentence(start_in_fork, tmp_path, stop):
    flags = (*FLAGS[2:], "-timeout_s", 3)
    process = start_in_fork(SCRIPT, "-quick", "-benchmark", *flags, COURSE_RESULTS=str(tmp_path))
    while process.is_alive() and len(ranks := stress_ddp.Run.ranks(SimpleNamespace(process=process))) < 4:
        time.sleep(0.005)
    stop(ranks[1])  # the first of the group of two
    _, said = end(process)
    assert process.exitcode == 1 and "Traceback" not in said and psutil.wait_procs(ranks, timeout=1)[1] == []
    assert "error: a process of the group of 2 ended: " in said
    assert ("rank 0 was killed by signal 9" if stop == psutil.Process.kill else "rank 1: another rank ended first") in said


def test_a_process_that_cannot_be_started_ends_those_that_were():
    """And Ctrl-C comes through again."""
    started, begin, meant = [], SpawnProcess.start, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def start(process):
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        begin(process)
        started.append(process)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match=r"rank 1 could not be started \(Resource temp.*-nproc"):
        patch.setattr(SpawnProcess, "start", start)
        launch.run_processes(time.sleep, SimpleNamespace(nproc=2, max_restarts=0, checkpoint=None))
    signal.signal(signal.SIGTERM, meant[1])
    assert not started[0].is_alive() and signal.getsignal(signal.SIGINT) == meant[0]
    assert sys.platform == "win32" or signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_the_benchmark_warns_of_what_the_machine_cannot_give(monkeypatch, capsys):
    data = {"train": noise()[1]}
    monkeypatch.setattr(ddp_benchmark, "usable_cores", lambda: 2)
    for free, shapes, said in (
        (10e9, [(1, 1), (2, 1), (1, 2)], ""),
        (1e9, [(1, 1), (2, 1), (1, 2)], "warning: 4 processes need about 1.6 GB together, 1.0 GB are free: "),
        (10e9, [(1, 1), (2, 1), (4, 1)], "left out: 3 processes, which cannot share out a batch evenly"),
        (10e9, [(1, 1), (2, 2), (1, 4)], "4 threads compute at once on 2 usable cores: the ideal line is out of reach"),
    ):
        monkeypatch.setattr(ddp_benchmark, "available_memory", lambda free=free: free)
        ddp_benchmark.warn(shapes, data, on_cpu=True)
        printed = capsys.readouterr().out
        assert printed.startswith(said) and bool(printed) == bool(said)
    ddp_benchmark.warn([(n, 1) for n in (1, 2, 3, 4)], data, on_cpu=False)  # GPUs compute
    assert capsys.readouterr().out == ""


def test_few_rounds_are_no_verdict(capsys):
    times = {"alone_s": 0.7, "allreduce_s": 0.2, "compute_s": 0.9, "bytes": 8}
    for rounds, said in ((2, "2 rounds cannot tell"), (5, "faster")):
        runs = {shape: [times | {"step_s": seconds}] * rounds for shape, seconds in {(1, 1): 1.6, (2, 1): 1.0, (1, 2): 1.1}.items()}
        ddp_benchmark_report.say([ddp_benchmark.summary(shape, runs, 256, 8) for shape in runs])
        assert capsys.readouterr().out.endswith(f"1.10x (1.10 to 1.10), {said}\n")


def test_a_step_is_split_into_its_parts():
    times = {"step_s": 1.0, "compute_s": 0.9, "alone_s": 0.7, "allreduce_s": 0.2, "bytes": 8}
    runs = {(1, 1): [times | {"step_s": 1.6}], (2, 1): [times]}
    one, two = (ddp_benchmark.summary(shape, runs, 256, 8) for shape in runs)
    assert (one["images_per_s"], two["images_per_s"]) == (160, 256)  # 256 of them in 1.6 s, and in one
    assert (two["speedup"], two["efficiency"], two["alone_ms"], two["compute_ms"], two["step_ms"]) == (1.6, 0.8, 700, 900, 1000)
    assert two["sharing_share"] == pytest.approx(0.2) and two["allreduce_share"] == pytest.approx(0.1)
    noisy = ddp_benchmark.summary(
        (2, 1), {**runs, (2, 1): [times | {"alone_s": 3.0, "compute_s": 2.5, "step_s": 1.0}] * 2, (1, 1): runs[1, 1] * 2}, 256, 8
    )
    assert (noisy["sharing_share"], noisy["allreduce_share"]) == (0, 0)
    noisy = ddp_benchmark.summary((2, 1), {(1, 1): [times], (2, 1): [times | {"compute_s": 2.5}]}, 256, 8)
    assert noisy["sharing_share"] == 1
    assert one["sharing_share"] == one["allreduce_share"] == 0  # nobody to share with or to wait for


# ---- stopped, killed, gone on ----------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("script", ["ddp_train.py", "fsdp_train.py"])
def test_sigterm_saves_and_one_process_goes_on_and_then_two_to_the_same_bits(undisturbed, start_training, run_in_fork, tmp_path, script):
    command = (f"m28_distributed_training/{script}",)  # both end with the same bits
    process, _ = start_training(steps=STEPS, command=command)
    process.send_signal(signal.SIGTERM)
    said, errors = end(process)
    assert process.exitcode == 0, errors
    stopped = int(re.search(rf"SIGTERM: stopped after step (\d+) of {STEPS}; -resume goes on from here", said)[1])
    process, _ = start_training("-resume", "-nproc", 1, "-accumulate", 2, steps=STEPS, command=command)
    while process.is_alive() and "resumed" not in process.output()[0]:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert f"resumed at step {stopped} " in end(process)[0]
    kept = torch.load(tmp_path / "run.pt", weights_only=True)
    assert kept["settings"]["world"] == 1 and stopped < kept["step"] < STEPS
    done = run_in_fork(*command, *FLAGS, "-checkpoint", tmp_path / "run.pt", "-resume", COURSE_RESULTS=str(tmp_path))
    assert done.returncode == 0 and f"resumed at step {kept['step']} " in done.stdout, done.stderr
    assert parameters_of(done.stdout) == undisturbed["parameters_sha256"]


@posix
@pytest.mark.parametrize("kept", [True, False])
def test_sigterm_before_the_first_step_ends_all_and_starts_nothing_again(start_script, tmp_path, kept):
    """With 0 where -resume begins as if nothing had been; without a checkpoint a shell would take it for done."""
    flags = ("-checkpoint", tmp_path / "run.pt", "-max_restarts", "3") if kept else ()
    process = start_script(SCRIPT, *SMALL, 100_000, *flags)
    while process.poll() is None and len(stress_ddp.Run.ranks(SimpleNamespace(process=process))) < 2:
        time.sleep(0.01)
    ranks = stress_ddp.Run.ranks(SimpleNamespace(process=process))
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == (0 if kept else 1)
    assert f"SIGTERM: ended before the first step{'; -resume goes on' if kept else ''}\n" in said
    assert "starting all processes again" not in errors and psutil.wait_procs(ranks, timeout=1)[1] == []


def test_processes_agree_soon_enough_for_a_job_system(alone, monkeypatch):
    """It sends SIGTERM and waits perhaps 30 s: no more than ten steps go by, and fewer where they are slow."""
    now = [0.0]
    monkeypatch.setattr(ddp_train.time, "perf_counter", lambda: now[0])
    for seconds, gap in ((0.1, 10), (1.5, 3), (40, 1)):
        now[0] = 0.0
        reports, agreed = ddp_train.Reports(arguments("-accumulate", 2), []), []
        for step in range(24):
            now[0] += seconds
            reports.losses.extend(torch.tensor([step / 2, step / 2]))
            if step >= reports.next:
                agreed.append(step)
                loss, stopped = reports.agree(step, [torch.ones(2)])
                assert not stopped and loss == sum(range(max(0, step - 9), step + 1)) / min(10, step + 1)  # of the last ten steps
        assert agreed[0] == 0 and {later - earlier for earlier, later in itertools.pairwise(agreed)} == {gap}
    reports.stop.append(True)
    now[0] += 1
    assert reports.agree(24, [])[1]
    with pytest.raises(InputError, match="the training failed, not all parameters are finite after step 26: lower its -lr"):
        reports.agree(25, [torch.ones(2), torch.tensor([1, float("inf")])])


@pytest.mark.parametrize("train", [ddp_train.train, fsdp_train.train])
def test_bfloat16_trains_and_stays_float32_between_steps(alone, tmp_path, monkeypatch, capsys, train):
    monkeypatch.setattr(sys.modules[train.__module__], "catch_sigterm", list)
    saved = {}
    for flags in ([], ["-bf16"]):
        args = arguments(*FLAGS, "-steps", 2, "-every", 2, "-checkpoint", tmp_path / f"run{len(flags)}.pt", *flags)
        train(args)
        saved[len(flags)] = torch.load(args.checkpoint, weights_only=True)["model"]
    same = [torch.equal(saved[0][name], saved[1][name]) for name in saved[0]]
    assert not all(same) and all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in saved[1].values())


def test_a_full_disk_does_not_end_a_training(alone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ddp_train, "catch_sigterm", list)
    args = arguments(*FLAGS, "-steps", 3, "-every", 1, "-checkpoint", tmp_path / "run.pt")
    whole, written = Path.write_bytes, []

    def write(path, content):
        written.append(path)
        return full_disk() if len(written) == 2 else whole(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    ddp_train.train(args)
    said = capsys.readouterr()
    assert said.err.count("warning: no checkpoint at step 2") == 1 and "parameters sha256" in said.out
    assert torch.load(args.checkpoint, weights_only=True)["step"] == 3


def test_a_run_resumed_after_its_last_step_reports_the_same_bits(alone, results, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ddp_train, "catch_sigterm", list)
    args = arguments(*FLAGS, "-steps", 2, "-every", 1, "-checkpoint", tmp_path / "run.pt")
    said = []
    for args.resume in (False, True):
        ddp_train.train(args)
        said.append(capsys.readouterr().out)
    assert "resumed at step 2 " in said[1] and parameters_of(said[0]) == parameters_of(said[1])
    assert "to the all-reduce" in said[0] and "to the all-reduce" not in said[1]
    assert json.loads((results / "ddp_train.json").read_text())["rows"][0]["images_per_s"] is None  # nothing was timed


@posix
@pytest.mark.parametrize(
    ("launcher", "while_writing"), [("nproc", False), ("nproc", True), ("torchrun", False)], ids=["nproc", "while-writing", "torchrun"]
)
def test_kill_9_changes_no_bit(undisturbed, forked_run, launcher, while_writing):
    # 1 says step 9: then it is killed, or from then on watched for a write. 4 says rank 1, which rank 0 would look for in vain if
    # torchrun's store still held its address
    chance = random.Random(4 if launcher == "torchrun" else 1)
    start = stress_ddp.Run if launcher == "torchrun" else forked_run
    lost, when = stress_ddp.trial("ddp_train.py", launcher, while_writing, undisturbed["parameters_sha256"], chance, start)
    assert lost <= EVERY and when == ("while a checkpoint was written" if while_writing else "between")


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_without_restarts_a_killed_rank_ends_all_with_a_sentence(start_training, number):
    process, ranks = start_training()
    ranks[1].send_signal(number)
    _, said = end(process)
    assert process.exitcode == 1
    assert said.index(f"rank 1 was killed by signal {number.value}") < said.index("rank 0: another rank ended first, look above")
    assert "Traceback" not in said and ".cc:" not in said and psutil.wait_procs(ranks, timeout=1)[1] == []


@linux
def test_of_three_processes_the_others_say_that_one_was_killed(start_training):
    process, ranks = start_training("-nproc", 3, "-batch_size", 96)
    ranks[0].kill()
    _, said = end(process)
    assert process.exitcode == 1 and "Traceback" not in said and ".cc:" not in said
    assert "\nrank 0 was killed by signal 9\n" in said  # not behind the progress bar
    assert "another rank ended first, look above for that rank" in said and psutil.wait_procs(ranks, timeout=1)[1] == []


@posix
def test_no_process_outlives_the_parent(start_training):
    process, ranks = start_training()
    process.kill()
    assert psutil.wait_procs(ranks, timeout=3)[1] == []


@posix
def test_no_process_outlives_torchrun(start_under_torchrun):
    process, ranks = start_under_torchrun()
    process.kill()
    assert psutil.wait_procs(ranks, timeout=3)[1] == []


@posix
def test_a_rank_that_hangs_is_not_waited_for_longer_than_timeout_s(start_training):
    process, ranks = start_training("-timeout_s", "3")
    ranks[1].suspend()
    begin = time.time()
    _, said = end(process)
    assert process.exitcode == 1 and 2 < time.time() - begin < 15
    assert "rank 0: another rank ended first" in said and "Timed out" in said and ".cc:" not in said and "Traceback" not in said
    assert psutil.wait_procs(ranks, timeout=1)[1] == []


@linux
def test_under_torchrun_the_process_that_lost_its_peer_says_a_sentence(start_under_torchrun):
    process, ranks = start_under_torchrun()
    ranks[1].kill()
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "rank 0: another rank ended first, look above for rank 1 (" in said
    assert (
        "launch.py" not in said and "group.py" not in said and ".cc:" not in said
    )  # no stack of ours or gloo's: what else there is are torchrun's own words
    assert psutil.wait_procs(ranks, timeout=1)[1] == []


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_hands_on_what_it_is_told(start_under_torchrun, tmp_path, number):
    """It ends with 1 itself. At SIGTERM a checkpoint is saved, at Ctrl-C nothing is left within 3 s."""
    process, ranks = start_under_torchrun()
    begin = time.time()
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and psutil.wait_procs(ranks, timeout=1)[1] == []
    if number == signal.SIGINT:
        assert time.time() - begin < 3
    else:
        stopped = int(re.search(r"SIGTERM: stopped after step (\d+) of 100000; -resume goes on from here", said)[1])
        assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == stopped


@posix
@pytest.mark.parametrize(
    ("moment", "flags", "processes"),
    [
        ("training", (), 2),
        ("starting", (*SMALL, 100_000), 1),
        ("importing torch", (*SMALL, 100_000), 2),
        ("starting the benchmark", ("-quick", "-benchmark", *SMALL[:-1]), 4),
    ],
)
def test_ctrl_c_ends_all_processes_within_3_s(start_training, start_script, press_ctrl_c, moment, flags, processes):
    if moment == "training":
        process, _ = start_training(begin=start_script)
    else:
        process = start_script(SCRIPT, *flags)
        while process.poll() is None and len(stress_ddp.Run.ranks(SimpleNamespace(process=process))) < processes:
            time.sleep(0.001)
        time.sleep(0 if moment == "starting" else 0.5)
    said = press_ctrl_c(process, within_s=3)
    assert "leaked semaphore" not in said


SLURM = {  # commands of a cluster that is this machine; srun notes the job's process, for scancel signals the processes of all steps
    "srun": '#!/bin/sh\nshift; echo $$ > step.pid; SLURM_NODEID=0 exec "$@"\n',
    "scontrol": "#!/bin/sh\n[ $1 = show ] && echo localhost || echo $* >> asked\n",
    "scancel": "#!/bin/sh\necho $* >> asked; kill -TERM $(cat step.pid)\n",
}


@posix
@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_a_job_of_a_cluster_saves_when_its_time_is_nearly_up_and_queues_again(tmp_path):
    for name, script in SLURM.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o700)
    (tmp_path / "m28_distributed_training").symlink_to(ROOT / "m28_distributed_training")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SUBMIT_DIR": tmp_path, "JOB_ID": os.getpid(), "JOB_NODELIST": "node", "NNODES": 1, "CPUS_PER_TASK": 1}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in job.items()}
    environment |= {"PATH": path, "COURSE_RESULTS": str(tmp_path)}
    begin = ["bash", ROOT / "m28_distributed_training" / "slurm.sbatch", *map(str, SMALL)]
    file = tmp_path / "results" / f"job-{os.getpid()}" / "machine-0.pt"
    first = subprocess.Popen([*begin, "100000", "-every", "5"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    while not file.exists() and first.poll() is None:
        time.sleep(0.01)
    assert file.exists(), "no checkpoint was written"
    first.send_signal(signal.SIGUSR1)
    said, _ = first.communicate(timeout=PATIENCE_S)
    stopped = int(re.search(r"SIGTERM: stopped after step (\d+) of", said)[1])
    assert torch.load(file, weights_only=True)["step"] == stopped
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [f"--signal=TERM {os.getpid()}", f"requeue {os.getpid()}"] and first.returncode


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(alone, tmp_path) -> SimpleNamespace:
    """A checkpoint after one step of training, and what it was written from."""
    args = arguments("-widths", 8, 16, 32, "-nproc", 1, "-accumulate", 4, "-checkpoint", tmp_path / "run.pt", "-resume", "-num_threads", 1)
    network = ConvNet(args.widths, "group")
    optimizer = torch.optim.AdamW(network.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.001, total_steps=40)
    network(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    scheduler.step()
    settings, state = ddp_train.run_settings(args, noise()[1], 40), ddp_train.state_of(network, optimizer, scheduler)
    assert checkpoint.save_checkpoint(args.checkpoint, {"step": 1, "settings": settings, **state})
    return SimpleNamespace(args=args, file=args.checkpoint, settings=settings, parts=(network, optimizer, scheduler), state=state)


def test_a_checkpoint_gives_back_every_bit(saved):
    fingerprint, drawn = ddp_train.fingerprint(saved.parts[0]), torch.rand(3)
    other = ConvNet(saved.args.widths, "group")
    optimizer = torch.optim.AdamW(other.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.001, total_steps=40)
    assert ddp_train.fingerprint(other) != fingerprint
    assert ddp_train.resume(saved.args, saved.settings, other, optimizer, scheduler) == 1
    assert ddp_train.fingerprint(other) == fingerprint and torch.equal(torch.rand(3), drawn)
    assert scheduler.state_dict() == saved.parts[2].state_dict()
    moments = [torch.cat([state["exp_avg_sq"].flatten() for state in one.state.values()]) for one in (optimizer, saved.parts[1])]
    assert torch.equal(*moments)


def test_without_a_file_resume_begins(alone, tmp_path):
    assert checkpoint.load_checkpoint(tmp_path / "none.pt", {}) is None


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "flipped"])
def test_a_damaged_checkpoint_is_refused_and_stays(saved, damage):
    whole = saved.file.read_bytes()
    if damage == "flipped":  # a bit in each of 30 places all over the file; where nothing is stored it does no harm
        broken, loaded = [bytearray(whole) for _ in range(30)], torch.load(saved.file, weights_only=True)
        for number, content in enumerate(broken):
            content[(2 * number + 1) * len(whole) // 60] ^= 16
    else:
        broken = [{"empty": b"", "truncated": whole[:-1000], "text": b"no checkpoint at all\n" * 100}[damage]]
    refused = 0
    for content in broken:
        saved.file.write_bytes(content)
        try:
            assert str(checkpoint.load_checkpoint(saved.file, saved.settings)) == str(loaded)
        except InputError as error:
            assert re.search(r"-checkpoint .*run.pt is damaged or no checkpoint: remove it to begin anew, or give another one", str(error))
            refused += 1
        assert saved.file.read_bytes() == content
    assert refused >= 0.8 * len(broken)


@pytest.mark.parametrize("parts", [("model",), ("format", "model", "optimizer", "scheduler", "rng", "settings")])
def test_a_foreign_file_is_refused_and_stays(saved, parts):
    whole = torch.load(saved.file, weights_only=True)
    torch.save({part: whole[part] for part in parts}, saved.file)
    before = saved.file.read_bytes()
    with pytest.raises(InputError, match=r"run.pt is not a checkpoint of these scripts: give another file"):
        checkpoint.load_checkpoint(saved.file, saved.settings)
    assert saved.file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "belongs to another run: seed 0 there and 1 here; give the same flags or another file"),
        ({"widths": [16, 32, 64]}, r"widths \[8, 16, 32\] there and \[16, 32, 64\] here"),
        ({"batch_size": 64, "steps": 80}, "batch_size 128 there and 64 here, steps 40 there and 80 here"),
        ({"script": "fsdp_train"}, "script ddp_train there and fsdp_train here"),
        ({"device": "cuda"}, "device cpu there and cuda here"),
        (
            {"data": "50,000 images of CIFAR-10"},
            "data 1,001 images of noise, checksum [0-9a-f]{8} there and 50,000 images of CIFAR-10 here",
        ),
        ({"world": 2}, "written by 1 processes, these are 2: with 4 micro-batches a step the sum would be taken in another order"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_reason(saved, change, said):
    before = saved.file.read_bytes()
    with pytest.raises(InputError, match=said):
        checkpoint.load_checkpoint(saved.file, saved.settings | change)
    assert saved.file.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "flags"),
    {
        "seed": ("-seed", 1),
        "lr": ("-lr", 0.002),
        "bf16": ("-bf16",),
        "num_threads": ("-num_threads", 2),
        "batch_size": ("-batch_size", 64),
        "widths": ("-widths", 8, 16, 64),
        "micro_batches": ("-accumulate", 2),
    }.items(),
)
def test_what_other_flags_would_change_is_among_the_settings(saved, key, flags):
    others = {"widths": ("-widths", 8, 16, 32), "num_threads": ("-num_threads", 1), "micro_batches": ("-accumulate", 4)}
    given = [word for name, words in others.items() if name != key for word in words]
    settings = ddp_train.run_settings(arguments(*given, *flags), noise()[1], 40)
    assert {name for name in settings if settings[name] != saved.settings[name]} == {key}
    with pytest.raises(InputError, match=f"belongs to another run: {key} "):
        checkpoint.load_checkpoint(saved.file, settings)


@pytest.mark.parametrize("change", [(torch, "__version__", "9.9"), (torch.backends.cpu, "get_cpu_capability", lambda: "another")])
def test_on_another_kind_of_processor_or_torch_a_checkpoint_is_refused(saved, monkeypatch, change):
    """Its sums have another order, so the run would end with other bits."""
    monkeypatch.setattr(*change)
    settings = ddp_train.run_settings(saved.args, noise()[1], 40)
    with pytest.raises(InputError, match=r"belongs to another run: machine .* there and .* here; give the same flags or another file"):
        checkpoint.load_checkpoint(saved.file, settings)


@pytest.mark.parametrize("kept", [True, False])
def test_processors_of_two_kinds_may_train_together_but_keep_no_checkpoint(monkeypatch, kept):
    everybody = [{"seed": 0, "num_threads": 1, "machine": name, "checkpoint": kept} for name in ("one", "another")]
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, ours: found.__setitem__(slice(None), everybody))
    with (
        pytest.raises(InputError, match="rank 1 has not what rank 0 has: machine another instead of one;")
        if kept
        else contextlib.nullcontext()
    ):
        training_flags.refuse_differences(everybody[0])


def test_of_two_machines_checkpoints_the_newer_one_is_taken(saved, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box, src: box.__setitem__(0, {"from": src}))
    for theirs, taken in ((30, {"from": 0}), (None, {"from": 1}), (0, {"from": 1})):  # ours, of rank 1, is of step 1
        monkeypatch.setattr(dist, "all_gather_object", lambda found, ours, theirs=theirs: found.__setitem__(slice(None), [theirs, ours]))
        assert checkpoint.load_checkpoint(saved.file, saved.settings) == taken


def test_a_foreign_checkpoint_is_refused_where_another_machine_has_a_newer_one_of_this_run(saved, monkeypatch):
    def gather(found, ours):
        found[:] = [30, ours]  # the other machine's is of step 30

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(InputError, match="belongs to another run: seed 0 there and 1 here"):
        checkpoint.load_checkpoint(saved.file, saved.settings | {"seed": 1})


def test_a_file_that_is_no_checkpoint_is_never_written_over(saved, tmp_path):
    training_flags.check(saved.args)  # its own file is fine with -resume
    saved.args.resume = False
    with pytest.raises(InputError, match=r"run.pt is there, of step 1: give -resume to go on from it, or remove it to begin anew"):
        training_flags.check(saved.args)
    notes = tmp_path / "notes.pt"
    notes.write_text("what I meant to keep")
    with pytest.raises(InputError, match="damaged or no checkpoint"):
        training_flags.check(arguments("-checkpoint", notes))
    assert notes.read_text() == "what I meant to keep"


def test_another_number_of_processes_may_take_over_two_micro_batches():
    checkpoint.check_settings(Path("run.pt"), {"world": 2, "micro_batches": 2}, {"world": 1, "micro_batches": 2})
    with pytest.raises(InputError, match="with 3 micro-batches a step the sum would be taken in another order"):
        checkpoint.check_settings(Path("run.pt"), {"world": 3, "micro_batches": 3}, {"world": 1, "micro_batches": 3})


def test_what_another_run_has_written_meanwhile_is_not_written_over(saved, monkeypatch):
    ours = {"step": 2, "settings": saved.settings | {"seed": 1}, **saved.state}
    before = saved.file.read_bytes()
    with pytest.raises(InputError, match="belongs to another run: seed 0 there and 1 here; give the same flags or another file"):
        checkpoint.save_checkpoint(saved.file, ours)
    assert saved.file.read_bytes() == before
    for left in (b"no zip", b"PK\3\4 and then nothing"):  # of no run
        saved.file.write_bytes(left)
        assert checkpoint.save_checkpoint(saved.file, ours)
    assert checkpoint.read_checkpoint(saved.file)["step"] == 2


def test_a_run_that_cannot_resume_ends_with_one_sentence_and_leaves_the_file(saved, run_in_fork):
    before = saved.file.read_bytes()
    done = run_in_fork(SCRIPT, *FLAGS, "-nproc", "1", "-seed", "1", "-checkpoint", saved.file, "-resume", "-max_restarts", "3")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: -checkpoint {saved.file} belongs to another run: ") and done.stderr.count("\n") == 1
    assert saved.file.read_bytes() == before


@pytest.mark.parametrize("script", ["ddp_train.py", "fsdp_train.py"])
def test_a_training_that_diverges_ends_with_a_sentence_and_its_last_good_checkpoint_stays(run_in_fork, tmp_path, script):
    """The first step makes the parameters huge, the second has no finite loss any more."""
    file = tmp_path / "run.pt"
    flags = ("-quick", "-nproc", "2", "-num_threads", "1", "-lr", "1e30", "-checkpoint", file, "-every", "1", "-max_restarts", "1")
    done = run_in_fork(f"m28_distributed_training/{script}", *flags)
    assert done.returncode == 1 and "starting all processes again" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and re.search(
        "(not all parameters are|the loss, (nan|inf), is not) finite after step 2: lower its -lr, 1e[+]30", said[0]
    )
    state = torch.load(file, weights_only=True)
    assert state["step"] == 1 and all(parameter.isfinite().all() for parameter in state["model"].values())


@posix
def test_under_torchrun_one_process_says_that_the_training_diverged():
    """torchrun ends the other one by SIGTERM, which a training otherwise only takes note of."""
    torchrun = (sys.executable, torch_run.__file__, "--standalone", "--nproc-per-node", "2")
    flags = ("-quick", "-num_threads", "1", "-lr", "1e30")
    done = subprocess.run([*torchrun, str(ROOT / SCRIPT), *flags], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1 and done.stderr.count("error: the training failed") == 1


@pytest.mark.parametrize("train", [ddp_train.train, fsdp_train.train])
def test_parameters_that_are_no_numbers_are_not_written_over_a_checkpoint(alone, tmp_path, monkeypatch, train):
    """The loss is still finite then: it was computed before the step."""
    monkeypatch.setattr(sys.modules[train.__module__], "catch_sigterm", list)
    args, step, steps = arguments(*FLAGS, "-steps", 3, "-every", 1, "-checkpoint", tmp_path / "run.pt"), torch.optim.AdamW.step, []

    def spoil(optimizer, *given):
        step(optimizer, *given)
        steps.append(optimizer)
        if len(steps) == 2:
            optimizer.param_groups[0]["params"][0].data.mul_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(InputError, match="not all parameters are finite after step 2"):
        train(args)
    assert torch.load(args.checkpoint, weights_only=True)["step"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is a full disk")
def test_what_is_printed_onto_a_full_disk_is_lost_and_not_the_training(undisturbed, tmp_path):
    """Nor is the start after a kill, of which the parent speaks."""
    file = tmp_path / "run.pt"
    command = [sys.executable, ROOT / SCRIPT, *SMALL, STEPS, "-checkpoint", file, "-every", EVERY, "-max_restarts", 1]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(list(map(str, command)), stderr=full, stdout=subprocess.PIPE, text=True)
    while not file.exists() and process.poll() is None:
        time.sleep(0.005)
    stress_ddp.Run.ranks(SimpleNamespace(process=process))[1].kill()
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0 and "resumed at step" in said and parameters_of(said) == undisturbed["parameters_sha256"]


def test_a_network_beyond_the_memory_is_a_sentence(monkeypatch, capsys):
    def join(*_):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        )

    monkeypatch.setattr(group, "join_and_run", join)
    monkeypatch.setattr(group, "leave", sys.exit)
    with pytest.raises(SystemExit, match=str(group.BAD_INPUT)):
        group.run_or_say_why(None, arguments(), 0, None)
    assert capsys.readouterr().err == "error: rank 0 asked for more memory than there is: give smaller -widths or a smaller -batch_size\n"


@posix
@pytest.mark.parametrize("script", [SCRIPT, FSDP])
def test_stopped_without_a_checkpoint_it_does_not_end_with_0(start_in_fork, tmp_path, script):
    """There its folder has gone meanwhile."""
    folder = tmp_path / "kept"
    file, flags = folder / "run.pt", (*SMALL, 100_000, "-every", EVERY, "-max_restarts", 1)
    process = start_in_fork(script, *flags, "-checkpoint", file, COURSE_RESULTS=str(tmp_path))
    while not file.exists() and process.is_alive():
        time.sleep(0.005)
    folder.rename(tmp_path / "moved")
    folder.write_text("no folder any more")
    while "warning: no checkpoint at step" not in process.output()[1] and process.is_alive():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said, errors = end(process)
    assert process.exitcode == 1 and re.search(r"SIGTERM: stopped after step \d+ of 100000\n", said), errors
    assert "starting all processes again" not in errors and "ended with exit code" not in errors


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_on_a_full_disk_the_old_checkpoint_stays(saved, monkeypatch, capsys):
    before = saved.file.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert checkpoint.save_checkpoint(saved.file, {"step": 7, "settings": saved.settings}) is False
    said = capsys.readouterr().err
    assert said.startswith(f"warning: no checkpoint at step 7: {saved.file} cannot be written (No space left on device)")
    assert said.count("\n") == 1
    assert saved.file.read_bytes() == before and list(saved.file.parent.iterdir()) == [saved.file]


@contextlib.contextmanager
def largest_file(size: int):
    """The system writes no file beyond `size` bytes: torch meets a write that comes up short, as on a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@posix
def test_a_write_that_really_comes_up_short_is_survived(saved, capsys):
    before = saved.file.read_bytes()
    with largest_file(100_000):
        written = checkpoint.save_checkpoint(saved.file, {"step": 7, "settings": saved.settings, "noise": torch.rand(1_000_000)})
    assert written is False and "the training goes on" in capsys.readouterr().err
    assert saved.file.read_bytes() == before and list(saved.file.parent.iterdir()) == [saved.file]


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-nproc", "0"], "argument -nproc: '0' is not allowed: a whole number of at least 1"),
        (["-accumulate", "0"], "argument -accumulate: '0' is not allowed"),
        (["-timeout_s", "100000"], "argument -timeout_s: '100000' is not allowed: at most a day, 86400, is expected"),
        (["-max_restarts", "-1"], "argument -max_restarts: '-1' is not allowed: a whole number of at least 0"),
        (["-backend", "mpi"], "argument -backend: invalid choice: 'mpi'"),
        (["-lr", "-1"], "argument -lr: '-1' is not allowed: a number above 0 is expected"),
        (["-lr", "nan"], "argument -lr: 'nan' is not allowed: a number above 0 is expected"),
        (["-lr", "1e39"], "argument -lr: '1e39' is not allowed: a number of at most 1e+30 is expected"),
        (["-steps", "9", "-epochs", "1"], "argument -epochs: not allowed with argument -steps"),
    ],
)
def test_a_wrong_flag_ends_with_2_and_one_line(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        arguments(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-nproc", "3"], "-batch_size 128 does not divide into 3 equal micro-batches .*: give a multiple of 3"),
        (["-nproc", "2", "-accumulate", "3"], r"6 equal micro-batches \(2 processes x -accumulate 3\): give a multiple of 6"),
        (["-nproc", "200"], "give a multiple of 200"),
        (["-nproc", "200", "-batch_size", "10200"], "a batch of 10200 images is more than the 10,000 training images"),
        (["-resume"], "-resume is about a checkpoint: give -checkpoint FILE, too"),
        (["-every", "5"], "-every is about a checkpoint: give -checkpoint FILE, too"),
        (["-checkpoint", "."], "-checkpoint . is a folder: give a file"),
        (["-checkpoint", f"{__file__}/run.pt"], "cannot write to"),
        (["-checkpoint", os.devnull], "is no ordinary file: give a file"),
        (["-checkpoint", "x" * 300], r"cannot be a file \(.*\): give another name"),
        (["-checkpoint", "x" * 248], r"cannot be a file \(.*\): give another name"),  # the name while it is written is longer
        (["-max_restarts", "1"], "-max_restarts is about a checkpoint: give -checkpoint FILE, too"),
    ],
)
def test_what_cannot_work_is_refused_before_a_process_starts(flags, said):
    with pytest.raises(InputError, match=said):
        training_flags.check(arguments(*flags))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def as_rank(rank: int, port: int) -> dict[str, str]:
    """What torchrun sets for the only process of a machine, one of two."""
    found = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {"GLOO_SOCKET_IFNAME": group.LOOPBACK.get(sys.platform, ""), **{key: str(value) for key, value in found.items()}}


@posix
@pytest.mark.parametrize(
    ("script", "mine", "theirs", "found"),
    [
        (SCRIPT, (), ("-seed", 7, "-lr", 0.05, "-steps", 4), "seed 7 instead of 0, lr 0.05 instead of 0.001, steps 4 instead of 3"),
        (SCRIPT, (), ("-checkpoint", "run.pt"), "checkpoint True instead of False"),
        (SCRIPT, ("-checkpoint", "run.pt"), (), "checkpoint False instead of True"),
        (FSDP, ("-checkpoint", "run.pt", "-resume"), ("-checkpoint", "run.pt"), "resume False instead of True"),
        (FSDP, (), ("-batch_size", 64), "batch_size 64 instead of 128"),
    ],
)
def test_machines_with_other_flags_are_refused_before_they_train(start_in_fork, free_port, tmp_path, script, mine, theirs, found):
    flags = [[tmp_path / flag if flag == "run.pt" else flag for flag in given] for given in (mine, theirs)]
    here, there = (
        start_in_fork(script, *SMALL, 3, *given, **as_rank(rank, free_port), COURSE_RESULTS=str(tmp_path))
        for rank, given in enumerate(flags)
    )
    for process in (here, there):
        _, said = end(process)
        assert f"error: rank 1 has not what rank 0 has: {found}; start all with the same data and flags" in said
        assert process.exitcode == group.BAD_INPUT and "Traceback" not in said and "training:" not in said
    assert not (tmp_path / "run.pt").exists()


@posix
@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_is_not_reached_is_no_rank_that_ended(start_in_fork, free_port, rank):
    process = start_in_fork(SCRIPT, *SMALL, 3, "-timeout_s", 2, **as_rank(rank, free_port))
    _, said = end(process)
    assert f"error: rank {rank} and the others have not met at 127.0.0.1, port {free_port} (" in said
    assert process.exitcode == group.BAD_INPUT and "ended first" not in said


@posix
def test_a_machine_whose_name_is_not_known_is_a_sentence(start_in_fork, free_port):
    process = start_in_fork(SCRIPT, *SMALL, 3, "-timeout_s", 2, **as_rank(0, free_port) | {"MASTER_ADDR": "nowhere.invalid"})
    _, said = end(process)
    assert "error: no machine is known here by the name nowhere.invalid (" in said and said.count("\n") == 1
    assert process.exitcode == group.BAD_INPUT


@posix
@pytest.mark.parametrize("script", [SCRIPT, FSDP])
def test_sigterm_on_one_machine_stops_all_after_the_same_step(start_in_fork, free_port, tmp_path, script):
    """All end with another exit code than 0: torchrun is not to take the training for done."""
    machines, files = [], [tmp_path / f"run{rank}.pt" for rank in range(2)]
    for rank, file in enumerate(files):
        flags = (*SMALL, 100_000, "-checkpoint", file, "-every", EVERY)
        machines.append(start_in_fork(script, *flags, **as_rank(rank, free_port), COURSE_RESULTS=str(tmp_path)))
    files = files[: 1 if script == FSDP else 2]  # sharded training is collected and written by the first machine
    while not all(file.exists() for file in files) and all(machine.is_alive() for machine in machines):
        time.sleep(0.005)
    machines[1].send_signal(signal.SIGTERM)
    said = [end(machine) for machine in machines]
    assert [machine.exitcode for machine in machines] == [group.STOPPED] * 2, said
    stopped = int(re.search(r"SIGTERM: stopped after step (\d+) of 100000; -resume goes on from here", said[0][0])[1])
    assert {torch.load(file, weights_only=True)["step"] for file in files} == {stopped}


@pytest.mark.parametrize("flag", ["-nproc", "-max_restarts"])
def test_what_torchrun_has_itself_is_refused_under_it(monkeypatch, flag):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match=f"{flag} is not looked at under torchrun: give torchrun --nproc-per-node and --max-restarts instead"
    ):
        training_flags.check(arguments(flag, 2))


def test_torchrun_that_would_start_again_from_the_beginning_is_refused(monkeypatch, tmp_path):
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "1"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match="it starts with the same flags again, so give -resume"):
        training_flags.check(arguments("-checkpoint", tmp_path / "run.pt"))
    training_flags.check(arguments("-checkpoint", tmp_path / "run.pt", "-resume"))


@posix
def test_a_ctrl_c_that_was_to_be_ignored_is_ignored(tmp_path):
    """As in the background of a shell script."""
    file = tmp_path / "run.pt"
    command = [sys.executable, ROOT / SCRIPT, *SMALL, "40", "-every", "5", "-checkpoint", file]
    ignore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    process = subprocess.Popen(list(map(str, command)), preexec_fn=ignore, start_new_session=True, stdout=subprocess.PIPE, text=True)
    while not file.exists() and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    assert "parameters sha256" in process.communicate(timeout=PATIENCE_S)[0] and process.returncode == 0


def test_what_all_ranks_refuse_is_said_once(run_in_fork):
    done = run_in_fork(SCRIPT, *FLAGS, "-widths", "9", "9", "9")
    assert done.returncode == 1
    assert done.stderr.startswith("error: a stage of 9 channels cannot be normalized in groups of 8") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("device", "gpus", "flags", "settled"),
    [
        ("cpu", 0, [], ("cpu", "gloo", 2)),
        ("mps", 0, [], ("cpu", "gloo", 2)),  # a Mac
        ("cuda", 1, [], ("cuda", "nccl", 1)),
        ("cuda", 4, [], ("cuda", "nccl", 2)),
        ("cuda", 1, ["-nproc", 2, "-backend", "gloo"], ("cuda", "gloo", 2)),
        ("cpu", 0, ["-backend", "nccl"], "-backend nccl needs CUDA devices, a torch built with nccl, and no -device cpu"),
        ("cuda", 1, ["-nproc", 2], "nccl wants a GPU for each of the 2 processes, this machine has 1 GPU: start fewer"),
    ],
)
def test_device_backend_and_processes_fit_together(monkeypatch, device, gpus, flags, settled):
    args = arguments(*flags)
    args.device = torch.device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    if isinstance(settled, str):
        with pytest.raises(InputError, match=settled):
            training_flags.settle_device(args)
    else:
        training_flags.settle_device(args)
        assert (args.device.type, args.backend, args.nproc) == settled


def test_cuda_without_nccl_talks_by_gloo(monkeypatch):
    args = arguments()
    args.device = torch.device("cuda")  # as on Windows
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    training_flags.settle_device(args)
    assert (args.backend, args.nproc) == ("gloo", 2)


@pytest.mark.parametrize(("cores", "nproc", "threads"), [(8, 2, 4), (2, 2, 1), (3, 4, 1)])
def test_each_process_takes_its_share_of_the_cores(monkeypatch, cores, nproc, threads):
    args = arguments("-nproc", nproc)
    monkeypatch.setattr(group, "usable_cores", lambda: cores)
    monkeypatch.setattr(group, "leave", lambda code: None)
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))  # put back afterwards
    monkeypatch.setattr(group, "join_and_run", lambda worker, args, rank, store: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    group.run_rank(None, args, 0)
    assert args.num_threads == threads


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MASTER_PORT": "taken"}, "is in use by another program: give torchrun another one"),
        ({}, "environment variable MASTER_PORT expected, but not set: start the processes with torchrun, which sets it"),
        ({"MASTER_PORT": "80000"}, "port must have value from 0 to 65535 but was 80000: start the processes with torchrun"),
        (
            {"MASTER_PORT": "free", "GLOO_SOCKET_IFNAME": "eth99"},
            "GLOO_SOCKET_IFNAME=eth99 has no address on this machine, whose interfaces",
        ),
    ],
)
def test_where_the_processes_cannot_meet_a_sentence_says_why(run_in_fork, free_port, variables, said):
    with socket.create_server(("127.0.0.1", 0)) as server:
        ports = {"taken": str(server.getsockname()[1]), "free": str(free_port)}
        variables = {name: ports.get(value, value) for name, value in variables.items()}
        done = run_in_fork(SCRIPT, *FLAGS, RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", **variables)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", "x", "RANK=x is no whole number: start the processes with torchrun, which sets it"),
        ("MASTER_PORT", "", "MASTER_PORT= is no whole number"),
        ("RANK", "2", "RANK=2 cannot be with WORLD_SIZE=2: ranks are counted from 0"),
    ],
)
def test_variables_that_torchrun_would_not_set_are_refused(monkeypatch, name, value, said):
    for variable, number in ({"RANK": "0", "WORLD_SIZE": "2"} | {name: value}).items():
        monkeypatch.setenv(variable, number)
    with pytest.raises(InputError, match=said):
        training_flags.check(arguments())
