"""The training of a Transformer, in the order in which it happens.

`torchrun --nproc_per_node=8 -m dtrain.train --config FILE [--section.key=value ...]`
"""

import sys

if __name__ == "__main__":
    # `--help` and a mistake in the settings are answered before the imports that cost seconds.
    from dtrain.commands.train import parse

    CONFIG = parse(sys.argv[1:])

import math
import os
import resource
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain import checkpoint
from dtrain.batch import Batch
from dtrain.config import Config
from dtrain.data.loader import LoadedStep, Loader
from dtrain.data.plan import BatchPlan, Cursor, DistributedTokenSampler, mix64, source_slots
from dtrain.data.store import PreparedData
from dtrain.distributed import World, connect
from dtrain.errors import shown_to_user
from dtrain.evaluation import judge, negative_log_likelihood, translate_lines
from dtrain.loss import Objective
from dtrain.metrics import Metrics
from dtrain.model.transformer import Transformer
from dtrain.optimizer import build_optimizer, clip_gradients, set_learning_rate
from dtrain.preemption import StopSignal
from dtrain.run_directory import RunDirectory
from dtrain.schedule import learning_rate
from dtrain.start import Ready, check_continuity, get_ready

NUM_SAMPLES = 5


def run(config: Config) -> int:
    """Train, or go on; gives this rank's exit code."""
    with StopSignal() as stop, connect(config.run.device, config.distributed.timeout) as world:
        ready = world.from_main(lambda: get_ready(config, world, stop))
        Training(ready, world, stop).run()
    return 0


@dataclass
class Progress:
    """How far a run is; together with model and optimizer all that a checkpoint needs to hold."""

    step: int = 0
    tokens: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    best_score: float | None = None
    validations_since_best: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        """Read it back from a checkpoint's `state.json`."""
        progress = cls(**state["progress"])
        return replace(progress, cursor=Cursor(**state["progress"]["cursor"]))


