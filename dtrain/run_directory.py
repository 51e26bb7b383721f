"""RunDirectory: a directory that a training owns; its settings, its status, its attempts."""

import json
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dtrain.checkpoint import step_of, steps_saved
from dtrain.config import Config, changed_settings, load_config
from dtrain.durable import write_json
from dtrain.errors import GiveUpError, UserError, exit_code
from dtrain.lock import RunLock
from dtrain.peers import Sign, read_sign

if TYPE_CHECKING:
    from dtrain.data.vocabulary import Vocabulary

Status = Literal["running", "completed", "preempted", "failed"]


@dataclass
class Attempt:
    """One start of a run.

    Attributes:
        time: when it began, in Unix seconds.
        step: the step it went on from, 0 at the beginning.
        world_size: number of ranks.
        host: of rank 0.
        job: of SLURM, if it ran in one.
        restart: how often SLURM had requeued that job.
        allowed: what `--allow-changed` accepted.
        ended: when it ended, in Unix seconds; None if it runs, or nobody noted its end yet.
        end_step: how far it came.
        status: how it ended.
        exit_code: of rank 0; None if it was killed.
        why: the same in words.
    """

    time: float
    step: int
    world_size: int
    host: str = ""
    job: str | None = None
    restart: int = 0
    allowed: tuple[str, ...] = ()
    ended: float | None = None
    end_step: int | None = None
    status: Literal["completed", "preempted", "failed", "killed"] | None = None
    exit_code: int | None = None
    why: str = ""


