"""Search for the likeliest translation: beam search, of which greedy search is the beam of one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.batch import BOS_ID, EOS_ID, PAD_ID, pad_rows
from dtrain.model.transformer import Transformer

PIECE = 2**18  # values that are turned into log-probabilities at once
SLICE = 16  # places of a row whose greatest value is found first


@dataclass(frozen=True)
class Hypothesis:
    """A translation.

    Attributes:
        ids: its tokens, without BOS_ID and EOS_ID.
        score: log-probability in nats, EOS_ID included, divided by the length penalty.
    """

    ids: list[int]
    score: float


@torch.no_grad()
def search(
    model: Transformer,
    sources: Sequence[Sequence[int]],
    beam_size: int = 4,
    length_penalty: float = 0.6,
    max_tokens_per_batch: int = 16384,
) -> list[Hypothesis]:
    """Translate sentences, whichever order and company they come in.

    Args:
        model: in eval mode.
        sources: ids of each sentence, EOS_ID included; one without any other token stays empty.
        beam_size: rival translations of a sentence; 1 is greedy search.
        length_penalty: how much longer translations are favoured, from 0 (not at all): the alpha
            of ((5 + length) / 6)^alpha (Wu et al. 2016, https://arxiv.org/abs/1609.08144, 7), by
            which log-probabilities are divided; the length counts EOS_ID too.
        max_tokens_per_batch: source tokens at once, padding included, times `beam_size`.

    Returns:
        The best hypothesis for each source, in the order of `sources`.
    """
    hypotheses = [Hypothesis([], 0.0)] * len(sources)
    for indices in _batches(sources, max_tokens_per_batch // beam_size):
        texts = [sources[i] for i in indices]
        found = _BeamSearch(model, texts, beam_size, length_penalty).run()
        for i, hypothesis in zip(indices, found, strict=True):
            hypotheses[i] = hypothesis
    return hypotheses


def _batches(sources: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Group the indices of sources that say anything by length, so that little is padded."""
    batch: list[int] = []
    spoken = (i for i, source in enumerate(sources) if any(token != EOS_ID for token in source))
    for i in sorted(spoken, key=lambda i: len(sources[i])):
        if batch and (len(batch) + 1) * len(sources[i]) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class _BeamSearch:
    """Beam search over one batch; a sentence leaves it as soon as its best translation is sure.

    N counts the sentences still searched, `rivals` the unfinished translations of each.

    Attributes:
        best: the best finished hypothesis of each sentence of the batch.
        best_score: its score, [N].
        sentence: which sentence of the batch each one is, int64 [N].
        limit: tokens that each translation may have, EOS_ID aside, int64 [N].
        tokens: the rivals so far, BOS_ID first, int64 [N, rivals, 1 + length].
        log_p: their log-probabilities in nats, -inf for a rival that is out, [N, rivals].
    """

    def __init__(
        self, model: Transformer, sources: Sequence[Sequence[int]], beam_size: int, alpha: float
    ) -> None:
        device = model.decoder.output_weight.device
        source, layout = pad_rows(sources)
        source, layout = source.to(device), layout.map(lambda tensor: tensor.to(device))
        self.model = model
        self.beam_size = beam_size
        self.alpha = alpha
        self.state = model.decoder.start(model.encode(source, layout), layout)
        self.best = [Hypothesis([], -torch.inf)] * len(sources)
        self.best_score = torch.full((len(sources),), -torch.inf, device=device)
        self.sentence = torch.arange(len(sources), device=device)
        self.limit = model.decode_limits(layout)
        self.tokens = torch.full((len(sources), 1, 1), BOS_ID, device=device)
        self.log_p = torch.zeros(len(sources), 1, device=device)

    def run(self) -> list[Hypothesis]:
        """Search until every sentence's best hypothesis is sure."""
        while len(self.sentence):
            parent, token, log_p = self._extend()
            ended = token == EOS_ID
            self._finish(parent, log_p.masked_fill(~ended, -torch.inf))
            self._go_on(parent, token, log_p.masked_fill(ended, -torch.inf))
        return self.best

    def _extend(self) -> tuple[Tensor, Tensor, Tensor]:
        """Find the `beam_size` best ways to add a token to any rival of a sentence.

        Returns:
            Which rival, which token, and the log-probability of both: [N, new rivals] each, best
            first; of equals the one of the better rival.
        """
        logits = self.model.logits(self.model.decoder.step(self.tokens[:, :, -1], self.state))
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32))
        _normalize(log_p)
        log_p[..., [PAD_ID, BOS_ID]] = -torch.inf
        at_limit = self.limit == self.tokens.shape[2] - 1
        if at_limit.any():
            is_end = torch.arange(log_p.shape[-1], device=log_p.device) == EOS_ID
            log_p.masked_fill_(at_limit[:, None, None] & ~is_end, -torch.inf)
        values, tokens = _topk(log_p, min(self.beam_size, log_p.shape[-1]))
        values = (values + self.log_p[:, :, None]).flatten(1)
        values, order = values.sort(descending=True, stable=True)
        values, order = values[:, : self.beam_size], order[:, : self.beam_size]
        return order // tokens.shape[2], tokens.flatten(1).gather(1, order), values

    def _finish(self, parent: Tensor, log_p: Tensor) -> None:
        """Keep the best ended translation of each sentence if it beats those ended before."""
        score, place = (log_p / self._penalty(self.tokens.shape[2])).max(1)
        better = score > self.best_score
        self.best_score = torch.where(better, score, self.best_score)
        for n in better.nonzero()[:, 0].tolist():
            ids = self.tokens[n, parent[n, place[n]], 1:].tolist()
            self.best[self.sentence[n]] = Hypothesis(ids, score[n].item())

    def _go_on(self, parent: Tensor, token: Tensor, log_p: Tensor) -> None:
        """Make the new rivals the current ones, in those sentences where one may still win."""
        # Log-probabilities only fall, so a rival's score is at most this, at the greatest length.
        bound = log_p.max(1).values / self._penalty(self.limit + 1)
        keep = (bound > self.best_score).nonzero()[:, 0]
        self.state.select(keep if len(keep) < len(parent) else None, parent[keep])
        tokens = self.tokens[keep[:, None], parent[keep]]
        self.tokens = torch.cat([tokens, token[keep, :, None]], dim=2)
        self.log_p, self.limit = log_p[keep], self.limit[keep]
        self.sentence, self.best_score = self.sentence[keep], self.best_score[keep]

    def _penalty(self, length: Tensor | int) -> Tensor | float:
        """What to divide the log-probability of this many tokens by, EOS_ID included."""
        return ((5 + length) / 6) ** self.alpha


def _normalize(logits: Tensor) -> None:
    """Turn logits into log-probabilities, piece by piece: fresh memory is slow."""
    for piece in logits.flatten(0, -2).split(max(1, PIECE // logits.shape[-1])):
        piece.copy_(piece.log_softmax(-1))


def _topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give x.topk(k), sooner for long rows: the best are where the best of slices are.

    Every row is cut into slices of SLICE places, far apart from each other so that one pass over
    the row finds the greatest of all slices. Only the k slices with the greatest are looked at.
    """
    size = x.shape[-1]
    num_slices = size // SLICE
    if num_slices < 2 * k:
        return x.topk(k)
    cut = num_slices * SLICE
    greatest = x[..., :cut].unflatten(-1, (SLICE, num_slices)).amax(-2)
    first = greatest.topk(k).indices[..., None]
    candidates = first + num_slices * torch.arange(SLICE, device=x.device)
    rest = torch.arange(cut, size, device=x.device).expand(*x.shape[:-1], -1)
    candidates = torch.cat([candidates.flatten(-2), rest], dim=-1)
    values, places = x.gather(-1, candidates).topk(k)
    return values, candidates.gather(-1, places)
