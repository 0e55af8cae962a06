"""Bring one file here over a network that fails: mirrors, resumed transfers, retries, a checksum before use.

Used by download.py, which says what is fetched from where.
"""

import contextlib
import hashlib
import http.client
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, proxy_bypass, urlopen

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from errors import FULL_DISK, InputError

TIMEOUT_S = 30  # silence of a server that counts as a dropped connection
PAUSES_S = (1, 2, 4)  # before another try; bytes that arrived meanwhile start the row anew
HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; course exercise)"}  # figshare may send nothing to urllib's own name
UNKNOWN = "unknown"
OFFLINE = "give an archive at hand with -from FILE, or go on without: every exercise also runs on sample data that it draws itself"


@dataclass(frozen=True)
class Source:
    url: str
    sha256: str | None  # None: unknown, so any content is taken


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def online(url: str, seconds: float = 1.5) -> bool:
    """Whether the server of `url`, or the proxy on the way to it, takes a connection within `seconds`.

    The attempt runs in a thread that is left behind when the time is up: looking up a name can hang for longer than anybody waits.
    """
    reached = threading.Event()

    def connect():
        with contextlib.suppress(OSError, ValueError):  # ValueError: the address makes no sense
            target = urlsplit(url)
            proxy = getproxies().get(target.scheme)
            if proxy and not proxy_bypass(target.hostname):
                target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            port = target.port or (443 if target.scheme == "https" else 80)
            socket.create_connection((target.hostname or "", port), timeout=seconds).close()
            reached.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return reached.is_set()


def transfer(url: str, part: Path) -> None:
    """One try to append to `part` what it lacks of `url`; raises OSError or HTTPException where connection or disk fails."""
    start = size_of(part)
    request = Request(url, headers=HEADERS | ({"Range": f"bytes={start}-"} if start else {}))
    with urlopen(request, timeout=TIMEOUT_S) as response:
        if response.status not in (200, 206):  # 202 is a page for browsers
            raise HTTPError(url, response.status, response.reason, response.headers, None)
        start = start if response.status == 206 else 0  # 200: the server sends all of it, whatever was asked for
        total = start + int(response.headers["Content-Length"] or 0)
        bar = tqdm(total=total or None, initial=start, desc="downloading", unit="B", unit_scale=True)
        with bar, part.open("ab" if start else "wb") as file:
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    if size_of(part) < total:
        raise ConnectionError(f"the connection broke off at {size_of(part) / 1e6:.1f} of {total / 1e6:.1f} MB")


def fetch(url: str, part: Path) -> None:
    """Bring `part` to its full length, over dropped connections; raises InputError where the server does not give it."""
    failures, furthest = 0, size_of(part)
    while True:
        try:
            return transfer(url, part)
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in FULL_DISK:
                part.unlink(missing_ok=True)  # half a file shall not keep the disk full
                raise
            code = error.code if isinstance(error, HTTPError) else None
            if code == 416:  # the server has nothing beyond what is here; the checksum tells whether that is right
                return None
            if size_of(part) > furthest:
                failures, furthest = 0, size_of(part)
            refused = code is not None and code < 500 and code != 429  # 429 and 5xx: the server is busy
            no_way = isinstance(error, URLError) and "Tunnel connection failed" in str(error)  # what http.client says of a proxy's no
            if refused or no_way or failures == len(PAUSES_S):
                raise InputError(f"{url}: {error}") from error
            print(f"{error}; next try in {PAUSES_S[failures]} s")
        time.sleep(PAUSES_S[failures])
        failures += 1


def fetch_checked(source: Source, part: Path) -> Path:
    """Download `source` to `part`; raises InputError, and removes the file, when its SHA-256 is not the expected one."""
    resumed = part.exists()
    print(f"from {source.url}" + (f", going on after {size_of(part) / 1e6:.1f} MB" if resumed else ""))
    fetch(source.url, part)
    found = sha256_of(part)
    if source.sha256 in (None, found):
        return part
    part.unlink()
    if resumed:  # the old half may be to blame
        return fetch_checked(source, part)
    raise InputError(f"{source.url}: the SHA-256 should be {source.sha256} but is {found}, so the file was removed")


def download(sources: tuple[Source, ...], work: Path) -> Path:
    """The first of `sources` that arrives whole, as a file in the folder `work`; raises InputError when none does."""
    part_of = {source: work / f"{(source.sha256 or UNKNOWN)[:12]}.part" for source in sources}
    for source, part in part_of.items():
        if part.exists() and sha256_of(part) == source.sha256:
            return part  # an earlier run was stopped while it unpacked
    with ThreadPoolExecutor() as pool:
        reachable = [source for source, there in zip(sources, pool.map(online, [s.url for s in sources]), strict=True) if there]
    if not reachable:
        hosts = " or ".join(dict.fromkeys(str(urlsplit(source.url).hostname) for source in sources))
        raise InputError(f"no network, or no connection to {hosts}: {OFFLINE}")
    for source in reachable:
        try:
            return fetch_checked(source, part_of[source])
        except InputError as error:
            print(error)
    raise InputError(f"the archive could not be had, see above: fetch {sources[0].url} with a browser, then {OFFLINE}")
