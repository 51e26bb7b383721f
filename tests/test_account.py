"""How a step went: what is counted and written down of it, and what if it changed no weights."""

import json
import math
import re
from collections.abc import Mapping
from itertools import islice

import pytest
import torch
from chaos import outcome
from safetensors.torch import load_file
from test_phases import Clock
from worlds import run_world

from dtrain import train
from dtrain.account import Account
from dtrain.checkpoint import steps_saved
from dtrain.config import Config
from dtrain.data.plan import Cursor, PlannedStep
from dtrain.data.preparation import prepared_directory
from dtrain.data.store import PreparedData
from dtrain.distributed import alone
from dtrain.errors import GiveUpError
from dtrain.learner import Learned, Learner, Outcome
from dtrain.metrics import Metrics, read_metrics
from dtrain.parts import build_plan
from dtrain.progress import Progress


class Heard(Metrics):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(None, None, None)
        self.lines: dict[int, Mapping[str, float]] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.lines[step] = values


def opened(config: Config) -> PreparedData:
    return PreparedData.open(prepared_directory(config.data, config.vocabulary))


def planned(config: Config, number: int) -> PlannedStep:
    """The plan of a step, from 1."""
    return next(islice(build_plan(config, opened(config)).steps(Cursor()), number - 1, None))


def account_of(config: Config) -> tuple[Account, Progress, Heard]:
    """The account of a training that has not begun, and what it counts and writes into."""
    data, progress, heard = opened(config), Progress(), Heard()
    learner = Learner(config, data.vocabulary, alone("cpu"))
    return Account(learner, build_plan(config, data), progress, heard), progress, heard


def learned_of(config: Config, number: int, sums: list[list[float]], norm: float) -> Learned:
    """What a rank would know of a step that went so."""
    rows = Outcome(torch.tensor(sums, dtype=torch.float64))
    return Learned(number, planned(config, number), rows, Outcome(torch.tensor(norm)))


# ------------------------------------------------------------------ seconds and numbers


@pytest.mark.parametrize(("behind", "counted"), [(False, [1.0, 2.5, 2.5]), (True, [0.0, 3.5, 5.0])])
def test_no_second_is_counted_twice_nor_one_between_steps(toy, monkeypatch, behind, counted):
    """Waited for since 0 and 2, run at 1 and 3.5; what a GPU does lasts until it is heard of."""
    config, clock = toy(precision="fp32"), Clock(monkeypatch)
    account, progress, _ = account_of(config)
    monkeypatch.setattr(Learner, "runs_behind", behind)
    found = []
    for number, since, clock.now in ((1, 0.0, 1.0), (2, 2.0, 3.5)):
        account.note(learned_of(config, number, [[0.0, 0.0]] * 4, 1.0), since, False)
        found.append(progress.train_seconds)
    clock.now = 5.0
    account.settle()
    account.settle()  # of which there is nothing left to settle
    assert [*found, progress.train_seconds] == counted


@pytest.mark.parametrize("behind", [False, True])
def test_a_line_has_means_over_the_steps_tokens(toy, monkeypatch, behind):
    """Sums that rounding would spoil, a skipped update, and four seconds from data to optimizer."""
    config, clock = toy(precision="fp32"), Clock(monkeypatch)
    account, _, heard = account_of(config)
    monkeypatch.setattr(Learner, "runs_behind", behind)
    account.phases.wait_for_data()
    for point in ("before_backward", "after_backward", "before_optimizer", "after_optimizer"):
        clock.now += 1.0
        account.phases.at(point)
    sums = [[2.0**60, 10.0], [96.0, 20.0], [-(2.0**60), 30.0], [32.0, 4.0]]
    learned = learned_of(config, 3, sums, math.inf)
    account.note(learned, 0.0, True)
    assert bool(heard.lines) != behind  # nothing waits for a device to write a line
    account.settle()
    line, store = heard.lines[3], opened(config).train
    sides = [store.gather(ids) for ids in learned.plan.micro_batches]
    sources, targets = (sum(len(side[i][0]) for side in sides) for i in (0, 1))
    slots = 4 * (build_plan(config, opened(config)).source_slots + 128)
    assert line["train/loss"] == 128 / targets
    assert line["train/nll"] == 64 / targets
    assert line["train/perplexity"] == pytest.approx(math.exp(64 / targets))
    assert line["train/tokens_per_second"] == targets / 4
    assert line["train/step_seconds"] == 4
    assert line["train/pack_fill"] == (sources + targets) / slots
    assert line["train/skipped_updates"] == 1
    assert line["train/learning_rate"] == pytest.approx(32**-0.5 * 3 * 20**-1.5)


