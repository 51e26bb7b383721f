"""Trainings that are disturbed at random until they are done, and must end as if left alone.

    python tests/chaos.py --minutes 30 --out benchmarks/results/chaos.json

Real ranks over gloo, on the toy language; each attempt has another number of them. Whatever is done
to a rank, the others have to end by themselves: there is no launcher here to end them.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from toy_language import write_settings, write_text
from worlds import run_until_exit, run_world

from dtrain import checkpoint, train
from dtrain.config import Config, load_config

SIZES = (1, 2, 4)
SIGNALS = ("KILL", "KILL", "TERM", "USR1", "STOP")
DAMAGES = ("", "", "flip", "truncate")  # to the newest checkpoint, between attempts
SECONDS_TO_END = 30.0  # for the ranks that are left, after one was hit
SECONDS_TO_END_A_HANG = 45.0  # the time-out of starts, and some more
LONGEST_CALM = 5.0  # seconds that an attempt is left alone at most


@dataclass
class Report:
    """What a training went through.

    Attributes:
        seed: of the disturbances.
        attempts: starts, the last of which was let through to the end.
        disturbances: how often each kind struck a rank that was there to be struck.
        checkpoints_verified: how often a checkpoint was found whole after an attempt.
        slowest_end: seconds that ranks needed at most to end after one was hit.
        same: whether weights, moments and metrics ended as those of an undisturbed run.
    """

    seed: int
    attempts: int = 0
    disturbances: Counter[str] = field(default_factory=Counter)
    checkpoints_verified: int = 0
    slowest_end: float = 0.0
    same: bool = False


def outcome(config: Config) -> tuple[dict[str, str], list[dict[str, object]]]:
    """SHA-256 of the last weights and moments, and the metrics but for what a clock measured."""
    newest = checkpoint.steps_saved(config.run_dir / "checkpoints")[0]
    files = json.loads((newest / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
    hashes = {name: files[name]["sha256"] for name in files if name.endswith(".safetensors")}
    text = (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    clocked = ("per_second", "seconds", "share", "memory_gib", "tflops", "rank", "ratio")
    lines = [
        {key: value for key, value in json.loads(line).items() if not key.endswith(clocked)}
        for line in text.splitlines()
    ]
    return hashes, lines


def disturb(config: Config, seed: int) -> Report:
    """Train to the end, through disturbances drawn by `seed`.

    Raises:
        AssertionError: if ranks do not end in time, or a checkpoint was lost or damaged.
    """
    dice, report = random.Random(seed), Report(seed)
    while status(config) != "completed":
        name, size = dice.choice(SIGNALS), dice.choice(SIZES)
        strike = Strike(getattr(signal, f"SIG{name}"), dice.uniform(0.2, LONGEST_CALM), dice)
        codes = run_until_exit(size, train.run, config, during=strike, timeout=90)
        report.attempts += 1
        if strike.at is not None:
            report.disturbances[name] += 1
            seconds = time.monotonic() - strike.at
            report.slowest_end = max(report.slowest_end, seconds)
            told = "\n".join(f"{code} {text}" for code, text in codes)
            limit = SECONDS_TO_END_A_HANG if name == "STOP" else SECONDS_TO_END
            assert seconds < limit, f"{name} on {size} ranks took {seconds} s:\n{told}"
        report.checkpoints_verified += verify_all(config)
        damage = dice.choice(DAMAGES)
        if damage and spoil(config, damage, dice):
            report.disturbances[damage] += 1
    return report


class Strike:
    """Hits one of some processes with a signal after a while; `at` says when, if it was there."""

    def __init__(self, number: signal.Signals, delay: float, dice: random.Random) -> None:
        self.number, self.delay, self.dice = number, delay, dice
        self.at: float | None = None

    def __call__(self, processes: list[int]) -> None:
        time.sleep(self.delay)
        try:
            os.kill(self.dice.choice(processes), self.number)
        except ProcessLookupError:
            return
        self.at = time.monotonic()


def status(config: Config) -> str:
    path = config.run_dir / "status.json"
    return json.loads(path.read_text(encoding="utf-8"))["status"] if path.exists() else ""


def verify_all(config: Config) -> int:
    """Check every checkpoint that is there; gives how many."""
    saved = checkpoint.steps_saved(config.run_dir / "checkpoints")
    problems = {path.name: checkpoint.verify(path) for path in saved}
    assert not any(problems.values()), problems
    return len(saved)


def spoil(config: Config, kind: str, dice: random.Random) -> bool:
    """Spoil a file of the newest checkpoint, unless it is the only one; says whether it did."""
    saved = checkpoint.steps_saved(config.run_dir / "checkpoints")
    if len(saved) < 2 or status(config) == "completed":
        return False
    path = dice.choice(sorted(saved[0].glob("*.*")))
    if path.name == "judgement.json":
        return False
    content = bytearray(path.read_bytes())
    place = dice.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << dice.randrange(8)
    else:
        del content[place:]
    path.write_bytes(content)
    return True


def chaotic(settings: Path, folder: Path, seed: int, steps: int) -> Report:
    """Train undisturbed, then through disturbances, and compare."""
    common = ["--distributed.reduction=tree", f"--run.max_steps={steps}", f"--run.seed={seed}"]
    common += [
        "--checkpoint.every_steps=7",
        "--validation.every_steps=40",
        "--metrics.every_steps=3",
    ]
    common += ["--distributed.timeout=6", "--distributed.first_step_timeout=20"]
    configs = [
        load_config(settings, [*common, f"--run.dir={folder}/{{name}}", f"--run.name={name}"])
        for name in (f"calm-{seed}", f"disturbed-{seed}")
    ]
    run_world(1, train.run, configs[0])
    report = disturb(configs[1], seed)
    report.same = outcome(configs[0]) == outcome(configs[1])
    return report


def main() -> int:
    """Go through trainings of other seeds until the time is up; gives 1 if one was not the same."""
    parser = argparse.ArgumentParser(description="Disturb trainings for a while.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, default=600, help="of each training")
    parser.add_argument("--seed", type=int, default=1, help="of the first training")
    parser.add_argument("--out", type=Path, help="where the result is written, as JSON")
    arguments = parser.parse_args()
    begun, reports = time.monotonic(), list[Report]()
    with tempfile.TemporaryDirectory() as folder:
        settings = write_settings(write_text(Path(folder)))
        while time.monotonic() - begun < 60 * arguments.minutes and all(r.same for r in reports):
            seed = arguments.seed + len(reports)
            reports.append(chaotic(settings, Path(folder), seed, arguments.steps))
            print(f"{time.monotonic() - begun:6.0f} s  {reports[-1]}", flush=True)
    result = {
        "command": " ".join(["python", "tests/chaos.py", *sys.argv[1:]]),
        "commit": subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], text=True
        ).strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}",
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "trainings": len(reports),
        "attempts": sum(report.attempts for report in reports),
        "disturbances": sum((report.disturbances for report in reports), Counter[str]()),
        "checkpoints_verified": sum(report.checkpoints_verified for report in reports),
        "slowest_end_seconds": round(max(report.slowest_end for report in reports), 1),
        "all_the_same": all(report.same for report in reports),
        "each": [vars(report) for report in reports],
    }
    text = json.dumps(result, indent=1) + "\n"
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    print(text)
    return 0 if result["all_the_same"] else 1


if __name__ == "__main__":
    sys.exit(main())
