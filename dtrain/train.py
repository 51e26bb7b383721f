"""The training of a Transformer, in the order in which it happens.

`torchrun --nproc_per_node=8 -m dtrain.train --config FILE [--section.key=value ...]`
"""

import sys

if __name__ == "__main__":
    # `--help` and a mistake in the settings are answered before the imports that cost seconds.
    from dtrain.commands.train import parse_start

    START = parse_start(sys.argv[1:])

import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from dtrain import checkpoint, fault
from dtrain.account import Account
from dtrain.config import Config
from dtrain.cursors import CURSORS, Cursors
from dtrain.data.loader import LoadedStep, Loader, collate
from dtrain.data.plan import Cursor, DistributedTokenSampler
from dtrain.data.store import PreparedData
from dtrain.distributed import World, connect
from dtrain.errors import GiveUpError, shown_to_user
from dtrain.evaluation import CutShortError, validate
from dtrain.heartbeat import Heartbeat
from dtrain.learner import Learner
from dtrain.memory import keep_freed_memory
from dtrain.metrics import Metrics
from dtrain.parts import build_plan, configure_torch
from dtrain.preemption import Deadline, StopSignal
from dtrain.profiling import Profile
from dtrain.progress import Progress
from dtrain.rehearsal import enough_memory, possible_sizes, rehearse
from dtrain.run_directory import RunDirectory, Status
from dtrain.saver import Saver
from dtrain.start import Ready, claimed, describe, identity
from dtrain.supervision import watched
from dtrain.weights import load_module

NUM_SAMPLES = 5
SECONDS_TO_NAME = 15
CHECK_EVERY_STEPS = 100  # whether weights and moments are still the same on all ranks


def run(config: Config, allowed: Collection[str] = ()) -> int:
    """Train, or go on; gives this rank's exit code.

    Args:
        config: the settings.
        allowed: what may have changed since the run began, as `--allow-changed` names it.
    """
    deadline = Deadline(config.run.time_limit)
    is_over = False
    with (
        StopSignal() as stop,
        connect(config.run.device, config.distributed.first_step_timeout) as world,
        claimed(config, world, stop, allowed) as ready,
    ):
        if ready is not None:
            with watched(ready, world) as heartbeat:
                is_over = Training(ready, world, stop, deadline, heartbeat).run()
    return 0 if is_over else stop.exit_code()


