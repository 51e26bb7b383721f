"""How much of what its devices can do a training uses: operations of a step, peaks, their ratio.

Model-FLOPs utilisation (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B): the
operations that the model needs for a step's tokens, padding and repetition not counted, over those
that the devices could have done in its time.
"""

import re
from typing import NamedTuple

import numpy as np
import torch

from dtrain.config import Config
from dtrain.data.plan import Ids
from dtrain.distributed import World
from dtrain.model.settings import ModelSettings


def training_flops(
    model: ModelSettings, vocabulary_size: int, source_tokens: float, target_tokens: float
) -> float:
    """Count the floating point operations that training on some tokens needs.

    Six for each weight and token: a multiplication and an addition, forward once and backward
    twice. A source token passes the encoder and is made keys and values of in every decoder block;
    a target token passes the decoder and the output layer. Padding counts nothing; attention
    scores are `attention_flops`.
    """
    square = model.hidden_dim**2
    feed_forward = 2 * model.hidden_dim * model.feed_forward_dim
    source = model.num_encoder_layers * (4 * square + feed_forward)
    source += model.num_decoder_layers * 2 * square
    target = model.num_decoder_layers * (6 * square + feed_forward)
    target += model.hidden_dim * vocabulary_size
    return 6 * (source * source_tokens + target * target_tokens)


def attention_flops(model: ModelSettings, source_lengths: Ids, target_lengths: Ids) -> float:
    """Count the operations of attention scores and of the sums that they weight.

    For each query and key that it may see, `hidden_dim` products for all heads' scores and as many
    for the values; six operations each, as in `training_flops`.

    Args:
        model: its sizes.
        source_lengths: tokens of each source sentence, [N].
        target_lengths: of each target sentence, [N]; a token sees itself and those before it.
    """
    source, target = source_lengths.astype(np.float64), target_lengths.astype(np.float64)
    seen = model.num_encoder_layers * np.sum(source * source)
    seen += model.num_decoder_layers * np.sum(target * (target + 1) / 2 + source * target)
    return float(6 * 2 * model.hidden_dim * seen)


class Peak(NamedTuple):
    """Most TFLOP/s of dense matrix products, summed up in fp32; None: the device has no such."""

    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float


PEAKS = {
    # NVIDIA Blackwell data sheets (HGX B200; GB200 NVL72): half the figures "with sparsity".
    "B200": Peak(2250, 2250, 1100, 75),
    "GB200": Peak(2500, 2500, 1250, 80),
    # NVIDIA H100, H200 and GH200 data sheets: half the figures "with sparsity".
    "GH200": Peak(989.5, 989.5, 494.7, 67),
    "H200": Peak(989.5, 989.5, 494.7, 67),
    "H200 NVL": Peak(835.5, 835.5, 417.5, 60),
    "H100 HBM3": Peak(989.5, 989.5, 494.7, 67),  # SXM
    "H100 NVL": Peak(835.5, 835.5, 417.5, 60),
    "H100 PCIE": Peak(756, 756, 378, 51),
    # NVIDIA A100, A30, A40, A10 data sheets; A10G: the one of AWS's g5 instances.
    "A100 SXM4": Peak(312, 312, 156, 19.5),
    "A100 PCIE": Peak(312, 312, 156, 19.5),
    "A30": Peak(165, 165, 82, 10.3),
    "A40": Peak(149.7, 149.7, 74.8, 37.4),
    "A10": Peak(125, 125, 62.5, 31.2),
    "A10G": Peak(70, 70, 35, 31.5),
    # NVIDIA L4, L40 and L40S data sheets: the figures without sparsity.
    "L4": Peak(121, 121, 60, 30.3),
    "L40": Peak(181, 181, 90.5, 90.5),
    "L40S": Peak(362, 362, 183, 91.6),
    # NVIDIA T4 and V100 data sheets.
    "T4": Peak(None, 65, None, 8.1),
    "V100 PCIE": Peak(None, 112, None, 14),
    "V100 SXM2": Peak(None, 125, None, 15.7),
    "V100 SXM3": Peak(None, 125, None, 15.7),
    "V100S PCIE": Peak(None, 130, None, 16.4),
    # NVIDIA white papers of GA102, AD102 and Blackwell RTX: tensor cores with fp32 accumulation.
    "RTX A6000": Peak(154.8, 154.8, 77.4, 38.7),
    "RTX 6000 ADA GENERATION": Peak(364.2, 364.2, 182.1, 91.1),
    "RTX 3090": Peak(71, 71, 35.6, 35.6),
    "RTX 4090": Peak(165.2, 165.2, 82.6, 82.6),
    "RTX 5090": Peak(209.5, 209.5, 104.8, 104.8),
}
"""By the device's name without maker, family and size of memory, in capitals."""


