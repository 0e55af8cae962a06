"""fast_loader.py and pixel_cache.py: equal to torchvision, a pure function of the seed, bounded memory, whole files."""

import errno
import gc
import math
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.transforms import functional

from errors import InputError
from m27_data_loading import fast_loader, pixel_cache
from m27_data_loading.affine import as_words, inverse_matrices, random_affine, warp_into, warp_with_numpy
from m27_data_loading.fast_loader import FastLoader, decode_into
from m27_data_loading.image_folder import find_images
from m27_data_loading.lfw_dataset import load_rgb


@pytest.fixture
def loader(faces):
    return FastLoader(faces, batch_size=8)


@pytest.fixture
def copy_of_faces(faces, tmp_path):
    return Path(shutil.copytree(faces, tmp_path / "faces"))


@pytest.fixture
def cached(copy_of_faces, monkeypatch, tmp_path):
    monkeypatch.setattr(pixel_cache, "DATA", tmp_path)
    return lambda: FastLoader(copy_of_faces, batch_size=8, cache=True)


def padded(image: np.ndarray) -> np.ndarray:
    return np.append(image.reshape(-1), np.uint8(0))


def expected(image: Image.Image, angle: float, right: float, down: float, zoom: float) -> np.ndarray:
    return functional.to_tensor(functional.affine(image, angle, [right, down], zoom, [0.0, 0.0])).numpy()


# ---- the augmentation ------------------------------------------------------------------------------------------------

BY_HAND = [(0, 0, 0, 1), (0, 5, -3, 1), (90, 0, 0, 1), (45, 10, 10, 0.1), (-30, 0, 0, 9), (5, 200, 0, 1), (180, 1, 2, 0.5), (1e-9, 0, 0, 1)]


@pytest.mark.parametrize("warp", [warp_into, warp_with_numpy])
@pytest.mark.parametrize("shape", [(48, 64), (1, 1), (250, 3)])
def test_every_value_is_torchvisions(warp, shape):
    height, width = shape
    rng = np.random.default_rng(1)
    parameters = np.vstack([random_affine(rng, 60, height, width), np.array(BY_HAND, float)])
    out = np.empty((3, height, width), np.float32)
    for parameter, matrix in zip(parameters, inverse_matrices(parameters, height, width), strict=True):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        out.fill(np.nan)
        warp(as_words(padded(image), height, width), matrix, out)
        np.testing.assert_array_equal(out, expected(Image.fromarray(image), *parameter), err_msg=str(parameter))


def test_the_parameters_are_those_of_the_exercises_random_affine():
    angle, right, down, zoom = random_affine(np.random.default_rng(0), 20_000, 100, 200).T
    assert -5 <= angle.min() < -4.9 and 4.9 < angle.max() <= 5
    assert (right.min(), right.max()) == (-20, 20) and (down.min(), down.max()) == (-10, 10)
    assert np.array_equal(right, np.round(right)) and 0.5 <= zoom.min() < 0.51 and 1.99 < zoom.max() <= 2
    assert math.isclose(zoom.mean(), 1.25, abs_tol=0.02)


# ---- pixels ----------------------------------------------------------------------------------------------------------


def test_decoded_pixels_are_pils(faces):
    pixels = np.empty((48, 64, 3), np.uint8)
    for file in find_images(faces):
        decode_into(str(file), pixels)
        np.testing.assert_array_equal(pixels, np.asarray(load_rgb(str(file))))


