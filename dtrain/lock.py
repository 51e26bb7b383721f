"""RunLock: one training at a time in a run directory, on whatever machine it runs.

`RUN/lock.json` says who holds it, and its time of change is the holder's last sign of life: a
thread touches it every few seconds. Who finds a lock takes it over when its process is gone, when
it was the same SLURM job before a requeue, or when there was no sign of life for a minute.

The file appears by a hard link and is replaced by a rename, which are atomic on network file
systems too. Ages are differences of two times that the file server set: clocks need not agree.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dtrain.errors import UserError
from dtrain.peers import here, process_state
from dtrain.preemption import StopSignal

FILE = "lock.json"
BEAT_SECONDS = 2.0
STALE_SECONDS = 60.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Holder:
    """The training that holds a run directory.

    Attributes:
        token: told apart from all others by it.
        host: where it runs, for people.
        place: its machine's boot and process namespace; only there can its process be looked for.
        process: id of its rank 0.
        started: when that process did, in clock ticks since boot.
        job: of SLURM, if it runs in one.
        restart: how often SLURM had requeued that job.
        time: when it took the lock, in Unix seconds.
    """

    token: str
    host: str
    place: str | None
    process: int
    started: int
    job: str | None
    restart: int
    time: float

    @classmethod
    def myself(cls, environ: Mapping[str, str] = os.environ) -> "Holder":
        """Describe this process."""
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            place=here(),
            process=os.getpid(),
            started=process_state(os.getpid())[0],
            job=environ.get("SLURM_JOB_ID"),
            restart=int(environ.get("SLURM_RESTART_COUNT") or 0),
            time=time.time(),
        )

    @property
    def is_gone(self) -> bool:
        """Whether its process ended, as far as this process can tell; a zombie has ended."""
        if self.place is None or self.place != here():
            return False
        started, state = process_state(self.process)
        return started != self.started or state in "ZX"

    def describe(self) -> str:
        """Name host, process and job."""
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host}{job}"


class RunLock:
    """Holds a run directory for one training; a context manager for rank 0.

    Attributes:
        folder: the run directory; made if it is not there.
        myself: this training, as others see it.
        lost: whether another training took the lock over, so that this one must write no more.
        notice: what to tell the user of a lock that was taken over; empty if there was none.
        last_beat: last sign of life of the training that held it before, in Unix seconds.
    """

    def __init__(
        self, folder: Path, stop: StopSignal | None = None, environ: Mapping[str, str] = os.environ
    ) -> None:
        self.folder = folder
        self.lost = False
        self.notice = ""
        self.last_beat: float | None = None
        self._stop = stop
        self._file = folder / FILE
        self.myself = Holder.myself(environ)
        self._own = folder / f".{FILE}.{self.myself.token}"
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)

    def __enter__(self) -> "RunLock":
        """Take the lock, and keep it alive from a thread of its own.

        Raises:
            UserError: if another training holds it, or the directory cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._own, self.myself)
            try:
                while not self._take():
                    pass
            finally:
                self._own.unlink()
        except OSError as error:
            raise UserError(f"cannot lock the run directory {self.folder}: {error}") from None
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join()
        with suppress(OSError):
            if self.beat():
                self._file.unlink()

    def beat(self) -> bool:
        """Give a sign of life, if the lock is still this training's; says whether it is."""
        with suppress(OSError):  # the file server may be away for a while
            found = read_holder(self.folder)
            if found is None or found.token != self.myself.token:
                self.lost = True
            if not self.lost:
                os.utime(self._file)
        return not self.lost

    def _keep_beating(self) -> None:
        while not self._released.wait(BEAT_SECONDS) and self.beat():
            pass

    def _take(self) -> bool:
        """Try to take the lock, or a dead holder's place; False if others moved meanwhile.

        Only one can be first to link `after-TOKEN`, and so succeed the holder of that token. Until
        it renames that over the lock nobody else replaces it. Who dies in between is succeeded in
        the same way.
        """
        self.last_beat, self.notice = None, ""
        spot, dead = self._file, list[Holder]()
        while not _link(self._own, spot):
            try:
                holder = _read(spot)
                self.last_beat, why = self._watch(spot, holder)
            except FileNotFoundError:
                return False
            dead.append(holder)
            self.notice = f"{self.folder} is taken over from {holder.describe()}: {why}"
            spot = self.folder / f".{FILE}.after-{holder.token}"
        if not dead:
            return True
        found = read_holder(self.folder)
        if found != dead[0]:
            spot.unlink()
            return False
        spot.rename(self._file)
        for holder in dead:
            (self.folder / f".{FILE}.after-{holder.token}").unlink(missing_ok=True)
        return True

    def _watch(self, spot: Path, holder: Holder) -> tuple[float, str]:
        """Find out whether a holder is dead; gives its last beat, and how that is known.

        If neither its process nor its job tells, it lives if it beats, and is dead after a minute.

        Raises:
            UserError: if it lives.
            FileNotFoundError: if it gave the lock back.
        """
        requeued = holder.job == self.myself.job is not None
        requeued = requeued and holder.restart < self.myself.restart
        first_beat = _changed(spot)
        while True:
            last_beat = _changed(spot)
            os.utime(self._own)
            silence = _changed(self._own) - last_beat
            if holder.is_gone:
                return last_beat, "its process is gone"
            if requeued:
                return last_beat, "SLURM has started its job anew since"
            if silence > STALE_SECONDS:
                return last_beat, f"no sign of life for {silence:.0f} s"
            if last_beat != first_beat:
                raise UserError(
                    f"{self.folder} is being trained by {holder.describe()}, last seen alive "
                    f"{max(0, silence):.0f} s ago; wait for it or stop it, or start another run "
                    f"with --run.name=NAME"
                )
            if self._stop is not None and self._stop.received is not None:
                raise UserError(
                    f"stopped by {self._stop.reason} while waiting to see whether "
                    f"{holder.describe()} still trains in {self.folder}"
                )
            time.sleep(POLL_SECONDS)


def read_holder(folder: Path) -> Holder | None:
    """Read who holds a run directory, dead or alive; None if nobody does."""
    try:
        return _read(folder / FILE)
    except FileNotFoundError:
        return None


def silence_of_holder(folder: Path) -> float | None:
    """Give the seconds since the holder's last beat, by this machine's clock; None without one."""
    try:
        return max(0.0, time.time() - _changed(folder / FILE))
    except FileNotFoundError:
        return None


def _write(path: Path, holder: Holder) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(holder), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> Holder:
    """Read a holder; one that nobody knows anything of if the file is damaged."""
    text = path.read_text(encoding="utf-8")
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return Holder("damaged", "an unknown host", None, 0, 0, None, 0, 0.0)


def _link(own: Path, spot: Path) -> bool:
    """Let a file appear under another name; says whether it did, or there was one already."""
    try:
        os.link(own, spot)
    except FileExistsError:
        # An answer that was lost on the way is asked for again: it may have been this link.
        return spot.exists() and spot.samefile(own)
    return True


def _changed(path: Path) -> float:
    """Give a file's time of change; opened first, since that asks the file server anew."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime
