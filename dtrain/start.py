"""How a training starts: what rank 0 gets ready for all ranks, and what is refused."""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dtrain import checkpoint, weights
from dtrain.auto_size import find_size, with_size
from dtrain.config import Config
from dtrain.cursors import CURSORS
from dtrain.data.plan import BatchPlan
from dtrain.data.preparation import is_prepared, prepared_directory
from dtrain.data.store import PreparedData
from dtrain.distributed import World
from dtrain.errors import UserError
from dtrain.fault import strike
from dtrain.lock import RunLock
from dtrain.nodes import check_nodes, check_shared, hosts_of
from dtrain.parts import build_model, build_plan
from dtrain.preemption import StopSignal
from dtrain.resolution import check_world, resolve
from dtrain.run_directory import RunDirectory
from dtrain.saver import room_needed

FIELDS = {"training text": "data", "vocabulary": "vocabulary", "batch plan": "plan"}
"""What a checkpoint's fingerprints are called on the command line."""


@dataclass(frozen=True)
class Ready:
    """What every rank needs to begin.

    Attributes:
        config: with threads, precision and kernels as recorded.
        data_dir: the prepared directory.
        resume_from: the checkpoint to go on from, if there is one.
        weights_from: the other run's checkpoint to begin with, if nothing is resumed.
        notices: what the user should know, damaged checkpoints for instance.
        attempt: number of this start of the run, from 1.
        lock: of the run directory; on rank 0 only.
    """

    config: Config
    data_dir: Path
    resume_from: Path | None
    weights_from: Path | None
    notices: list[str]
    attempt: int = 1
    lock: RunLock | None = None

    @property
    def step(self) -> int:
        """The step to go on from; 0 at the beginning."""
        return 0 if self.resume_from is None else checkpoint.step_of(self.resume_from)

    @property
    def is_lost(self) -> bool:
        """Whether another training took the run directory over: this one must write no more."""
        return self.lock is not None and self.lock.lost


@contextmanager
def claimed(
    config: Config, world: World, stop: StopSignal, allowed: Collection[str] = ()
) -> Iterator[Ready | None]:
    """Own the run directory for as long as a training lasts; every rank enters.

    Rank 0 takes the lock, begins an attempt, gets everything ready, and notes how the attempt
    ended. If another training holds the lock nothing is written.

    Args:
        config: the settings.
        world: the ranks.
        stop: asked while something takes long.
        allowed: what may have changed since the run began: settings, `data`, `vocabulary`, `plan`.

    Yields:
        What is needed to train; None if a stop signal came before that.

    Raises:
        UserError: on all ranks, for any mistake in data, settings or launch.
    """
    run = RunDirectory(config.run_dir)
    hosts = hosts_of(world)
    with ExitStack() as held:
        lock = RunLock(run.path, stop)

        def begin() -> Ready | None:
            held.enter_context(lock)
            number = held.enter_context(run.attempt(lock, world.size, sorted(allowed)))
            check_nodes(hosts, os.environ)
            ready = get_ready(config, world, stop, allowed)
            if ready is None:
                why = f"stopped by {stop.reason} before training began"
                run.write_status("preempted", run.step_saved, 0, why)
                sys.stdout.write(f"{why}; the same command goes on\n")
                return None
            notices = [lock.notice] if lock.notice else []
            return replace(ready, attempt=number, notices=[*notices, *ready.notices])

        ready: Ready | None = world.from_main(begin)
        if ready is not None:
            if len(hosts) > 1:
                check_shared(world, run.path, ready.data_dir)
            if ready.config.batch.tokens_per_micro_batch == "auto":
                ready = _sized(ready, world, stop, allowed)
            if world.is_main:
                run.note_start(ready.attempt, ready.step)
                ready = replace(ready, lock=lock)
        yield ready


def get_ready(
    config: Config, world: World, stop: StopSignal, allowed: Collection[str] = ()
) -> Ready | None:
    """Prepare what is missing and claim the run directory; on rank 0, for all ranks.

    Returns:
        None if a stop signal came first. If `batch.tokens_per_micro_batch` is still `auto`, data
        and settings alone: all ranks are to find the number, and then this is asked once more.

    Raises:
        UserError: for any mistake in data or settings.
    """
    strike("in_preparation")
    run = RunDirectory(config.run_dir)
    config, notices = resolve(config, run, world)
    check_world(config, world, notices)
    run.check(config, allowed)  # before preparing, which may take long
    data_dir = prepared_directory(config.data, config.vocabulary, config.vocabulary_of)
    if not is_prepared(config.data, config.vocabulary, data_dir, config.vocabulary_of):
        _prepare(config, world, stop, data_dir)
        if stop.received is not None:
            return None
    if config.batch.tokens_per_micro_batch == "auto":
        return Ready(config, data_dir, None, None, notices)
    data = PreparedData.open(data_dir)
    resume_from, damaged = checkpoint.newest(run.checkpoints)
    if resume_from is not None:
        saved = checkpoint.read_state(resume_from)["data"]
        check_identity(saved, identity(data, build_plan(config, data)), run.path, allowed)
    if resume_from is not None and allowed:
        # A model of other sizes is found out before its settings replace those of the run.
        model = build_model(config, data.vocabulary)
        weights.load_module(model, resume_from / checkpoint.MODEL)
    with torch.device("meta"):
        room = room_needed(build_model(config, data.vocabulary))
    checkpoint.check_room(run.checkpoints, room)
    weights_from = None
    if resume_from is None and config.run.init_from is not None:
        other = RunDirectory.existing(Path(config.run.init_from))
        weights_from = checkpoint.choose(other.checkpoints, "best")
    run.claim(config, data.vocabulary)
    if {"data", "plan"} & set(allowed):
        (run.path / CURSORS).unlink(missing_ok=True)  # they belong to the plan before
    return Ready(config, data_dir, resume_from, weights_from, [*notices, *damaged])


