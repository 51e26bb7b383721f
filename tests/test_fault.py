"""Faults strike where they are asked for, and nowhere else."""

import errno
import signal

import pytest

from dtrain import fault


@pytest.fixture
def heard():
    """Signals that this process was sent."""
    numbers = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("wanted", "rank", "point", "step", "strikes"),
    [
        ("", "0", "after_backward", 7, False),
        ("point=after_backward,signal=USR1", "3", "after_backward", 7, True),
        ("rank=1,step=7,point=after_backward,signal=USR1", "1", "after_backward", 7, True),
        ("rank=1,step=7,point=after_backward,signal=USR1", "0", "after_backward", 7, False),
        ("rank=1,step=7,point=after_backward,signal=USR1", "1", "after_backward", 8, False),
        ("rank=1,step=7,point=after_backward,signal=USR1", "1", "before_backward", 7, False),
        (
            "step=2,point=in_prune,signal=USR1; step=7,point=in_prune,signal=USR1",
            "0",
            "in_prune",
            7,
            True,
        ),
    ],
)
def test_a_signal_strikes_its_rank_step_and_point(
    monkeypatch, heard, wanted, rank, point, step, strikes
):
    monkeypatch.setenv("DTRAIN_FAULT", wanted)
    monkeypatch.setenv("RANK", rank)
    fault.strike(point, step)
    assert heard == [signal.SIGUSR1] * strikes


def test_an_error_is_raised_as_the_system_would(monkeypatch):
    monkeypatch.setenv("DTRAIN_FAULT", "point=in_save:begun,error=ENOSPC")
    with pytest.raises(OSError, match="No space left") as caught:
        fault.strike("in_save:begun", 3)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("wanted", ["point=nowhere,signal=KILL", "where=in_prune", "point"])
def test_a_misspelt_fault_is_an_error(monkeypatch, wanted):
    monkeypatch.setenv("DTRAIN_FAULT", wanted)
    with pytest.raises(ValueError, match=r"DTRAIN_FAULT|dictionary update"):
        fault.strike("in_prune")
