"""Account: how a step that was run went; waited for, counted, measured and written down."""

import math
import time
from dataclasses import dataclass

import numpy as np

from dtrain.data.plan import BatchPlan
from dtrain.errors import GiveUpError
from dtrain.learner import Learned, Learner
from dtrain.metrics import Metrics
from dtrain.parts import memory_gib
from dtrain.phases import Phases, StepTimes, measure
from dtrain.progress import Progress
from dtrain.utilisation import Utilisation

SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class _Noted:
    """A step that was run, and what was so when it was noted.

    Attributes:
        learned: of it.
        waiting_since: when the wait for its data began, as `time.perf_counter` tells it.
        times: of its phases.
        tokens: that were learned from so far.
        is_logged: whether it is written down.
    """

    learned: Learned
    waiting_since: float
    times: StepTimes
    tokens: int
    is_logged: bool


class Account:
    """How the steps of a training go, on one rank.

    A GPU works behind the program. So a step is settled, and written down, only when the next one
    is on its way, and the GPU never waits for the program to hear how a step went. What ends a
    training by an error takes the line of its last step along.

    Args:
        learner: what runs the steps.
        plan: that they come from.
        progress: where their outcomes and seconds are counted.
        metrics: where they are written down.

    Attributes:
        phases: where a step's seconds go; to be told of each point of it.
        utilisation: how much of what its devices can do a step uses.
    """

    def __init__(
        self, learner: Learner, plan: BatchPlan, progress: Progress, metrics: Metrics
    ) -> None:
        self._learner, self._plan = learner, plan
        self._progress, self._metrics = progress, metrics
        self._world = learner.world
        self.phases = Phases(self._world.device)
        self.phases.watch(learner.last_gradient)
        self.utilisation = Utilisation(
            learner.config,
            len(learner.model.decoder.output_weight),
            learner.precision,
            self._world,
        )
        self._unsettled: _Noted | None = None
        self._settled_at = 0.0

    def note(self, learned: Learned, waiting_since: float, is_logged: bool) -> None:
        """Take a step that was run: settle the one before, and this one if the device is through.

        All ranks together, if one of the two is logged.

        Args:
            learned: of the step.
            waiting_since: when the wait for its data began, as `time.perf_counter` tells it.
            is_logged: whether to write it down.

        Raises:
            GiveUpError: as `settle`.
        """
        self.settle()
        tokens = self._progress.tokens
        self._unsettled = _Noted(learned, waiting_since, self.phases.last, tokens, is_logged)
        if not self._learner.runs_behind:
            self.settle()

    def settle(self) -> None:
        """Count how the step not settled yet went, if any; wait for the GPU to finish it.

        Raises:
            GiveUpError: on all ranks, after SKIPPED_IN_A_ROW steps without an update; in fp16 the
                loss scale must be at its smallest besides, as it takes some such steps to find the
                right one.
        """
        if self._unsettled is None:
            return
        noted, self._unsettled = self._unsettled, None
        updated, now = noted.learned.updated, time.perf_counter()
        seconds, self._settled_at = now - max(noted.waiting_since, self._settled_at), now
        self.phases.note_step(seconds)
        self._progress.note_outcome(updated=updated, seconds=seconds)
        if not updated:
            self._report_skipped(noted.learned)
        if noted.is_logged:
            self._write_down(noted)

    def _write_down(self, noted: _Noted) -> None:
        """Measure a settled step over all ranks and log it; all ranks together."""
        learned, phases = noted.learned, noted.times.seconds()
        plan, tokens = learned.plan, learned.plan.num_target_tokens
        seconds = sum(phases.values())
        # Summed without rounding, so that the order, and with it the number of ranks, is no matter.
        columns = zip(*self._world.sum(learned.sums.clone()).tolist(), strict=True)
        loss, nll = (math.fsum(column) / tokens for column in columns)
        slots = len(plan.micro_batches) * (self._plan.source_slots + self._plan.target_slots)
        ids, store = np.concatenate(plan.micro_batches), self._plan.lengths
        lengths = store.source_lengths(ids), store.target_lengths(ids)
        self._metrics.log(
            learned.number,
            {
                "epoch": plan.epoch,
                "tokens": noted.tokens,
                "train/loss": loss,
                "train/nll": nll,
                "train/perplexity": math.exp(min(nll, 100.0)),
                "train/learning_rate": self._learner.learning_rate(learned.number),
                "train/grad_norm": learned.norm,
                "train/skipped_updates": self._progress.skipped,
                "train/pack_fill": (tokens + plan.num_source_tokens) / slots,
                "train/tokens_per_second": tokens / seconds,
                "train/step_seconds": seconds,
                **self.utilisation.measure(*lengths, seconds),
                **measure(phases, self.phases, self._world),
                "train/memory_gib": memory_gib(self._world.device),
            },
        )

    def _report_skipped(self, learned: Learned) -> None:
        """Name the sentences of a step whose update was skipped; too many in a row end the run."""
        losses = self._world.sum(learned.sums[:, 0].clone()).tolist()
        at_fault = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        suspects = at_fault or range(len(losses))
        micro_batches = {i: learned.plan.micro_batches[i] for i in suspects}
        number, in_a_row = learned.number, self._progress.skipped_in_a_row
        self._metrics.skipped(number, learned.norm, losses, micro_batches)
        if in_a_row >= SKIPPED_IN_A_ROW and self._learner.scale_is_smallest:
            raise GiveUpError(
                f"the gradient was not finite for {in_a_row} steps in a row, up to step {number}; "
                f"skipped.jsonl names their sentences, and `dtrain inspect "
                f"{self._learner.config.run_dir} --step {number}` shows where the numbers go "
                f"wrong. A lower optimizer.learning_rate or a longer schedule.warmup_steps is the "
                f"usual cure"
            )
