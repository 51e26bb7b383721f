"""What is measured: `metrics.jsonl` is the truth, the console and Weights & Biases only show it.

A line of `metrics.jsonl` holds all values of one step: `{"step": 120, "train/loss": 5.2, ...}`.
Floats are written so that reading gives the same bits. What JSON has no number for is written as
"NaN", "Infinity" or "-Infinity", which `float()` takes back. Free of slow imports.
"""

import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dtrain.console import Console, open_console
from dtrain.errors import UserError
from dtrain.wandb_feed import Outcome, WandbFeed


class MetricsSettings(BaseModel):
    """How often the training is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_steps: int = Field(
        10, ge=0, description="steps from one logged step to the next; 0: none"
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="what a rank's device can do, for train/mfu; null: by data sheet"
    )


class WandbSettings(BaseModel):
    """Weights & Biases; the environment's WANDB_* fill what is left at its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online if W&B has a key for this machine, else offline"
    )
    project: str = Field("dtrain", description="W&B project")
    entity: str | None = Field(None, description="W&B user or team; null: the key's own")
    name: str | None = Field(None, description="name shown in W&B; null: the run directory's name")
    group: str | None = Field(None, description="W&B group")
    tags: tuple[str, ...] = Field((), description="W&B tags")
    notes: str | None = Field(None, description="W&B notes")


