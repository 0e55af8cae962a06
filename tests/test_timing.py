"""timing.py: a sleep is seen, turns are taken, and a verdict needs all rounds on one side."""

import statistics
import time

import pytest
import torch

import timing
from timing import measure, measure_alternately, spread, times_as_fast

CPU = torch.device("cpu")


def test_measure_sees_a_sleep_and_counts_its_runs():
    timed = measure(lambda: time.sleep(0.02), CPU, repeats=3)
    assert len(timed.runs_ms) == 3
    assert min(timed.runs_ms) >= 20 and timed.median_ms == statistics.median(timed.runs_ms)
    assert timed.sd_ms == pytest.approx(statistics.stdev(timed.runs_ms))


def test_alternating_measurement_takes_turns():
    called = []
    timings = measure_alternately({name: lambda name=name: (called.append(name), time.sleep(0.02)) for name in "ab"}, CPU, repeats=3)
    turns = "".join(name for number, name in enumerate(called) if number == 0 or name != called[number - 1])
    assert turns == "abababab" and all(len(timing.runs_ms) == 3 for timing in timings.values())
    assert "".join(called[-6:]) == "ababab"  # a call longer than ten milliseconds is made once a round, when that is known


def test_short_calls_are_made_many_times_a_round():
    called = []
    timed = measure(lambda: (called.append(None), time.sleep(0.001)), CPU, repeats=2)
    assert len(called) >= 3 * 5 and all(1 <= ms < 10 for ms in timed.runs_ms)


def test_the_first_round_is_dropped():
    seconds = iter([0.02, 0.5])  # the first call only looks how long one takes
    timed = measure(lambda: time.sleep(next(seconds, 0.02)), CPU, repeats=2)
    assert len(timed.runs_ms) == 2 and max(timed.runs_ms) < 400


def test_a_gpu_is_waited_for(monkeypatch):
    from torch.utils import benchmark

    assert timing._Timer(lambda: None, CPU).later.timer is benchmark.timer  # it waits for CUDA, where there is one
    called, waited = [], []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(None))
    measure(lambda: (called.append(None), time.sleep(0.01)), torch.device("mps"), repeats=2)
    assert len(called) == len(waited) > 2


def test_the_spread_is_that_of_a_sample():
    assert spread([1.0, 3.0]) == pytest.approx(2**0.5)
    assert spread([1.0]) == 0


def test_a_verdict_is_about_every_round():
    assert times_as_fast([1.0, 2.0, 4.0], [4.0, 4.0, 8.0], "the other") == "2.00x the other (2.00 to 4.00, faster)"
    assert times_as_fast([4.0, 4.0], [1.0, 2.0], "the other").endswith("(0.25 to 0.50, slower)")
    assert times_as_fast([1.0, 2.0], [2.0, 1.0], "the other").endswith("(0.50 to 2.00, cannot tell)")
