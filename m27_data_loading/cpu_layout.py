"""What is this CPU made of, and how much of it may this process use? The answer sets -num_workers of a DataLoader.

    python m27_data_loading/cpu_layout.py
    python m27_data_loading/cpu_layout.py -batch_size 4096       what do larger batches allow?
    taskset -c 0 python m27_data_loading/cpu_layout.py           Linux: the same machine, one CPU allowed

A socket holds one processor, a processor several cores, a core one or more hardware threads. The operating system counts hardware
threads and calls each a logical CPU. The threads of a core share its arithmetic units and its L1 and L2 caches: one works while the
other waits. Decoding a JPEG keeps the integer units busy and waits little, so the second thread of a core adds much less than a
second core would (measure it: lfw_dataset.py -get_timing under taskset -c, on the two threads of one core, then on two cores).
A virtual machine shows what its host chose to show: two of its cores may be two threads of one.

What exists is not what a process may use. The affinity says which logical CPUs it may run on; the quota of a container says how much
time it gets a second, on whichever CPUs: with 1.5 CPUs' worth, 64 busy workers wait most of the time.

A worker of a DataLoader is a process that decodes whole batches, and puts up to 2 of them ahead into shared memory. So the number
of workers has four limits, and the smallest one holds: the CPUs, the batches there are, the memory, and on Linux /dev/shm. While a
GPU trains, the main process mostly waits; a model that trains on the same CPUs competes with the workers: try half as many, too.
"""

import math
import multiprocessing
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
import torch
from matplotlib.patches import Patch, Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
from common import new_parser, parse, positive_int, print_table, save_figure, save_results
from cpu_topology import Cache, Layout, cpu_name, read_layout
from data.sample import IMAGES
from machine import (
    affinity_cpus,
    allowed_cpus,
    available_memory,
    cgroup_quota,
    shared_memory,
    usable_cpus,
    workers_within,
)
from paths import DATA

START_METHODS = "multiprocessing; Linux: fork, from Python 3.14 on forkserver; macOS, Windows: spawn"
BATCH_SIZE = 512  # the default of lfw_dataset.py
PREFETCH = 2  # batches a worker prepares ahead, DataLoader's default
LEVELS = {"L1d": "#f6c85f", "L2": "#ee8a4a", "L3": "#d98880"}  # caches from the core outwards, and their colours
USABLE = "#4878a8"  # colour of a hardware thread that this process may use
THREAD, BAR = 0.55, 0.34  # heights of a thread and of a cache in the drawing, in widths of a core


def row(item: str, value, source: str) -> dict:
    return {"item": item, "value": value, "source": source if value is not None else f"not told by {source}"}


def hardware_rows(layout: Layout) -> list[dict]:
    """What the machine has, whoever uses it."""
    cores = psutil.cpu_count(logical=False)
    threads = max(len(core) for socket in layout.sockets for core in socket)
    return [
        row("processor", cpu_name(), "its maker's name, from the operating system"),
        row("sockets", len(layout.sockets), layout.source),
        row("physical cores", cores, "psutil.cpu_count(logical=False)"),
        row("hardware threads a core", threads if cores else None, layout.source),
        row("logical CPUs", multiprocessing.cpu_count(), "multiprocessing.cpu_count(), which counts hardware threads"),
        row("NUMA nodes", layout.numa_nodes, layout.source),
        *cache_rows(layout),
        row("memory, GB", round(psutil.virtual_memory().total / 1e9, 1), "psutil.virtual_memory().total"),
    ]


def cache_rows(layout: Layout) -> list[dict]:
    """Size of one cache of each level, and how many logical CPUs share it; where cores differ, those of the first core."""
    rows = []
    for level in LEVELS:
        cache = next((cache for cache in layout.caches if cache.name == level), None)
        rows.append(row(f"{level} cache, KiB", cache and cache.kib, layout.source))
        rows.append(row(f"CPUs that share one {level}", len(cache.cpus) or None if cache else None, layout.source))
    return rows


def process_rows(memory: int, shared: int | None) -> list[dict]:
    """What this process may use of it, and how it would start its workers."""
    quota = cgroup_quota()
    start = multiprocessing.get_start_method(allow_none=True)  # without allow_none, the question would fix the answer for good
    shared_gb = None if shared is None else round(shared / 1e9, 2)
    return [
        row("CPUs in the affinity", affinity_cpus(), "psutil.Process().cpu_affinity(); all of them on macOS"),
        row("CPU quota", round(quota, 2) if quota else "no limit", "cgroup cpu.max (v2) or cpu.cfs_quota_us (v1)"),
        row("usable CPUs", usable_cpus(), "the smaller of the two, a part of a CPU counted as one"),
        row("memory available, GB", round(memory / 1e9, 2), "psutil.virtual_memory().available, or less by a cgroup's limit"),
        row("free in /dev/shm, GB", shared_gb, "shutil.disk_usage; Linux only: batches pass through it"),
        row("start of a worker", start or multiprocessing.get_all_start_methods()[0], START_METHODS),
        row("threads of torch, here", torch.get_num_threads(), "torch.get_num_threads()"),
        row("threads of torch, in a worker", 1, "set by DataLoader: parallel by processes, not by threads"),
    ]