class Training:
    """A run on one rank: its parts, put together, and its place in the plan."""

    def __init__(self, ready: Ready, world: World, stop: StopSignal) -> None:
        self.config = config = ready.config
        self.ready, self.world, self.stop = ready, world, stop
        self.directory = RunDirectory(config.run_dir)
        self.data = PreparedData.open(ready.data_dir)
        self.precision = choose_precision(config.precision, world.device)
        configure_torch(config, world.device)

        self.model = build_model(config, self.data).to(world.device)
        objective = Objective(self.model, config.loss.label_smoothing)
        if config.kernels.compile is True or (
            config.kernels.compile == "auto" and world.device.type == "cuda"
        ):
            objective.compile()
        self.objective = world.wrap(objective)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=self.precision is torch.float16
        )
        self.plan = build_plan(config, self.data)
        self.fingerprints = {
            "data": self.data.manifest.fingerprint,
            "vocabulary": self.data.vocabulary.fingerprint,
            "plan": self.plan.fingerprint(self.data.manifest.fingerprint),
        }
        self.progress = self.restore()
        self.last_save = time.monotonic()

    def restore(self) -> Progress:
        """Go on from the checkpoint that rank 0 chose, or begin."""
        path = self.ready.resume_from
        if path is not None:
            state = checkpoint.read_state(path)
            check_continuity(state, self.fingerprints, self.directory.path)
            checkpoint.load_module(self.model, path / checkpoint.MODEL)
            checkpoint.load_optimizer(self.optimizer, self.model, path / checkpoint.OPTIMIZER)
            progress = Progress.from_state(state)
            self.scaler.load_state_dict(progress.scaler)
            return progress
        if self.config.run.init_from is not None:
            other = RunDirectory.existing(Path(self.config.run.init_from))
            weights = checkpoint.choose(other.checkpoints, "best")
            checkpoint.load_module(self.model, weights / checkpoint.MODEL)
        return Progress()

    def run(self) -> None:
        """Train until the last step, the last epoch, lost patience or a signal."""
        sampler = DistributedTokenSampler(self.plan, self.world.size, self.world.rank)
        on_gpu = self.world.device.type == "cuda"
        with (
            self.open_metrics() as self.metrics,
            Loader(sampler, self.data.train, self.progress.cursor, on_gpu) as loader,
        ):
            self.announce()
            if not self.is_finished():
                self.discarded_backward()
                waiting_since = time.perf_counter()
                for step in loader:
                    started = time.perf_counter()
                    self.train_step(step, started - waiting_since, waiting_since)
                    if self.after_step():
                        break
                    waiting_since = time.perf_counter()
            self.conclude()

    def discarded_backward(self) -> None:
        """Run one backward of weight 0, before the first step of every start.

        DistributedDataParallel lays its buckets out anew after its first backward, which changes
        sums from three ranks on: every start must be past that point alike.
        """
        batch = Batch.empty(self.plan.source_slots, self.plan.target_slots).to(self.world.device)
        with self.autocast():
            loss, _ = self.objective(batch)
        loss.backward()
        untouched = [name for name, p in self.model.named_parameters() if p.grad is None]
        if untouched:
            raise RuntimeError(f"parameters without a gradient: {untouched}")
        self.optimizer.zero_grad(set_to_none=True)

    def train_step(self, step: LoadedStep, data_wait: float, started: float) -> None:
        """Run this rank's micro-batches, reduce once, update."""
        number = self.progress.step + 1
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        weight = self.world.size / step.plan.num_target_tokens
        for position, (index, batch) in enumerate(step.micro_batches):
            seed_position(self.config.run.seed, number, index)
            if position + 1 < len(step.micro_batches):
                with self.world.accumulating(self.objective):
                    sums += self.backward(batch, weight)
            else:
                sums += self.backward(batch, weight)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model, self.config.optimizer.max_grad_norm)
        rate = self.learning_rate(number)
        self.update(norm, rate)

        self.progress.step = number
        self.progress.tokens += step.plan.num_target_tokens
        self.progress.cursor = step.plan.end
        seconds = time.perf_counter() - started
        self.metrics.progress(number, {"epoch": step.plan.epoch, "train/learning_rate": rate})
        if self.is_due(self.config.metrics.every_steps):
            self.log_step(step, sums, norm, rate, seconds, data_wait / seconds)

    def backward(self, batch: Batch, weight: float) -> Tensor:
        """Add a micro-batch's gradients up; gives its (loss, nll) sums."""
        with self.autocast():
            loss, nll = self.objective(batch.to(self.world.device))
        self.scaler.scale(loss * weight).backward()
        return torch.stack([loss.detach(), nll.detach()]).double()

    def update(self, norm: Tensor, rate: float) -> None:
        """Change the weights, unless a gradient is not finite: then the update is skipped.

        The norm is taken after the reduction, so that all ranks decide alike.
        """
        set_learning_rate(self.optimizer, rate)
        if math.isfinite(norm.item()):
            self.scaler.step(self.optimizer)
        else:
            self.metrics.message(
                f"step {self.progress.step + 1}: the gradient is not finite, update skipped"
            )
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def after_step(self) -> bool:
        """Agree with all ranks, validate, save; says whether to stop."""
        minutes = self.config.checkpoint.every_minutes
        is_late = bool(minutes) and time.monotonic() - self.last_save > 60 * minutes
        stopping, save_now = self.world.agree(
            self.progress.step, self.stop.received is not None, self.world.is_main and is_late
        )
        finished = self.is_finished()
        score = None
        if not stopping and (self.is_due(self.config.validation.every_steps) or finished):
            score = self.validate()
        is_best = score is not None and score == self.progress.best_score
        out_of_patience = (
            0 < self.config.validation.patience <= self.progress.validations_since_best
        )
        leaving = stopping or finished or out_of_patience
        if (
            leaving
            or save_now
            or self.is_due(self.config.checkpoint.every_steps)
            or (is_best and self.config.checkpoint.keep_best > 0)
        ):
            self.save(score)
        return leaving

    def validate(self) -> float | None:
        """Judge the model on the validation set; gives the score, higher is better."""
        if self.data.validation is None or not self.config.validation.every_steps:
            return None
        settings = self.config.validation
        sources, references = self.data.text("validation")
        nll = negative_log_likelihood(self.model, self.data.validation, self.plan, self.world)
        translations = translate_lines(
            self.model,
            self.data.vocabulary,
            sources,
            self.world,
            settings.beam_size,
            settings.length_penalty,
        )
        judgement = judge(translations, references)
        step = self.progress.step
        self.metrics.log(
            step,
            {
                "validation/nll": nll,
                "validation/perplexity": math.exp(min(nll, 100.0)),
                "validation/bleu": judgement.bleu,
                "validation/chrf": judgement.chrf,
            },
        )
        rows = zip(sources, references, translations, strict=True)
        names = ("source", "reference", "translation")
        self.metrics.samples(
            step, [dict(zip(names, row, strict=True)) for row in list(rows)[:NUM_SAMPLES]]
        )
        score = {"bleu": judgement.bleu, "chrf": judgement.chrf, "nll": -nll}[settings.metric]
        self.progress.validations_since_best += 1
        if self.progress.best_score is None or score > self.progress.best_score:
            self.progress.best_score, self.progress.validations_since_best = score, 0
        return score

    def save(self, score: float | None) -> None:
        """Write a checkpoint, from rank 0."""
        self.last_save = time.monotonic()
        if not self.world.is_main:
            return
        self.progress.scaler = self.scaler.state_dict()
        state = {
            "step": self.progress.step,
            "score": score,
            "progress": asdict(self.progress),
            "fingerprints": self.fingerprints,
            "model": self.config.model.model_dump(),
            "made_with": {"torch": torch.__version__, "world_size": self.world.size},
        }
        name = checkpoint.checkpoint_name(self.progress.step)
        checkpoint.save(self.directory.checkpoints, name, self.model, self.optimizer, state)
        keep = self.config.checkpoint
        checkpoint.prune(self.directory.checkpoints, keep.keep_last, keep.keep_best)
        self.directory.write_status("running", self.progress.step, None, "training")
        self.metrics.message(f"saved checkpoint {name}")

    def log_step(
        self,
        step: LoadedStep,
        sums: Tensor,
        norm: Tensor,
        rate: float,
        seconds: float,
        data_wait_share: float,
    ) -> None:
        """Measure this step over all ranks and write it down."""
        tokens = step.plan.num_target_tokens
        loss, nll = (self.world.sum(sums) / tokens).tolist()
        slots = len(step.plan.micro_batches) * (self.plan.source_slots + self.plan.target_slots)
        self.metrics.log(
            self.progress.step,
            {
                "epoch": step.plan.epoch,
                "tokens": self.progress.tokens,
                "train/loss": loss,
                "train/nll": nll,
                "train/perplexity": math.exp(min(nll, 100.0)),
                "train/learning_rate": rate,
                "train/grad_norm": norm.item(),
                "train/pack_fill": (tokens + step.plan.num_source_tokens) / slots,
                "train/tokens_per_second": tokens / seconds,
                "train/step_seconds": seconds,
                "train/data_wait_share": data_wait_share,
                "train/memory_gib": memory_gib(self.world.device),
            },
        )

    def conclude(self) -> None:
        """Say how it ended, for people and for scripts."""
        step = self.progress.step
        stopped = self.stop.reason or ("a signal to another rank" if not self.is_finished() else "")
        out_of_patience = (
            0 < self.config.validation.patience <= self.progress.validations_since_best
        )
        if self.is_finished() or out_of_patience:
            status, why = "completed", "no better validation" if out_of_patience else "last step"
        else:
            status, why = "preempted", f"stopped by {stopped}; the same command goes on"
        self.metrics.message(f"{status} at step {step}: {why}")
        if self.world.is_main:
            self.directory.write_status(status, step, 0, why)  # type: ignore[arg-type]  # one of two

    def is_finished(self) -> bool:
        """Whether the last step or epoch is reached."""
        limits = self.config.run
        return (0 < limits.max_steps <= self.progress.step) or (
            0 < limits.max_epochs <= self.progress.cursor.epoch
        )

    def is_due(self, every_steps: int) -> bool:
        """Whether something periodic falls on this step; never if the period is 0."""
        return every_steps > 0 and self.progress.step % every_steps == 0

    def learning_rate(self, step: int) -> float:
        """Give the rate of a step as the settings want it."""
        settings = self.config
        peak, width = settings.optimizer.learning_rate, settings.model.hidden_dim
        return learning_rate(step, settings.schedule, peak, width, settings.run.max_steps)

    def autocast(self) -> torch.autocast:
        """Compute in the chosen precision; parameters and moments stay fp32."""
        low = self.precision is not torch.float32
        return torch.autocast(
            self.world.device.type, self.precision if low else torch.bfloat16, enabled=low
        )

    def open_metrics(self) -> Metrics:
        """Open the sinks on rank 0; the others' measure in silence."""
        if not self.world.is_main:
            return Metrics.silent()
        return Metrics.open(
            self.directory.path,
            self.config.wandb,
            self.config.model_dump(),
            self.config.run.max_steps,
            self.progress.step,
        )

    def announce(self) -> None:
        """Say what will run, before it runs."""
        if not self.world.is_main:
            return
        attempt = self.directory.begin_attempt(step=self.progress.step, world_size=self.world.size)
        self.directory.write_status("running", self.progress.step, None, f"attempt {attempt}")
        for line in self.ready.notices + describe(self, attempt):
            self.metrics.message(line)


