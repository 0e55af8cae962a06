"""How long something takes: warm-up outside the clock, repeats, several things in turn, and whether a difference is one."""

from __future__ import annotations

import contextlib
import io
import statistics
import timeit
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:  # it takes seconds to import, so the functions that need it do it
    import torch


@dataclass
class Timing:
    """Single runs of one thing, each in milliseconds a call."""

    runs_ms: list[float]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.runs_ms)

    @property
    def sd_ms(self) -> float:
        return spread(self.runs_ms)


def spread(runs: list[float]) -> float:
    """Standard deviation of a sample (n - 1 below the line); 0 for a single run."""
    return statistics.stdev(runs) if len(runs) > 1 else 0.0


def measure(function, device: torch.device, repeats: int = 5) -> Timing:
    """Time `function()`: warm-up outside the clock, device synchronised, `repeats` runs of enough calls each."""
    return measure_alternately({"function": function}, device, repeats)["function"]


def measure_alternately(functions: dict, device: torch.device, repeats: int = 5, said: str | None = None) -> dict[str, Timing]:
    """Time several functions in turn, A B A B ..., so that a machine that drifts drifts for all of them; `said`: of a progress bar."""
    timers = {name: _Timer(function, device) for name, function in functions.items()}
    runs = {name: [] for name in functions}
    for name, timer in tqdm((repeats + 1) * [*timers.items()], said, leave=False, disable=not said):
        runs[name].append(timer.run_ms())
    return {name: Timing(runs_ms[1:]) for name, runs_ms in runs.items()}  # the first round was the warm-up


class _Timer:
    """Milliseconds a call of a function; torch.utils.benchmark finds once, in the first run, how many calls make ten of them."""

    def __init__(self, function, device: torch.device) -> None:
        import torch

        with contextlib.redirect_stderr(io.StringIO()):  # a CUDA build of torch complains here on a machine without a GPU
            from torch.utils import benchmark
        synchronised = (lambda: (function(), torch.mps.synchronize())) if device.type == "mps" else function
        self.first = benchmark.Timer("function()", globals={"function": synchronised}, num_threads=torch.get_num_threads())
        self.later, self.found = timeit.Timer(synchronised, timer=benchmark.timer), None  # this timer waits for a GPU

    def run_ms(self) -> float:
        if not self.found:
            self.found = self.first.blocked_autorange(min_run_time=0.01)
            return self.found.median * 1e3
        calls = self.found.number_per_run
        return statistics.median(self.later.repeat(len(self.found.times), calls)) / calls * 1e3


def times_as_fast(runs_ms: list[float], their_runs_ms: list[float], name: str) -> str:
    """How many times as fast as what is called `name`: median and range of the rounds, in each of which both were measured."""
    ratios = [their / own for their, own in zip(their_runs_ms, runs_ms, strict=True)]
    return f"{statistics.median(ratios):.2f}x {name} ({min(ratios):.2f} to {max(ratios):.2f}, {verdict(ratios, 'faster', 'slower')})"


def verdict(ratios: list[float], above: str, below: str) -> str:
    """What the ratios of all rounds say: `above` where each is more than 1, `below` where each is less; else nothing."""
    return above if min(ratios) > 1 else below if max(ratios) < 1 else "cannot tell"
