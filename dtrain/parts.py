"""A run's parts, made from its settings: model, plan, precision, torch's switches."""

import os
import resource
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from dtrain import checkpoint, weights
from dtrain.batch import NUM_RECTANGLES, Kernel
from dtrain.config import Config
from dtrain.data.plan import BatchPlan, mix64, source_slots
from dtrain.data.store import PreparedData
from dtrain.data.vocabulary import Vocabulary
from dtrain.model.sublayer import Residual
from dtrain.model.transformer import Transformer
from dtrain.run_directory import RunDirectory

# Torch and cuBLAS look at it once, at the first product on a GPU, which may be a kernel that is
# tried long before `configure_torch`; without it `run.deterministic` refuses every product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def build_model(config: Config, vocabulary: Vocabulary) -> Transformer:
    """Make the model with the seed's random weights, the same on every rank and device."""
    seed_position(config.run.seed, 0, 0)
    model = Transformer(
        config.model, vocabulary.source_size, None if vocabulary.shared else vocabulary.target_size
    )
    for module in model.modules():
        if isinstance(module, Residual):
            module.fused = config.kernels.residual == "fused"
    model.decoder.joins_memory = config.kernels.memory_projection == "joined"
    return model


def trained_model(run: Path, wanted: str) -> tuple[Transformer, Config, Vocabulary, Path]:
    """Load a trained model for use.

    Args:
        run: its run directory.
        wanted: which checkpoint: a step, `best`, `last` or the name of an average.

    Returns:
        The model in eval mode on the CPU, the run's settings, its vocabulary, and the checkpoint.

    Raises:
        UserError: if there is no such run or checkpoint, or it is damaged.
    """
    directory = RunDirectory.existing(run)
    config, vocabulary = directory.config, Vocabulary.load(run)
    path = checkpoint.choose(directory.checkpoints, wanted)
    model = build_model(config, vocabulary)
    weights.load_module(model, path / checkpoint.MODEL)
    return model.eval(), config, vocabulary, path


def build_plan(config: Config, data: PreparedData) -> BatchPlan:
    """Lay out the stream of micro-batches."""
    slots = source_slots(config.batch, data.manifest.length_ratio, config.data.max_length)
    weights = [corpus.weight for corpus in config.data.train]
    corpora = list(zip(data.manifest.corpus_sizes, weights, strict=True))
    kernel: Kernel = "padded" if config.kernels.attention == "auto" else config.kernels.attention
    # A compiler takes minutes for several rectangles whose sizes differ from batch to batch.
    form = kernel, config.data.max_length, 1 if config.kernels.compile is True else NUM_RECTANGLES
    return BatchPlan(data.train, config.batch, slots, config.run.seed, corpora, *form)


def seed_position(seed: int, step: int, index: int) -> None:
    """Seed torch for one micro-batch, so that its dropout depends on nothing but its place."""
    torch.manual_seed(int(mix64(seed, step, index)[0]) >> 1)


def choose_precision(device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """Say what `precision: auto` means: bf16 where the GPU has it, else fp16; fp32 on the CPU."""
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Compute in this precision; parameters stay in fp32."""
    low = precision is not torch.float32
    return torch.autocast(device.type, precision if low else torch.bfloat16, enabled=low)


def configure_torch(config: Config, device: torch.device) -> None:
    """Set torch's process-wide switches: threads and determinism."""
    if config.run.threads != "auto":
        torch.set_num_threads(config.run.threads)
    if config.run.deterministic and device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer, scale: float) -> int:
    """Sum up the bits of all weights and moments, and of the fp16 loss scale, to 62 bits.

    Without moments that are split over the ranks, whose places in the optimizer are empty.
    """
    tensors = [p.detach() for p in model.parameters()]
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    sums = [t.reshape(-1).view(torch.int32).sum(dtype=torch.int64) for t in tensors]
    total = hash(scale)
    for number in torch.stack(sums).tolist():
        total = (31 * total + number) % 2**62
    return total


def memory_gib(device: torch.device) -> float:
    """Give the most memory that this rank has held: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
