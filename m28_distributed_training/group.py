"""One process of a training: find the others, join their group, run the script's part in it, and end with a sentence and an exit code.

The group is torch's process group. Where torchrun has started the process, its environment says which one of how many it is and
where they meet; where launch.py has, they meet in a file.
"""

import contextlib
import io
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import seed_everything
from errors import FULL_DISK, InputError, asks_too_much, first_line, let_the_first_speak, one_sentence, survive_full_disk, under_torchrun
from machine import usable_cores

LOST = ("closed by peer", "reset by peer", "Timed out", "timed out", "timeout", "Broken pipe", "remote process", "recvBytes")
BAD_INPUT, STOPPED = 2, 128 + signal.SIGTERM  # exit codes: of a process that refuses what it was given; of one that SIGTERM ended too early
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # 1: torchrun opens a new store at each start, not one that knows dead addresses
INTERFACE = "GLOO_SOCKET_IFNAME"  # names the network interface by which the processes talk
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # the one that leads back to this machine
COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")  # variables that torchrun sets


# ---- who is there ----------------------------------------------------------------------------------------------------


def check_variables() -> None:
    """InputError where RANK and the others, set by hand or by a job system, are not what torchrun would set."""
    for name in COUNTS if under_torchrun() else ():
        if not os.environ.get(name, "0").isdecimal():
            raise InputError(f"{name}={os.environ[name]} is no whole number: start the processes with torchrun, which sets it")
    if under_torchrun() and int(os.environ["RANK"]) >= (world := int(os.environ["WORLD_SIZE"])):
        raise InputError(f"RANK={os.environ['RANK']} cannot be with WORLD_SIZE={world}: ranks are counted from 0")


def world_size(args) -> int:
    """Processes that train together, all machines counted."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else args.nproc


def local_processes(args) -> int:
    """Processes of this training on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if under_torchrun() else args.nproc


def several_machines() -> bool:
    return under_torchrun() and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < int(os.environ["WORLD_SIZE"])


def local_rank(rank: int) -> int:
    """Number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", rank)) if under_torchrun() else rank


def print0(*words) -> None:
    """print() in one process of all, and at once: what is said before a kill -9 is seen."""
    if dist.get_rank() == 0:
        print(*words, flush=True)


def said_once():
    """A with-block whose print() is seen in one process of all, and under torchrun alone: elsewhere the parent has said the same."""
    return contextlib.nullcontext() if dist.get_rank() == 0 and under_torchrun() else contextlib.redirect_stdout(io.StringIO())


# ---- one process -----------------------------------------------------------------------------------------------------


def hold_ctrl_c(hold: bool) -> None:
    """Let Ctrl-C wait, here and in the processes that are started meanwhile, or let it through. Not on Windows, which has no such thing."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK, {signal.SIGINT})


class Stopped(Exception):
    """SIGTERM ended a training after `step` of `steps`; whether what it had reached is `kept` in a checkpoint."""

    def __init__(self, step: int, steps: int, kept: bool) -> None:
        super().__init__(f"SIGTERM: stopped after step {step} of {steps}{'; -resume goes on from here' if kept else ''}")
        self.kept = kept


