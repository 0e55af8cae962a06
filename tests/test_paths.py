"""paths.py: files are there whole or not at all, and a place that cannot be written to is a sentence."""

import errno
import os
import subprocess
import sys

import pytest

import paths
from errors import InputError


def test_an_interrupted_file_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"), paths.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a right there to make a link")
def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path):
    (tmp_path / "large_disk").mkdir()
    link, file = tmp_path / "link.pt", tmp_path / "large_disk" / "real.pt"
    link.symlink_to(file)
    with paths.atomic_path(link) as temporary:
        assert temporary.parent == file.parent  # a file cannot be moved to another disk in one step
        temporary.write_text("new")
    assert link.is_symlink() and file.read_text() == "new"


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "file")
    with (
        pytest.raises(InputError, match=r"cannot write to .*file .*: set COURSE_RESULTS"),
        paths.atomic_path(paths.RESULTS / "a.json"),
    ):
        pass
    with pytest.raises(InputError, match="set COURSE_RESULTS"):  # before a script begins to measure
        paths.check_writable(paths.RESULTS)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    with pytest.raises(InputError, match="name a file in a folder"), paths.atomic_path(tmp_path / "file" / "a.rgb"):
        pass
    monkeypatch.setattr(paths, "DATA", tmp_path / "file")
    with pytest.raises(InputError, match="set COURSE_DATA"), paths.atomic_path(tmp_path / "file" / "a.rgb"):
        pass


def test_an_empty_variable_counts_as_none():
    code = "import paths; assert (paths.DATA, paths.RESULTS) == (paths.ROOT / 'data', paths.ROOT / 'results')"
    environment = {**os.environ, "COURSE_DATA": "", "COURSE_RESULTS": ""}
    subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, env=environment, check=True)


def test_what_a_killed_process_left_is_removed(tmp_path):
    path = tmp_path / "a[1].rgb"  # no pattern, though it looks like one
    code = f"""
import os, pathlib, paths
with paths.atomic_path(pathlib.Path({str(path)!r})) as temporary:
    temporary.write_bytes(b'half')
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT)
    assert len(list(tmp_path.iterdir())) == 1 and not path.exists()
    with paths.atomic_path(path) as temporary:
        temporary.write_bytes(b"whole")
    assert [left.name for left in tmp_path.iterdir()] == ["a[1].rgb"] and path.read_bytes() == b"whole"
