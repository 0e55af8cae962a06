"""What the processor is made of, as each operating system tells it: its name, sockets, cores, hardware threads and caches."""

import contextlib
import functools
import json
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

UNTOLD = (OSError, ValueError, LookupError, subprocess.SubprocessError)  # no such file or program, or not the text expected: not told


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
    return Layout("psutil.cpu_count(), dealt out evenly", even_sockets(1))


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
    return Layout("sysctl hw", even_sockets(int(told.get("hw.packages", 1))), sorted(caches))


def _windows_layout() -> Layout:
    question = "Get-CimInstance Win32_Processor | Select-Object L2CacheSize, L3CacheSize | ConvertTo-Json"
    told = json.loads(_output("powershell", "-NoProfile", "-Command", question))
    sockets = told if isinstance(told, list) else [told]
    sizes = {name: sockets[0].get(f"{name}CacheSize") for name in ("L2", "L3")}  # KiB, all of a socket's added up
    caches = [Cache(name, (), size) for name, size in sizes.items() if size]
    return Layout("Win32_Processor (L2, L3: sum of a socket)", even_sockets(len(sockets)), caches)


def even_sockets(sockets: int) -> list[list[tuple[int, ...]]]:
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
