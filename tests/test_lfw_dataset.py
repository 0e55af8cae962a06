"""lfw_dataset.py: the data set, what a worker loads, the timing's promises, and what is said about bad input."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info
from torchvision import transforms

from common import InputError
from m27_data_loading import loader_timing
from m27_data_loading.lfw_dataset import AUGMENTATIONS, LFWDataset, collate, find_images, load_rgb

CPU = torch.device("cpu")
SCRIPT = "m27_data_loading/lfw_dataset.py"
START_METHODS = ["fork", "spawn"] if sys.platform == "linux" else ["spawn"]


class WhoLoads(LFWDataset):
    """Each image as the number of the worker that loaded it."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(get_worker_info().id)


class AlwaysTheFirst(LFWDataset):
    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(0)


@pytest.fixture
def copy_of_faces(faces, tmp_path):
    return Path(shutil.copytree(faces, tmp_path / "faces"))


# ---- the data set ----------------------------------------------------------------------------------------------------


def test_an_item_is_one_float32_chw_tensor(faces):
    dataset = LFWDataset(faces, transforms.ToTensor())
    assert len(dataset) == 30
    assert dataset[4].shape == (3, 48, 64) and dataset[4].dtype == torch.float32
    pixels = np.array(Image.open(faces / "Person_01" / "Person_01_0002.jpg"))
    assert torch.equal(dataset[4], torch.from_numpy(pixels.transpose(2, 0, 1)) / 255)
    assert dataset.person(4) == "Person 01"


def test_hidden_and_foreign_files_are_ignored(copy_of_faces):
    (copy_of_faces / ".hidden").mkdir()
    for stray in ("notes.txt", ".thumbnail.jpg", ".hidden/a.jpg", "Person_00/.DS_Store"):
        (copy_of_faces / stray).write_bytes(b"not an image")
    (copy_of_faces / "upper.JPG").write_bytes((copy_of_faces / "Person_00/Person_00_0001.jpg").read_bytes())
    (copy_of_faces / "upper.jpeg").write_bytes((copy_of_faces / "Person_00/Person_00_0001.jpg").read_bytes())
    assert len(find_images(copy_of_faces)) == 32


def test_a_folder_below_a_hidden_one_is_taken(faces, tmp_path):
    shutil.copytree(faces, tmp_path / ".cache" / "faces")
    assert len(find_images(tmp_path / ".cache" / "faces")) == 30


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    kind = "JPEG" if mode in ("L", "CMYK") else "PNG"  # a PNG under the name .jpg, as the web has them
    Image.new(mode, (8, 6)).save(tmp_path / "a.jpg", kind)
    assert load_rgb(str(tmp_path / "a.jpg")).mode == "RGB"
    assert LFWDataset(tmp_path, transforms.ToTensor())[0].shape == (3, 6, 8)


def test_the_augmentation_differs_by_image_worker_and_epoch(faces):
    dataset = AlwaysTheFirst(faces, transforms.Compose([AUGMENTATIONS["simple"], transforms.ToTensor()]))
    loader = DataLoader(dataset, 15, num_workers=2)
    images = torch.cat([batch for _ in range(2) for batch in loader])
    assert len(torch.unique(images.flatten(1), dim=0)) == 60


# ---- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_worker_loads_whole_batches(faces):
    workers = [set(batch.tolist()) for batch in DataLoader(WhoLoads(faces, None), 8, num_workers=3)]
    assert workers == [{0}, {1}, {2}, {0}]


@pytest.mark.parametrize("method", START_METHODS)
def test_workers_load_the_same_however_they_start(faces, method):
    dataset = LFWDataset(faces, transforms.ToTensor())
    loader = DataLoader(dataset, 8, num_workers=2, multiprocessing_context=method, collate_fn=collate)
    images = torch.cat([batch for batch, _ in loader])
    assert torch.equal(images, torch.stack([dataset[index] for index in range(30)]))


def test_exactly_as_many_batches_as_asked_for_are_fetched(faces):
    fetched = []

    class Counting(LFWDataset):
        def __getitem__(self, index: int) -> torch.Tensor:
            fetched.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Counting(faces, transforms.ToTensor()), 4, collate_fn=collate)
    ready, _ = loader_timing.watch_start(0)
    run = loader_timing.time_pass(loader, ready, 3, CPU)
    assert (run["batches"], run["images"], len(fetched)) == (3, 12, 12)
    assert loader_timing.time_pass(loader, ready, 100, CPU)["images"] == 30  # all there are, the last batch is smaller


def test_start_up_is_kept_apart_from_the_steady_state(faces):
    ready, note_start = loader_timing.watch_start(2)
    options = {"collate_fn": collate, "num_workers": 2, "worker_init_fn": note_start}
    loader = DataLoader(LFWDataset(faces, transforms.ToTensor()), 4, persistent_workers=True, **options)
    begin = time.time()
    first, second = (loader_timing.time_pass(loader, ready, 100, CPU) for _ in range(2))
    assert begin < ready.min() and ready.max() < time.time()
    assert first["startup_s"] > 0 and second["startup_s"] == 0  # kept alive: started once


