"""The one command for everything about dtrain that needs a GPU: checks it and measures it.

    python benchmarks/gpu.py --out DIR

takes at most ten minutes and needs the checkout, torch, and no network: its text is made up on the
spot. Each section runs in a process and a time of its own; if one fails, the others go on and the
exit code is 1. The report is written anew after each, so that a cut loses only what was not begun.
`--device cpu --tiny` goes the same ways without a GPU, to see that they work; its figures mean
nothing.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial, partialmethod
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout is enough

try:
    import torch
    from torch import nn

    from benchmarks import gpu_calibration, gpu_checks
    from benchmarks.gpu_task import Task
    from benchmarks.gpu_training import COMPILED, EAGER, speed
    from benchmarks.yardstick import (
        ROOT,
        Row,
        describe_machine,
        table,
        write_corpus,
        write_results,
    )
    from dtrain.data.preparation import num_cores, prepare
    from dtrain.data.store import PreparedData
    from dtrain.loss import Objective
except ModuleNotFoundError as missing:
    sys.exit(f"benchmarks/gpu.py needs the Python package {missing.name}, which is not here")

# ------------------------------------------------------------------ the sections


def make_data(task: Task) -> Iterator[Row]:
    """Make up text with lengths like WMT 2014's and prepare it as `dtrain prepare` does."""
    begun = time.perf_counter()
    pairs, words, kinds = (400, 6, 200) if task.is_tiny else (60_000, 23, 150_000)
    write_corpus(task.folder, pairs, words, kinds)
    config = task.config(task.model("base"), 4096)
    prepare(config.data, config.vocabulary, Path(config.data.dir), print)
    manifest = PreparedData.open(Path(config.data.dir)).manifest
    split = manifest.splits["train"]
    yield {
        "pairs": split.num_pairs,
        "source tokens a sentence": split.source_tokens / split.num_pairs,
        "target tokens a sentence": split.target_tokens / split.num_pairs,
        "seconds": time.perf_counter() - begun,
    }


@dataclass(frozen=True)
class Section:
    """A part of the report: how to measure it, row by row, and the seconds that it may take."""

    title: str
    measure: Callable[[Task], Iterator[Row]]
    seconds: float


SECTIONS = {
    "data": Section("Made-up data", make_data, 60),
    "tests": Section("The tests for a GPU", gpu_checks.gpu_tests, 190),
    "dropout": Section("Compiled dropout", gpu_checks.compiled_dropout, 40),
    "correctness": Section("Correctness", gpu_checks.correctness, 100),
    "base": Section("Training steps, base", partial(speed, name="base", ways=EAGER), 80),
    "big": Section("Training steps, big", partial(speed, name="big", ways=EAGER), 80),
    "base-compiled": Section(
        "Training steps, base, compiled", partial(speed, name="base", ways=COMPILED), 150
    ),
    "products": Section("Matrix products", gpu_calibration.matrix_products, 60),
    "attention": Section("Attention", gpu_calibration.attention, 40),
    "loss": Section("Output layer and loss", gpu_calibration.cross_entropy, 40),
    "residual": Section("Dropout, sum and norm", gpu_calibration.residual, 30),
    "optimizer": Section("Optimizer", gpu_calibration.optimizer, 20),
    "world": Section("NCCL, a world of one", gpu_checks.world_of_one, 45),
    "resume": Section("Resume, bit for bit", gpu_checks.resume, 120),
    "big-compiled": Section(
        "Training steps, big, compiled", partial(speed, name="big", ways=COMPILED), 150
    ),
}
"""In the order in which they are run: what comes last has the time that is left."""


# ------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Result:
    """What came of a section; rows that it gave before it failed are kept."""

    status: Literal["ok", "failed", "skipped"]
    seconds: float
    error: str | None
    rows: list[Row]


def run_section(name: str, task: Task, log: Path, seconds: float) -> Result:
    """Run a section in a process of its own, and end it when its time is over."""
    begun = time.monotonic()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=be_section, args=(name, task, log, there))
    process.start()
    there.close()
    rows = list[Row]()
    while True:
        if not here.poll(max(0.0, begun + seconds - time.monotonic())):
            error = f"it was not done after {seconds:.0f} seconds"
            break
        try:
            is_end, value = here.recv()
        except EOFError:
            error = f"its process died; {log.name} may say why"
            break
        if is_end:
            error = value
            break
        rows.append(value)
    process.kill()
    process.join()
    spent = round(time.monotonic() - begun, 1)
    return Result("failed" if error else "ok", spent, error, rows)


def be_section(name: str, task: Task, log: Path, pipe: Connection) -> None:
    """Measure a section in this process; what it prints goes to the log."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if task.is_tiny:  # to compile for the CPU takes a minute and a C++ compiler
        Objective.compile = partialmethod(nn.Module.compile, backend="eager")  # type: ignore[assignment]  # another method
    # As training is by default; sections that try the other way say so themselves.
    torch.use_deterministic_algorithms(task.device == "cuda", warn_only=True)
    failed = 0
    try:
        for row in SECTIONS[name].measure(task):
            failed += "failed" in row
            pipe.send((False, row))
        pipe.send((True, f"{failed} rows failed" if failed else None))
    except Exception as error:
        traceback.print_exc()
        pipe.send((True, f"{type(error).__name__}: {error}"))


def measure(names: list[str], task: Task, out: Path, seconds: float) -> bool:
    """Run sections while there is time, and write the report; says whether none failed."""
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "gpu.log").resolve()
    log.unlink(missing_ok=True)
    end = time.monotonic() + seconds
    facts = describe_machine(task.torch_device, num_cores())
    results: dict[str, Result] = {}
    for name in names:
        left = end - time.monotonic()
        if left < 15:
            results[name] = Result("skipped", 0, "no time was left", [])
        else:
            results[name] = run_section(name, task, log, min(SECTIONS[name].seconds, left))
        print(f"{name:12} {results[name].status} {results[name].seconds} s", flush=True)
        write_report(facts, results, out)
    print(report(facts, results))
    return all(result.status != "failed" for result in results.values())


def write_report(facts: Row, results: dict[str, Result], out: Path) -> None:
    """Write what is known so far."""
    values = {"machine": facts, "sections": {name: asdict(r) for name, r in results.items()}}
    with redirect_stdout(None):
        write_results(out, "gpu", values, report(facts, results))


def report(facts: Row, results: dict[str, Result]) -> str:
    """Lay the results out in Markdown."""
    command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    parts = ["# dtrain on a GPU\n", f"`{command}`\n"]
    parts += [f"- {name}: {value}" for name, value in facts.items()]
    for name, result in results.items():
        parts.append(f"\n## {SECTIONS[name].title}: {result.status}, {result.seconds} s\n")
        if result.error:
            parts.append(f"{result.error}\n")
        if result.rows:
            parts.append(table(result.rows))
    return "\n".join(parts) + "\n"


def main() -> int:
    """Check and measure; the exit code is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small numbers of everything")
    parser.add_argument("--only", action="append", choices=[n for n in SECTIONS if n != "data"])
    parser.add_argument("--minutes", type=float, default=9.5)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; `--device cpu --tiny` only checks the script itself")
    names = [name for name in SECTIONS if name in ("data", *(options.only or SECTIONS))]
    with tempfile.TemporaryDirectory() as folder:
        task = Task(options.device, options.tiny, Path(folder))
        return 0 if measure(names, task, options.out, 60 * options.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
