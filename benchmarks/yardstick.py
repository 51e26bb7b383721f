"""What the benchmarks measure by: a model's arithmetic, the machine's matrix products, its facts.

Also the trainer itself, opened as training opens it, and made-up text to run it on.
"""

import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dtrain.config import Config
from dtrain.data.loader import Loader
from dtrain.data.plan import DistributedTokenSampler
from dtrain.data.preparation import num_cores
from dtrain.distributed import connect
from dtrain.metrics import Metrics
from dtrain.preemption import Deadline, StopSignal
from dtrain.start import claimed
from dtrain.supervision import watched
from dtrain.train import Training
from dtrain.utilisation import training_flops as training_flops  # for the benchmarks, as it was

ROOT = Path(__file__).resolve().parent.parent

Row = dict[str, object]
"""A line of results: values by the name of their column."""

Shape = tuple[int, int, int]
"""Of a matrix product: [m, k] @ [k, n]."""


def matmul_rate(shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Measure torch.mm for about so many seconds; gives FLOP/s."""
    m, k, n = shape
    a = torch.randn(m, k, device=device).to(dtype)
    b = torch.randn(k, n, device=device).to(dtype)
    out = torch.empty(m, n, dtype=dtype, device=device)

    def run(count: int) -> float:
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b, out=out)
        synchronize(device)
        return time.perf_counter() - begun

    run(1)
    count = max(1, round(seconds / run(1)))
    return 2 * m * k * n * count / run(count)


def busy_seconds() -> float:
    """Give the seconds that this machine's cores have worked since its start, for anybody."""
    path = Path("/proc/stat")  # Linux only
    if not path.exists():
        return math.nan
    user, nice, system, _idle, _waiting, *others = path.read_text(encoding="utf-8").split()[1:9]
    return sum(map(int, (user, nice, system, *others))) / os.sysconf("SC_CLK_TCK")


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def open_training(
    config: Config, metrics: Metrics | None = None
) -> Iterator[tuple[Training, Loader]]:
    """Open the trainer on one rank, with its loader, for a run that leaves nothing behind.

    Args:
        config: its settings.
        metrics: told how steps went; by default nobody is.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        StopSignal() as stop,
        connect(config.run.device, config.distributed.first_step_timeout) as world,
        ExitStack() as claims,
    ):
        run = config.run.model_copy(update={"dir": folder})
        config = config.model_copy(update={"run": run})
        ready = claims.enter_context(claimed(config, world, stop))
        assert ready is not None, "stopped by a signal"
        heartbeat = claims.enter_context(watched(ready, world))
        training = Training(ready, world, stop, Deadline(None), heartbeat)
        training.metrics = metrics or Metrics.silent()
        training.account = training.open_account()
        sampler = DistributedTokenSampler(training.plan, world.size, world.rank)
        on_gpu = world.device.type == "cuda"
        with Loader(sampler, training.data.train, training.progress.cursor, on_gpu) as loader:
            yield training, loader


def write_corpus(folder: Path, num_pairs: int, mean_words: float, num_words: int) -> None:
    """Write `train.en` and `train.de` of made-up words, as frequent and as many as in real text.

    Frequencies follow Zipf's law, lengths a log-normal distribution, and a translation is about as
    long as its source. There is nothing to learn in it.

    Args:
        folder: where to write.
        num_pairs: lines of each file.
        mean_words: of a sentence; about 23 in WMT 2014, 12 in Multi30k.
        num_words: different words of a language.
    """
    random = np.random.default_rng(1)
    spread = 0.55  # of the logarithm of lengths
    wanted = random.lognormal(math.log(mean_words) - spread**2 / 2, spread, num_pairs)
    chances = 1 / np.arange(100, num_words + 100)
    for language, syllables in (("en", "bdfgklmnprst"), ("de", "bdfgkhmnwrzs")):
        words = np.array([_word(i, syllables) for i in range(num_words)])
        lengths = np.clip(np.rint(wanted * random.normal(1, 0.12, num_pairs)), 1, 90).astype(int)
        drawn: NDArray[np.str_] = words[
            random.choice(num_words, lengths.sum(), p=chances / chances.sum())
        ]
        lines = (" ".join(line) + "\n" for line in np.split(drawn, np.cumsum(lengths)[:-1]))
        (folder / f"train.{language}").write_text("".join(lines), encoding="utf-8")


def _word(index: int, consonants: str) -> str:
    """Spell a number in syllables, small numbers in few."""
    word = ""
    while index or not word:
        index, digit = divmod(index, 5 * len(consonants))
        word += consonants[digit // 5] + "aeiou"[digit % 5]
    return word


def describe_machine(device: torch.device, threads: int) -> Row:
    """Say what is measured on, and with what."""
    facts: Row = {
        "processor": _processor(),
        "cores": num_cores(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtrain": _commit(),
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load before": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu memory GiB": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return facts


def write_results(out: Path, name: str, results: Mapping[str, object], markdown: str) -> None:
    """Write `name.json` and `name.md`, and print the latter."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, default=str) + "\n"
    (out / f"{name}.json").write_text(text, encoding="utf-8")
    (out / f"{name}.md").write_text(markdown, encoding="utf-8")
    print(markdown)


def table(rows: Sequence[Row]) -> str:
    """Lay rows out as a Markdown table, with every column that any of them has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _processor() -> str:
    """Name the processor; Linux knows more of it than Python."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Name the commit that is checked out, with a + if files were changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"