def peak_flops(device_name: str, precision: torch.dtype, *, tf32: bool = False) -> float | None:
    """Look a device's peak up.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it. It must be in the table as a whole:
            a slice of a GPU (MIG), a laptop's or a Ti is another device.
        precision: of the matrix products.
        tf32: fp32 matrix products are rounded to TF32.

    Returns:
        FLOP/s; None if the table does not say.
    """
    words = re.split(r"[ -]", device_name.upper())
    maker = {"NVIDIA", "TESLA", "GEFORCE"}
    name = " ".join(w for w in words if w not in maker and not re.fullmatch(r"\d+GB", w))
    peak = PEAKS.get(name)
    if peak is None:
        return None
    column = {
        torch.bfloat16: peak.bf16,
        torch.float16: peak.fp16,
        torch.float32: peak.tf32 if tf32 else peak.fp32,
    }
    teraflops = column.get(precision)
    return None if teraflops is None else teraflops * 1e12


class Utilisation:
    """What the steps of a run need, and what its ranks could do.

    Attributes:
        peak: FLOP/s of one rank's device, taken for all of them; None if nobody knows.
    """

    def __init__(
        self, config: Config, vocabulary_size: int, precision: torch.dtype, world: World
    ) -> None:
        self._config, self._vocabulary_size, self._num_ranks = config, vocabulary_size, world.size
        self._device = "CPU"
        self._number_type = str(precision).removeprefix("torch.")
        told, self.peak = config.metrics.peak_tflops, None
        if world.device.type == "cuda":
            tf32 = torch.get_float32_matmul_precision() != "highest"
            self._device = torch.cuda.get_device_name(world.device)
            self._number_type += " (TF32)" if tf32 and precision is torch.float32 else ""
            self.peak = peak_flops(self._device, precision, tf32=tf32)
        if told is not None:
            self.peak = told * 1e12

    def measure(self, source_lengths: Ids, target_lengths: Ids, seconds: float) -> dict[str, float]:
        """Give the metrics of a step: TFLOP/s of a rank and, if the peak is known, their share.

        Args:
            source_lengths: tokens of each source sentence of the step, over all ranks, [N].
            target_lengths: of each target sentence, [N].
            seconds: that the step took.
        """
        model = self._config.model
        tokens = int(source_lengths.sum()), int(target_lengths.sum())
        flops = training_flops(model, self._vocabulary_size, *tokens)
        flops += attention_flops(model, source_lengths, target_lengths)
        rate = flops / seconds / self._num_ranks
        values = {"train/tflops": rate / 1e12}
        return values if self.peak is None else values | {"train/mfu": rate / self.peak}

    def describe(self) -> str:
        """Say by what the utilisation is measured, and whether determinism has its cost in it."""
        told, on = self._config.metrics.peak_tflops, self._config.run.deterministic
        if self.peak is None:
            return (
                f"peak     unknown for this device ({self._device}, {self._number_type}), so there "
                f"is no train/mfu; --metrics.peak_tflops=NUMBER tells it"
            )
        source = f"data sheet of {self._device}" if told is None else "metrics.peak_tflops"
        return (
            f"peak     {self.peak / 1e12:g} TFLOP/s a rank in {self._number_type} ({source}), "
            f"run.deterministic {'on' if on else 'off'}"
        )
