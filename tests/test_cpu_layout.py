"""machine.py and cpu_topology.py on made-up systems, cpu_layout.py on made-up layouts."""

import contextlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import psutil
import pytest
import torch
from matplotlib.colors import to_hex

import cpu_topology
import machine
from cpu_topology import Cache, Layout, cpu_numbers, read_layout
from data.sample import IMAGES, people
from m27_data_loading import cpu_layout
from machine import cgroup_memory_left, cgroup_quota
from paths import ROOT

SCRIPT = "m27_data_loading/cpu_layout.py"
GB = 10**9


def write_files(folder, files: dict[str, str]):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


# ---- what this process may use ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "membership, files, quota",
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),  # v2, inside a container
        ("0::/", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "400000 100000\n"}, 2),  # the parent is tighter
        ("0::/a/b", {"a/cpu.max": "max 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/docker/of/the/host", {"cpu.max": "300000 100000\n"}, 3),  # the host's path, which does not exist in here
        ("0::/", {"cpu.max": "broken\n"}, None),
        ("0::/", {}, None),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),  # v1
        ("4:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 2.5),
        ("4:cpu,cpuacct:/x", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpuset:/\n3:memory:/", {"cpuset/cpu.cfs_quota_us": "50000", "cpuset/cpu.cfs_period_us": "100000"}, None),
        ("9:name=systemd:/\n1:cpu:/\n0::/", {"cpu/cpu.cfs_quota_us": "120000", "cpu/cpu.cfs_period_us": "100000"}, 1.2),  # both
        ("not a line of this file\n", {"cpu.max": "150000 100000\n"}, None),
    ],
)
def test_cgroup_quota(tmp_path, membership, files, quota):
    write_files(tmp_path, {"membership": membership} | {f"cgroup/{name}": text for name, text in files.items()})
    assert cgroup_quota(tmp_path / "cgroup", tmp_path / "membership") == quota


def test_cgroup_limits_where_there_are_no_cgroups(tmp_path):
    assert cgroup_quota(tmp_path / "cgroup", tmp_path / "membership") is None
    assert cgroup_memory_left(tmp_path / "cgroup", tmp_path / "membership") is None


@pytest.mark.parametrize(
    "membership, files, left",
    [
        ("0::/", {"memory.max": "1000", "memory.current": "600", "memory.stat": "anon 400\ninactive_file 100\n"}, 500),
        ("0::/", {"memory.max": "max", "memory.current": "600", "memory.stat": "inactive_file 100\n"}, None),
        ("0::/", {"memory.max": "1000", "memory.current": "1200", "memory.stat": ""}, 0),  # a limit lowered below the use
        (
            "3:memory:/a",
            {
                "memory/a/memory.limit_in_bytes": "900",
                "memory/a/memory.usage_in_bytes": "500",
                "memory/a/memory.stat": "inactive_file 10\ntotal_inactive_file 50\n",
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "800",
                "memory/memory.stat": "inactive_file 0\n",
            },
            450,
        ),
    ],
)
def test_cgroup_memory_left(tmp_path, membership, files, left):
    write_files(tmp_path, {"membership": membership} | {f"cgroup/{name}": text for name, text in files.items()})
    assert cgroup_memory_left(tmp_path / "cgroup", tmp_path / "membership") == left


@pytest.mark.parametrize("affinity, quota, usable", [(8, None, 8), (8, 1.5, 2), (8, 3.0, 3), (2, 16.0, 2), (4, 0.25, 1), (1, None, 1)])
def test_usable_cpus_is_the_smaller_of_affinity_and_quota(monkeypatch, affinity, quota, usable):
    monkeypatch.setattr(machine, "affinity_cpus", lambda: affinity)
    monkeypatch.setattr(machine, "cgroup_quota", lambda: quota)
    assert machine.usable_cpus() == usable


