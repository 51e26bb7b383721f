"""How long a step loop stands still for a checkpoint: asynchronous saves beside synchronous ones.

    python benchmarks/save_stall.py

The state is that of a Transformer-base, 63 M parameters with Adam's moments. Both kinds of save
take turns, in the same process and folder, through the same code. While an asynchronous save is
written, matrix products are run in place of training, to see what the writing costs them.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout is enough

import torch

from benchmarks.yardstick import (
    ROOT,
    Row,
    busy_seconds,
    describe_machine,
    table,
    write_results,
)
from dtrain.checkpoint import checkpoint_name
from dtrain.config import OptimizerSettings
from dtrain.data.preparation import num_cores
from dtrain.model.settings import ModelSettings
from dtrain.model.transformer import Transformer
from dtrain.optimizer import build_optimizer
from dtrain.saver import Saver, room_needed

GOAL = 0.1
"""Of the time that a synchronous save takes."""

QUIET = 0.5
"""Less than so many cores worked for others."""


@dataclass(frozen=True)
class Round:
    """One save of each kind, in seconds.

    Attributes:
        synchronous: until a synchronous save returned.
        stall: until an asynchronous save returned.
        written: from then until it was on disk.
        slowed: of those, what the work in the meantime lost to the writing.
        foreign_cores: how many cores worked for other processes meanwhile.
    """

    synchronous: float
    stall: float
    written: float
    slowed: float
    foreign_cores: float

    @property
    def ratio(self) -> float:
        """The stall as a share of the synchronous save."""
        return self.stall / self.synchronous


def make_state(is_tiny: bool) -> tuple[Transformer, torch.optim.Optimizer]:
    """Make a model with moments: Transformer-base with 37,000 shared pieces, or a tiny one."""
    sizes = {"hidden_dim": 32, "num_heads": 2, "feed_forward_dim": 64} if is_tiny else {}
    model = Transformer(ModelSettings.model_validate(sizes), 100 if is_tiny else 37_000)
    optimizer = build_optimizer(model, OptimizerSettings())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


class Work:
    """Something to do while a save is written: products of small matrices, some ms each."""

    def __init__(self) -> None:
        self._matrix = torch.randn(512, 512)
        self.run(0.2)
        self._seconds_each = statistics.median(self.run(0.0) for _ in range(50))

    def run(self, seconds: float) -> float:
        """Do at least one product, and more for so many seconds; gives the seconds of the last."""
        end = time.perf_counter() + seconds
        while True:
            begun = time.perf_counter()
            torch.mm(self._matrix, self._matrix)
            now = time.perf_counter()
            if now >= end:
                return now - begun

    def until(self, is_done: Callable[[], bool]) -> tuple[float, float]:
        """Work until something is done; gives the seconds, and how many of them were lost."""
        begun, products = time.perf_counter(), 0
        while not is_done():
            self.run(0.0)
            products += 1
        seconds = time.perf_counter() - begun
        return seconds, max(0.0, seconds - products * self._seconds_each)


def measure(
    model: Transformer, optimizer: torch.optim.Optimizer, folder: Path, rounds: int
) -> list[Round]:
    """Save in turns, each kind first in every other round."""
    done: list[Round] = []
    saved: list[int] = []
    work = Work()
    with (
        opened(folder / "sync", False, []) as at_once,
        opened(folder / "async", True, saved) as later,
    ):

        def save_at_once(number: int) -> dict[str, float]:
            begun = time.perf_counter()
            at_once.save(number, model, optimizer, {"step": number})
            return {"synchronous": time.perf_counter() - begun}

        def save_later(number: int) -> dict[str, float]:
            begun = time.perf_counter()
            later.save(number, model, optimizer, {"step": number})
            stall = time.perf_counter() - begun
            written, slowed = work.until(lambda: number in saved)
            return {"stall": stall, "written": written, "slowed": slowed}

        for number in range(rounds):
            clocks = time.perf_counter, time.process_time, busy_seconds
            begun = [clock() for clock in clocks]
            order = [save_at_once, save_later][:: -1 if number % 2 else 1]
            seconds = {key: value for save in order for key, value in save(number).items()}
            past, own, busy = (clock() - at for clock, at in zip(clocks, begun, strict=True))
            check_equal(folder, checkpoint_name(number))
            done.append(Round(**seconds, foreign_cores=(busy - own) / past))
            print(
                f"round {number + 1}/{rounds} {done[-1].synchronous:.3f} s, {done[-1].stall:.3f} s"
            )
    return done


def opened(folder: Path, asynchronous: bool, saved: list[int]) -> Saver:
    """Make a saver that keeps one checkpoint, and notes what it has saved."""
    return Saver(
        folder,
        asynchronous=asynchronous,
        keep_last=1,
        keep_best=0,
        protect=None,
        say=print,
        on_saved=saved.append,
    )


def check_equal(folder: Path, name: str) -> None:
    """Make sure that both kinds of save wrote the same bytes.

    Raises:
        RuntimeError: if not.
    """
    manifests = {
        (folder / kind / name / "MANIFEST.json").read_bytes() for kind in ("sync", "async")
    }
    if len(manifests) > 1:
        raise RuntimeError(f"{name}: an asynchronous save differs from a synchronous one")


def report(rounds: list[Round], size: int, facts: Row) -> tuple[dict[str, object], str]:
    """Say it in JSON values and in Markdown."""
    later = rounds[1:] or rounds
    quiet = [one for one in later if one.foreign_cores < QUIET]
    rows = [
        row("synchronous save, s", later, lambda one: one.synchronous),
        row("stall of an asynchronous one, s", later, lambda one: one.stall),
        row("ratio", later, lambda one: one.ratio),
        row("ratio in quiet rounds", quiet, lambda one: one.ratio),
        row("until on disk, s", later, lambda one: one.written),
        row("lost by work meanwhile, s", later, lambda one: one.slowed),
        row("cores working for others", later, lambda one: one.foreign_cores),
    ]
    ratio = statistics.median(one.ratio for one in quiet or later)
    markdown = "\n".join(
        [
            "# How long training stands still for a checkpoint\n",
            f"`{' '.join(['python', 'benchmarks/save_stall.py', *sys.argv[1:]])}`\n",
            *(f"- {name}: {value}" for name, value in facts.items()),
            f"- checkpoint: {size / 2**20:,.0f} MiB",
            f"\nThe goal, a ratio under {GOAL:.0%}, is {'reached' if ratio < GOAL else 'missed'}: "
            f"{ratio:.1%}. The first round, in which buffers are allocated, is left out below: it "
            f"stalled for {rounds[0].stall:.2f} s. In quiet rounds less than {QUIET} cores worked "
            "for others.\n",
            table(rows),
        ]
    )
    results: dict[str, object] = {
        "command": sys.argv,
        "machine": facts,
        "checkpoint bytes": size,
        "median ratio": ratio,
        "goal": GOAL,
        "summary": rows,
        "rounds": [asdict(one) for one in rounds],
    }
    return results, markdown


def row(name: str, rounds: list[Round], value: Callable[[Round], float]) -> Row:
    """Sum a figure of some rounds up."""
    values = [value(one) for one in rounds]
    if not values:
        return {"measured": name, "rounds": 0}
    middle = statistics.median(values)
    least, most = min(values), max(values)
    return {"measured": name, "rounds": len(values), "median": middle, "least": least, "most": most}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model: the figures mean nothing"
    )
    parser.add_argument(
        "--disk", type=Path, help="where to save (default: the temporary directory)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = describe_machine(torch.device("cpu"), options.threads)
    model, optimizer = make_state(options.tiny)
    folder = Path(tempfile.mkdtemp(prefix="save-stall-", dir=options.disk))
    try:
        rounds = measure(model, optimizer, folder, options.rounds)
    finally:
        shutil.rmtree(folder)
    write_results(options.out, "save-stall-cpu", *report(rounds, room_needed(model), facts))


if __name__ == "__main__":
    main()
