import os
import re
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest

from dtrain.console import Pace, PlainConsole, duration, open_console

TRAINING = {
    "train/loss": 5.2314,
    "train/perplexity": 98.123,
    "train/learning_rate": 3.14e-4,
    "train/tokens_per_second": 12300.4,
    "train/mfu": 0.41234,
    "train/grad_norm": 0.5,
    "epoch": 3,
}
VALIDATION = {"validation/nll": 2.345, "validation/bleu": 21.04, "validation/chrf": 45.06}


def test_standard_output_that_is_no_terminal_gets_plain_lines(capsys):
    console = open_console(max_steps=4000)
    assert isinstance(console, PlainConsole)
    console.log(120, TRAINING)
    console.progress(121, TRAINING)
    console.log(200, VALIDATION)
    console.message("a notice")
    console.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 120/4000  loss 5.231  ppl 98.1  lr 3.1e-04  12,300 tokens/s  mfu 41.2 %",
        "step 200/4000  validation  nll 2.345  bleu 21.0  chrf 45.1",
        "a notice",
    ]


def test_a_plain_line_says_how_much_time_is_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = PlainConsole(max_steps=4000)
    for step in (10, 20, 30):
        now[0] += 10
        console.log(step, {"train/loss": 1.0})
    assert capsys.readouterr().out.splitlines()[-1] == "step 30/4000  loss 1.000  left 1:06:10"


def test_validation_and_training_of_one_step_get_a_line_each(capsys):
    PlainConsole(max_steps=0).log(7, {"train/loss": 1.5, "train/perplexity": 4.4817, **VALIDATION})
    assert capsys.readouterr().out.splitlines() == [
        "step 7  loss 1.500  ppl 4.48",
        "step 7  validation  nll 2.345  bleu 21.0  chrf 45.1",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_no_number_is_too_strange_to_show(capsys, value):
    PlainConsole(max_steps=10).log(1, dict.fromkeys({**TRAINING, **VALIDATION}, value))
    assert "loss" in capsys.readouterr().out


def test_pace_is_that_of_the_last_minute():
    pace = Pace()
    assert pace.seconds_left(100) is None
    step = 0
    for second in range(1000):  # a step a second, then ten a second
        step += 1 if second < 500 else 10
        pace.note(step, now=float(second))
    assert pace.seconds_left(step + 1000) == pytest.approx(100)
    assert pace.seconds_left(step) == 0
    assert pace.seconds_left(0) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7, "0:07"), (252, "4:12"), (59.6, "1:00"), (3723, "1:02:03"), (183_840, "2 d 03:04")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


SESSION = """
import sys, time
from dtrain.console import open_console
console = open_console(4000, 1)
for step in range(2, 40):
    console.progress(step, {"train/loss": 5 - step / 100, "train/tokens_per_second": 12000.0,
                            "train/learning_rate": 3e-4, "epoch": 1})
    time.sleep(0.05)
    if step == 20:
        console.log(20, {"validation/bleu": 12.5})
        console.samples(20, [{"source": "A", "reference": "B", "translation": "[bold]C[/bold]"}])
        console.message("saved step 20")
        print("printed by something else")
console.close()
print("after")
"""


@pytest.mark.slow
def test_a_terminal_shows_one_live_line_and_keeps_the_rest():
    terminal, inside = os.openpty()
    ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        [sys.executable, "-c", SESSION], stdout=inside, env=environment
    ) as process:
        os.close(inside)
        written = b"".join(iter(lambda: _read(terminal), b"")).decode()
    os.close(terminal)
    assert process.returncode == 0
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is hidden"

    screen = _screen(written)
    assert screen == [
        "step 20/4000  validation  bleu 12.5",
        "  source       A",
        "  reference    B",
        "  translation  [bold]C[/bold]",
        "",
        "saved step 20",
        "printed by something else",
        "after",
    ]
    last = [frame for frame in re.split("[\r\n]", _plain(written)) if "loss" in frame][-1]
    assert re.fullmatch(
        r"step 39/4000  ━+  loss 4\.610  lr 3\.0e-04  12,000 tokens/s  epoch 1  left \d:\d\d", last
    )
    assert len(last) <= 100


def _read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the other end is closed
        return b""


def _plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def _screen(written):
    """Draw what a terminal was told, as far as a live line needs: returns, line feeds, erasing."""
    rows, row = [""], 0
    for token in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", written):
        if token == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif token.endswith("A") and token.startswith("\x1b["):
            row -= int(token[2:-1] or 1)
        elif token in ("\x1b[2K", "\r"):
            rows[row] = "" if token == "\x1b[2K" else rows[row]
        elif not token.startswith("\x1b"):
            rows[row] += token
    return rows[:-1] if not rows[-1] else rows