def test_the_summary_is_median_and_sample_deviation():
    runs = [{"images_per_s": rate, "batches": 2, "seconds": 1.0, "startup_s": rate / 100} for rate in (10.0, 20.0, 60.0)]
    row = loader_timing.summary(2, "simple", runs)
    assert (row["images_per_s"], row["mean_images_per_s"], row["startup_s"]) == (20, 30, 0.2)
    assert row["sd_images_per_s"] == pytest.approx(np.std([10, 20, 60], ddof=1))


@pytest.mark.parametrize(("workers", "startup_s", "said"), [(1, 0.1, "augmentation"), (0, 0.0, "augmentation"), (2, 3.0, "start-up")])
def test_the_bottleneck_is_named_from_the_numbers(workers, startup_s, said):
    costs = {"decode": 200.0, "augmentation": 500.0, "transfer": 300.0}
    row = {"augment": "simple", "num_workers": workers, "batches": 4, "images_per_s": 900.0, "startup_s": startup_s, "seconds": 2.0}
    text = loader_timing.explain(row, costs)
    assert f"The bottleneck is {said}" in text
    assert ("transfer" in text) == (workers > 0)  # without workers nothing is handed over
    assert ("-persistent_workers" in text) == (startup_s > 0.2)


def test_the_costs_of_the_stages_are_all_there(faces):
    costs = loader_timing.stage_costs(find_images(faces)[:4], load_rgb, AUGMENTATIONS["simple"], CPU)
    assert set(costs) == {"read", "decode", "augmentation", "to tensor", "transfer"} and all(cost >= 0 for cost in costs.values())


