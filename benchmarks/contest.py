"""A contest of programs that train: who waits for whom, and what is measured from outside.

Each contestant is a program of its own (`benchmarks/peers/turns.py` says how it speaks), in its own
environment if need be. All are alive at once and take turns of a few steps; the order is reversed
every round. What disturbs the machine for longer than a turn so disturbs all alike, and ratios are
taken round by round. The machine's matrix products are measured in between.
"""

import json
import math
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from benchmarks.peers.turns import Step
from benchmarks.yardstick import ROOT, Shape, busy_seconds, matmul_rate

PEERS = ROOT / "benchmarks" / "peers"
PATIENCE = 900.0  # seconds for a turn, after which a contestant counts as stuck


@dataclass(frozen=True)
class Entry:
    """Who takes part.

    Attributes:
        name: on the command line.
        title: in the tables.
        command: what starts it.
        notes: where its work differs from dtrain's.
        missing: why it cannot take part; "" if it can.
        ranks: processes that are started, as torchrun would, and train together.
        threads: of each process.
    """

    name: str
    title: str
    command: tuple[str, ...]
    notes: str = ""
    missing: str = ""
    ranks: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Turn:
    """What a contestant did in one turn, and what it took.

    Attributes:
        steps: one after the other.
        seconds: by the clock.
        cpu_seconds: work of all cores for the contestant.
        foreign_seconds: work of all cores for anybody else.
        memory_mib: the most that the contestant has held since its start.
    """

    steps: list[Step]
    seconds: float
    cpu_seconds: float
    foreign_seconds: float
    memory_mib: float

    def total(self, name: str) -> float:
        """Add up a number of all steps."""
        return sum(getattr(step, name) for step in self.steps)

    @property
    def rate(self) -> float:
        """Target tokens a second."""
        return self.total("target_tokens") / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Target tokens a second of one core's work; other processes change it less."""
        return self.total("target_tokens") / self.cpu_seconds

    @property
    def foreign_cores(self) -> float:
        """How many cores worked for others meanwhile."""
        return self.foreign_seconds / self.seconds


@dataclass
class Contest:
    """What happened.

    Attributes:
        turns: of each contestant that came through, round by round.
        starts: seconds from launch to the end of its first step.
        failed: why others did not come through.
        products: FLOP/s of each matrix product, round by round.
    """

    turns: dict[str, list[Turn]] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    products: dict[Shape, list[float]] = field(default_factory=dict)


class ContestantError(Exception):
    """A contestant ended, or is stuck."""