@pytest.mark.parametrize(
    ("allowed", "quota", "cores"),
    [(range(8), None, 4), ((0, 1), None, 1), ((0, 2, 3), None, 2), (range(8), 1.5, 2), ((48, 49), None, 2)],
)
def test_the_threads_of_one_core_count_once(monkeypatch, allowed, quota, cores):
    pairs = [[(0, 1), (2, 3)], [(4, 5), (6, 7)]]  # two sockets of two cores
    monkeypatch.setattr(machine, "read_layout", lambda: Layout("made up", pairs))
    monkeypatch.setattr(machine, "even_sockets", lambda sockets: pairs)
    monkeypatch.setattr(machine, "allowed_cpus", lambda: list(allowed))
    monkeypatch.setattr(machine, "cgroup_quota", lambda: quota)
    assert machine.usable_cores() == cores


def test_affinity_of_this_process():
    known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()
    assert machine.affinity_cpus() == len(machine.allowed_cpus()) == known


def test_affinity_where_the_system_has_none(monkeypatch):
    monkeypatch.setattr(psutil, "Process", object)  # as on macOS: no cpu_affinity
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 6)
    assert machine.allowed_cpus() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("left, expected", [(None, 5 * GB), (2 * GB, 2 * GB), (0, 0), (9 * GB, 5 * GB)])
def test_available_memory_counts_the_limit_of_a_container(monkeypatch, left, expected):
    monkeypatch.setattr(machine, "cgroup_memory_left", lambda: left)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * GB))
    assert machine.available_memory() == expected


