import math
from unittest.mock import MagicMock

import numpy as np
import pytest
import sacrebleu
import torch
from torch.nn import functional as F
from worlds import run_world

from dtrain import evaluation
from dtrain.batch import Batch
from dtrain.data.preparation import prepared_directory
from dtrain.data.store import PreparedData
from dtrain.distributed import alone, connect
from dtrain.evaluation import (
    CutShortError,
    judge,
    negative_log_likelihood,
    translate_lines,
)
from dtrain.parts import build_model, build_plan, trained_model

LINES = ["old dog", "", "red cat sees big blue bird", "   ", "new house", "old dog likes cat"]


@pytest.fixture(scope="module")
def ready(trained):
    """The trained model, its vocabulary, the held-out tokens and the plan."""
    model, config, vocabulary, _ = trained_model(trained.run_dir, "last")
    data = PreparedData.open(prepared_directory(config.data, config.vocabulary))
    return model, vocabulary, data, build_plan(config, data)


def on_ranks(size, task):
    """Run `task(world)` on real ranks; they have the model as this process has it."""

    def be_rank():
        with connect("cpu", 60) as world:
            return task(world)

    return run_world(size, be_rank)


# ------------------------------------------------------------------ loss


def loss_of_a_loop(model, data) -> float:
    """Mean over tokens, sentence by sentence, in float64 and by torch's own loss."""
    model = model.double()
    total, num_tokens = 0.0, 0
    for source, target in zip(*data.text("validation"), strict=True):
        batch = Batch.from_text([source], [target], data.vocabulary)
        logits = model(batch)
        total += F.cross_entropy(logits[0], batch.target_out[0], reduction="sum").item()
        num_tokens += batch.num_tokens
    model.float()
    return total / num_tokens


@torch.no_grad()
def test_the_loss_equals_a_loop_over_sentences(ready):
    model, _, data, plan = ready
    found = negative_log_likelihood(model, data.validation, plan, alone("cpu"))
    assert found == pytest.approx(loss_of_a_loop(model, data), abs=1e-5)


class Counted:
    """A store that counts the sentences asked of it."""

    def __init__(self, store):
        self.store, self.gathered = store, 0

    def __len__(self):
        return len(self.store)

    def __getattr__(self, name):
        return getattr(self.store, name)

    def gather(self, ids):
        self.gathered += len(ids)
        return self.store.gather(ids)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_loss_and_all_get_it(ready, size):
    model, _, data, plan = ready

    def task(world):
        store = Counted(data.train)
        return negative_log_likelihood(model, store, plan, world), store.gathered

    expected, num_sentences = task(alone("cpu"))
    found, shares = zip(*on_ranks(size, task), strict=True)
    assert found == pytest.approx([expected] * size, abs=1e-6)
    assert sum(shares) == num_sentences == 600
    assert min(shares) > 600 / size / 2


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_for_a_while(ready, toy, training):
    model, vocabulary, data, plan = ready
    with_dropout = build_model(toy(model__dropout=0.5), vocabulary)
    with_dropout.load_state_dict(model.state_dict())
    with_dropout.train(training)
    found, expected = (
        negative_log_likelihood(each, data.validation, plan, alone("cpu"))
        for each in (with_dropout, model)
    )
    assert found == expected
    assert with_dropout.training is training


def test_no_tokens_have_no_loss(ready):
    """Such as those of a validation set whose every pair was dropped."""
    model, _, _, plan = ready
    store = MagicMock(__len__=lambda _: 0)
    store.source_lengths.return_value = store.target_lengths.return_value = np.empty(0, np.int64)
    assert math.isnan(negative_log_likelihood(model, store, plan, alone("cpu")))


# ------------------------------------------------------------------ translations


def translated(ready, world, lines=LINES, beam_size=2) -> list[str]:
    model, vocabulary, *_ = ready
    return translate_lines(model, vocabulary, lines, world, beam_size, 0.6)


def test_translations_come_in_the_order_of_the_lines(ready):
    together = translated(ready, alone("cpu"))
    one_by_one = [translated(ready, alone("cpu"), [line])[0] for line in LINES]
    assert together == one_by_one
    assert together[1] == together[3] == ""
    assert len(set(together)) >= 4, "equal translations would prove nothing"


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_lines_and_all_get_all_translations(ready, size):
    expected = translated(ready, alone("cpu"))
    assert on_ranks(size, lambda world: translated(ready, world)) == [expected] * size


def test_more_ranks_than_lines(ready):
    expected = translated(ready, alone("cpu"), LINES[:1])
    assert on_ranks(2, lambda world: translated(ready, world, LINES[:1])) == [expected] * 2
    assert translated(ready, alone("cpu"), []) == []


class Once:
    """Says yes so many times, then no."""

    def __init__(self, times):
        self.times = times

    def __call__(self):
        self.times -= 1
        return self.times >= 0


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_that_does_not_go_on_ends_it_for_all(ready, monkeypatch, size):
    model, vocabulary, data, plan = ready
    expected = translated(ready, alone("cpu"))
    monkeypatch.setattr(evaluation, "LINES_AT_ONCE", 2)

    def task(world):
        def go_on():
            return Once(1) if world.rank == size - 1 else lambda: True

        with pytest.raises(CutShortError):
            translate_lines(model, vocabulary, LINES, world, 2, 0.6, go_on())
        with pytest.raises(CutShortError):
            negative_log_likelihood(model, data.train, plan, world, go_on())
        return translated(ready, world)

    assert on_ranks(size, task) == [expected] * size


# ------------------------------------------------------------------ judgement

TRANSLATIONS = ["the old dog sees a cat", "", "a big house, and so on: and so on!"]
REFERENCES = ["the old dog sees the cat", "hello", "a big house, and so on and so forth!"]


def test_scores_are_sacrebleus():
    judgement = judge(TRANSLATIONS, REFERENCES)
    bleu = sacrebleu.corpus_bleu(TRANSLATIONS, [REFERENCES])
    assert judgement.bleu == bleu.score
    assert 10 < judgement.bleu < 90
    assert judgement.chrf == sacrebleu.corpus_chrf(TRANSLATIONS, [REFERENCES]).score
    assert 10 < judgement.chrf < 90
    assert judge(REFERENCES, REFERENCES).bleu == pytest.approx(100)


def test_signatures_say_what_was_measured_how():
    judgement = judge(TRANSLATIONS, REFERENCES)
    version = f"version:{sacrebleu.__version__}"
    assert judgement.bleu_signature == (f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|{version}")
    assert judgement.chrf_signature == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|{version}"
