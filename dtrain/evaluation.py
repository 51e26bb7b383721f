"""How good a model is: loss on held-out tokens, and translations judged by sacreBLEU.

Validation during training and `dtrain evaluate` are this one path, shared out over all ranks.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dtrain.batch import Batch
from dtrain.config import ValidationSettings
from dtrain.data.loader import Store
from dtrain.data.packing import pack
from dtrain.data.plan import BatchPlan
from dtrain.data.store import PreparedData
from dtrain.data.vocabulary import Vocabulary
from dtrain.distributed import World
from dtrain.loss import Objective
from dtrain.model.transformer import Transformer
from dtrain.search import Hypothesis, search

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Score


LINES_AT_ONCE = 128  # between them a rank shows that it is alive, and can be stopped


@dataclass(frozen=True)
class Judgement:
    """BLEU and chrF of some translations, from 0 to 100, with sacreBLEU's signatures."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str


class CutShortError(Exception):
    """A rank did not want to go on; raised on all of them."""


def negative_log_likelihood(
    model: Transformer,
    store: Store,
    plan: BatchPlan,
    world: World,
    go_on: Callable[[], bool] = lambda: True,
) -> float:
    """Give the mean loss of a store's target tokens, in nats, without smoothing and dropout.

    It is nan if the store is empty, as when every sentence was too long.

    Args:
        model: as trained, on every rank.
        store: held-out tokens.
        plan: whose micro-batch sizes are used.
        world: ranks that share the work; all get the result.
        go_on: asked before each batch.

    Raises:
        CutShortError: if `go_on` said no on any rank.
    """
    everything = np.arange(len(store))
    micro_batches = pack(
        store.source_lengths(everything),
        store.target_lengths(everything),
        plan.source_slots,
        plan.target_slots,
    )
    objective = Objective(model, label_smoothing=0.0)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    with _evaluating(model), _together(world, go_on) as may_go_on:
        for ids in itertools.takewhile(may_go_on, micro_batches[world.rank :: world.size]):
            # In rectangles, however training attends: what is judged is computed in fp32.
            batch = Batch.packed(*store.gather(ids), plan.source_slots, plan.target_slots)
            batch = batch.to(world.device)
            sums[0] += objective(batch)[1]
            sums[1] += batch.num_tokens
    nll, num_tokens = world.sum(sums).tolist()
    return float(nll / num_tokens) if num_tokens else math.nan


def translate_lines(
    model: Transformer,
    vocabulary: Vocabulary,
    lines: Sequence[str],
    world: World,
    beam_size: int,
    length_penalty: float,
    go_on: Callable[[], bool] = lambda: True,
) -> list[str]:
    """Translate lines, in their order; the ranks share them, and all get all translations.

    Args:
        model: on every rank.
        vocabulary: of the model.
        lines: text to translate.
        world: ranks that share the work.
        beam_size: see `search`.
        length_penalty: see `search`.
        go_on: asked every LINES_AT_ONCE lines.

    Raises:
        CutShortError: if `go_on` said no on any rank.
    """
    by_length = sorted(range(len(lines)), key=lambda i: (len(lines[i]), i))
    mine = by_length[world.rank :: world.size]
    sources = vocabulary.encode_source([lines[i] for i in mine])
    found = list[Hypothesis]()
    with _evaluating(model), _together(world, go_on) as may_go_on:
        for first in itertools.takewhile(may_go_on, range(0, len(mine), LINES_AT_ONCE)):
            some = sources[first : first + LINES_AT_ONCE]
            found += search(model, some, beam_size, length_penalty)
    texts = vocabulary.decode_target([hypothesis.ids for hypothesis in found])
    everything = dict[int, str]()
    for share in world.gather(list(zip(mine, texts, strict=True))):
        everything.update(share)
    return [everything[i] for i in range(len(lines))]


@dataclass(frozen=True)
class Validation:
    """How good a model was in the middle of its training.

    Attributes:
        values: by the names that metrics have.
        samples: source, reference and translation of each sentence.
        score: by `validation.metric`; higher is better.
    """

    values: dict[str, float]
    samples: list[dict[str, str]]
    score: float


def validate(
    model: Transformer,
    data: PreparedData,
    plan: BatchPlan,
    world: World,
    settings: ValidationSettings,
    go_on: Callable[[], bool],
) -> Validation:
    """Judge a model on the validation set; on all ranks, which share the work.

    Raises:
        CutShortError: if `go_on` said no on any rank.
    """
    assert data.validation is not None, "the settings were checked for it"
    sources, references = data.text("validation")
    nll = negative_log_likelihood(model, data.validation, plan, world, go_on)
    search = settings.beam_size, settings.length_penalty
    translations = translate_lines(model, data.vocabulary, sources, world, *search, go_on)
    judgement = judge(translations, references)
    values = {
        "validation/nll": nll,
        "validation/perplexity": math.exp(min(nll, 100.0)),
        "validation/bleu": judgement.bleu,
        "validation/chrf": judgement.chrf,
    }
    score = {"bleu": judgement.bleu, "chrf": judgement.chrf, "nll": -nll}[settings.metric]
    names = "source", "reference", "translation"
    rows = zip(sources, references, translations, strict=True)
    return Validation(values, [dict(zip(names, row, strict=True)) for row in rows], score)


def judge(translations: Sequence[str], references: Sequence[str]) -> Judgement:
    """Compare translations with one reference each, as sacreBLEU does by default."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf = BLEU(), CHRF()
    bleu_score: Score = bleu.corpus_score(translations, [references])
    chrf_score: Score = chrf.corpus_score(translations, [references])
    return Judgement(
        bleu_score.score, str(bleu.get_signature()), chrf_score.score, str(chrf.get_signature())
    )


@contextmanager
def _together(world: World, go_on: Callable[[], bool]) -> Iterator[Callable[[object], bool]]:
    """Let ranks work apart for as long as they like, and leave together, or all by CutShortError.

    What the context gives says before each piece of work whether to do it.
    """
    cut_short = False

    def may_go_on(_: object) -> bool:
        nonlocal cut_short
        cut_short = cut_short or not go_on()
        return not cut_short

    yield may_go_on
    world.meet()
    if any(world.gather(cut_short)):
        raise CutShortError


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """Turn dropout and gradients off for a while."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
