"""Trains a Transformer with JoeyNMT, as a contestant of benchmarks/train_speed.py.

python train.py FOLDER
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from joeynmt import training

from benchmarks.peers.text import words_of, write_text
from benchmarks.peers.turns import Assignment, Step, Turns

ENDLESS = 10**9
BUDGET = 2.5  # a batch is full with so many cells a token of a step: it is not sorted by length


class TakeTurns(training.TrainManager):
    """JoeyNMT's trainer, which waits for its turn before each step."""

    turns: Turns
    before: Step | None = None

    def _train_step(self, batch: Any) -> tuple[float, int]:
        """Train on one batch; the step before is over, its update included."""
        if self.before is None:
            self.turns.wait()
        else:
            self.turns.done(self.before)
        loss, correct = super()._train_step(batch)
        sizes = int(batch.src_length.sum()), batch.ntokens, batch.src.numel(), batch.trg.numel()
        self.before = Step(*sizes, loss)
        return loss, correct


def prepare(folder: Path, task: Assignment, data: Path) -> None:
    """Write pieces as words, as JoeyNMT reads them, and the list of all of them."""
    folder.mkdir()
    write_text(folder, "train", task, data)
    (folder / "pieces").write_text("\n".join(words_of(task)) + "\n", encoding="utf-8")


def configuration(folder: Path, task: Assignment) -> dict[str, Any]:
    """Give the settings, as they stand in a JoeyNMT config file."""
    side = {"level": "word", "max_length": -1, "voc_file": str(folder / "pieces")}
    layers = {
        "type": "transformer",
        "num_layers": task.num_layers,
        "num_heads": task.num_heads,
        "embeddings": {"embedding_dim": task.hidden_dim, "scale": True},
        "hidden_size": task.hidden_dim,
        "ff_size": task.feed_forward_dim,
        "dropout": task.dropout,
        "layer_norm": "post",
    }
    return {
        "name": "speed",
        "model_dir": str(folder / "model"),
        "use_cuda": False,
        "random_seed": task.seed,
        "data": {
            "train": str(folder / "train"),
            "dev": str(folder / "train"),  # it wants one, and is never asked for it
            "dataset_type": "plain",
            "src": {"lang": "source", **side},
            "trg": {"lang": "target", **side},
        },
        "training": {
            "optimizer": "adam",
            "adam_betas": [task.beta1, task.beta2],
            "learning_rate": task.learning_rate,
            "learning_rate_min": 0.0,
            "scheduling": "warmupinversesquareroot",
            "learning_rate_warmup": task.warmup_steps,
            "normalization": "tokens",
            "label_smoothing": task.label_smoothing,
            "batch_type": "token",
            "batch_size": round(BUDGET * task.tokens_per_step),
            "epochs": ENDLESS,
            "validation_freq": ENDLESS,
            "logging_freq": 1000,
        },
        "testing": {"eval_metrics": ["bleu"]},
        "model": {
            "initializer": "xavier_uniform",
            "tied_embeddings": True,
            "tied_softmax": True,
            "encoder": layers,
            "decoder": layers,
        },
    }


def main() -> None:
    """Train as asked."""
    TakeTurns.turns = Turns()
    data = Path(sys.argv[1])
    task = Assignment.read(data)
    torch.set_num_threads(task.threads)
    torch.manual_seed(task.seed)
    folder = data / "joeynmt"
    if not folder.exists():
        prepare(folder, task, data)
    (folder / "model").mkdir(exist_ok=True)
    training.TrainManager = TakeTurns
    training.train(0, 1, configuration(folder, task), skip_test=True)


if __name__ == "__main__":
    main()
