"""What the sections of gpu.py share: where and on what they measure, and how a call is timed."""

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.yardstick import Row, synchronize
from dtrain.config import Config
from dtrain.model.settings import ModelSettings
from dtrain.recording import Recording

MODELS = {
    "base": ModelSettings(),
    "big": ModelSettings(hidden_dim=1024, num_heads=16, feed_forward_dim=4096, dropout=0.3),
    "short": ModelSettings(num_encoder_layers=2, num_decoder_layers=2),
    "tiny": ModelSettings(
        hidden_dim=32,
        num_heads=2,
        feed_forward_dim=64,
        num_encoder_layers=1,
        num_decoder_layers=1,
    ),
}
"""The paper's two, and base with fewer layers, where compiling would take too long."""

MATMUL_FLOPS = 790e12
"""FLOP/s of large bf16 products that the predictions take an H200 to reach."""

BYTES_A_SECOND = 4.3e12
"""That they take its memory to move."""

PLAIN: dict[str, Any] = {"attention": "padded", "loss": "plain", "residual": "plain"}
FUSED: dict[str, Any] = {"attention": "packed", "loss": "fused", "residual": "fused"}


class CheckFailedError(Exception):
    """Something is not as it must be; the rows say how far off."""


@dataclass(frozen=True)
class Task:
    """What is measured, and where.

    Attributes:
        device: cuda or cpu.
        is_tiny: with small numbers of everything, to see that all ways can be gone.
        folder: for text, tokens and runs.
    """

    device: str
    is_tiny: bool
    folder: Path

    @property
    def torch_device(self) -> torch.device:
        """The device as torch names it."""
        return torch.device(self.device)

    @property
    def seconds_a_call(self) -> float:
        """For how long a call is repeated to time it."""
        return 0.002 if self.is_tiny else 0.1

    @property
    def vocabulary_size(self) -> int:
        """Pieces of the vocabulary that both languages share."""
        return 128 if self.is_tiny else 32_768

    @property
    def tokens(self) -> int:
        """Of a large micro-batch, a side."""
        return 128 if self.is_tiny else 32_768

    def model(self, name: str) -> ModelSettings:
        """Choose from MODELS."""
        return MODELS["tiny" if self.is_tiny else name]

    def kernels(self, wanted: dict[str, Any], **others: Any) -> dict[str, Any]:
        """Give settings of kernels; without a GPU the plain ones, and no recording."""
        others = {"compile": False, "cuda_graph": False} | others
        if self.device == "cuda":
            return wanted | others
        return PLAIN | others | {"cuda_graph": False}

    def config(
        self, model: ModelSettings, tokens: int, name: str = "run", **settings: object
    ) -> Config:
        """Give the settings of a run, one micro-batch a step; keys as `kernels__compile`."""
        tokens = min(tokens, self.tokens)
        text = {"source": str(self.folder / "train.en"), "target": str(self.folder / "train.de")}
        sections: dict[str, Any] = {
            "run": {"name": name, "dir": str(self.folder / "runs/{name}"), "device": self.device},
            "data": {
                "train": [text],
                "dir": str(self.folder / "prepared"),
                "max_length": min(tokens, 256),
            },
            "vocabulary": {"size": self.vocabulary_size},
            "model": model,
            "batch": {"tokens_per_step": tokens, "tokens_per_micro_batch": tokens},
            "precision": "bf16",
            "kernels": self.kernels(PLAIN),
            "validation": {"every_steps": 0},
            "checkpoint": {"every_steps": 0},
            "wandb": {"mode": "disabled"},
        }
        for key, value in settings.items():
            section, _, rest = key.partition("__")
            sections[section] = {**sections[section], rest: value} if rest else value
        return Config.model_validate(sections)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile for one shape; if all is tiny only as far as needs no C++ compiler."""
        torch._dynamo.reset()
        backend = "eager" if self.is_tiny else "inductor"
        return torch.compile(function, dynamic=False, backend=backend)


def attempted(what: Row, measure: Callable[[], Row]) -> Row:
    """Measure; if that fails, the row says how, and the rows after it are measured all the same."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return what | measure()
    except Exception as error:  # whatever a compiler or a driver may raise
        traceback.print_exc()
        if torch.distributed.is_initialized():  # a training that failed leaves it, for its peers
            torch.distributed.destroy_process_group()
        lines = str(error).strip().splitlines() or [""]
        return what | {"failed": f"{type(error).__name__}: {lines[0]}"}


@dataclass(frozen=True)
class Timing:
    """How long a piece of work takes, in seconds.

    Attributes:
        called: from Python, which may be slower than the GPU.
        recorded: as a CUDA graph: what the GPU itself takes; None if it was not recorded.
    """

    called: float
    recorded: float | None

    @property
    def best(self) -> float:
        """What the device takes, as far as is known."""
        return self.called if self.recorded is None else self.recorded

    def columns(self) -> Row:
        """Show both, in microseconds."""
        recorded = "not recorded" if self.recorded is None else 1e6 * self.recorded
        return {"us": 1e6 * self.called, "us recorded": recorded}


def timed(work: Callable[[], Tensor], task: Task) -> Timing:
    """Time some work: called again and again, then recorded as a CUDA graph."""
    called, recorded = _seconds_a_call(work, task), None
    if task.device == "cuda":
        try:
            recorded = _seconds_a_call(Recording(work).replay, task)
        except Exception:  # the time of calls is known, and worth keeping
            traceback.print_exc()
    return Timing(called, recorded)


def _seconds_a_call(work: Callable[[], object], task: Task) -> float:
    def run(count: int) -> float:
        synchronize(task.torch_device)
        begun = time.perf_counter()
        for _ in range(count):
            work()
        synchronize(task.torch_device)
        return time.perf_counter() - begun

    run(2)  # what is compiled or tuned at first is so now
    count = max(1, round(task.seconds_a_call / run(1)))
    return run(count) / count
