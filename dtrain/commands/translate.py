"""`dtrain translate`: one line out for each line in; a prompt on a terminal."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from dtrain.errors import UserError

LINES_AT_ONCE = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add_search_arguments(parser)


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which model is used and how it searches; `evaluate` takes the same."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, e.g. runs/demo")
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="STEP|best|last",
        help="which checkpoint, also the name of an average (default: best)",
    )
    parser.add_argument(
        "--beam-size", type=positive, metavar="N", help="1: greedy (default: as in validation)"
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        metavar="A",
        help="how much longer translations are favoured; 0: not at all (default: as in validation)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute (default: auto, a GPU if there is one)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Translate standard input to standard output."""
    if sys.stdin.isatty():
        print("Type a sentence and press Enter; Ctrl-D ends.", file=sys.stderr)
    translate = load_translator(arguments)[0]
    if sys.stdin.isatty():
        for line in prompted():
            print(translate([line])[0], flush=True)
        return 0
    lines = decoded(sys.stdin.buffer)
    try:
        while chunk := list(islice(lines, LINES_AT_ONCE)):
            sys.stdout.write("".join(f"{text}\n" for text in translate(chunk)))
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def load_translator(
    arguments: argparse.Namespace,
) -> tuple[Callable[[list[str]], list[str]], argparse.Namespace]:
    """Load the model that the arguments name.

    Returns:
        A function from lines to their translations, and what it was made of: `config`,
        `checkpoint`, `beam_size` and `length_penalty`.
    """
    from dtrain.distributed import alone
    from dtrain.evaluation import translate_lines
    from dtrain.memory import keep_freed_memory
    from dtrain.parts import trained_model

    keep_freed_memory()
    world = alone(arguments.device)
    model, config, vocabulary, checkpoint = trained_model(arguments.run, arguments.checkpoint)
    model.to(world.device)
    beam_size = arguments.beam_size or config.validation.beam_size
    alpha = arguments.length_penalty
    if alpha is None:
        alpha = config.validation.length_penalty

    def translate(lines: list[str]) -> list[str]:
        return translate_lines(model, vocabulary, lines, world, beam_size, alpha)

    return translate, argparse.Namespace(
        config=config, checkpoint=checkpoint, beam_size=beam_size, length_penalty=alpha
    )


def decoded(lines: Iterable[bytes]) -> Iterator[str]:
    """Read lines of UTF-8, cut at line feeds only.

    Raises:
        UserError: naming the line that is not UTF-8.
    """
    for number, line in enumerate(lines, start=1):
        try:
            yield line.rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input, line {number}: not UTF-8 ({error})") from None


def prompted() -> Iterator[str]:
    """Ask for lines on a terminal until the user ends it."""
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def positive(text: str) -> int:
    """Read a number from 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
