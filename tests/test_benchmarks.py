"""The benchmarks run: not their figures are judged here, but their arithmetic and their ways."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# E402: these are found by the path that was just set.
from benchmarks import yardstick  # noqa: E402
from dtrain.model.settings import ModelSettings  # noqa: E402


def test_operations_are_those_of_a_model_counted_by_hand():
    base = ModelSettings()
    # Per pair of tokens, 6 layers of 512 and 2048: encoder, decoder, output layer of 32,768.
    source = 6 * 6 * (4 * 512**2 + 2 * 512 * 2048 + 2 * 512**2)
    target = 6 * 6 * (6 * 512**2 + 2 * 512 * 2048) + 6 * 32768 * 512
    assert yardstick.training_flops(base, 32768, 10, 1) == 10 * source + target
    assert source + target == pytest.approx(364.9e6, rel=1e-3)


def test_made_up_text_is_always_the_same_and_as_long_as_asked(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        yardstick.write_corpus(tmp_path / name, 2000, 23, 500)
    for language in ("en", "de"):
        text = (tmp_path / "a" / f"train.{language}").read_text(encoding="utf-8")
        assert text == (tmp_path / "b" / f"train.{language}").read_text(encoding="utf-8")
        lines = text.split("\n")[:-1]
        assert len(lines) == 2000
        assert all(lines)
        assert np.mean([len(line.split()) for line in lines]) == pytest.approx(23, rel=0.05)


def test_tables_show_every_column():
    text = yardstick.table([{"a": 1234.5, "b": True}, {"a": 0.012345, "c": 7}])
    assert text.splitlines()[0] == "| a | b | c |"
    assert text.splitlines()[2:] == ["| 1,234 | yes |  |", "| 0.0123 |  | 7 |"]