def run_rank(worker, args, rank: int, store: Path | None = None) -> None:
    """Prepare this process, run worker(args) in the group of all, and end."""
    args.num_threads = args.num_threads or max(1, usable_cores() // local_processes(args))
    torch.set_num_threads(args.num_threads)
    seed_everything(args.seed)
    if store:
        survive_full_disk()
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as in the background of a shell script
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word; the parent speaks
        hold_ctrl_c(False)
        tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which a killed process would leave behind with a warning
        if sys.platform in LOOPBACK:
            os.environ.setdefault(INTERFACE, LOOPBACK[sys.platform])  # needs no host name that resolves, no firewall
    if store or dist.is_torchelastic_launched():  # else a shell, perhaps, that may end before
        threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    recorded()(worker, args, rank, store)
    leave(0)


def run_or_say_why(worker, args, rank: int, store: Path | None) -> None:
    """Join the group, run worker(args), leave the group. What ends it early is said in a sentence; exit code 1, BAD_INPUT or STOPPED."""
    try:
        join_and_run(worker, args, rank, store)
    except Stopped as stopped:
        if rank == 0:
            print(stopped)
        # Not 0 under torchrun, which would take it for the training's end. If it was not told itself, it starts again, if it may: where
        # another machine has gone, alone with --nnodes 1:2, else when that one is back.
        leave(0 if stopped.kept and not under_torchrun() else STOPPED)
    except InputError as error:
        let_the_first_speak(rank if store else 0)  # one_sentence() itself waits under torchrun
        one_sentence(InputError, error, None)
        leave(BAD_INPUT)
    except BrokenPipeError:  # nobody reads what is printed any more, and would not after a restart
        leave(BAD_INPUT)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        one_sentence(OSError, error, None)  # the disk is full, and would be after a restart
        leave(BAD_INPUT)
    except RuntimeError as error:
        if asks_too_much(str(error)):
            print(f"error: rank {rank} asked for more memory than there is: give smaller -widths or a smaller -batch_size", file=sys.stderr)
            leave(BAD_INPUT)
        if "CUDA error" in str(error) or not any(sign in str(error) for sign in LOST):
            raise
        other = f"rank {1 - rank}" if world_size(args) == 2 else "that rank"
        reason = re.sub(r"^.*?\[[^]]*:\d+\] ", "", str(error).splitlines()[0])[:150]  # without the place in gloo's code
        said = f"another rank ended first, look above for {other}"
        if "connectFullMesh" in reason and several_machines():
            said += "; if all are alive, the machines cannot reach each other: README, Several machines"
        time.sleep(0.5)  # a process that died by a signal cannot speak, its parent does
        print(f"rank {rank}: {said} ({reason})", file=sys.stderr, flush=True)
        leave(1)


def recorded():
    """run_or_say_why, under torchrun so that it learns of a defect's traceback."""
    if not under_torchrun():
        return run_or_say_why
    from torch.distributed.elastic.multiprocessing.errors import record  # its import prints a note on macOS

    return record(run_or_say_why)


def leave(code: int) -> None:
    """End this process without taking Python apart.

    Gloo's threads outlive destroy_process_group() once there was a DistributedDataParallel (torch 2.14). One that is slow to let go of
    its last all-reduce then meets a Python that is half gone, and aborts a training that has ended well: rarely, on a busy machine.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def join_and_run(worker, args, rank: int, store: Path | None) -> None:
    if args.device.type == "cuda":
        args.device = torch.device("cuda", local_rank(rank) % torch.cuda.device_count())
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.deterministic = True  # no algorithm that adds up in another order each time
    timeout = timedelta(seconds=args.timeout_s)
    if store is None:
        place, rank, world = meet(timeout)
        if not several_machines():
            # torchrun on one machine keeps its store when it starts processes again: the addresses of the dead ones are still in it
            place = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", place)
        elif rank == 0 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get(OWN_STORE) != "1":
            print(f"hint: a machine that is lost cannot join again: set {OWN_STORE}=1 on all machines, before torchrun", file=sys.stderr)
    else:
        place, world = dist.FileStore(str(store), args.nproc), args.nproc
    try:
        dist.init_process_group(args.backend, store=place, rank=rank, world_size=world, timeout=timeout)
    except RuntimeError as error:
        if "Unable to find address" not in str(error):
            raise
        interfaces = ", ".join(name for _, name in socket.if_nameindex())
        raise InputError(
            f"{INTERFACE}={os.environ.get(INTERFACE)} has no address on this machine, whose interfaces are {interfaces}"
        ) from error
    try:
        worker(args)
    finally:
        dist.destroy_process_group()


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store that torchrun's variables name, this process's rank and the number of processes."""
    try:
        socket.getaddrinfo(os.environ.get("MASTER_ADDR", "localhost"), None)  # torch says dozens of lines where a name does not resolve
        return next(dist.rendezvous("env://", timeout=timeout))
    except socket.gaierror as error:
        name = os.environ["MASTER_ADDR"]
        raise InputError(f"no machine is known here by the name {name} ({error.strerror}): give its IP address as MASTER_ADDR") from error
    except ValueError as error:  # a variable is missing, or no port
        raise InputError(f"{str(error).rpartition(': ')[2].rstrip('.')}: start the processes with torchrun, which sets it") from error
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "failed to listen" not in str(error):
            said = f"rank {os.environ['RANK']} and the others have not met at {host}, port {port} ({first_line(error)})"
            raise InputError(f"{said}: were all started, and does each machine reach the others on all ports?") from error
        raise InputError(f"port {port} is in use by another program: give torchrun another one, --master-port {int(port) + 1}") from error


def end_with_parent(parent: int) -> None:
    """End this process when `parent`, which started it, is gone: nobody would see it any more."""
    if started := multiprocessing.parent_process():
        started.join()
    else:
        while os.getppid() == parent:  # torchrun
            time.sleep(0.5)
    os._exit(1)
