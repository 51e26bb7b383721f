"""Peers: the other ranks of a run, seen by the files that their heartbeats write."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself in its file.

    Attributes:
        attempt: number of this start of the run; files of another attempt count for nothing.
        rank: who.
        host: its machine's name, for people.
        machine: what `here` gives there; only there can its process be looked for.
        process: its id there.
        started: when that process started, in ticks since its machine did; 0 if unknown.
        beats: how often the file was written, a sign of life.
        step: where it is.
        moves: how often it moved since that step began.
        phase: what it does there.
        since: when it moved last, in seconds since 1970.
        time: when this was written, likewise.
        ended: whether it has left.
        why: what ended it, if it did not end well.
    """

    attempt: int
    rank: int
    host: str
    machine: str | None
    process: int
    started: int
    beats: int
    step: int
    moves: int
    phase: str
    since: float
    time: float
    ended: bool
    why: str

    @property
    def name(self) -> str:
        """Rank, machine and process, for people."""
        return f"rank {self.rank} on {self.host} (process {self.process})"

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return f"step {self.step}, {self.phase}"


def read_sign(folder: Path, rank: int) -> Sign | None:
    """Read a rank's file; None if there is none or it is half written."""
    try:
        return Sign(**json.loads((folder / f"rank-{rank}.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


@dataclass
class Peer:
    """Another rank as this one sees it, on a clock of this one.

    Attributes:
        sign: what its file said last.
        beaten: when it was seen to beat last.
        moved: when it was seen to move last.
    """

    sign: Sign
    beaten: float
    moved: float

    @property
    def state(self) -> str:
        """What became of it: ended, gone, stopped or blocked; silent if that is not known here."""
        if self.sign.ended:
            return "ended"
        if self.sign.machine is None or self.sign.machine != here() or not self.sign.started:
            return "silent"
        started, state = process_state(self.sign.process)
        if started != self.sign.started or state in "ZX":
            return "gone"
        return "stopped" if state in "Tt" else "blocked"

    def describe(self, now: float) -> str:
        """Say in a sentence that it does not beat any more, and where it was."""
        silence = f"gave no sign of life for {now - self.beaten:.0f} s"
        what = {
            "ended": "has ended",
            "gone": "is gone",
            "stopped": f"{silence}: it is stopped",
            "blocked": f"{silence}, though its process runs",
            "silent": f"{silence}: it is stopped or its machine is gone",
        }[self.state]
        return f"{self.sign.name} {what}; it was last at {self.sign.place}"


class Peers:
    """The other ranks, by their files; reads are compared with earlier reads."""

    def __init__(self, folder: Path, rank: int, size: int, attempt: int) -> None:
        self.seen: dict[int, Peer] = {}
        self._folder, self._attempt = folder, attempt
        self._ranks = [other for other in range(size) if other != rank]

    def look(self, now: float) -> None:
        """Read every rank's file."""
        for rank in self._ranks:
            sign = read_sign(self._folder, rank)
            if sign is None or sign.attempt != self._attempt:
                continue
            peer = self.seen.setdefault(rank, Peer(sign, now, now))
            if (sign.step, sign.moves) != (peer.sign.step, peer.sign.moves):
                peer.moved = now
            if sign.beats != peer.sign.beats:
                peer.beaten = now
            peer.sign = sign

    @property
    def moved(self) -> float:
        """When any of them was seen to move last; 0 if there is none."""
        return max((peer.moved for peer in self.seen.values()), default=0.0)

    @property
    def missing(self) -> list[int]:
        """Ranks that have written nothing yet in this start."""
        return [rank for rank in self._ranks if rank not in self.seen]

    def silent(self, now: float, seconds: float) -> list[Peer]:
        """Give those that have not beaten for so long."""
        return [peer for peer in self.seen.values() if now - peer.beaten >= seconds]

    def failure(self) -> str:
        """Say what ended the first of them that failed; "" if none did."""
        return next((peer.sign.why for peer in self.seen.values() if peer.sign.why), "")


def process_state(process: int) -> tuple[int, str]:
    """Give a process's start, in ticks since its machine's, and its state's letter; or 0 and X.

    Together with its id the start tells a process from a later one of the same id. Linux only.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0, "X"
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return int(fields[19]), fields[0]


def here() -> str | None:
    """Name the machine's boot and the namespace of process ids, if the system has these."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