COUNT_FAULTS = """
import resource, torch, machine

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(100_000_000, dtype=torch.uint8).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
machine.keep_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(not machine.glibc(), reason="only glibc can be told to keep memory")
def test_kept_memory_costs_no_page_faults():
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 8 * 100_000_000 / 2**21 and kept < given_back / 4  # even where a page is a huge one of 2 MB


def test_memory_is_given_back_as_before_when_told_so(monkeypatch):
    told = {}
    monkeypatch.setattr(machine, "glibc", lambda: SimpleNamespace(mallopt=told.__setitem__))
    machine.keep_memory()
    kept = dict(told)
    machine.keep_memory(False)
    assert kept[machine.M_MMAP_MAX] == 0 < told[machine.M_MMAP_MAX]
    assert kept[machine.M_TRIM_THRESHOLD] > 2**30 > told[machine.M_TRIM_THRESHOLD] == 2 * told[machine.M_MMAP_THRESHOLD]


def test_where_there_is_no_glibc_nothing_is_told(monkeypatch):
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: pytest.fail("no library is to be asked"))
    machine.glibc.cache_clear()
    machine.keep_memory()
    machine.glibc.cache_clear()


# ---- what this machine is made of ------------------------------------------------------------------------------------


@pytest.fixture
def system(monkeypatch):
    """Pretend to be another operating system: system("darwin", {"sysctl hw": "hw.ncpu: 8"}, cores=8, threads=8)."""

    def pretend(platform: str, answers: dict | None = None, cores: int | None = 2, threads: int = 4):
        def run(command, **_):
            for start, answer in (answers or {}).items():
                if " ".join(command).startswith(start):
                    return SimpleNamespace(stdout=answer)
            raise FileNotFoundError(command[0])

        def open_key(*_):
            if "winreg" not in (answers or {}):
                raise FileNotFoundError("no such key")
            return contextlib.nullcontext()

        winreg = SimpleNamespace(HKEY_LOCAL_MACHINE=0, OpenKey=open_key, QueryValueEx=lambda *_: (answers["winreg"], 1))
        read_layout.cache_clear()
        monkeypatch.setitem(sys.modules, "winreg", winreg)
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: threads if logical else cores)

    yield pretend
    monkeypatch.undo()
    read_layout.cache_clear()


def fake_sys(folder, cpus: dict[int, tuple[int, str]], caches: dict[int, list[tuple[str, str, str, str]]], nodes: int = 1):
    """A /sys/devices/system: cpus as number -> (socket, sibling threads), caches as number -> [(level, type, size, sharing)]."""
    for number, (socket, siblings) in cpus.items():
        write_files(folder / f"cpu/cpu{number}/topology", {"physical_package_id": f"{socket}\n", "thread_siblings_list": f"{siblings}\n"})
        for index, values in enumerate(caches.get(number, [])):
            names = ("level", "type", "size", "shared_cpu_list")
            files = {name: f"{value}\n" for name, value in zip(names, values, strict=True)}
            write_files(folder / f"cpu/cpu{number}/cache/index{index}", files)
    (folder / "cpu/cpufreq").mkdir(parents=True)
    for number in range(nodes):
        (folder / f"node/node{number}").mkdir(parents=True)
    return folder


def test_numbers_of_cpus():
    assert cpu_numbers("0-3,8,10-11\n") == (0, 1, 2, 3, 8, 10, 11)
    assert cpu_numbers("\n") == ()


def test_linux_layout_of_two_sockets_with_two_threads_a_core(tmp_path, system):
    system("linux")
    siblings = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    cpus = {cpu: (cpu % 4 // 2, siblings[cpu]) for cpu in range(8)}
    sharing = {0: "0-1,4-5", 1: "2-3,6-7"}  # of a socket
    caches = {
        cpu: [
            ("1", "Data", "48K", siblings[cpu]),
            ("1", "Instruction", "32K", siblings[cpu]),
            ("3", "Unified", "32768K", sharing[cpus[cpu][0]]),
        ]
        for cpu in range(8)
    }
    (tmp_path / "cpu/cpu8").mkdir(parents=True)  # switched off
    layout = read_layout(fake_sys(tmp_path, cpus, caches, nodes=2))
    assert layout.sockets == [[(0, 4), (1, 5)], [(2, 6), (3, 7)]]
    assert [cache for cache in layout.caches if cache.name == "L3"] == [Cache("L3", (0, 1, 4, 5), 32768), Cache("L3", (2, 3, 6, 7), 32768)]
    assert [cache.name for cache in layout.caches].count("L1d") == 4 and len(layout.caches) == 6
    assert layout.numa_nodes == 2


def test_linux_cores_that_share_a_cache_are_neighbours(tmp_path, system):
    system("linux")
    cpus = {cpu: (0, str(cpu)) for cpu in range(4)}
    caches = {cpu: [("3", "Unified", "16384K", "0,2" if cpu % 2 == 0 else "1,3")] for cpu in range(4)}
    assert read_layout(fake_sys(tmp_path, cpus, caches)).sockets == [[(0,), (2,), (1,), (3,)]]


@pytest.mark.parametrize("files", [{}, {"cpu/cpu0/topology/core_id": "0"}, {"cpu/cpu0/topology/thread_siblings_list": "x"}])
def test_linux_without_a_readable_sys(tmp_path, system, files):
    system("linux", cores=2, threads=4)
    layout = read_layout(write_files(tmp_path, files))
    assert layout.sockets == [[(0, 1), (2, 3)]] and layout.caches == [] and layout.numa_nodes is None


def test_number_of_cores_unknown(tmp_path, system):
    system("freebsd14", cores=None, threads=3)
    assert read_layout(tmp_path).sockets == [[(0,), (1,), (2,)]]


APPLE = """hw.ncpu: 8
hw.memsize: 17179869184
hw.perflevel0.logicalcpu: 4
hw.perflevel0.l1dcachesize: 131072
hw.perflevel0.l2cachesize: 12582912
hw.perflevel0.cpusperl2: 4
hw.perflevel1.logicalcpu: 4
hw.perflevel1.l1dcachesize: 65536
hw.perflevel1.l2cachesize: 4194304
hw.perflevel1.cpusperl2: 4
hw.cacheconfig: 8 1 4 0 0 0 0 0 0 0
hw.logicalcpu: 8
hw.l1dcachesize: 65536
hw.l2cachesize: 4194304
hw.packages: 1
"""
INTEL_MAC = """hw.logicalcpu: 4
hw.packages: 1
hw.cacheconfig: 4 2 2 4 0 0 0 0 0 0
hw.l1dcachesize: 32768
hw.l2cachesize: 262144
hw.l3cachesize: 3145728
"""


def test_macos_with_fast_and_slow_cores(tmp_path, system):
    system("darwin", {"sysctl hw": APPLE}, cores=8, threads=8)
    layout = read_layout(tmp_path)
    assert len(layout.sockets) == 1 and len(layout.sockets[0]) == 8
    assert Cache("L1d", (0,), 128) in layout.caches and Cache("L1d", (7,), 64) in layout.caches
    assert layout.caches[-2:] == [Cache("L2", (0, 1, 2, 3), 12288), Cache("L2", (4, 5, 6, 7), 4096)]


def test_macos_on_intel(tmp_path, system):
    system("darwin", {"sysctl hw": INTEL_MAC}, cores=2, threads=4)
    layout = read_layout(tmp_path)
    assert layout.sockets == [[(0, 1), (2, 3)]]
    assert layout.caches == [
        Cache("L1d", (0, 1), 32),
        Cache("L1d", (2, 3), 32),
        Cache("L2", (0, 1), 256),
        Cache("L2", (2, 3), 256),
        Cache("L3", (0, 1, 2, 3), 3072),
    ]


@pytest.mark.parametrize(
    "answer, sockets, caches",
    [
        ('{"L2CacheSize": 8192, "L3CacheSize": 32768}', 1, [Cache("L2", (), 8192), Cache("L3", (), 32768)]),
        ('[{"L2CacheSize": 8192, "L3CacheSize": null}, {"L2CacheSize": 8192, "L3CacheSize": null}]', 2, [Cache("L2", (), 8192)]),
        ("Get-CimInstance : Access denied", 1, []),
        ("", 1, []),
        ("[]", 1, []),
        (None, 1, []),
    ],
)
def test_windows(tmp_path, system, answer, sockets, caches):
    system("win32", {} if answer is None else {"powershell": answer}, cores=4, threads=8)
    layout = read_layout(tmp_path)
    assert len(layout.sockets) == sockets and sum(map(len, layout.sockets)) == 4
    assert layout.caches == caches


@pytest.mark.parametrize(
    "platform, answers, name",
    [
        ("darwin", {"sysctl -n machdep.cpu.brand_string": "Apple M1\n"}, "Apple M1"),
        ("win32", {"winreg": " Core i7 "}, "Core i7"),
        ("win32", {}, "told by platform"),
        ("darwin", {}, "told by platform"),
        ("freebsd14", {}, "told by platform"),
    ],
)
def test_name_of_the_processor(system, monkeypatch, platform, answers, name):
    system(platform, answers)
    monkeypatch.setattr(cpu_topology.platform, "processor", lambda: "told by platform")
    assert cpu_topology.cpu_name() == name


def test_facts_beside_every_result():
    facts = machine.machine_facts(torch.device("cpu"))
    assert facts["device"] == "cpu" and 1 <= facts["usable_cpus"] <= facts["logical_cpus"] and facts["cpu"]
    assert {"python", "torch", "numpy"} <= machine.versions().keys()


# ---- cpu_layout.py ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, workers, binding",
    [
        ({}, 8, "CPU"),
        ({"usable": 64}, 26, "batch of 13,233 images"),  # batches of 512
        ({"usable": 64, "batch_size": 8192}, 2, "batch of 13,233 images"),
        ({"images": 2048}, 4, "batch of 2,048 images"),
        ({"memory": 6 * GB}, 3, "memory"),  # 3 GB hold 7 batches of 384 MB: 3 workers' and the one in use
        ({"memory": 1 * GB}, 0, "memory"),
        ({"shared": 64 * 2**20}, 0, "/dev/shm"),  # docker's default
        ({"shared": 5 * 384 * 10**6}, 2, "/dev/shm"),
        ({"shared": None}, 8, "CPU"),
        ({"shared": 64 * 2**20, "batch_size": 8, "image_size": 32}, 8, "CPU"),
        ({"usable": 1}, 1, "CPU"),
        ({"batch_size": 10**9, "image_size": 10**6}, 0, "memory"),
    ],
)
def test_recommended_workers(changed, workers, binding):
    plenty = {"images": 13_233, "batch_size": 512, "image_size": 250, "usable": 8, "memory": 100 * GB, "shared": 50 * GB}
    rows = cpu_layout.worker_rows(**(plenty | changed))
    assert rows[-1]["item"] == "recommended -num_workers" and rows[-1]["value"] == workers
    assert binding in rows[-1]["source"]


def test_megabytes_of_a_batch_and_in_flight():
    for images, in_flight in {13_233: 8 * 2 + 1, 2048: 4}.items():  # 2,048 images are four batches, however many workers there are
        values = {row["item"]: row["value"] for row in cpu_layout.worker_rows(images, 512, 250, 8, 100 * GB, 50 * GB)}
        assert values["one batch, MB"] == 384
        assert values["batches in flight, MB"] == in_flight * 384


def test_the_images_are_those_that_would_be_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_layout, "DATA", tmp_path)
    assert cpu_layout.images_to_load() == len(people(IMAGES, 0)) == 2048 and list(tmp_path.iterdir()) == []  # nothing is drawn for it
    write_files(tmp_path / "lfw", {"Ada_Ash/Ada_Ash_0001.jpg": "", "Bel_Birch/Bel_Birch_0001.jpg": "", "notes.txt": ""})
    assert cpu_layout.images_to_load() == 2


@pytest.mark.parametrize(
    "cores, physical, usable, phrases",
    [
        (8, 4, 8, ["Number of cores: 8, Number of threads: 16", "the 8 sit on 4 cores", "happens to get all 8"]),
        (8, 8, 8, ["right by chance, because a core has 1 thread", "there are 8, not 16"]),
        (8, None, 8, ["does not tell"]),
        (8, 4, 1.5, ["this process may use 1.5 of the 8"]),
    ],
)
def test_answer_of_the_course(cores, physical, usable, phrases):
    text = "\n".join(cpu_layout.course_answer(cores, physical, usable))
    assert all(phrase in text for phrase in phrases)


def test_asking_for_the_start_method_does_not_fix_it():
    before = multiprocessing.get_start_method(allow_none=True)
    rows = {row["item"]: row["value"] for row in cpu_layout.process_rows(GB, None)}
    assert rows["start of a worker"] in multiprocessing.get_all_start_methods() and rows["free in /dev/shm, GB"] is None
    assert multiprocessing.get_start_method(allow_none=True) == before


@pytest.mark.parametrize("platform, answers", [("darwin", {"sysctl hw": APPLE}), ("darwin", {}), ("win32", {}), ("freebsd14", {})])
def test_rows_and_figure_on_other_systems(system, platform, answers):
    system(platform, answers, cores=None if platform == "freebsd14" else 8, threads=8)
    rows = cpu_layout.main(SimpleNamespace(batch_size=512, image_size=250))
    assert all(isinstance(row["value"], int | float | str | None) for row in rows)
    assert all(row["source"].startswith("not told by ") == (row["value"] is None) for row in rows)
    figure = cpu_layout.plot_layout(read_layout(), list(range(8)), None)
    assert len(filled_threads(figure)) == 8
    plt.close(figure)


def made_up(sockets: int, cores: int, threads: int, cores_an_l3: int | None = None) -> Layout:
    """Sockets of equal cores, numbered as Linux does: first threads first; one L1d and L2 a core, an L3 for some cores."""
    all_cores = [tuple(core + sockets * cores * thread for thread in range(threads)) for core in range(sockets * cores)]
    groups = [all_cores[start : start + cores_an_l3] for start in range(0, len(all_cores), cores_an_l3)] if cores_an_l3 else []
    caches = [Cache(name, core, size) for core in all_cores for name, size in (("L1d", 48), ("L2", 2048))]
    caches += [Cache("L3", tuple(sorted(cpu for core in group for cpu in core)), 32768) for group in groups]
    return Layout("made up", [all_cores[socket * cores : (socket + 1) * cores] for socket in range(sockets)], caches)


LAYOUTS = {
    "one CPU": made_up(1, 1, 1, 1),
    "a laptop": made_up(1, 4, 2, 4),
    "two sockets": made_up(2, 8, 2, 8),
    "64 cores, one L3": made_up(1, 64, 1, 64),
    "chiplets of 6": made_up(1, 24, 2, 6),
    "128 CPUs": made_up(2, 32, 2, 8),
    "56 cores": made_up(1, 56, 2, 56),
    "no L3": made_up(1, 17, 1),
    "nothing told": Layout("", [[(0,), (1,)]], [Cache("L2", (), 512), Cache("L1d", (7,), 32), Cache("L4", (0, 1), 1)]),
}


def filled_threads(figure) -> list:
    return [patch for patch in figure.axes[0].patches if to_hex(patch.get_facecolor()) == cpu_layout.USABLE]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_places_of_cores(layout):
    places = cpu_layout.place_cores(layout, ["L1d", "L2", "L3"])
    assert set(places) == {core for socket in layout.sockets for core in socket}
    assert len(set(places.values())) == len(places) and max(x for x, _ in places.values()) < 16
    for cache in layout.caches:
        lines = {y for core, (_, y) in places.items() if set(core) & set(cache.cpus)}
        sharing = [core for core in places if set(core) & set(cache.cpus)]
        assert len(lines) <= max(1, len(sharing) / 8), f"{cache} is broken over lines"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_figure_fills_what_may_be_used_and_cuts_nothing(layout):
    allowed = [cpu for socket in layout.sockets for core in socket for cpu in core][::2]
    figure = cpu_layout.plot_layout(layout, allowed, 1.5)
    assert len(filled_threads(figure)) == len(allowed)
    figure.canvas.draw()
    texts = [*figure.texts, *figure.axes[0].texts, *figure.legends]
    for box in (text.get_window_extent() for text in texts):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    plt.close(figure)


# ---- the script as a learner runs it ---------------------------------------------------------------------------------


def test_run_without_flags(run_script, results):
    done = run_script(SCRIPT)
    assert (done.returncode, done.stderr) == (0, "")
    for expected in ("physical cores", "usable CPUs", "Number of threads: "):
        assert expected in done.stdout
    saved = json.loads((results / "cpu_layout.json").read_text())
    values = {row["item"]: row["value"] for row in saved["rows"]}
    assert done.stdout.splitlines()[-1].endswith(f"lfw_dataset.py -get_timing -num_workers {values['recommended -num_workers']}")
    assert values["usable CPUs"] == saved["machine"]["usable_cpus"]
    assert (results / "cpu_layout_cores.png").stat().st_size > 5000


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux lets a process choose its CPUs this way")
def test_run_in_its_folder_on_one_cpu(run_script, tmp_path):
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})  # the script inherits it, as under taskset -c
        done = run_script(SCRIPT, "--batch-size", "8", cwd=Path(cpu_layout.__file__).parent, COURSE_RESULTS=str(tmp_path))
    finally:
        os.sched_setaffinity(0, allowed)
    assert (done.returncode, done.stderr) == (0, "")
    values = {row["item"]: row["value"] for row in json.loads((tmp_path / "cpu_layout.json").read_text())["rows"]}
    assert values["CPUs in the affinity"] == values["usable CPUs"] == values["recommended -num_workers"] == 1
    assert done.stdout.splitlines()[-1].endswith("-num_workers 1 -batch_size 8")


def run_here(monkeypatch, *flags) -> int:
    """Run the script in this process up to its exit, which spares the start of Python and torch."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(cpu_layout.__file__, run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("flag, value", [("-batch_size", "0"), ("--image-size", "-3"), ("-batch_size", "many")])
def test_wrong_value_ends_with_one_line(monkeypatch, capsys, flag, value):
    assert run_here(monkeypatch, flag, value) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert flag.lstrip("-").replace("-", "_") in said.err and value in said.err and "at least 1" in said.err


def test_help(monkeypatch, capsys):
    assert run_here(monkeypatch, "-h") == 0
    assert "taskset -c 0 python m27_data_loading/cpu_layout.py" in capsys.readouterr().out
