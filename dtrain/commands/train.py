"""`dtrain train`: train, or go on; the same as `torchrun ... -m dtrain.train`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dtrain.config import Config, check_allowed, explain_settings, load_config
from dtrain.errors import shown_to_user


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags; settings are read from what argparse does not know."""
    explain_settings(parser)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML settings")
    parser.add_argument(
        "--print-config", action="store_true", help="show the settings as resolved, and stop"
    )
    add_allow_changed(parser)


def add_allow_changed(parser: argparse.ArgumentParser) -> None:
    """Add the flag that lets a begun run go on with other settings."""
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on although this differs from what the run was begun with: a setting's key, or "
        "data, vocabulary, plan; may be repeated",
    )


def parse(arguments: Sequence[str]) -> Config:
    """Give the settings that a command line of `python -m dtrain.train` means."""
    return parse_start(arguments)[0]


def parse_start(arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """Read a command line of `python -m dtrain.train`, or stop with what is wrong with it.

    Returns:
        The settings, and what `--allow-changed` names.
    """
    parser = argparse.ArgumentParser("dtrain.train", description="Train, or go on.")
    add_arguments(parser)
    known, overrides = parser.parse_known_args(arguments)
    known.overrides = overrides
    with shown_to_user():
        return resolve(known), known.allow_changed
    raise AssertionError("unreachable")


def resolve(arguments: argparse.Namespace) -> Config:
    """Give the settings that the arguments name; with --print-config show them and stop."""
    config = load_config(arguments.config, arguments.overrides)
    check_allowed(arguments.allow_changed)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        sys.exit(0)
    return config


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    config = resolve(arguments)
    from dtrain.train import run

    return run(config, arguments.allow_changed)
