"""Operations against torch's own counter, peaks by the names that GPUs have."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch_twins import random_ids

from dtrain.batch import Batch
from dtrain.distributed import alone
from dtrain.loss import Objective
from dtrain.model.settings import ModelSettings
from dtrain.model.transformer import Transformer
from dtrain.utilisation import PEAKS, Utilisation, attention_flops, peak_flops, training_flops

SMALL = ModelSettings(
    hidden_dim=16,
    num_heads=2,
    feed_forward_dim=24,
    num_encoder_layers=2,
    num_decoder_layers=3,
    dropout=0.0,
)


def test_operations_of_a_step_are_those_that_torch_counts():
    """Without padding; what torch counts besides is the half of causal scores that no token sees.

    The middle of a causal rectangle counts half: T (T - 1) / 2 of T * T cells are never looked at.
    """
    size, source_length, target_length, vocabulary = 5, 7, 9, 40
    sources, targets = ([n] * size for n in (source_length, target_length))
    batch = Batch.padded(random_ids(sources, vocabulary, 1), random_ids(targets, vocabulary, 2))
    model = Transformer(SMALL, vocabulary)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Objective(model, 0.1)(batch)[0].backward()
    tokens = size * source_length, size * target_length
    ours = training_flops(SMALL, vocabulary, *tokens)
    ours += attention_flops(SMALL, np.array(sources), np.array(targets))
    unseen = size * SMALL.num_decoder_layers * target_length * (target_length - 1) // 2
    assert counter.get_total_flops() == ours + 12 * SMALL.hidden_dim * unseen


def test_attention_is_counted_sentence_by_sentence():
    source, target = np.array([3, 1, 6]), np.array([4, 2, 1])
    pairs = 0
    for s, t in zip(source, target, strict=True):
        pairs += 2 * s * s + 3 * sum(1 for q in range(t) for k in range(t) if k <= q) + 3 * s * t
    assert attention_flops(SMALL, source, target) == 6 * 2 * 16 * pairs


@pytest.mark.parametrize(
    ("device", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H100 NVL", torch.float16, 835.5),
        ("NVIDIA H200", torch.bfloat16, 989.5),
        ("NVIDIA GH200 480GB", torch.float16, 989.5),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100-PCIE-40GB", torch.float32, 19.5),
        ("NVIDIA A100 80GB PCIe", torch.float16, 312),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA A10G", torch.bfloat16, 70),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("Tesla T4", torch.float16, 65),
        ("Tesla V100-SXM2-16GB", torch.float16, 125),
        ("Tesla V100-PCIE-32GB", torch.float32, 14),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("GeForce RTX 3090", torch.float16, 71),
        ("NVIDIA RTX 6000 Ada Generation", torch.bfloat16, 364.2),
    ],
)
def test_a_device_is_found_by_the_name_that_torch_gives_it(device, precision, teraflops):
    assert peak_flops(device, precision) == teraflops * 1e12


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_a_slice_or_a_relative_of_a_device_is_another(device):
    assert peak_flops(device, torch.bfloat16) is None


def test_what_a_device_cannot_do_has_no_peak():
    assert peak_flops("Tesla T4", torch.bfloat16) is None
    assert peak_flops("Tesla V100-SXM2-16GB", torch.float32, tf32=True) is None
    assert peak_flops("NVIDIA A100-SXM4-40GB", torch.float32, tf32=True) == 156e12
    assert all(peak.bf16 in (None, peak.fp16) for peak in PEAKS.values())


def test_the_share_is_that_of_all_ranks_peaks(toy):
    world = replace(alone("cpu"), size=4)
    config = toy(metrics__peak_tflops=0.5)
    lengths = np.array([30, 10]), np.array([20, 25])
    flops = training_flops(config.model, 48, 40, 45) + attention_flops(config.model, *lengths)
    found = Utilisation(config, 48, torch.float32, world).measure(*lengths, 2.0)
    assert found["train/tflops"] == pytest.approx(flops / 2 / 4 / 1e12)
    assert found["train/mfu"] == pytest.approx(flops / 2 / (4 * 0.5e12))


def test_an_unknown_device_is_said_and_has_no_share(toy):
    unknown = Utilisation(toy(), 48, torch.float32, alone("cpu"))
    assert unknown.measure(np.array([3]), np.array([4]), 1.0).keys() == {"train/tflops"}
    assert unknown.describe() == (
        "peak     unknown for this device (CPU, float32), so there is no train/mfu; "
        "--metrics.peak_tflops=NUMBER tells it"
    )
    config = toy(metrics__peak_tflops=0.25, run__deterministic=False)
    assert Utilisation(config, 48, torch.float32, alone("cpu")).describe() == (
        "peak     0.25 TFLOP/s a rank in float32 (metrics.peak_tflops), run.deterministic off"
    )


def test_a_gpu_is_known_by_its_data_sheet(toy, monkeypatch):
    world = replace(alone("cpu"), device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    found = Utilisation(toy(), 48, torch.bfloat16, world)
    assert found.peak == 989.5e12
    assert found.describe() == (
        "peak     989.5 TFLOP/s a rank in bfloat16 (data sheet of NVIDIA H200), "
        "run.deterministic on"
    )
    told = Utilisation(toy(metrics__peak_tflops=700), 48, torch.bfloat16, world)
    assert told.peak == 700e12
