"""lfw_dataset.py: the data set, what a worker loads, the timing's promises, and what is said about bad input."""

import contextlib
import functools
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import psutil
import pytest
import torch
from conftest import PATIENCE_S, ROOT
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info
from torchvision import transforms

from data.faces import people
from errors import InputError
from m27_data_loading import lfw_dataset, loader_timing
from m27_data_loading.image_folder import find_images
from m27_data_loading.lfw_dataset import AUGMENTATIONS, LFWDataset, collate, load_rgb
from timing import Timing

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


def start_slowly(note_start, worker: int) -> None:
    time.sleep(0.5 * worker)  # s: worker 1 is late
    note_start(worker)


def test_start_up_is_kept_apart_from_the_steady_state(faces):
    ready, note_start = loader_timing.watch_start(2)
    options = {"collate_fn": collate, "num_workers": 2, "worker_init_fn": functools.partial(start_slowly, note_start)}
    loader = DataLoader(LFWDataset(faces, transforms.ToTensor()), 4, persistent_workers=True, **options)
    begin = time.time()
    first = loader_timing.time_pass(loader, ready, 100, CPU)
    whole = time.time() - begin
    assert begin < ready.min() and ready.max() < time.time()
    assert first["startup_s"] >= 0.5 and first["seconds"] <= whole - first["startup_s"]
    assert first["images_per_s"] == 30 / first["seconds"]
    assert loader_timing.time_pass(loader, ready, 100, CPU)["startup_s"] == 0  # kept alive: started once


def batches_alive() -> set[str]:
    """Names of the shared memory that this process and its workers hold, mapped or under way; it has no name in /dev/shm any more."""
    found = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        held = [Path(f"/proc/{process.pid}/maps").read_text()]
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                held.append(str(link.readlink()))
        found.update(re.findall(r"/dev/shm/torch_\w+", "\n".join(held)))
    return found


@pytest.mark.skipif("fork" not in START_METHODS, reason="reads Linux's list of what a process has open")
@pytest.mark.parametrize("look", [None, loader_timing.describe])
def test_no_more_batches_are_in_memory_than_promised(faces, monkeypatch, look):
    promised, alive = loader_timing.batches_in_flight(2, 2, 10), []

    def slow_consumer(batches, **_):
        for batch in batches:
            yield batch
            deadline = time.time() + 5  # while the consumer is busy the workers load ahead as far as they may
            while len(alive) < 4 and len(batches_alive() - others) < promised and time.time() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            alive.append(len(batches_alive() - others))

    monkeypatch.setattr(loader_timing, "tqdm", slow_consumer)
    ready, note_start = loader_timing.watch_start(2)
    others = batches_alive()  # `ready` lies in shared memory, too
    options = {"collate_fn": collate, "num_workers": 2, "worker_init_fn": note_start}
    loader_timing.time_pass(DataLoader(LFWDataset(faces, transforms.ToTensor()), 3, **options), ready, 100, CPU, look)
    assert promised == 5 and len(alive) == 10 and max(alive) == promised, alive


def test_the_summary_is_median_and_sample_deviation():
    runs = [{"images_per_s": rate, "batches": 2, "seconds": 1.0, "startup_s": rate / 100} for rate in (10.0, 20.0, 60.0)]
    row = loader_timing.summary(2, "simple", runs)
    assert (row["images_per_s"], row["mean_images_per_s"], row["startup_s"]) == (20, 30, 0.2)
    assert row["sd_images_per_s"] == pytest.approx(np.std([10, 20, 60], ddof=1))