def build_model(config: Config, data: PreparedData) -> Transformer:
    """Make the model with the seed's random weights, the same on every rank and device."""
    seed_position(config.run.seed, 0, 0)
    vocabulary = data.vocabulary
    return Transformer(
        config.model, vocabulary.source_size, None if vocabulary.shared else vocabulary.target_size
    )


def build_plan(config: Config, data: PreparedData) -> BatchPlan:
    """Lay out the stream of micro-batches."""
    slots = source_slots(config.batch, data.manifest.length_ratio, config.data.max_length)
    weights = [corpus.weight for corpus in config.data.train]
    corpora = list(zip(data.manifest.corpus_sizes, weights, strict=True))
    return BatchPlan(data.train, config.batch, slots, config.run.seed, corpora)


def seed_position(seed: int, step: int, index: int) -> None:
    """Seed torch for one micro-batch, so that its dropout depends on nothing but its place."""
    torch.manual_seed(int(mix64(seed, step, index)[0] >> 1))


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Resolve `precision`: bf16 where the GPU has it, else fp16 on CUDA, fp32 on the CPU."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def configure_torch(config: Config, device: torch.device) -> None:
    """Set torch's process-wide switches: threads and determinism."""
    assert config.run.threads != "auto", "rank 0 has recorded a number"
    torch.set_num_threads(config.run.threads)
    if config.run.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module


