"""Where the seconds of a step go, by a clock that the test moves."""

import json
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from worlds import run_world

from dtrain import account, profiling, train
from dtrain.config import Config
from dtrain.distributed import World, alone, connect
from dtrain.learner import Learner, Outcome
from dtrain.phases import Phases, measure

CPU = torch.device("cpu")


class Clock:
    """Shows the time that it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def run_step(phases: Phases, clock: Clock, seconds: dict[str, float]) -> None:
    """Go through the points of a step; `seconds` passes before each."""
    phases.wait_for_data()
    for point, passed in seconds.items():
        clock.now += passed
        phases.at(point.rstrip("_"))


STEP = {
    "before_backward": 0.5,
    "in_backward": 0.0,
    "in_backward_": 2.0,
    "after_backward": 2.0,
    "before_optimizer": 1.0,
    "after_optimizer": 0.25,
}
SHARES = {"data_wait": 0.5, "forward_backward": 4.0, "reduction": 1.0, "optimizer": 0.25}


def test_every_second_of_a_step_is_in_one_phase(clock):
    phases = Phases(CPU)
    run_step(phases, clock, STEP)
    assert phases.last.seconds() == SHARES
    run_step(phases, clock, dict.fromkeys(STEP, 1.0))
    assert phases.last.seconds() == {
        "data_wait": 1,
        "forward_backward": 3,
        "reduction": 1,
        "optimizer": 1,
    }


def test_a_step_without_a_wait_has_none(clock):
    phases = Phases(CPU)
    for point in ("before_backward", "after_backward", "before_optimizer", "after_optimizer"):
        phases.at(point)
        clock.now += 1
    assert phases.last.seconds() == {
        "data_wait": 0,
        "forward_backward": 1,
        "reduction": 1,
        "optimizer": 1,
    }


def test_the_last_gradient_ends_this_ranks_own_work(clock):
    """Time in backward after it, as DistributedDataParallel waits there, is reduction."""

    class Waiting(torch.autograd.Function):
        """Passes a gradient on after a while."""

        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            clock.now += ctx.seconds
            return grad, None

    last, phases = nn.Parameter(torch.ones(2)), Phases(CPU)
    phases.watch(last)
    last.sum().backward()  # a rehearsal is no step
    phases.wait_for_data()
    for _ in range(2):
        phases.at("in_backward")
        Waiting.apply(last, 3.0).sum().backward()
        clock.now += 0.5
    phases.at("after_backward")
    clock.now += 1
    for point in ("before_optimizer", "after_optimizer"):
        phases.at(point)
    assert phases.last.seconds() == {
        "data_wait": 0,
        "forward_backward": 6,
        "reduction": 2,
        "optimizer": 0,
    }


def test_what_lies_between_steps_is_a_share_of_all_time(clock):
    phases = Phases(CPU)
    for _ in range(2):
        run_step(phases, clock, STEP)
        phases.note_step(5.75)
        clock.now += 2
    assert phases.share_between_steps() == pytest.approx(4 / 15.5)
    run_step(phases, clock, STEP)
    phases.note_step(5.75)
    assert phases.share_between_steps() == 0


@pytest.mark.usefixtures("clock")
def test_a_gpu_is_asked_when_it_passed_not_when_it_was_told(monkeypatch):
    """The program runs ahead: its clock stands still here, and events tell the GPU's time."""
    waits = []

    class Event:
        passed = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.passed

        def synchronize(self):
            waits.append(self)

        def elapsed_time(self, later):
            return 1000 * (later.at - self.at)  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    phases = Phases(torch.device("cuda", 0))
    phases.wait_for_data()
    for point, seconds in STEP.items():
        Event.passed += seconds
        phases.at(point.rstrip("_"))
    assert not waits
    assert phases.last.seconds() == SHARES
    assert waits


def test_shares_add_up_to_the_step(clock):
    phases = Phases(CPU)
    run_step(phases, clock, STEP)
    phases.note_step(5.75)
    found = measure(phases.last.seconds(), phases, alone("cpu"))
    assert found == {
        "train/data_wait_share": 0.5 / 5.75,
        "train/forward_backward_share": 4 / 5.75,
        "train/reduction_share": 1 / 5.75,
        "train/optimizer_share": 0.25 / 5.75,
        "train/between_steps_share": 0,
    }


def measure_on_rank() -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch, connect("cpu", 60) as world:
        clock = Clock(patch)
        phases = Phases(CPU)
        run_step(phases, clock, STEP | {"after_backward": (1.0, 2.5, 1.0)[world.rank]})
        return measure(phases.last.seconds(), phases, replace(world))


def test_the_rank_that_others_wait_for_is_named():
    for found in run_world(3, measure_on_rank):
        assert found["train/slowest_rank"] == 1
        assert found["train/slowest_rank_ratio"] == pytest.approx(5 / ((3.5 + 5 + 3.5) / 3))


def train_and_note(config: Config, behind: bool) -> tuple[list[float], list[float], list[int]]:
    """Train; if `behind`, a step takes 50 ms more, for which the program waits when it asks.

    Returns:
        The seconds of each step by the clock around it; those of all phases of each that was
        logged; and how many steps there were whenever a trace was written.
    """
    around, inside, written = list[float](), list[float](), list[int]()
    really_note, really_measure, really_read = Phases.note_step, account.measure, Outcome.read

    def note(self: Phases, seconds: float) -> None:
        around.append(seconds)
        really_note(self, seconds)

    def measure_both(seconds: dict[str, float], phases: Phases, world: World) -> dict[str, float]:
        inside.append(sum(seconds.values()))
        return really_measure(seconds, phases, world)

    def read_late(self: Outcome) -> Tensor:
        if not hasattr(self, "is_read"):
            time.sleep(0.05)
        self.is_read = True
        return really_read(self)

    Phases.note_step, account.measure = note, measure_both
    profiling._write_trace = lambda *_: written.append(len(around))
    if behind:
        Learner.runs_behind = True
        Outcome.read = read_late
    train.run(config)
    return around, inside, written


def metrics_of(config: Config) -> list[dict[str, float]]:
    text = (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_phases_of_a_training_are_all_of_its_steps(toy):
    config = toy("run", batch__tokens_per_step=256)
    [(around, _, _)] = run_world(1, train_and_note, config, False)
    lines = metrics_of(config)
    steps = [line["train/step_seconds"] for line in lines]
    assert len(steps) == len(around) == 12
    assert all(inside <= whole for inside, whole in zip(steps, around, strict=True))
    assert sum(steps) > 0.9 * sum(around)
    for line in lines:
        assert line["train/forward_backward_share"] > line["train/optimizer_share"] > 0
        assert 0 <= line["train/between_steps_share"] < 1


@pytest.mark.slow
def test_the_program_that_waits_for_a_device_is_in_a_step(toy):
    """A step has the seconds of its phases, however late the program hears that it is through."""
    settings = {"batch__tokens_per_step": 256, "metrics__every_steps": 4}
    config = toy("run", **settings, run__profile__start=2, run__profile__steps=1)
    [(around, inside, written)] = run_world(1, train_and_note, config, True)
    assert len(around) == 12
    assert written == [2]  # the time that writing takes is not a step's
    lines = metrics_of(config)
    assert [line["train/step_seconds"] for line in lines] == pytest.approx(inside)
    for line in lines[1:]:  # what comes before the first step is between steps too
        assert line["train/between_steps_share"] < 0.2
