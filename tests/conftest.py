"""Every test works on data and results in one temporary folder, so that a run leaves nothing behind in the tree."""

import contextlib
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 600  # what has not ended by then never will; on a busy machine a run takes many times its usual seconds
TEMPORARY = Path(os.environ.get("COURSE_TESTS") or tempfile.mkdtemp(prefix="course-tests-"))
os.environ["COURSE_TESTS"] = str(TEMPORARY)  # a spawned worker that imports this file shall not make a folder of its own
for variable, folder in {"COURSE_DATA": "data", "COURSE_RESULTS": "results", "NUMBA_CACHE_DIR": "numba", "HF_HOME": "huggingface"}.items():
    os.environ[variable] = str(TEMPORARY / folder)  # before common.py is imported, here and in the scripts' processes
os.environ["MPLBACKEND"] = "Agg"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a shell; the scripts started here would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure():
    shutil.rmtree(TEMPORARY, ignore_errors=True)


@pytest.fixture(autouse=True)
def same_threads():
    """A test that calls parse() with -num_threads changes nothing for those that follow."""
    torch = sys.modules.get("torch")
    threads = torch and torch.get_num_threads()
    yield
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture
def run_script():
    """Run a script as a learner would: run_script("m27_data_loading/cpu_layout.py", "-seed", "1").stdout."""

    def run(script: str, *flags, cwd: Path = ROOT, timeout: float = PATIENCE_S, **environment) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def start_script():
    """Start a script in a process group of its own and go on; what is left of the group, on Windows of the script, is killed at the end."""
    started = []

    def start(script: str, *flags, **environment) -> subprocess.Popen:
        command, streams = [sys.executable, str(ROOT / script), *map(str, flags)], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **streams))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        process.communicate()


def run_as_main(script: str, flags: tuple, environment: dict, printed: Path, said: Path) -> None:
    """In a process of its own: run the script as `python script flags` would; its output goes to two files.

    The processes that a script of M28 starts are forked from this one, too, and need not import PyTorch again.
    """
    if hasattr(os, "setsid"):
        os.setsid()
    if script.startswith("m28") and "fork" in multiprocessing.get_all_start_methods():
        forking = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda method: forking
    for stream, file in enumerate((printed, said), start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), stream)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [script, *flags]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # as Python does at the end of a script; multiprocessing would not
        sys.exit(1)


@pytest.fixture(scope="session")
def processes():
    """Where processes come from: on Linux and macOS from one that has imported PyTorch, which takes seconds, and only forks."""
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["torchvision", "matplotlib.pyplot", "torch._dynamo", "torch.distributed.checkpoint.state_dict"])
    return context


@pytest.fixture
def start_in_fork(processes, tmp_path_factory):
    """As start_script, without the seconds that importing PyTorch takes; each script also has a test that runs it as a learner would."""
    started = []

    def start(script: str, *flags, **environment) -> multiprocessing.Process:
        folder = tmp_path_factory.mktemp("run")
        printed, said = folder / "stdout", folder / "stderr"
        process = processes.Process(target=run_as_main, args=(script, tuple(map(str, flags)), environment, printed, said))
        process.start()
        started.append(process)
        process.output = lambda: tuple(file.read_text() if file.exists() else "" for file in (printed, said))
        process.poll = lambda: process.exitcode  # as subprocess.Popen has it
        process.send_signal = lambda number: os.kill(process.pid, number)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def run_in_fork(start_in_fork):
    """As run_script, by start_in_fork."""

    def run(script: str, *flags, timeout: float = PATIENCE_S, **environment) -> subprocess.CompletedProcess:
        process = start_in_fork(script, *flags, **environment)
        process.join(timeout)
        return subprocess.CompletedProcess(flags, process.exitcode, *process.output())

    return run


def end(process, seconds: float = PATIENCE_S) -> tuple[str, str]:
    """What a forked script had printed and said when it ended."""
    process.join(seconds)
    return process.output()


@pytest.fixture
def forked_run(start_in_fork):
    """A stress_ddp.Run of a forked script, for stress_ddp.trial()."""
    import stress_ddp  # which imports common.py, so not before the folders above are named

    class Forked(stress_ddp.Run):
        def __init__(self, command: list[str], folder: Path) -> None:
            script = str(Path(command[1]).relative_to(ROOT).as_posix())
            self.process = start_in_fork(script, *command[2:], TQDM_MININTERVAL="0", COURSE_RESULTS=str(folder))
            self.process.poll = lambda: None if self.process.is_alive() else self.process.exitcode

        @property
        def step(self) -> int:
            steps = re.findall(rf" (\d+)/{stress_ddp.STEPS} \[", self.process.output()[1])
            return int(steps[-1]) if steps else 0

        def end(self) -> str:
            printed, said = end(self.process)
            assert self.process.exitcode == 0, f"{printed}\n{said[-3000:]}"
            return printed

    return Forked


@pytest.fixture
def check_refusals(start_in_fork):
    """check_refusals(script, {flags: (exit code, part of what is said)}): all side by side."""

    def check(script: str, cases: dict[tuple, tuple[int, str]], **environment) -> None:
        runs = [start_in_fork(script, *flags, **environment) for flags in cases]
        for run, (flags, (code, said)) in zip(runs, cases.items(), strict=True):
            run.join(PATIENCE_S)
            _, error = run.output()
            assert run.exitcode == code and said in error and "Traceback" not in error, (flags, error)
            assert error.count("\n") == 1 or code != 2, error

    return check


@pytest.fixture
def press_ctrl_c():
    """Press Ctrl-C as a terminal does: the script and all its processes get it; what it said, once it ended in time."""

    def press(process: subprocess.Popen, within_s: float) -> str:
        family, begin = psutil.Process(process.pid).children(recursive=True), time.time()
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
        assert time.time() - begin < within_s
        assert process.returncode != 0 and "stopped by Ctrl-C" in said and "Traceback" not in said
        alive = psutil.wait_procs(family, timeout=1)[1]  # a process that nobody waits for ends a moment after its parent
        assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []  # some containers keep the dead in the list
        return said

    return press


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
