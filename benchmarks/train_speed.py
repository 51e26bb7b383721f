"""How fast dtrain trains on a CPU, side by side with other toolkits and plain PyTorch loops.

    benchmarks/peers/install                     once: environments of the other toolkits
    python benchmarks/train_speed.py             all of which there is an environment
    python benchmarks/train_speed.py --peer fairseq --peer lean
    python benchmarks/train_speed.py --scaling   one process of all threads, processes of one

All train the same model on the same pieces of the same text, in fp32, with about the same number of
target tokens a step and the same number of threads. Each does so with its own batches, model, loss
and optimizer. `benchmarks/contest.py` says how they take turns.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout is enough

import numpy as np
import torch

from benchmarks.contest import Entry, compete, peer_command
from benchmarks.peers.turns import Assignment, Rows
from benchmarks.speed_report import draw, report
from benchmarks.yardstick import ROOT, Shape, describe_machine, write_corpus, write_results
from dtrain.config import Config
from dtrain.data.plan import Cursor
from dtrain.data.preparation import num_cores, prepare
from dtrain.data.store import PreparedData
from dtrain.parts import build_plan
from dtrain.schedule import learning_rate

PLANNED_STEPS = 200  # of dtrain's plan, which the contestant `planned` trains on again and again

PLAIN = {
    "bucketed": ("nn.Transformer, bucketed by length", "also drops attention and inner values"),
    "lean": ("nn.Transformer, bucketed, dtrain's dropout", ""),
    "planned": ("nn.Transformer, dtrain's batches padded", "also drops attention and inner values"),
    "random": ("nn.Transformer, random batches", "also drops attention and inner values"),
}
"""By name: loops around torch.nn.Transformer, and what they drop more than the paper."""

PEERS = {
    "huggingface": ("huggingface", "Hugging Face MarianMT, plain loop", ["loop"], ""),
    "huggingface-trainer": (
        "huggingface",
        "Hugging Face MarianMT, Seq2SeqTrainer",
        ["trainer"],
        "batches of a fixed number of sentences, the longest first; clips gradients",
    ),
    "fairseq": ("fairseq", "fairseq", [], ""),
    "joeynmt": (
        "joeynmt",
        "JoeyNMT",
        [],
        "does not sort by length; also drops attention and inner values; loss is a divergence",
    ),
    "eole": ("eole", "eole (OpenNMT)", [], "norm before sublayers; also drops inner values"),
}
"""By name: the folder of peers/, a title, arguments of its train.py, and where its work differs."""


def own_entry(folder: Path, threads: int) -> Entry:
    """Let dtrain take part."""
    return Entry("dtrain", "dtrain", _own_command(folder, "dtrain.yaml"), threads=threads)


def plain_entry(name: str, folder: Path, threads: int) -> Entry:
    """Let a plain loop take part."""
    title, notes = PLAIN[name]
    program = str(ROOT / "benchmarks" / "plain_transformer.py")
    return Entry(name, title, (sys.executable, program, str(folder), name), notes, threads=threads)


def peer_entry(name: str, folder: Path, threads: int) -> Entry:
    """Let another toolkit take part, or say why it cannot."""
    peer, title, arguments, notes = PEERS[name]
    command, missing = peer_command(peer, "train.py", str(folder), *arguments)
    return Entry(name, title, command, notes, missing, threads=threads)


def entries_of(names: Sequence[str], folder: Path, threads: int) -> list[Entry]:
    """Let dtrain and some others take part."""
    others = [(plain_entry if n in PLAIN else peer_entry)(n, folder, threads) for n in names]
    return [own_entry(folder, threads), *others]


def scaling_entries(config: Config, folder: Path, threads: int) -> list[Entry]:
    """Let dtrain be `threads` processes of one thread, one process of all, and one of one.

    All make the same steps, of as many micro-batches as there are threads.
    """
    found = []
    for ranks, each in ((threads, 1), (1, threads), (1, 1)):
        name = f"{ranks}x{each}"
        write_config(scaled(config, threads, each), folder / f"{name}.yaml")
        title = f"{ranks} process{'es' * (ranks > 1)} of {each} thread{'s' * (each > 1)}"
        found.append(
            Entry(name, title, _own_command(folder, f"{name}.yaml"), ranks=ranks, threads=each)
        )
    return found


def scaled(config: Config, parts: int, threads: int) -> Config:
    """Cut each step into so many micro-batches, for processes of so many threads."""
    micro_batch = config.batch.tokens_per_step // parts
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"threads": threads}),
            "batch": config.batch.model_copy(
                update={
                    "tokens_per_micro_batch": micro_batch,
                    "tokens_per_step": micro_batch * parts,
                }
            ),
        }
    )


def _own_command(folder: Path, config: str) -> tuple[str, ...]:
    program = str(ROOT / "benchmarks" / "own_training.py")
    return sys.executable, program, str(folder), config


# ------------------------------------------------------------------ what all of them are given


def multi30k() -> Path | None:
    """Find Multi30k beside the checkout or in it."""
    places = ROOT.parent / "shared" / "data" / "multi30k", ROOT / "data" / "multi30k"
    return next((place for place in places if (place / "train.en").exists()), None)


def benchmark_config(text: Path, folder: Path, threads: int) -> Config:
    """Give the settings: 3+3 layers of 256, 8,000 pieces, 4,096 target tokens a step."""
    return Config.model_validate(
        {
            "run": {
                "name": "speed",
                "dir": str(folder / "run"),
                "device": "cpu",
                "threads": threads,
            },
            "data": {
                "train": [{"source": str(text / "train.en"), "target": str(text / "train.de")}],
                "dir": str(folder / "prepared"),
                "max_length": 128,
            },
            "vocabulary": {"size": 8000},
            "model": {
                "hidden_dim": 256,
                "num_heads": 4,
                "feed_forward_dim": 1024,
                "num_encoder_layers": 3,
                "num_decoder_layers": 3,
            },
            "batch": {"tokens_per_step": 4096, "tokens_per_micro_batch": 4096},
            # It stands still while others have their turns, and that is no failure.
            "distributed": {"first_step_timeout": 24 * 3600},
            "precision": "fp32",
            "kernels": {"compile": False},
            "validation": {"every_steps": 0},
            "checkpoint": {"every_steps": 0},
            "metrics": {"every_steps": 1},
            "wandb": {"mode": "disabled"},
        }
    )


def write_config(config: Config, path: Path) -> None:
    """Write settings where dtrain reads them."""
    path.write_text(config.to_yaml(), encoding="utf-8")


def hand_out(config: Config, folder: Path) -> None:
    """Prepare the text, and write what all contestants are given: model, pieces, dtrain's steps."""
    prepare(config.data, config.vocabulary, Path(config.data.dir), lambda _: None)
    write_config(config, folder / "dtrain.yaml")
    data = PreparedData.open(Path(config.data.dir))
    ids = np.arange(len(data.train))
    for name, (values, lengths) in zip(("source", "target"), data.train.gather(ids), strict=True):
        Rows.of(values, lengths).write(folder, name)
    planned = islice(build_plan(config, data).steps(Cursor()), PLANNED_STEPS)
    steps = [np.concatenate(step.micro_batches) for step in planned]
    Rows.of(np.concatenate(steps), np.array([len(step) for step in steps])).write(folder, "planned")
    assignment(config, data.vocabulary.target_size).write(folder)


