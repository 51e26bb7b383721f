"""`dtrain average`: average the last checkpoints' weights, which often translate better."""

import argparse
from collections.abc import Sequence
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
    name = average(folder, saved)
    print(f"averaged {', '.join(path.name for path in reversed(saved))}")
    print(f"use it: dtrain evaluate {arguments.run} --checkpoint {name}")
    return 0


def average(folder: Path, checkpoints: Sequence[Path]) -> str:
    """Write the mean of some checkpoints' weights as another checkpoint; gives its name.

    Raises:
        CheckpointError: if one of them is damaged.
    """
    import torch

    from dtrain.checkpoint import MODEL, CheckpointError, read_state, verify, write
    from dtrain.weights import file_content, read_file

    for path in checkpoints:
        problem = verify(path)
        if problem:
            raise CheckpointError(f"checkpoint {path}: {problem}")
    sums: dict[str, torch.Tensor] = {}
    for path in checkpoints:
        for key, tensor in read_file(path / MODEL).items():
            sums[key] = sums.get(key, torch.zeros((), dtype=torch.float64)) + tensor.double()
    mean = {key: (total / len(checkpoints)).float() for key, total in sums.items()}
    step = read_state(checkpoints[0])["step"]
    name = f"average-{step:010d}-of-{len(checkpoints)}"
    state = {"step": step, "averaged": [path.name for path in checkpoints]}
    write(folder, name, {MODEL: file_content(mean)}, state)
    return name
