"""What this machine is, and what this process may use of it: printed by cpu_layout.py, written beside every result."""

import contextlib
import ctypes
import functools
import json
import math
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

PACKAGES = (  # named in results where installed
    *("torch", "torchvision", "numpy", "pillow", "numba", "simplejpeg"),
    *("torchao", "ptflops", "transformers", "datasets", "onnxruntime", "openvino", "nncf"),
)
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # what mallopt(3) of glibc can set
UNTOLD = (OSError, ValueError, LookupError, subprocess.SubprocessError)  # no such file or program, or not the text expected: not told


# ---- what this process may use ---------------------------------------------------------------------------------------


def allowed_cpus() -> list[int]:
    """Numbers of the logical CPUs the scheduler lets this process run on (taskset, cpuset); all where the OS has no such limit."""
    if hasattr(psutil.Process, "cpu_affinity"):  # Linux, Windows, FreeBSD
        return psutil.Process().cpu_affinity()
    return list(range(psutil.cpu_count() or 1))


def affinity_cpus() -> int:
    """How many logical CPUs the scheduler lets this process run on."""
    return len(allowed_cpus())


def cgroup_quota(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """CPUs' worth of time a container may use, the tightest of its cgroup and the ones above; None without a limit.

    cgroup v2 writes "quota period" or "max period" to cpu.max, v1 -1 or a number of microseconds to cpu.cfs_quota_us.
    """
    limits = []
    for folder in _cgroup_folders("cpu", root, membership):
        with contextlib.suppress(*UNTOLD):  # no such file: no limit at this level; "max" is no number: no limit
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            limits += [float(quota) / float(period)] if float(quota) > 0 else []
    return min(limits, default=None)


def cgroup_memory_left(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes a container may still take, the tightest of its cgroup and the ones above; None without a limit.

    File contents that the system cached count as used; what of them is inactive is given back on demand and added here.
    """
    left = []
    for folder in _cgroup_folders("memory", root, membership):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(*UNTOLD):
                free = int((folder / limit).read_text()) - int((folder / used).read_text())
                cached = re.findall(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), flags=re.MULTILINE)
                left.append(max(0, free + max(map(int, cached), default=0)))
    return min(left, default=None)


def _cgroup_folders(controller: str, root: Path, membership: Path) -> list[Path]:
    """Folders with the limits of this process' cgroup and of every one above it, v2 ("0::/path") and v1 ("4:cpu,cpuacct:/path")."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    folders = []
    for controllers, path in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        if controllers and controller not in controllers.split(","):
            continue
        for base in [root / controllers, root / controller] if controllers else [root]:
            inside = base / path.strip("/")  # of the host, perhaps: then only `base` exists, and is the container's own
            folders += [folder for folder in (inside, *inside.parents) if folder.is_relative_to(base)]
    return folders


def usable_cpus() -> int:
    """CPUs that this process can keep busy: affinity and container quota counted, a part of a CPU as one."""
    return min(affinity_cpus(), math.ceil(cgroup_quota() or sys.maxsize))


def usable_cores() -> int:
    """Cores that this process can keep busy with arithmetic: the hardware threads of one core share its multipliers and count once."""
    layout = read_layout() if sys.platform == "linux" else Layout("psutil", _even_sockets(1))  # elsewhere asking for it takes a second
    allowed, cores = set(allowed_cpus()), [core for socket in layout.sockets for core in socket]
    unknown = allowed - {cpu for core in cores for cpu in core}  # a container may show another computer's layout
    return max(1, min(usable_cpus(), sum(not allowed.isdisjoint(core) for core in cores) + len(unknown)))


def available_memory() -> int:
    """Bytes this process may still take without swapping, a container's limit counted."""
    left = cgroup_memory_left()
    return min(psutil.virtual_memory().available, sys.maxsize if left is None else left)


def shared_memory() -> int | None:
    """Bytes free in /dev/shm, through which worker processes hand over their batches; None where there is none (macOS, Windows)."""
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None


def workers_within(memory: int, batch: int, prefetch: int) -> int:
    """How many workers' batches, `prefetch` ahead each, fit into `memory` beside the one in use; both in bytes."""
    return max(0, (memory // batch - 1) // prefetch)


@functools.cache
def glibc() -> ctypes.CDLL | None:
    """The C library of most Linux systems; None on others."""
    return ctypes.CDLL(None) if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None


def keep_memory(keep: bool = True) -> None:
    """Let this process keep the memory of tensors that are freed for the next ones, or give large ones back; only glibc can be told so.

    Memory that was given back costs a fault for each page of 4 KB when it is asked for anew, in every step of a training.
    """
    if library := glibc():
        library.mallopt(M_MMAP_MAX, 0 if keep else 65536)  # how many blocks may lie apart from the others, to be given back each by itself
        library.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # from which size on; the most that glibc comes to by itself
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 64 * 2**20)  # how much may be free at the end of the others


# ---- what this machine is made of ------------------------------------------------------------------------------------


class Cache(NamedTuple):
    name: str  # L1d, L2 or L3
    cpus: tuple[int, ...]  # the logical CPUs that share it; empty where the system does not tell
    kib: int


@dataclass
class Layout:
    """Socket > core > hardware threads, each thread by the number of its logical CPU, and the caches they share."""

    source: str
    sockets: list[list[tuple[int, ...]]]
    caches: list[Cache] = field(default_factory=list)
    numa_nodes: int | None = None


@functools.cache
def read_layout(system: Path = Path("/sys/devices/system")) -> Layout:
    """The layout as the operating system tells it; what it does not tell is dealt out evenly (cores) or left out (caches)."""
    readers = {"linux": lambda: _linux_layout(system), "darwin": _macos_layout, "win32": _windows_layout}
    with contextlib.suppress(*UNTOLD):
        if sys.platform in readers:
            return readers[sys.platform]()
    return Layout("psutil.cpu_count(), dealt out evenly", _even_sockets(1))


def _linux_layout(system: Path) -> Layout:
    sockets, caches = {}, set()
    for folder in system.glob("cpu/cpu[0-9]*/topology"):  # a CPU that is switched off has none
        threads = cpu_numbers((folder / "thread_siblings_list").read_text())
        sockets.setdefault(int((folder / "physical_package_id").read_text()), set()).add(threads)
    for folder in system.glob("cpu/cpu[0-9]*/cache/index[0-9]*"):
        with contextlib.suppress(*UNTOLD):
            level, kind, size, cpus = ((folder / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list"))
            if kind != "Instruction":
                caches.add(Cache(f"L{level}{'d' if kind == 'Data' else ''}", cpu_numbers(cpus), int(size.removesuffix("K"))))
    if not sockets:
        raise ValueError(f"no topology below {system}")
    # Neighbours are cores with the same L3, then the same L2: a computer may number its CPUs in another order.
    shared = {core: [c.cpus for c in sorted(caches, reverse=True) if core[0] in c.cpus] for cores in sockets.values() for core in cores}
    ordered = [sorted(cores, key=lambda core: (shared[core], core)) for _, cores in sorted(sockets.items())]
    return Layout(str(system), ordered, sorted(caches), len(list(system.glob("node/node[0-9]*"))) or None)


def cpu_numbers(text: str) -> tuple[int, ...]:
    """How Linux writes a set of CPUs: "0-3,8" -> (0, 1, 2, 3, 8)."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return tuple(cpu for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1))


def _macos_layout() -> Layout:
    told = dict(line.split(": ", 1) for line in _output("sysctl", "hw").splitlines() if ": " in line)
    sharing = [int(number) for number in told.get("hw.cacheconfig", "").split()] + 4 * [0]  # CPUs to a memory, L1, L2, L3
    caches, first = [], 0
    for kind in [f"hw.perflevel{level}." for level in range(4) if f"hw.perflevel{level}.logicalcpu" in told] or ["hw."]:  # fastest first
        cpus = range(first, first + int(told.get(f"{kind}logicalcpu", 0)))
        for level, name in enumerate(("L1d", "L2", "L3"), start=1):
            size = int(told.get(f"{kind}{name.lower()}cachesize", 0)) // 1024
            group = int(told.get(f"{kind}cpusper{name.lower()}", sharing[level]))
            starts = range(0, len(cpus), group) if size and group else []
            caches += [Cache(name, tuple(cpus[start : start + group]), size) for start in starts]
        first = cpus.stop
    return Layout("sysctl hw", _even_sockets(int(told.get("hw.packages", 1))), sorted(caches))


def _windows_layout() -> Layout:
    question = "Get-CimInstance Win32_Processor | Select-Object L2CacheSize, L3CacheSize | ConvertTo-Json"
    told = json.loads(_output("powershell", "-NoProfile", "-Command", question))
    sockets = told if isinstance(told, list) else [told]
    sizes = {name: sockets[0].get(f"{name}CacheSize") for name in ("L2", "L3")}  # KiB, all of a socket's added up
    caches = [Cache(name, (), size) for name, size in sizes.items() if size]
    return Layout("Win32_Processor (L2, L3: sum of a socket)", _even_sockets(len(sockets)), caches)


def _even_sockets(sockets: int) -> list[list[tuple[int, ...]]]:
    logical = psutil.cpu_count() or 1
    cores = min(psutil.cpu_count(logical=False) or logical, logical)
    sockets = max(1, min(sockets, cores))
    threads = [tuple(range(core * logical // cores, (core + 1) * logical // cores)) for core in range(cores)]
    return [threads[socket * cores // sockets : (socket + 1) * cores // sockets] for socket in range(sockets)]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20).stdout


def cpu_name() -> str:
    """The processor's name as its maker writes it, as far as the operating system tells."""
    name = ""
    with contextlib.suppress(*UNTOLD):
        if sys.platform == "linux":
            name = "".join(re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[:1])
        elif sys.platform == "darwin":
            name = _output("sysctl", "-n", "machdep.cpu.brand_string").strip()
        elif sys.platform == "win32":
            import winreg  # exists on Windows only

            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
                name = winreg.QueryValueEx(key, "ProcessorNameString")[0].strip()
    return name or platform.processor() or platform.machine()


def cpu_has(feature: str) -> bool:
    """Whether the processor has these instructions, avx512_bf16 for example; False where torch is too old to tell."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get(feature, False))


def machine_facts(device: torch.device) -> dict:
    """What a reader needs to judge a figure: processor, cores, memory, operating system, accelerator."""
    return {
        "cpu": cpu_name(),
        "logical_cpus": psutil.cpu_count(),
        "physical_cores": psutil.cpu_count(logical=False),
        "usable_cpus": usable_cpus(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "os": platform.platform(terse=True),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def versions() -> dict:
    """Versions of Python and of the packages that matter to a measurement, where installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
