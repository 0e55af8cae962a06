"""-micro_batches counts those of all processes together, so that the same command computes the same with another number of machines."""

import pytest

from common import parse
from errors import InputError
from m28_distributed_training.training_flags import check, training_parser


def accumulate(monkeypatch, world: int, *flags: str) -> int:
    """What `-accumulate` becomes in a world of that many processes under torchrun."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    args = parse(training_parser("test"), list(flags))
    check(args)
    return args.accumulate


def test_shared_out_among_the_processes(monkeypatch):
    assert [accumulate(monkeypatch, world, "-micro_batches", "4") for world in (1, 2, 4)] == [4, 2, 1]
    assert accumulate(monkeypatch, 2, "-accumulate", "3", "-batch_size", "60") == 3


def test_refused_when_it_does_not_divide_or_is_said_twice(monkeypatch):
    with pytest.raises(InputError, match="-micro_batches 2 cannot be shared out evenly among 3 processes"):
        accumulate(monkeypatch, 3, "-micro_batches", "2")
    with pytest.raises(InputError, match="give one of the two"):
        accumulate(monkeypatch, 2, "-micro_batches", "2", "-accumulate", "2")
