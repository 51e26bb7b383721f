"""A rank's failure is told by all; test_kill.py has real ones."""

import pytest
from worlds import run_until_exit

from dtrain.distributed import connect
from dtrain.preemption import StopSignal
from dtrain.start import claimed
from dtrain.supervision import watched


def fail_on_rank_1(config, error: Exception) -> int:
    with (
        StopSignal() as stop,
        connect("cpu", 60) as world,
        claimed(config, world, stop) as ready,
        watched(ready, world) as heartbeat,
    ):
        heartbeat.at(4, "thinking")
        if world.rank == 1:
            raise error
        world.gather(None)
    return 0


@pytest.mark.slow
def test_a_collective_that_fails_names_the_rank_that_failed_first(toy):
    config = toy("run")
    codes = run_until_exit(2, fail_on_rank_1, config, KeyError("hat"))
    assert [code for code, _ in codes] == [1, 1]
    assert "rank 1 on " in codes[0][1]
    assert "failed at step 4, thinking: KeyError: 'hat'" in codes[0][1]


def test_an_error_of_its_own_stays_what_it_is(toy):
    def fail_alone() -> int:
        with (
            StopSignal() as stop,
            connect("cpu", 60) as world,
            claimed(toy("run"), world, stop) as ready,
            pytest.raises(RuntimeError, match="my own"),
            watched(ready, world),
        ):
            raise RuntimeError("my own")
        return 0

    assert run_until_exit(1, fail_alone)[0][0] == 0
    assert "my own" in (toy("run").run_dir / "logs" / "rank-0.log").read_text(encoding="utf-8")
