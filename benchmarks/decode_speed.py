"""How fast dtrain translates on a CPU, side by side with other toolkits.

    benchmarks/peers/install
    python benchmarks/decode_speed.py

All translate the same sentences with the same weights: those of a model that dtrain trains first,
for some minutes, so that its sentences end where sentences end. Whoever had the weights wrong would
be found out: the table says how many translations are dtrain's own, and how likely dtrain's model
finds all of them. No length penalty is used, since each toolkit has another formula for it; one
row more shows dtrain with the one that it uses by itself.

Contestants are processes of their own, which take turns of some batches: see `contest.py`.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout is enough

import numpy as np
import torch

from benchmarks.contest import Contest, Entry, Turn, compete, peer_command
from benchmarks.peers.translating import Sentence, Task
from benchmarks.peers.turns import Rows
from benchmarks.speed_report import OUR_COLOUR, QUIET, THEIR_COLOUR, spread
from benchmarks.train_speed import benchmark_config, multi30k
from benchmarks.yardstick import ROOT, Row, describe_machine, table, write_corpus, write_results
from dtrain.batch import EOS_ID, Batch
from dtrain.config import Config
from dtrain.data.preparation import num_cores
from dtrain.model.positional_encoding import sinusoids
from dtrain.model.transformer import MAX_GROWTH, Transformer
from dtrain.parts import trained_model

OURS = "dtrain"
PEERS = {
    "ctranslate2": ("CTranslate2", ("float32",)),
    "ctranslate2-int8": ("CTranslate2, int8", ("int8",)),
    "huggingface": ("transformers, MarianMT", ()),
    "fairseq": ("fairseq", ()),
    "joeynmt": ("JoeyNMT", ()),
}
"""By name: title, and arguments of its program."""

CHECKPOINT = "last"
TEST = "test_2016_flickr.en"
MOST_SENTENCES = 1000
LONGEST = 512  # positions that contestants get encodings of

# ------------------------------------------------------------------ what is translated, and by what


def train(text: Path, run: Path, threads: int) -> None:
    """Train a model until its translations end by themselves: some minutes."""
    config = benchmark_config(text, run.parent, threads).model_dump(exclude_unset=True)
    config["run"] |= {"name": run.name, "dir": str(run), "max_steps": 400}
    config["model"] |= {"dropout": 0.0}
    config["batch"] = {"tokens_per_step": 2048, "tokens_per_micro_batch": 2048}
    config["optimizer"] = {"learning_rate": 0.0015}
    config["schedule"] = {"name": "inverse_sqrt", "warmup_steps": 100}
    config["checkpoint"] = {"every_steps": 100}
    run.parent.mkdir(parents=True, exist_ok=True)
    settings = run.parent / f"{run.name}.yaml"
    settings.write_text(Config.model_validate(config).to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "dtrain.train", "--config", str(settings)]
    subprocess.run(command, check=True, cwd=ROOT)


def hand_out(run: Path, text: Path, folder: Path, task: Task) -> tuple[Task, Transformer]:
    """Write sentences, sizes and weights for all contestants; gives sizes and model.

    Raises:
        SystemExit: if the model is of a kind that contestants are not told how to build.
    """
    model, _, vocabulary, _ = trained_model(run, CHECKPOINT)
    sizes = model.settings
    if sizes.norm != "post" or not sizes.tie_embeddings or not vocabulary.shared:
        raise SystemExit(f"{run}: only post-norm with one matrix for both sides can be handed on")
    task = replace(
        task,
        hidden_dim=sizes.hidden_dim,
        num_heads=sizes.num_heads,
        feed_forward_dim=sizes.feed_forward_dim,
        num_encoder_layers=sizes.num_encoder_layers,
        num_decoder_layers=sizes.num_decoder_layers,
        vocabulary_size=vocabulary.target_size,
        max_growth=MAX_GROWTH,
        max_length=sizes.max_decode_length,
    )
    task.write(folder)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays["positions"] = sinusoids(LONGEST, sizes.hidden_dim).float().numpy()
    np.savez(folder / "weights.npz", allow_pickle=False, **arrays)
    lines = text.read_text(encoding="utf-8").split("\n")[:MOST_SENTENCES]
    sentences = in_batches(vocabulary.encode_source(lines), task.batch_size)
    lengths = np.array([len(sentence) for sentence in sentences])
    Rows.of(np.concatenate(sentences), lengths).write(folder, "source")
    return task, model


def in_batches(sentences: list[Sentence], size: int) -> list[Sentence]:
    """Sort sentences by length, cut them into full batches, and shuffle these."""
    whole = sorted(sentences[: len(sentences) // size * size], key=len)
    order = np.random.default_rng(1).permutation(len(whole) // size)
    return [sentence for i in order for sentence in whole[i * size : (i + 1) * size]]


def entries_of(peers: Sequence[str], run: Path, folder: Path, task: Task) -> list[Entry]:
    """Say who takes part: dtrain first."""
    program = str(ROOT / "benchmarks" / "own_decoding.py")

    def own(name: str, title: str, penalty: str) -> Entry:
        command = (sys.executable, program, name, str(folder), str(run), CHECKPOINT, penalty)
        return Entry(name, title, command, threads=task.threads)

    entries = [own(OURS, "dtrain", "0")]
    if task.beam_size > 1:
        entries.append(own("dtrain-penalty", "dtrain, length penalty 0.6", "0.6"))
    for name in peers:
        title, arguments = PEERS[name]
        environment = name.partition("-")[0]
        command, missing = peer_command(environment, "decode.py", name, str(folder), *arguments)
        entries.append(Entry(name, title, command, missing=missing, threads=task.threads))
    return entries


# ------------------------------------------------------------------ what came of it


def translations_of(folder: Path, name: str) -> dict[int, Sentence]:
    """Read what a contestant wrote: its translation of each sentence that it came to."""
    path = folder / f"{name}.jsonl"
    found: dict[int, Sentence] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        found |= dict(enumerate(answer["translations"], answer["first"]))
    return found


@torch.inference_mode()
def log_probability(model: Transformer, folder: Path, found: dict[int, Sentence]) -> float:
    """Give what dtrain's model thinks of translations: the mean of their log-probabilities."""
    sources, total, rows = Rows.read(folder, "source"), 0.0, sorted(found)
    for first in range(0, len(rows), 64):
        some = rows[first : first + 64]
        targets = [[*found[row], EOS_ID] for row in some]
        batch = Batch.padded([sources[row].tolist() for row in some], targets)
        log_p = model(batch).log_softmax(-1).gather(2, batch.target_out[..., None])[..., 0]
        total += float((log_p * batch.target_layout.mask).sum())
    return total / len(rows)


