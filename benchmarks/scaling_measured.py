"""Checks the law of scaling on one and two CPU ranks of one thread each; `scaling.py --measure`.

What the law needs is measured apart: steps of one rank, which exchange nothing, and an all-reduce
of as many bytes as the gradients'. From these it predicts the step of two ranks, which is measured
too. All is done by the same two processes in turns, the order reversed every round, so that what
disturbs the machine disturbs all alike.
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout is enough

import numpy as np
import torch

from benchmarks.contest import Entry, environments
from benchmarks.scaling_law import Machine, Model, Settings, step_seconds
from benchmarks.yardstick import Row, busy_seconds, describe_machine, write_corpus
from dtrain.config import Config, load_config
from dtrain.data.loader import LoadedStep, Loader
from dtrain.data.plan import Cursor, DistributedTokenSampler
from dtrain.data.preparation import prepare
from dtrain.data.store import PreparedData
from dtrain.distributed import World, alone, connect
from dtrain.learner import Learner
from dtrain.parts import build_plan

TOKENS = (64, 128, 256, 512, 1024)  # of a micro-batch; each rank runs one a step
TOKENS_A_TURN = 512
NUM_PLANNED = 8  # steps that are run again and again

Seconds = dict[str, list[float]]
"""By what was measured, all steps."""


def config_of(folder: Path) -> Config:
    """Give the settings: 2+2 layers of 256, 4,000 pieces, short sentences."""
    return Config.model_validate(
        {
            "run": {"name": "scaling", "dir": str(folder / "run"), "device": "cpu", "threads": 1},
            "data": {
                "train": [{"source": str(folder / "train.en"), "target": str(folder / "train.de")}],
                "dir": str(folder / "prepared"),
                "max_length": 32,
            },
            "vocabulary": {"size": 4000},
            "model": {
                "hidden_dim": 256,
                "num_heads": 4,
                "feed_forward_dim": 1024,
                "num_encoder_layers": 2,
                "num_decoder_layers": 2,
            },
            "validation": {"every_steps": 0},
            "precision": "fp32",
            "kernels": {
                "attention": "padded",
                "compile": False,
                "loss": "plain",
                "residual": "plain",
            },
        }
    )


# ------------------------------------------------------------------ one rank


class Steps:
    """Steps of one size, of which every rank of a world runs one micro-batch each."""

    def __init__(self, config: Config, data: PreparedData, world: World, tokens: int) -> None:
        sizes = {"tokens_per_step": tokens * world.size, "tokens_per_micro_batch": tokens}
        batch = config.batch.model_copy(update=sizes)
        plan = build_plan(config.model_copy(update={"batch": batch}), data)
        sampler = DistributedTokenSampler(plan, world.size, world.rank)
        with Loader(sampler, data.train, Cursor(), pin_memory=False) as loader:
            self.each = cycle(list(islice(loader, NUM_PLANNED)))


class Rank:
    """A rank that trains alone, and with the other one."""

    def __init__(self, config: Config, world: World, tokens: Sequence[int]) -> None:
        torch.set_num_threads(1)
        data = PreparedData.open(Path(config.data.dir))
        self.world = world
        worlds = {"apart": alone("cpu"), "together": world}
        self.learners = {name: Learner(config, data.vocabulary, w) for name, w in worlds.items()}
        self.steps = {
            (name, count): Steps(config, data, w, count).each
            for name, w in worlds.items()
            for count in tokens
        }
        model = self.learners["together"].model
        self.numbers = dict.fromkeys(worlds, 0)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.embedding = model.decoder.embedding.weight.numel()
        self.gradients = torch.zeros(self.parameters)

    def train(self, name: str, tokens: int) -> list[float]:
        """Run some steps as the trainer does, each with its word to the other ranks."""
        learner = self.learners[name]

        def step(loaded: LoadedStep) -> None:
            self.numbers[name] += 1
            learned = learner.learn(self.numbers[name], loaded, lambda *_: None)
            assert learned.updated
            learner.world.agree(self.numbers[name], False)

        count = max(1, TOKENS_A_TURN // tokens)
        return [timed(partial(step, each)) for each in islice(self.steps[name, tokens], count)]

    def exchange(self) -> list[float]:
        """Add as many numbers up as there are gradients, and agree."""

        def once() -> None:
            self.world.sum(self.gradients)
            self.world.agree(0, False)

        return [timed(once) for _ in range(5)]


def timed(work: Callable[[], object]) -> float:
    """Give the seconds that it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def run_rank(folder: Path, tokens: Sequence[int], rounds: int) -> None:
    """Be one of the two ranks; rank 0 writes what both measured."""
    config = load_config(folder / "scaling.yaml")
    with connect("cpu", 600) as world:
        rank, seconds = Rank(config, world, tokens), Seconds()
        for number in range(-1, rounds):  # the first is for warming up
            for name, work in turns(rank, tokens)[:: -1 if number % 2 else 1]:
                world.meet()
                world.sum(torch.zeros(1))  # both begin at once
                if name.startswith("alone") and not world.is_main:
                    continue
                times = work()
                if number >= 0:
                    seconds.setdefault(name, []).extend(times)
        both = world.gather(seconds)
        if world.is_main:
            found = {"parameters": rank.parameters, "embedding": rank.embedding, "ranks": both}
            (folder / "measured.json").write_text(json.dumps(found), encoding="utf-8")


