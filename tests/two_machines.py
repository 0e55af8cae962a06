"""Train on two machines, take one of them away in the middle, let it come back, and see that the job ends with the same bits.

    sudo .venv/bin/python tests/two_machines.py          about 4 minutes; Linux only

The machines are two network namespaces of this one, joined by a virtual cable. Each has its own host name, hosts file, address and
folder, so that nothing is shared but the network. torchrun starts one process on each. Killed means kill -9 to all processes of a
machine at once; silent means that its cable is pulled first, so that the other machine hears nothing, as when the power fails.

torchrun numbers the machines by their addresses, so that machine-a always has rank 0; which one hosts the rendezvous is a flag.
"""

import contextlib
import hashlib
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

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from stress_ddp import parameters_of

from common import new_parser, parse
from errors import InputError

SCRIPT = ROOT / "m28_distributed_training" / "ddp_train.py"
STEPS, EVERY, PATIENCE_S = 161, 7, 120
FLAGS = ["-steps", str(STEPS), "-widths", "16", "32", "64", "-num_threads", "1", "-micro_batches", "2", "-device", "cpu"]
SAVE = ["-checkpoint", "run.pt", "-every", str(EVERY), "-resume", "-timeout_s", "15"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
ADDRESSES = {"machine-a": "10.77.0.1", "machine-b": "10.77.0.2"}
ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'  # seen by this command only, gone when it ends


class Machine:
    """A network namespace with a host name, an address on eth0 and a folder of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.address, self.namespace = name, ADDRESSES[name], f"course-{os.getpid()}-{name}"
        self.folder = folder / name
        self.folder.mkdir()

    def start(self, launcher: list[str], flags: list[str], loopback: bool = False, **environment) -> "Run":
        """Start the script here. With `loopback` the machine's own name leads to 127.0.1.1, as Debian's installer writes it."""
        hosts, names = self.folder / "hosts", ADDRESSES | ({self.name: "127.0.1.1"} if loopback else {})
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items()))
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", ENTER, "sh", self.name, str(hosts)]
        environment |= {"TQDM_MININTERVAL": "0", "COURSE_RESULTS": str(self.folder)}
        return Run([*enter, sys.executable, *launcher, str(SCRIPT), *FLAGS, *flags], self.folder, environment)

    def elastic(self, host: "Machine") -> "Run":
        """Join the job that `host` holds together and that goes on with one machine as with two."""
        conf = f"is_host={int(self is host)},last_call_timeout=5,keep_alive_interval=1"  # seconds: short ones, this is a test
        place = ["--rdzv-endpoint", f"{host.address}:29400", "--local-addr", self.address, "--rdzv-conf", conf]
        launcher = [*TORCHRUN, "--nnodes", "1:2", "--max-restarts", "3", *place]
        return self.start(launcher, SAVE, loopback=True, GLOO_SOCKET_IFNAME="eth0", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    def kill(self, pull_cable: bool = False) -> None:
        if pull_cable:
            ip("-n", self.namespace, "link", "set", "eth0", "down")
        for pid in ip("netns", "pids", self.namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def plug_in(self) -> None:
        ip("-n", self.namespace, "link", "set", "eth0", "up")

    def parameters_saved(self) -> tuple[int, str]:
        """Step of this machine's own checkpoint and the SHA-256 of the parameters in it."""
        state, digest = torch.load(self.folder / "run.pt", weights_only=True), hashlib.sha256()
        for parameter in state["model"].values():  # a network with GroupNorm has no tensors beside its parameters
            digest.update(parameter.contiguous().numpy().tobytes())
        return state["step"], digest.hexdigest()


class Run:
    """A started torchrun: its step, read from the progress bar, and all that it said so far."""

    def __init__(self, command: list[str], folder: Path, environment: dict) -> None:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, cwd=folder, env=os.environ | environment, start_new_session=True, **streams)
        self.step, self.said = 0, ""
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        while part := os.read(self.process.stdout.fileno(), 65536).decode(errors="replace"):
            self.said += part
            if steps := re.findall(rf" (\d+)/{STEPS} \[", part):
                self.step = int(steps[-1])

    def numbers(self, words: str) -> list[int]:
        """The numbers that it said after `words`."""
        return [int(number) for number in re.findall(rf"{words} (\d+)", self.said)]

    def wait_until(self, happened, what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not happened():
            assert self.process.poll() is None and time.monotonic() < end, f"never {what}:\n{self.said[-4000:]}"
            time.sleep(0.01)

    def end(self) -> int:
        code = self.process.wait(timeout=PATIENCE_S)
        self.reader.join()
        return code

    def end_well(self) -> str:
        assert self.end() == 0, f"exit code {self.process.returncode}:\n{self.said[-4000:]}"
        return self.said


# ---- the network -----------------------------------------------------------------------------------------------------


def ip(*words: str) -> str:
    """Run `ip words`; say in a sentence when this process may not."""
    try:
        return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise InputError("the command ip is missing: install iproute2") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or "no reason given"
        raise InputError(f"no network namespaces here ({reason}): in a container, CAP_SYS_ADMIN and CAP_NET_ADMIN are needed") from None


@contextlib.contextmanager
def two_machines():
    """Yield two joined machines; when the block ends, in whatever way, their processes, namespaces and folders go."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        a, b = machines = [Machine(name, Path(folder)) for name in ADDRESSES]
        for machine in machines:
            ip("netns", "add", machine.namespace)
            undo.callback(ip, "netns", "delete", machine.namespace)  # and with the first one the cable
            undo.callback(machine.kill)
        ip("link", "add", "eth0", "netns", a.namespace, "type", "veth", "peer", "name", "eth0", "netns", b.namespace)
        for machine in machines:
            ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", "eth0")
            ip("-n", machine.namespace, "link", "set", "lo", "up")
            machine.plug_in()
        yield a, b


# ---- what is checked -------------------------------------------------------------------------------------------------


def undisturbed(a: Machine, b: Machine) -> str:
    """Two machines against two processes of one machine; the parameters of both, as SHA-256."""
    parameters = parameters_of(a.start([], ["-nproc", "2"]).end_well())
    launcher = [*TORCHRUN, "--nnodes", "2", "--max-restarts", "1", "--rdzv-endpoint", f"{a.name}:29400"]
    runs = [machine.start(launcher, []) for machine in (a, b)]
    said = "".join(run.end_well() for run in runs)
    assert parameters_of(said) == parameters, "two machines compute something else than two processes of one"
    assert said.count("hint: a machine that is lost") == 1, "restarts without a store of their own need one hint"
    print(f"undisturbed: two machines end with the parameters of two processes on one, {parameters[:12]}...")
    return parameters


def lost(how: str, survivor: Machine, victim: Machine, parameters: str, rng: random.Random) -> None:
    """Lose `victim` in the middle, go on with `survivor`, which hosts the rendezvous, take the victim back, end together."""
    ours, theirs = survivor.elastic(host=survivor), victim.elastic(host=survivor)
    step = wait_for_step(ours, theirs, rng.randrange(15, 30))
    if how == "was sent SIGTERM":
        theirs.process.terminate()
    else:
        victim.kill(pull_cable=how == "lost its cable and was killed")
    theirs.end()
    ours.wait_until(lambda: ours.numbers("resumed at step"), "resumed alone")
    alone = ours.numbers("resumed at step")[0]
    assert step - EVERY <= alone, f"killed at step {step}, resumed at {alone}"
    ours.wait_until(lambda: alone + EVERY < ours.step, "gone on alone")  # its checkpoint is now the newer one
    victim.plug_in()
    theirs = victim.elastic(host=survivor)
    said = ours.end_well() + theirs.end_well()
    stopped = ours.numbers("stopped after step")[-1]  # torchrun stops it by SIGTERM when it sees that a machine waits
    together = (ours.numbers("resumed at step")[1:] + theirs.numbers("resumed at step"))[-1]
    assert together == stopped, f"together again from step {together}, but the survivor had reached {stopped}"
    check_end(survivor, victim, said, parameters)
    print(f"{victim.name} {how} at step {step}: {survivor.name} went on alone from step {alone}, both together from step {stopped},")
    print("  which is where it was by then; exit code 0 and the same parameters on both")


def host_killed(other: Machine, host: Machine, parameters: str, rng: random.Random) -> None:
    """Lose the machine that hosts the rendezvous: the other one cannot go on, but both can be started again."""
    ours, theirs = other.elastic(host), host.elastic(host)
    step, begin = wait_for_step(ours, theirs, rng.randrange(15, 30)), time.monotonic()
    host.kill()
    theirs.end()
    assert ours.end(), "the rendezvous was gone, yet the job went on"
    waited = time.monotonic() - begin
    runs = [machine.elastic(host) for machine in (other, host)]
    said = "".join(run.end_well() for run in runs)
    again = (runs[0].numbers("resumed at step") + runs[1].numbers("resumed at step"))[0]
    assert step - EVERY <= again, f"killed at step {step}, resumed at {again}"
    check_end(other, host, said, parameters)
    print(f"{host.name}, the rendezvous host, was killed at step {step}: {other.name} ended, too, with exit code {ours.process.returncode}")
    print(f"  after {waited:.0f} s; the same commands once more went on from step {again}, the same parameters on both")


def wait_for_step(ours: Run, theirs: Run, step: int) -> int:
    """Wait until the progress bar, which the machine with rank 0 shows, is at `step`; the step that it then shows."""
    ours.wait_until(lambda: max(ours.step, theirs.step) >= step, f"at step {step}")
    return max(ours.step, theirs.step)


def check_end(a: Machine, b: Machine, said: str, parameters: str) -> None:
    """What was printed and what each machine has on its own disk must be the undisturbed run's; then empty the disks."""
    assert parameters_of(said) == parameters, "other parameters than without the kill"
    assert "hint:" not in said
    for machine in (a, b):
        assert machine.parameters_saved() == (STEPS, parameters), f"another last checkpoint on {machine.name}"
        (machine.folder / "run.pt").unlink()


def main(args) -> None:
    if sys.platform != "linux" or os.geteuid():
        raise InputError("network namespaces need Linux and root: sudo .venv/bin/python tests/two_machines.py")
    rng, begin = random.Random(args.seed), time.monotonic()
    with two_machines() as (a, b):
        parameters = undisturbed(a, b)
        lost("was killed", a, b, parameters, rng)
        lost("lost its cable and was killed", b, a, parameters, rng)  # rank 0 is lost, and comes back with the older checkpoint
        lost("was sent SIGTERM", a, b, parameters, rng)
        host_killed(a, b, parameters, rng)
    print(f"all checked in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    args = parse(new_parser(__doc__, computes=False))
    sys.stdout.reconfigure(line_buffering=True)
    main(args)
