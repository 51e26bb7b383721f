"""Whether training ever waits for data: gathering, planning, starting and preparing, measured.

    python benchmarks/data_speed.py

- *gather*: sentences from store to batch, beside Python slices and torch's DataLoader, in turn.
- *plan*: which sentences form which micro-batch. Every rank plans for all ranks.
- *start*: from opening prepared data to the first batch, and memory over many windows, in a process
  of its own. Lengths are made up; the token files are as large as they would be, but sparse.
- *prepare*: text to tokens with one process and with all cores, and a text four times as long.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout is enough

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from benchmarks.yardstick import ROOT, Row, describe_machine, table, write_corpus, write_results
from dtrain.batch import Batch, Kernel
from dtrain.data.loader import collate
from dtrain.data.plan import BatchPlan, Ids, source_slots
from dtrain.data.preparation import num_cores, prepare, prepared_directory
from dtrain.data.settings import BatchSettings, DataSettings, VocabularySettings
from dtrain.data.store import MANIFEST, FileRecord, PreparedData, read_manifest

GATHER_GOAL = 20.0  # million tokens a second and core
NEEDED = (
    19.0  # million tokens a second, both sides, that eight H200 learn from at the speed aimed at
)
FIRST_BATCH_GOAL = {4_500_000: 2.0, 100_000_000: 5.0}
MEMORY_GOAL_MIB = 300.0
MICRO_BATCHES = (3136, 12544, 25088)
PATTERN = 1_000_000  # made-up lengths, repeated
CHILD = [sys.executable, str(ROOT / "benchmarks" / "data_child.py")]


def made_up(folder: Path, num_pairs: int) -> DataSettings:
    """Write text about as long as that of WMT 2014, and give the settings to prepare it."""
    folder.mkdir()
    write_corpus(folder, num_pairs, 23, 50_000)
    train = {"source": str(folder / "train.en"), "target": str(folder / "train.de")}
    return DataSettings.model_validate({"train": [train], "dir": str(folder / "{fingerprint}")})


def prepared(data: DataSettings) -> Path:
    """Prepare text with 8,000 pieces; gives the directory."""
    vocabulary = VocabularySettings(size=8000, algorithm="bpe")
    directory = prepared_directory(data, vocabulary)
    prepare(data, vocabulary, directory, lambda _: None)
    return directory


def plan_of(data: PreparedData, tokens: int) -> BatchPlan:
    """Lay out the plan of a run with eight micro-batches a step."""
    settings = BatchSettings(tokens_per_step=8 * tokens, tokens_per_micro_batch=tokens)
    slots = source_slots(settings, data.manifest.length_ratio, data.manifest.max_length)
    return BatchPlan(data.train, settings, slots, seed=1)


class Slices(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A pair a time, as loaders usually read: a slice of each side's tokens."""

    def __init__(self, directory: Path) -> None:
        self.sides = [
            (
                np.memmap(directory / "train" / f"{side}.tokens", np.uint16, mode="r"),
                np.memmap(directory / "train" / f"{side}.offsets", np.int64, mode="r"),
            )
            for side in ("source", "target")
        ]

    def rows(self, index: int) -> list[NDArray[np.uint16]]:
        """Slice one pair out."""
        return [tokens[offsets[index] : offsets[index + 1]] for tokens, offsets in self.sides]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        source, target = (torch.from_numpy(row.astype(np.int64)) for row in self.rows(index))
        return source, target

    def packed(self, ids: Ids) -> list[NDArray[np.uint16]]:
        """Gather a micro-batch by slices, end to end."""
        pairs = [self.rows(index) for index in ids.tolist()]
        return [np.concatenate(side) for side in zip(*pairs, strict=True)]


