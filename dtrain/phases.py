"""Phases: where the seconds of a step go on this rank, and which rank the others wait for.

The CPU's clock tells it on a CPU. A GPU works behind the program, so there events in its queue
tell it; they are read when a step is logged, with the next one on its way.
"""

import time
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtrain.distributed import World

PHASES = ("data_wait", "forward_backward", "reduction", "optimizer")
"""In their order; a step is nothing else. Reduction is what of it backward does not hide."""

_BEGUN_AT = {
    "before_backward": "forward_backward",
    "in_backward": "forward_backward",
    "after_backward": "reduction",
    "before_optimizer": "optimizer",
}
"""Points of a step, as the learner tells them."""


class _Mark(NamedTuple):
    phase: str
    time: float
    event: torch.cuda.Event | None


class StepTimes:
    """When each phase of a step began, and when the last one ended."""

    def __init__(self, marks: list[_Mark]) -> None:
        self._marks = marks

    def seconds(self) -> dict[str, float]:
        """Give the seconds of each phase; on a GPU, wait until it is through with the step."""
        totals = dict.fromkeys(PHASES, 0.0)
        for begun, ended in pairwise(self._marks):
            totals[begun.phase] += _between(begun, ended)
        return totals


class Phases:
    """Stops the time of a rank's steps, phase by phase.

    Attributes:
        are_shown: whether a profiler is to see them, as spans named `dtrain: PHASE`.
        last: of the last step that was finished, as far as the program is concerned.
    """

    def __init__(self, device: torch.device) -> None:
        self.are_shown = False
        self._on_gpu = device.type == "cuda"
        self._marks: list[_Mark] = []  # of the step that runs
        self.last = StepTimes([])
        self._span: torch.profiler.record_function | None = None
        self._seconds_in_steps, self._logged_at = 0.0, time.perf_counter()

    def watch(self, last: nn.Parameter) -> None:
        """Take this rank's own work as done when this parameter has its gradient.

        In the last micro-batch of a step what comes then, still inside of backward, is waiting for
        other ranks.

        Args:
            last: the parameter whose gradient comes last: the source's embedding.
        """
        last.register_post_accumulate_grad_hook(self._gradients_are_there)

    def wait_for_data(self) -> None:
        """Begin a step."""
        self._marks = []
        self._enter("data_wait")

    def at(self, point: str) -> None:
        """Take note of a point of the step; of others nothing."""
        if point in _BEGUN_AT:
            self._enter(_BEGUN_AT[point])
        elif point == "after_optimizer":
            self._mark("")
            self._end_span()
            self.last, self._marks = StepTimes(self._marks), []

    def note_step(self, seconds: float) -> None:
        """Count the seconds of a step that is through; on a GPU, those since the step before."""
        self._seconds_in_steps += seconds

    def share_between_steps(self) -> float:
        """Give the share of the time since the last call that was not spent in steps."""
        now = time.perf_counter()
        share = 1 - self._seconds_in_steps / (now - self._logged_at)
        self._seconds_in_steps, self._logged_at = 0.0, now
        return max(0.0, share)

    def _gradients_are_there(self, _: Tensor) -> None:
        """Maybe in a thread of backward's, where no span may begin."""
        if self._marks and self._marks[-1].phase == "forward_backward":
            self._mark("reduction")

    def _enter(self, phase: str) -> None:
        self._mark(phase)
        self._end_span()
        if self.are_shown:
            self._span = torch.profiler.record_function(f"dtrain: {phase}")
            self._span.__enter__()

    def _end_span(self) -> None:
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None

    def _mark(self, phase: str) -> None:
        event = None
        if self._on_gpu:
            if torch.cuda.is_current_stream_capturing():
                return  # a CUDA graph is being recorded, in which an event has no time
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append(_Mark(phase, time.perf_counter(), event))


def measure(seconds: dict[str, float], phases: Phases, world: World) -> dict[str, float]:
    """Give the metrics of a step, for which all ranks must call this.

    Args:
        seconds: of its phases on this rank.
        phases: of this rank, which know of the time between steps too.
        world: of all ranks.

    Returns:
        The phases' shares of this rank's step, which add up to 1; the share of time between steps;
        and which of several ranks had its gradients last, with how much longer it took than the
        mean.
    """
    whole = sum(seconds.values())
    values = {f"train/{phase}_share": part / whole for phase, part in seconds.items()}
    values["train/between_steps_share"] = phases.share_between_steps()
    if world.size > 1:
        own = torch.zeros(world.size, dtype=torch.float64)
        own[world.rank] = seconds["data_wait"] + seconds["forward_backward"]
        own = world.sum(own)
        values["train/slowest_rank"] = int(own.argmax())
        values["train/slowest_rank_ratio"] = float(own.max() / own.mean())
    return values


def _between(begun: _Mark, ended: _Mark) -> float:
    if begun.event is None or ended.event is None:
        return ended.time - begun.time
    ended.event.synchronize()
    return begun.event.elapsed_time(ended.event) / 1000
