"""The law of scaling: how long a step takes on so many GPUs. Seconds and bytes throughout.

A step takes T_fix + c tokens on every GPU, then the update, and as much of the gradients'
all-reduce as backward did not hide. Nothing of it was measured on GPUs of our own: c is a
roofline's, T_fix an estimate, and what links do was published by others; each constant names its
source. Beyond four machines the latency of an all-reduce is extrapolated.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.yardstick import Row

MIB = 2**20

FIXED = {"eager": 17e-3, "compiled": 2.5e-3, "graph": 0.15e-3}
"""T_fix: what a step takes however few its tokens. Eager: 2,600 kernels of some 7 us."""

TAIL = 0.03
"""Of backward: its end, the first layer's input and the lookup, where only the embedding's gradient
is still to come. Fitted: so 56 efficiencies that another program found come out to 1.2 points."""

UPDATE_BYTES = 34.0
"""A parameter, moved by clipping and fused Adam: fp32 weight, gradient and moments, in and out."""

REDUCER_BYTES = {"fp32": 8.0, "bf16": 24.0}
"""A parameter, moved by DDP: its gradient into a bucket; for bf16 also cast, divided, cast back."""


@dataclass(frozen=True)
class Machine:
    """GPUs, in machines of some, and their links.

    Attributes:
        gpus: of one machine.
        small: bytes below which an all-reduce in one machine takes another way.
        small_latency: of that way.
        small_bandwidth: likewise.
        latency: of an all-reduce in one machine.
        bandwidth: likewise, bytes of the result a second.
        hop_latency: that every doubling of the number of machines adds.
        network: (bytes of the result, bytes a second and GPU) between machines; between these
            points on a line.
        memory_bandwidth: of a GPU.
    """

    gpus: int
    small: float
    small_latency: float
    small_bandwidth: float
    latency: float
    bandwidth: float
    hop_latency: float
    network: tuple[tuple[float, float], ...]
    memory_bandwidth: float


H200 = Machine(
    gpus=8,
    # 8 x H200: github.com/stas00/ml-engineering 744d01e, network/README.md, lines 1253-1275.
    small=2e6,
    small_latency=45e-6,
    small_bandwidth=60e9,
    latency=80e-6,
    bandwidth=270.6e9,
    # 4 x 8 B200 with a link of 50 GB/s a GPU: the same, lines 1400-1425.
    hop_latency=150e-6,
    network=((300e6, 26e9), (540e6, 33e9), (1e9, 36.5e9)),
    memory_bandwidth=4.3e12,  # of 4.8 in the data sheet
)

NO_LINKS = Machine(1, 0, 0, math.inf, 0, math.inf, 0, ((1, math.inf),), math.inf)
"""Where exchanging costs nothing, or is part of T_fix."""


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        parameters: all of them.
        embedding: those of the tied embedding.
        weight: those of the feed-forward layer's matrix, the largest one else.
        seconds_per_token: c, of a target token and the source token beside it.
    """

    parameters: float
    embedding: float
    weight: float
    seconds_per_token: float


# 32,768 pieces. Seconds: roofline of one H200 in bf16 with all kernels of the plan, unmeasured.
MODELS = {
    "base": Model(61.5e6, 32768 * 512, 2048 * 512, 855e-9),
    "big": Model(211e6, 32768 * 1024, 4096 * 1024, 2237e-9),
}


@dataclass(frozen=True)
class Settings:
    """What of a run's settings matters.

    Attributes:
        gradient_dtype: distributed.gradient_dtype.
        bucket_mb: distributed.bucket_mb; auto: as on GPUs, 1 MiB and then 25.
        shard_optimizer: distributed.shard_optimizer.
        fixed_seconds: T_fix.
        spread: of the ranks' step times, standard deviation over mean; 0 for steps of equal work.
    """

    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    bucket_mb: Literal["auto"] | float = "auto"
    shard_optimizer: bool = False
    fixed_seconds: float = FIXED["graph"]
    spread: float = 0.0


def all_reduce_seconds(machine: Machine, size: float, num_gpus: int) -> float:
    """Say how long so many bytes take to be added up; within 9 % of what was published."""
    if num_gpus == 1:
        return 0.0
    if num_gpus <= machine.gpus:
        if size < machine.small:
            return machine.small_latency + size / machine.small_bandwidth
        return machine.latency + size / machine.bandwidth
    nodes = num_gpus / machine.gpus
    sizes, rates = zip(*machine.network, strict=True)
    rate = float(np.interp(size, sizes, rates))
    between = 2 * (nodes - 1) / nodes * size / machine.gpus / rate
    within = size / machine.bandwidth
    return machine.latency + machine.hop_latency * math.log2(nodes) + max(within, between)


