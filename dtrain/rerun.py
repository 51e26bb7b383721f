"""Rerun: a step run again as training runs it, but in one process and without an update.

The same sentences in the same micro-batches, the same dropout, the same weighting of the loss. So
with the weights of the step before, on the same kind of device, loss and gradient are those of the
training, to the last bit if one rank trained or `distributed.reduction` is `tree`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from dtrain.batch import Batch
from dtrain.config import Config
from dtrain.data.loader import Store, collate
from dtrain.data.plan import BatchPlan, Ids, PlannedStep
from dtrain.data.vocabulary import Vocabulary, spoken
from dtrain.distributed import World
from dtrain.loss import Objective, smoothed_cross_entropy
from dtrain.model.transformer import Transformer
from dtrain.optimizer import build_optimizer, clip_gradients
from dtrain.parts import PRECISIONS, autocast, seed_position
from dtrain.reduction import build_reduction
from dtrain.watch import Tally, Watch


@dataclass(frozen=True)
class Sentence:
    """A pair of a micro-batch.

    Attributes:
        id: its number in the training data, from 0.
        source: its text, put together again from the tokens.
        target: likewise.
        tokens: of the target.
        loss: a token, in nats.
    """

    id: int
    source: str
    target: str
    tokens: int
    loss: float


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch by itself.

    Attributes:
        index: its place in the step, from 0.
        ids: of its sentences.
        tokens: of its target side.
        loss: a token, in nats.
        nll: negative log-likelihood of a token, in nats.
        gradient: its share of the step's gradient.
        sentences: the worst first; empty unless asked for.
    """

    index: int
    ids: list[int]
    tokens: int
    loss: float
    nll: float
    gradient: Tally
    sentences: list[Sentence]


class Rerun:
    """Runs a step as training does, in one process and without an update.

    Attributes:
        watch: what was seen inside the model.
        micro_batches: what was seen of each.
        gradient_norm: of all of them together.
    """

    def __init__(
        self,
        config: Config,
        model: Transformer,
        plan: BatchPlan,
        store: Store,
        world: World,
        scaler: dict[str, Any] | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            config: of the run.
            model: with the weights to use.
            plan: says the sizes of a micro-batch.
            store: the tokens.
            world: of one rank.
            scaler: state of the gradient scaler; as at the start if there is none.
        """
        self.config, self.model, self.plan, self.store = config, model, plan, store
        self.device, self.precision = world.device, PRECISIONS[config.precision]
        fused = config.kernels.loss == "fused"
        objective = Objective(model, config.loss.label_smoothing, fused)
        self.reduction = build_reduction(world, objective, config.distributed)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.precision is torch.float16
        )
        if scaler:
            self.scaler.load_state_dict(scaler)
        self.watch = Watch(model)
        self.micro_batches: list[MicroBatch] = []
        self.gradient_norm = math.nan

    def run(
        self, step: int, planned: PlannedStep, chosen: Sequence[int], texts: Vocabulary | None
    ) -> Tensor:
        """Run some micro-batches of a step.

        Args:
            step: its number, on which dropout depends.
            planned: its sentences.
            chosen: which of its micro-batches.
            texts: to tell sentences with; None to leave them out.

        Returns:
            Sums of loss and nll over their tokens, float64 [2].
        """
        weight = self.reduction.scale / planned.num_target_tokens
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index in chosen:
            ids = planned.micro_batches[index]
            batch = collate(self.plan, self.store, ids).to(self.device)
            self.watch.begin(index)
            seed_position(self.config.run.seed, step, index)
            sums, gradient = self._backward(batch, weight, index == chosen[-1])
            total += sums
            loss, nll = (sums / batch.num_tokens).tolist()
            told = [] if texts is None else self._sentences(batch, ids, texts)
            self.micro_batches.append(
                MicroBatch(index, ids.tolist(), batch.num_tokens, loss, nll, gradient, told)
            )
        self.reduction.finish()
        self.scaler.unscale_(build_optimizer(self.model, self.config.optimizer))
        self.gradient_norm = clip_gradients(self.model, 0.0).item()
        for layer in self.watch.layers:
            layer.gradient = Tally.of(p.grad for p in layer.parameters if p.grad is not None)
        return total

    def _backward(self, batch: Batch, weight: float, is_last: bool) -> tuple[Tensor, Tally]:
        """Add a micro-batch's gradient up; gives its sums of loss and nll, and that gradient."""
        parameters = list(self.model.parameters())
        with self.reduction.micro_batch(is_last=is_last):
            earlier = [parameter.grad for parameter in parameters]
            self.model.zero_grad(set_to_none=True)
            with autocast(self.device, self.precision):
                loss, nll = self.reduction.objective(batch)
            self.watch.note("the loss", loss)
            self.scaler.scale(loss * weight).backward()
            self.watch.note_gradients()
            scale = self.scaler.get_scale()
            gradient = Tally.of(p.grad / scale for p in parameters if p.grad is not None)
            for parameter, sum_so_far in zip(parameters, earlier, strict=True):
                if sum_so_far is not None and parameter.grad is not None:
                    parameter.grad = sum_so_far.add_(parameter.grad)
        return torch.stack([loss.detach(), nll.detach()]).double(), gradient

    @torch.no_grad()
    def _sentences(self, batch: Batch, ids: Ids, texts: Vocabulary) -> list[Sentence]:
        """Tell the sentences of the batch that was run last, the worst first."""
        matrix, smoothing = self.model.decoder.output_weight, self.config.loss.label_smoothing
        (source, source_lengths), (target, lengths) = self.store.gather(ids)
        sources = _texts(texts.source, source, source_lengths)
        targets = _texts(texts.target, target, lengths)
        losses, end = [], 0
        for length in lengths.tolist():
            part, end = slice(end, end + length), end + length
            states, wanted = self.watch.states[part], batch.target_out[part]
            with autocast(self.device, self.precision):
                loss, _ = smoothed_cross_entropy(states, matrix, wanted, smoothing)
            losses.append(loss.item() / length)
        facts = zip(ids.tolist(), sources, targets, lengths.tolist(), losses, strict=True)
        told = [Sentence(*fact) for fact in facts]
        return sorted(told, key=lambda s: -s.loss if math.isfinite(s.loss) else -math.inf)


def _texts(
    model: SentencePieceProcessor, tokens: NDArray[np.integer], lengths: NDArray[np.int64]
) -> list[str]:
    """Put sentences together again from all their tokens in one row."""
    sentences = np.split(tokens, np.cumsum(lengths)[:-1])
    return [str(model.decode(spoken(sentence.tolist()))) for sentence in sentences]
