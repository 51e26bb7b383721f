"""`dtrain train`: train, or go on; the same as `torchrun ... -m dtrain.train`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dtrain.config import Config, explain_settings, load_config
from dtrain.errors import shown_to_user


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags; settings are read from what argparse does not know."""
    explain_settings(parser)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML settings")
    parser.add_argument(
        "--print-config", action="store_true", help="show the settings as resolved, and stop"
    )


def parse(arguments: Sequence[str]) -> Config:
    """Read the command line of `python -m dtrain.train`, or stop with what is wrong with it."""
    parser = argparse.ArgumentParser("dtrain.train", description="Train, or go on.")
    add_arguments(parser)
    known, overrides = parser.parse_known_args(arguments)
    known.overrides = overrides
    with shown_to_user():
        return resolve(known)
    raise AssertionError("unreachable")


def resolve(arguments: argparse.Namespace) -> Config:
    """Give the settings that the arguments name; with --print-config show them and stop."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        sys.exit(0)
    return config


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    config = resolve(arguments)
    from dtrain.train import run

    return run(config)