def buckets(model: Model, settings: Settings) -> list[float]:
    """List DDP's buckets in the order of backward, in bytes of fp32 (also if bf16 is sent).

    A bucket is full, and sent, with the matrix that reaches its size. The tied embedding's gradient
    is complete last of all, and joins what is left.
    """
    rest, full = 4 * (model.parameters - model.embedding), list[float]()
    caps = [1.0, 25.0] if settings.bucket_mb == "auto" else [settings.bucket_mb]
    while True:
        cap = caps[min(len(full), len(caps) - 1)] * MIB
        size = math.ceil(cap / (4 * model.weight)) * 4 * model.weight if cap < rest else math.inf
        if size > rest:
            return [*full, rest + 4 * model.embedding]
        full.append(size)
        rest -= size


def exposed_seconds(
    machine: Machine, model: Model, settings: Settings, num_gpus: int, compute: float
) -> float:
    """Say for how long GPUs still wait for gradients after `compute` seconds of work.

    Buckets are sent one after the other, each once it is ready; backward is the last two thirds.
    """
    backward = 2 / 3 * compute
    sent_size = {"fp32": 1.0, "bf16": 0.5}[settings.gradient_dtype]
    *early, last = buckets(model, settings)
    others = 4 * (model.parameters - model.embedding)
    filled, free = 0.0, 0.0
    for size in early:
        filled += size
        ready = compute - backward + backward * (1 - TAIL) * filled / others
        free = max(free, ready) + all_reduce_seconds(machine, sent_size * size, num_gpus)
    end = max(free, compute) + all_reduce_seconds(machine, sent_size * last, num_gpus)
    return end - compute


def update_seconds(machine: Machine, model: Model, settings: Settings, num_gpus: int) -> float:
    """Say how long clipping and Adam take, and under ZeRO-1 the weights' way back, at the least.

    torch's ZeroRedundancyOptimizer gives whole parameters to ranks, so that one of them updates the
    embedding, and lets every rank broadcast its own afterwards, one after the other, in fp32.
    """
    whole = UPDATE_BYTES * model.parameters / machine.memory_bandwidth
    if not settings.shard_optimizer or num_gpus == 1:
        return whole
    share = max(1 / num_gpus, model.embedding / model.parameters)
    broadcasts = num_gpus * machine.small_latency + 4 * model.parameters / machine.bandwidth
    return whole * share + broadcasts


def step_seconds(
    machine: Machine, model: Model, settings: Settings, num_gpus: int, tokens: float
) -> float:
    """Say how long a step of so many target tokens on each GPU takes."""
    compute = settings.fixed_seconds + tokens * model.seconds_per_token
    update = update_seconds(machine, model, settings, num_gpus)
    if num_gpus == 1:
        return compute + update
    slowest = 1 + settings.spread * math.sqrt(2 * math.log(num_gpus))  # of normal ones, expected
    moved = REDUCER_BYTES[settings.gradient_dtype] * model.parameters / machine.memory_bandwidth
    waiting = exposed_seconds(machine, model, settings, num_gpus, compute)
    return compute * slowest + moved + waiting + update


def efficiency(
    machine: Machine, model: Model, settings: Settings, num_gpus: int, tokens: float
) -> float:
    """Compare with one GPU that has as many tokens as each of them."""
    alone = step_seconds(machine, model, settings, 1, tokens)
    return alone / step_seconds(machine, model, settings, num_gpus, tokens)


# NVIDIA's A100s in MLPerf 0.7, Transformer-big: GPUs, tokens a GPU (its max-tokens), target tokens
# a second and GPU. github.com/mlcommons/training_results_v0.7, NVIDIA/results/dgxa100_*/transformer
MLPERF = (
    (8, 13824, 101.8e3),
    (16, 6912, 92.1e3),
    (80, 9216, 89.2e3),
    (160, 4608, 79.5e3),
    (480, 1536, 48.0e3),
)
# T_fix and c: least squares of the relative errors of these five step times.
MLPERF_FIXED, MLPERF_SECONDS_PER_TOKEN = 18.7e-3, 8.58e-6


def replay() -> list[Row]:
    """Set what two numbers, fixed time and time a token, say beside what was published."""
    settings = Settings(fixed_seconds=MLPERF_FIXED)
    rows = list[Row]()
    for num_gpus, tokens, published in MLPERF:
        model = Model(0, 0, 0, MLPERF_SECONDS_PER_TOKEN)
        rate = tokens / step_seconds(NO_LINKS, model, settings, num_gpus, tokens)
        error = f"{rate / published - 1:+.1%}"
        rows.append(
            {
                "A100s": num_gpus,
                "tokens a GPU": tokens,
                "published tokens/s a GPU": published,
                "law": rate,
                "error": error,
            }
        )
    return rows
