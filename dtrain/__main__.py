"""`dtrain COMMAND` and `python -m dtrain COMMAND`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from dtrain import __version__
from dtrain.errors import UserError, shown_to_user

COMMANDS = {
    "prepare": "make vocabulary and tokens from text",
    "train": "train, or go on",
    "submit": "hand a training to SLURM",
    "translate": "translate lines from standard input",
    "evaluate": "translate a test set and judge it: BLEU and chrF",
    "average": "average the last checkpoints into one",
    "status": "say where a run stands",
    "verify": "check all checkpoints of a run",
    "inspect": "run one step again and look at every layer",
    "schedule": "draw the learning rate of a config",
}
WITH_SETTINGS = ("prepare", "train", "submit", "schedule")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; gives the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        "dtrain", description="Train the Transformer, from text to translation."
    )
    parser.add_argument("--version", action="version", version=f"dtrain {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary}.")
        if name == chosen:
            importlib.import_module(f"dtrain.commands.{name}").add_arguments(subparser)
    with shown_to_user():
        known, overrides = parser.parse_known_args(arguments)
        if overrides and known.command not in WITH_SETTINGS:
            raise UserError(f"{known.command} does not know {' '.join(overrides)}; see --help")
        known.overrides = overrides
        code: int = importlib.import_module(f"dtrain.commands.{known.command}").main(known)
        return code
    raise AssertionError("unreachable")


if __name__ == "__main__":
    sys.exit(main())
