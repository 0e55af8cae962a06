"""The real data's way to the disk: every fault that a network, an archive or a user can have, against a server on this machine."""

import errno
import hashlib
import io
import os
import runpy
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import paths
from data import download, fetch
from errors import InputError, one_sentence

ROOT = Path(__file__).resolve().parents[1]
REAL_LFW = ROOT.parent / "shared" / "datasets" / "lfw-deepfunneled.tgz"
FACES = {f"top/{name}/{name}_{i:04}.jpg": os.urandom(40_000) for name in ("Ada_Ash", "Bel_Birch") for i in (1, 2)}


def tar_of(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


ARCHIVE = tar_of(FACES)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ARCHIVE with Range; `faults` are used up one a request: a status, "drop" (half of it), "no range" or other content."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests = [], []  # requests: (path, Range)
        self.url = f"http://127.0.0.1:{self.server_port}/lfw.tgz"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers["Range"]
        self.server.requests.append((self.path, asked))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        content = fault if isinstance(fault, bytes) else ARCHIVE
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and fault != "no range" else None
        if start is not None and start >= len(content):
            return self.send_error(416)
        body = content[start or 0 :]
        self.send_response(200 if start is None else 206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "drop" else body)

    def do_CONNECT(self):  # as a proxy that lets nobody out
        self.server.requests.append((self.path, "CONNECT"))
        self.send_error(403)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty data folder of its own for each test, no waiting between tries, no proxy."""
    for variable in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(download, "DATA", tmp_path / "data")
    monkeypatch.setattr(fetch, "PAUSES_S", (0, 0, 0))
    return tmp_path / "data"


@pytest.fixture
def mirrors(server, monkeypatch):
    """Two mirrors of ARCHIVE in place of the real ones; a full set is what ARCHIVE holds."""
    sources = tuple(download.Source(server.url.replace("lfw.tgz", name), sha256(ARCHIVE)) for name in ("first", "second"))
    monkeypatch.setitem(download.DATASETS, "lfw", download.Dataset("*/*.jpg", len(FACES), sources, ("script.py", "-flag")))
    return server


def run(source=None, name="lfw", sha256=None, force=False) -> list[Path]:
    return download.main(SimpleNamespace(name=name, source=None if source is None else str(source), sha256=sha256, force=force))


def content_of(folder: Path) -> dict[str, bytes]:
    return {f"top/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in folder.rglob("*.jpg")}


def half_download(home: Path, content: bytes) -> Path:
    part = home / ".lfw.part" / f"{sha256(ARCHIVE)[:12]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    return part


# ---- download --------------------------------------------------------------------------------------------------------


def test_downloads_and_unpacks_without_the_top_folder(mirrors, home):
    assert len(run()) == len(FACES)
    assert content_of(home / "lfw") == FACES
    assert [path.name for path in home.iterdir()] == ["lfw"]
    assert mirrors.requests == [("/first", None)]


def test_what_is_there_is_left_alone_until_forced(mirrors, home, capsys):
    run()
    marker = home / "lfw" / "mine.txt"
    marker.touch()
    run()
    assert "already there" in capsys.readouterr().out
    assert len(mirrors.requests) == 1
    run(force=True)
    assert not marker.exists()
    assert content_of(home / "lfw") == FACES


def test_an_incomplete_set_is_not_replaced_unasked(mirrors, home):
    run()
    next((home / "lfw").rglob("*.jpg")).unlink()
    with pytest.raises(InputError, match=r"holds 3 of the 4 files of lfw: -force replaces"):
        run()
    assert len(mirrors.requests) == 1


def test_a_half_download_goes_on_with_range(mirrors, home):
    half_download(home, ARCHIVE[:70_000])
    run()
    assert mirrors.requests == [("/first", "bytes=70000-")]
    assert content_of(home / "lfw") == FACES


def test_a_server_without_range_starts_over(mirrors, home):
    half_download(home, ARCHIVE[:70_000])
    mirrors.faults = ["no range"]
    run()
    assert content_of(home / "lfw") == FACES
    assert len(mirrors.requests) == 1


@pytest.mark.parametrize("wrong", [b"x" * 1000, ARCHIVE + b"x"], ids=["other beginning", "longer than the file: 416"])
def test_a_wrong_half_is_thrown_away(mirrors, home, wrong):
    half_download(home, wrong)
    run()
    assert mirrors.requests == [("/first", f"bytes={len(wrong)}-"), ("/first", None)]
    assert content_of(home / "lfw") == FACES


def test_a_whole_download_needs_no_network(mirrors, home, monkeypatch):
    half_download(home, ARCHIVE)
    monkeypatch.setattr(fetch, "online", lambda url: False)
    run()
    assert content_of(home / "lfw") == FACES


def test_dropped_connections_and_busy_servers_are_tried_again(mirrors, home, capsys):
    mirrors.faults = ["drop", "drop", 503, "drop"]
    run()
    assert content_of(home / "lfw") == FACES
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for _, asked in mirrors.requests[1:]]
    assert starts[0] == len(ARCHIVE) // 2
    assert starts == sorted(starts)
    assert "the connection broke off at 0.1 of 0.2 MB; next try in 0 s" in capsys.readouterr().out


def test_tries_end_and_the_half_is_kept(mirrors, home, capsys):
    mirrors.faults = ["drop"] + [503] * 20
    with pytest.raises(InputError, match=r"could not be had.*browser.*-from FILE.*sample data"):
        run()
    assert len(mirrors.requests) == 2 * (1 + len(fetch.PAUSES_S))
    assert "MB of the download are kept" in capsys.readouterr().out
    mirrors.faults = []
    run()
    assert mirrors.requests[-1] == ("/first", f"bytes={len(ARCHIVE) // 2}-")
    assert content_of(home / "lfw") == FACES


@pytest.mark.parametrize("status", [403, 404, 202])
def test_a_refusal_leads_to_the_next_mirror(mirrors, home, status):
    mirrors.faults = [status]
    run()
    assert [path for path, _ in mirrors.requests] == ["/first", "/second"]
    assert content_of(home / "lfw") == FACES


def test_wrong_content_is_removed_and_named(mirrors, home, capsys):
    wrong = b"<html>not here</html>"
    mirrors.faults = [wrong, wrong]
    with pytest.raises(InputError):
        run()
    said = capsys.readouterr().out
    assert f"should be {sha256(ARCHIVE)} but is {sha256(wrong)}, so the file was removed" in said
    assert "/second" in said
    assert list(home.iterdir()) == []


def hang(*args, **kwargs):
    time.sleep(3)
    raise TimeoutError


def test_a_name_that_hangs_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", hang)
    began = time.perf_counter()
    assert not fetch.online("https://example.org/x")
    assert time.perf_counter() - began < 2


def test_online(server, monkeypatch):
    assert fetch.online(server.url)
    assert not fetch.online("http://127.0.0.1:9/")  # nothing listens there
    assert not fetch.online("http://127.0.0.1:notaport/")
    monkeypatch.setenv("https_proxy", server.url)
    assert fetch.online("https://nowhere.invalid/x")  # the proxy is what has to be reached


def test_all_mirrors_are_looked_for_at_once(home, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", hang)
    began = time.perf_counter()
    with pytest.raises(InputError, match=r"no network.*ndownloader.figshare.com or figshare.com.*-from FILE.*sample data"):
        run()
    assert time.perf_counter() - began < 2
    assert list(home.iterdir()) == []


# ---- archive at hand -------------------------------------------------------------------------------------------------


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("files", [FACES, {name.removeprefix("top/"): data for name, data in FACES.items()}], ids=["top folder", "none"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_file_at_hand_is_used_and_stays(tmp_path, home, capsys, files, mode):
    content = tar_of(files, mode)
    path = written(tmp_path / "mine.tgz", content)
    assert len(run(path)) == len(FACES)
    assert content_of(home / "lfw") == FACES
    assert path.read_bytes() == content
    assert f"SHA-256 {sha256(content)}: not one of the known archives of lfw" in capsys.readouterr().out


def test_an_address_at_hand(server, home, capsys):
    server.faults = ["drop"]
    run(server.url, sha256=sha256(ARCHIVE))
    assert content_of(home / "lfw") == FACES
    assert "as it should be" in capsys.readouterr().out
    assert [path.name for path in home.iterdir()] == ["lfw"]


def test_nothing_of_an_unknown_address_is_kept(server, home):
    server.faults = ["drop", 404]
    with pytest.raises(InputError):
        run(server.url)
    assert list(home.iterdir()) == []


def test_cifar10_keeps_the_folder_that_torchvision_expects(tmp_path, home):
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta", "readme.html"]
    path = written(tmp_path / "cifar.tar.gz", tar_of({f"cifar-10-batches-py/{name}": b"x" for name in names}))
    assert len(run(path, name="cifar10")) == download.DATASETS["cifar10"].count
    assert sorted(path.name for path in (home / "cifar10" / "cifar-10-batches-py").iterdir()) == sorted(names)


OUTSIDE = {**FACES, "../../../../outside.jpg": b"x"}
REFUSED = {
    "no archive": (b"hello", "is not a tar archive, or is damaged: file could not be opened successfully$"),
    "empty": (b"", "is not a tar archive, or is damaged"),
    "cut short": (ARCHIVE[: len(ARCHIVE) // 2], "is not a tar archive, or is damaged"),
    "a bit flipped at the end": (ARCHIVE[:-6] + bytes([ARCHIVE[-6] ^ 1]) + ARCHIVE[-5:], "is not a tar archive, or is damaged"),
    "without images": (tar_of({"top/readme.txt": b"x"}), r"holds no file \*/\*.jpg, so it is not lfw"),
    "without anything": (tar_of({}), "holds no file"),
    "outside": (tar_of(OUTSIDE), "is refused, nothing of it was kept: .*outside the destination"),
}


@pytest.mark.parametrize(("content", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_bad_archive_is_refused_and_nothing_stays(tmp_path, home, content, sentence):
    path = written(tmp_path / "mine.tgz", content)
    with pytest.raises(InputError, match=sentence):
        run(path)
    assert list(home.iterdir()) == []
    assert sorted(tmp_path.iterdir()) == [home, path]


def test_a_link_that_leads_outside_is_refused(tmp_path, home):
    path = tmp_path / "mine.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("top/Ada/Ada_0001.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InputError, match="is refused"):
        run(path)
    assert list(home.iterdir()) == []


def test_a_demanded_checksum(tmp_path, home):
    path = written(tmp_path / "mine.tgz", ARCHIVE)
    with pytest.raises(InputError, match=f"of mine.tgz should be {'0' * 64} but is {sha256(ARCHIVE)}"):
        run(path, sha256="0" * 64)
    run(path, sha256=sha256(ARCHIVE))
    assert path.exists()


def test_a_folder_is_named_as_one(tmp_path):
    with pytest.raises(InputError, match=r"is a folder: give images that are unpacked already to -path_to_folder"):
        run(tmp_path)


# ---- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["ctrl-c", "disk full"])
def test_stopped_while_unpacking(tmp_path, home, monkeypatch, error):
    path = written(tmp_path / "mine.tgz", ARCHIVE)
    extract, seen = tarfile.TarFile.extract, []

    def stop_at_third(self, member, *args, **kwargs):
        seen.append(member)
        if len(seen) == 3:
            raise error
        return extract(self, member, *args, **kwargs)

    monkeypatch.setattr(tarfile.TarFile, "extract", stop_at_third)
    with pytest.raises(type(error)):
        run(path)
    assert list(home.iterdir()) == []
    run(path)
    assert content_of(home / "lfw") == FACES


def test_disk_full_while_downloading(mirrors, home, monkeypatch, capsys):
    real_open = Path.open

    class FullDisk(io.FileIO):
        def write(self, block):
            super().write(block[: len(block) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda self, mode="r": FullDisk(str(self), mode) if mode == "wb" else real_open(self, mode))
    with pytest.raises(OSError, match="No space") as caught:
        run()
    assert list(home.iterdir()) == []
    one_sentence(caught.type, caught.value, caught.tb)
    assert "error: the disk is full" in capsys.readouterr().err


def test_ctrl_c_while_downloading_keeps_the_half(mirrors, home, monkeypatch, capsys):
    mirrors.faults = ["drop"]
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run()
    assert "0.1 MB of the download are kept: the same command goes on from there" in capsys.readouterr().out
    run()
    assert mirrors.requests[-1] == ("/first", f"bytes={len(ARCHIVE) // 2}-")
    assert [path.name for path in home.iterdir()] == ["lfw"]


def test_killed_while_unpacking(tmp_path, home, capsys):
    path = written(tmp_path / "mine.tar", tar_of({f"top/P{i}/P{i}_0001.jpg": b"x" for i in range(2000)}, "w"))
    command = [sys.executable, str(ROOT / "data" / "download.py"), "lfw", "-from", str(path)]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env={**os.environ, "COURSE_DATA": str(home)}, stdout=said, stderr=said)
    unpacked = home / ".lfw.part" / "unpacked" / "new"
    while process.poll() is None and not unpacked.exists():
        time.sleep(0.002)
    with pytest.raises(InputError, match="another run is fetching lfw"):
        run(path)
    process.kill()
    process.wait()
    assert unpacked.exists(), (tmp_path / "said").read_text()
    assert not (home / "lfw").exists()
    assert len(run(path)) == 2000
    assert [path.name for path in home.iterdir()] == ["lfw"]


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    for module in (paths, download):
        monkeypatch.setattr(module, "DATA", tmp_path / "a file" / "data")
    written(tmp_path / "a file", b"")
    with pytest.raises(InputError, match=r"cannot write to .*a file.*: set COURSE_DATA"):
        run(written(tmp_path / "mine.tgz", ARCHIVE))


# ---- as a learner types it -------------------------------------------------------------------------------------------


@pytest.fixture
def type_in(monkeypatch, home):
    """Run the script as `python data/download.py ...` does, but in this process, which has torch loaded already."""

    def run_here(*words: str) -> None:
        monkeypatch.setattr(paths, "DATA", home)
        monkeypatch.setattr(sys, "argv", ["download.py", *words])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        runpy.run_path(str(ROOT / "data" / "download.py"), run_name="__main__")

    return run_here


@pytest.mark.parametrize(("flags", "sentence"), [(["-form", "x"], "did you mean -from?"), (["-sha256", "0"], "goes with -from")])
def test_wrong_flags_end_with_exit_code_2(type_in, capsys, flags, sentence):
    with pytest.raises(SystemExit) as caught:
        type_in("lfw", *flags)
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


def test_without_network(type_in, monkeypatch, capsys):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    began = time.perf_counter()
    with pytest.raises(InputError) as caught:
        type_in("cifar10")
    assert time.perf_counter() - began < 2
    sys.excepthook(caught.type, caught.value, caught.tb)
    said = capsys.readouterr()
    assert said.err.startswith("error: no network, or no connection to www.cs.toronto.edu: give an archive at hand with -from FILE")
    assert len(said.err.splitlines()) == 1


def test_a_proxy_that_lets_nobody_out_is_asked_once_a_mirror(server, type_in, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "PAUSES_S", (1, 2, 4))
    monkeypatch.setenv("https_proxy", server.url)
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib looks for proxies once a process
    began = time.perf_counter()
    with pytest.raises(InputError, match=r"could not be had.*-from FILE.*sample data"):
        type_in("lfw")
    assert time.perf_counter() - began < 2
    hosts = [f"{fetch.urlsplit(source.url).hostname}:443" for source in download.LFW_SOURCES]
    assert server.requests == [(host, "CONNECT") for host in hosts]
    assert capsys.readouterr().out.count("Tunnel connection failed: 403 Forbidden") == len(hosts)


def test_success_names_folder_numbers_and_next_command(type_in, tmp_path, home, capsys):
    type_in("lfw", "-from", str(written(tmp_path / "mine.tgz", ARCHIVE)))
    folder = home / "lfw"
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == f"{folder}: 4 images of 2 people (the full set has 13,233)"
    assert said[-1].startswith("next: python ")
    assert said[-1].endswith(f"lfw_dataset.py -path_to_folder {folder}")


def test_missing_file_from_inside_data(run_script, tmp_path):
    done = run_script("data/download.py", "lfw", "--from", "nowhere.tgz", cwd=ROOT / "data", COURSE_DATA=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"error: -from: there is no file {ROOT / 'data' / 'nowhere.tgz'} that could be read\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not REAL_LFW.exists(), reason=f"the real archive is not at {REAL_LFW}")
def test_the_real_lfw_has_the_layout_that_is_expected(tmp_path, home):
    """The names of all files; the files themselves only of the first people, since 13,233 files take some seconds to write."""
    with tarfile.open(REAL_LFW) as real, tarfile.open(tmp_path / "first.tar", "w") as first:
        names = []
        for member in real:
            if member.isfile():
                names.append(Path(member.name))
            if len(names) <= 50:
                first.addfile(member, real.extractfile(member))
    assert len(names) == download.DATASETS["lfw"].count
    assert len({name.parent for name in names}) == 5_749
    assert all(len(name.parts) == 3 and name.match("*/*.jpg") for name in names)
    assert len(run(tmp_path / "first.tar")) == 50
    assert (home / "lfw" / "AJ_Cook" / "AJ_Cook_0001.jpg").stat().st_size == 8116
