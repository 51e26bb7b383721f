"""Ranks killed, stopped and told to stop, wherever they are; the run goes on to the same end."""

import json
import os
import random
import signal
import time
from contextlib import suppress

import pytest
from chaos import chaotic, outcome, verify_all
from worlds import run_until_exit, run_world

from dtrain import checkpoint, train
from dtrain.config import Config
from dtrain.fault import POINTS
from dtrain.learner import Learner

SETTINGS = {
    "run__max_steps": 12,
    "checkpoint__every_steps": 4,
    "checkpoint__keep_last": 1,
    "validation__every_steps": 6,
    "validation__beam_size": 1,
}
OFTEN = ("after_backward", "in_save:manifest_written", "in_validation")
"""Points at which kills are tried in every test run; the others take longer."""
STEP_OF = {"in_validation": 6, "in_prune": 6, "in_preparation": 0}
"""At which step a point is passed, where that is not step 8."""


def points_and_ranks() -> list[object]:
    """Every fault point, and the ranks that pass it: only rank 0 saves and prepares."""
    found = []
    for point in POINTS:
        alone = point.startswith("in_save") or "prune" in point or point == "in_preparation"
        for rank in (0,) if alone else (0, 1):
            often = point in OFTEN and (alone or rank == 1)
            marks = [] if often else [pytest.mark.exhaustive]
            found.append(pytest.param(point, rank, marks=[pytest.mark.slow, *marks]))
    return found


