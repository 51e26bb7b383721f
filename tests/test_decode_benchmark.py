"""benchmarks/decode_speed.py: what it hands out, what it measures, and whom it finds out."""

import json
import sys
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

# E402: these are found by the path that was just set.
from benchmarks import decode_speed
from benchmarks.contest import compete
from benchmarks.peers.translating import (
    Task,
    as_fairseq_names_them,
    read_weights,
    translated,
)
from benchmarks.peers.turns import EOS, Rows
from dtrain.search import search

pytestmark = pytest.mark.slow  # a trained model is converted


@pytest.fixture(scope="module")
def run(trained) -> Path:
    return trained.run_dir.absolute()


@pytest.fixture
def handed_out(run, toy_text, tmp_path):
    """The toy run's weights and 24 of its sentences, for a beam of two."""
    lines = (toy_text / "train.en").read_text(encoding="utf-8").split("\n")[:26]
    text = tmp_path / "asked"
    text.write_text("\n".join(lines), encoding="utf-8")
    return decode_speed.hand_out(run, text, tmp_path, Task(1, 8, 2))


def sentences(folder: Path) -> list[list[int]]:
    rows = Rows.read(folder, "source")
    return [rows[i].tolist() for i in range(len(rows))]


@pytest.mark.usefixtures("handed_out")
def test_sentences_come_in_full_batches_sorted_by_length(tmp_path):
    found = sentences(tmp_path)
    assert len(found) == 24
    lengths = sorted([len(one) for one in found[i : i + 8]] for i in range(0, 24, 8))
    assert list(chain(*lengths)) == sorted(map(len, found))
    assert all(one[-1] == EOS for one in found)


def test_renamed_weights_are_all_of_the_model(handed_out, tmp_path):
    """Under fairseq's names torch's own layers, which have the same parts, give the same memory."""
    task, model = handed_out
    weights = read_weights(tmp_path)
    renamed = as_fairseq_names_them(weights, task)
    size = sum(array.size for array in renamed.values())
    assert size == sum(array.size for name, array in weights.items() if ".blocks." in name)
    x = torch.from_numpy(weights["decoder.embedding.weight"])[[4, 5, 6, EOS]][None]
    x = x * task.hidden_dim**0.5 + torch.from_numpy(weights["positions"])[:4]
    for i in range(task.num_encoder_layers):
        x = torch_layer(renamed, f"encoder.layers.{i}", task)(x)
    source = torch.tensor([[4, 5, 6, EOS]])
    layout = decode_speed.Batch.padded(source.tolist(), [[EOS]]).source_layout
    torch.testing.assert_close(model.encode(source, layout), x, atol=1e-5, rtol=0)


def torch_layer(arrays, prefix: str, task: Task) -> torch.nn.Module:
    values = {k.removeprefix(f"{prefix}."): torch.from_numpy(v) for k, v in arrays.items()}
    layer = torch.nn.TransformerEncoderLayer(
        task.hidden_dim, task.num_heads, task.feed_forward_dim, 0.0, batch_first=True
    )
    fused = {
        f"self_attn.in_proj_{kind}": torch.cat(
            [values[f"self_attn.{c}_proj.{kind}"] for c in "qkv"]
        )
        for kind in ("weight", "bias")
    }
    names = {
        "self_attn.out_proj": "self_attn.out_proj",
        "linear1": "fc1",
        "linear2": "fc2",
        "norm1": "self_attn_layer_norm",
        "norm2": "final_layer_norm",
    }
    for mine, theirs in names.items():
        fused |= {f"{mine}.{kind}": values[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    layer.load_state_dict(fused)
    return layer.train()  # not torch's fast path; nothing is dropped


def test_a_contestant_translates_batch_after_batch(handed_out, tmp_path):
    task, _ = handed_out
    asked = sentences(tmp_path)

    def reverse(batch: list[list[int]]) -> list[list[int]]:
        assert len(batch) == task.batch_size
        return [sentence[-2::-1] for sentence in batch]

    steps = list(islice(translated(tmp_path, "reverse", reverse), 4))  # the first batch twice
    assert [step.target_tokens for step in steps] == [
        sum(map(len, asked[i : i + 8])) for i in (0, 8, 16, 0)
    ]
    found = decode_speed.translations_of(tmp_path, "reverse")
    assert [found[i] for i in range(24)] == [sentence[-2::-1] for sentence in asked]


def test_log_probabilities_are_those_of_the_search(handed_out, tmp_path):
    _, model = handed_out
    best = search(model, sentences(tmp_path), 3, 0.0)
    found = {i: hypothesis.ids for i, hypothesis in enumerate(best)}
    expected = np.mean([hypothesis.score for hypothesis in best])
    given = decode_speed.log_probability(model, tmp_path, found)
    assert given == pytest.approx(expected, abs=1e-4)
    worse = {i: [*ids, 4] for i, ids in found.items()}
    assert decode_speed.log_probability(model, tmp_path, worse) < given - 0.1


@pytest.mark.exhaustive
@pytest.mark.slow
def test_contestants_are_measured_and_compared(run, handed_out, tmp_path):
    task, model = handed_out
    entries = decode_speed.entries_of(["fairseq"], run, tmp_path, task)
    entries[2] = replace(entries[2], missing="not installed")
    contest = compete(entries[:2], [], rounds=2, steps=1)
    result = decode_speed.Result(task, tmp_path, entries, contest, model)
    values, text = decode_speed.report([result], {"cores": 1})
    own, penalised, missing = json.loads(json.dumps(values["Beam of 2"]))["contestants"]
    assert own["like dtrain's"] == "24 of 24"
    assert float(own["sentences/s"].split()[0].replace(",", "")) > 0
    assert penalised["contestant"] == "dtrain, length penalty 0.6"
    assert missing["notes"] == "not installed"
    assert "## Beam of 2" in text
    decode_speed.draw([result], tmp_path / "picture.png", "caption")
    assert (tmp_path / "picture.png").stat().st_size > 5000