def worker_rows(images: int, batch_size: int, image_size: int, usable: int, memory: int, shared: int | None) -> list[dict]:
    """The limits on the number of workers, and the smallest of them; memory in bytes, `shared` (memory) None without /dev/shm."""
    batch = batch_size * 3 * image_size**2 * 4  # bytes of float32
    limits = [
        row("workers by CPUs", usable, "one for each usable CPU, the main process mostly waits"),
        row("workers by batches", -(-images // batch_size), f"one for each batch of {images:,} images, more would have nothing to do"),
        row("workers by memory", workers_within(memory // 2, batch, PREFETCH), "half of the available memory holds no more such batches"),
    ]
    if shared is not None:
        reason = "/dev/shm holds no more such batches; docker: --shm-size"
        limits.append(row("workers by /dev/shm", workers_within(shared, batch, PREFETCH), reason))
    smallest = min(limits, key=lambda limit: limit["value"])  # of equals the first
    workers = smallest["value"]
    in_flight = min(workers * PREFETCH + 1, -(-images // batch_size))
    return [
        row("one batch, MB", round(batch / 1e6, 1), f"{batch_size} images x 3 colours x {image_size} x {image_size} pixels x 4 bytes"),
        *limits,
        row("batches in flight, MB", round(in_flight * batch / 1e6, 1), f"workers {workers} x {PREFETCH} ahead + the one in use, or all"),
        row("recommended -num_workers", workers, smallest["source"]),
    ]


def images_to_load() -> int:
    """How many images lfw_dataset.py loads when it is given no folder: the real LFW's where they are, else the drawn ones."""
    return len(list((DATA / "lfw").glob("*/*.jpg"))) or IMAGES


def course_answer(cores: int, physical: int | None, usable: float) -> list[str]:
    """What the course's two lines print, `cores` being multiprocessing.cpu_count(), and what is wrong with it on this machine."""
    sitting = f"the {cores} sit on {physical} cores"
    if physical is None:
        sitting = f"on how many cores the {cores} sit, this system does not tell"
    elif physical == cores:
        sitting = f"{cores} is right by chance, because a core has 1 thread here"
    used = f"may use {usable:g} of the {cores}" if usable < cores else f"happens to get all {cores}"
    return [
        f"Number of cores: {cores}, Number of threads: {2 * cores}",
        f"  cpu_count() counts hardware threads, not cores: {sitting}.",
        f"  Twice that is wrong on every machine, since it counts the threads already: there are {cores}, not {2 * cores}.",
        f"  Affinity and quota are left out: this process {used}.",
    ]


def plot_layout(layout: Layout, allowed: list[int], quota: float | None) -> plt.Figure:
    """The map of sockets, cores, hardware threads and caches; two cores take an inch."""
    levels = [name for name in LEVELS if any(cache.name == name and cache.cpus for cache in layout.caches)]
    places = place_cores(layout, levels)
    right, top = max(x for x, _ in places.values()) + 1, max(map(len, places)) * THREAD + 0.8
    bottom = min(y for _, y in places.values()) - len(levels) * BAR
    height = (top - bottom) / 2 + 1.1  # inches: the map, 0.5 for the title, 0.6 for legend and footer
    figure = plt.figure(figsize=(max(right / 2, 5) + 0.4, height))
    axes = figure.add_axes((0, 0.6 / height, 1, 1 - 1.1 / height), xlim=(-0.2, right + 0.2), ylim=(bottom - 0.1, top), aspect="equal")
    axes.axis("off")
    for number, socket in enumerate(layout.sockets):
        axes.text(0.05, places[socket[0]][1] + top - 0.55, f"socket {number}", fontsize=8)
    draw_cores(axes, places, allowed)
    draw_caches(axes, places, layout.caches, levels)
    title = f"cores: {len(places)}, hardware threads: {sum(map(len, places))}, may use: {len(allowed)}"
    figure.suptitle(title + (f", quota: {quota:.3g} CPUs" if quota else ""), fontsize=9, y=1 - 0.15 / height)
    legend = [Patch(facecolor=USABLE, label="may use"), Patch(facecolor="white", edgecolor="grey", label="may not use")]
    legend += [Patch(facecolor=LEVELS[name], label=f"{name} cache") for name in levels]
    figure.legend(handles=legend, loc="lower center", bbox_to_anchor=(0.5, 0.25 / height), ncols=5, fontsize=7, frameon=False)
    return figure


def place_cores(layout: Layout, levels: list[str]) -> dict[tuple[int, ...], tuple[float, float]]:
    """The lower left corner of each core: at most 16 in a line, no cache broken over lines where that can be, socket below socket."""
    threads = max(len(core) for socket in layout.sockets for core in socket)
    sharing = max([threads, *(len(cache.cpus) for cache in layout.caches if cache.name in levels[-1:])]) // threads  # cores
    in_line = next((n for n in range(16, 7, -1) if n % sharing == 0 or sharing % n == 0), 16)
    line = threads * THREAD + len(levels) * BAR + 0.4  # height
    places, y = {}, 0.0
    for socket in layout.sockets:
        places |= {core: (i % in_line, y - i // in_line * line) for i, core in enumerate(socket)}
        y = places[socket[-1]][1] - line - 0.5
    return places


def draw_cores(axes, places: dict, allowed: list[int]) -> None:
    """A box for each core, a field in it for each hardware thread: filled where this process may run."""
    for core, (x, y) in places.items():
        axes.add_patch(Rectangle((x + 0.05, y), 0.9, THREAD * len(core), fill=False))
        for i, cpu in enumerate(core):
            fill, ink = (USABLE, "white") if cpu in allowed else ("white", "grey")
            corner = (x + 0.12, y + THREAD * i + 0.06)
            axes.add_patch(Rectangle(corner, 0.76, THREAD - 0.12, facecolor=fill, edgecolor="grey", linewidth=0.5))
            axes.text(x + 0.5, y + THREAD * (i + 0.5), cpu, color=ink, fontsize=7, ha="center", va="center_baseline")


def draw_caches(axes, places: dict, caches: list[Cache], levels: list[str]) -> None:
    """A bar for each cache below the cores that share it, framed together where they fill several lines."""
    for name, cpus, kib in caches:
        corners = [corner for core, corner in places.items() if set(core) & set(cpus)]
        if name not in levels or not corners:
            continue
        x, y = zip(*corners, strict=True)
        left, width = min(x) + 0.05, max(x) - min(x) + 0.9
        bar = min(y) - BAR * (levels.index(name) + 1)
        axes.add_patch(Rectangle((left, bar), width, BAR - 0.06, facecolor=LEVELS[name]))
        size = f"{kib / 1024:g} MiB" if kib >= 1024 else f"{kib} KiB"
        axes.text(left + width / 2, bar + BAR / 2 - 0.03, size, fontsize=5, ha="center", va="center_baseline")
        if max(y) > min(y):
            height = max(y) - bar + max(map(len, places)) * THREAD + 0.08
            axes.add_patch(Rectangle((left - 0.1, bar), width + 0.2, height, fill=False, edgecolor=LEVELS[name]))


def main(args) -> list[dict]:
    memory, shared = available_memory(), shared_memory()
    workers = worker_rows(images_to_load(), args.batch_size, args.image_size, usable_cpus(), memory, shared)
    return [*hardware_rows(read_layout()), *process_rows(memory, shared), *workers]


if __name__ == "__main__":
    parser = new_parser(__doc__)
    parser.add_argument("-batch_size", type=positive_int, default=BATCH_SIZE, help=f"images a batch (default: {BATCH_SIZE})")
    parser.add_argument("-image_size", type=positive_int, default=250, help="side of an image in pixels (default: 250)")
    args = parse(parser)
    rows = main(args)
    print_table(rows)
    print("\nThe course's answer to the same question:")
    usable = min(affinity_cpus(), cgroup_quota() or math.inf)
    print(*course_answer(multiprocessing.cpu_count(), psutil.cpu_count(logical=False), usable), sep="\n")
    save_results(__file__, args, rows)
    figure = plot_layout(read_layout(), allowed_cpus(), cgroup_quota())
    save_figure(figure, __file__, "cores", args, f"layout from {read_layout().source}")
    flags = f"-num_workers {rows[-1]['value']}" + (f" -batch_size {args.batch_size}" if args.batch_size != BATCH_SIZE else "")
    print(f"Recommended: {flags} ({rows[-1]['source']}); try: python m27_data_loading/lfw_dataset.py -get_timing {flags}")