@dataclass(frozen=True)
class Result:
    """What a contest of one beam size showed.

    Attributes:
        task: what was asked.
        folder: where contestants wrote their translations.
        entries: who was to take part, dtrain first.
        contest: what happened.
        judge: dtrain's model.
    """

    task: Task
    folder: Path
    entries: list[Entry]
    contest: Contest
    judge: Transformer

    @property
    def title(self) -> str:
        """How it searched."""
        size = self.task.beam_size
        return "Greedy" if size == 1 else f"Beam of {size}"

    @property
    def measured(self) -> list[Entry]:
        """Who came through."""
        return [entry for entry in self.entries if entry.name in self.contest.turns]


def contestant_row(entry: Entry, result: Result) -> Row:
    """Sum a contestant up; one that was not measured has only the reason why."""
    contest, task, folder = result.contest, result.task, result.folder
    why = entry.missing or contest.failed.get(entry.name)
    if why:
        return {"contestant": entry.title, "sentences/s": "not measured", "notes": why}
    turns = contest.turns[entry.name]
    ours, theirs = (translations_of(folder, name) for name in (OURS, entry.name))
    both = ours.keys() & theirs.keys()
    same = sum(ours[row] == theirs[row] for row in both)
    seconds = sum(turn.seconds for turn in turns)
    return {
        "contestant": entry.title,
        "sentences/s": spread([rate(turn, task) for turn in turns], 1),
        "tokens/s": spread([turn.rate for turn in turns]),
        "sentences per CPU second": spread([cpu_rate(turn, task) for turn in turns], 1),
        "like dtrain's": f"{same} of {len(both)}",
        "log-probability": f"{log_probability(result.judge, folder, theirs):.3f}",
        "tokens a sentence": statistics.mean(len(ids) + 1 for ids in theirs.values()),
        "peak memory MiB": turns[-1].memory_mib,
        "first batch after s": contest.starts[entry.name],
        "cores used": sum(turn.cpu_seconds for turn in turns) / seconds,
        "by others": sum(turn.foreign_seconds for turn in turns) / seconds,
    }


def rate(turn: Turn, task: Task) -> float:
    """Sentences a second."""
    return len(turn.steps) * task.batch_size / turn.seconds


def cpu_rate(turn: Turn, task: Task) -> float:
    """Sentences a second of one core's work; other processes change it less."""
    return len(turn.steps) * task.batch_size / turn.cpu_seconds