def turns(rank: Rank, tokens: Sequence[int]) -> list[tuple[str, Callable[[], list[float]]]]:
    """List what is measured in a round: rank 0 alone, both apart, both together, an exchange."""
    found: list[tuple[str, Callable[[], list[float]]]] = [("exchange", rank.exchange)]
    for count in tokens:
        found += [
            (f"alone {count}", partial(rank.train, "apart", count)),
            (f"apart {count}", partial(rank.train, "apart", count)),
            (f"together {count}", partial(rank.train, "together", count)),
        ]
    return found


# ------------------------------------------------------------------ the prediction


class Line(NamedTuple):
    """Step time over tokens: what it takes however few there are, and each."""

    fixed: float
    each: float


def fit(tokens: Sequence[int], seconds: Sequence[float]) -> Line:
    """Lay a line through step times that keeps the sum of squared relative errors least."""
    weights = 1 / np.array(seconds)
    columns = np.stack([np.ones(len(tokens)), np.array(tokens)], axis=1) * weights[:, None]
    fixed, each = np.linalg.lstsq(columns, np.ones(len(tokens)), rcond=None)[0]
    return Line(float(fixed), float(each))


@dataclass(frozen=True)
class Found:
    """What was measured; medians in seconds, by tokens of a rank where there are several.

    Attributes:
        parameters: of the model.
        embedding: of its tied matrix.
        exchange: of all gradients.
        alone: a step of one rank, while the other waits.
        apart: the slower of two ranks that train at once, each for itself.
        together: a step of both.
    """

    parameters: int
    embedding: int
    exchange: float
    alone: dict[int, float]
    apart: dict[int, float]
    together: dict[int, float]

    @classmethod
    def read(cls, path: Path, tokens: Sequence[int]) -> "Found":
        """Sum up what the ranks wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        first, second = found["ranks"]

        def slower(name: str) -> float:
            return statistics.median(map(max, first[name], second[name]))

        return cls(
            parameters=found["parameters"],
            embedding=found["embedding"],
            exchange=slower("exchange"),
            alone={count: statistics.median(first[f"alone {count}"]) for count in tokens},
            apart={count: slower(f"apart {count}") for count in tokens},
            together={count: slower(f"together {count}") for count in tokens},
        )

    def predict(self, line: Line, tokens: int) -> float:
        """Let the law say how long a step of two ranks takes: all gradients at once, as on CPUs."""
        machine = Machine(
            gpus=2,
            small=0,
            small_latency=0,
            small_bandwidth=math.inf,
            latency=0,
            bandwidth=4 * self.parameters / self.exchange,
            hop_latency=0,
            network=((1, math.inf),),
            memory_bandwidth=math.inf,  # what the update takes is in the line
        )
        model = Model(self.parameters, self.embedding, 0, line.each)
        settings = Settings(bucket_mb=math.inf, fixed_seconds=line.fixed)
        return step_seconds(machine, model, settings, 2, tokens)


def compare(found: Found) -> list[Row]:
    """Set predictions beside what was measured, in ms."""
    lines = [fit(list(times), list(times.values())) for times in (found.alone, found.apart)]
    rows = list[Row]()
    for tokens, measured in found.together.items():
        predicted, from_apart = (found.predict(line, tokens) for line in lines)
        rows.append(
            {
                "tokens a rank": tokens,
                "alone": 1e3 * found.alone[tokens],
                "both apart": 1e3 * found.apart[tokens],
                "exchange": 1e3 * found.exchange,
                "two ranks": 1e3 * measured,
                "predicted": 1e3 * predicted,
                "error": f"{predicted / measured - 1:+.1%}",
                "from apart": 1e3 * from_apart,
                "its error": f"{from_apart / measured - 1:+.1%}",
                "efficiency": f"{found.alone[tokens] / measured:.0%}",
            }
        )
    return rows


def children_seconds() -> float:
    """Give the work of all cores for child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(rounds: int, tokens: Sequence[int] = TOKENS) -> tuple[list[Row], Row]:
    """Train on one and on two ranks; gives the comparison and the facts about it.

    Raises:
        RuntimeError: if a rank failed.
    """
    facts = describe_machine(torch.device("cpu"), 1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_corpus(folder, num_pairs=6000, mean_words=9, num_words=5000)
        config = config_of(folder)
        prepare(config.data, config.vocabulary, Path(config.data.dir), lambda _: None)
        (folder / "scaling.yaml").write_text(config.to_yaml(), encoding="utf-8")
        program = [sys.executable, __file__, str(folder), str(rounds), *map(str, tokens)]
        entry = Entry("two ranks", "two ranks", tuple(program), ranks=2, threads=1)
        clocks = time.perf_counter, busy_seconds, children_seconds
        begun = [clock() for clock in clocks]
        ranks = [subprocess.Popen(program, env=variables) for variables in environments(entry)]
        codes = [rank.wait() for rank in ranks]
        past, busy, own = (clock() - at for clock, at in zip(clocks, begun, strict=True))
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}")
        found = Found.read(folder / "measured.json", tokens)
    facts |= {"rounds": rounds, "cores that worked for others": f"{(busy - own) / past:.2f}"}
    facts |= {"model": f"2+2 layers of 256, {found.parameters:,} parameters"}
    return compare(found), facts


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), [int(count) for count in sys.argv[3:]], int(sys.argv[2]))
