"""`dtrain prepare`: learn the vocabulary and write the tokens, once for all runs on this data."""

import argparse
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.config import explain_settings, load_config

if TYPE_CHECKING:
    from dtrain.data.store import Manifest, SplitReport

CLEAR_LINE = "\r\x1b[K"
"""What brings a terminal back to the beginning of an empty line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    explain_settings(parser)
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="the recipe, a YAML file"
    )


def main(arguments: argparse.Namespace) -> int:
    """Prepare what is missing and print what became of the text."""
    # Imported here so that `--help` answers at once.
    from dtrain.data.preparation import is_prepared, prepare, prepared_directory
    from dtrain.data.store import read_manifest

    # A preempted preparation removes what it had begun, as after any other error.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    config = load_config(arguments.config, arguments.overrides)
    other = config.vocabulary_of
    directory = prepared_directory(config.data, config.vocabulary, other)
    if is_prepared(config.data, config.vocabulary, directory, other):
        print(f"already prepared: {directory}")
    else:
        live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        show, seconds = (redraw, 0.25) if live else (partial(print, flush=True), 10.0)
        prepare(
            *(config.data, config.vocabulary, directory, show, other),
            seconds_between_reports=seconds,
        )
        print(f"{CLEAR_LINE if live else ''}prepared: {directory}")
    print(table(read_manifest(directory)))
    return 0


def redraw(line: str) -> None:
    """Show a line in the place of the one before, on a terminal."""
    width = shutil.get_terminal_size().columns
    print(f"{CLEAR_LINE}{line[: width - 1]}", end="", flush=True)


def table(manifest: "Manifest") -> str:
    """Lay the report of a prepared directory out for reading."""
    languages = manifest.source_language, manifest.target_language
    lines = []
    for split, report in manifest.splits.items():
        lines += ["", split, *split_lines(report, languages)]
    sizes = f"{manifest.source_vocabulary_size:,} pieces, shared"
    if not manifest.shared_vocabulary:
        sizes = (
            f"{manifest.source_vocabulary_size:,} pieces {languages[0]}, "
            f"{manifest.target_vocabulary_size:,} pieces {languages[1]}"
        )
    lines += ["", f"vocabulary   {sizes}", f"content      {manifest.fingerprint[:16]}"]
    return "\n".join(lines)


def split_lines(report: "SplitReport", languages: tuple[str, str]) -> list[str]:
    """Say of one split what was kept and dropped, and how long its sentences are."""
    lines = []
    for corpus in report.corpora:
        lines.append(f"  {corpus.kept:>13,} pairs      {corpus.corpus}")
        for reason, dropped in corpus.dropped.items():
            numbers = ", ".join(str(line) for line in dropped.first_lines)
            more = ", …" if dropped.count > len(dropped.first_lines) else ""
            lines.append(f"  {dropped.count:>13,} dropped    {reason}: line {numbers}{more}")
    counts = (report.source_tokens, report.target_tokens)
    for language, num_tokens in zip(languages, counts, strict=True):
        mean = num_tokens / max(1, report.num_pairs)
        lines.append(f"  {num_tokens:>13,} tokens {language}  {mean:.1f} a sentence")
    return lines
