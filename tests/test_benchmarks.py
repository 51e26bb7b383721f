"""The benchmarks run: not their figures are judged here, but their arithmetic and their ways."""

import json
import sys
from contextlib import closing
from functools import partialmethod, reduce
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch_twins import random_ids

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu, train_speed, yardstick  # noqa: E402
from dtrain.batch import PAD_ID  # noqa: E402
from dtrain.loss import Objective  # noqa: E402
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


@pytest.fixture(autouse=True)
def _no_group_left():
    """Contestants are left in the middle, where their process ends; here it goes on."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------ train_speed.py


@pytest.fixture(scope="module")
def speed_config(tmp_path_factory: pytest.TempPathFactory):
    """The benchmark's settings, with everything small."""
    folder = tmp_path_factory.mktemp("speed")
    yardstick.write_corpus(folder, 300, 6, 200)
    config = train_speed.benchmark_config(folder, folder, threads=1)
    config = config.model_copy(
        update={
            "vocabulary": config.vocabulary.model_copy(update={"size": 120}),
            "model": config.model.model_copy(update={"hidden_dim": 32, "feed_forward_dim": 64}),
            "batch": config.batch.model_copy(
                update={"tokens_per_step": 256, "tokens_per_micro_batch": 256}
            ),
        }
    )
    train_speed.prepare(config.data, config.vocabulary, Path(config.data.dir), lambda _: None)
    return config


@pytest.mark.parametrize("feed", [train_speed.bucketed, train_speed.randomly])
def test_peers_see_every_sentence_once_an_epoch(speed_config, feed):
    store = train_speed.PreparedData.open(Path(speed_config.data.dir)).train
    batches, seen = feed(store, 256, np.random.default_rng(1)), []
    while len(seen) < len(store):
        ids = next(batches)
        seen += ids.tolist()
        assert store.target_lengths(ids).sum() < 256 + 40
    assert sorted(seen) == list(range(len(store)))


def test_the_peer_reads_no_padding_and_no_future(speed_config):
    model = train_speed.PlainTransformer(speed_config.model, 120).eval()
    source, target = (torch.tensor(random_ids([7], 120, seed)) for seed in (1, 2))
    logits = model(source, target)
    longer = model(nn.functional.pad(source, (0, 3), value=PAD_ID), target.roll(-1, 1).roll(1, 1))
    torch.testing.assert_close(longer, logits)
    changed = target.clone()
    changed[0, 4] = 5
    torch.testing.assert_close(model(source, changed)[:, :4], logits[:, :4])


@pytest.mark.parametrize("name", train_speed.CONTESTANTS)
def test_every_contestant_trains(speed_config, name):
    with closing(train_speed.CONTESTANTS[name][1](speed_config)) as endless:
        steps = list(islice(endless, 3))
    for step in steps:
        assert 0 < step.target_tokens <= step.target_cells
        assert 0 < step.source_tokens <= step.source_cells
        assert step.target_tokens < 256 + 40
        assert 3 < step.loss < 12


@pytest.mark.slow
def test_contestants_take_turns_and_are_reported(speed_config, tmp_path, capsys):
    names = ["dtrain", "bucketed"]
    contest = train_speed.compete(names, speed_config, [(8, 8, 8)], rounds=2, steps=2)
    assert [len(contest.turns[name]) for name in names] == [2, 2]
    yardstick.write_results(
        tmp_path, "speed", *train_speed.report(contest, speed_config, {"cores": 1})
    )
    results = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert [row["dtrain against"] for row in results["ratios"]] == [
        train_speed.CONTESTANTS["bucketed"][0]
    ]
    assert "8x8x8" in (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert "per CPU second" in capsys.readouterr().out


# ------------------------------------------------------------------ gpu.py


@pytest.fixture(scope="module")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> gpu.Task:
    """A CPU in place of the GPU, with text to train on."""
    task = gpu.Task("cpu", True, tmp_path_factory.mktemp("gpu"))
    assert [row["pairs"] for row in gpu.make_data(task)] == [400]
    return task


def compiles(test):
    """Mark a test that compiles."""
    warning = "ignore:.*should not be instantiated:DeprecationWarning"  # torch's own, of its tracer
    marks = (
        pytest.mark.slow,
        pytest.mark.usefixtures("_traced"),
        pytest.mark.filterwarnings(warning),
    )
    return reduce(lambda function, mark: mark(function), marks, test)


@pytest.fixture
def _traced(monkeypatch: pytest.MonkeyPatch):
    """Compile as the script does where it is tiny."""
    monkeypatch.setattr(Objective, "compile", partialmethod(nn.Module.compile, backend="eager"))


def test_matrix_products_are_measured(tiny_task):
    assert all(row["TFLOP/s"] > 0 for row in gpu.matrix_products(tiny_task))


def test_a_wrong_gradient_is_found():
    right = gpu.Gradients(2.0, {"a": torch.ones(3), "b": torch.ones(2)})
    for found, fits in (
        (gpu.Gradients(2.0, {"a": torch.ones(3), "b": torch.full((2,), 1.01)}), True),
        (gpu.Gradients(2.0, {"a": torch.ones(3), "b": torch.zeros(2)}), False),
        (gpu.Gradients(2.1, right.of), False),
        (gpu.Gradients(float("nan"), right.of), False),
    ):
        assert gpu.compare("x", found, right, gpu.BF16_LIMITS)["within"] is fits


def test_a_world_of_one_is_checked(tiny_task):
    assert all(row["right"] for row in gpu.world_of_one(tiny_task))


@compiles
def test_correctness_is_checked(tiny_task):
    assert [row["within"] for row in gpu.correctness(tiny_task)] == [True, True, True]


@compiles
@pytest.mark.exhaustive
def test_resume_is_checked(tiny_task):
    for row in gpu.resume(tiny_task):
        assert row["same weights"]
        assert row["same moments"]


@compiles
def test_speed_is_measured_eager_and_compiled(tiny_task):
    eager, compiled, *_ = list(gpu.speed(tiny_task, "base"))
    assert eager["graphs"] == 0
    assert compiled["graphs"] > 0
    assert compiled["recompiled later"] == 0
    assert "unknown" in str(compiled["MFU"])


@pytest.mark.slow
def test_failing_sections_do_not_stop_the_others(tmp_path, capsys):
    """Without the section that makes up the data, those that need it fail."""
    task = gpu.Task("cpu", True, tmp_path / "nothing")
    assert not gpu.measure(["world", "products"], task, tmp_path / "out", 120)
    sections = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))["sections"]
    assert sections["world"]["status"] == "failed"
    assert "train.en" in sections["world"]["error"]
    assert sections["products"]["status"] == "ok"
    assert "Traceback" in (tmp_path / "out" / "gpu.log").read_text(encoding="utf-8")
    assert "NCCL, a world of one: failed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_section_ends_with_its_time(tmp_path):
    result = gpu.run_section("products", gpu.Task("cpu", True, tmp_path), tmp_path / "log", 0.1)
    assert result.status == "failed"
    assert "not done after" in str(result.error)


@pytest.mark.gpu
def test_all_of_it_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    task = gpu.Task("cuda", True, tmp_path)
    assert gpu.measure(list(gpu.SECTIONS), task, tmp_path / "out", 480)
