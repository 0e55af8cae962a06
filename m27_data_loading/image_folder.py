"""Which folder of photographs is read, and which files in it."""

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from data.sample import lfw_sample
from errors import InputError
from paths import DATA

ANOTHER_FOLDER = "give a folder of .jpg files, or fetch LFW with: python data/download.py lfw"


def default_folder() -> Path:
    """The real LFW where it was downloaded, otherwise the drawn sample faces."""
    return DATA / "lfw" if (DATA / "lfw").is_dir() else lfw_sample()


def find_images(folder: str | Path) -> np.ndarray:
    """Paths of all .jpg and .jpeg files below `folder`, sorted, as one array of strings; hidden and other files are left out.

    One array and no list of Path objects: a forked worker that touches a Python object copies its memory page, one by one until
    every worker holds its own copy of the list (https://github.com/pytorch/pytorch/issues/13246).
    """
    names = []
    for place, folders, files in os.walk(folder, onerror=refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk goes on into those that stay in this list
        names += [str(Path(place, name)) for name in files if name.lower().endswith((".jpg", ".jpeg")) and not name.startswith(".")]
    if not names:
        raise InputError(f"{folder} holds no .jpg file: {ANOTHER_FOLDER}")
    return np.array(sorted(names))


def refuse_folder(error: OSError) -> None:
    """Say in an InputError why a folder cannot be read: also for one that lies below a folder that may not be entered."""
    reasons = {FileNotFoundError: "does not exist", NotADirectoryError: "is not a folder"}
    reason = reasons.get(type(error), f"may not be read ({error.strerror})")
    raise InputError(f"{error.filename} {reason}: {ANOTHER_FOLDER}") from error
