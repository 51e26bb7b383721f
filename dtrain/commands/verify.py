"""`dtrain verify`: check a run's checkpoints and prepared data, without changing anything."""

import argparse
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.config import Config

OURS = re.compile(r"(step|average)-(\d+).*")
CORRUPT = ".corrupt"


@dataclass(frozen=True)
class Verified:
    """A checkpoint and what is wrong with it.

    Attributes:
        path: its directory.
        problem: what is wrong; empty if it is whole.
        size: bytes of its files.
        age: seconds since it was written.
        score: of its validation; minus infinity if it was not judged.
        is_next: whether a training that is started now goes on from it.
    """

    path: Path
    problem: str
    size: int
    age: float
    score: float
    is_next: bool

    @property
    def is_set_aside(self) -> bool:
        """Whether a start of the training found it damaged, and renamed it."""
        return self.path.name.endswith(CORRUPT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, e.g. runs/demo")
    parser.epilog = (
        "The exit code is 1 if a checkpoint or the prepared data is not whole, or if no checkpoint "
        "is left to go on from. Those that were set aside as NAME.corrupt are shown, but do not "
        "count as long as there is one. Missing prepared data is made again by the next start."
    )


def main(arguments: argparse.Namespace) -> int:
    """Print a line for each checkpoint, one for the data; gives 1 if a user should know of it."""
    from dtrain.run_directory import RunDirectory

    run = RunDirectory.existing(arguments.run)
    found = examine(run.checkpoints)
    print(table(found) if found else f"there is no checkpoint in {run.checkpoints} yet")
    damaged = any(one.problem and not one.is_set_aside for one in found)
    damaged |= bool(found and not any(one.is_next for one in found))
    data_is_whole, line = examine_data(run.config)
    print(line)
    return int(damaged or not data_is_whole)


def examine_data(config: "Config") -> tuple[bool, str]:
    """Hash a run's prepared data again; says whether all that is there is whole, in a line too."""
    from dtrain.data.preparation import is_prepared, prepared_directory
    from dtrain.data.store import PreparedData
    from dtrain.errors import UserError

    key = config.data, config.vocabulary
    try:
        directory = prepared_directory(*key, config.vocabulary_of)
    except UserError as error:  # the text is gone, and with it the name
        return True, f"prepared data  not looked for: {error}"
    try:
        if not is_prepared(*key, directory, config.vocabulary_of):
            return True, f"prepared data  {directory}: not there; the next start makes it again"
        data = PreparedData.open(directory)
        data.verify()
    except (UserError, OSError) as error:
        return False, f"prepared data  {error}"
    size = sum(record.size for record in data.manifest.files.values()) / 2**20
    return True, f"prepared data  {directory}: whole, {size:,.1f} MiB"


def examine(folder: Path) -> list[Verified]:
    """Verify what lies in a run's `checkpoints` directory, in the order of its names.

    Other directories than dtrain's are left out, and those that vanish meanwhile because a training
    deletes old checkpoints.
    """
    from dtrain import checkpoint

    paths = sorted(p for p in folder.glob("*") if p.is_dir() and OURS.fullmatch(p.name))
    problems = {path: _problem(path) for path in paths}
    steps = checkpoint.steps_saved(folder)
    next_one = next((path for path in steps if not problems.get(path, "it is new")), None)
    found = []
    for path in paths:
        try:
            size = sum(file.stat().st_size for file in path.rglob("*"))
            written = min((file.stat().st_mtime for file in path.rglob("*")), default=time.time())
        except FileNotFoundError:
            continue
        score, age = checkpoint.score(path), time.time() - written
        found.append(Verified(path, problems[path], size, age, score, path == next_one))
    return [one for one in found if one.path.exists()]


def table(found: Iterable[Verified]) -> str:
    """Lay the checkpoints out for reading."""
    rows = [("checkpoint", "step", "MiB", "age", "score", "verdict")]
    for one in found:
        match = OURS.fullmatch(one.path.name)
        step = str(int(match[2])) if match else ""
        score = f"{one.score:.2f}" if one.score > float("-inf") else ""
        size = f"{one.size / 2**20:,.1f}"
        rows.append((one.path.name, step, size, _age(one.age), score, _verdict(one)))
    return _aligned(rows)


def _verdict(one: Verified) -> str:
    if one.is_set_aside:
        return f"set aside: {one.problem or 'but it is whole now'}"
    return one.problem or ("whole; a start goes on from here" if one.is_next else "whole")


def _problem(path: Path) -> str:
    from dtrain import checkpoint

    try:
        problem = checkpoint.verify(path)
        if not problem:
            checkpoint.read_state(path)
    except checkpoint.CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error}"
    return problem


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align columns, figures to the right, names and verdicts to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, len(widths) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
