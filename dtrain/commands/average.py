"""`dtrain average`: average the last checkpoints' weights, which often translate better."""

import argparse
from pathlib import Path

from dtrain.commands.translate import positive
from dtrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, e.g. runs/demo")
    parser.add_argument(
        "--last", type=positive, default=5, metavar="N", help="how many checkpoints (default: 5)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Write the average as a checkpoint that the other commands take by its name."""
    from dtrain import checkpoint
    from dtrain.run_directory import RunDirectory

    folder = RunDirectory.existing(arguments.run).checkpoints
    saved = checkpoint.steps_saved(folder)[: arguments.last]
    if len(saved) < arguments.last:
        raise UserError(
            f"--last {arguments.last}: {folder} has only {len(saved)}; a larger "
            f"checkpoint.keep_last keeps more"
        )
    name = checkpoint.average(folder, saved)
    print(f"averaged {', '.join(path.name for path in reversed(saved))}")
    print(f"use it: dtrain evaluate {arguments.run} --checkpoint {name}")
    return 0
