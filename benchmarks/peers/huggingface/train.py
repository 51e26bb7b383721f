"""Trains MarianMT with Hugging Face transformers, as a contestant of benchmarks/train_speed.py.

python train.py FOLDER loop       batches bucketed by length, model and optimizer called by hand
python train.py FOLDER trainer    Seq2SeqTrainer with its sampler by length and its collator
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from benchmarks.peers.batches import bucketed, padded
from benchmarks.peers.turns import BOS, EOS, PAD, UNK, Assignment, Rows, Step, Turns

IGNORED = -100  # what transformers puts in place of padding in the labels
ENDLESS = 10**6


def build_model(task: Assignment) -> MarianMTModel:
    """Make a MarianMT of the paper's shape: ReLU, scaled embeddings, one matrix for all of them."""
    config = MarianConfig(
        vocab_size=task.vocabulary_size,
        d_model=task.hidden_dim,
        encoder_layers=task.num_layers,
        decoder_layers=task.num_layers,
        encoder_attention_heads=task.num_heads,
        decoder_attention_heads=task.num_heads,
        encoder_ffn_dim=task.feed_forward_dim,
        decoder_ffn_dim=task.feed_forward_dim,
        dropout=task.dropout,
        activation_function="relu",
        scale_embedding=True,
        use_cache=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        forced_eos_token_id=EOS,
        decoder_start_token_id=BOS,
    )
    return MarianMTModel(config)


def loop(task: Assignment, source: Rows, target: Rows) -> Iterator[Step]:
    """Train with a loop written by hand."""
    model = build_model(task).train()
    betas = task.beta1, task.beta2
    optimizer = torch.optim.Adam(model.parameters(), 0.0, betas, task.epsilon)
    batches = bucketed(source, target, task.tokens_per_step, np.random.default_rng(task.seed))
    for number, ids in enumerate(batches, 1):
        tokens, labels = (
            torch.from_numpy(padded([side[i] for i in ids])) for side in (source, target)
        )
        inputs = labels.roll(1, 1)
        inputs[:, 0] = BOS
        mask = (tokens != PAD).long()
        logits = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=inputs).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=PAD,
            label_smoothing=task.label_smoothing,
        )
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate_at(number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield count(tokens, labels, PAD, loss)


def count(source: Tensor, labels: Tensor, nothing: int, loss: Tensor) -> Step:
    """Sum a step up."""
    num_source, num_target = int((source != PAD).sum()), int((labels != nothing).sum())
    return Step(num_source, num_target, source.numel(), labels.numel(), loss.item())


class CountingTrainer(Seq2SeqTrainer):
    """The Trainer as it is, but that it remembers what it saw."""

    seen: Step

    def compute_loss(self, model, inputs, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN201 # the Trainer's own, which passes anything on
        """Compute the loss, and count tokens."""
        source, labels = inputs["input_ids"], inputs["labels"]
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        self.seen = count(source, labels, IGNORED, loss.detach())
        return result


class TakeTurns(TrainerCallback):
    """Ends a turn, and waits for the next, wherever the Trainer says that a step is done."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.trainer: CountingTrainer

    def on_step_end(self, *_: object, **__: object) -> None:
        """Say what was done in this step."""
        self.turns.done(self.trainer.seen)


def train(task: Assignment, source: Rows, target: Rows, folder: Path, turns: Turns) -> None:
    """Train with the Seq2SeqTrainer."""
    pieces = {f"piece{i}": i for i in range(task.vocabulary_size)}
    names = {"pad": PAD, "unk": UNK, "bos": BOS, "eos": EOS}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(pieces)),
        **{f"{name}_token": f"piece{i}" for name, i in names.items()},
    )
    model = build_model(task)
    data = [
        {
            "input_ids": source[i].tolist(),
            "attention_mask": [1] * len(source[i]),
            "labels": target[i].tolist(),
        }
        for i in range(len(source))
    ]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "huggingface-trainer"),
        # It counts sentences: so many hold the tokens of a step.
        per_device_train_batch_size=round(task.tokens_per_step / target.lengths.mean()),
        train_sampling_strategy="group_by_length",
        label_smoothing_factor=task.label_smoothing,
        learning_rate=task.learning_rate,
        lr_scheduler_type="inverse_sqrt",
        warmup_steps=task.warmup_steps,
        adam_beta1=task.beta1,
        adam_beta2=task.beta2,
        adam_epsilon=task.epsilon,
        max_steps=ENDLESS,
        seed=task.seed,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    take_turns = TakeTurns(turns)
    take_turns.trainer = CountingTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        callbacks=[take_turns],
    )
    turns.wait()
    take_turns.trainer.train()


def main() -> None:
    """Train as asked."""
    turns = Turns()
    folder, how = Path(sys.argv[1]), sys.argv[2]
    task = Assignment.read(folder)
    torch.set_num_threads(task.threads)
    torch.manual_seed(task.seed)
    source, target = Rows.read(folder, "source"), Rows.read(folder, "target")
    if how == "loop":
        turns.take(loop(task, source, target))
    train(task, source, target, folder, turns)


if __name__ == "__main__":
    main()
