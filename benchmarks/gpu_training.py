"""Training steps on a GPU as `dtrain.train` runs them, in several ways, beside predictions."""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_calibration import share
from benchmarks.gpu_task import FUSED, PLAIN, Task, attempted
from benchmarks.yardstick import Row, matmul_rate, open_training, synchronize
from dtrain.config import Config
from dtrain.data.loader import LoadedStep
from dtrain.parts import memory_gib
from dtrain.train import Training


@dataclass(frozen=True)
class Way:
    """How a step is run.

    Attributes:
        name: of it.
        kernels: which kernels it takes.
        others: settings of kernels besides, `compile` for one.
        deterministic: as `run.deterministic`.
        prediction: its letter in PREDICTED; none if nothing was predicted.
    """

    name: str
    kernels: dict[str, Any]
    others: dict[str, bool] = field(default_factory=dict)
    deterministic: bool = True
    prediction: str = ""


EAGER = (
    Way("eager, padded", PLAIN, prediction="A"),
    Way("eager, fused", FUSED),
    Way("recorded, fused", FUSED, {"cuda_graph": True}),
    Way(
        "recorded, fused, joined memory", FUSED, {"cuda_graph": True, "memory_projection": "joined"}
    ),
    Way("recorded, fused, not deterministic", FUSED, {"cuda_graph": True}, deterministic=False),
)

COMPILED = (
    Way("compiled, fused", FUSED, {"compile": True}),
    Way("compiled, varlen", PLAIN | {"attention": "varlen"}, {"compile": True}, prediction="B"),
    Way("compiled, recorded, fused", FUSED, {"compile": True, "cuda_graph": True}, prediction="C"),
)

PREDICTED = {
    ("base", 32_768): {"A": 542e3, "B": 753e3, "C": 1.19e6},
    ("base", 4096): {"A": 225e3, "B": 612e3, "C": 1.03e6},
    ("big", 32_768): {"A": 244e3, "B": 314e3, "C": 446e3},
    ("big", 4096): {"A": 212e3, "B": 265e3, "C": 380e3},
}
"""Target tokens/s that arithmetic gives for one H200."""


def speed(task: Task, name: str, ways: tuple[Way, ...]) -> Iterator[Row]:
    """Measure training steps of a model, large ones and small ones."""
    size = (64,) * 3 if task.is_tiny else (8192,) * 3
    ceiling = matmul_rate(size, torch.bfloat16, task.torch_device, 3 * task.seconds_a_call)
    for way in ways:  # a recording that fails spoils the process for what comes after it
        for tokens in (32_768, 4096):
            config = task.config(
                task.model(name),
                tokens,
                kernels=task.kernels(way.kernels, **way.others),
                run__deterministic=way.deterministic,
            )
            what: Row = {"model": name, "way": way.name, "tokens a step": tokens}
            row = attempted(what, partial(speed_row, task, config, ceiling))
            if row.get("host waits a step"):
                row["failed"] = "a step waits for the GPU"
            predicted = PREDICTED[name, tokens].get(way.prediction)
            yield row | ({"predicted tokens/s": predicted} if predicted else {})


@dataclass
class Stretch:
    """Some steps: how many tokens each side of each sentence has, and the seconds they took."""

    source: list[Any]
    target: list[Any]
    steps: int = 0
    seconds: float = 0.0


def train_for(
    training: Training, steps: Iterator[LoadedStep], count: int, seconds: float
) -> Stretch:
    """Train up to so many steps, or so long."""
    stretch, begun = Stretch([], []), time.perf_counter()
    while stretch.steps < count and time.perf_counter() - begun < seconds:
        step = next(steps)
        training.train_step(step, time.perf_counter())
        ids = np.concatenate(step.plan.micro_batches)
        stretch.source.append(training.plan.lengths.source_lengths(ids))
        stretch.target.append(training.plan.lengths.target_lengths(ids))
        stretch.steps += 1
    synchronize(training.world.device)
    stretch.seconds = time.perf_counter() - begun
    return stretch


def speed_row(task: Task, config: Config, ceiling: float) -> Row:
    """Train for some seconds, and say how fast."""
    torch.use_deterministic_algorithms(False)  # a way before may have left it on
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with open_training(config) as (training, loader):
        steps, device = iter(loader), training.world.device
        begun = time.perf_counter()
        training.rehearse()
        synchronize(device)
        rehearsed = time.perf_counter() - begun
        first = train_for(training, steps, 1, 1)
        train_for(training, steps, 1 if task.is_tiny else 5, 30)
        graphs_at_first = counters["stats"]["unique_graphs"]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        measured = train_for(training, steps, 1 if task.is_tiny else 100, 3)
        source, target = np.concatenate(measured.source), np.concatenate(measured.target)
        utilisation = training.account.utilisation
        used = utilisation.measure(source, target, measured.seconds)
        return {
            "target tokens/s": int(target.sum()) / measured.seconds,
            "MFU": share(1e12 * used["train/tflops"], utilisation.peak),
            "of matmul rate": share(1e12 * used["train/tflops"], ceiling),
            "ms a step": 1000 * measured.seconds / measured.steps,
            "memory GiB": memory_gib(device),
            "graphs": counters["stats"]["unique_graphs"],
            "recompiled later": counters["stats"]["unique_graphs"] - graphs_at_first,
            "graph breaks": counters["graph_break"].total(),
            **waits(training, next(steps)),
            "rehearsal s": rehearsed,
            "first step s": first.seconds,
        }


def waits(training: Training, step: LoadedStep) -> Row:
    """Count how often a step makes the program wait for the GPU, and name what attended.

    Raises:
        RuntimeError: if another kernel attended than the settings name.
    """
    _, batch = step.micro_batches[0]
    wanted, kernel = training.config.kernels.attention, batch.source_layout.kernel
    if kernel != wanted:
        raise RuntimeError(f"the attention kernel is {kernel} and not {wanted}")
    if training.world.device.type != "cuda":
        return {"attention": kernel}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            training.learner.learn(training.progress.step + 1, step, lambda *_: None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Torch also warns, once, that it does not see all of them.
    count = sum("called a synchronizing" in str(warning.message) for warning in caught)
    return {"attention": kernel, "host waits a step": count}