def test_a_line_that_comes_a_step_later_is_of_its_own_step(toy, monkeypatch):
    config = toy(precision="fp32")
    account, progress, heard = account_of(config)
    monkeypatch.setattr(Learner, "runs_behind", True)
    for number in (1, 2):
        learned = learned_of(config, number, [[1.0, 1.0]] * 4, number / 2)
        for point in ("before_backward", "after_backward", "before_optimizer", "after_optimizer"):
            account.phases.at(point)
        progress.advance(learned.plan)
        account.note(learned, 0.0, number == 1)
    (line,) = heard.lines.values()
    tokens = planned(config, 1).num_target_tokens
    assert heard.lines.keys() == {1}
    assert (line["tokens"], line["train/grad_norm"]) == (tokens, 0.5)
    assert line["train/loss"] == 4 / tokens


@pytest.mark.slow
def test_a_device_that_runs_behind_is_told_of_in_the_same_words(toy):
    """Each step is settled when the next is on its way, but nothing is lost or put elsewhere."""
    changes = {"metrics__every_steps": 3, "checkpoint__every_steps": 4, "run__max_steps": 6}
    at_once, behind = (toy(name, **changes) for name in ("at_once", "behind"))
    for config, task in ((at_once, run_with_nan), (behind, run_behind_with_nan)):
        run_world(1, task, config, 4, 5)
    assert outcome(at_once) == outcome(behind)
    for path in ("skipped.jsonl", "checkpoints/step-0000000004/state.json"):
        texts = [
            (config.run_dir / path).read_text(encoding="utf-8") for config in (at_once, behind)
        ]
        found = [re.sub(r'"train_seconds": [^,}]*', "", text) for text in texts]
        assert found[0] == found[1]


# ------------------------------------------------------------------ skipped updates


def run_with_nan(config: Config, first: int, last: int) -> int:
    """Train; in these steps the last rank's last micro-batch has a loss of nan."""
    learn = Learner.learn

    def spoilt(self, number, step, at):
        if self.world.rank < self.world.size - 1 or not first <= number <= last:
            return learn(self, number, step, at)
        hook = self.reduction.objective.register_forward_hook(
            lambda _module, _input, sums: (sums[0] * math.nan, sums[1])
        )
        try:
            return learn(self, number, step, at)
        finally:
            hook.remove()

    Learner.learn = spoilt
    return train.run(config)


def run_behind_with_nan(config: Config, first: int, last: int) -> int:
    Learner.runs_behind = True
    return run_with_nan(config, first, last)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_an_update_that_is_not_finite_is_skipped_on_all_ranks(toy, size):
    config = toy("run", checkpoint__every_steps=1, checkpoint__keep_last=9, run__max_steps=4)
    run_world(size, run_with_nan, config, 3, 3)
    saved = steps_saved(config.run_dir / "checkpoints")
    for file in ("model.safetensors", "optimizer.safetensors"):
        fourth, third, second, _ = (load_file(path / file) for path in saved)
        assert all(torch.equal(third[name], second[name]) for name in third)
        assert any(not torch.equal(fourth[name], third[name]) for name in third)
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["train/skipped_updates"] for line in lines] == [0, 0, 1, 1]
    assert [line["train/learning_rate"] for line in lines] == sorted(
        {line["train/learning_rate"] for line in lines}
    )


def test_the_sentences_of_a_skipped_update_are_named(toy):
    config = toy("run", run__max_steps=4)
    run_world(2, run_with_nan, config, 3, 3)
    (line,) = (config.run_dir / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(line)
    step = planned(config, 3)
    assert found["step"] == 3
    assert [(m["index"], m["loss"]) for m in found["micro_batches"]] == [(2, "NaN"), (3, "NaN")]
    for micro_batch in found["micro_batches"]:
        assert micro_batch["sentences"] == step.micro_batches[micro_batch["index"]].tolist()


def give_up(config: Config) -> str:
    with pytest.raises(GiveUpError) as caught:
        run_with_nan(config, 2, 99)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_ten_updates_in_a_row_that_are_not_finite_end_the_run(toy, size):
    config = toy("run", run__max_steps=40)
    for message in run_world(size, give_up, config):
        assert "for 10 steps in a row, up to step 11" in message
    status = json.loads((config.run_dir / "status.json").read_text(encoding="utf-8"))
    assert (status["status"], status["exit_code"]) == ("failed", 1)


@pytest.mark.slow
def test_fp16_may_look_for_its_scale_before_it_gives_up(toy):
    """Halved from 2^16 to 1 it takes sixteen steps; only then ten are too many."""
    config = toy("run", run__max_steps=60, precision="fp16")
    (message,) = run_world(1, give_up, config)
    assert "for 16 steps in a row" in message