@pytest.mark.parametrize(("workers", "startup_s", "said"), [(1, 0.1, "augmentation"), (0, 0.0, "augmentation"), (2, 3.0, "start-up")])
def test_the_bottleneck_is_named_from_the_numbers(workers, startup_s, said):
    costs = {"decode": 200.0, "augmentation": 500.0, "transfer": 300.0, "stack": 100.0}
    row = {"augment": "simple", "num_workers": workers, "batches": 4, "images_per_s": 900.0, "startup_s": startup_s, "seconds": 2.0}
    text = loader_timing.explain(row, costs)
    assert f"The bottleneck is {said}" in text
    assert ("transfer" in text, "stack" in text) == (workers > 0, workers == 0)  # without workers nothing is handed over
    assert ("-persistent_workers" in text) == (startup_s > 0.2)


def test_the_costs_of_the_stages_are_all_there(faces):
    stages = {"read", "decode", "augmentation", "to tensor", "stack", "transfer"}
    for device, more in {"cpu": set(), "meta": {"copy to device"}}.items():  # meta: torch's device without memory, here for a GPU
        costs = loader_timing.stage_costs(find_images(faces)[:4], load_rgb, AUGMENTATIONS["simple"], torch.device(device))
        assert set(costs) == stages | more and all(cost >= 0 for cost in costs.values())


def test_a_batch_is_stacked_both_ways(faces, monkeypatch):
    made = []

    def call(stage, device):
        made.append(stage())
        return Timing([1.0])

    monkeypatch.setattr(loader_timing, "measure", call)
    loader_timing.stage_costs(find_images(faces)[:4], load_rgb, AUGMENTATIONS["simple"], torch.device("cpu"))
    stacked, handed_over = (batch for batch in made if torch.is_tensor(batch))
    assert torch.equal(stacked, handed_over) and len(stacked) == 4 and (stacked.is_shared(), handed_over.is_shared()) == (False, True)


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
    monkeypatch.setattr(loader_timing, "shared_memory", lambda: 64_000_000)
    monkeypatch.setattr(loader_timing, "available_memory", lambda: 2_000_000_000)
    loader_timing.warn_about(args, images=3000)
    said = capsys.readouterr().out
    for part in ("8 workers for 6 batches", "8 workers on 4 usable CPUs", "-pin_memory", "go on loading"):
        assert part in said
    assert "2,304 MB, and memory has 2,000:" in said and "2,304 MB, and /dev/shm has 64:" in said and "docker run --shm-size" in said
    assert args.pin_memory is False


@pytest.mark.parametrize(
    ("memory", "shared", "batch_size", "workers"),
    [(100e9, 50e9, 512, 16), (6e9, 50e9, 512, 3), (100e9, None, 512, 16), (100e9, 64e6, 512, 0), (1e9, 50e9, 8, 16), (99e9, 50e9, 8192, 2)],
)
def test_the_default_number_of_workers_fits_into_memory(monkeypatch, memory, shared, batch_size, workers):
    monkeypatch.setattr(loader_timing, "usable_cpus", lambda: 16)
    monkeypatch.setattr(loader_timing, "available_memory", lambda: int(memory))
    monkeypatch.setattr(loader_timing, "shared_memory", lambda: shared and int(shared))
    args = SimpleNamespace(batch_size=batch_size, resize=None, prefetch_factor=2)
    assert loader_timing.default_workers(args, images=13_233) == workers


