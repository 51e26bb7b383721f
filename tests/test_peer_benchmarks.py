"""train_speed.py and its contestants: who is asked, what is measured, and what is reported."""

import ast
import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch_twins import random_ids

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# E402: these are found by the path that was just set.
from benchmarks import contest, plain_transformer, speed_report, train_speed, yardstick  # noqa: E402
from benchmarks.contest import Contest, Entry, Turn  # noqa: E402
from benchmarks.peers import batches, text, turns  # noqa: E402
from benchmarks.peers.turns import PAD, Assignment, Rows, Step  # noqa: E402
from dtrain import batch  # noqa: E402
from dtrain.config import Config, load_config  # noqa: E402
from dtrain.data.store import PreparedData  # noqa: E402
from dtrain.model.settings import ModelSettings  # noqa: E402
from dtrain.schedule import ScheduleSettings, learning_rate  # noqa: E402

PEERS = sorted({peer for peer, *_ in train_speed.PEERS.values()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What contestants are given, with everything small."""
    folder = tmp_path_factory.mktemp("speed")
    yardstick.write_corpus(folder, 300, 6, 200)
    train_speed.hand_out(tiny_config(folder), folder)
    return folder


def tiny_config(folder: Path) -> Config:
    """The benchmark's settings, with everything small."""
    config = train_speed.benchmark_config(folder, folder, threads=1)
    return config.model_copy(
        update={
            "vocabulary": config.vocabulary.model_copy(update={"size": 120}),
            "model": config.model.model_copy(update={"hidden_dim": 32, "feed_forward_dim": 64}),
            "batch": config.batch.model_copy(
                update={"tokens_per_step": 256, "tokens_per_micro_batch": 256}
            ),
        }
    )


# ------------------------------------------------------------------ what contestants are given


def test_everybody_is_given_the_pieces_that_dtrain_trains_on(folder):
    store = PreparedData.open(folder / "prepared").train
    sides = [Rows.read(folder, side) for side in ("source", "target")]
    ids = np.array([7, 0, 299 - 1])
    for rows, (tokens, lengths) in zip(sides, store.gather(ids), strict=True):
        assert len(rows) == len(store)
        assert [len(rows[i]) for i in ids] == lengths.tolist()
        assert np.concatenate([rows[i] for i in ids]).tolist() == tokens.tolist()
        assert {int(rows[i][-1]) for i in range(len(rows))} == {turns.EOS}
    assert (turns.PAD, turns.UNK, turns.BOS, turns.EOS) == (
        batch.PAD_ID,
        batch.UNK_ID,
        batch.BOS_ID,
        batch.EOS_ID,
    )


def test_planned_steps_are_full_and_pass_over_the_text(folder):
    plan, target = Rows.read(folder, "planned"), Rows.read(folder, "target")
    totals = [target.lengths[plan[step]].sum() for step in range(len(plan))]
    assert max(totals) <= 256
    assert np.mean(totals) > 0.9 * 256
    first = plan.values[: len(target)]
    assert len(np.unique(first)) > 0.9 * len(target)


def test_everybody_learns_at_the_same_rate(folder):
    task, settings = Assignment.read(folder), ScheduleSettings()
    for step in (1, 100, settings.warmup_steps, 3 * settings.warmup_steps):
        expected = learning_rate(step, settings, 1.0, task.hidden_dim, 0)
        assert task.learning_rate_at(step) == pytest.approx(expected)


def test_pieces_become_words_and_back(folder, tmp_path):
    task = Assignment.read(folder)
    text.write_text(tmp_path, "train", task, folder)
    words, rows = text.words_of(task), Rows.read(folder, "target")
    lines = (tmp_path / "train.target").read_text(encoding="utf-8").splitlines()
    assert len(words) == len(set(words)) == 120
    for line, row in zip(lines, map(rows.__getitem__, range(len(rows))), strict=True):
        assert [words.index(word) for word in line.split()] == row[:-1].tolist()


@pytest.mark.parametrize("feed", [batches.bucketed, batches.randomly])
def test_loops_see_every_sentence_once_an_epoch(folder, feed):
    source, target = Rows.read(folder, "source"), Rows.read(folder, "target")
    endless, seen = feed(source, target, 256, np.random.default_rng(1)), []
    while len(seen) < len(source):
        ids = next(endless)
        seen += ids.tolist()
        assert target.lengths[ids].sum() < 256 + 40
    assert sorted(seen) == list(range(len(source)))


# ------------------------------------------------------------------ the contestants


def test_the_plain_transformer_reads_no_padding_and_no_future(folder):
    model = plain_transformer.PlainTransformer(Assignment.read(folder)).eval()
    source, target = (torch.tensor(random_ids([7], 120, seed)) for seed in (1, 2))
    logits = model(source, target)
    torch.testing.assert_close(model(nn.functional.pad(source, (0, 3), value=PAD), target), logits)
    changed = target.clone()
    changed[0, 4] = 5
    torch.testing.assert_close(model(source, changed)[:, :4], logits[:, :4])


@pytest.mark.parametrize("name", train_speed.PLAIN)
def test_plain_loops_train(folder, name):
    plan, target = Rows.read(folder, "planned"), Rows.read(folder, "target")
    steps = list(islice(plain_transformer.contestant(name, folder), 3))
    for step in steps:
        assert 0 < step.target_tokens <= step.target_cells
        assert 0 < step.source_tokens <= step.source_cells
        assert step.target_tokens < 256 + 40
        assert 3 < step.loss < 12
    if name == "planned":
        expected = [target.lengths[plan[i]].sum() for i in range(3)]
        assert [step.target_tokens for step in steps] == expected


@pytest.mark.parametrize("peer", PEERS)
def test_peers_are_pinned_described_and_know_nothing_of_dtrain(peer):
    place = ROOT / "benchmarks" / "peers" / peer
    for line in (place / "requirements.txt").read_text(encoding="utf-8").splitlines():
        assert not line or line.startswith("#") or "==" in line, line
    assert (place / "README.md").exists()
    programs = [*place.glob("*.py"), *place.parent.glob("*.py")]
    for program in [*programs, ROOT / "benchmarks" / "plain_transformer.py"]:
        for node in ast.walk(ast.parse(program.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "dtrain"], program


def test_environments_that_are_not_there_are_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(contest, "PEERS", tmp_path)
    assert contest.peer_command("fairseq", "train.py")[1] == (
        "not installed: benchmarks/peers/install fairseq"
    )
    environment = tmp_path / "fairseq" / ".venv"
    environment.mkdir(parents=True)
    log = "Collecting x\nERROR: no wheel for x\nnotice: pip is old\n"
    (environment / "install.log").write_text(log, encoding="utf-8")
    assert contest.peer_command("fairseq", "train.py")[1] == (
        "could not be installed: ERROR: no wheel for x"
    )
    (environment / "complete").touch()
    command, missing = contest.peer_command("fairseq", "train.py", "FOLDER")
    assert not missing
    assert [Path(part).name for part in command] == ["python", "train.py", "FOLDER"]


def test_scaling_cuts_the_same_step_among_processes(folder, tmp_path):
    config = tiny_config(folder)
    entries = train_speed.scaling_entries(config, tmp_path, 2)
    assert [(entry.ranks, entry.threads) for entry in entries] == [(2, 1), (1, 2), (1, 1)]
    for entry in entries:
        found = load_config(tmp_path / entry.command[-1])
        assert found.batch.tokens_per_step == 256
        assert found.batch.micro_batches_per_step == 2
        assert found.run.threads == entry.threads


# ------------------------------------------------------------------ the contest

FAKE = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.peers.turns import Step, Turns

def steps():
    number = 0
    while True:
        number += 1
        print("noise from a library")
        with open(sys.argv[1], "a") as diary:
            diary.write(os.environ.get("RANK", sys.argv[2]) + " ")
        if sys.argv[2] == "weak" and number == 4:
            raise MemoryError("no room for step 4")
        yield Step(10 * number, 20, 40, 50, 1.5)

Turns().take(steps())
"""


@pytest.fixture
def fake(tmp_path):
    """Makes entries of a fake contestant, which writes its name into a diary at each step."""
    (tmp_path / "fake.py").write_text(FAKE, encoding="utf-8")

    def make(name: str, **changes) -> Entry:
        command = sys.executable, str(tmp_path / "fake.py"), str(tmp_path / "diary"), name
        return Entry(name, f"the {name} one", command, **changes)

    return make


@pytest.mark.slow
def test_contestants_take_turns_and_the_failing_are_named(fake, tmp_path, capsys):
    mute = Entry("mute", "one that says nothing", ("false",))
    entries = [fake("first"), fake("second"), fake("weak"), mute]
    found = contest.compete(entries, [(8, 8, 8)], rounds=3, steps=2)
    diary = (tmp_path / "diary").read_text(encoding="utf-8").split()
    # One uncounted start and step, another start and step, one step more; then rounds of two.
    assert diary[:9] == ["first"] * 3 + ["second"] * 3 + ["weak"] * 3
    assert diary[9::2] == ["first", "second", "weak", "second", "first", "first", "second"]
    assert diary[10::2] == diary[9::2]
    assert found.failed["weak"].endswith("MemoryError: no room for step 4")
    assert found.failed["mute"].startswith("ended with 1")
    assert list(found.turns) == ["first", "second"]
    assert len(found.turns["first"]) == len(found.products[8, 8, 8]) == 3
    last = found.turns["first"][-1]
    assert last.total("source_tokens") == 10 * (7 + 8)
    assert last.seconds > 0
    assert 1 < last.memory_mib < 1000
    assert 0 < found.starts["first"] < 60
    assert "MemoryError" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_of_one_contestant_step_together(fake, tmp_path):
    contest.compete([fake("team", ranks=2)], [], rounds=2, steps=1)
    diary = (tmp_path / "diary").read_text(encoding="utf-8").split()
    assert [sorted(diary[i : i + 2]) for i in range(0, len(diary), 2)] == [["0", "1"]] * 5


def test_what_is_no_answer_is_quoted():
    with pytest.raises(contest.ContestantError, match="said 'hello' in place of its steps"):
        contest.read_answer("hello\n")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_dtrain_makes_the_steps_that_it_planned(folder):
    with contest.started(train_speed.own_entry(folder, threads=1)) as dtrain:
        found = dtrain.turn(2)
    plan = Rows.read(folder, "planned")
    for number, step in enumerate(found.steps):
        for side in ("source", "target"):
            expected = Rows.read(folder, side).lengths[plan[number]].sum()
            assert getattr(step, f"{side}_tokens") == expected
        assert step.target_cells == 256
        assert 3 < step.loss < 12
    assert found.cpu_seconds > 0


@pytest.mark.exhaustive
def test_two_processes_of_dtrain_make_the_steps_of_one(folder):
    found = []
    for entry in train_speed.scaling_entries(tiny_config(folder), folder, 2)[:2]:
        with contest.started(entry) as dtrain:
            found.append(dtrain.turn(3))
    two, one = found
    assert two.total("target_tokens") == one.total("target_tokens")
    assert two.total("loss") == pytest.approx(one.total("loss"), rel=1e-4)


# ------------------------------------------------------------------ the report


def turn(tokens: int, seconds: float, foreign: float = 0.0) -> Turn:
    step = Step(tokens, tokens, 2 * tokens, 4 * tokens, 3.0)
    return Turn([step], seconds, 2 * seconds, foreign, 1024.0)


def test_the_report_compares_round_by_round_and_leaves_nobody_out(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/train_speed.py", "--rounds", "3"])
    found = Contest(
        turns={
            "dtrain": [turn(400, 1.0), turn(400, 2.0), turn(400, 1.0, foreign=1.0)],
            "plain": [turn(200, 1.0), turn(200, 2.0), turn(200, 4.0)],
        },
        starts={"dtrain": 3.0, "plain": 4.0},
        failed={"weak": "ended with 1: MemoryError"},
        products={(2, 2, 2): [1e9, 3e9, 2e9], (4, 4, 4): [5e9, 4e9, 4e9]},
    )
    entries = [
        Entry("dtrain", "dtrain", ()),
        Entry("plain", "plain loop", (), notes="drops more"),
        Entry("weak", "weak toolkit", ()),
        Entry("gone", "gone toolkit", (), missing="not installed: benchmarks/peers/install gone"),
    ]
    model = ModelSettings()
    results, markdown = speed_report.report("Speed", found, entries, model, 100, {"cores": 2})
    (ratio,) = results["ratios"]
    assert ratio["dtrain against"] == "plain loop"
    assert ratio["ratio of target tokens/s"] == "2.00 (2.00 to 8.00)"
    assert ratio["in quiet rounds"] == "2.00 (2.00 to 2.00), 2 of 3"
    ours, plain, weak, gone = results["contestants"]
    flops = yardstick.training_flops(model, 100, 400, 400)
    assert ours["share of matmul rate"] == f"{flops / 4e9:.0%}"
    assert ours["target tokens/s"] == "400 (200 to 400)"
    assert ours["per CPU second"] == "200 (100 to 200)"
    assert ours["fill of source, target"] == "50.0%, 25.0%"
    assert plain["notes"] == "drops more"
    assert plain["first step after s"] == 4.0
    assert (weak["target tokens/s"], weak["notes"]) == ("not measured", "ended with 1: MemoryError")
    assert (gone["target tokens/s"], gone["notes"]) == (
        "not measured",
        "not installed: benchmarks/peers/install gone",
    )
    assert "python benchmarks/train_speed.py --rounds 3" in markdown
    assert "gone toolkit" in markdown
    json.dumps(results)


@pytest.mark.slow
def test_a_chart_is_drawn_of_those_who_were_measured(tmp_path):
    found = Contest(turns={"dtrain": [turn(400, 1.0)], "plain": [turn(200, 1.0), turn(200, 4.0)]})
    entries = [Entry("dtrain", "dtrain", ()), Entry("weak", "", ()), Entry("plain", "a loop", ())]
    speed_report.draw(found, entries, tmp_path / "speed.svg", "a machine")
    drawn = (tmp_path / "speed.svg").read_text(encoding="utf-8")
    for text_shown in ("dtrain", "a loop", "a machine", "1,024"):
        assert f"<!-- {text_shown} -->" in drawn.replace("<!--  ", "<!-- ")
