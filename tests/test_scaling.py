"""The law of scaling says what was published, and what must hold for any law."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import run_world

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import scaling, scaling_law, scaling_measured
from benchmarks.scaling_law import H200, MODELS, NO_LINKS, Settings
from dtrain.model.settings import ModelSettings
from dtrain.model.transformer import Transformer

pytestmark = pytest.mark.slow  # it imports all that it compares

MIB = 2**20


def test_the_law_says_what_mlperf_published():
    _, tokens, rates = np.array(scaling_law.MLPERF).T
    law = [row["law"] for row in scaling_law.replay()]
    np.testing.assert_allclose(law, rates, rtol=0.06)
    seconds = tokens / rates
    columns = np.stack([1 / seconds, tokens / seconds], axis=1)
    best = np.linalg.lstsq(columns, np.ones(5), rcond=None)[0]
    said = scaling_law.MLPERF_FIXED, scaling_law.MLPERF_SECONDS_PER_TOKEN
    np.testing.assert_allclose(said, best, rtol=2e-3)


@pytest.mark.parametrize(
    ("num_gpus", "mib", "published_ms"),
    [
        (8, 16, 0.134),
        (8, 256, 1.08),
        (8, 1024, 4.05),
        (32, 128, 1.31),
        (32, 256, 2.27),
        (32, 1024, 5.75),
    ],
)
def test_all_reduces_take_as_long_as_published(num_gpus, mib, published_ms):
    seconds = scaling_law.all_reduce_seconds(H200, mib * MIB, num_gpus)
    assert 1e3 * seconds == pytest.approx(published_ms, rel=0.09)


# What another program made of the same law: %, of fp32 and of bf16 gradients, on 8, 64, 512 and
# 1024 GPUs. It cut all but the embedding evenly into the best number of buckets for each case.
ELSEWHERE = {
    ("base", 3_125): ((89, 93), (55, 66), (44, 52), (42, 49)),
    ("base", 12_500): ((97, 98), (88, 90), (80, 84), (78, 81)),
    ("base", 25_000): ((99, 99), (94, 96), (91, 92), (89, 91)),
    ("base", 50_000): ((99, 100), (98, 98), (96, 97), (95, 96)),
    ("big", 3_125): ((93, 96), (60, 78), (52, 66), (51, 64)),
    ("big", 12_500): ((98, 99), (94, 96), (89, 93), (89, 92)),
    ("big", 25_000): ((99, 99), (97, 98), (96, 97), (95, 97)),
}


@pytest.mark.parametrize(("name", "tokens"), ELSEWHERE)
def test_another_program_finds_the_same_efficiencies(name, tokens):
    model = replace(MODELS[name], weight=1e-3)  # of no grain
    others = 4 * (model.parameters - model.embedding)
    alone = scaling_law.step_seconds(H200, model, Settings(), 1, tokens)
    compute = Settings().fixed_seconds + tokens * model.seconds_per_token
    for num_gpus, row in zip((8, 64, 512, 1024), ELSEWHERE[name, tokens], strict=True):
        for dtype, wanted in zip(("fp32", "bf16"), row, strict=True):
            exposed = min(
                scaling_law.exposed_seconds(
                    H200, model, Settings(dtype, (others / count - 1) / MIB), num_gpus, compute
                )
                for count in range(1, 17)
            )
            assert 100 * alone / (alone + exposed) == pytest.approx(wanted, abs=1.2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", scaling.BUCKETS)
def test_buckets_are_those_of_torch(name, size):
    wide = {"hidden_dim": 1024, "num_heads": 16, "feed_forward_dim": 4096}
    with torch.device("meta"):
        model = Transformer(ModelSettings.model_validate(wide if name == "big" else {}), 32768)
    embedding = model.decoder.embedding.weight
    others = [p for p in model.parameters() if p is not embedding]
    parameters = [*others[::-1], embedding]  # in backward's order
    limits = [MIB, 25 * MIB] if size == "auto" else [size * MIB]
    theirs, _ = torch.distributed._compute_bucket_assignment_by_size(parameters, limits)
    assert len(others) in theirs[-1]
    ours = scaling_law.buckets(MODELS[name], Settings(bucket_mb=size))
    assert len(ours) == pytest.approx(len(theirs), abs=1)
    assert sum(ours) == pytest.approx(sum(p.nbytes for p in parameters), rel=0.02)
    sizes = [sum(parameters[i].nbytes for i in bucket) for bucket in theirs[1:-1]]
    if sizes:
        assert ours[1] == pytest.approx(np.median(sizes), rel=0.1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", scaling.BUCKETS)
def test_limits_of_the_law(name, size):
    model, free = MODELS[name], replace(H200, memory_bandwidth=math.inf)
    for dtype in ("fp32", "bf16"):
        settings = Settings(dtype, size)
        assert scaling_law.efficiency(H200, model, settings, 1, 3125) == 1
        assert scaling_law.exposed_seconds(NO_LINKS, model, settings, 512, 1e-3) == 0
        assert scaling_law.efficiency(NO_LINKS, model, settings, 512, 3125) == 1
        for num_gpus in scaling.NUM_GPUS:
            by_tokens = [
                scaling_law.efficiency(H200, model, settings, num_gpus, 2**i) for i in range(18)
            ]
            assert by_tokens == sorted(by_tokens)
    for num_gpus in scaling.NUM_GPUS:
        fp32, bf16 = (
            scaling_law.step_seconds(free, model, Settings(dtype, size), num_gpus, 3125)
            for dtype in ("fp32", "bf16")
        )
        assert bf16 <= fp32  # what casts cost is not the network's


def test_what_is_advised_is_worth_it_and_defaults_are_kept_otherwise():
    for model in MODELS.values():
        assert scaling.advised(model, 1, 50_000) == Settings()
        for num_gpus in scaling.NUM_GPUS:
            chosen = scaling.advised(model, num_gpus, 3_125)
            assert not chosen.shard_optimizer  # as the report says
            best, default = (
                scaling_law.efficiency(H200, model, settings, num_gpus, 3_125)
                for settings in (chosen, Settings())
            )
            assert chosen == Settings() or best > default * (1 + scaling.WORTH / 2)


def test_results_and_picture_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "NUM_GPUS", (1, 8, 64))
    monkeypatch.setattr(scaling, "SHOWN_GPUS", (8, 64))
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--out", str(tmp_path)])
    scaling.main()
    found = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    first = found["predictions"][0]
    assert first["GPUs"] == first["efficiency"] == 1
    assert (tmp_path / "scaling.md").read_text(encoding="utf-8") in capsys.readouterr().out
    assert (tmp_path / "scaling.png").read_bytes()[1:4] == b"PNG"


# ------------------------------------------------------------------ what is measured


def test_predictions_are_the_sum_of_their_parts():
    tokens = scaling_measured.TOKENS
    found = scaling_measured.Found(
        parameters=1000,
        embedding=300,
        exchange=0.005,
        alone={count: 0.01 + 1e-4 * count for count in tokens},
        apart={count: 0.02 + 2e-4 * count for count in tokens},
        together={count: 0.03 + 1e-4 * count for count in tokens},
    )
    for row in scaling_measured.compare(found):
        count = row["tokens a rank"]
        assert row["predicted"] == pytest.approx(10 + 0.1 * count + 5)
        assert row["from apart"] == pytest.approx(20 + 0.2 * count + 5)
        assert row["two ranks"] == pytest.approx(30 + 0.1 * count)


@pytest.mark.slow
def test_two_ranks_are_measured(toy, tmp_path):
    config = toy(precision="fp32", kernels__loss="plain", kernels__residual="plain")
    (tmp_path / "scaling.yaml").write_text(config.to_yaml(), encoding="utf-8")
    run_world(2, scaling_measured.run_rank, tmp_path, (64, 128), 1)
    found = scaling_measured.Found.read(tmp_path / "measured.json", (64, 128))
    assert 0 < found.exchange < min(found.together.values())
    assert all(found.apart[count] > 0 < found.alone[count] for count in (64, 128))
    assert len(scaling_measured.compare(found)) == 2
