"""Trains torch.nn.Transformer with a plain loop, as a contestant of benchmarks/train_speed.py.

    python benchmarks/plain_transformer.py FOLDER bucketed|lean|random|planned

It imports nothing of dtrain.
"""

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.batches import bucketed, padded, randomly
from benchmarks.peers.turns import BOS, PAD, Assignment, Ids, Rows, Step, Turns

LONGEST = 512


class PlainTransformer(nn.Module):
    """The same model as dtrain's from torch's own parts, for padded batches."""

    positions: Tensor

    def __init__(self, task: Assignment) -> None:
        super().__init__()
        self.scale = task.hidden_dim**0.5
        self.embedding = nn.Embedding(task.vocabulary_size, task.hidden_dim, PAD)
        nn.init.normal_(self.embedding.weight, std=1 / self.scale)
        self.register_buffer("positions", sinusoids(LONGEST, task.hidden_dim))
        self.dropout = nn.Dropout(task.dropout)
        self.transformer = nn.Transformer(
            task.hidden_dim,
            task.num_heads,
            task.num_layers,
            task.num_layers,
            task.feed_forward_dim,
            task.dropout,
            batch_first=True,
        )

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        """[N, S] and [N, T] -> logits [N, T, vocabulary]."""
        padding = source == PAD
        hidden = self.transformer(
            self.embed(source),
            self.embed(target_in),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(target_in.shape[1]),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return F.linear(hidden, self.embedding.weight)

    def embed(self, ids: Tensor) -> Tensor:
        """[N, L] -> [N, L, hidden]."""
        return self.dropout(self.embedding(ids) * self.scale + self.positions[: ids.shape[1]])

    def drop_less(self) -> None:
        """Drop only what dtrain drops: neither attention weights nor the feed-forward's inside."""
        for layer in [*self.transformer.encoder.layers, *self.transformer.decoder.layers]:
            layer.dropout.p = layer.self_attn.dropout = 0.0
        for layer in self.transformer.decoder.layers:
            layer.multihead_attn.dropout = 0.0


def sinusoids(length: int, width: int) -> Tensor:
    """Give the paper's positions (3.5), [length, width]."""
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def steps(
    task: Assignment, source: Rows, target: Rows, batches: Iterator[Ids], drops_less: bool
) -> Iterator[Step]:
    """Train on batches of sentences."""
    torch.manual_seed(task.seed)
    model = PlainTransformer(task)
    if drops_less:
        model.drop_less()
    betas = task.beta1, task.beta2
    optimizer = torch.optim.Adam(model.parameters(), 0.0, betas, task.epsilon)
    for number, ids in enumerate(batches, 1):
        tokens, labels = (
            torch.from_numpy(padded([side[i] for i in ids])) for side in (source, target)
        )
        inputs = labels.roll(1, 1)
        inputs[:, 0] = BOS
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate_at(number)
        loss = F.cross_entropy(
            model(tokens, inputs).flatten(0, 1),
            labels.flatten(),
            ignore_index=PAD,
            label_smoothing=task.label_smoothing,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        num_source, num_target = (int((side != PAD).sum()) for side in (tokens, labels))
        yield Step(num_source, num_target, tokens.numel(), labels.numel(), loss.item())


def contestant(name: str, folder: Path) -> Iterator[Step]:
    """Give a contestant's steps.

    Args:
        name: `bucketed` by length; `lean`, which is that with less dropout; `random` sentences; or
            `planned`, the sentences of dtrain's own steps.
        folder: what train_speed.py wrote.
    """
    task = Assignment.read(folder)
    torch.set_num_threads(task.threads)
    source, target = Rows.read(folder, "source"), Rows.read(folder, "target")
    batches: Iterator[Ids]
    if name == "planned":
        plan = Rows.read(folder, "planned")
        batches = (plan[step] for _ in count() for step in range(len(plan)))
    else:
        feed = randomly if name == "random" else bucketed
        batches = feed(source, target, task.tokens_per_step, np.random.default_rng(task.seed))
    return steps(task, source, target, batches, drops_less=name == "lean")


if __name__ == "__main__":
    Turns().take(contestant(sys.argv[2], Path(sys.argv[1])))
