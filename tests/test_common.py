"""common.py: flags in every spelling, errors of one line, honest timing, tables, files that are whole or absent."""

import errno
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import common

CPU = torch.device("cpu")


@pytest.fixture
def parser():
    made = common.new_parser("Doc.")
    made.add_argument("-num_workers", type=common.non_negative_int, nargs="+", default=[2])
    made.add_argument("-path_to_folder")
    return made


@pytest.mark.parametrize(
    "words", [["-num_workers", "4"], ["--num_workers", "4"], ["--num-workers", "4"], ["-num-workers=4"], ["--num-workers=4"]]
)
def test_a_flag_is_taken_in_every_spelling(parser, words):
    assert common.parse(parser, words).num_workers == [4]


def test_values_keep_their_hyphens(parser):
    assert common.parse(parser, ["--path-to-folder=a-b/--c", "-seed", "3"]).path_to_folder == "a-b/--c"
    assert common.parse(parser, ["-path_to_folder", "lfw-deep-funneled"]).path_to_folder == "lfw-deep-funneled"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-num_workers", "-1"], ["-num_workers", "'-1'", "at least 0"]),
        (["-num_workers", "two"], ["-num_workers", "'two'", "whole number"]),
        (["-num_worker", "2"], ["-num_worker", "there is no flag -num_worker, did you mean -num_workers?"]),
        (["-device", "tpu"], ["-device", "'tpu'", "cpu"]),
        (["-seed", "99999999999999999999"], ["-seed", "at most 4294967295"]),
        (["-num_threads", "0"], ["-num_threads", "'0'", "at least 1"]),
    ],
)
def test_a_wrong_flag_ends_with_2_and_one_line(parser, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        common.parse(parser, words)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert all(part in error for part in said)


@pytest.mark.parametrize("word", ["abc", "1.5", "-0.1", "nan", ""])
def test_a_share_lies_between_0_and_1(parser, capsys, word):
    parser.add_argument("-amount", type=common.share)
    assert common.parse(parser, ["-amount", "0.3"]).amount == 0.3
    with pytest.raises(SystemExit):
        common.parse(parser, [f"-amount={word}"])
    assert f"argument -amount: {word!r} is not allowed: a share between 0 and 1 is expected" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_here_is_refused(parser, capsys):
    with pytest.raises(SystemExit):
        common.parse(parser, ["-device", "cuda"])
    assert "cuda is not available here; available: cpu" in capsys.readouterr().err


def test_the_seed_makes_a_run_repeat(parser):
    common.parse(parser, ["-seed", "5"])
    first = torch.rand(3)
    common.parse(parser, ["-seed", "5"])
    assert torch.equal(first, torch.rand(3))


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (common.InputError("x.jpg cannot be read"), "error: x.jpg cannot be read\n"),
        (common.InputError("Caught it\nTraceback\ncommon.InputError: x.jpg cannot be read"), "error: x.jpg cannot be read\n"),
        (OSError(errno.ENOSPC, "No space left", "big.rgb"), "error: the disk is full (big.rgb): free some space and run again\n"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "error: DataLoader worker (pid 7) is killed"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_sentence(raised, said, capsys):
    common.one_sentence(type(raised), raised, None)
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1


@pytest.mark.parametrize(("rank", "world", "waits"), [("0", "2", 0), ("1", "2", 2), ("1", None, 0)])
def test_of_the_processes_of_torchrun_the_first_speaks_first(parser, capsys, monkeypatch, rank, world, waits):
    """The others wait, so that they are ended before they say the same; what they alone found is said."""
    waited = []
    monkeypatch.setattr(common.time, "sleep", waited.append)
    for name, value in {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": world}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        common.parse(parser, ["-nonsense"])
    common.one_sentence(common.InputError, common.InputError("bad"), None)
    assert stop.value.code == 2 and "error: bad" in capsys.readouterr().err and len(waited) == waits


def test_a_script_ends_with_the_sentence():
    code = "import common; common.parse(common.new_parser(''), []); raise common.InputError('x.jpg cannot be read')"
    run = subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "error: x.jpg cannot be read\n")


def test_a_defect_of_ours_keeps_its_traceback(capsys):
    common.one_sentence(KeyError, KeyError("img"), None)
    assert "KeyError: 'img'" in capsys.readouterr().err


def test_a_worker_whose_main_process_ended_is_silent(capfd):
    worker = multiprocessing.get_context("spawn").Process(target=common.one_sentence, args=(EOFError, EOFError("gone"), None))
    worker.start()
    worker.join()
    assert worker.exitcode == 0 and capfd.readouterr().err == ""
    common.one_sentence(ConnectionResetError, ConnectionResetError("reset by peer"), None)  # anywhere else it is a defect
    assert "ConnectionResetError: reset by peer" in capfd.readouterr().err


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(errno.ECONNRESET, "reset"), FileNotFoundError(errno.ENOENT, "gone")])
def test_a_worker_that_is_killed_while_it_sends_a_batch_is_said(capsys, error):
    def rebuild_storage_fd():  # where torch waits for the batch
        raise error

    with pytest.raises(type(error)) as caught:
        rebuild_storage_fd()
    common.one_sentence(caught.type, caught.value, caught.tb)
    said = capsys.readouterr().err
    assert said.startswith("error: a DataLoader worker ended while it sent a batch: memory ran out") and said.count("\n") == 1


