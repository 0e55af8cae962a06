"""Where data and results lie, and files that are there whole or not at all.

The environment variables COURSE_DATA and COURSE_RESULTS move the data and the results elsewhere (a read-only checkout, say).
"""

import contextlib
import glob
import os
import pickle
import platform
import re
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NoReturn

import psutil

from errors import FULL_DISK, InputError

ROOT = Path(__file__).resolve().parent
DATA = Path(os.environ.get("COURSE_DATA") or ROOT / "data")  # an empty variable counts as none, as in the Makefile
RESULTS = Path(os.environ.get("COURSE_RESULTS") or ROOT / "results")
# What is raised by reading a damaged file of npz or of torch.save.
DAMAGED = (OSError, ValueError, LookupError, EOFError, RuntimeError, TypeError, AttributeError, AssertionError)
DAMAGED += (zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError)


def display_path(path: Path) -> str:
    """Path as the user would type it: relative to the working folder where it lies below it."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def check_writable(folder: Path) -> None:
    """Make the folder where it is missing; InputError where nothing can be written into it, before the work and not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        refuse_writing(folder, error)


def check_file_place(flag: str, file: Path) -> None:
    """InputError where the file that `flag` names could not be written: a folder, a device, or in a folder that may not be written to."""
    check_writable(file.parent)  # first: in a folder that may not be entered even is_dir() fails
    try:
        folder, other = file.is_dir(), file.exists() and not file.is_file()
        temporary_name(file.resolve()).exists()
    except OSError as error:  # the name is too long, or that under which the file is written
        raise InputError(f"{flag} {file.name[:40]}... cannot be a file ({error.strerror}): give another name") from error
    if folder or other:
        raise InputError(f"{flag} {file} is {'a folder' if folder else 'no ordinary file'}: give a file")


def refuse_writing(folder: Path, error: OSError) -> NoReturn:
    """Say in an InputError that nothing can be written into the folder, and which variable moves it; a full disk is raised as it is."""
    if error.errno in FULL_DISK:
        raise error
    ours = {"COURSE_RESULTS": RESULTS, "COURSE_DATA": DATA}
    variable = next((name for name, place in ours.items() if folder.is_relative_to(place)), None)
    move = f"set {variable} to a folder that you may write to" if variable else "name a file in a folder that you may write to"
    raise InputError(f"cannot write to {display_path(folder)} ({error.strerror or error}): {move}") from error


@contextlib.contextmanager
def atomic_path(path: Path):
    """Yield a temporary name beside `path`; moved to `path` when the block ends well, removed when it does not.

    What a process left that was killed while it wrote is removed by the next one that writes the same file.
    """
    path = path.resolve()  # of a link: what it leads to, or the link would be replaced
    temporary = temporary_name(path)
    check_writable(path.parent)
    temporary.touch()
    remove_left(path.parent, glob.escape(path.name))
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part{path.suffix}")


def check_zip(file: Path) -> None:
    """Raise zipfile.BadZipFile where a part of what torch.save wrote is no longer what its checksum says: torch.load does not look."""
    with zipfile.ZipFile(file) as parts:
        if parts.testzip() or any(part.external_attr & 0x10 for part in parts.infolist()):  # 0x10: a folder, which torch reads as zeros
            raise zipfile.BadZipFile(f"{file} is damaged")


def remove_left(folder: Path, names: str) -> None:
    """Remove what processes left that were killed while they wrote a file whose name matches the pattern `names`."""
    for left in folder.glob(f".{names}.{glob.escape(platform.node())}.*.part*"):  # of this machine: several may write to one disk
        process = re.search(r"\.(\d+)\.part(\.[^.]*)?$", left.name)
        if process and not psutil.pid_exists(int(process[1])):
            left.unlink(missing_ok=True)