class RunDirectory:
    """Paths and small files of `runs/NAME`; only rank 0 writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.heartbeats = path / "heartbeats"
        self.status_file = path / "status.json"
        self.identity_file = path / "run.json"

    @classmethod
    def existing(cls, path: Path) -> "RunDirectory":
        """Open the directory of a training that has begun.

        Raises:
            UserError: if there is none at this path.
        """
        run = cls(path)
        if not run.config_file.exists():
            raise UserError(f"{path} is not a run directory: it has no {run.config_file.name}")
        return run

    def check(self, config: Config, allowed: Collection[str] = ()) -> None:
        """Make sure that a begun run goes on with the settings that it was begun with.

        Args:
            config: the settings to go on with.
            allowed: settings, or sections of them, that may have changed all the same.

        Raises:
            UserError: naming each setting that differs and what to do.
        """
        if not self.config_file.exists():
            return
        changes = changed_settings(self.config, config, allowed)
        if changes:
            flags = [f"--allow-changed {change.partition(':')[0]}" for change in changes]
            raise UserError(
                f"{self.path} was begun with other settings ({'; '.join(changes)}); set them "
                f"back, or start another run with --run.name=NAME, or accept it: {' '.join(flags)}"
            )

    def claim(self, config: Config, vocabulary: "Vocabulary") -> None:
        """Keep the settings, and the vocabulary, so that the run is complete in itself."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.config_file.with_name(".config.yaml")
        temporary.write_text(config.to_yaml(), encoding="utf-8")
        temporary.replace(self.config_file)
        vocabulary.save(self.path)

    @property
    def config(self) -> Config:
        """The settings as the run last used them."""
        return load_config(self.config_file)

    @property
    def step_saved(self) -> int:
        """The step of the newest checkpoint, unverified; 0 without one."""
        saved = steps_saved(self.checkpoints)
        return step_of(saved[0]) if saved else 0

    def write_status(
        self, status: Status, step: int, exit_code: int | None, why: str, *, final: bool = False
    ) -> None:
        """Say where the run stands, for scripts and `dtrain status`.

        Args:
            status: in a word.
            step: the step it stands at.
            exit_code: of rank 0, once it is known.
            why: the status in more words.
            final: whether the same command would fail in the same way.
        """
        value = {"status": status, "step": step, "exit_code": exit_code, "why": why}
        about = {"final": final, "time": time.time(), "process": os.getpid()}
        write_json(self.status_file, value | about)

    def read_status(self) -> dict[str, Any]:
        """Read what `write_status` wrote last; empty if it never did, or a crash spoilt it."""
        try:
            return _read_json(self.status_file)
        except ValueError:
            return {}

    def read_identity(self) -> dict[str, Any]:
        """Read `run.json`: the W&B id and the attempts so far.

        Raises:
            UserError: if it is damaged.
        """
        try:
            return _read_json(self.identity_file)
        except ValueError as error:
            raise UserError(
                f"{self.identity_file} is not JSON ({error}); mend it or move it away"
            ) from None

    def attempts(self) -> list[Attempt]:
        """List the starts of the run, the first one first."""
        known = {field.name for field in fields(Attempt)}
        noted = self.read_identity().get("attempts", [])
        return [Attempt(**{key: a[key] for key in a if key in known}) for a in noted]

    def signs(self, attempt: int) -> list[Sign]:
        """List what the ranks of an attempt said of themselves last, in rank order."""
        names = [path.stem.removeprefix("rank-") for path in self.heartbeats.glob("rank-*.json")]
        ranks = sorted(int(name) for name in names if name.isdecimal())
        signs = [read_sign(self.heartbeats, rank) for rank in ranks]
        return [sign for sign in signs if sign is not None and sign.attempt == attempt]

    @contextmanager
    def attempt(
        self, lock: RunLock, world_size: int, allowed: Collection[str] = ()
    ) -> Iterator[int]:
        """Note that a training begins and, whatever happens inside, how it ended.

        A failure is noted here; other ends are what the last `write_status` said. Nothing is
        written once the lock is lost.

        Args:
            lock: of this run, held.
            world_size: number of ranks.
            allowed: what `--allow-changed` named.

        Yields:
            The attempt's number, from 1.
        """
        number = self._begin(lock, world_size, allowed)
        try:
            yield number
        except BaseException as error:
            if lock.beat():
                self.note_failure(number, error)
            raise
        if lock.beat():
            self._end(number)

    def presume_killed(self, number: int, attempt: Attempt, last_beat: float) -> None:
        """Fill in the end of an attempt that could not note it itself, from what its ranks left.

        Args:
            number: of the attempt.
            attempt: changed in place; nothing is written.
            last_beat: of its lock, in Unix seconds; 0 if there is none.
        """
        signs, status = self.signs(number), self.read_status()
        times = [last_beat, attempt.time, status.get("time", 0.0), *(s.time for s in signs)]
        steps = [attempt.step, status.get("step", 0), *(sign.step for sign in signs)]
        attempt.ended, attempt.end_step = max(times), max(steps)
        attempt.status = "killed"
        attempt.why = next((sign.why for sign in signs if sign.why), "it could not say why")

    def note_start(self, number: int, step: int) -> None:
        """Note the step that an attempt really goes on from."""
        attempts = self.attempts()
        attempts[number - 1].step = step
        self._write_attempts(attempts)

    def note_failure(self, number: int, error: BaseException) -> None:
        """Write the status `failed`, with the step it had last, and the end of the attempt."""
        step = self.read_status().get("step", 0)
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, UserError | GiveUpError):
            why = str(error)
        with suppress(OSError):  # a full disk shall not hide the error
            final = isinstance(error, GiveUpError)
            self.write_status("failed", step, exit_code(error), why, final=final)
            self._end(number)

    def _begin(self, lock: RunLock, world_size: int, allowed: Collection[str]) -> int:
        attempts, me, step = self.attempts(), lock.myself, self.step_saved
        if attempts and attempts[-1].status is None and attempts[-1].host:
            self.presume_killed(len(attempts), attempts[-1], lock.last_beat or 0.0)
        attempt = Attempt(me.time, step, world_size, me.host, me.job, me.restart, tuple(allowed))
        attempts.append(attempt)
        self._write_attempts(attempts)
        self.write_status("running", step, None, f"attempt {len(attempts)} is getting ready")
        return len(attempts)

    def _end(self, number: int) -> None:
        """Note that an attempt ended as the status says."""
        status, attempts = self.read_status(), self.attempts()
        attempt = attempts[number - 1]
        attempt.ended, attempt.end_step = status["time"], status["step"]
        attempt.status, attempt.exit_code = status["status"], status["exit_code"]
        attempt.why = status["why"]
        self._write_attempts(attempts)

    def _write_attempts(self, attempts: list[Attempt]) -> None:
        noted = [asdict(attempt) for attempt in attempts]
        write_json(self.identity_file, self.read_identity() | {"attempts": noted})


def _read_json(path: Path) -> dict[str, Any]:
    """Read a file of one JSON object; empty if there is none."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return value