def status_of(config: Config) -> dict[str, object]:
    return json.loads((config.run_dir / "status.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def undisturbed(toy_settings, tmp_path_factory):
    """How a run of two ranks ends that nobody disturbs."""
    from conftest import Toy

    config = Toy(toy_settings, tmp_path_factory.mktemp("undisturbed"))("run", **SETTINGS)
    assert run_world(2, train.run, config) == [0, 0]
    return outcome(config)


@pytest.mark.parametrize(("point", "rank"), points_and_ranks())
def test_a_killed_rank_ends_the_run_at_once_and_loses_nothing(
    toy, undisturbed, monkeypatch, point, rank
):
    config = toy("run", **SETTINGS)
    fault = f"rank={rank},step={STEP_OF.get(point, 8)},point={point},signal=KILL"
    monkeypatch.setenv("DTRAIN_FAULT", fault)
    begun = time.monotonic()
    codes = run_until_exit(2, train.run, config)
    assert time.monotonic() - begun < 30
    assert codes[rank][0] == -signal.SIGKILL
    code, told = codes[1 - rank]
    assert code == 1
    assert point == "in_preparation" or f"rank {rank} on " in told, told
    if point not in ("in_preparation", "in_validation"):  # nothing is saved before step 4
        assert verify_all(config) >= 1
    monkeypatch.delenv("DTRAIN_FAULT")
    assert run_world(2, train.run, config) == [0, 0]
    assert outcome(config) == undisturbed


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_others_show_their_stacks(toy, monkeypatch):
    config = toy("run", distributed__timeout=4, distributed__first_step_timeout=20)
    monkeypatch.setenv("DTRAIN_FAULT", "rank=1,step=6,point=after_backward,signal=STOP")
    begun = time.monotonic()
    codes = run_until_exit(3, train.run, config)
    assert time.monotonic() - begun < 4 + 5 + 10  # the time-out, the promise, the first steps
    for rank in (0, 2):
        code, told = codes[rank]
        log = (config.run_dir / "logs" / f"rank-{rank}.log").read_text(encoding="utf-8")
        assert code == 1
        assert "rank 1 on " in told
        assert "stopped" in told
        assert 'File "' in told, "the stack"
        assert "train.py" in log
    assert status_of(config)["status"] == "failed"
    assert "rank 1 on " in str(status_of(config)["why"])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_rank_0_that_hangs_before_training_is_named(toy, monkeypatch):
    """It holds the store that the others ask, which then does not answer."""
    monkeypatch.setenv("DTRAIN_FAULT", "rank=0,point=in_preparation,signal=STOP")
    _, (code, told) = run_until_exit(2, train.run, toy("run"))
    assert code == 1
    assert "rank 0 gave no sign of life for" in told


@pytest.mark.slow
def test_a_rank_whose_code_fails_is_named_by_all(toy):
    config = toy("run")

    def failing(config: Config) -> int:
        update = Learner.update

        def fail_late(self, number):
            if number == 3 and self.world.rank == 1:
                raise ZeroDivisionError("on purpose")
            return update(self, number)

        Learner.update = fail_late
        return train.run(config)

    codes = run_until_exit(2, failing, config)
    assert [code for code, _ in codes] == [1, 1]
    assert "rank 1 on " in codes[0][1]
    assert "ZeroDivisionError: on purpose" in codes[0][1]
    assert "ZeroDivisionError: on purpose" in str(status_of(config)["why"])
    log = (config.run_dir / "logs" / "rank-1.log").read_text(encoding="utf-8")
    assert "Traceback" in log


# ------------------------------------------------------------------ told to stop


class Signals:
    """Sends signals to some of the ranks, `delay` seconds after they started."""

    def __init__(self, delay: float, ranks: list[int], numbers: list[signal.Signals]) -> None:
        self.delay, self.ranks, self.numbers = delay, ranks, numbers

    def __call__(self, processes: list[int]) -> None:
        time.sleep(self.delay)
        for number in self.numbers:
            for rank in self.ranks:
                with suppress(ProcessLookupError):
                    os.kill(processes[rank], number)


def assert_stopped_together(config: Config, codes: list[tuple[int, str]]) -> None:
    assert [code for code, _ in codes] == [0] * len(codes), codes
    status = status_of(config)
    assert status["status"] == "preempted"
    saved = checkpoint.steps_saved(config.run_dir / "checkpoints")
    assert checkpoint.step_of(saved[0]) == status["step"]
    assert outcome(config)[1][-1]["step"] == status["step"]


def any_moments() -> list[object]:
    """Twenty moments from the first imports to the middle of training; some in every test run."""
    dice = random.Random(4)
    moments = [dice.uniform(0.3, 2.5) for _ in range(20)]
    return [
        pytest.param(moment, marks=[] if number < 2 else pytest.mark.exhaustive)
        for number, moment in enumerate(moments)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("moment", any_moments())
def test_a_signal_to_any_one_rank_stops_all_at_the_same_step(toy, moment):
    config = toy("run", run__max_steps=100_000)
    told = Signals(moment, [2], [signal.SIGTERM])
    assert_stopped_together(config, run_until_exit(3, train.run, config, during=told))


@pytest.mark.slow
def test_a_burst_of_signals_is_one_stop(toy):
    config = toy("run", run__max_steps=100_000)
    burst = Signals(1.5, [0, 1], [signal.SIGUSR1, signal.SIGTERM] * 25)
    assert_stopped_together(config, run_until_exit(2, train.run, config, during=burst))


@pytest.mark.slow
def test_a_run_saves_and_leaves_before_its_time_is_up(toy):
    config = toy("run", run__max_steps=100_000, run__time_limit=15)
    begun = time.monotonic()
    codes = run_until_exit(2, train.run, config)
    assert time.monotonic() - begun < 15
    assert_stopped_together(config, codes)
    assert "run.time_limit" in str(status_of(config)["why"])


# ------------------------------------------------------------------ whatever comes


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (2, 3))]
)
def test_a_disturbed_run_ends_as_an_undisturbed_one(toy_settings, tmp_path, seed):
    """Kills, stops, signals and damaged checkpoints at random; 1, 2 and 4 ranks in turn."""
    report = chaotic(toy_settings, tmp_path, seed, steps=120)
    assert report.attempts >= 3, "it was hardly disturbed"
    assert report.same