def memory_gib(device: torch.device) -> float:
    """Give the most memory that this rank has held: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def describe(training: Training, attempt: int) -> list[str]:
    """Say in a few lines what will run: sizes, precision, device, data, directory."""
    config, world, data = training.config, training.world, training.data
    parameters = sum(p.numel() for p in training.model.parameters())
    per_rank = -(-config.batch.micro_batches_per_step // world.size)
    place = f"step {training.progress.step}" if training.progress.step else "the beginning"
    device = (
        torch.cuda.get_device_name(world.device)
        if world.device.type == "cuda"
        else f"CPU, {config.run.threads} threads a rank"
    )
    return [
        f"batch    {world.size} ranks x {per_rank} micro-batches x "
        f"{config.batch.tokens_per_micro_batch:,} tokens = {config.batch.tokens_per_step:,} a step",
        f"device   {device}, {str(training.precision).removeprefix('torch.')}",
        f"model    {parameters:,} parameters, vocabulary {data.vocabulary.target_size:,}",
        f"data     {len(data.train):,} pairs, {data.manifest.splits['train'].target_tokens:,} "
        f"target tokens, from {data.directory}",
        f"run      {training.directory.path}, attempt {attempt}, from {place}",
    ]


if __name__ == "__main__":
    with shown_to_user():
        sys.exit(run(CONFIG))
