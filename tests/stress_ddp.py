"""Kill a training at random moments, many times, and see that it always ends with the bits of the uninterrupted run.

    python tests/stress_ddp.py                       20 trials, half of them under torchrun
    python tests/stress_ddp.py -trials 4 -script fsdp_train.py
    python tests/stress_ddp.py -trials 0 -exits 50   50 undisturbed runs, half of them under torchrun: every exit code must be 0

Each trial starts two processes, sends SIGKILL to one of them (in every third trial to the one that is just writing a checkpoint),
and lets the launcher start them again. It must end with exit code 0 and the parameters' SHA-256 of an undisturbed run, and must
have gone on from a checkpoint at most `-every` steps old. For Linux and macOS.
"""

import collections
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import new_parser, non_negative_int, parse

STEPS, EVERY = 40, 5
LAUNCHERS = ("nproc", "torchrun")
FLAGS = ["-steps", str(STEPS), "-widths", "8", "16", "32", "-num_threads", "1", "-device", "cpu"]


def command(script: str, launcher: str, flags: list[str]) -> list[str]:
    """The command line of two processes, by torchrun or by the script's own -nproc."""
    file = str(ROOT / "m28_distributed_training" / script)
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
        return [sys.executable, *torchrun, file, *FLAGS, *flags]
    return [sys.executable, file, *FLAGS, *flags]


class Run:
    """A started training: its step, read from the progress bar, and what it said, once it has ended."""

    def __init__(self, command: list[str], folder: Path) -> None:
        environment = os.environ | {"TQDM_MININTERVAL": "0", "COURSE_RESULTS": str(folder)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True)
        self.step, self.said = 0, {"stdout": "", "stderr": ""}
        self.readers = [threading.Thread(target=self.read, args=(name,), daemon=True) for name in self.said]
        for reader in self.readers:
            reader.start()

    def read(self, name: str) -> None:
        while part := os.read(getattr(self.process, name).fileno(), 65536).decode(errors="replace"):
            self.said[name] += part
            if steps := re.findall(rf" (\d+)/{STEPS} \[", part):
                self.step = int(steps[-1])

    def ranks(self) -> list[psutil.Process]:
        """The processes that train; beside them multiprocessing keeps one that cleans up, and an import asks ldconfig for libraries."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # has ended just now
                if not any(other in " ".join(child.cmdline()) for other in ("resource_tracker", "ldconfig")):
                    found.append(child)
        return found

    def end(self) -> str:
        code = self.process.wait(timeout=180)
        for reader in self.readers:
            reader.join()
        assert code == 0, f"exit code {code}\n{self.said['stdout']}\n{self.said['stderr'][-3000:]}"
        return self.said["stdout"]


def parameters_of(said: str) -> str:
    return re.search(r"parameters sha256 (\w{64})", said)[1]


def kill_one(run: Run, file: Path, while_writing: bool, rng: random.Random) -> tuple[int, str]:
    """SIGKILL one of the two processes at a random step, or the one that writes a checkpoint; the last step seen before that, and which."""
    target = rng.randrange(1, STEPS + 1)
    while run.step < target and run.process.poll() is None:
        time.sleep(0.001)
    while while_writing and run.process.poll() is None:
        if parts := list(file.parent.glob(f".{file.name}.*.part*")):  # named after the process that writes it
            target, writer = run.step, int(re.search(r"\.(\d+)\.part", parts[0].name)[1])
            os.kill(writer, signal.SIGSTOP)
            time.sleep(0.001)  # until it has stopped
            if parts[0].exists():  # it is writing still
                os.kill(writer, signal.SIGKILL)
                return target, "while a checkpoint was written"
            os.kill(writer, signal.SIGCONT)
    target = run.step
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        rng.choice(run.ranks()).kill()
        return target, "between"
    return target, "too late, when it had ended"


def trial(script: str, launcher: str, while_writing: bool, parameters: str, rng: random.Random, start=Run) -> tuple[int, str]:
    """One killed run, checked; the steps that had to be done again, as far as the progress bar tells, and when it was killed.

    `start` of a command and a folder for results makes the Run.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.pt")
        flags = ["-checkpoint", str(file), "-every", str(EVERY), "-resume", *(["-max_restarts", "3"] if launcher == "nproc" else [])]
        run = start(command(script, launcher, flags), Path(folder))
        killed, when = kill_one(run, file, while_writing, rng)
        said = run.end()
        resumed = [int(step) for step in re.findall(r"resumed at step (\d+)", said)]
        assert parameters_of(said) == parameters, f"other parameters after a kill at step {killed}"
        begun_anew = not resumed and killed <= EVERY  # there was no checkpoint yet
        ended = not resumed and killed == STEPS  # all was done
        assert begun_anew or ended or (resumed and resumed[0] >= killed - EVERY), f"killed at step {killed}, resumed at {resumed}"
        assert not list(file.parent.glob(".*part*")), "a half-written checkpoint is left"
        return (0 if ended else max(0, killed - (resumed or [0])[0])), when


def main(args) -> None:
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        parameters = parameters_of(Run(command(args.script, "nproc", []), Path(folder)).end())
        for number in tqdm(range(args.exits), "undisturbed runs"):
            assert parameters_of(Run(command(args.script, LAUNCHERS[number % 2], []), Path(folder)).end()) == parameters
    lost, times = [], collections.Counter()
    for number in tqdm(range(args.trials), "killed runs"):
        again, when = trial(args.script, LAUNCHERS[number % 2], number % 3 == 2, parameters, rng)
        lost.append(again)
        times[when] += 1
    if args.exits:
        print(f"{args.exits} undisturbed runs: exit code 0 and the same parameters in all")
    if lost:
        print(f"{len(lost)} runs: exit code 0 and the same parameters in all, at most {max(lost)} of {EVERY} steps done again")
        print(f"killed {', '.join(f'{when}: {count}' for when, count in times.items())}")


if __name__ == "__main__":
    parser = new_parser(__doc__, computes=False)
    parser.add_argument("-trials", type=non_negative_int, default=20, help="killed runs (default: 20)")
    parser.add_argument("-exits", type=non_negative_int, default=0, help="undisturbed runs (default: none)")
    parser.add_argument("-script", choices=["ddp_train.py", "fsdp_train.py"], default="ddp_train.py", help="what is trained with")
    main(parse(parser))
