"""Inspection: find a step of a run, its weights and sentences, and run it again; writes nothing."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dtrain import checkpoint, cursors, weights
from dtrain.config import Config
from dtrain.data.plan import BatchPlan, PlannedStep
from dtrain.data.preparation import is_prepared, prepared_directory
from dtrain.data.store import PreparedData
from dtrain.data.vocabulary import Vocabulary
from dtrain.distributed import alone
from dtrain.errors import UserError
from dtrain.kernel_choice import CHECKS, choose_kernels
from dtrain.model.transformer import Transformer
from dtrain.parts import build_model, build_plan, configure_torch
from dtrain.progress import Progress
from dtrain.rerun import MicroBatch, Rerun
from dtrain.run_directory import RunDirectory
from dtrain.start import identity
from dtrain.watch import Layer


@dataclass(frozen=True)
class Inspection:
    """What was seen.

    Attributes:
        epoch: that the step begins in, from 0.
        step_size: micro-batches of the whole step.
        checkpoint: whose weights were used; None for the initial ones.
        weights_step: the step after which the weights were like that.
        device: computed there.
        precision: of the run.
        loss: mean over the target tokens of all micro-batches that were run, in nats.
        nll: likewise, the negative log-likelihood.
        gradient_norm: of their gradient, before clipping.
        first_not_finite: where the first value that is not finite came up; empty if none did.
        layers: in forward order.
        micro_batches: those that were run.
        notices: what else a reader should know.
    """

    run: Path
    step: int
    epoch: int
    step_size: int
    checkpoint: str | None
    weights_step: int
    device: str
    precision: str
    loss: float
    nll: float
    gradient_norm: float
    first_not_finite: str
    layers: list[Layer]
    micro_batches: list[MicroBatch]
    notices: list[str]

    @property
    def age(self) -> int:
        """Steps by which the weights are older than those that the step began with."""
        return self.step - 1 - self.weights_step


def inspect_step(
    run: Path,
    step: int,
    wanted: str | None = None,
    only: int | None = None,
    with_text: bool = False,
    device: str | None = None,
) -> Inspection:
    """Run a step again and look at every layer.

    Args:
        run: the run directory.
        step: from 1.
        wanted: the checkpoint to take weights from, as `checkpoint.choose` understands it; None
            for the newest before the step, or the initial weights.
        only: the one micro-batch to run; all if None.
        with_text: give the sentences too, each with its own loss.
        device: auto, cpu or cuda; as in the run's settings if None.

    Raises:
        UserError: if there is no such run, step, micro-batch or checkpoint, or the training data
            is gone or changed.
    """
    directory = RunDirectory.existing(run)
    config = directory.config
    if 0 < config.run.max_steps < step:
        raise UserError(f"--step {step}: {run} ends at step {config.run.max_steps}")
    world = alone(device or config.run.device)
    configure_torch(config, world.device)
    path, notices = choose_weights(directory.checkpoints, step, wanted)
    if config.kernels.compile is True:
        notices.append("the run was compiled and this is not: dropout differs")
    # A run on GPUs can be looked at on a CPU, which has not the same kernels.
    unset = config.kernels.model_copy(update=dict.fromkeys(["attention", *CHECKS], "auto"))
    unset_config = config.model_copy(update={"kernels": unset})
    kernels, others = choose_kernels(unset_config, world.device, config.kernels)
    config, notices = config.model_copy(update={"kernels": kernels}), [*notices, *others]
    state = {} if path is None else checkpoint.read_state(path)
    data, plan = open_data(config, directory, state)
    planned = find_step(plan, directory.path / cursors.CURSORS, step, state)
    if 0 < config.run.max_epochs <= planned.epoch:
        raise UserError(f"--step {step}: {run} ends after epoch {config.run.max_epochs}, before it")
    count = len(planned.micro_batches)
    if only is not None and only >= count:
        raise UserError(f"--micro-batch {only}: a step has {count}, numbered from 0")

    model = load_weights(config, data.vocabulary, path).to(world.device)
    rerun = Rerun(config, model, plan, data.train, world, state.get("scaler"))
    chosen = range(count) if only is None else [only]
    sums = rerun.run(step, planned, chosen, data.vocabulary if with_text else None)
    loss, nll = (sums / sum(part.tokens for part in rerun.micro_batches)).tolist()
    return Inspection(
        run,
        step,
        planned.epoch,
        count,
        None if path is None else path.name,
        state.get("step", 0),
        str(world.device),
        config.precision,
        loss,
        nll,
        rerun.gradient_norm,
        rerun.watch.first_not_finite,
        rerun.watch.layers,
        rerun.micro_batches,
        notices,
    )


def choose_weights(folder: Path, step: int, wanted: str | None) -> tuple[Path | None, list[str]]:
    """Find the checkpoint to use, None for the initial weights, and say which are damaged."""
    if wanted is not None:
        return checkpoint.choose(folder, wanted), []
    notices = list[str]()
    for path in checkpoint.steps_saved(folder):
        if checkpoint.step_of(path) < step:
            problem = checkpoint.verify(path)
            if not problem:
                return path, notices
            notices.append(f"{path.name} is passed over: {problem}")
    return None, notices


def open_data(
    config: Config, directory: RunDirectory, state: dict[str, Any]
) -> tuple[PreparedData, BatchPlan]:
    """Open the run's tokens and lay out its plan, if they are what it was trained with.

    Args:
        config: of the run.
        directory: of the run.
        state: of the checkpoint in use; of another if it is empty.

    Raises:
        UserError: saying what is gone or changed.
    """
    key = config.data, config.vocabulary
    place = prepared_directory(*key, config.vocabulary_of)
    if not is_prepared(*key, place, config.vocabulary_of):
        raise UserError(
            f"the training data {place} is gone or was made of another text; once the text is as "
            f"it was, `dtrain prepare --config {directory.config_file}` makes it again"
        )
    data = PreparedData.open(place)
    plan = build_plan(config, data)
    whole = (path for path in checkpoint.steps_saved(directory.checkpoints) if not state)
    states = (checkpoint.read_state(path) for path in whole if not checkpoint.verify(path))
    saved = (state or next(states, {})).get("data", {})
    now = identity(data, plan)
    changed = [name for name in now if name in saved and saved[name] != now[name]]
    if changed:
        raise UserError(
            f"{directory.path} was trained with another {' and another '.join(changed)} than its "
            f"settings now give, so its steps cannot be run again; put the text back as it was"
        )
    return data, plan


def find_step(plan: BatchPlan, file: Path, step: int, state: dict[str, Any]) -> PlannedStep:
    """Plan a step of the run, counting on from the nearest cursor before it.

    Args:
        plan: of the run.
        file: its `cursors.jsonl`.
        step: from 1.
        state: of any of its checkpoints, which knows a cursor too; may be empty.
    """
    begun, cursor = cursors.find(file, step)
    if "progress" in state and begun <= state["step"] < step:
        begun, cursor = state["step"] + 1, Progress.from_json(state["progress"]).cursor
    return next(islice(plan.steps(cursor), step - begun, None))


def load_weights(config: Config, vocabulary: Vocabulary, path: Path | None) -> Transformer:
    """Make the model with a checkpoint's weights or, without one, as the run began."""
    model = build_model(config, vocabulary)
    if path is None and config.run.init_from is not None:
        other = RunDirectory.existing(Path(config.run.init_from))
        path = checkpoint.choose(other.checkpoints, "best")
    if path is not None:
        weights.load_module(model, path / checkpoint.MODEL)
    return model