def test_measure_sees_a_sleep_and_counts_its_runs():
    timing = common.measure(lambda: time.sleep(0.02), CPU, repeats=3)
    assert len(timing.runs_ms) == 3
    assert min(timing.runs_ms) >= 20 and timing.median_ms == statistics.median(timing.runs_ms)
    assert timing.sd_ms == pytest.approx(statistics.stdev(timing.runs_ms))


def test_alternating_measurement_takes_turns():
    called = []
    timings = common.measure_alternately({name: lambda name=name: (called.append(name), time.sleep(0.02)) for name in "ab"}, CPU, repeats=3)
    turns = "".join(name for number, name in enumerate(called) if number == 0 or name != called[number - 1])
    assert turns == "abababab" and all(len(timing.runs_ms) == 3 for timing in timings.values())


def test_data_scripts_do_without_torch():
    code = (
        "import sys, data.download, data.sample; common = sys.modules['common']; common.parse(common.new_parser('', computes=False), []); "
    )
    code += "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, check=True)


def test_the_spread_is_that_of_a_sample():
    assert common.spread([1.0, 3.0]) == pytest.approx(2**0.5)
    assert common.spread([1.0]) == 0


def test_a_table_is_aligned(capsys):
    common.print_table([{"rung": "a", "images_per_s": 1234.56, "n": 50000}, {"rung": "long name", "images_per_s": 0.0123456, "n": None}])
    lines = capsys.readouterr().out.splitlines()
    assert [len(line) for line in lines] == [len(lines[0])] * 4
    assert lines[2].split() == ["a", "1,235", "50,000"] and lines[3].split() == ["long", "name", "0.01235", "-"]


def test_an_interrupted_file_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"), common.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(common, "RESULTS", tmp_path / "file")
    with (
        pytest.raises(common.InputError, match=r"cannot write to .*file .*: set COURSE_RESULTS"),
        common.atomic_path(common.RESULTS / "a.json"),
    ):
        pass
    with pytest.raises(common.InputError, match="set COURSE_RESULTS"):  # before a script begins to measure
        common.parse(common.new_parser("Doc."), [])
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    with pytest.raises(common.InputError, match="name a file in a folder"), common.atomic_path(tmp_path / "file" / "a.rgb"):
        pass
    monkeypatch.setattr(common, "DATA", tmp_path / "file")
    with pytest.raises(common.InputError, match="set COURSE_DATA"), common.atomic_path(tmp_path / "file" / "a.rgb"):
        pass


def test_an_empty_variable_counts_as_none():
    code = "import common; assert (common.DATA, common.RESULTS) == (common.ROOT / 'data', common.ROOT / 'results')"
    environment = {**os.environ, "COURSE_DATA": "", "COURSE_RESULTS": ""}
    subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, env=environment, check=True)


def test_what_a_killed_process_left_is_removed(tmp_path):
    path = tmp_path / "a[1].rgb"  # no pattern, though it looks like one
    code = f"""
import os, pathlib, common
with common.atomic_path(pathlib.Path({str(path)!r})) as temporary:
    temporary.write_bytes(b'half')
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], cwd=common.ROOT)
    assert len(list(tmp_path.iterdir())) == 1 and not path.exists()
    with common.atomic_path(path) as temporary:
        temporary.write_bytes(b"whole")
    assert [left.name for left in tmp_path.iterdir()] == ["a[1].rgb"] and path.read_bytes() == b"whole"


def test_results_name_machine_versions_and_flags(parser, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    args = common.parse(parser, ["-seed", "9"])
    content = json.loads(common.save_results("some/where/script.py", args, [{"latency_ms": 1.5}]).read_text())
    assert set(content) == {"script", "created", "machine", "versions", "flags", "rows"}
    assert content["script"] == "script.py" and content["flags"]["seed"] == 9 and content["rows"] == [{"latency_ms": 1.5}]
    assert content["versions"]["torch"] == importlib.metadata.version("torch") and content["machine"]["usable_cpus"] >= 1


def test_a_figure_is_a_png_with_the_script_in_its_name(parser, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    path = common.save_figure(plt.figure(), "some/script.py", "rates", common.parse(parser, []), "n = 5")
    assert path.name == "script_rates.png" and path.read_bytes().startswith(b"\x89PNG")


def test_no_screen_is_said_when_a_window_is_asked_for(parser, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "agg")
    common.save_figure(plt.figure(), "script.py", "rates", common.parse(parser, ["-show"]))
    assert "open the file instead" in capsys.readouterr().out
