"""Start the processes of one training on this machine, watch them, start them again, and say in a sentence why one ended.

A script calls launch(worker, args). Started by torchrun (RANK is set in the environment) it is one of many processes already
and runs worker(args) itself; started plainly it becomes the parent of `-nproc` such processes, on Windows and macOS too.
"""

import contextlib
import errno
import io
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import seed_everything
from errors import InputError, first_line, let_the_first_speak, one_sentence, under_torchrun
from machine import usable_cores

LOST = ("closed by peer", "reset by peer", "Timed out", "timed out", "timeout", "Broken pipe", "remote process", "recvBytes")
BAD_INPUT = 2  # exit code of a process that refuses what it was given
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # 1: torchrun opens a new store at each start, not one that knows dead addresses
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # names of the network interface that leads back to this machine


def world_size(args) -> int:
    """Processes that train together, all machines counted."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else args.nproc


def local_processes(args) -> int:
    """Processes of this training on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if under_torchrun() else args.nproc


def several_machines() -> bool:
    return under_torchrun() and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < int(os.environ["WORLD_SIZE"])


def print0(*words) -> None:
    """print() in one process of all, and at once: what is said before a kill -9 is seen."""
    if dist.get_rank() == 0:
        print(*words, flush=True)


def said_once():
    """A with-block whose print() is seen in one process of all, and under torchrun alone: elsewhere the parent has said the same."""
    return contextlib.nullcontext() if dist.get_rank() == 0 and under_torchrun() else contextlib.redirect_stdout(io.StringIO())


def launch(worker, args) -> None:
    """Run worker(args) in every process of the training; returns when all of them ended well, exits with 1 when one did not."""
    if under_torchrun():
        run_rank(worker, args, int(os.environ["RANK"]))
    elif not run_processes(worker, args):
        sys.exit(1)


# ---- the parent ------------------------------------------------------------------------------------------------------


def run_processes(worker, args) -> bool:
    """Start -nproc processes, and again with -resume after a death, `-max_restarts` times; True when all ended well."""
    told = []  # to stop, by SIGTERM
    for attempt in range(args.max_restarts + 1):
        with tempfile.TemporaryDirectory() as folder:  # holds the file through which the processes find each other
            context, store = multiprocessing.get_context("spawn"), Path(folder, "store")
            names = [f"rank {rank}" for rank in range(args.nproc)]
            ranks = [context.Process(target=run_rank, args=(worker, args, rank, store), name=name) for rank, name in enumerate(names)]
            signal.signal(signal.SIGTERM, lambda *_, ranks=ranks: told.append([process.terminate() for process in ranks if process.pid]))
            try:
                start_quietly(ranks)
                for process in ranks if told else []:  # while they were started
                    process.terminate()
                first = watch(ranks)
            finally:
                for process in ranks:
                    if process.pid:  # has been started
                        process.kill()
                        process.join()
        if first is None:
            return True
        if first.exitcode == BAD_INPUT:  # which has been said, and stays bad
            return False
        if told and first.exitcode == -signal.SIGTERM:  # one that trains saves and ends well, this one had not begun
            print(f"SIGTERM: ended before the first step{'; -resume goes on' if args.checkpoint else ''}")
            return True
        if first.exitcode > 0:
            print(f"{first.name} ended with exit code {first.exitcode}", file=sys.stderr, flush=True)
        if attempt < args.max_restarts:
            args.resume = True
            print(f"starting all processes again, restart {attempt + 1} of {args.max_restarts}", file=sys.stderr, flush=True)
    return False


def start_quietly(processes: list) -> None:
    """Start them with Ctrl-C ignored, which they inherit, so that they say nothing about it while they import torch: the parent speaks."""
    meant = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for process in processes:
            process.start()
    except OSError as error:
        raise InputError(f"{process.name} could not be started ({error.strerror}): start fewer processes, with -nproc") from error
    finally:
        signal.signal(signal.SIGINT, meant)


def watch(ranks: list):
    """Wait until all processes ended and return None, or the first that ended badly, once the others had time to say so."""
    running = {process.sentinel: process for process in ranks}
    while running:
        ended = [running.pop(sentinel) for sentinel in wait(list(running))]
        for process in ended:
            process.join()
        failed = [process for process in ended if process.exitcode]
        for process in failed:  # before the others complain
            if process.exitcode == -signal.SIGINT:
                time.sleep(0.1)  # if it was Ctrl-C, this process gets it as well, and speaks of that instead
            if process.exitcode < 0:
                print(f"\n{process.name} was killed by signal {-process.exitcode}", file=sys.stderr, flush=True)
        if failed:
            wait_for_all(list(running), seconds=2)  # those that lost their peer notice it now
            # a signal comes first, that one did not end by itself; then bad input, which explains what the others say
            return min(failed, key=lambda process: (process.exitcode > 0, process.exitcode != BAD_INPUT))
    return None


def wait_for_all(sentinels: list, seconds: float) -> None:
    """Until all ended, or none did for so many seconds."""
    while sentinels and (ended := wait(sentinels, timeout=seconds)):
        sentinels = [sentinel for sentinel in sentinels if sentinel not in ended]


# ---- one process -----------------------------------------------------------------------------------------------------


def run_rank(worker, args, rank: int, store: Path | None = None) -> None:
    """Prepare this process, run worker(args) in the group of all, and end."""
    args.num_threads = args.num_threads or max(1, usable_cores() // local_processes(args))
    torch.set_num_threads(args.num_threads)
    seed_everything(args.seed)
    if store:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word; the parent speaks
        tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which a killed process would leave behind with a warning
        threading.Thread(target=end_with_parent, daemon=True).start()
        if sys.platform in LOOPBACK:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])  # needs no host name that resolves, no firewall
    recorded()(worker, args, rank, store)
    leave(0)


def run_or_say_why(worker, args, rank: int, store: Path | None) -> None:
    """Join the group, run worker(args), leave the group. What ends it is said in a sentence; exit code 1, for bad input 2."""
    try:
        join_and_run(worker, args, rank, store)
    except InputError as error:
        let_the_first_speak(rank if store else 0)  # one_sentence() itself waits under torchrun
        one_sentence(InputError, error, None)
        leave(BAD_INPUT)
    except BrokenPipeError:  # nobody reads what is printed any more, and would not after a restart
        leave(BAD_INPUT)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        one_sentence(OSError, error, None)  # the disk is full, and would be after a restart
        leave(BAD_INPUT)
    except RuntimeError as error:
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


def local_rank(rank: int) -> int:
    """Number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", rank)) if under_torchrun() else rank


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
    dist.init_process_group(args.backend, store=place, rank=rank, world_size=world, timeout=timeout)
    try:
        worker(args)
    finally:
        dist.destroy_process_group()


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store that torchrun's variables name, this process's rank and the number of processes."""
    try:
        return next(dist.rendezvous("env://", timeout=timeout))
    except ValueError as error:  # a variable is missing
        raise InputError(f"{str(error).rpartition(': ')[2]}: start the processes with torchrun, which sets it") from error
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "failed to listen" not in str(error):
            said = f"rank {os.environ['RANK']} and the others have not met at {host}, port {port} ({first_line(error)})"
            raise InputError(f"{said}: were all started, and does each machine reach the others on all ports?") from error
        raise InputError(f"port {port} is in use by another program: give torchrun another one, --master-port {int(port) + 1}") from error


def end_with_parent() -> None:
    """End this process when its parent is gone: nobody would see it any more."""
    multiprocessing.parent_process().join()
    os._exit(1)
