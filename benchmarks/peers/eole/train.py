"""Trains a Transformer with eole, as a contestant of benchmarks/train_speed.py.

python train.py FOLDER

It is `eole train` itself; only its Trainer waits for its turn before each step.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import yaml
from eole import trainer
from eole.bin.main import main as eole_main

from benchmarks.peers.text import IDS, NAMES, words_of, write_text
from benchmarks.peers.turns import Assignment, Rows, Step, Turns

ENDLESS = 10**9
SPECIAL = {f"{name}_token": NAMES[i] for name, i in IDS.items()}
BUDGET = 1.23  # it counts cells of the longer side: so many hold a step's target tokens


class TakeTurns(trainer.Trainer):
    """eole's trainer, which waits for its turn before each step."""

    turns: Turns
    before: Step | None = None

    def _train_step(
        self, batches: list[Any], normalization: int, total: Any, *others: Any, **named: Any
    ) -> None:
        """Train on one batch; the step before is over, with all that follows it."""
        if self.before is None:
            self.turns.wait()
        else:
            self.turns.done(self.before)
        loss, tokens = total.loss, total.n_tokens
        super()._train_step(batches, normalization, total, *others, **named)
        loss, tokens = total.loss - loss, total.n_tokens - tokens
        (batch,) = batches
        source, target = batch["src"], batch["tgt"][:, 1:]
        num_source = int(batch["srclen"].sum())
        self.before = Step(num_source, int(tokens), source.numel(), target.numel(), loss / tokens)


def prepare(folder: Path, task: Assignment, data: Path) -> None:
    """Write pieces as words, the list of them, and the config file."""
    folder.mkdir()
    write_text(folder, "train", task, data)
    lines = [f"{word}\t1\n" for word in words_of(task)]
    (folder / "pieces").write_text("".join(lines), encoding="utf-8")
    sentences = len(Rows.read(data, "source"))
    text = yaml.safe_dump(configuration(folder, task, sentences))
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def configuration(folder: Path, task: Assignment, sentences: int) -> dict[str, Any]:
    """Give the settings, as they stand in an eole config file."""
    return {
        "seed": task.seed,
        "src_vocab": str(folder / "pieces"),
        "src_vocab_size": task.vocabulary_size,
        "tgt_vocab_size": task.vocabulary_size,
        "share_vocab": True,
        **SPECIAL,
        "decoder_start_token": "<s>",
        "data": {
            "corpus": {
                "path_src": str(folder / "train.source"),
                "path_tgt": str(folder / "train.target"),
            }
        },
        "model": {
            "architecture": "transformer",
            "layers": task.num_layers,
            "hidden_size": task.hidden_dim,
            "heads": task.num_heads,
            "transformer_ff": task.feed_forward_dim,
            "add_qkvbias": True,
            "add_final_linear_bias": True,
            "add_ffnbias": True,
            "share_embeddings": True,
            "share_decoder_embeddings": True,
            "embeddings": {
                "word_vec_size": task.hidden_dim,
                "position_encoding_type": "SinusoidalInterleaved",
            },
        },
        "training": {
            "model_path": str(folder / "model"),
            "train_steps": ENDLESS,
            "save_checkpoint_steps": ENDLESS,
            "valid_steps": ENDLESS,
            "compute_dtype": "fp32",
            "batch_type": "tokens",
            "batch_size": round(BUDGET * task.tokens_per_step),
            "bucket_size": sentences,
            "num_workers": 0,  # so that all its work falls into its own turns
            "normalization": "tokens",
            "dropout": [task.dropout],
            "attention_dropout": [0.0],
            "label_smoothing": task.label_smoothing,
            "optim": "adam",
            "adam_beta1": task.beta1,
            "adam_beta2": task.beta2,
            "adam_eps": task.epsilon,
            "learning_rate": task.learning_rate * (task.hidden_dim * task.warmup_steps) ** 0.5,
            "decay_method": "noam",
            "warmup_steps": task.warmup_steps,
            "max_grad_norm": 0,
        },
    }


def main() -> None:
    """Train as asked."""
    TakeTurns.turns = Turns()
    data = Path(sys.argv[1])
    task = Assignment.read(data)
    torch.set_num_threads(task.threads)
    folder = data / "eole"
    if not folder.exists():
        prepare(folder, task, data)
    trainer.Trainer = TakeTurns
    sys.argv[1:] = ["train", "--config", str(folder / "config.yaml")]
    eole_main()


if __name__ == "__main__":
    main()