def padded(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Fill rectangles, as most trainers do."""
    return [pad_sequence(list(side), batch_first=True) for side in zip(*pairs, strict=True)]


def gathering(directory: Path, tokens: int, rounds: int) -> list[Row]:
    """Measure the ways from ids to a batch, in turn, on the same micro-batches."""
    data = PreparedData.open(directory)
    plan, slices = plan_of(data, tokens), Slices(directory)
    window = plan.window(0, 0)
    lists = [ids.tolist() for ids in window]

    def dataloader() -> None:
        loader = torch.utils.data.DataLoader(slices, batch_sampler=lists, collate_fn=padded)
        for _ in loader:
            pass

    def packed_for(kernel: Kernel, ids: Ids) -> object:
        sides = data.train.gather(ids)
        return Batch.packed(*sides, plan.source_slots, plan.target_slots, kernel=kernel)

    ways: dict[str, Callable[[], object]] = {
        "gather": lambda: [data.train.gather(ids) for ids in window],
        "gather and lay out": lambda: [collate(plan, data.train, ids) for ids in window],
        "gather and lay out, GPU kernel": lambda: [packed_for("packed", ids) for ids in window],
        "slices": lambda: [slices.packed(ids) for ids in window],
        "DataLoader, pad_sequence": dataloader,
    }
    seconds = {name: list[float]() for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            seconds[name].append(cpu_seconds(way))
    ids = np.concatenate(window)
    count = int((data.train.source_lengths(ids) + data.train.target_lengths(ids)).sum())
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return [
        {
            "tokens a micro-batch": tokens,
            "way": name,
            "M tokens/s a core": count / median / 1e6,
            "slowest round": count / max(seconds[name][1:]) / 1e6,
            "times DataLoader": medians["DataLoader, pad_sequence"] / median,
        }
        for name, median in medians.items()
    ]


def cpu_seconds(work: Callable[[], object]) -> float:
    """Measure the time of all this process's threads, which others' work hardly touches."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def planning(directory: Path, tokens: int, rounds: int) -> Row:
    """Measure how fast windows are packed, and what a thread that does so leaves to another."""
    data = PreparedData.open(directory)
    plan = plan_of(data, tokens)
    seconds, rates, fills = list[float](), list[float](), list[float]()
    for epoch in range(rounds):
        begun = time.process_time()
        window = plan.window(epoch, 0)
        seconds.append(time.process_time() - begun)
        ids = np.concatenate(window)
        count = int((plan.lengths.source_lengths(ids) + plan.lengths.target_lengths(ids)).sum())
        rates.append(count / seconds[-1] / 1e6)
        fills.append(count / len(window) / (plan.source_slots + plan.target_slots))
    alone = small_operations()
    with repeated(lambda epoch: plan.window(epoch, 0)):
        beside = small_operations()
    rate = statistics.median(rates)
    return {
        "tokens a micro-batch": tokens,
        "ms a window": 1000 * statistics.median(seconds),
        "M tokens/s a core": rate,
        "slowest window": min(rates),
        "fill": statistics.median(fills),
        "H200s fed by one planner": rate / NEEDED * 8,
        "small torch operations left to another thread": beside / alone,
    }


def small_operations(seconds: float = 1.0) -> float:
    """Count how many operations a second Python hands to torch, as an eager step does."""
    x, count, begun = torch.zeros(64), 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for _ in range(100):
            x.add_(1.0)
        count += 100
    return count / (time.perf_counter() - begun)


@contextmanager
def repeated(work: Callable[[int], object]) -> Iterator[None]:
    """Do something again and again in another thread, told how often it was done before."""
    over = threading.Event()

    def loop() -> None:
        for count in itertools.count():
            if over.is_set():
                break
            work(count)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def starting(small: Path, folder: Path, num_pairs: int, windows: int, tokens: int) -> Row:
    """Measure a start on so many pairs of made-up lengths."""
    directory = folder / f"pairs-{num_pairs}"
    try:
        inflate(small, directory, num_pairs)
        command = [*CHILD, "start", str(directory), str(tokens), str(windows)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    found: dict[str, float] = json.loads(done.stdout)
    return {"pairs": num_pairs, "tokens a micro-batch": tokens, **found}


def inflate(small: Path, directory: Path, num_pairs: int) -> None:
    """Copy a prepared directory, with a training split of so many pairs and without their tokens.

    Hashes in its manifest are wrong; a start does not look at them.
    """
    shutil.copytree(small, directory)
    manifest = read_manifest(directory)
    random = np.random.default_rng(1)
    logarithms = random.normal(np.log(29) - 0.15, 0.55, PATTERN)
    noise = np.stack([np.zeros(PATTERN), random.normal(-0.03, 0.12, PATTERN)])
    lengths = np.clip(np.exp(logarithms + noise), 2, manifest.max_length).astype(np.int64)
    files, totals = dict(manifest.files), list[int]()
    for side, row in zip(("target", "source"), lengths, strict=True):
        ends = np.cumsum(row)
        path = directory / "train" / f"{side}.offsets"
        with path.open("wb") as file:
            file.write(np.zeros(1, "<i8").tobytes())
            for first in range(0, num_pairs, PATTERN):
                part = ends[: num_pairs - first] + first // PATTERN * ends[-1]
                file.write(part.astype("<i8").tobytes())
        totals.append(int(part[-1]))
        with (directory / "train" / f"{side}.tokens").open("wb") as file:
            file.truncate(2 * totals[-1])
        for kind in ("offsets", "tokens"):
            name = f"train/{side}.{kind}"
            files[name] = FileRecord(size=(directory / name).stat().st_size, sha256="")
    target_tokens, source_tokens = totals
    corpus = manifest.splits["train"].corpora[0].model_copy(update={"kept": num_pairs})
    train = {"corpora": [corpus], "source_tokens": source_tokens, "target_tokens": target_tokens}
    splits = manifest.splits | {"train": manifest.splits["train"].model_copy(update=train)}
    ratio = source_tokens / target_tokens
    changed = manifest.model_copy(
        update={"splits": splits, "files": files, "length_ratio": ratio},
    )
    (directory / MANIFEST).write_text(changed.model_dump_json(), encoding="utf-8")


def preparing(folder: Path, num_pairs: int, num_processes: int, vocabulary_of: Path) -> Row:
    """Measure a preparation with a known vocabulary, and the memory of all its processes."""
    place = folder / f"text-{num_pairs}-{num_processes}"
    data = made_up(place, num_pairs)
    size = sum(path.stat().st_size for path in place.iterdir())
    arguments = [data.model_dump_json(), str(vocabulary_of), str(num_processes)]
    child = subprocess.Popen([*CHILD, "prepare", *arguments], stdout=subprocess.PIPE, text=True)
    most = 0.0
    while child.poll() is None:
        most = max(most, tree_mib(child.pid))
        time.sleep(0.05)
    shutil.rmtree(place)
    if child.returncode:
        raise RuntimeError(f"{CHILD} prepare ended with code {child.returncode}")
    seconds = json.loads(child.communicate()[0])["seconds"]
    return {
        "pairs": num_pairs,
        "processes": num_processes,
        "pairs/s": num_pairs / seconds,
        "MB/s": size / seconds / 1e6,
        "peak MiB of all processes": most,
    }


def tree_mib(process: int) -> float:
    """Sum up what a process and those below it hold now; those that end meanwhile count nothing."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    held = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]
    return sum(held) / 1024 + sum(map(tree_mib, map(int, children.split())))


def report(parts: dict[str, list[Row]], facts: Row) -> tuple[dict[str, object], str]:
    """Lay the results out."""
    goals = {
        "gather": f"Goal: {GATHER_GOAL:g} M tokens/s a core. Seconds are of processor time.",
        "plan": f"Eight H200 at the speed aimed at learn from {NEEDED:g} M tokens/s. A window is "
        "about 32,768 pairs; its last micro-batch may stay part-empty.",
        "start": "Goals, imports aside: "
        + ", ".join(f"{s:g} s for {n:,} pairs" for n, s in FIRST_BATCH_GOAL.items())
        + f"; under {MEMORY_GOAL_MIB:g} MiB of its own a rank, imports included, after any number "
        "of windows. Pages of mapped files are shared by all ranks; the system takes them back.",
        "prepare": "With a vocabulary that is there. Learning one keeps its text in memory, five "
        "million lines at most.",
    }
    lines = [
        "# Data never waits\n",
        f"`{' '.join(['python', 'benchmarks/data_speed.py', *sys.argv[1:]])}`\n",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    for name, rows in parts.items():
        lines += [f"\n## {name}\n", f"{goals[name]}\n", table(rows)]
    results: dict[str, object] = {"command": sys.argv, "machine": facts, **parts}
    return results, "\n".join(lines)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[Row]]:
    """Run the parts that are asked for."""
    small = prepared(made_up(folder / "text", options.text_pairs))
    sizes = tuple(options.micro_batches)
    parts: dict[str, Callable[[], list[Row]]] = {
        "gather": lambda: [row for n in sizes for row in gathering(small, n, options.rounds)],
        "plan": lambda: [planning(small, n, options.rounds) for n in sizes],
        "start": lambda: [
            starting(small, folder, pairs, windows, sizes[-1])
            for pairs in options.pairs
            for windows in (options.windows, 4 * options.windows)
        ],
        "prepare": lambda: [
            preparing(folder, pairs, processes, small)
            for processes in dict.fromkeys([1, num_cores()])
            for pairs in (options.text_pairs, 4 * options.text_pairs)
        ],
    }
    return {name: parts[name]() for name in options.parts}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = ["gather", "plan", "start", "prepare"]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--text-pairs", type=int, default=60_000, help="of the text prepared")
    parser.add_argument("--pairs", type=int, nargs="+", default=list(FIRST_BATCH_GOAL))
    parser.add_argument("--windows", type=int, default=100, help="planned after a start, and 4x")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=list(MICRO_BATCHES))
    parser.add_argument("--disk", type=Path, help="for scratch files (default: the temporary one)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = describe_machine(torch.device("cpu"), 1)
    with tempfile.TemporaryDirectory(prefix="data-speed-", dir=options.disk) as folder:
        parts = measure(options, Path(folder))
    write_results(options.out, "data-speed", *report(parts, facts))


if __name__ == "__main__":
    main()
