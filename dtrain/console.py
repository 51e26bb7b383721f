"""What a person sees of a training: one live line on a terminal, plain lines everywhere else."""

import io
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.text import Text

Values = Mapping[str, float]
"""Measured values by name, such as "train/loss"."""

_BAR_WIDTH = 24


class Console(Protocol):
    """Where a training shows itself."""

    def log(self, step: int, values: Values) -> None:
        """Show the values logged at a step."""

    def progress(self, step: int, values: Values) -> None:
        """Note how far the training is; called at every step, so it must cost nothing."""

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Show translations made at a step, each below its source and reference."""

    def message(self, text: str) -> None:
        """Show a plain notice."""

    def close(self) -> None:
        """Leave the terminal as it was found."""


def open_console(max_steps: int, step: int = 0) -> Console:
    """Choose the live line if standard output is a terminal, plain lines if not.

    Args:
        max_steps: the step that training ends at; 0 if unknown.
        step: the step that training starts behind.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a translation may hold what the locale cannot show
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return LiveConsole(max_steps, step) if is_terminal else PlainConsole(max_steps)


class PlainConsole:
    """One line for each log, for files and batch systems."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._pace = Pace()

    def log(self, step: int, values: Values) -> None:
        """Write a line of training values, and one of validation values, where there are any."""
        self._pace.note(step)
        left = self._pace.seconds_left(self._max_steps)
        if parts := _training_parts(values, left):
            self._write("  ".join([_step(step, self._max_steps), *parts]))
        if parts := _validation_parts(values):
            self._write("  ".join([_step(step, self._max_steps), "validation", *parts]))

    def progress(self, step: int, values: Values) -> None:  # noqa: ARG002 - lines come from `log`
        """Note the speed; nothing is shown."""
        self._pace.note(step)

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Write translations, each below its source and reference."""
        self._write(f"{_step(step, self._max_steps)}  translations\n" + _sample_lines(rows))

    def message(self, text: str) -> None:
        """Write a notice."""
        self._write(text)

    def close(self) -> None:
        """Do nothing: each line was written out at once."""

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a closed pipe is no reason to stop a training
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


class LiveConsole:
    """One line that stays at the bottom of a terminal, redrawn four times a second.

    What is said once (validation, translations, notices, anything printed elsewhere) scrolls by
    above it.
    """

    def __init__(self, max_steps: int, step: int = 0) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._max_steps = max_steps
        self._step = step
        self._pace = Pace()
        self._values: dict[str, float] = {}
        self._console = RichConsole(highlight=False, markup=False, emoji=False)
        self._live = Live(
            console=self._console,
            get_renderable=self._line,
            refresh_per_second=4,
            transient=True,
        )
        self._live.start()
        # A killed process could not bring a hidden cursor back.
        self._console.show_cursor(True)

    def log(self, step: int, values: Values) -> None:
        """Take the values into the live line; validation values get a line that stays."""
        self.progress(step, values)
        if parts := _validation_parts(values):
            self._print("  ".join([_step(step, self._max_steps), "validation", *parts]), "bold")

    def progress(self, step: int, values: Values) -> None:
        """Note what the next redrawing shows; values not given keep standing."""
        self._step = step
        self._values = {**self._values, **values}
        self._pace.note(step)

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:  # noqa: ARG002 - it is shown
        """Print translations, each below its source and reference."""
        self._print(_sample_lines(rows))

    def message(self, text: str) -> None:
        """Print a notice above the live line."""
        self._print(text)

    def close(self) -> None:
        """Take the live line away; what was printed above it stays."""
        self._live.stop()

    def _print(self, text: str, style: str = "") -> None:
        from rich.text import Text

        with suppress(OSError):
            self._console.print(Text(text, style), soft_wrap=True)

    def _line(self) -> "Text":
        from rich.text import Text

        left = self._pace.seconds_left(self._max_steps)
        parts = _training_parts(self._values, left, shown=_LIVE) or ["starting"]
        text = "  ".join(parts)
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(_step(self._step, self._max_steps) + "  ", "bold")
        room = self._console.width - len(line.plain) - len(text) - 2
        if self._max_steps and room >= 8:
            width = min(_BAR_WIDTH, room)
            done = round(width * min(1.0, self._step / self._max_steps))
            line.append("━" * done, "green")
            line.append("━" * (width - done) + "  ", "bright_black")
        return line.append(text)


class Pace:
    """Recent speed, from the steps of about the last minute, pauses between them included."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=120)

    def note(self, step: int, now: float | None = None) -> None:
        """Remember when a step was done (seconds on any clock), at most twice a second."""
        now = time.monotonic() if now is None else now
        if not self._marks or (step > self._marks[-1][1] and now >= self._marks[-1][0] + 0.5):
            self._marks.append((now, step))

    def seconds_left(self, max_steps: int) -> float | None:
        """Say how many seconds the steps to `max_steps` will take; None if nobody can know."""
        if len(self._marks) < 2 or not max_steps:
            return None
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        return max(0, max_steps - last_step) * (last_time - first_time) / (last_step - first_step)


def _step(step: int, max_steps: int) -> str:
    return f"step {step}/{max_steps}" if max_steps else f"step {step}"


_SPEED = ("train/tokens_per_second", "train/mfu")
_PLAIN = ("train/loss", "train/perplexity", "train/learning_rate", *_SPEED)
_LIVE = ("train/loss", "train/learning_rate", *_SPEED, "epoch")


def _training_parts(
    values: Values, seconds_left: float | None, shown: Sequence[str] = _PLAIN
) -> list[str]:
    forms = {
        "train/loss": lambda value: f"loss {value:.3f}",
        "train/perplexity": lambda value: f"ppl {_four_digits(value)}",
        "train/learning_rate": lambda value: f"lr {value:.1e}",
        "train/tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
        "train/mfu": lambda value: f"mfu {100 * value:.1f} %",
        "epoch": lambda value: f"epoch {value:.3g}",
    }
    parts = [forms[name](values[name]) for name in shown if name in values]
    if parts and seconds_left is not None:
        parts.append(f"left {duration(seconds_left)}")
    return parts


def _four_digits(value: float) -> str:
    if value < 10:
        return f"{value:.2f}"
    return f"{value:,.1f}" if value < 10_000 else f"{value:.1e}"


def _validation_parts(values: Values) -> list[str]:
    shown = {
        "validation/nll": "nll {:.3f}",
        "validation/bleu": "bleu {:.1f}",
        "validation/chrf": "chrf {:.1f}",
    }
    return [form.format(values[name]) for name, form in shown.items() if name in values]


def _sample_lines(rows: Sequence[Mapping[str, str]]) -> str:
    names = ("source", "reference", "translation")
    return "\n".join(
        "\n".join(f"  {name:<11}  {row[name]}" for name in names) + "\n" for row in rows
    )


def duration(seconds: float) -> str:
    """Write a time as 0:07, 4:12, 1:02:03 or 2 d 03:04."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
