"""Signals to one flag; all ranks agree on it once a step, in train.py."""

import os
import signal
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


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

    def __enter__(self) -> "StopSignal":
        heeded = [s for s in STOP_SIGNALS if s != signal.SIGHUP or not is_ignored(s)]
        self._previous = {number: signal.signal(number, self._handle) for number in heeded}
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
