"""loading_ladder.py: rungs that compute the same, gains taken round by round, and the run of a learner."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from errors import InputError
from m27_data_loading import ladder_report, loader_timing, loading_ladder, loading_peers, peer_process, pixel_cache
from m27_data_loading.fast_loader import FastLoader
from m27_data_loading.image_folder import find_images
from paths import ROOT


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
    fifteen = [*([0.9] * 3), *([1.1] * 12)]  # 3 of 15 coins fall so by chance in one case of 57, 4 of them in one of 17
    assert ladder_report.in_words(fifteen) == "1.10x (1.10 to 1.10), faster"
    assert ladder_report.in_words([0.9, *fifteen[1:3], 0.9, *fifteen[4:]]).endswith("cannot tell")
    assert ladder_report.interval([5, 1, 4, 2, 3]) == (1, 5) and ladder_report.interval(list(range(9))) == (1, 7)


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
    assert loading_ladder.time_epoch(peer, 0)["images"] == 30 == peer.images


class PeerOf(peer_process.Peer):
    """A peer in this process, that delivers the given batches."""

    def __init__(self, *batches: torch.Tensor) -> None:
        self.images, self.shape, self.batches = 30, (3, 48, 64), batches

    def time_epoch(self) -> dict:
        peer_process.OPENED["made up"] = self.batches
        return peer_process.time_here("made up", self.shape)


def test_a_peer_that_fails_or_delivers_something_else_is_named_and_left_out(capsys):
    class Fails(PeerOf):
        def time_epoch(self) -> dict:
            raise ValueError("no such codec:\nmp3")

    good = torch.linspace(0, 1, 30 * 3 * 48 * 64).view(30, 3, 48, 64)
    peers = {"good": PeerOf(good), "fails": Fails(), "too few": PeerOf(good[:29]), "bytes": PeerOf((255 * good).byte())}
    peers |= {"not scaled": PeerOf(255 * good), "twice scaled": PeerOf(good / 255), "channels last": PeerOf(good.permute(0, 2, 3, 1))}
    runs = loading_ladder.time_all(peers, epochs=2, images=30)
    assert list(runs) == ["good"] and len(runs["good"]) == 2
    said = capsys.readouterr().out
    assert "fails is left out: ValueError: no such codec: mp3\n" in said
    assert "too few is left out: RuntimeError: 29 images came in an epoch of 30\n" in said
    assert "bytes is left out: RuntimeError: delivers (30, 3, 48, 64), torch.uint8, 0.000 to 255.000, not (n, (3, 48, 64)), float32" in said
    assert all(f"{name} is left out: RuntimeError: delivers" in said for name in ("not scaled", "twice scaled", "channels last"))


def test_a_rung_that_leaves_images_out_ends_the_run(faces):
    with pytest.raises(RuntimeError, match="30 images came in an epoch of 31"):
        loading_ladder.time_all({"a rung": FastLoader(faces, 8)}, epochs=1, images=31)


def test_images_of_other_sizes_are_said_before_the_timing(faces, monkeypatch, tmp_path, capsys):
    folder = Path(shutil.copytree(faces, tmp_path / "faces"))
    Image.new("RGB", (32, 32)).save(folder / "Person_09" / "odd.jpg")
    (tmp_path / "cache").touch()  # in the way: decoded pixels cannot be kept
    monkeypatch.setattr(pixel_cache, "DATA", tmp_path)
    monkeypatch.setattr(loading_ladder, "time_all", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(loader_timing, "available_memory", lambda: 100_000)
    args = SimpleNamespace(path_to_folder=folder, batch_size=8, num_workers=2, seed=0, epochs=1, quick=False, peers=False)
    with pytest.raises(InputError, match=r"odd.jpg has 32x32 pixels, the first image 64x48: .*-resize 250"):
        loading_ladder.main(args)
    said = capsys.readouterr().out
    assert f"left out   {ladder_report.CACHED}: decoded pixels cannot be kept" in said
    assert "warning: batches in flight may take 1 MB, and memory has 0:" in said


@pytest.mark.skipif(sys.platform == "win32", reason="only on Linux and macOS a test can press Ctrl-C for another process")
def test_ctrl_c_ends_soon(start_script, press_ctrl_c):
    process = start_script("m27_data_loading/loading_ladder.py", "-batch_size", "128")
    for line in process.stdout:
        if "values differ" in line:  # said before the rungs are timed
            break
    time.sleep(1)
    press_ctrl_c(process, within_s=2)


def test_the_run_of_a_learner_from_inside_the_folder(run_script, results):
    done = run_script("m27_data_loading/loading_ladder.py", "--quick", "--num-workers=2", cwd=ROOT / "m27_data_loading")
    assert done.returncode == 0, done.stderr
    assert "0 of 12,000,000 values differ" in done.stdout and "Fastest loader that decodes: " in done.stdout
    rows = json.loads((results / "loading_ladder.json").read_text())["rows"]
    assert (rows[0]["rung"], rows[0]["x_naive"]) == ("the exercise", 1)
    assert {"rung", "images_per_s", "x_naive", "of_ceiling"} <= set(rows[0]) and len(rows) == 10
    assert (results / "loading_ladder_rungs.png").exists()


def test_a_missing_folder_is_said(check_refusals, tmp_path):
    check_refusals("m27_data_loading/loading_ladder.py", {("--path-to-folder", str(tmp_path / "nowhere")): (1, "does not exist")})
