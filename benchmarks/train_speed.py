"""How fast dtrain trains on a CPU, side by side with a plain torch.nn.Transformer loop.

    python benchmarks/train_speed.py

Contestants are processes of their own, all alive at once, which take turns of a step; the
order is reversed every round. What disturbs the machine for longer than a turn so disturbs all
alike, and ratios are taken round by round. The machine's matrix products are measured in between.
All train the same model on the same tokens, in fp32, with the same number of threads.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout is enough

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.yardstick import (
    ROOT,
    Row,
    Shape,
    busy_seconds,
    describe_machine,
    matmul_rate,
    open_training,
    table,
    training_flops,
    write_corpus,
    write_results,
)
from dtrain.batch import BOS_ID, PAD_ID
from dtrain.config import Config
from dtrain.data.preparation import num_cores, prepare
from dtrain.data.store import PreparedData, TokenStore
from dtrain.metrics import Metrics
from dtrain.model.positional_encoding import sinusoids
from dtrain.model.settings import ModelSettings
from dtrain.schedule import learning_rate

Ids = NDArray[np.int64]
OURS = "dtrain"
QUIET = 0.1  # cores that may work for others in a round that counts as quiet


@dataclass(frozen=True)
class Step:
    """What a contestant did in one step: tokens, cells computed on either side, loss in nats."""

    source_tokens: int
    target_tokens: int
    source_cells: int
    target_cells: int
    loss: float


@dataclass(frozen=True)
class Turn:
    """What a contestant did in one turn, and what it took.

    Attributes:
        steps: one after the other.
        seconds: by the clock.
        cpu_seconds: work of all cores for the contestant.
        foreign_seconds: work of all cores for anybody else.
        memory_mib: the most that the contestant has held.
    """

    steps: list[Step]
    seconds: float
    cpu_seconds: float
    foreign_seconds: float
    memory_mib: float

    def total(self, name: str) -> float:
        """Add up a number of all steps."""
        return sum(getattr(step, name) for step in self.steps)

    @property
    def rate(self) -> float:
        """Target tokens a second."""
        return self.total("target_tokens") / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Target tokens a second of one core's work; other processes change it less."""
        return self.total("target_tokens") / self.cpu_seconds

    @property
    def foreign_cores(self) -> float:
        """How many cores worked for others meanwhile."""
        return self.foreign_seconds / self.seconds


# ------------------------------------------------------------------ the contestants


def trainer_steps(config: Config) -> Iterator[Step]:
    """Train with dtrain: its plan, loader, train step and metrics."""
    with open_training(config) as (training, loader):
        metrics = training.metrics = LastLoss()
        slots = training.plan.source_slots, training.plan.target_slots
        training.rehearse()
        for step in loader:
            training.train_step(step, time.perf_counter())
            tokens = step.plan.num_source_tokens, step.plan.num_target_tokens
            count = len(step.micro_batches)
            yield Step(*tokens, slots[0] * count, slots[1] * count, metrics.loss)


class LastLoss(Metrics):
    """Remembers the last step's loss, and writes and shows nothing."""

    def __init__(self) -> None:
        super().__init__(None, None, None)
        self.step, self.loss = 0, float("nan")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take what is measured of a step."""
        self.step, self.loss = step, values["train/loss"]


class PlainTransformer(nn.Module):
    """The same model from torch's own parts, for padded batches."""

    positions: Tensor

    def __init__(self, settings: ModelSettings, vocabulary_size: int) -> None:
        super().__init__()
        self.scale = settings.hidden_dim**0.5
        self.embedding = nn.Embedding(vocabulary_size, settings.hidden_dim, PAD_ID)
        nn.init.normal_(self.embedding.weight, std=1 / self.scale)
        self.register_buffer("positions", sinusoids(512, settings.hidden_dim).float())
        self.dropout = nn.Dropout(settings.dropout)
        self.transformer = nn.Transformer(
            settings.hidden_dim,
            settings.num_heads,
            settings.num_encoder_layers,
            settings.num_decoder_layers,
            settings.feed_forward_dim,
            settings.dropout,
            batch_first=True,
        )

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        """[N, S] and [N, T] -> logits [N, T, vocabulary]."""
        padding = source == PAD_ID
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