class Metrics:
    """Takes what rank 0 measures and passes it on to files, console and W&B.

    Other ranks hold a silent one, so that the training need not ask which rank it is.
    """

    def __init__(
        self, record: "Record | None", console: Console | None, feed: WandbFeed | None
    ) -> None:
        self._record = record
        self._console = console
        self._feed = feed

    @classmethod
    def open(
        cls,
        run: Path,
        settings: WandbSettings,
        config: dict[str, Any],
        max_steps: int,
        resume_step: int,
    ) -> "Metrics":
        """Begin to measure a run, or go on.

        Args:
            run: the run directory.
            settings: of W&B.
            config: all settings of the run as JSON values, for W&B.
            max_steps: the step at which training ends; 0 if unknown.
            resume_step: the step that training goes on from; what was logged of later steps is
                moved to `metrics.discarded.jsonl`, as those steps are done again.
        """
        record = Record(run, resume_step)
        run_id = None if settings.mode == "disabled" else _wandb_id(run / "run.json")
        console = open_console(max_steps, resume_step)
        feed = None
        if run_id is not None:
            try:
                feed = WandbFeed(run, run_id, settings.model_dump(), config, console.message)
            except OSError as error:
                console.message(f"W&B cannot be started: {error}")
        return cls(record, console, feed)

    @classmethod
    def silent(cls) -> "Metrics":
        """Make one that takes everything and passes on nothing."""
        return cls(None, None, None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step; those logged later for the same step join its line.

        Raises:
            ValueError: if a later step was logged before.
        """
        if self._record is None or self._console is None:
            return
        try:
            self._record.add(step, values)
        except OSError as error:
            self._console.message(f"warning: cannot write {self._record.path}: {error}")
        self._console.log(step, values)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Say how far the training is, at every step; only a live line shows it."""
        if self._console is not None:
            self._console.progress(step, values)

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Record translations of a step, each row with source, reference and translation."""
        if self._record is None or self._console is None:
            return
        try:
            self._record.add_samples(step, rows)
        except OSError as error:
            self._console.message(f"warning: cannot write the translations: {error}")
        self._console.samples(step, rows)

    def skipped(
        self,
        step: int,
        norm: float,
        losses: Sequence[float],
        micro_batches: Mapping[int, Iterable[int]],
    ) -> None:
        """Record a step whose update was skipped in `skipped.jsonl`.

        Args:
            step: its number.
            norm: of the gradient, not finite.
            losses: summed over each micro-batch of the step.
            micro_batches: sentence ids of those under suspicion, by their index.
        """
        if self._record is None or self._console is None:
            return
        facts = {
            "step": step,
            "grad_norm": _plain_number(norm),
            "micro_batches": [
                {"index": i, "loss": _plain_number(losses[i]), "sentences": [int(n) for n in ids]}
                for i, ids in micro_batches.items()
            ],
        }
        try:
            self._record.add_skipped(facts)
        except OSError as error:
            self._console.message(f"warning: cannot write skipped.jsonl: {error}")
        names = ", ".join(map(str, micro_batches))
        self._console.message(
            f"step {step}: the gradient is not finite ({norm}), update skipped; "
            f"skipped.jsonl names the sentences of micro-batch {names}"
        )

    def message(self, text: str) -> None:
        """Show a plain notice, without garbling the live line."""
        if self._console is not None:
            self._console.message(text)

    def close(self, outcome: Outcome) -> None:
        """Give W&B some time to take the rest, then leave the terminal tidy. Once is enough.

        Args:
            outcome: how the training ended; W&B shows the run as finished, preempted or failed.
        """
        if self._feed is not None:
            self._feed.close(outcome)
        if self._record is not None:
            self._record.close()
        if self._console is not None:
            self._console.close()
        self._record = self._console = self._feed = None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("completed" if kind is None else "failed")


class Record:
    """The `.jsonl` files of a run: metrics, samples, skipped; in order of steps, each step once.

    A line reaches the operating system before `add` returns, so a killed process loses none.
    """

    def __init__(self, run: Path, resume_step: int) -> None:
        """Open the files and cut off what they hold beyond `resume_step`."""
        self.path = run / "metrics.jsonl"
        last_line = _cut(self.path, resume_step)
        self._last = json.loads(last_line) if last_line else {"step": 0}
        self._metrics = _Lines(self.path, len(last_line))
        last_sample = _cut(run / "samples.jsonl", resume_step)
        self._sampled_step = json.loads(last_sample)["step"] if last_sample else 0
        self._samples = _Lines(run / "samples.jsonl", 0)
        _cut(run / "skipped.jsonl", resume_step)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write a step's line, or write it anew with more values."""
        last_step = self._last["step"]
        if step < last_step:
            raise ValueError(f"step {step} is logged after step {last_step}")
        again = step == last_step
        line = {**(self._last if again else {"step": step}), **_plain(values)}
        self._metrics.write(_json_line(line), replace=again)
        self._last = line

    def add_samples(self, step: int, rows: Iterable[Mapping[str, str]]) -> None:
        """Write one line for each row, unless a start before this one has: the same bits."""
        if step == self._sampled_step:
            return
        self._sampled_step = step
        self._samples.write(b"".join(_json_line({"step": step, **row}) for row in rows))

    def add_skipped(self, facts: Mapping[str, Any]) -> None:
        """Write what is known of a skipped update; most runs never have this file."""
        lines = _Lines(self.path.with_name("skipped.jsonl"), 0)
        lines.write(_json_line(facts))
        lines.close()

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._samples.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read `metrics.jsonl`, one dictionary a logged step; also while a training writes it."""
    if not path.exists():
        return []
    parsed = map(_parse, path.read_bytes().splitlines(keepends=True))
    return [
        {name: float(v) if isinstance(v, str) else v for name, v in d.items()} for d in parsed if d
    ]


class _Lines:
    """A file that grows at its end, and whose last piece can be written anew."""

    def __init__(self, path: Path, last_length: int) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._end = os.fstat(self._file).st_size
        self._last_start = self._end - last_length

    def write(self, piece: bytes, replace: bool = False) -> None:
        """Write a piece behind the last one or, with `replace`, over it."""
        start = self._last_start if replace else self._end
        written = 0
        while written < len(piece):
            written += os.pwrite(self._file, piece[written:], start + written)
        if start + len(piece) < self._end:
            os.ftruncate(self._file, start + len(piece))
        # Only now: a write that failed half-way, on a full disk, is written over by the next.
        self._last_start, self._end = start, start + len(piece)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _cut(path: Path, step: int) -> bytes:
    """Move lines beyond a step, and a half-written one, aside; give the last that stays."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept: list[bytes] = []
    discarded: list[bytes] = []
    for line in lines:
        values = _parse(line)
        (kept if values is not None and values["step"] <= step else discarded).append(line)
    if discarded:
        with path.with_suffix(".discarded.jsonl").open("ab") as aside:
            aside.writelines(line.rstrip(b"\n") + b"\n" for line in discarded)
        temporary = path.with_name(f".{path.name}")
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return kept[-1] if kept else b""


def _parse(line: bytes) -> dict[str, Any] | None:
    """Read a line; None if a kill or a full disk left only part of it."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return values if isinstance(values, dict) and "step" in values else None


def _json_line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _plain(values: Mapping[str, float]) -> dict[str, int | float | str]:
    """Turn numbers of any library into what JSON can hold."""
    return {name: _plain_number(value) for name, value in values.items()}


def _plain_number(value: float) -> int | float | str:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else _NOT_FINITE[str(number)]


_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _wandb_id(path: Path) -> str:
    """Give the id of the run's one W&B run, from `run.json`; make it at the first start."""
    identity: dict[str, Any] = {}
    if path.exists():
        try:
            identity = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); mend it or move it away") from None
    if "wandb_id" not in identity:
        identity["wandb_id"] = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    return str(identity["wandb_id"])