def test_what_will_not_help_is_said_before_the_run(capsys, monkeypatch):
    args = SimpleNamespace(
        num_workers=[1, 8],
        batch_size=512,
        resize=None,
        prefetch_factor=2,
        pin_memory=True,
        persistent_workers=True,
        batches_to_check=2,
        device=CPU,
    )
    monkeypatch.setattr(loader_timing, "usable_cpus", lambda: 4)
    monkeypatch.setattr(loader_timing.Path, "is_dir", lambda self: True)
    monkeypatch.setattr(loader_timing.shutil, "disk_usage", lambda _: SimpleNamespace(free=64_000_000))
    loader_timing.warn_about(args, images=3000)
    said = capsys.readouterr().out
    for part in ("8 workers for 6 batches", "8 workers on 4 usable CPUs", "-pin_memory", "go on loading", "2,304 MB of shared memory"):
        assert part in said
    assert args.pin_memory is False


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_folders_that_cannot_serve_are_said(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, said in {"nowhere": "does not exist", "file": "is a file, not a folder", "empty": "holds no .jpg file"}.items():
        with pytest.raises(InputError, match=said) as error:
            find_images(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "data/download.py lfw" in str(error.value)


def test_a_folder_that_may_not_be_read_is_said(faces, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything, so that permissions alone would not do
    with pytest.raises(InputError, match=r"faces\d+ may not be read \(Permission denied\)"):
        find_images(faces)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_or_skipped(copy_of_faces, damage, workers):
    broken = copy_of_faces / "Person_03" / "Person_03_0002.jpg"
    broken.write_bytes({"truncated": broken.read_bytes()[:400], "empty": b"", "text": b"no image at all"}[damage])
    options = {"batch_size": 8, "num_workers": workers, "collate_fn": collate}
    with pytest.raises(InputError, match=re.escape(broken.name)):
        list(DataLoader(LFWDataset(copy_of_faces, transforms.ToTensor()), **options))
    batches = list(DataLoader(LFWDataset(copy_of_faces, transforms.ToTensor(), on_error="skip"), **options))
    assert sum(len(images) for images, _ in batches) == 29
    assert [name for _, names in batches for name in names] == [str(broken)]


def test_mixed_sizes_say_how_to_resize():
    with pytest.raises(InputError, match=r"64x48, 32x32|32x32, 64x48.*-resize 250"):
        collate([torch.zeros(3, 48, 64), torch.zeros(3, 32, 32)])


def test_a_batch_of_broken_images_only_is_empty():
    images, broken = collate(["a.jpg", "b.jpg"])
    assert len(images) == 0 and broken == ["a.jpg", "b.jpg"]


def test_a_wrong_flag_ends_with_2_and_one_line(start_script):
    wrong = {
        "argument -num_workers: '-1' is not allowed: a whole number of at least 0": ["-num_workers", "-1"],
        "argument -batch_size: '0' is not allowed: a whole number of at least 1": ["-batch_size", "0"],
        "argument -batches_to_check: 'many' is not allowed": ["-batches_to_check", "many"],
        "add -get_timing": ["-num_workers", "1", "2"],
        "give one of them": ["-visualize_batch", "-get_timing"],
    }
    started = {said: start_script(SCRIPT, *flags) for said, flags in wrong.items()}  # side by side: most of it is waiting for imports
    for said, process in started.items():
        _, error = process.communicate(timeout=60)
        assert process.returncode == 2
        assert said in error and error.count("\n") == 1


# ---- as a learner runs it --------------------------------------------------------------------------------------------


def test_the_bare_run_prints_what_was_loaded(run_script, results):
    done = run_script(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "not the real LFW" in done.stdout
    assert "(512, 3, 250, 250), torch.float32, values 0.000 to 1.000, 384.0 MB" in done.stdout
    assert re.search(r"loaded +2,048 images in 4 of 4 batches, [\d,]+ images/s, start-up [\d.]+ s", done.stdout)
    assert (results / "lfw_dataset.json").exists()


def test_a_picture_of_a_batch_from_inside_the_folder(run_script, faces, results):
    done = run_script(SCRIPT, "--visualize-batch", "--path-to-folder", faces, "--batch-size=8", cwd=ROOT / "m27_data_loading")
    assert done.returncode == 0, done.stderr
    assert Image.open(results / "lfw_dataset_batch.png").size[0] > 1000


def test_timing_sweeps_workers_and_augmentations(run_script, copy_of_faces, results):
    (copy_of_faces / "Person_03" / "Person_03_0002.jpg").write_bytes(b"")
    compared = ["-num_workers", "0", "1", "4", "-augment", "both", "-batch_size", "10", "-batches_to_check", "2"]
    flags = ["-get_timing", *compared, "-on_error", "skip", "-pin_memory"]
    done = run_script(SCRIPT, *flags, "-path_to_folder", copy_of_faces)
    assert done.returncode == 0, done.stderr
    assert "5 passes of 2 batches of 10 images (of 3)" in done.stdout
    assert "warning: 4 workers for 3 batches: a worker loads whole batches, so 1 of them stay idle" in done.stdout
    assert re.search(r"simple: .*The bottleneck is \w+", done.stdout) and re.search(
        r"complex: .*The bottleneck is augmentation", done.stdout
    )
    assert "skipped 1 broken image:" in done.stdout and "Person_03_0002.jpg" in done.stdout
    assert "Warning" not in done.stderr
    rows = json.loads((results / "lfw_dataset.json").read_text())["rows"]
    assert [(row["num_workers"], row["augment"]) for row in rows] == [(n, augment) for augment in ("simple", "complex") for n in (0, 1, 4)]
    assert all(len(row["runs_images_per_s"]) == 5 and row["batches"] == 2 for row in rows)


def test_a_broken_image_ends_the_run_with_a_sentence(run_script, copy_of_faces):
    (copy_of_faces / "Person_03" / "Person_03_0002.jpg").write_bytes(b"")
    done = run_script(SCRIPT, "-path_to_folder", copy_of_faces, "-num_workers", "2")
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: ") and "Person_03_0002.jpg cannot be read as an image" in said and "Traceback" not in done.stderr


@pytest.fixture
def endless_run(faces, tmp_path, start_script):
    """The script, loading a folder that keeps it busy for long; its process and its two workers, once they are there."""
    for number in range(400):
        shutil.copytree(faces, tmp_path / "many" / str(number))
    flags = [
        "-path_to_folder",
        tmp_path / "many",
        "-batch_size",
        "16",
        "-num_workers",
        "2",
        "-augment",
        "complex",
        "-batches_to_check",
        "100000",
    ]
    process = start_script(SCRIPT, *flags, "-start_method", "fork")  # so that the process's children are its workers and nothing else
    parent, deadline = psutil.Process(process.pid), time.time() + 60
    while len(parent.children()) < 2 and time.time() < deadline:
        time.sleep(0.01)
    return process, parent.children()


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("torch*")}


@pytest.mark.skipif("fork" not in START_METHODS, reason="finds the workers by forking them")
@pytest.mark.parametrize("after_s", [0.2, 1.5])
def test_ctrl_c_ends_soon_and_leaves_nothing(endless_run, press_ctrl_c, after_s):
    process, workers = endless_run
    shared = shared_memory()
    time.sleep(after_s)
    press_ctrl_c(process, within_s=2)
    assert len(workers) == 2 and shared_memory() <= shared


@pytest.mark.skipif("fork" not in START_METHODS, reason="finds the workers by forking them")
def test_a_killed_worker_is_said(endless_run):
    process, workers = endless_run
    time.sleep(0.5)
    workers[0].kill()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert re.search(r"error: DataLoader worker .*(is killed by signal|exited unexpectedly)", said) and "Traceback" not in said
