"""The drawn data: as LFW and CIFAR-10 in form, the same on every run, learnable but not too easily, never half done."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENCE_S
from PIL import Image
from torch import nn

import paths
from data import sample
from data.faces import draw_face
from data.sample import SAMPLE_CLASSES, cifar10_sample, lfw_sample
from errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    return lfw_sample(tmp_path_factory.mktemp("faces") / "sample_lfw", images=200)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return cifar10_sample(tmp_path_factory.mktemp("shapes") / "sample_cifar10")


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in files)).hexdigest()


def forbidden(*_):
    raise AssertionError("drawn although the data was there")


# ---- faces -----------------------------------------------------------------------------------------------------------


def test_faces_have_the_form_of_lfw(faces):
    paths = sorted(faces.glob("*/*.jpg"))
    assert len(paths) == 200
    for path in paths:
        assert re.fullmatch(rf"{path.parent.name}_\d{{4}}\.jpg", path.name) and re.fullmatch(r"[A-Z][a-z]+_[A-Z][a-z]+", path.parent.name)
    with Image.open(paths[0]) as image:
        assert (image.size, image.mode, image.format) == ((250, 250), "RGB", "JPEG")
        assert "progressive" not in image.info and [component[1:3] for component in image.layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0
    assert 7_000 < np.mean([path.stat().st_size for path in paths]) < 10_000


def test_most_people_have_one_face_and_some_have_many():
    found = sample.people(13_233, 0)  # as many as in LFW
    counts = Counter(name for name, _ in found)
    assert len(set(found)) == 13_233 and 4_000 < len(counts) < 8_000  # LFW: 5,749 people
    assert 0.6 < np.mean([count == 1 for count in counts.values()]) < 0.8 and max(counts.values()) > 50


def test_names_do_not_run_out():
    found = sample.people(60_000, 0)
    assert len(set(found)) == 60_000


def test_a_face_depends_on_seed_name_and_number_alone(faces, tmp_path):
    again = lfw_sample(tmp_path / "again", images=200)
    assert digest(again) == digest(faces)
    fewer, other = lfw_sample(tmp_path / "fewer", images=20), lfw_sample(tmp_path / "other", images=20, seed=1)
    for path in fewer.glob("*/*.jpg"):
        assert path.read_bytes() == (faces / path.relative_to(fewer)).read_bytes()
    assert digest(other) != digest(fewer)


def test_faces_of_one_person_are_alike():
    def difference(one, other):
        return np.abs(np.asarray(one, int) - np.asarray(other, int)).mean()

    names = list(dict.fromkeys(name for name, _ in sample.people(60, 0)))
    middle = (75, 60, 175, 180)  # the head; background and clothes change from image to image
    first, second = ([draw_face(0, name, number).crop(middle) for name in names] for number in (1, 2))
    same = np.mean([difference(a, b) for a, b in zip(first, second, strict=True)])
    different = np.mean([difference(a, b) for a, b in zip(first, second[1:], strict=False)])
    assert 5 < same < 0.75 * different


# ---- shapes ----------------------------------------------------------------------------------------------------------


def load(shapes: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(shapes / f"{split}.npz", allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])


def accuracy(shapes: Path, model: nn.Module, epochs: int, rate: float) -> float:
    """Test accuracy of a model after some epochs of training on the drawn shapes."""
    (images, labels), (test_images, test_labels) = load(shapes, "train"), load(shapes, "test")
    images, test_images = images / 127.5 - 1, test_images / 127.5 - 1
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * 100)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(100):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    model.eval()
    with torch.inference_mode():
        return (model(test_images).argmax(1) == test_labels).float().mean().item()


def block(channels_in: int, channels_out: int, size: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


@pytest.fixture
def one_thread():
    """Training on one thread takes as long on a busy machine as its share of it; two would wait for each other."""
    torch.set_num_threads(1)  # until the test ends: conftest.py puts it back


def test_shapes_have_the_form_of_cifar10(shapes):
    for split, count in {"train": 10_000, "test": 2_000}.items():
        images, labels = load(shapes, split)
        assert images.shape == (count, 3, 32, 32) and images.dtype == torch.uint8
        assert labels.dtype == torch.int64 and labels.bincount().tolist() == [count // 10] * 10
    assert len(SAMPLE_CLASSES) == len(set(SAMPLE_CLASSES)) == 10


def test_no_class_has_a_colour_of_its_own(shapes):
    images, labels = load(shapes, "train")
    means = torch.stack([images[labels == label].float().mean((0, 2, 3)) for label in range(10)])  # (10, 3), of 255
    assert means.std(0).max() < 3


def test_a_linear_model_cannot_learn_the_shapes(shapes, one_thread):
    torch.manual_seed(0)
    assert accuracy(shapes, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), epochs=5, rate=1e-3) < 0.25


def test_a_convolutional_network_can(shapes, one_thread):
    torch.manual_seed(0)
    layers = [*block(3, 24, size=5, stride=2), *block(24, 48, size=3, stride=2), *block(48, 64, size=3, stride=1)]
    model = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10)).to(memory_format=torch.channels_last)
    assert accuracy(shapes, model, epochs=5, rate=1e-2) > 0.9


def test_shapes_repeat(monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "COUNTS", {"train": 1_000, "test": 500})
    one, two, other = cifar10_sample(tmp_path / "one"), cifar10_sample(tmp_path / "two"), cifar10_sample(tmp_path / "other", seed=1)
    assert digest(one) == digest(two) != digest(other)


# ---- made once -------------------------------------------------------------------------------------------------------


def test_the_second_use_draws_nothing_and_one_line_says_what_it_is(faces, monkeypatch, capsys):
    monkeypatch.setattr(sample, "save_face", forbidden)
    assert lfw_sample(faces, images=200) == faces
    line = f"data: 200 drawn sample faces in {faces} - not the real LFW; fetch that with: python data/download.py lfw\n"
    assert capsys.readouterr().out.replace("\\", "/") == line.replace("\\", "/")


@pytest.mark.parametrize("damage", ["no marker", "broken marker", "older marker", "short file", "missing file"])
def test_a_damaged_sample_is_made_anew(damage, tmp_path):
    folder = lfw_sample(tmp_path / "sample_lfw", images=6)
    whole, marker, image = digest(folder), folder / sample.MARKER, next(folder.glob("*/*.jpg"))
    if damage == "no marker":
        marker.unlink()
    elif damage == "broken marker":
        marker.write_text("{")
    elif damage == "older marker":
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "version": 0}))
    elif damage == "short file":
        image.write_bytes(image.read_bytes()[:1000])
    else:
        image.unlink()
    assert digest(lfw_sample(folder, images=6)) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["sample_lfw"]


def test_another_size_or_seed_is_made_anew_and_force_too(tmp_path, monkeypatch):
    folder = lfw_sample(tmp_path / "sample_lfw", images=4)
    assert len(list(lfw_sample(folder, images=7).glob("*/*.jpg"))) == 7
    first = digest(folder)
    assert digest(lfw_sample(folder, images=7, seed=1)) != first
    monkeypatch.setattr(sample, "save_face", forbidden)
    with pytest.raises(AssertionError):
        lfw_sample(folder, images=7, seed=1, force=True)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_run_cut_short_leaves_nothing(error, tmp_path, monkeypatch):
    def stop_at_the_third(seed, name, number, path, done=[]):  # noqa: B006
        done.append(path)
        if len(done) == 3:
            raise error
        path.write_bytes(b"half")

    monkeypatch.setattr(sample, "save_face", stop_at_the_third)
    with pytest.raises(type(error)):
        lfw_sample(tmp_path / "data" / "sample_lfw", images=6)
    assert list((tmp_path / "data").iterdir()) == []


def test_what_a_killed_run_left_is_removed_after_an_hour(tmp_path):
    old, young = tmp_path / ".sample_lfw.00000000.part", tmp_path / ".sample_lfw.11111111.part"
    for folder in (old, young):
        (folder / "Ada_Ashby").mkdir(parents=True)
    os.utime(old, (time.time() - 4000,) * 2)
    lfw_sample(tmp_path / "sample_lfw", images=2)
    assert not old.exists() and young.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write to .*file.sample_lfw .*: set COURSE_DATA"):
        lfw_sample(tmp_path / "file" / "sample_lfw", images=2)

    def read_only(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(InputError, match=r"cannot write to .*sample_cifar10 \(Permission denied\): set COURSE_DATA"):
        cifar10_sample(tmp_path / "sample_cifar10")


def test_a_folder_of_the_users_own_is_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"dear to somebody")
    with pytest.raises(InputError, match="holiday"):
        lfw_sample(tmp_path, images=2)
    assert (tmp_path / "holiday.jpg").exists()


def test_a_complete_sample_needs_no_right_to_write(faces, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", forbidden)
    lfw_sample(faces, images=200)


def test_two_scripts_that_start_together_do_not_disturb_each_other(faces, shapes, tmp_path):
    start = partial(
        subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COURSE_DATA": str(tmp_path)}
    )
    processes = {
        "data/download.py": start([sys.executable, "data/sample.py", "-images", "200"], cwd=ROOT),
        "download.py": start([sys.executable, "sample.py", "--images=200"], cwd=ROOT / "data"),
    }
    for fetch, process in processes.items():
        output, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors
        assert output.count("\n") == 2 and f"python {Path(fetch)} cifar10" in output
    assert digest(tmp_path / "sample_lfw") == digest(faces) and digest(tmp_path / "sample_cifar10") == digest(shapes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample_cifar10", "sample_lfw"]