def assignment(config: Config, vocabulary_size: int) -> Assignment:
    """Say what is trained to those who know nothing of dtrain."""
    assert isinstance(config.run.threads, int)
    model, adam, warmup = config.model, config.optimizer, config.schedule.warmup_steps
    peak = learning_rate(warmup, config.schedule, adam.learning_rate, model.hidden_dim, 0)
    return Assignment(
        threads=config.run.threads,
        seed=config.run.seed,
        tokens_per_step=config.batch.tokens_per_step,
        hidden_dim=model.hidden_dim,
        num_heads=model.num_heads,
        feed_forward_dim=model.feed_forward_dim,
        num_layers=model.num_encoder_layers,
        vocabulary_size=vocabulary_size,
        dropout=model.dropout,
        label_smoothing=config.loss.label_smoothing,
        learning_rate=peak,
        warmup_steps=warmup,
        beta1=adam.beta1,
        beta2=adam.beta2,
        epsilon=adam.epsilon,
    )


def model_shapes(config: Config) -> list[Shape]:
    """List what is multiplied: a large square for the machine's ceiling, then the model's own."""
    tokens, model = config.batch.tokens_per_step, config.model
    width, inner = model.hidden_dim, model.feed_forward_dim
    return [
        (16 * width, 16 * width, 16 * width),
        (tokens, width, width),
        (tokens, width, 3 * width),
        (tokens, width, inner),
        (tokens, inner, width),
        (tokens // 8, width, config.vocabulary.size),
    ]


# ------------------------------------------------------------------ the command


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", action="append", choices=[*PLAIN, *PEERS], help="only these")
    parser.add_argument("--scaling", action="store_true", help="dtrain alone, in processes")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1, help="of each contestant in a round")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    facts = describe_machine(torch.device("cpu"), options.threads)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = multi30k()
        facts["text"] = "Multi30k" if text else "made up, lengths like Multi30k's"
        if text is None:
            write_corpus(folder, num_pairs=29_000, mean_words=12, num_words=20_000)
        config = benchmark_config(text or folder, folder, options.threads)
        hand_out(config, folder)
        if options.scaling:
            name, heading = "train-scaling-cpu", "One process of many threads, or many of one"
            entries = scaling_entries(config, folder, options.threads)
        else:
            name, heading = "train-speed-cpu", "Training speed on the CPU"
            entries = entries_of(options.peer or [*PLAIN, *PEERS], folder, options.threads)
        able = [entry for entry in entries if not entry.missing]
        contest = compete(able, model_shapes(config), options.rounds, options.steps)
        of_model = config.model, config.vocabulary.size
        write_results(options.out, name, *report(heading, contest, entries, *of_model, facts))
        caption = f"dtrain {facts['dtrain']}, {facts['processor']}, {options.threads} threads"
        draw(contest, entries, options.out / f"{name}.png", caption)


if __name__ == "__main__":
    main()
