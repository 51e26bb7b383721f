import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dtrain.errors import UserError
from dtrain.metrics import Metrics, MetricsSettings, Record, WandbSettings, read_metrics

OFF = WandbSettings(mode="disabled")
ROWS = [{"source": "A dog.", "reference": "Ein Hund.", "translation": "Ein „Hund“."}]


def open_metrics(run, resume_step=0, wandb=OFF):
    return Metrics.open(run, wandb, config={}, max_steps=100, resume_step=resume_step)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_logged_step_is_one_line_and_is_there_at_once(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.log(10, {"train/loss": 5.25, "epoch": 0})
        text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
        assert text == '{"step": 10, "train/loss": 5.25, "epoch": 0}\n'


def test_values_of_the_same_step_join_its_line(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.log(10, {"train/loss": 5.123456789})
        metrics.log(10, {"validation/bleu": 20.5})
        metrics.log(10, {"train/loss": 5.0})
        metrics.log(20, {"train/loss": 4.0})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 10, "train/loss": 5.0, "validation/bleu": 20.5},
        {"step": 20, "train/loss": 4.0},
    ]


def test_values_join_the_line_of_a_step_logged_before_a_restart(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.log(10, {"train/loss": 5.0})
        metrics.log(20, {"train/loss": 4.0})
    with open_metrics(tmp_path, resume_step=20) as metrics:
        metrics.log(20, {"validation/bleu": 7.0})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 10, "train/loss": 5.0},
        {"step": 20, "train/loss": 4.0, "validation/bleu": 7.0},
    ]


def test_steps_do_not_go_back(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.log(20, {"train/loss": 1.0})
        with pytest.raises(ValueError, match="step 10 is logged after step 20"):
            metrics.log(10, {"train/loss": 1.0})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(), min_size=1))
def test_floats_come_back_with_the_same_bits(values):
    with tempfile.TemporaryDirectory() as folder:
        record = Record(Path(folder), resume_step=0)
        for step, value in enumerate(values, start=1):
            record.add(step, {"x": value})
        record.close()
        read = read_metrics(Path(folder) / "metrics.jsonl")
    assert [repr(line["x"]) for line in read] == [repr(value) for value in values]


def test_what_json_has_no_number_for_is_written_as_text(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    ]
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read["a"])
    assert (read["b"], read["c"]) == (math.inf, -math.inf)


def test_resuming_moves_later_steps_aside(tmp_path):
    with open_metrics(tmp_path) as metrics:
        for step in (10, 20, 30, 40):
            metrics.log(step, {"train/loss": 1 / step})
            metrics.samples(step, ROWS)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with open_metrics(tmp_path, resume_step=25) as metrics:
        assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20]
        assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [10, 20]
        for step in (30, 40):
            metrics.log(step, {"train/loss": 1 / step})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    for name in ("metrics.discarded.jsonl", "samples.discarded.jsonl"):
        assert [line["step"] for line in lines(tmp_path / name)] == [30, 40]


def test_resuming_where_nothing_was_repeated_leaves_the_file_alone(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.log(10, {"train/loss": 1.0})
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    open_metrics(tmp_path, resume_step=10).close("completed")
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode
    assert not (tmp_path / "metrics.discarded.jsonl").exists()


@pytest.mark.parametrize(
    "half", ['{"step": 20, "train/lo', '{"step": 20}', "17", '{"step": 20}}\n']
)
def test_a_half_written_last_line_is_mended(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "x": 1}\n' + half, encoding="utf-8")
    with open_metrics(tmp_path, resume_step=20) as metrics:
        metrics.log(30, {"x": 3})
    assert lines(path) == [{"step": 10, "x": 1}, {"step": 30, "x": 3}]
    discarded = (tmp_path / "metrics.discarded.jsonl").read_text(encoding="utf-8")
    assert discarded == half.rstrip("\n") + "\n"


def test_samples_are_one_line_each(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.samples(10, ROWS + ROWS)
    assert lines(tmp_path / "samples.jsonl") == [{"step": 10, **ROWS[0]}] * 2
    assert "„Hund“" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")


def test_samples_of_a_validation_that_is_made_again_stand_once(tmp_path):
    """Killed between the samples and the checkpoint's score, a run validates that step again."""
    for step in (10, 20, 20, 30):
        with open_metrics(tmp_path, resume_step=step) as metrics:
            metrics.samples(step, ROWS)
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [10, 20, 30]


def test_skipped_updates_name_their_sentences_each_step_once(tmp_path, capsys):
    for resume_step in (0, 3):
        with open_metrics(tmp_path, resume_step) as metrics:
            for step in (3, 5)[resume_step > 0 :]:
                ids = np.array([7, 8])
                metrics.skipped(step, math.inf, [2.5, math.nan], {1: ids})
    found = lines(tmp_path / "skipped.jsonl")
    expected = {"index": 1, "loss": "NaN", "sentences": [7, 8]}
    assert [line["step"] for line in found] == [3, 5]
    assert all(line["micro_batches"] == [expected] for line in found)
    assert found[0]["grad_norm"] == "Infinity"
    assert "step 3: the gradient is not finite (inf), update skipped" in capsys.readouterr().out


def test_a_full_disk_is_reported_and_mended_over(tmp_path, monkeypatch, capsys):
    really_write = os.pwrite

    def half_write(file, data, offset):
        if len(data) > 5:
            return really_write(file, data[:5], offset)
        raise OSError(28, "No space left on device")

    with open_metrics(tmp_path) as metrics:
        metrics.log(10, {"train/loss": 1.0})
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", half_write)
            metrics.log(20, {"train/loss": 2.0})
        metrics.log(30, {"train/loss": 3.0})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [10, 30]
    assert "No space left on device" in capsys.readouterr().out


def test_a_silent_one_does_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with Metrics.silent() as metrics:
        metrics.log(1, {"train/loss": 1.0})
        metrics.progress(1, {})
        metrics.samples(1, ROWS)
        metrics.message("hello")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_closing_twice_is_fine_and_an_error_passes_through(tmp_path):
    metrics = open_metrics(tmp_path)
    with pytest.raises(RuntimeError, match="broken"), metrics:
        raise RuntimeError("broken")
    metrics.close("completed")
    metrics.log(1, {"train/loss": 1.0})


def test_messages_and_samples_are_printed_readably(tmp_path, capsys):
    with open_metrics(tmp_path) as metrics:
        metrics.message("saved step 10")
        metrics.samples(10, ROWS)
    assert capsys.readouterr().out == (
        "saved step 10\n"
        "step 10/100  translations\n"
        "  source       A dog.\n"
        "  reference    Ein Hund.\n"
        "  translation  Ein „Hund“.\n"
        "\n"
    )


def test_a_damaged_identity_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.json is not JSON"):
        open_metrics(tmp_path, wandb=WandbSettings(mode="offline"))


def test_settings_refuse_what_they_do_not_know():
    assert MetricsSettings().every_steps == 10
    assert WandbSettings().model_dump(mode="json") == {
        "mode": "auto",
        "project": "dtrain",
        "entity": None,
        "name": None,
        "group": None,
        "tags": [],
        "notes": None,
    }
    with pytest.raises(ValidationError, match="projet"):
        WandbSettings.model_validate({"projet": "x"})
    with pytest.raises(ValidationError, match="every_steps"):
        MetricsSettings(every_steps=-1)


def test_importing_it_imports_nothing_slow():
    code = (
        "import sys, dtrain.metrics; print(*{'torch', 'wandb', 'rich', 'numpy'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "\n"
