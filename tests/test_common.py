"""common.py: flags in every spelling, wrong ones refused in one line, tables, results, figures."""

import importlib.metadata
import json
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import common
from errors import InputError
from paths import ROOT

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


def test_data_scripts_do_without_torch():
    code = (
        "import sys, data.download, data.sample; common = sys.modules['common']; common.parse(common.new_parser('', computes=False), []); "
    )
    code += "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_table_is_aligned(capsys):
    common.print_table([{"rung": "a", "images_per_s": 1234.56, "n": 50000}, {"rung": "long name", "images_per_s": 0.0123456, "n": None}])
    lines = capsys.readouterr().out.splitlines()
    assert [len(line) for line in lines] == [len(lines[0])] * 4
    assert lines[2].split() == ["a", "1,235", "50,000"] and lines[3].split() == ["long", "name", "0.01235", "-"]


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


def test_a_results_folder_that_cannot_be_written_is_refused_before_a_script_measures(parser, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(common, "RESULTS", tmp_path / "file")
    with pytest.raises(InputError, match=r"cannot write to .*file"):
        common.parse(parser, [])