@pytest.mark.parametrize("missing", ["numba", "simplejpeg"])
def test_without_a_compiled_package_the_batches_are_the_same(loader, faces, missing, tmp_path):
    code = f"""
import sys; sys.modules[{missing!r}] = None  # as if it were not installed
import torch; from m27_data_loading.fast_loader import FastLoader
torch.save(torch.cat([batch.clone() for batch in FastLoader({str(faces)!r}, 8)]), {str(tmp_path / "batches.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    whole = torch.cat([batch.clone() for batch in loader])
    assert torch.equal(whole, torch.load(tmp_path / "batches.pt", weights_only=True))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_kind_of_image_is_taken(tmp_path, mode):
    path = tmp_path / "a.jpg"
    Image.new(mode, (8, 6)).save(path, "JPEG" if mode in ("L", "CMYK") else "PNG")
    pixels = np.empty((6, 8, 3), np.uint8)
    decode_into(str(path), pixels)
    np.testing.assert_array_equal(pixels, np.asarray(load_rgb(str(path))))


@pytest.mark.parametrize("size", [(32, 32), (128, 100)])
def test_another_size_is_named(copy_of_faces, size):
    Image.new("RGB", size).save(copy_of_faces / "Person_09" / "odd.jpg")
    said = rf"odd.jpg has {size[0]}x{size[1]} pixels, the first image 64x48: .*PIL.*lfw_dataset.py -resize 250"
    with pytest.raises(InputError, match=said):
        list(FastLoader(copy_of_faces, 8))


def test_a_broken_image_is_named_and_the_loader_can_be_used_again(copy_of_faces):
    broken = copy_of_faces / "Person_03" / "Person_03_0002.jpg"
    whole = broken.read_bytes()
    loader = FastLoader(copy_of_faces, 8)
    broken.write_bytes(whole[:300])
    with pytest.raises(InputError, match=broken.name):
        list(loader)
    broken.write_bytes(whole)
    assert sum(len(batch) for batch in loader) == 30


# ---- the loader ------------------------------------------------------------------------------------------------------


def test_an_epoch_holds_each_image_once(loader, monkeypatch):
    asked = []
    decode = fast_loader.decode_into
    monkeypatch.setattr(fast_loader, "decode_into", lambda path, pixels: asked.append(path) or decode(path, pixels))
    shapes = [tuple(batch.shape) for batch in loader]
    assert sorted(asked) == loader.files
    assert shapes == [(8, 3, 48, 64)] * 3 + [(6, 3, 48, 64)] and len(loader) == 4


def test_batches_depend_on_seed_and_epoch_only(faces):
    def epoch(number, seed=0, threads=0):
        loader = FastLoader(faces, 8, threads, seed)
        loader.set_epoch(number)
        return torch.cat([batch.clone() for batch in loader])

    assert torch.equal(epoch(0), epoch(0)) and torch.equal(epoch(3), epoch(3, threads=5)) and torch.equal(epoch(3), epoch(3, threads=1))
    assert not torch.equal(epoch(0), epoch(1)) and not torch.equal(epoch(0), epoch(0, seed=1))


def test_a_batch_is_the_chosen_images_warped_by_their_parameters(faces):
    loader = FastLoader(faces, 8, shuffle=False)
    parameters = random_affine(np.random.default_rng((0, 0)), 30, 48, 64)
    images = torch.cat([batch.clone() for batch in loader]).numpy()
    for file, parameter, image in zip(loader.files, parameters, images, strict=True):
        np.testing.assert_array_equal(image, expected(load_rgb(file), *parameter))


def test_a_batch_is_valid_until_the_next_is_asked_for(faces, monkeypatch):
    loader = FastLoader(faces, 4)
    kept = [batch.clone() for batch in loader]
    submitted, start_batch = [], loader.start_batch
    monkeypatch.setattr(loader, "start_batch", lambda *a: submitted.append(start_batch(*a)) or submitted[-1])
    places = []
    for number, batch in enumerate(loader):
        for _, tasks in submitted:  # all that the threads may do until the next batch is asked for
            wait(tasks)
        assert torch.equal(batch, kept[number])
        places.append(batch.data_ptr())
    assert len(set(places)) == fast_loader.RING and places[0] == places[fast_loader.RING]


def test_a_second_iteration_at_the_same_time_is_refused(loader):
    first = iter(loader)
    next(first)
    with pytest.raises(RuntimeError, match="one iteration at a time"):
        next(iter(loader))
    first.close()
    assert len(list(loader)) == 4


def test_an_iteration_that_is_left_stops_its_threads(loader):
    before = psutil.Process().num_threads()
    for _ in loader:
        break
    gc.collect()
    assert psutil.Process().num_threads() <= before


def test_memory_does_not_grow_over_twenty_epochs(tmp_path):
    for number in range(24):
        Image.effect_noise((250, 250), 50).save(tmp_path / f"{number}.jpg")
    loader = FastLoader(tmp_path, 8)
    resident = []
    for epoch in range(22):
        loader.set_epoch(epoch)
        for _ in loader:
            pass
        resident.append(psutil.Process().memory_info().rss)
    assert resident[-1] - resident[1] < 12e6  # bytes: two of the ring's batches; one batch kept an epoch would be 120 MB


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_holds_the_jpegs_pixels(cached, copy_of_faces):
    loader = cached()
    pixels = np.asarray(loader.cache[:-1]).reshape(30, 48, 64, 3)
    for file, image in zip(loader.files, pixels, strict=True):
        np.testing.assert_array_equal(image, np.asarray(load_rgb(file)))
    decoding = FastLoader(copy_of_faces, 8)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loader, decoding, strict=True))


def test_the_cache_is_written_once(cached, monkeypatch):
    cached()
    monkeypatch.setattr(pixel_cache, "write_cache", lambda *_: pytest.fail("written again"))
    cached()


def test_a_folder_has_one_cache_however_it_is_spelled(cached, copy_of_faces, tmp_path, monkeypatch):
    cached()
    (cache,) = (tmp_path / "cache").iterdir()
    written = cache.stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    for spelling in ("faces", "./faces/", tmp_path / "cache" / ".." / "faces"):
        FastLoader(spelling, batch_size=8, cache=True)
        assert list((tmp_path / "cache").iterdir()) == [cache] and cache.stat().st_mtime_ns == written


def test_names_that_look_like_patterns_or_are_no_text(faces, monkeypatch, tmp_path):
    monkeypatch.setattr(pixel_cache, "DATA", tmp_path)
    folder = Path(shutil.copytree(faces, tmp_path / "faces[1]"))
    if sys.platform == "linux":  # others take no such name
        (folder / "Person_00").rename(folder / os.fsdecode(b"Person\xff"))
    FastLoader(folder, 8, cache=True)
    (folder / "Person_05" / "Person_05_0001.jpg").unlink()
    FastLoader(folder, 8, cache=True)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the stale one is gone


def test_what_a_killed_write_left_of_another_state_is_removed(cached, copy_of_faces, tmp_path):
    cached()
    (cache,) = (tmp_path / "cache").iterdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    cache.rename(cache.with_name(f".{cache.name}.{platform.node()}.{ended.pid}.part.rgb"))
    (copy_of_faces / "Person_05" / "Person_05_0001.jpg").unlink()
    cached()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_no_right_to_write_is_a_sentence_of_its_own_kind(cached, tmp_path):
    (tmp_path / "cache").write_text("in the way")  # root may write anywhere, but not below a file
    with pytest.raises(pixel_cache.NoPlace, match="decoded pixels cannot be kept: cannot write to"):
        cached()


def test_a_part_of_the_folder_has_a_cache_of_its_own(cached, copy_of_faces, tmp_path):
    cached()
    few = FastLoader(copy_of_faces, batch_size=8, cache=True, limit=5)
    assert len(few.cache) == 5 * 48 * 64 * 3 + 1 and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("change", ["rewritten", "added", "removed", "renamed", "cut off"])
def test_a_stale_cache_is_made_anew(cached, copy_of_faces, tmp_path, change):
    cached()
    image = copy_of_faces / "Person_05" / "Person_05_0001.jpg"
    if change == "rewritten":
        Image.new("RGB", (64, 48), "red").save(image)
    elif change == "added":
        shutil.copy(image, image.with_name("Person_05_0004.jpg"))
    elif change == "removed":
        image.unlink()
    elif change == "renamed":
        image.rename(image.with_name("Person_05_0009.jpg"))
    else:
        (cache,) = (tmp_path / "cache").iterdir()
        cache.write_bytes(cache.read_bytes()[:1000])
    loader = cached()
    pixels = np.asarray(loader.cache[:-1]).reshape(-1, 48, 64, 3)
    assert all(np.array_equal(image, np.asarray(load_rgb(file))) for file, image in zip(loader.files, pixels, strict=True))
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the stale one is gone


def test_a_full_disk_leaves_no_half_cache(cached, tmp_path, monkeypatch):
    class FullDisk:
        def __init__(self, path, mode):
            self.file, self.free = open(path, mode), 100_000  # noqa: PTH123, SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.free -= memoryview(data).nbytes
            if self.free < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", *a, **k: FullDisk(self, mode) if mode == "wb" else opened(self, mode, *a, **k))
    with pytest.raises(OSError, match="No space"):
        cached()
    assert list((tmp_path / "cache").iterdir()) == []


def test_too_little_space_is_said_before_the_work(cached, monkeypatch):
    monkeypatch.setattr(pixel_cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(InputError, match=r"decoded pixels need 0.0 GB .* COURSE_DATA"):
        cached()
