"""Heartbeat: ranks show that they move; when none does any more, all end and name who hangs.

Every rank has a thread that writes `RUN/heartbeats/rank-N.json`. While its own rank moves it does
nothing else. While its rank stands still it reads the other ranks' files: somebody who moves is
worth waiting for, however long. Files are compared with what they said before, never with this
machine's clock.
"""

import contextlib
import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from dtrain.peers import Peer, Peers, Sign, here, process_state
from dtrain.rank_log import RankLog

BEAT_SECONDS = 1.0
FILES_PER_SECOND = 64  # by all ranks of a run together: beyond that each beats more rarely
RECORD_BYTES = 4096
PHASE_CHARACTERS = 64
REASON_CHARACTERS = 1000
SILENCE_SECONDS = 3.0
LONG_SILENCE_SECONDS = 30.0  # of a rank on another machine, whose files may come late
ENDING_SECONDS = 10.0
NUM_NAMED = 3
STDERR = 2


class Heartbeat:
    """Show where this rank is, watch whether the ranks move, and end this process if they do not.

    A context manager. A rank is stuck if neither it nor any other rank has moved for `timeout`
    seconds, or if it waits and another rank is dead. Then it writes one message, naming who is to
    blame, and all its threads' stacks to stderr and to its log, calls `on_stuck`, and leaves with
    exit code 1. The main thread may wait in C meanwhile, for a device or the network. A rank whose
    interpreter itself is blocked cannot do that; it falls silent, and the others name it. Time in
    which this process was suspended does not count.

    Args:
        folder: `RUN/heartbeats`, made if it is not there.
        rank: of this process.
        size: number of ranks.
        timeout: seconds; may be set anew at any time, as `heartbeat.timeout`.
        attempt: number of this start of the run, the same on all ranks.
        log: of this rank.
        on_stuck: gets the message, in the watching thread, before the process ends.

    Raises:
        OSError: on entry, if the file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        timeout: float,
        *,
        attempt: int,
        log: RankLog,
        on_stuck: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.timeout = timeout
        self._folder, self._rank, self._size = folder, rank, size
        self._path = folder / f"rank-{rank}.json"
        self._attempt, self._log, self._on_stuck = attempt, log, on_stuck
        self._interval = max(BEAT_SECONDS, size / FILES_PER_SECOND)
        self._place = (0, 0, "starting")
        self._why, self._ended = "", False
        self._beats, self._since = 0, time.time()
        self._started = process_state(os.getpid())[0]
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")

    def __enter__(self) -> "Heartbeat":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._left.set()
        self._thread.join()
        self._ended = True
        if error is not None and not self._why:
            place = self._sign().place
            self._why = f"{self._sign().name} failed at {place}: {type(error).__name__}: {error}"
        self._try_to_write()

    def at(self, step: int, phase: str) -> None:
        """Say that this rank moves: at each phase and each bit of progress; costs nothing much."""
        last, moves, _ = self._place
        self._place = (step, moves + 1 if step == last else 0, phase)

    def lost_peer(self) -> str:
        """Find out why a collective failed: gives a sentence that names who is gone, and where.

        Called by the main thread. It takes up to three seconds (longer beyond 64 ranks), since a
        rank is taken for gone if it gives no sign of life. The others are told in this rank's file.

        Returns:
            "" if all other ranks are alive, or there are none.
        """
        if self._size == 1:
            return ""
        step, _, phase = self._place
        peers = Peers(self._folder, self._rank, self._size, self._attempt)
        patience = max(SILENCE_SECONDS, 2.5 * self._interval)
        begun = now = time.monotonic()
        while now - begun <= patience:
            peers.look(now)
            silent = peers.silent(now, 1.5 * self._interval)
            gone = [peer.describe(now) for peer in silent if peer.state in ("gone", "ended")]
            self._why = peers.failure() or _sentence(gone)
            if self._why:
                return self._why
            self.at(step, phase)  # to look is to move: the thread shall not end this rank meanwhile
            time.sleep(self._interval / 10)
            now = time.monotonic()
        missing = [f"rank {rank} has given no sign of life in this start" for rank in peers.missing]
        silent = peers.silent(now, patience - self._interval / 2)
        self._why = _sentence([*missing, *(peer.describe(now) for peer in silent)])
        return self._why

    def _watch(self) -> None:
        """Beat until the context is left; the clock stands still while this process does."""
        peers = Peers(self._folder, self._rank, self._size, self._attempt)
        clock, last = 0.0, time.monotonic()
        place, moved = self._place, 0.0
        while not self._left.wait(self._interval):
            now = time.monotonic()
            clock, last = clock + min(now - last, 2 * self._interval), now
            if self._place != place:
                place, moved, self._since = self._place, clock, time.time()
            if not self._try_to_write():
                continue  # the others may be as unable to: their silence says nothing
            if moved < clock:
                peers.look(clock)
                self._judge(peers, clock, clock - moved)

    def _judge(self, peers: Peers, now: float, still: float) -> None:
        """End this process if nothing moves, or if another rank has failed and left it waiting.

        Args:
            peers: as seen now.
            now: on the clock by which they were seen.
            still: seconds since this rank moved.
        """
        failure = peers.failure() or _sentence(
            peer.describe(now) for peer in self._dead(peers, now)
        )
        if failure and not self._why and still >= SILENCE_SECONDS:
            self._end(f"waited {still:.0f} s for others; {failure}", failure)
        elif still >= self.timeout and now - peers.moved >= self.timeout:
            blame = self._blame(peers, now)
            self._end(f"nothing has moved for {still:.0f} s; {blame}", blame)

    def _dead(self, peers: Peers, now: float) -> list[Peer]:
        """List ranks that cannot come back: their process is gone, or nothing was heard for long.

        One that is stopped, or whose interpreter is blocked, has until the time-out.
        """
        gone = [p for p in peers.silent(now, SILENCE_SECONDS) if p.state == "gone"]
        lost = peers.silent(now, LONG_SILENCE_SECONDS + self._interval)
        return [*gone, *(peer for peer in lost if peer.state == "silent")]

    def _blame(self, peers: Peers, now: float) -> str:
        """Say who is to blame for a standstill: the silent, those behind, or nobody."""
        silent = peers.silent(now, SILENCE_SECONDS + self._interval)
        missing = [f"rank {rank} has not begun" for rank in peers.missing]
        if missing or silent:
            return _sentence([*missing, *(peer.describe(now) for peer in silent)])
        signs = sorted(
            [self._sign(), *(peer.sign for peer in peers.seen.values())],
            key=lambda sign: (sign.step, sign.moves, sign.rank),
        )
        first, last = signs[0], signs[-1]
        if (first.step, first.moves) == (last.step, last.moves):
            wait = f"{first.name} hangs" if self._size == 1 else f"all {self._size} ranks wait"
            return f"{wait} at {first.place}; the stacks in logs/ tell for what"
        behind = [s for s in signs if (s.step, s.moves) == (first.step, first.moves)]
        hang = _sentence(f"{sign.name} hangs at {sign.place}" for sign in behind)
        return f"{hang}; others wait for it at {last.place}"

    def _end(self, message: str, why: str) -> None:
        """Say why, show the stacks, leave. Whatever of that hangs or fails, the process ends."""
        faulthandler.dump_traceback_later(ENDING_SECONDS, exit=True, file=self._log.file)
        try:
            self._why, self._ended = why, True
            self._try_to_write()
            self._say(f"rank {self._rank}: {message}")
            self._on_stuck(message)
            # The first to leave has the launcher end the others, which have stacks to show too.
            time.sleep(self._interval)
            sys.stdout.flush()
        except Exception as error:
            self._log.note_exception(error)
        finally:
            os._exit(1)

    def _say(self, message: str) -> None:
        self._log.note(message)
        faulthandler.dump_traceback(self._log.file, all_threads=True)
        with contextlib.suppress(OSError):  # there may be nobody to read stderr
            os.write(STDERR, f"dtrain: {message}\n".encode())
            faulthandler.dump_traceback(STDERR, all_threads=True)

    def _sign(self) -> Sign:
        step, moves, phase = self._place
        return Sign(
            attempt=self._attempt,
            rank=self._rank,
            host=platform.node(),
            machine=here(),
            process=os.getpid(),
            started=self._started,
            beats=self._beats,
            step=step,
            moves=moves,
            phase=phase[:PHASE_CHARACTERS],
            since=self._since,
            time=time.time(),
            ended=self._ended,
            why=self._why[:REASON_CHARACTERS],
        )

    def _write(self) -> None:
        """Write this rank's file over itself, always as long: so a full disk does not matter."""
        self._beats += 1
        record = json.dumps(asdict(self._sign())).encode().ljust(RECORD_BYTES)
        # Opened each time, since a network file system shows a file to others once it is closed.
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, record, 0)
        finally:
            os.close(file)

    def _try_to_write(self) -> bool:
        try:
            self._write()
        except OSError:
            return False
        return True


def _sentence(parts: Iterable[str]) -> str:
    """Join what is said of several ranks; the first few stand for many."""
    named = list(parts)
    more = [f"{len(named) - NUM_NAMED} more ranks likewise"] if len(named) > NUM_NAMED else []
    return "; ".join(named[:NUM_NAMED] + more)