class Contestant:
    """A contestant's processes, seen from outside: they do nothing until it is their turn."""

    def __init__(self, processes: Sequence["subprocess.Popen[str]"], errors: IO[str]) -> None:
        self._processes, self._errors = processes, errors

    def turn(self, num_steps: int) -> Turn:
        """Let it run some steps, while all others wait.

        Raises:
            ContestantError: saying what its last words were.
        """
        own, busy, begun = self._work(), busy_seconds(), time.perf_counter()
        for process in self._processes:
            self._send(process, json.dumps({"steps": num_steps}))
        answers = [self._receive(process) for process in self._processes]
        seconds = time.perf_counter() - begun
        own = self._work() - own
        steps = read_answer(answers[0])
        memory = sum(peak_mib(pid) for pid in self._family())
        return Turn(steps, seconds, own, busy_seconds() - busy - own, memory)

    def _send(self, process: "subprocess.Popen[str]", line: str) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(process) from None

    def _receive(self, process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], PATIENCE)[0]:
            raise ContestantError(f"no answer in {PATIENCE:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise self._ended(process)
        return line

    def _ended(self, process: "subprocess.Popen[str]") -> ContestantError:
        code = process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        sys.stderr.write("".join(f"    {line}\n" for line in lines[-20:]))
        return ContestantError(f"ended with {code}: {lines[-1] if lines else 'no word why'}")

    def _family(self) -> list[int]:
        """List its processes, and theirs."""
        found = [process.pid for process in self._processes]
        for pid in found:
            found += children(pid)
        return found

    def _work(self) -> float:
        return sum(worked_seconds(pid) for pid in self._family())


def read_answer(line: str) -> list[Step]:
    """Read what a contestant did.

    Raises:
        ContestantError: if it says something else.
    """
    try:
        return [Step(**step) for step in json.loads(line)["steps"]]
    except (ValueError, KeyError, TypeError):
        raise ContestantError(f"said {line.strip()!r} in place of its steps") from None


@contextmanager
def started(entry: Entry) -> Iterator[Contestant]:
    """Start a contestant's processes, and end them."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        processes = [
            subprocess.Popen(
                entry.command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            for environment in environments(entry)
        ]
        try:
            yield Contestant(processes, errors)
        finally:
            for process in processes:
                end(process)


def end(process: "subprocess.Popen[str]") -> None:
    """End a process by ending its input; by force if that is not enough."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # it has ended already, and left a question unread
        process.stdin.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def environments(entry: Entry) -> Iterator[dict[str, str]]:
    """Give each of its processes its variables, as torchrun would if there are several."""
    common = os.environ | {"OMP_NUM_THREADS": str(entry.threads), "PYTHONWARNINGS": "ignore"}
    if entry.ranks == 1:
        yield common
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(entry.ranks))
    for rank in range(entry.ranks):
        yield common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def compete(entries: Sequence[Entry], shapes: Sequence[Shape], rounds: int, steps: int) -> Contest:
    """Let contestants take turns; what they do before the first round is not counted.

    Args:
        entries: who takes part.
        shapes: matrix products to measure in between, with the threads that torch is set to.
        rounds: in each of which everyone has a turn.
        steps: of a turn.
    """
    contest = Contest(products={shape: [] for shape in shapes})
    with ExitStack() as stack:
        alive: dict[str, Contestant] = {}
        for entry in entries:
            with _survived(contest, entry.name):
                with ExitStack() as once:  # so that all files have been read before
                    launched(entry, once)
                contestant, contest.starts[entry.name] = launched(entry, stack)
                contestant.turn(1)
                alive[entry.name] = contestant
                contest.turns[entry.name] = []
                print(f"{entry.name:20} first step after {contest.starts[entry.name]:6.2f} s")
        for number in range(rounds):
            for shape, rates in contest.products.items():
                rates.append(matmul_rate(shape, torch.float32, torch.device("cpu"), 0.2))
            names = list(contest.turns)
            for name in names if number % 2 == 0 else reversed(names):
                with _survived(contest, name):
                    contest.turns[name].append(alive[name].turn(steps))
                    seconds = contest.turns[name][-1].seconds / steps
                    print(f"round {number + 1}/{rounds} {name:20} {seconds:6.2f} s/step")
    return contest


def launched(entry: Entry, stack: ExitStack) -> tuple[Contestant, float]:
    """Start a contestant; gives it, and the seconds until its first step was done."""
    begun = time.perf_counter()
    contestant = stack.enter_context(started(entry))
    contestant.turn(1)
    return contestant, time.perf_counter() - begun


@contextmanager
def _survived(contest: Contest, name: str) -> Iterator[None]:
    """Take a contestant that fails out of the contest, which goes on."""
    try:
        yield
    except ContestantError as error:
        contest.failed[name] = str(error)
        contest.turns.pop(name, None)
        print(f"{name}: {error}")


def peer_command(name: str, program: str, *arguments: str) -> tuple[tuple[str, ...], str]:
    """Give the command of a peer's program in its own environment, and why there is none.

    Args:
        name: a folder of `benchmarks/peers`.
        program: a file in it.
        arguments: of the program.
    """
    environment = PEERS / name / ".venv"
    command = (str(environment / "bin" / "python"), str(PEERS / name / program), *arguments)
    if (environment / "complete").exists():
        return command, ""
    log = environment / "install.log"
    if log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        why = [line.strip() for line in lines if line.lstrip().lower().startswith("error")]
        return command, f"could not be installed: {why[-1] if why else 'see ' + log.name}"
    return command, f"not installed: benchmarks/peers/install {name}"


# ------------------------------------------------------------------ what Linux knows of a process


def worked_seconds(pid: int) -> float:
    """Give the work of all cores for a process and for those of its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except FileNotFoundError:
        return math.nan
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def peak_mib(pid: int) -> float:
    """Give the most memory that a process has held."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return math.nan
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")), 0.0)


def children(pid: int) -> list[int]:
    """List the processes that a process started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text(encoding="utf-8").split()]