def test_the_plot_shows_every_run_the_ideal_line_and_the_cores(monkeypatch):
    monkeypatch.setattr(loader_timing, "usable_cpus", lambda: 2)
    monkeypatch.setattr(loader_timing.psutil, "cpu_count", lambda logical: 4)
    runs = {"simple": {0: [90.0, 110.0], 1: [50.0, 70.0], 2: [100.0, 120.0]}, "complex": {0: [9.0, 11.0], 1: [8.0, 10.0], 2: [17.0, 19.0]}}
    passes = {(n, augment): rates for augment, by_workers in runs.items() for n, rates in by_workers.items()}
    run = {"batches": 2, "seconds": 1.0, "startup_s": 0.1}
    rows = [loader_timing.summary(*key, [{"images_per_s": rate, **run} for rate in rates]) for key, rates in passes.items()]
    figure = loader_timing.plot_sweep(rows)
    (axes,) = figure.axes
    points = [line for line in axes.lines if line.get_marker() == "."]
    assert [list(line.get_ydata()) for line in points] == list(passes.values())
    ideal = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_linestyle() == "--"]
    assert ideal == [([1, 2], [60, 120]), ([1, 2], [9, 18])]
    medians = [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "o"]
    assert medians == [[100, 60, 110], [10, 9, 18]] and len(axes.containers) == 2  # the error bars of two curves
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == ":"] == [[2, 2], [4, 4]]
    assert [text.get_text() for text in axes.texts] == ["2 usable CPUs", "4 physical cores"]
    plt.close(figure)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_folders_that_cannot_serve_are_said(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, said in {"nowhere": "does not exist", "file": "is not a folder", "empty": "holds no .jpg file"}.items():
        with pytest.raises(InputError, match=said) as error:
            find_images(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "data/download.py lfw" in str(error.value)


def test_a_folder_that_may_not_be_read_is_said(faces, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything, so that permissions alone would not do
    with pytest.raises(InputError, match=r"faces\d+ may not be read \(Permission denied\)"):
        find_images(faces)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has other permissions")
def test_a_folder_below_one_that_may_not_be_entered_is_said(tmp_path):
    (tmp_path / "closed" / "faces").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # root may enter everywhere
            os.seteuid(65534)
        with pytest.raises(InputError, match=r"faces may not be read \(Permission denied\)"):
            find_images(tmp_path / "closed" / "faces")
    finally:
        os.seteuid(user)
        (tmp_path / "closed").chmod(0o700)


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


def test_only_images_are_skipped_not_files_that_cannot_be_opened(tmp_path):
    broken = tmp_path / "cannot be opened" / "a.jpg"  # a name that reads like the reason
    broken.parent.mkdir()
    broken.write_bytes(b"")
    dataset = LFWDataset(tmp_path, transforms.ToTensor(), on_error="skip")
    assert dataset[0] == str(broken)
    broken.unlink()
    with pytest.raises(InputError, match=r"a.jpg cannot be opened: No such file"):
        dataset[0]


def test_mixed_sizes_say_how_to_resize():
    with pytest.raises(InputError, match=r"(64x48, 32x32|32x32, 64x48).*-resize 250"):
        collate([torch.zeros(3, 48, 64), torch.zeros(3, 32, 32)])


def test_a_batch_of_broken_images_only_is_empty():
    images, broken = collate(["a.jpg", "b.jpg"])
    assert len(images) == 0 and broken == ["a.jpg", "b.jpg"]


def test_a_wrong_flag_ends_with_2_and_one_line(check_refusals):
    cases = {
        ("-num_workers", "-1"): "argument -num_workers: '-1' is not allowed: a whole number of at least 0",
        ("-batch_size", "0"): "argument -batch_size: '0' is not allowed: a whole number of at least 1",
        ("-batches_to_check", "many"): "argument -batches_to_check: 'many' is not allowed",
        ("-num_workers", "1", "2"): "add -get_timing",
        ("-visualize_batch", "-get_timing"): "give one of them",
    }
    check_refusals(SCRIPT, {flags: (2, said) for flags, said in cases.items()})


# ---- as a learner runs it --------------------------------------------------------------------------------------------


def test_the_bare_run_prints_what_was_loaded(run_script, results):
    done = run_script(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "not the real LFW" in done.stdout
    assert "(512, 3, 250, 250), torch.float32, values 0.000 to 1.000, 384.0 MB" in done.stdout
    assert re.search(r"loaded +2,048 images in 4 of 4 batches, [\d,]+ images/s, start-up [\d.]+ s", done.stdout)
    assert f"2,048 images of {len({name for name, _ in people(2048, 0)}):,} people in " in done.stdout
    (row,) = json.loads((results / "lfw_dataset.json").read_text())["rows"]
    batches, mb = re.search(r"in flight  at most (\d) batch(?:es)?, ([\d,]+) MB: ", done.stdout).groups()
    assert int(batches) == min(2 * row["num_workers"] + 1, 4) and int(mb.replace(",", "")) == 384 * int(batches)


def test_every_image_of_the_picture_has_its_persons_name(copy_of_faces, monkeypatch):
    (copy_of_faces / "Person_03" / "Person_03_0002.jpg").write_bytes(b"")  # a gap that must not move the names
    monkeypatch.setitem(AUGMENTATIONS, "simple", lambda image: image)
    figures = []
    monkeypatch.setattr(lfw_dataset, "save_figure", lambda figure, *_: figures.append(figure))
    options = {"prefetch_factor": 2, "persistent_workers": False, "start_method": None, "pin_memory": False, "resize": None}
    args = SimpleNamespace(path_to_folder=copy_of_faces, on_error="skip", batch_size=30, num_workers=[0], augment="simple", **options)
    args.seed, args.device = 0, CPU
    _, broken = lfw_dataset.draw_batch(args)
    shown = [(axes.get_title(), axes.images[0].get_array()) for axes in figures[0].axes if axes.images]
    assert len(broken) == 1 and len(shown) == 29
    for name, image in shown:
        files = set(find_images(copy_of_faces / name.replace(" ", "_"))) - broken
        assert any(np.array_equal(image, np.float32(load_rgb(file)) / 255) for file in files), name
    plt.close(figures[0])


def test_a_picture_of_a_batch_from_inside_the_folder(run_script, faces, results):
    flags = ["--batch-size=8", "--num-workers", "1", "--prefetch-factor=3", "--persistent-workers", "--start-method", "spawn"]
    done = run_script(SCRIPT, "--visualize-batch", "--path-to-folder", faces, *flags, cwd=ROOT / "m27_data_loading")
    assert done.returncode == 0, done.stderr
    assert Image.open(results / "lfw_dataset_batch.png").size[0] > 1000
    content = json.loads((results / "lfw_dataset.json").read_text())
    assert content["rows"][0]["images"] == 8 and content["flags"]["start_method"] == "spawn"


def test_timing_sweeps_workers_and_augmentations(run_script, copy_of_faces, results):
    (copy_of_faces / "Person_03" / "Person_03_0002.jpg").write_bytes(b"")
    Image.new("RGB", (32, 32)).save(copy_of_faces / "Person_04" / "Person_04_0001.jpg")  # of another size
    compared = ["-num_workers", "0", "1", "4", "-augment", "both", "-batch_size", "10", "-batches_to_check", "2"]
    flags = ["-get_timing", *compared, "-on_error", "skip", "-pin_memory", "-resize", "48"]
    done = run_script(SCRIPT, *flags, "-path_to_folder", copy_of_faces)
    assert done.returncode == 0, done.stderr
    assert "5 passes of 2 batches of 10 images (of 3)" in done.stdout
    assert "warning: 4 workers for 3 batches: a worker loads whole batches, so 1 of them stay idle" in done.stdout
    assert re.findall(r"(simple|complex): .*The bottleneck is \w", done.stdout) == ["simple", "complex"]  # the machine decides which
    assert "skipped 1 broken image:" in done.stdout and "Person_03_0002.jpg" in done.stdout
    assert "Warning" not in done.stderr
    rows = json.loads((results / "lfw_dataset.json").read_text())["rows"]
    assert [(row["num_workers"], row["augment"]) for row in rows] == [(n, augment) for augment in ("simple", "complex") for n in (0, 1, 4)]
    assert all(len(row["runs_images_per_s"]) == 5 and row["batches"] == 2 for row in rows)
    assert Image.open(results / "lfw_dataset_timing.png").format == "PNG"


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
        shutil.copytree(faces, tmp_path / "many" / str(number), copy_function=os.link)
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
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert (
        re.search(r"error: (a )?DataLoader worker .*(is killed by signal|exited unexpectedly|ended while)", said)
        and "Traceback" not in said
    )