class Training:
    """A run on one rank: its parts, put together, and its place in the plan."""

    def __init__(
        self,
        ready: Ready,
        world: World,
        stop: StopSignal,
        deadline: Deadline,
        heartbeat: Heartbeat,
    ) -> None:
        self.config = config = ready.config
        self.ready, self.world, self.heartbeat = ready, world, heartbeat
        self.stop, self.deadline = stop, deadline
        self.directory = RunDirectory(config.run_dir)
        self.data = PreparedData.open(ready.data_dir)
        configure_torch(config, world.device)
        self.learner = Learner(config, self.data.vocabulary, world)
        self.plan = build_plan(config, self.data)
        self.progress = self.restore()
        self.saved_step, self.saved_at = self.progress.step, time.monotonic()
        self.saves_begun: dict[int, float] = {}

    def restore(self) -> Progress:
        """Go on from the checkpoint that rank 0 chose, or begin."""
        path = self.ready.resume_from
        if path is not None:
            self.learner.load(path)
            progress = Progress.from_json(checkpoint.read_state(path)["progress"])
            if progress.cursor.window >= self.plan.num_windows:  # of a plan that might change
                progress.cursor = Cursor(progress.cursor.epoch + 1)
            return progress
        if self.ready.weights_from is not None:
            load_module(self.learner.model, self.ready.weights_from / checkpoint.MODEL)
        return Progress()

    def run(self) -> bool:
        """Train until the last step, the last epoch, lost patience or a signal.

        Returns:
            Whether it ends here: it is finished, or the time is up.
        """
        if self.end_reached() and not self.validation_is_due():
            if self.world.is_main:
                why = f"finished at step {self.progress.step}"
                self.directory.write_status("completed", self.progress.step, 0, why)
                sys.stdout.write(f"{self.directory.path} is {why} already\n")
            return True
        sampler = DistributedTokenSampler(self.plan, self.world.size, self.world.rank)
        on_gpu = self.world.device.type == "cuda"
        with (
            self.open_metrics() as self.metrics,
            self.open_saver() as self.saver,
            Loader(sampler, self.data.train, self.progress.cursor, on_gpu) as loader,
        ):
            self.account = self.open_account()
            self.announce()
            stopping = False
            if self.validation_is_due():  # a stop came before it, and another may come now
                self.judge()
                (stopping,) = self.world.agree(self.progress.step, self.wants_to_stop())
            if not stopping and not self.end_reached():
                self.rehearse()
                self.train(loader)
            return self.conclude()

    def train(self, loader: Loader) -> None:
        """Run steps until one is the last."""
        cursors = self.open_cursors()
        with self.open_profile() as profile:
            waiting_since = time.perf_counter()
            self.account.phases.wait_for_data()
            for count, step in enumerate(loader):
                self.train_step(step, waiting_since)
                if count == 0:  # which may have compiled
                    self.expect_quick_steps()
                else:
                    self.deadline.note_step(time.perf_counter() - waiting_since)
                if cursors is not None:
                    cursors.note(self.progress.step + 1, self.progress.cursor)
                profile.note_step(self.progress.step)
                if self.after_step():
                    break
                waiting_since = time.perf_counter()
                self.account.phases.wait_for_data()

    def rehearse(self) -> None:
        """Make sure that memory suffices, and that every start is alike, before the first step."""
        keep_freed_memory()  # as the steps will
        start, sizes = self.progress.cursor, possible_sizes(self.config, self.world.size)
        rehearse(self.learner.try_out, self.plan, self.data.train, start, self.world, sizes)
        empty = collate(self.plan, self.data.train, np.empty(0, np.int64))
        if self.world.size > 1:
            self.learner.discarded_backward(empty)
        if self.config.kernels.cuda_graph is True:
            advice = "set batch.tokens_per_micro_batch lower or leave kernels.cuda_graph out"
            with enough_memory("a step recorded as CUDA graphs", self.world, advice):
                self.learner.record(empty.to(self.world.device))

    def train_step(self, step: LoadedStep, waiting_since: float) -> None:
        """Learn from a step, count it, measure it."""
        learned = self.learner.learn(self.progress.step + 1, step, self.at)
        self.progress.advance(step.plan)
        self.metrics.progress(self.progress.step, {"epoch": step.plan.epoch})
        self.account.note(learned, waiting_since, self.is_due(self.config.metrics.every_steps))

    def after_step(self) -> bool:
        """Agree with all ranks, validate, save; says whether to leave."""
        settings, step = self.config, self.progress.step
        if self.ready.is_lost:
            raise GiveUpError(
                f"another training has taken {self.directory.path} over, so this one ends"
            )
        minutes = settings.checkpoint.every_minutes
        is_late = bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes
        stopping, save_now = self.world.agree(step, self.wants_to_stop(), is_late)
        if step % CHECK_EVERY_STEPS == 0:
            self.learner.check_same_everywhere(step)
        if (
            stopping
            or save_now
            or self.end_reached()
            or self.is_due(settings.checkpoint.every_steps)
        ):
            self.save()
        if self.validation_is_due() and not stopping:
            self.judge()
            (stopping,) = self.world.agree(step, self.wants_to_stop())
        leaving = stopping or self.end_reached()
        if leaving:
            self.save()
        return leaving

    def judge(self) -> None:
        """Validate, and note the score with this step's checkpoint; the best get one."""
        try:
            score = self.validate()
        except CutShortError:  # by a stop signal; it is made up for when the run goes on
            return
        if self.progress.note_score(score) and self.config.checkpoint.keep_best > 0:
            self.save()
        if self.saved_step == self.progress.step and self.saver is not None:
            self.saver.note_judgement(self.saved_step, score, self.progress.to_json())

    def wants_to_stop(self) -> bool:
        """Whether this rank was told to stop, or has hardly any time left."""
        return self.stop.received is not None or self.deadline.is_near()

    def may_go_on_validating(self) -> bool:
        """Tell the other ranks that are validating if this one was told to stop, or ask them."""
        self.at("in_validation", self.progress.step)
        if self.wants_to_stop():
            self.world.call_off(f"validation of step {self.progress.step}")
        return not self.world.is_called_off(f"validation of step {self.progress.step}")

    def at(self, point: str, step: int) -> None:
        """Show where this rank is."""
        self.heartbeat.at(step, point)
        self.account.phases.at(point)
        fault.strike(point, step)

    def expect_quick_steps(self) -> None:
        """From the second step on, nothing may stand still for long any more, nor be compiled.

        Collectives wait a little longer, so that who hangs is named first.
        """
        self.heartbeat.timeout = seconds = self.config.distributed.timeout
        self.world.set_timeout(seconds + SECONDS_TO_NAME)
        self.learner.expect_no_compilation()

    @contextmanager
    def patiently(self, phase: str) -> Iterator[None]:
        """Do something in which a rank may stand still for longer than in a step."""
        self.account.settle()  # else its time would be counted to the step
        self.at(phase, self.progress.step)
        before = self.heartbeat.timeout
        self.heartbeat.timeout = max(before, self.config.distributed.first_step_timeout)
        try:
            yield
        finally:
            self.heartbeat.timeout = before

    def validation_is_due(self) -> bool:
        """Whether this step's model is still to be judged: at each period, and at the end."""
        every_steps, progress = self.config.validation.every_steps, self.progress
        at_this_step = self.is_due(every_steps) or self.end_reached()
        return every_steps > 0 and at_this_step and progress.validated_step < progress.step

    def validate(self) -> float:
        """Judge the model on the validation set; gives the score, higher is better."""
        step = self.progress.step
        parts = self.learner.model, self.data, self.plan, self.world
        with self.patiently("validating"):
            found = validate(*parts, self.config.validation, self.may_go_on_validating)
        self.metrics.log(step, found.values)
        self.metrics.samples(step, found.samples[:NUM_SAMPLES])
        return found.score

    def save(self) -> None:
        """Write a checkpoint, from rank 0, unless this step has one."""
        if self.saved_step == self.progress.step:
            return
        self.learner.check_same_everywhere(self.progress.step)
        self.saved_step, self.saved_at = self.progress.step, time.monotonic()
        with self.patiently("saving"):
            elsewhere = self.learner.collect_moments()
            if self.saver is not None:
                self.saves_begun[self.saved_step] = self.saved_at
                state = {
                    "step": self.progress.step,
                    "progress": self.progress.to_json(),
                    "scaler": self.learner.scaler.state_dict(),
                    "data": identity(self.data, self.plan),
                    "made_with": {"torch": torch.__version__, "world_size": self.world.size},
                }
                parts = self.learner.model, self.learner.optimizer
                self.saver.save(self.progress.step, *parts, state, elsewhere)
            self.world.meet()  # a slow disk may take longer than collectives wait for each other

    def note_saved(self, step: int) -> None:
        """Say that a checkpoint is on disk; called where it was written."""
        self.deadline.note_save(time.monotonic() - self.saves_begun.pop(step))
        name = checkpoint.checkpoint_name(step)
        self.directory.write_status("running", step, None, f"saved {name}")
        self.metrics.message(f"saved {name}")

    def end_reached(self) -> bool:
        """Whether the last step or epoch is done, or patience is lost."""
        limits, patience = self.config.run, self.config.validation.patience
        return (
            0 < limits.max_steps <= self.progress.step
            or 0 < limits.max_epochs <= self.progress.cursor.epoch
            or 0 < patience <= self.progress.validations_since_best
        )

    def is_due(self, every_steps: int) -> bool:
        """Whether something periodic falls on this step; never if the period is 0."""
        return every_steps > 0 and self.progress.step % every_steps == 0

    def open_metrics(self) -> Metrics:
        """Open the sinks on rank 0; the others measure in silence."""
        if not self.world.is_main:
            return Metrics.silent()
        settings, path = self.config, self.directory.path
        steps = settings.run.max_steps, self.progress.step
        return Metrics.open(path, settings.wandb, settings.model_dump(), *steps)

    def open_account(self) -> Account:
        """Make what counts and measures the steps that are run."""
        return Account(self.learner, self.plan, self.progress, self.metrics)

    def open_saver(self) -> AbstractContextManager[Saver | None]:
        """Make what writes checkpoints, on rank 0."""
        if not self.world.is_main:
            return nullcontext()
        settings = self.config.checkpoint
        return Saver(
            self.directory.checkpoints,
            asynchronous=settings.asynchronous,
            keep_last=settings.keep_last,
            keep_best=settings.keep_best,
            protect=self.ready.resume_from,
            say=self.metrics.message,
            on_saved=self.note_saved,
        )

    def open_profile(self) -> Profile:
        """Make what looks into some of the steps."""
        settings, folder = self.config.run.profile, self.directory.path / "profile"
        phases, say = self.account.phases, self.metrics.message
        return Profile(settings, folder, self.world, phases, self.patiently, say)

    def open_cursors(self) -> Cursors | None:
        """Make what notes where windows of the plan begin, on rank 0."""
        if not self.world.is_main:
            return None
        path, step = self.directory.path / CURSORS, self.progress.step + 1
        return Cursors(path, step, self.progress.cursor, self.metrics.message)

    def announce(self) -> None:
        """Say what will run, before it runs."""
        if not self.world.is_main:
            return
        attempt = self.ready.attempt
        self.directory.write_status("running", self.progress.step, None, f"attempt {attempt}")
        num_parameters = sum(p.numel() for p in self.learner.model.parameters())
        what = describe(self.ready, self.data, self.world, self.learner.precision, num_parameters)
        place = f"from step {self.progress.step}" if self.progress.step else "from the beginning"
        where = f"run      {self.directory.path}, attempt {attempt}, {place}"
        for line in [*self.ready.notices, *what, self.account.utilisation.describe(), where]:
            self.metrics.message(line)

    def conclude(self) -> bool:
        """Say how it ended, for people and for scripts, once all is on disk.

        Returns:
            Whether it ends here: it is finished, or the time is up.
        """
        with self.patiently("leaving"):
            if self.saver is not None:
                self.saver.wait()
            self.world.meet()
        step = self.progress.step
        (time_is_up,) = self.world.agree(step, self.deadline.is_near())
        status: Status
        finished = self.end_reached() and not self.validation_is_due()
        if finished:
            status, why = "completed", f"finished at step {step}"
        else:
            near = self.deadline.reason if time_is_up else "a signal to another rank"
            status, why = "preempted", f"stopped by {self.stop.reason or near} after step {step}"
        if self.world.is_main:
            self.directory.write_status(status, step, 0, why)
        self.metrics.message(why + ("" if finished else "; the same command goes on"))
        with self.patiently("leaving"):  # W&B may take a while
            self.metrics.close(status)
        return finished or time_is_up


if __name__ == "__main__":
    with shown_to_user():
        sys.exit(run(*START))
