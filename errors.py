"""How a script ends that cannot go on: in one sentence that says what the user can mend, and without a process left behind.

And how a training does not end because its log is on a full disk.
"""

import errno
import multiprocessing
import os
import signal
import sys
import time
import traceback

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # what OSError.errno says of a disk, or of a user's share of it, that is full


class InputError(ValueError):
    """Bad input: the message is one sentence that says what was wrong and what to do; it ends a script with exit code 1."""


def under_torchrun() -> bool:
    """Whether torchrun, or a job system that sets the same variables, has started this process as one of many."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def first_line(error: Exception) -> str:
    """What a library's error says, in one line of at most 150 characters."""
    return str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__


def let_the_first_speak(number: int | None = None) -> None:
    """Wait, in all but the first of the processes that were started together: what it found as well is said by then, and this one ended.

    `number` of this process; without it torchrun's on this machine.
    """
    if number or (number is None and under_torchrun() and os.environ.get("LOCAL_RANK", "0") != "0"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends it; a training only takes note
        time.sleep(3)  # longer than it takes torchrun, and launch.py, to end the others


def one_sentence(kind: type, error: BaseException, trace) -> None:
    """sys.excepthook of the scripts: what the user can mend is said in a sentence, a defect of ours keeps its traceback."""
    text = str(error).strip()
    receiving = "rebuild_storage_fd" in [frame.name for frame in traceback.extract_tb(trace)]  # torch's function: a worker's batch
    if issubclass(kind, InputError):
        let_the_first_speak()
        # An error out of a DataLoader worker arrives as text with the worker's traceback; the sentence is its last line.
        print(f"error: {text.splitlines()[-1].removeprefix('errors.InputError: ')}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        end_by_ctrl_c()
    elif issubclass(kind, ConnectionError | EOFError) and multiprocessing.parent_process():
        pass  # a worker was about to hand a batch over when Ctrl-C ended the main process, which has spoken
    elif issubclass(kind, BrokenPipeError) and nobody_listens():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain once more when it ends
    elif issubclass(kind, PermissionError) and error.filename:
        print(
            f"error: {error.filename} may not be read or written ({error.strerror}): take another place, or ask its owner", file=sys.stderr
        )
    elif isinstance(error, OSError) and error.errno in FULL_DISK:
        print(f"error: the disk is full{f' ({error.filename})' if error.filename else ''}: free some space and run again", file=sys.stderr)
    elif issubclass(kind, RuntimeError) and asks_too_much(text):
        print("error: more memory was asked for than there is: take a smaller network or a smaller batch", file=sys.stderr)
    elif text.startswith("DataLoader worker") or (receiving and issubclass(kind, OSError | EOFError)):
        reason = text.splitlines()[0].rstrip(".") if text.startswith("DataLoader") else "a DataLoader worker ended while it sent a batch"
        print(f"error: {reason}: memory ran out, most likely; try fewer workers or a smaller batch", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def asks_too_much(text: str) -> bool:
    """Whether a RuntimeError of torch says that there is less memory than was asked for."""
    return any(sign in text for sign in ("can't allocate memory", "Storage size calculation overflowed", "CUDA out of memory"))


def nobody_listens() -> bool:
    """Whether what is printed reaches nobody any more, as behind `| head -n 1`."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def end_by_ctrl_c() -> None:
    """End this process and its workers at once: unloading torch takes a second or more, and all files are closed by now."""
    print("\nstopped by Ctrl-C", file=sys.stderr, flush=True)
    sys.stdout.flush()
    workers, deadline = multiprocessing.active_children(), time.monotonic() + 0.5
    for worker in workers:  # Ctrl-C reached them as well; killed at once, one may leave its shared memory behind
        worker.join(timeout=max(0, deadline - time.monotonic()))
    for worker in workers:
        worker.terminate()
        worker.join(timeout=1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)  # dies by the signal, so that a shell loop around the script stops as well


class Log:
    """A stream whose file may be on a full disk: then what is printed is lost, but not the training."""

    def __init__(self, stream) -> None:
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.unless_full(self.stream.write, text)

    def flush(self) -> None:
        self.unless_full(self.stream.flush)

    def unless_full(self, call, *words):
        try:
            return call(*words)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise


def survive_full_disk() -> None:
    """From now on a full disk takes what this process prints, and nothing else."""
    sys.stdout, sys.stderr = Log(sys.stdout), Log(sys.stderr)
