import itertools

import pytest
import torch
from torch_twins import random_ids, shaken, tiny_settings

from dtrain.batch import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Batch, pad_rows
from dtrain.model.transformer import Transformer
from dtrain.search import SLICE, _topk, search


def tiny_model(seed, vocabulary_size=6, **changes) -> Transformer:
    torch.manual_seed(seed)
    model = shaken(Transformer(tiny_settings(**changes), vocabulary_size).double())
    with torch.no_grad():  # surer of itself and less fond of repeating than random weights are
        model.decoder.embedding.weight *= 1.5
    return model


@torch.no_grad()
def scores(model, source, translations, alpha) -> list[float]:
    """The definition: log-probability of the tokens and EOS_ID over ((5 + length) / 6)^alpha."""
    targets = [[*translation, EOS_ID] for translation in translations]
    batch = Batch.padded([source] * len(targets), targets)
    log_p = model(batch).log_softmax(-1).gather(2, batch.target_out[..., None])[..., 0]
    lengths = batch.target_layout.lengths.double()
    return ((log_p * batch.target_layout.mask).sum(1) / ((5 + lengths) / 6) ** alpha).tolist()


def exhaustive(model, source, alpha):
    """Try every translation that there is."""
    words = (UNK_ID, 4, 5)
    lengths = range(model.max_decode_length + 1)
    every = [list(t) for n in lengths for t in itertools.product(words, repeat=n)]
    return max(zip(scores(model, source, every, alpha), every, strict=True))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0, 6.0])
@pytest.mark.parametrize("seed", range(6))
def test_a_wide_beam_finds_what_trying_everything_finds(seed, alpha):
    model = tiny_model(seed, max_decode_length=4)
    sources = random_ids([3, 5, 2], 6, seed)
    for source, found in zip(sources, search(model, sources, 200, alpha), strict=True):
        best_score, best = exhaustive(model, source, alpha)
        assert found.ids == best
        assert found.score == pytest.approx(best_score, abs=1e-9)


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_scores_are_what_the_whole_model_gives(beam_size, norm):
    model = tiny_model(3, 30, norm=norm, max_decode_length=20)
    sources = random_ids([3, 9, 2, 5], 30)
    for source, found in zip(sources, search(model, sources, beam_size, 0.6), strict=True):
        (expected,) = scores(model, source, [found.ids], 0.6)
        assert found.score == pytest.approx(expected, abs=1e-9)
        assert len(found.ids) <= 20


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_a_beam_of_one_is_greedy(alpha):
    for seed in range(5):
        model = tiny_model(seed, 30, max_decode_length=25)
        sources = random_ids([3, 9, 2, 5], 30, seed)
        found = [hypothesis.ids for hypothesis in search(model, sources, 1, alpha)]
        assert found == model.generate(*pad_rows(sources))


def test_neither_order_nor_company_matters():
    model = tiny_model(0, 30, max_decode_length=15)
    sources = random_ids([3, 9, 2, 5, 9, 4, 7, 1, 12, 6], 30)
    together = search(model, sources, 3)
    alone = [search(model, [source], 3)[0] for source in sources]
    backwards = search(model, sources[::-1], 3, max_tokens_per_batch=60)[::-1]
    for one, other, third in zip(together, alone, backwards, strict=True):
        assert one.ids == other.ids == third.ids
        assert one.score == pytest.approx(other.score, abs=1e-9)
    assert len({len(hypothesis.ids) for hypothesis in together}) > 1


def test_a_wider_beam_is_hardly_ever_worse():
    model = tiny_model(1, 30, max_decode_length=10)
    sources = random_ids([5] * 30, 30)
    narrow, wide = (sum(h.score for h in search(model, sources, size, 0.0)) for size in (1, 8))
    assert wide > narrow


def test_special_tokens_are_never_said():
    model = tiny_model(0, 8, max_decode_length=12)
    with torch.no_grad():  # make them the likeliest
        model.decoder.embedding.weight[[PAD_ID, BOS_ID]] = (
            10 * model.decoder.embedding.weight[EOS_ID]
        )
    for hypothesis in search(model, random_ids([5] * 20, 8), 4):
        assert not {PAD_ID, BOS_ID, EOS_ID} & set(hypothesis.ids)


def test_an_empty_line_stays_empty():
    model = tiny_model(0)
    hypotheses = search(model, [[EOS_ID], [4, EOS_ID], [EOS_ID], []], 2)
    assert [hypotheses[i].ids for i in (0, 2, 3)] == [[], [], []]
    assert hypotheses[1] == search(model, [[4, EOS_ID]], 2)[0]
    assert search(model, [], 2) == []


def test_no_gradient_is_kept_and_nothing_changes():
    model = tiny_model(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (search(model, random_ids([4, 6], 6), 3) for _ in range(2))
    assert first == second
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", [6, 10 * SLICE - 1, 10 * SLICE, 10 * SLICE + 5, 1000])
@pytest.mark.parametrize("k", [1, 5])
def test_the_best_of_slices_are_the_best_of_all(size, k):
    x = torch.randn(7, 3, size, generator=torch.Generator().manual_seed(size))
    x[2] = -torch.inf  # as at the limit, where only the end of a sentence may be said
    x[2, :, 3] = -1.0
    counts = x.topk(k).values.isfinite()  # any of those that are impossible will do
    for found, wanted in zip(_topk(x, k), x.topk(k), strict=True):
        assert torch.equal(found[counts], wanted[counts])
