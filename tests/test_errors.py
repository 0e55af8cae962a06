"""errors.py: what the user can mend ends a script with one sentence, a defect of ours with its traceback."""

import errno
import multiprocessing
import os
import subprocess
import sys

import pytest

import errors
from common import new_parser
from paths import ROOT, check_file_place


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (errors.InputError("x.jpg cannot be read"), "error: x.jpg cannot be read\n"),
        (errors.InputError("Caught it\nTraceback\nerrors.InputError: x.jpg cannot be read"), "error: x.jpg cannot be read\n"),
        (OSError(errno.ENOSPC, "No space left", "big.rgb"), "error: the disk is full (big.rgb): free some space and run again\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "closed/x"),
            "error: closed/x may not be read or written (Permission denied): ",
        ),
        *(
            (RuntimeError(text), "error: more memory was asked for than there is")
            for text in ("can't allocate memory: you", "CUDA out of memory.")
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "error: DataLoader worker (pid 7) is killed"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_sentence(raised, said, capsys):
    errors.one_sentence(type(raised), raised, None)
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1


@pytest.mark.parametrize(("rank", "world", "waits"), [("0", "2", 0), ("1", "2", 2), ("1", None, 0)])
def test_of_the_processes_of_torchrun_the_first_speaks_first(capsys, monkeypatch, rank, world, waits):
    """The others wait, so that they are ended before they say the same; what they alone found is said."""
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    for name, value in {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": world}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        new_parser("Doc.").error("bad flag")
    errors.one_sentence(errors.InputError, errors.InputError("bad"), None)
    assert stop.value.code == 2 and "error: bad" in capsys.readouterr().err and len(waited) == waits


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has other permissions")
def test_a_file_in_a_folder_that_may_not_be_entered_is_said_not_to_be_writable(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    user = os.geteuid()
    try:
        if user == 0:  # root may enter everywhere
            os.seteuid(65534)
        with pytest.raises(
            errors.InputError, match=r"^cannot write to .*\(Permission denied\): name a file in a folder that you may write to$"
        ):
            check_file_place("-checkpoint", tmp_path / "closed" / "inner" / "run.pt")
    finally:
        os.seteuid(user)
        (tmp_path / "closed").chmod(0o700)


def test_a_script_ends_with_the_sentence():
    code = "import common, errors; common.parse(common.new_parser(''), []); raise errors.InputError('x.jpg cannot be read')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "error: x.jpg cannot be read\n")


def test_a_defect_of_ours_keeps_its_traceback(capsys):
    errors.one_sentence(KeyError, KeyError("img"), None)
    assert "KeyError: 'img'" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no pipe breaks there")
def test_who_reads_only_the_first_line_sees_no_traceback(capsys):
    code = "import common, errors; common.parse(common.new_parser(''), [])\nwhile True: print('a line')"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "a line\n"
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait() == 1
    errors.one_sentence(BrokenPipeError, BrokenPipeError(errno.EPIPE, "of a socket"), None)  # anywhere else it is a defect
    assert "BrokenPipeError" in capsys.readouterr().err


def test_a_worker_whose_main_process_ended_is_silent(capfd):
    worker = multiprocessing.get_context("spawn").Process(target=errors.one_sentence, args=(EOFError, EOFError("gone"), None))
    worker.start()
    worker.join()
    assert worker.exitcode == 0 and capfd.readouterr().err == ""
    errors.one_sentence(ConnectionResetError, ConnectionResetError("reset by peer"), None)  # anywhere else it is a defect
    assert "ConnectionResetError: reset by peer" in capfd.readouterr().err


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(errno.ECONNRESET, "reset"), FileNotFoundError(errno.ENOENT, "gone")])
def test_a_worker_that_is_killed_while_it_sends_a_batch_is_said(capsys, error):
    def rebuild_storage_fd():  # where torch waits for the batch
        raise error

    with pytest.raises(type(error)) as caught:
        rebuild_storage_fd()
    errors.one_sentence(caught.type, caught.value, caught.tb)
    said = capsys.readouterr().err
    assert said.startswith("error: a DataLoader worker ended while it sent a batch: memory ran out") and said.count("\n") == 1
