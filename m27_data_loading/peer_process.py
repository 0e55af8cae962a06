"""Peers of `loading_peers.py`, each in a process of its own, where its threads and its copies of OpenCV and OpenMP meet nobody else's."""

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from m27_data_loading.loading_peers import PEERS, installed

OPENED = {}  # in a peer's own process: the loader that was opened there


def open_here(name: str, *args) -> None:
    if "fork" in multiprocessing.get_all_start_methods():  # a spawned process would spawn, too, and that takes no local function
        multiprocessing.set_start_method("fork", force=True)
    OPENED[name] = PEERS[name](*args)


def time_here(name: str) -> dict:
    """One whole epoch of an opened peer: images, images/s."""
    begin = time.perf_counter()
    images = sum(len(batch) for batch in OPENED[name])
    return {"images": images, "images_per_s": images / (time.perf_counter() - begin), "page_faults": None}


class Peer:
    """One peer, opened and timed in its own process; the process lives until this object is gone."""

    def __init__(self, name: str, folder: Path, work: Path, batch_size: int, threads: int) -> None:
        self.name = name
        self.process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.process.submit(open_here, name, Path(folder), work / name, batch_size, threads).result()

    def time_epoch(self) -> dict:
        return self.process.submit(time_here, self.name).result()


def start_peers(folder: Path, work: Path, batch_size: int, threads: int) -> dict[str, Peer]:
    """All peers found here, ready to be timed; one that is missing or does not start is named with the reason and left out."""
    peers = {}
    for name in PEERS:
        try:
            if name not in installed():
                raise ImportError("not installed, see requirements-peers.txt")
            peers[f"peer: {name}"] = Peer(name, folder, work, batch_size, threads)
        except Exception as error:  # whatever a library may raise, or its process die of
            print(f"peer {name} is left out: {type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}")
    return peers