def ratio_rows(result: Result) -> Iterator[Row]:
    """Compare dtrain with each other contestant, round by round."""
    turns = result.contest.turns
    for entry in result.measured if OURS in turns else []:
        if entry.name == OURS:
            continue
        rounds = list(zip(turns[OURS], turns[entry.name], strict=True))
        quiet = [(a, b) for a, b in rounds if max(a.foreign_cores, b.foreign_cores) < QUIET]
        in_quiet = spread([b.seconds / a.seconds for a, b in quiet], 2) if quiet else "none"
        yield {
            "dtrain against": entry.title,
            "ratio of sentences/s": spread([b.seconds / a.seconds for a, b in rounds], 2),
            "in quiet rounds": f"{in_quiet}, {len(quiet)} of {len(rounds)}",
            "per CPU second": spread([b.cpu_seconds / a.cpu_seconds for a, b in rounds], 2),
        }


def report(results: Sequence[Result], facts: Row) -> tuple[dict[str, object], str]:
    """Say it in JSON values and in Markdown."""
    command = shlex.join(["python", "benchmarks/decode_speed.py", *sys.argv[1:]])
    values: dict[str, object] = {"command": command, "machine": facts}
    lines = [
        "# Translation speed on the CPU\n",
        f"`{command}`\n",
        *(f"- {name}: {value}" for name, value in facts.items()),
        f"\nMedian (least to most) of the rounds. In quiet ones less than {QUIET} cores worked for "
        "others. Loading is not counted: it is in the time of the first batch.\n",
    ]
    for result in results:
        ratios = list(ratio_rows(result))
        rows = [contestant_row(entry, result) for entry in result.entries]
        lines += [f"## {result.title}\n", table(ratios), table(rows)]
        turns = result.contest.turns.items()
        values[result.title] = {
            "task": asdict(result.task),
            "ratios": ratios,
            "contestants": rows,
            "failed": result.contest.failed,
            "rounds": {name: [asdict(turn) for turn in every] for name, every in turns},
        }
    return values, "\n".join(lines)


def draw(results: Sequence[Result], path: Path, caption: str) -> None:
    """Draw sentences a second as bars, dtrain's in another colour, a panel for each beam."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.2 + 0.45 * max(len(result.entries) for result in results)
    size = 5.5 * len(results), height
    figure, panels = pyplot.subplots(1, len(results), figsize=size, layout="constrained")
    for axes, result in zip(np.atleast_1d(panels), results, strict=True):
        turns = [result.contest.turns[entry.name] for entry in result.measured]
        rates = [[rate(turn, result.task) for turn in every] for every in turns]
        middles = [statistics.median(values) for values in rates]
        whiskers = [
            [m - min(v) for m, v in zip(middles, rates, strict=True)],
            [max(v) - m for m, v in zip(middles, rates, strict=True)],
        ]
        ours = [entry.name.startswith(OURS) for entry in result.measured]
        colours = [OUR_COLOUR if own else THEIR_COLOUR for own in ours]
        titles = [entry.title for entry in result.measured]
        axes.barh(titles, middles, xerr=whiskers, color=colours, capsize=3)
        for row, middle in enumerate(middles):  # at the left, where no whisker runs through them
            axes.text(0, row, f"  {middle:,.0f}", color="white", va="center")
        axes.set_title(f"{result.title}: sentences a second")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption, fontsize="small", color="#475569")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ------------------------------------------------------------------ the command


def measure(
    run: Path, text: Path, task: Task, peers: Sequence[str], rounds: int, batches: int
) -> Result:
    """Hold the contest of one beam size, in a folder of its own beside the text."""
    folder = Path(tempfile.mkdtemp(dir=text.parent))
    task, judge = hand_out(run, text, folder, task)
    entries = entries_of(peers, run, folder, task)
    able = [entry for entry in entries if not entry.missing]
    return Result(task, folder, entries, compete(able, [], rounds, batches), judge)


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, metavar="RUN", help="trained there if there is none")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="only these")
    parser.add_argument("--beam-size", type=int, action="append", help="only these; 1: greedy")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2, help="of each contestant in a round")
    parser.add_argument("--batch-size", type=int, default=64, help="sentences")
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
        run = (options.model or folder / "run").absolute()
        if not run.exists():
            train(text or folder, run, options.threads)
        asked = folder / "asked"
        asked.write_bytes((text / TEST if text else folder / "train.en").read_bytes())
        peers, effort = options.peer or list(PEERS), (options.rounds, options.batches)
        results = [
            measure(run, asked, Task(options.threads, options.batch_size, beam), peers, *effort)
            for beam in options.beam_size or (1, 5)
        ]
        write_results(options.out, "decode-speed-cpu", *report(results, facts))
        caption = f"dtrain {facts['dtrain']}, {facts['processor']}, {options.threads} threads"
        draw(results, options.out / "decode-speed-cpu.png", caption)


if __name__ == "__main__":
    main()
