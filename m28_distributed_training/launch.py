"""Start the processes of one training on this machine, watch them, start them again, and say in a sentence why one ended.

A script calls launch(worker, args). Started by torchrun (RANK is set in the environment) it is one of many processes already
and runs worker(args) itself; started plainly it becomes the parent of `-nproc` such processes, on Windows and macOS too.
What such a process does is in group.py.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from errors import InputError, survive_full_disk, under_torchrun
from m28_distributed_training.group import BAD_INPUT, STOPPED, hold_ctrl_c, run_rank


def launch(worker, args) -> None:
    """Run worker(args) in every process of the training; returns when all of them ended well, exits with 1 when one did not."""
    survive_full_disk()
    if under_torchrun():
        run_rank(worker, args, int(os.environ["RANK"]))
    elif not run_processes(worker, args):
        sys.exit(1)


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
        if first.exitcode in (BAD_INPUT, STOPPED):  # which has been said, and stays bad, or was meant
            return False
        if told and first.exitcode == -signal.SIGTERM:  # one that trains saves and ends well, this one had not begun
            print(f"SIGTERM: ended before the first step{'; -resume goes on' if args.checkpoint else ''}")
            return bool(args.checkpoint)  # without one it would be taken for done
        if first.exitcode > 0:
            print(f"{first.name} ended with exit code {first.exitcode}", file=sys.stderr, flush=True)
        if attempt < args.max_restarts:
            args.resume = True
            print(f"starting all processes again, restart {attempt + 1} of {args.max_restarts}", file=sys.stderr, flush=True)
    return False


def start_quietly(processes: list) -> None:
    """Start them with Ctrl-C held back, which they inherit: they shall not speak of it while they import torch, the parent does.

    The mask holds it back from this thread alone. torch has others, and Python would raise KeyboardInterrupt here for them, too: between
    a process's start and its parent's note of it.
    """
    felt, handler = [], signal.getsignal(signal.SIGINT)
    if handler == signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: felt.append(True))
    if sys.platform != "win32":
        resource_tracker.ensure_running()  # multiprocessing's own helper; its start would let Ctrl-C through
    hold_ctrl_c(True)
    try:
        for process in processes:
            process.start()
    except OSError as error:
        raise InputError(f"{process.name} could not be started ({error.strerror}): start fewer processes, with -nproc") from error
    finally:
        hold_ctrl_c(False)  # one that came meanwhile is felt here
        if handler == signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)
    if felt:
        raise KeyboardInterrupt


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
