"""When to stop: signals to one flag, and the end of the time limit.

All ranks agree on both once a step, in train.py.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
RESERVE_SECONDS = 10.0


def is_ignored(number: signal.Signals) -> bool:
    """Whether whoever started this process had it ignore a signal, as nohup does with SIGHUP."""
    return signal.getsignal(number) is signal.SIG_IGN


class StopSignal:
    """Remember that somebody asked this process to stop; SLURM, torchrun or a person at Ctrl-C.

    A context manager, entered before data is read. The handler only sets a flag: it may run at any
    moment, so it does no I/O and no collective. Forked children are left alone.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._process = os.getpid()
        self._previous: dict[signal.Signals, object] = {}

    @property
    def reason(self) -> str:
        """Name the signal that was received, or nothing."""
        return "" if self.received is None else signal.Signals(self.received).name

    def exit_code(self, environ: Mapping[str, str] = os.environ) -> int:
        """Give the code with which a rank leaves a training that is not over.

        It is 0, unless torchrun may start ranks again and this one was not told itself. Then it
        leaves because a rank of another node does: torchrun would take a 0 for the end of the
        training, and 1 lets it go on with the nodes that are left.
        """
        may_restart = int(environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0
        return 1 if may_restart and self.received is None else 0

    def __enter__(self) -> "StopSignal":
        heeded = [s for s in STOP_SIGNALS if s != signal.SIGHUP or not is_ignored(s)]
        self._previous = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave us

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = number if os.getpid() == self._process else self.received


def seconds_of(limit: float | str) -> float:
    """Read a time limit: seconds, "HH:MM:SS" or "D-HH:MM:SS", as SLURM writes it.

    Raises:
        ValueError: if it is none of these, or not over 0.
    """
    text = str(limit)
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):([0-5]\d):)?(\d+(?:\.\d*)?)", text, re.ASCII)
    days, hours, minutes, seconds = found.groups(default="0") if found else "0000"
    total = 86400 * int(days) + 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    if total <= 0 or (":" in text and float(seconds) >= 60):
        raise ValueError(
            f"{limit!r} is no time limit; it is seconds, like 3600, or hours, minutes and seconds, "
            f'like "12:00:00", with days before them, if there are any, like "1-12:00:00"'
        )
    return total


class Deadline:
    """The moment at which this process will be ended, and how long before it must leave.

    One more step and two saves must fit in before it, since one may be in flight when the last is
    wanted. They may take as long as the longest so far, and `RESERVE_SECONDS` on top: for leaving,
    and for what was never measured.

    Args:
        time_limit: what `seconds_of` reads, counted from now; if None, the end of the SLURM job
            counts, from SLURM_JOB_END_TIME, and without one there is no deadline.
        clock: seconds since 1970.
        environ: where SLURM's variable is looked for.

    Raises:
        ValueError: if the time limit cannot be read.
    """

    def __init__(
        self,
        time_limit: float | str | None,
        clock: Callable[[], float] = time.time,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._clock = clock
        self._longest_step = self._longest_save = 0.0
        now = clock()
        if time_limit is not None:
            self._end, self.reason = now + seconds_of(time_limit), "run.time_limit"
        else:
            end = environ.get("SLURM_JOB_END_TIME", "")
            self._end, self.reason = float(end) if end.isdecimal() else 0.0, "the job's time limit"
            if self._end <= now:  # the limit of a job that runs on was raised; nothing says to when
                self._end = float("inf")

    def note_step(self, seconds: float) -> None:
        """Remember what a step took, waiting included; not the first, which may compile."""
        self._longest_step = max(self._longest_step, seconds)

    def note_save(self, seconds: float) -> None:
        """Remember what a save took, until it was on disk."""
        self._longest_save = max(self._longest_save, seconds)

    @property
    def margin(self) -> float:
        """Seconds before the end at which there is no time for another step."""
        return self._longest_step + 2 * self._longest_save + RESERVE_SECONDS

    def is_near(self) -> bool:
        """Whether to save and leave now."""
        return self._clock() >= self._end - self.margin
