"""RankLog: `RUN/logs/rank-N.log`, what one rank has to say, whoever keeps its stderr."""

import contextlib
import faulthandler
import os
import platform
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import TextIO

from dtrain.errors import UserError


class RankLog:
    """Keep a rank's warnings, its last exception and the stacks of a crash, attempt after attempt.

    A context manager; an exception that leaves it is written down. Warnings go on to appear on
    stderr. Python's stacks at a SIGSEGV, SIGFPE, SIGABRT, SIGBUS or SIGILL go to the log alone.

    Args:
        folder: `RUN/logs`, made if it is not there.
        rank: of this process.
        attempt: number of this start of the run, from 1.

    Raises:
        OSError: on entry, if the file cannot be opened.
    """

    def __init__(self, folder: Path, rank: int, attempt: int) -> None:
        self.path = folder / f"rank-{rank}.log"
        self._attempt = attempt

    def __enter__(self) -> "RankLog":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("ab", buffering=0)
        self.note(f"attempt {self._attempt} on {platform.node()}, process {os.getpid()}")
        self._had_fault_handler = faulthandler.is_enabled()
        faulthandler.enable(self.file)
        self._show_warning = warnings.showwarning
        warnings.showwarning = self._note_warning
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self.note_exception(error)
        warnings.showwarning = self._show_warning
        faulthandler.disable()
        if self._had_fault_handler and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)
        self.file.close()

    def note(self, text: str) -> None:
        """Write a line, or several, with the time."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        with contextlib.suppress(OSError):  # a full disk must not end a run that survives it
            self.file.write(line.encode(errors="backslashreplace"))

    def note_exception(self, error: BaseException) -> None:
        """Write an exception down, with its traceback unless it is a user's mistake."""
        if isinstance(error, UserError | SystemExit):
            self.note(f"{type(error).__name__}: {error}")
        else:
            self.note("".join(traceback.format_exception(error)).rstrip())

    def _note_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        self.note(warnings.formatwarning(message, category, filename, lineno, line).rstrip())
        self._show_warning(message, category, filename, lineno, file, line)
