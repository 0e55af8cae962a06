"""Every test works on data and results in one temporary folder, so that a run leaves nothing behind in the tree."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TEMPORARY = Path(os.environ.get("COURSE_TESTS") or tempfile.mkdtemp(prefix="course-tests-"))
os.environ["COURSE_TESTS"] = str(TEMPORARY)  # a spawned worker that imports this file shall not make a folder of its own
for variable, folder in {"COURSE_DATA": "data", "COURSE_RESULTS": "results", "NUMBA_CACHE_DIR": "numba"}.items():
    os.environ[variable] = str(TEMPORARY / folder)  # before common.py is imported, here and in the scripts' processes
os.environ["MPLBACKEND"] = "Agg"


def pytest_unconfigure():
    shutil.rmtree(TEMPORARY, ignore_errors=True)


@pytest.fixture
def run_script():
    """Run a script as a learner would: run_script("m27_data_loading/cpu_layout.py", "-seed", "1").stdout."""

    def run(script: str, *flags, cwd: Path = ROOT, timeout: float = 120, **environment) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def results():
    """The folder that scripts write their results to during the tests."""
    return TEMPORARY / "results"


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """A folder of 30 JPEGs of 64x48 pixels (width and height differ, so that mixing them up is seen), 3 a person."""
    folder = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for number in range(30):
        person = folder / f"Person_{number // 3:02d}"
        person.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((64, 48), Image.Resampling.BICUBIC).save(person / f"{person.name}_{number % 3 + 1:04d}.jpg", quality=90)
    return folder