def identity(data: PreparedData, plan: BatchPlan) -> dict[str, str]:
    """Give the fingerprints of what a run learns from; checkpoints keep them."""
    return {
        "training text": data.manifest.fingerprint,
        "vocabulary": data.manifest.vocabulary_fingerprint,
        "batch plan": plan.fingerprint,
    }


def check_identity(
    saved: Mapping[str, str], now: Mapping[str, str], run: Path, allowed: Collection[str] = ()
) -> None:
    """Refuse to go on with other data than the run was trained with.

    Args:
        saved: fingerprints in the checkpoint, by what they are of.
        now: those of today's settings.
        run: the run directory.
        allowed: `data`, `vocabulary` or `plan`, if that may have changed.

    Raises:
        UserError: naming what differs, the old and the new.
    """
    changed = [name for name in now if saved.get(name) != now[name] and FIELDS[name] not in allowed]
    if changed:
        others = [f"another {n} ({saved.get(n, 'none')[:12]} -> {now[n][:12]})" for n in changed]
        flags = [f"--allow-changed {FIELDS[name]}" for name in changed]
        raise UserError(
            f"{run} was trained with {' and '.join(others)} than the settings now give; set them "
            f"back, or start another run with --run.name=NAME, or accept it: {' '.join(flags)}"
        )


def describe(
    ready: Ready, data: PreparedData, world: World, precision: torch.dtype, num_parameters: int
) -> list[str]:
    """Say in a few lines what will run: sizes, device, precision, model, data."""
    config = ready.config
    per_rank = -(-config.batch.micro_batches_per_step // world.size)
    device = f"CPU, {config.run.threads} threads a rank"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    return [
        f"batch    {world.size} ranks x {per_rank} micro-batches x "
        f"{config.batch.target_slots:,} tokens = {config.batch.tokens_per_step:,} a step",
        f"device   {device}, {str(precision).removeprefix('torch.')}",
        f"model    {num_parameters:,} parameters, vocabulary {data.vocabulary.target_size:,}",
        f"data     {len(data.train):,} pairs, {data.manifest.splits['train'].target_tokens:,} "
        f"target tokens, from {data.directory}",
    ]


def _prepare(config: Config, world: World, stop: StopSignal, data_dir: Path) -> None:
    """Run `dtrain prepare` as a process of its own, so that this one stays responsive."""
    if config.run.prepare is False or (config.run.prepare == "auto" and world.num_nodes > 1):
        arguments = shlex.join(word for word in sys.argv[1:] if word != "train")
        raise UserError(
            f"nothing is prepared in {data_dir}. Run this once, on one machine:\n"
            f"        dtrain prepare {arguments}\n"
            "        or let rank 0 do it while the others wait: --run.prepare=true"
        )
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.yaml"
        settings.write_text(config.to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "dtrain", "prepare", "--config", str(settings)]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        complaint = _finish(child, stop)
        if stop.received is not None:
            return
        if child.returncode:
            raise UserError(
                complaint.strip().removeprefix("dtrain: ") or "preparing the data failed"
            )
        sys.stderr.write(complaint)


def _finish(child: "subprocess.Popen[str]", stop: StopSignal) -> str:
    """Wait for a process, or end it when this one is told to stop; gives what it complained of."""
    while True:
        try:
            return child.communicate(timeout=0.2)[1]
        except subprocess.TimeoutExpired:
            if stop.received is not None:
                child.terminate()


def _sized(ready: Ready, world: World, stop: StopSignal, allowed: Collection[str]) -> Ready:
    """Find the size of a micro-batch, all ranks together, and get ready with it."""
    size, why = find_size(ready.config, PreparedData.open(ready.data_dir), world)
    config = with_size(ready.config, size)
    sized: Ready = world.from_main(lambda: get_ready(config, world, stop, allowed))
    notices = [*ready.notices, *sized.notices, why]
    return replace(sized, attempt=ready.attempt, notices=notices)
