"""What this process may use of the machine, and what is written about the machine beside every result."""

import contextlib
import ctypes
import functools
import math
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from cpu_topology import UNTOLD, Layout, cpu_name, even_sockets, read_layout

PACKAGES = (  # named in results where installed
    *("torch", "torchvision", "numpy", "pillow", "numba", "simplejpeg"),
    *("torchao", "ptflops", "transformers", "datasets", "onnxruntime", "openvino", "nncf"),
)
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # what mallopt(3) of glibc can set


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
    layout = read_layout() if sys.platform == "linux" else Layout("psutil", even_sockets(1))  # elsewhere asking for it takes a second
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


# ---- what is written beside a result ---------------------------------------------------------------------------------


def cpu_has(feature: str) -> bool:
    """Whether the processor has these instructions, avx512_bf16 for example; False where torch is too old to tell."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get(feature, False))


def computes_with(device: torch.device) -> str:
    """What the last bits of a result depend on beside program and input: processor and its widest instructions, GPU, version of torch."""
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return f"{gpu}{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}"


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
