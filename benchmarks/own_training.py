"""Trains with dtrain, as a contestant of benchmarks/train_speed.py.

    python benchmarks/own_training.py FOLDER CONFIG

Several processes of it are the ranks of one training, if the variables of torchrun are set.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time

from benchmarks.peers.turns import Step, Turns
from benchmarks.yardstick import open_training
from dtrain.config import Config, load_config
from dtrain.metrics import Metrics


class LastLoss(Metrics):
    """Remembers the last step's loss, and writes and shows nothing."""

    def __init__(self) -> None:
        super().__init__(None, None, None)
        self.step, self.loss = 0, float("nan")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take what is measured of a step."""
        self.step, self.loss = step, values["train/loss"]


def steps(config: Config) -> Iterator[Step]:
    """Train with dtrain: its plan, loader, train step and metrics; counts all ranks together."""
    metrics = LastLoss()
    with open_training(config, metrics) as (training, loader):
        slots = training.plan.source_slots, training.plan.target_slots
        training.rehearse()
        for step in loader:
            training.train_step(step, time.perf_counter())
            tokens = step.plan.num_source_tokens, step.plan.num_target_tokens
            count = len(step.plan.micro_batches)
            yield Step(*tokens, slots[0] * count, slots[1] * count, metrics.loss)


if __name__ == "__main__":
    Turns().take(steps(load_config(Path(sys.argv[1]) / sys.argv[2])))