def plain_steps(config: Config, feed: "Feed", drops_less: bool = False) -> Iterator[Step]:
    """Train with a straightforward loop."""
    data = PreparedData.open(Path(config.data.dir))
    torch.manual_seed(config.run.seed)
    model = PlainTransformer(config.model, data.vocabulary.target_size)
    if drops_less:
        model.drop_less()
    settings = config.optimizer
    betas = settings.beta1, settings.beta2
    optimizer = torch.optim.Adam(model.parameters(), 0.0, betas, settings.epsilon)
    batches = feed(data.train, config.batch.tokens_per_step, np.random.default_rng(1))
    for number, ids in enumerate(batches, 1):
        source, target = padded(data.train, ids)
        target_in = target.roll(1, 1)
        target_in[:, 0] = BOS_ID
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                number, config.schedule, settings.learning_rate, config.model.hidden_dim, 0
            )
        loss = F.cross_entropy(
            model(source, target_in).flatten(0, 1),
            target.flatten(),
            ignore_index=PAD_ID,
            label_smoothing=config.loss.label_smoothing,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        num_source, num_target = (int((side != PAD_ID).sum()) for side in (source, target))
        yield Step(num_source, num_target, source.numel(), target.numel(), loss.item())


def padded(store: TokenStore, ids: Ids) -> list[Tensor]:
    """Give the source and target sentences of some pairs as rectangles [N, L]."""
    return [
        pad_sequence(
            torch.from_numpy(tokens.astype(np.int64)).split(lengths.tolist()),
            batch_first=True,
            padding_value=PAD_ID,
        )
        for tokens, lengths in store.gather(ids)
    ]


Feed = Callable[[TokenStore, int, np.random.Generator], Iterator[Ids]]
"""From (tokens, target tokens a step, random numbers) to batches of sentences, without end."""


def bucketed(store: TokenStore, tokens: int, random: np.random.Generator) -> Iterator[Ids]:
    """Sort all sentences by length, target first, cut them into batches, and shuffle these."""
    while True:
        ids = random.permutation(len(store))
        order = np.lexsort((store.source_lengths(ids), store.target_lengths(ids)))
        batches = list(cut(store, ids[order], tokens))
        yield from (batches[i] for i in random.permutation(len(batches)))


def randomly(store: TokenStore, tokens: int, random: np.random.Generator) -> Iterator[Ids]:
    """Take sentences as they come, as tutorials do."""
    while True:
        yield from cut(store, random.permutation(len(store)), tokens)


def cut(store: TokenStore, ids: Ids, tokens: int) -> Iterator[Ids]:
    """Cut sentences, in this order, into batches of about so many target tokens each."""
    ends = np.cumsum(store.target_lengths(ids))
    return iter(np.split(ids, np.flatnonzero(np.diff(ends // tokens)) + 1))


CONTESTANTS: dict[str, tuple[str, Callable[[Config], Iterator[Step]]]] = {
    OURS: ("dtrain", trainer_steps),
    "bucketed": (
        "nn.Transformer, sentences bucketed by length",
        lambda config: plain_steps(config, bucketed),
    ),
    "lean": (
        "the same, dropping only what dtrain drops",
        lambda config: plain_steps(config, bucketed, drops_less=True),
    ),
    "random": (
        "nn.Transformer, random batches",
        lambda config: plain_steps(config, randomly),
    ),
}
"""By name: what it is, and its steps."""


# ------------------------------------------------------------------ the contest


class Contestant:
    """A contestant's process, seen from outside: it does nothing until it is its turn."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def turn(self, num_steps: int) -> Turn:
        """Let it run some steps, while all others wait."""
        self._pipe.send(num_steps)
        return self._pipe.recv()


@contextmanager
def started(name: str, config: Config) -> Iterator[Contestant]:
    """Start a contestant's process, and end it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=take_turns, args=(name, config, there), daemon=True)
    process.start()
    there.close()
    try:
        yield Contestant(here)
    finally:
        here.close()
        process.join()


def take_turns(name: str, config: Config, pipe: Connection) -> None:
    """Be a contestant: run as many steps as asked, again and again, until nobody asks."""
    assert isinstance(config.run.threads, int)
    torch.set_num_threads(config.run.threads)
    steps = CONTESTANTS[name][1](config)
    while True:
        try:
            num_steps = pipe.recv()
        except EOFError:
            break
        clocks = time.perf_counter, time.process_time, busy_seconds
        begun = [clock() for clock in clocks]
        done = list(islice(steps, num_steps))
        seconds, own, busy = (clock() - at for clock, at in zip(clocks, begun, strict=True))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        pipe.send(Turn(done, seconds, own, busy - own, memory))


@dataclass(frozen=True)
class Contest:
    """All turns of each contestant, and FLOP/s of each matrix product, round by round."""

    turns: dict[str, list[Turn]]
    products: dict[Shape, list[float]]


def compete(
    names: list[str], config: Config, shapes: list[Shape], rounds: int, steps: int
) -> Contest:
    """Let contestants take turns; what they do before the first round is not counted."""
    assert isinstance(config.run.threads, int)
    torch.set_num_threads(config.run.threads)
    contest = Contest({name: [] for name in names}, {shape: [] for shape in shapes})
    with ExitStack() as stack:
        contestants = {name: stack.enter_context(started(name, config)) for name in names}
        for contestant in contestants.values():
            contestant.turn(2)
        for number in range(rounds):
            for shape, rates in contest.products.items():
                rates.append(matmul_rate(shape, torch.float32, torch.device("cpu"), 0.2))
            for name in names if number % 2 == 0 else reversed(names):
                contest.turns[name].append(contestants[name].turn(steps))
                progress = f"round {number + 1}/{rounds} {name:9}"
                print(f"{progress} {contest.turns[name][-1].seconds / steps:6.2f} s/step")
    return contest


def model_shapes(config: Config) -> list[Shape]:
    """List what is multiplied: a large square for the machine's ceiling, then the model's own."""
    tokens, model = config.batch.tokens_per_step, config.model
    width, inner = model.hidden_dim, model.feed_forward_dim
    return [
        (16 * width, 16 * width, 16 * width),
        (tokens, width, width),
        (tokens, width, 3 * width),
        (tokens, width, inner),
        (tokens, inner, width),
        (tokens // 8, width, config.vocabulary.size),
    ]


# ------------------------------------------------------------------ the report


def spread(values: list[float], digits: int = 0) -> str:
    """Median, with least and most: `1,523 (1,464 to 1,582)`."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"


def contestant_row(name: str, turns: list[Turn], config: Config, ceiling: float) -> Row:
    """Sum a contestant up."""
    flops = [
        training_flops(
            config.model,
            config.vocabulary.size,
            turn.total("source_tokens"),
            turn.total("target_tokens"),
        )
        / turn.seconds
        for turn in turns
    ]
    seconds = sum(turn.seconds for turn in turns)
    whole = [sum(turn.total(what) for turn in turns) for what in Step.__dataclass_fields__]
    source, target, source_cells, target_cells, _ = whole
    return {
        "contestant": CONTESTANTS[name][0],
        "target tokens/s": spread([turn.rate for turn in turns]),
        "per CPU second": spread([turn.cpu_rate for turn in turns]),
        "share of matmul rate": f"{statistics.median(flops) / ceiling:.0%}",
        "target tokens a step": target / sum(len(turn.steps) for turn in turns),
        "fill of source, target": f"{source / source_cells:.1%}, {target / target_cells:.1%}",
        "peak memory MiB": turns[-1].memory_mib,
        "cores used": sum(turn.cpu_seconds for turn in turns) / seconds,
        "by others": sum(turn.foreign_seconds for turn in turns) / seconds,
        "last loss": turns[-1].total("loss") / len(turns[-1].steps),
    }


def ratio_row(name: str, ours: list[Turn], theirs: list[Turn]) -> Row:
    """Compare dtrain with another contestant, round by round."""
    rounds = list(zip(ours, theirs, strict=True))
    quiet = [(a, b) for a, b in rounds if max(a.foreign_cores, b.foreign_cores) < QUIET]
    by_clock = spread([a.rate / b.rate for a, b in quiet], 2) if quiet else "none"
    return {
        "dtrain against": CONTESTANTS[name][0],
        "ratio of target tokens/s": spread([a.rate / b.rate for a, b in rounds], 2),
        "in quiet rounds": f"{by_clock}, {len(quiet)} of {len(rounds)}",
        "per CPU second": spread([a.cpu_rate / b.cpu_rate for a, b in rounds], 2),
    }


def report(contest: Contest, config: Config, facts: Row) -> tuple[dict[str, object], str]:
    """Say it in JSON values and in Markdown."""
    medians = {shape: statistics.median(rates) for shape, rates in contest.products.items()}
    ceiling = max(medians.values())
    rows = [contestant_row(n, turns, config, ceiling) for n, turns in contest.turns.items()]
    ours = contest.turns[OURS]
    ratio_rows = [ratio_row(n, ours, turns) for n, turns in contest.turns.items() if n != OURS]
    product_rows: list[Row] = [
        {
            "matrix product": "x".join(map(str, shape)),
            "GFLOP/s": spread([rate / 1e9 for rate in rates]),
        }
        for shape, rates in contest.products.items()
    ]
    markdown = "\n".join(
        [
            "# Training speed on the CPU\n",
            f"`{' '.join(['python', 'benchmarks/train_speed.py', *sys.argv[1:]])}`\n",
            *(f"- {name}: {value}" for name, value in facts.items()),
            f"\nMedian (least to most) of the rounds. In quiet ones less than {QUIET} cores worked "
            "for others. The share is that of the fastest of the matrix products below.\n",
            *map(table, (ratio_rows, rows, product_rows)),
        ]
    )
    results: dict[str, object] = {
        "machine": facts,
        "ratios": ratio_rows,
        "contestants": rows,
        "products": product_rows,
        "rounds": {name: [asdict(turn) for turn in turns] for name, turns in contest.turns.items()},
    }
    return results, markdown


# ------------------------------------------------------------------ the command


def multi30k() -> Path | None:
    """Find Multi30k beside the checkout or in it."""
    places = ROOT.parent / "shared" / "data" / "multi30k", ROOT / "data" / "multi30k"
    return next((place for place in places if (place / "train.en").exists()), None)


def benchmark_config(text: Path, folder: Path, threads: int) -> Config:
    """Give the settings of issue and README: 3+3 layers of 256, 8,000 pieces, 4,096 tokens."""
    return Config.model_validate(
        {
            "run": {
                "name": "speed",
                "dir": str(folder / "run"),
                "device": "cpu",
                "threads": threads,
            },
            "data": {
                "train": [{"source": str(text / "train.en"), "target": str(text / "train.de")}],
                "dir": str(folder / "prepared"),
                "max_length": 128,
            },
            "vocabulary": {"size": 8000},
            "model": {
                "hidden_dim": 256,
                "num_heads": 4,
                "feed_forward_dim": 1024,
                "num_encoder_layers": 3,
                "num_decoder_layers": 3,
            },
            "batch": {"tokens_per_step": 4096, "tokens_per_micro_batch": 4096},
            "precision": "fp32",
            "kernels": {"compile": False},
            "validation": {"every_steps": 0},
            "checkpoint": {"every_steps": 0},
            "metrics": {"every_steps": 1},
            "wandb": {"mode": "disabled"},
        }
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", action="append", choices=[n for n in CONTESTANTS if n != OURS])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1, help="of each contestant in a round")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    names = [OURS, *(options.peer or ["bucketed", "lean", "random"])]
    facts = describe_machine(torch.device("cpu"), options.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = multi30k()
        facts["text"] = "Multi30k" if text else "made up, lengths like Multi30k's"
        if text is None:
            write_corpus(folder, num_pairs=29_000, mean_words=12, num_words=20_000)
        config = benchmark_config(text or folder, folder, options.threads)
        prepare(config.data, config.vocabulary, Path(config.data.dir), print)
        contest = compete(names, config, model_shapes(config), options.rounds, options.steps)
        write_results(options.out, "train-speed-cpu", *report(contest, config, facts))


if __name__ == "__main__":
    main()
