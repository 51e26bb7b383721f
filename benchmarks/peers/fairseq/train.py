"""Trains a Transformer with fairseq, as a contestant of benchmarks/train_speed.py.

python train.py FOLDER

It is `fairseq-train` itself; only its Trainer waits for its turn before each step.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import math

import on_python_3_11  # noqa: F401 # patches what fairseq is built on
import torch
from fairseq import options
from fairseq.trainer import Trainer
from fairseq_cli import preprocess
from fairseq_cli import train as fairseq_train

from benchmarks.peers.text import words_of, write_text
from benchmarks.peers.turns import EOS, Assignment, Step, Turns

BUDGET = 1.22  # it counts cells of the longer side: so many hold a step's target tokens


class TakeTurns(Trainer):
    """fairseq's trainer, which waits for its turn before each step."""

    turns: Turns
    before: Step | None = None

    def train_step(self, samples: list[Any], *args: Any, **options: Any) -> Any:
        """Train on one batch; the step before is over, with all that follows it."""
        if self.before is None:
            self.turns.wait()
        else:
            self.turns.done(self.before)
        logged = super().train_step(samples, *args, **options)
        (sample,) = samples
        source, target = sample["net_input"]["src_tokens"], sample["target"]
        num_source = int(sample["net_input"]["src_lengths"].sum())
        loss = logged["loss"] * math.log(2)
        self.before = Step(num_source, sample["ntokens"], source.numel(), target.numel(), loss)
        return logged


def prepare(folder: Path, task: Assignment, data: Path) -> None:
    """Write pieces as words, and make of them what fairseq trains on."""
    folder.mkdir()
    write_text(folder, "train", task, data)
    lines = [f"{word} 1\n" for word in words_of(task)[EOS + 1 :]]  # it adds its own special ones
    (folder / "pieces").write_text("".join(lines), encoding="utf-8")
    arguments = {
        "source-lang": "source",
        "target-lang": "target",
        "trainpref": folder / "train",
        "srcdict": folder / "pieces",
        "destdir": folder / "binary",
    }
    parser = options.get_preprocessing_parser()
    preprocess.main(parser.parse_args([*as_options(arguments), "--joined-dictionary"]))


def as_options(values: dict[str, object]) -> list[str]:
    """Spell options as on the command line."""
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def command_line(folder: Path, task: Assignment) -> list[str]:
    """Give the command line of fairseq-train."""
    values = {
        "source-lang": "source",
        "target-lang": "target",
        "arch": "transformer",
        "encoder-layers": task.num_layers,
        "decoder-layers": task.num_layers,
        "encoder-embed-dim": task.hidden_dim,
        "decoder-embed-dim": task.hidden_dim,
        "encoder-ffn-embed-dim": task.feed_forward_dim,
        "decoder-ffn-embed-dim": task.feed_forward_dim,
        "encoder-attention-heads": task.num_heads,
        "decoder-attention-heads": task.num_heads,
        "dropout": task.dropout,
        "criterion": "label_smoothed_cross_entropy",
        "label-smoothing": task.label_smoothing,
        "optimizer": "adam",
        "adam-betas": f"({task.beta1}, {task.beta2})",
        "adam-eps": task.epsilon,
        "lr": task.learning_rate,
        "lr-scheduler": "inverse_sqrt",
        "warmup-updates": task.warmup_steps,
        "max-tokens": round(BUDGET * task.tokens_per_step),
        "valid-subset": "train",  # it wants one, and is told below not to validate
        "num-workers": 0,  # so that all its work falls into its own turns
        "seed": task.seed,
        "save-dir": folder / "checkpoints",
        "log-format": "none",
    }
    flags = ["--share-all-embeddings", "--cpu", "--no-save", "--disable-validation"]
    return [str(folder / "binary"), *as_options(values), *flags]


def main() -> None:
    """Train as asked."""
    TakeTurns.turns = Turns()
    data = Path(sys.argv[1])
    task = Assignment.read(data)
    torch.set_num_threads(task.threads)
    folder = data / "fairseq"
    if not folder.exists():
        prepare(folder, task, data)
    fairseq_train.Trainer = TakeTurns
    sys.argv[1:] = command_line(folder, task)
    fairseq_train.cli_main()


if __name__ == "__main__":
    main()
