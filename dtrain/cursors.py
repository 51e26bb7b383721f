"""Cursors: where each window of the plan began, so that any step can be found again at once.

A line of `cursors.jsonl` says at which cursor a step begins, one line for each window, that of the
first step that begins in it: `{"step": 812, "epoch": 1, "window": 0, "offset": 3}`. To reach a step
is to pack the window that it lies in, and none before. The start of a run, step 1 at the first
cursor, needs no line.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from dtrain.data.plan import Cursor

CURSORS = "cursors.jsonl"
START = 1, Cursor()
"""The step and the cursor that every run begins with."""


class Cursors:
    """Writes a run's `cursors.jsonl`; rank 0 holds one.

    The lines follow from the plan alone: however often a run is stopped and goes on, each stands
    there once, and a step done again finds its line as it was.
    """

    def __init__(
        self, path: Path, step: int, cursor: Cursor, complain: Callable[[str], None]
    ) -> None:
        """Go on writing, behind the lines up to this step.

        Args:
            path: of the file; made when there is something to write.
            step: the next one to run. Lines of later steps are cut off, as is a damaged one.
            cursor: where it begins.
            complain: is told, once, if the file cannot be written. The training goes on.
        """
        self._path, self._complain = path, complain
        self._broken = False
        self._size, self._window = 0, _window(START[1])
        try:
            for line in _lines(path):
                begun = _parse(line)
                if begun is None or begun[0] > step:
                    break
                self._size += len(line)
                self._window = _window(begun[1])
            if path.exists() and path.stat().st_size > self._size:
                with path.open("ab") as file:
                    file.truncate(self._size)
        except OSError as error:
            self._fail(error)
        self.note(step, cursor)  # writes only if lines were lost

    def note(self, step: int, cursor: Cursor) -> None:
        """Take in where a step begins; call it for each in turn. Only a new window costs time.

        Args:
            step: the next one to run.
            cursor: where it begins.
        """
        if _window(cursor) == self._window:
            return
        self._window = _window(cursor)
        line = json.dumps({"step": step, **asdict(cursor)}).encode() + b"\n"
        try:
            with self._path.open("ab") as file:
                if file.tell() > self._size:  # what a full disk left of an earlier line
                    file.truncate(self._size)
                file.write(line)
            self._size += len(line)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._broken:
            self._complain(
                f"warning: cannot write {self._path} ({error}); `dtrain inspect` may need longer "
                f"to find a step"
            )
        self._broken = True


def find(path: Path, step: int) -> tuple[int, Cursor]:
    """Find the last known cursor at or before the beginning of a step, to count on from there.

    Args:
        path: of `cursors.jsonl`; a missing, half-written or damaged one knows less.
        step: from 1.

    Returns:
        A step that is not after the one asked for, and where it begins.
    """
    known = (begun for line in _lines(path) if (begun := _parse(line)) and begun[0] <= step)
    return max(known, key=lambda begun: begun[0], default=START)


def _window(cursor: Cursor) -> tuple[int, int]:
    return cursor.epoch, cursor.window


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        return


def _parse(line: bytes) -> tuple[int, Cursor] | None:
    """Read a line; None if a kill, a full disk or a flipped bit left it damaged."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else {}
        step, *place = (int(values[key]) for key in ("step", "epoch", "window", "offset"))
    except (ValueError, KeyError, TypeError):
        return None
    return step, Cursor(*place)
