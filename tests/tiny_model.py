"""A tiny Transformer, trained a little, for tests that save and load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain import checkpoint
from dtrain.batch import Batch
from dtrain.config import OptimizerSettings
from dtrain.loss import Objective
from dtrain.model.settings import ModelSettings
from dtrain.model.transformer import Transformer
from dtrain.optimizer import build_optimizer
from dtrain.saver import contents
from dtrain.weights import file_content

TINY = ModelSettings(
    hidden_dim=8, num_heads=2, feed_forward_dim=16, num_encoder_layers=1, num_decoder_layers=1
)


def trained(
    seed: int = 0, steps: int = 2, target_size: int | None = None
) -> tuple[Transformer, torch.optim.Optimizer]:
    """Make a model and its optimizer, the same ones for the same seed, after some steps."""
    torch.manual_seed(seed)
    model = Transformer(TINY, 12, target_size)
    optimizer = build_optimizer(model, OptimizerSettings())
    for _ in range(steps):
        train_step(model, optimizer)
    return model, optimizer


def train_step(model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Change all weights and moments."""
    Objective(model, 0.1)(Batch.padded([[5, 6, 3]], [[7, 3]]))[0].backward()
    optimizer.step()


def save_checkpoint(
    folder: Path,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint here and now, with the moments if an optimizer is given."""
    tensors = {checkpoint.MODEL: dict(model.state_dict())}
    if optimizer is not None:
        tensors = contents(model, optimizer)
    pieces = {file: file_content(named) for file, named in tensors.items()}
    return checkpoint.write(folder, name, pieces, state)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def files_of(path: Path) -> dict[str, bytes]:
    """Read all files of a checkpoint."""
    return {path.name: path.read_bytes() for path in path.iterdir()}
