"""benchmarks/data_speed.py: that it compares like with like; its figures are not judged here."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import data_speed  # noqa: E402
from dtrain.data.store import PreparedData  # noqa: E402


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return data_speed.prepared(data_speed.made_up(tmp_path_factory.mktemp("data") / "text", 1000))


def test_slices_and_rectangles_hold_what_the_store_gathers(small):
    ids = np.array([5, 0, 999, 17])
    sides = PreparedData.open(small).train.gather(ids)
    slices = data_speed.Slices(small)
    rectangles = data_speed.padded([slices[i] for i in ids])
    for (tokens, lengths), sliced, rectangle in zip(
        sides, slices.packed(ids), rectangles, strict=True
    ):
        assert sliced.tolist() == tokens.tolist()
        rows = torch.from_numpy(tokens.astype(np.int64)).split(lengths.tolist())
        for row, wanted in zip(rectangle, rows, strict=True):
            assert row[: len(wanted)].tolist() == wanted.tolist()
            assert not row[len(wanted) :].any()


def test_made_up_lengths_open_as_a_corpus_of_that_size(small, tmp_path, monkeypatch):
    monkeypatch.setattr(data_speed, "PATTERN", 1000)
    data_speed.inflate(small, tmp_path / "large", 2300)
    data = PreparedData.open(tmp_path / "large")
    assert len(data.train) == sum(data.manifest.corpus_sizes) == 2300
    ids = np.arange(2300)
    lengths = data.train.target_lengths(ids)
    assert lengths[2000:].tolist() == lengths[:300].tolist() == lengths[1000:1300].tolist()
    assert lengths.min() >= 2
    assert lengths.sum() == data.manifest.splits["train"].target_tokens
    (tokens, _), _ = data.train.gather(ids[-3:])
    assert not tokens.any()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_it_runs_and_writes_its_results(tmp_path, monkeypatch):
    made_up = data_speed.made_up
    monkeypatch.setattr(data_speed, "PATTERN", 1000)
    monkeypatch.setattr(data_speed, "made_up", lambda folder, _: made_up(folder, 1000))
    sizes = ["--pairs", "3000", "--micro-batches", "1024", "--rounds", "1", "--windows", "1"]
    places = ["--out", str(tmp_path), "--disk", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["", "--parts", "gather", "start", *sizes, *places])
    data_speed.main()
    results = json.loads((tmp_path / "data-speed.json").read_text(encoding="utf-8"))
    assert results["gather"][0]["way"] == "gather"
    assert [row["windows"] for row in results["start"]] == [1, 4]
    assert results["start"][0]["most MiB of its own"] > results["start"][0]["imported MiB"] - 1
    assert "## start" in (tmp_path / "data-speed.md").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"data-speed.json", "data-speed.md"}
