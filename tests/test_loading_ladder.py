"""loading_ladder.py: rungs that compute the same, gains taken round by round, and the run of a learner."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import ROOT
from m27_data_loading import ladder_report, loading_ladder, loading_peers, peer_process, pixel_cache
from m27_data_loading.lfw_dataset import find_images


def counts_small_pages() -> bool:
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return sys.platform != "win32" and not (huge.exists() and "[always]" in huge.read_text())


COUNT_FAULTS = """  # in a process of its own: what ran before in this one decides whether the C library keeps memory for the next
import json, sys
from m27_data_loading import loading_ladder
faults = []
for kind in (loading_ladder.FreshMemory, loading_ladder.FastLoader):
    loader = kind(sys.argv[1], 64)
    faults.append([loading_ladder.time_epoch(loader, epoch)["page_faults"] for epoch in range(6)][-1])
print(json.dumps(faults))
"""


@pytest.fixture
def rungs(faces, monkeypatch, tmp_path):
    monkeypatch.setattr(pixel_cache, "DATA", tmp_path)
    return loading_ladder.build_rungs(faces, 8, 2, seed=0)


def test_every_rung_delivers_every_image_augmented_and_shuffled(rungs):
    for name, loader in rungs.items():
        images = torch.cat([batch.clone() for batch in loader])
        assert images.shape == (30, 3, 48, 64) and images.dtype == torch.float32, name
        assert images.min() >= 0 and images.max() <= 1, name
        assert len(torch.unique(images.flatten(1), dim=0)) == 30, name


def test_the_proof_of_equality_fails_for_another_warp(faces, monkeypatch, capsys):
    files = find_images(faces).tolist()
    assert loading_ladder.prove_equal(files, 0) == 30 * 3 * 48 * 64
    assert "0 of 276,480 values differ" in capsys.readouterr().out
    monkeypatch.setattr(loading_ladder, "warp_into", lambda words, matrix, out: out.fill(0.5))
    with pytest.raises(RuntimeError, match="do not compute the same"):
        loading_ladder.prove_equal(files, 0)


@pytest.mark.skipif(not counts_small_pages(), reason="this system does not tell page faults, or hands out huge pages unasked")
def test_fresh_memory_costs_page_faults_and_the_ring_does_not(tmp_path):
    for number in range(64):
        Image.fromarray(np.full((250, 250, 3), number, np.uint8)).save(tmp_path / f"{number}.jpg")
    import resource  # not on Windows

    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fresh, ring = json.loads(done.stdout)
    assert fresh > 64 * 750_000 / resource.getpagesize() / 2  # the pages of 64 float32 images, should some be larger ones
    assert ring < fresh / 10


def test_gains_are_medians_of_ratios_within_a_round():
    def runs(*rates):
        return [{"images": 10, "images_per_s": rate, "page_faults": 0} for rate in rates]

    measured = {"a": runs(10.0, 20.0, 30.0), "b": runs(20.0, 40.0, 90.0), ladder_report.CACHED: runs(10.0, 50.0, 100.0)}
    ceilings = {
        "decode alone": runs(80.0, 80.0, 80.0),
        "write alone": runs(100.0, 100.0, 100.0),
        "decode and write": runs(40.0, 80.0, 90.0),
    }
    rows = {row["rung"]: row for row in ladder_report.table(measured | ceilings, list(measured))}
    assert (rows["a"]["x_naive"], rows["a"]["x_before"]) == (1, None)
    assert (rows["b"]["x_before"], rows["b"]["x_naive"], rows["b"]["of_ceiling"], rows["b"]["clear"]) == (2, 2, 0.5, "yes")
    assert rows[ladder_report.CACHED]["clear"] == "no" and rows[ladder_report.CACHED]["of_ceiling"] == 0.5  # against the writing alone
    assert rows["write alone"]["x_before"] is None


def test_a_verdict_needs_all_rounds_to_agree():
    assert ladder_report.in_words([1.2, 1.1, 1.4]) == "1.20x (1.10 to 1.40), faster"
    assert ladder_report.in_words([0.5, 0.9]).endswith("slower") and ladder_report.in_words([0.9, 1.2]).endswith("cannot tell")
    assert ladder_report.in_words([1.5]).endswith("cannot tell")  # one round agrees with itself


def test_peers_that_are_missing_or_do_not_start_are_named(faces, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("libopencv_core.so: cannot open shared object file")

    monkeypatch.setattr(peer_process, "installed", lambda: ["ffcv"])
    monkeypatch.setattr(peer_process, "Peer", refuse)
    assert peer_process.start_peers(faces, tmp_path, 8, 2) == {}
    said = capsys.readouterr().out
    assert "peer dali is left out: ImportError: not installed, see requirements-peers.txt" in said
    assert "peer ffcv is left out: OSError: libopencv_core.so" in said


@pytest.mark.skipif("torchdata" not in loading_peers.installed(), reason="needs a peer of requirements-peers.txt")
def test_a_peer_delivers_every_image_from_a_process_of_its_own(faces, tmp_path):
    peer = peer_process.Peer("torchdata", faces, tmp_path, 8, 2)
    assert loading_ladder.time_epoch(peer, 0)["images"] == 30


@pytest.mark.skipif(sys.platform == "win32", reason="only on Linux and macOS a test can press Ctrl-C for another process")
def test_ctrl_c_ends_soon(start_script, press_ctrl_c):
    process = start_script("m27_data_loading/loading_ladder.py", "-batch_size", "128")
    for line in process.stdout:
        if "values differ" in line:  # said before the rungs are timed
            break
    time.sleep(1)
    press_ctrl_c(process, within_s=2)


def test_the_run_of_a_learner(run_script, results):
    done = run_script("m27_data_loading/loading_ladder.py", "-quick")
    assert done.returncode == 0, done.stderr
    assert "0 of 12,000,000 values differ" in done.stdout and "Fastest loader that decodes: " in done.stdout
    rows = json.loads((results / "loading_ladder.json").read_text())["rows"]
    assert (rows[0]["rung"], rows[0]["x_naive"]) == ("the exercise", 1)
    assert {"rung", "images_per_s", "x_naive", "of_ceiling"} <= set(rows[0]) and len(rows) == 10
    assert (results / "loading_ladder_rungs.png").exists()


def test_a_missing_folder_is_said(run_script, tmp_path):
    done = run_script("m27_data_loading/loading_ladder.py", "--path-to-folder", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "does not exist" in done.stderr and done.stderr.count("\n") == 1
