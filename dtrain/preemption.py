"""Signals to one flag; all ranks agree on it once a step, in train.py."""

import os
import signal
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


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

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave us

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = number if os.getpid() == self._process else self.received
