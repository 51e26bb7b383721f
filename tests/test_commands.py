"""What each command prints and writes, on a run that was trained for all of them."""

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import sacrebleu
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dtrain.__main__ import main
from dtrain.checkpoint import checkpoint_name
from dtrain.commands import translate
from dtrain.commands.status import goodput
from dtrain.config import load_config
from dtrain.data.preparation import prepared_directory
from dtrain.durable import write_json
from dtrain.errors import UserError
from dtrain.lock import RunLock
from dtrain.peers import Sign
from dtrain.run_directory import Attempt, RunDirectory
from dtrain.schedule import learning_rate

SENTENCES = ["old dog", "red cat sees big blue bird", "new house likes small cat"]


@pytest.fixture
def run(trained) -> str:
    return str(trained.run_dir)


@pytest.fixture
def dtrain(capsys, monkeypatch):
    """Runs a command in this process, which has torch already; gives what it printed."""
    monkeypatch.delenv("RANK", raising=False)

    def call(*arguments: object, stdin: bytes = b"") -> str:
        piped = SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", piped)
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(dtrain, capsys):
    """Runs a command that must complain; gives the one message."""

    def call(*arguments: object, stdin: bytes = b"") -> str:
        with pytest.raises(SystemExit) as exit_:
            dtrain(*arguments, stdin=stdin)
        assert exit_.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("dtrain: ")
        assert message.count("dtrain: ") == 1
        return message

    return call


# ------------------------------------------------------------------ translate


def test_translate_gives_one_line_for_each_line(dtrain, run):
    together = dtrain("translate", run, stdin="".join(f"{s}\n" for s in SENTENCES).encode())
    alone = [dtrain("translate", run, stdin=f"{s}\n".encode()) for s in SENTENCES]
    assert together == "".join(alone)
    assert len(set(alone)) == 3
    assert all(line.count("\n") == 1 and line != "\n" for line in alone)


UNCUT = "old\u0085dog\u2028red\x0bcat\x0cnew\rhouse"
"""What str.splitlines would cut into six lines."""


@pytest.mark.parametrize(
    ("text", "blank"),
    [
        ("old dog\n\nnew house\n", [False, True, False]),
        ("\n\n", [True, True]),
        ("", []),
        ("old dog", [False]),  # no line feed at the end
        ("old dog\r\n\r\nnew house\r\n", [False, True, False]),
        (f"{UNCUT}\nold dog\n", [False, False]),
        ("  \t\u3000\n", [True]),
    ],
)
def test_a_blank_line_gives_a_blank_line(dtrain, run, text, blank):
    *lines, rest = dtrain("translate", run, stdin=text.encode()).split("\n")
    assert [not line for line in lines] == blank
    assert rest == ""


def test_lines_end_at_line_feeds_only():
    assert list(translate.decoded([f"{UNCUT}\n".encode(), b"\r\n", b"end"])) == [UNCUT, "", "end"]


def test_words_never_seen_are_no_mistake(dtrain, run):
    assert dtrain("translate", run, stdin="\u4e2d\u6587 \U0001f600\n".encode()).count("\n") == 1


def test_translate_takes_any_number_of_lines_piece_by_piece(dtrain, run, monkeypatch):
    monkeypatch.setattr(translate, "LINES_AT_ONCE", 2)
    lines = [SENTENCES[i % 3] for i in range(7)]
    expected = [dtrain("translate", run, stdin=s.encode()) for s in SENTENCES]
    out = dtrain("translate", run, stdin="\n".join(lines).encode())
    assert out == "".join(expected[i % 3] for i in range(7))


def test_translate_names_the_line_that_is_not_utf8(refused, run):
    message = refused("translate", run, stdin=b"old dog\nb\xff\n")
    assert message.startswith("dtrain: standard input, line 2: not UTF-8")
    assert message.count("\n") == 1


def test_translate_searches_as_it_is_told(dtrain, run, monkeypatch):
    """Unless told it uses the beam and penalty of validation, and the best checkpoint."""
    calls = []

    def spy(_model, _vocabulary, lines, _world, beam_size, length_penalty):
        calls.append((beam_size, length_penalty))
        return lines

    monkeypatch.setattr("dtrain.evaluation.translate_lines", spy)
    assert dtrain("translate", run, stdin=b"old dog\n") == "old dog\n"
    dtrain("translate", run, "--beam-size", 7, "--length-penalty", 0, stdin=b"old dog\n")
    assert calls == [(2, 0.6), (7, 0.0)]


def test_checkpoints_are_chosen_by_step_or_name(dtrain, refused, run):
    text = "\n".join(SENTENCES).encode()
    by_step = {c: dtrain("translate", run, "--checkpoint", c, stdin=text) for c in (40, 100)}
    assert by_step[40] != by_step[100]
    for name in ("best", "last"):
        assert dtrain("translate", run, "--checkpoint", name, stdin=text) == by_step[100]
    message = refused("translate", run, "--checkpoint", 41)
    assert "there is no checkpoint '41'" in message
    assert "step-0000000040, step-0000000080, step-0000000100" in message


def test_on_a_terminal_it_asks_line_by_line(run, capsys, monkeypatch):
    typed = iter(SENTENCES)

    def answer(prompt):
        assert prompt == "> "
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", answer)
    assert main(["translate", run]) == 0
    streams = capsys.readouterr()
    assert "Ctrl-D ends" in streams.err
    assert len(streams.out.split("\n")) == 3 + 2


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dtrain", *map(str, arguments)]


@pytest.mark.slow
def test_translate_at_a_real_terminal(run):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("translate", run), stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    os.write(ours, b"old dog\n")
    os.write(ours, b"\x04")  # Ctrl-D
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert b"Ctrl-D ends" in err
    assert b"X" in out
    os.close(ours)
    os.close(theirs)


@pytest.mark.slow
def test_translate_in_a_real_pipe_whose_reader_leaves_early(run, tmp_path):
    (tmp_path / "in").write_text("old dog\n" * 4000, encoding="utf-8")
    words = shlex.join(command("translate", run))
    result = subprocess.run(
        ["bash", "-c", f"{words} < {tmp_path}/in | head -1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1


# ------------------------------------------------------------------ evaluate


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluate_judges_what_translate_says(dtrain, run, toy_text, split):
    source, references = toy_text / f"{split}.en", lines_of(toy_text / f"{split}.de")
    search = ["--beam-size", 3, "--length-penalty", 2]
    translations = dtrain("translate", run, *search, stdin=source.read_bytes()).splitlines()
    bleu = sacrebleu.corpus_bleu(translations, [references]).score
    chrf = sacrebleu.corpus_chrf(translations, [references]).score
    assert chrf > 1

    found = json.loads(dtrain("evaluate", run, *search, "--split", split, "--json"))
    assert found["bleu"] == round(bleu, 2)
    assert found["chrf"] == round(chrf, 2)
    assert found["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|")
    assert found["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|")
    assert found["run"] == run
    assert found["checkpoint"] == "step-0000000100"
    assert (found["split"], found["sentences"]) == (split, 12)
    assert (found["beam_size"], found["length_penalty"]) == (3, 2)
    assert found["seconds"] > 0

    text = dtrain("evaluate", run, *search, "--split", split)
    assert f"{run}, step-0000000100, {split} set, beam 3" in text
    assert f"BLEU {bleu:6.2f}   {found['bleu_signature']}" in text
    assert f"chrF {chrf:6.2f}   {found['chrf_signature']}" in text
    assert "12 sentences in " in text


def test_evaluate_gives_what_validation_gave_in_training(dtrain, run, trained):
    lines = lines_of(trained.run_dir / "metrics.jsonl")
    last = json.loads(lines[-1])
    found = json.loads(dtrain("evaluate", run, "--split", "validation", "--json"))
    assert last["step"] == 100
    assert found["chrf"] == round(last["validation/chrf"], 2)
    assert found["bleu"] == round(last["validation/bleu"], 2)


def test_evaluate_needs_a_text_of_that_split(refused, trained, tmp_path):
    settings = yaml.safe_load((trained.run_dir / "config.yaml").read_text(encoding="utf-8"))
    settings["data"]["test"] = None
    (tmp_path / "run").mkdir()
    for path in trained.run_dir.iterdir():
        (tmp_path / "run" / path.name).symlink_to(path)
    (tmp_path / "run" / "config.yaml").unlink()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert "the run has no test text: its data.test is null" in refused(
        "evaluate", tmp_path / "run"
    )


# ------------------------------------------------------------------ average


def test_average_is_a_checkpoint_of_the_mean_weights(dtrain, run, trained):
    folder = trained.run_dir / "checkpoints"
    out = dtrain("average", run, "--last", 2)
    assert "averaged step-0000000080, step-0000000100" in out
    name = "average-0000000100-of-2"
    assert f"use it: dtrain evaluate {run} --checkpoint {name}" in out
    mean = load_file(folder / name / "model.safetensors")
    parts = [load_file(folder / f"step-0000000{n}" / "model.safetensors") for n in ("080", "100")]
    for tensor_name, tensor in mean.items():
        expected = torch.stack([part[tensor_name] for part in parts]).double().mean(0)
        torch.testing.assert_close(tensor, expected.float())
    found = json.loads(dtrain("evaluate", run, "--checkpoint", name, "--json"))
    assert found["checkpoint"] == name


def test_average_of_more_than_there_are_is_a_mistake(refused, run):
    message = refused("average", run)
    assert "--last 5: " in message
    assert "has only 3; a larger checkpoint.keep_last keeps more" in message


# ------------------------------------------------------------------ status


def status_lines(text: str) -> dict[str, list[str]]:
    """Cut a status into its entries; lines without a name belong to the one before."""
    entries, name = dict[str, list[str]](), ""
    for line in text.splitlines():
        name = line[:12].strip() or name
        entries.setdefault(name, []).append(line[13:])
    return entries


def test_status_of_a_finished_run(dtrain, run, trained):
    os.utime(trained.run_dir / "checkpoints" / "step-0000000100", (time.time() - 600,) * 2)
    found = status_lines(dtrain("status", run))
    assert found["run"] == [run]
    assert found["status"] == ["completed: finished at step 100"]
    assert re.fullmatch(r"100 of 100 \(100 %\), epoch \d+", found["step"][0])
    assert re.fullmatch(r"\d+\.\d\d at step 100", found["best BLEU"][0])
    assert found["checkpoint"] == ["step-0000000100, 10 minutes old"]
    count, attempt = found["attempts"]
    assert count == "1"
    assert re.fullmatch(
        r"1  \d{4}-\d\d-\d\d \d\d:\d\d  step 0 to 100, 1 rank on \S+; "
        r"completed: finished at step 100",
        attempt,
    )
    assert re.fullmatch(r"\d+\.\d % while it ran, .* % since the first start", found["goodput"][0])
    assert found["next"] == ["nothing is left to do; a larger run.max_steps would go on"]
    assert found["verdict"] == ["completed"]
    assert len(dtrain("status", run).splitlines()) < 25


def test_status_as_json(dtrain, run, trained):
    found = json.loads(dtrain("status", run, "--json"))
    assert found["status"] == found["verdict"] == "completed"
    assert (found["step"], found["max_steps"], found["exit_code"]) == (100, 100, 0)
    assert found["checkpoints"] == [f"step-0000000{n}" for n in ("040", "080", "100")]
    assert (found["last_checkpoint"], found["set_aside"]) == ("step-0000000100", [])
    last = json.loads(lines_of(trained.run_dir / "metrics.jsonl")[-1])
    assert found["last_metrics"] == found["best"] == last
    assert found["last_checkpoint_age_seconds"] > 0
    (attempt,) = found["attempts"]
    assert (attempt["world_size"], attempt["end_step"], attempt["status"]) == (1, 100, "completed")
    assert found["running"] is None
    assert 0 < found["goodput"]["since_first_start"] <= found["goodput"]["while_running"] <= 1


@pytest.fixture
def begun(toy) -> RunDirectory:
    """A run directory that has settings and nothing else."""
    directory = RunDirectory(toy(run__max_steps=0, run__max_epochs=3).run_dir)
    directory.path.mkdir()
    settings = toy(run__max_steps=0, run__max_epochs=3).to_yaml()
    directory.config_file.write_text(settings, encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("status", "exit_code", "word"),
    [
        ("completed", 0, "completed"),
        ("preempted", 0, "requeue"),
        ("failed", 2, "stop"),
        ("failed", 1, "requeue"),
    ],
)
def test_the_verdict_is_one_word(dtrain, begun, status, exit_code, word):
    begun.write_status(status, 7, exit_code, "because")
    assert dtrain("status", begun.path, "--verdict") == f"{word}\n"
    text = dtrain("status", begun.path)
    assert f"status       {status}: because" in text
    assert "step         7\n" in text
    assert f"verdict      {word}" in text
    assert json.loads(dtrain("status", begun.path, "--json"))["verdict"] == word


def test_who_runs_no_more_and_said_nothing_was_killed(dtrain, begun):
    begun.write_status("running", 7, None, "saved step-0000000007")
    assert dtrain("status", begun.path, "--verdict") == "requeue\n"
    text = dtrain("status", begun.path)
    assert "status       killed: it could not say why; before that: saved step-0000000007" in text


def test_a_killed_attempt_is_known_before_the_next_one_notes_it(dtrain, begun):
    attempt = asdict(Attempt(1000.0, 0, 2, "n1"))
    write_json(begun.identity_file, {"attempts": [attempt]})
    begun.write_status("running", 7, None, "saved")
    begun.heartbeats.mkdir()
    sign = Sign(
        1, 0, "n1", None, 5, 5, 1, 9, 0, "backward", 0.0, 1060.0, True, "rank 1 is gone " * 9
    )
    (begun.heartbeats / "rank-0.json").write_text(json.dumps(asdict(sign)), encoding="utf-8")
    found = status_lines(dtrain("status", begun.path))
    assert found["status"] == [f"killed: {sign.why}; before that: saved"]
    line = found["attempts"][1]
    assert "step 0 to 9, 2 ranks on n1; killed: rank 1 is gone rank 1" in line
    assert line.endswith(" ...")
    assert json.loads(begun.identity_file.read_text(encoding="utf-8"))["attempts"] == [
        attempt | {"allowed": []}
    ]


def test_status_of_a_run_that_has_only_settings(dtrain, begun):
    assert dtrain("status", begun.path, "--verdict") == "requeue\n"
    assert "status       not begun" in dtrain("status", begun.path)
    assert "checkpoint   none yet" in dtrain("status", begun.path)
    found = json.loads(dtrain("status", begun.path, "--json"))
    assert (found["last_metrics"], found["best"], found["checkpoints"]) == ({}, {}, [])
    assert found["goodput"] is found["last_checkpoint"] is None


def test_status_of_no_run(dtrain, refused, tmp_path, monkeypatch):
    assert "is not a run directory: it has no config.yaml" in refused("status", tmp_path / "none")
    assert "is not a run directory: it has no config.yaml" in refused("status", tmp_path, "--json")
    assert dtrain("status", tmp_path / "none", "--verdict") == "stop\n"
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    assert dtrain("status", tmp_path / "none", "--verdict") == "requeue\n"


def test_status_of_a_start_that_was_refused_before_the_run_began(dtrain, tmp_path):
    run = RunDirectory(tmp_path / "refused")
    with pytest.raises(UserError), RunLock(run.path) as lock, run.attempt(lock, 2):
        raise UserError("train.en is empty")
    found = status_lines(dtrain("status", run.path))
    assert found["status"] == ["failed: train.en is empty"]
    assert found["attempts"][1].endswith("failed: train.en is empty")
    assert found["next"] == ["the same command would fail again: train.en is empty"]


def test_the_step_is_the_newest_that_is_known(dtrain, begun):
    """The status is as old as the last save; metrics are logged every few steps only."""
    (begun.path / "metrics.jsonl").write_text('{"step": 40}\n', encoding="utf-8")
    begun.write_status("running", 30, None, "saved")
    assert "step         40\n" in dtrain("status", begun.path)
    begun.write_status("preempted", 47, 0, "stopped")
    assert "step         47\n" in dtrain("status", begun.path)


def test_the_best_is_the_best_by_the_runs_own_metric(dtrain, begun, toy):
    lines = [{"step": s, "validation/nll": nll} for s, nll in ((5, 2.5), (6, 1.25), (7, 3.0))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (begun.path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert "best " not in dtrain("status", begun.path)
    begun.config_file.write_text(toy(validation__metric="nll").to_yaml(), encoding="utf-8")
    assert "best loss    1.25 at step 6\n" in dtrain("status", begun.path)


def test_status_says_how_fast_the_last_logged_step_was(dtrain, begun):
    values = {"tokens_per_second": 12300.4, "mfu": 0.4123}
    shares = {"data_wait": 0.01, "forward_backward": 0.9, "reduction": 0.05, "optimizer": 0.04}
    line = {f"train/{name}": value for name, value in values.items()}
    line |= {f"train/{name}_share": value for name, value in shares.items()}
    text = "".join(json.dumps({"step": s, **v}) + "\n" for s, v in ((5, line), (6, {"epoch": 1})))
    (begun.path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert status_lines(dtrain("status", begun.path))["speed"] == [
        "12,300 target tokens/s, 41.2 % of the devices' peak; "
        "data 1 %, forward and backward 90 %, reduction 5 %, optimizer 4 %"
    ]


def test_status_of_a_run_that_is_running(dtrain, begun):
    with RunLock(begun.path, environ={"SLURM_JOB_ID": "55"}) as lock, begun.attempt(lock, 6):
        begun.heartbeats.mkdir()
        for rank in range(6):
            step, phase = (8, "before_optimizer") if rank == 3 else (9, "in_validation")
            sign = Sign(1, rank, "n1", None, 5, 5, 1, step, 0, phase, 0.0, time.time(), False, "")
            path = begun.heartbeats / f"rank-{rank}.json"
            path.write_text(json.dumps(asdict(sign)), encoding="utf-8")
        found = status_lines(dtrain("status", begun.path))
        running = json.loads(dtrain("status", begun.path, "--json"))["running"]
        begun.write_status("preempted", 9, 0, "stopped")
    status, holder, *ranks = found["status"]
    assert status == "running: attempt 1 is getting ready"
    assert holder == f"{lock.myself.describe()}, last seen alive {holder.split()[-3]} seconds ago"
    assert ranks == [
        "rank 3 at step 8, before optimizer",
        "ranks 0-2, 4-5 at step 9, in validation",
    ]
    assert found["step"] == ["9"]
    assert found["attempts"][1].endswith("6 ranks on " + lock.myself.host + ", job 55; running")
    assert found["next"] == ["if it ended now, the same command begins from step 1"]
    assert (running["job"], running["process"]) == ("55", os.getpid())
    assert json.loads(dtrain("status", begun.path, "--json"))["running"] is None


def keep_checkpoint(run: RunDirectory, step: int, age: float, train_seconds: float | None) -> Path:
    """Make what looks like a checkpoint to who hashes nothing."""
    path = run.checkpoints / checkpoint_name(step)
    path.mkdir(parents=True)
    progress = {} if train_seconds is None else {"train_seconds": train_seconds}
    state = json.dumps({"format_version": 1, "step": step, "progress": progress})
    (path / "state.json").write_text(state, encoding="utf-8")
    manifest = {"format_version": 1, "files": {"state.json": {"size": len(state), "sha256": ""}}}
    (path / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_only_whole_checkpoints_count(dtrain, begun):
    for step in (10, 20, 30):
        keep_checkpoint(begun, step, 7200, None)
    (begun.checkpoints / checkpoint_name(30) / "state.json").write_text("{}", encoding="utf-8")
    (begun.checkpoints / checkpoint_name(20)).rename(begun.checkpoints / "step-20.corrupt")
    (line,) = status_lines(dtrain("status", begun.path))["checkpoint"]
    assert line == "step-0000000010, 2 hours old; set aside as damaged: step-20.corrupt"


ATTEMPTS = [
    Attempt(1000.0, 0, 4, "n1", "55", 0, (), 1100.0, 35, "killed", None, "rank 2 died"),
    Attempt(1200.0, 30, 4, "n1", "55", 1, (), 1300.0, 60, "preempted", 0, "SIGUSR1"),
    Attempt(1350.0, 60, 2, "n2", "55", 2, ("plan",), 1450.0, 90, "failed", 1, "OSError"),
]


def test_attempts_and_goodput_of_three_attempts(dtrain, begun):
    """240 of the 300 s in which it ran, of 450 s in all, were for steps that count."""
    write_json(begun.identity_file, {"attempts": [asdict(attempt) for attempt in ATTEMPTS]})
    keep_checkpoint(begun, 90, 0, 240.0)
    begun.write_status("failed", 90, 1, "OSError")
    found = status_lines(dtrain("status", begun.path))
    assert found["goodput"] == ["80.0 % while it ran, 53.3 % since the first start"]
    count, *attempts = found["attempts"]
    assert count == "3"
    assert [attempt.partition("  step ")[2] for attempt in attempts] == [
        "0 to 35, 4 ranks on n1, job 55; killed: rank 2 died",
        "30 to 60, 4 ranks on n1, job 55; preempted: SIGUSR1",
        "60 to 90, 2 ranks on n2, job 55, allowed plan; failed: OSError",
    ]
    assert found["next"] == ["the same command goes on from step 90"]


def test_of_many_attempts_the_last_five_are_shown(dtrain, begun):
    write_json(begun.identity_file, {"attempts": [asdict(ATTEMPTS[0]) for _ in range(7)]})
    count, *shown = status_lines(dtrain("status", begun.path))["attempts"]
    assert count == "7"
    assert [line.split()[0] for line in shown] == ["3", "4", "5", "6", "7"]


def test_the_goodput_of_an_attempt_that_runs_is_that_up_to_its_checkpoint(begun):
    path = keep_checkpoint(begun, 90, 0, 150.0)
    os.utime(path, (1450.0, 1450.0))
    running = Attempt(1350.0, 60, 2, "n1")
    shares = goodput([*ATTEMPTS[:2], running], path, 9999.0)
    assert shares["while_running"] == pytest.approx(150 / 300)
    assert shares["since_first_start"] == pytest.approx(150 / 450)
    os.utime(path, (1300.0, 1300.0))  # it has saved nothing yet
    shares = goodput([*ATTEMPTS[:2], running], path, 1650.0)
    assert shares["while_running"] == pytest.approx(150 / 500)
    assert goodput([running], keep_checkpoint(begun, 91, 0, None), 1650.0) is None
    assert goodput([], path, None) is None
    assert goodput(ATTEMPTS, None, None) is None


# ------------------------------------------------------------------ schedule


@pytest.mark.parametrize("name", ["noam", "inverse_sqrt", "linear", "cosine", "constant"])
def test_schedule_draws_the_rates_of_the_run(dtrain, toy_settings, tmp_path, name, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *a, **k: drawn.append(a[1:]) or plot(*a, **k))
    out = tmp_path / "rates.png"
    changes = [f"--schedule.name={name}", "--run.max_steps=5000"]
    assert dtrain("schedule", toy_settings, "--out", out, *changes) == f"wrote {out}\n"
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > 800
        assert len(picture.convert("L").getcolors()) > 50
    steps, rates = drawn[0]
    config = load_config(toy_settings, changes)
    settings = config.schedule, config.optimizer.learning_rate, config.model.hidden_dim, 5000
    assert rates == [learning_rate(step, *settings) for step in steps]
    assert (steps[0], steps[-1]) == (1, 5000)
    assert 20 in steps, "the peak is drawn"


def test_schedule_names_its_picture_after_the_config(dtrain, toy_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dtrain("schedule", toy_settings) == "wrote toy-schedule.png\n"
    assert (tmp_path / "toy-schedule.png").exists()


@pytest.mark.parametrize("out", ["nowhere/a.png", "a.doc"])
def test_schedule_says_why_it_cannot_write(refused, toy_settings, tmp_path, out):
    assert f"--out {tmp_path / out}: " in refused("schedule", toy_settings, "--out", tmp_path / out)


def test_schedule_without_matplotlib(refused, toy_settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'dtrain[plot]'" in refused("schedule", toy_settings)


# ------------------------------------------------------------------ prepare and train


def test_prepare_makes_what_is_missing_once(dtrain, toy_settings, toy_text, tmp_path):
    arguments = ["prepare", "--config", toy_settings, f"--data.dir={tmp_path / 'tokens'}"]
    assert f"\nprepared: {tmp_path / 'tokens'}\n" in "\n" + dtrain(*arguments)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").rglob("*")}
    report = dtrain(*arguments)
    assert f"already prepared: {tmp_path / 'tokens'}\n" in report
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").rglob("*")}
    assert f"600 pairs      {toy_text}/train.en + {toy_text}/train.de" in report
    assert "vocabulary   48 pieces, shared" in report


def test_prepare_reports_what_it_dropped_and_where(dtrain, toy_settings, toy_text, tmp_path):
    sources, targets = (lines_of(toy_text / f"train.{side}") for side in ("en", "de"))
    for line in (3, 5, 8, 13, 21, 34):
        sources[line - 1] = ""
    targets[1] = "Xcat " * 200
    (tmp_path / "a.en").write_text("\n".join(sources) + "\n", encoding="utf-8")
    (tmp_path / "a.de").write_text("\n".join(targets) + "\n", encoding="utf-8")
    pair = f"[{{source: {tmp_path}/a.en, target: {tmp_path}/a.de}}]"
    place = f"--data.dir={tmp_path / 'tokens'}"
    report = dtrain("prepare", "--config", toy_settings, f"--data.train={pair}", place)
    assert "593 pairs      " in report
    assert "6 dropped    blank: line 3, 5, 8, 13, 21, …" in report
    assert "1 dropped    ratio: line 2\n" in report


def test_prepare_shows_both_vocabularies(dtrain, toy_settings, tmp_path):
    changes = ["--vocabulary.shared=false", "--vocabulary.size=30", f"--data.dir={tmp_path}/tokens"]
    report = dtrain("prepare", "--config", toy_settings, *changes)
    assert "vocabulary   30 pieces en, 30 pieces de" in report


def test_a_mistake_in_the_text_is_one_message(refused, toy_settings, toy_text, tmp_path):
    (tmp_path / "a.de").write_text("X\n", encoding="utf-8")
    pair = f"[{{source: {toy_text}/train.en, target: {tmp_path}/a.de}}]"
    place = f"--data.dir={tmp_path / 'tokens'}"
    message = refused("prepare", "--config", toy_settings, f"--data.train={pair}", place)
    assert "600 lines but" in message
    assert not (tmp_path / "tokens").exists()


def test_print_config_shows_what_would_run_and_runs_nothing(capsys, toy_settings, tmp_path):
    place = f"--run.dir={tmp_path}/{{name}}"
    arguments = ["train", "--config", str(toy_settings), place, "--run.seed=7", "--print-config"]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    shown = load_config(tmp_path / "again.yaml")
    assert shown == load_config(toy_settings, [place, "--run.seed=7"])
    assert not (tmp_path / "toy").exists()


def test_a_field_that_may_not_be_allowed_to_change_is_named(refused, toy_settings, monkeypatch):
    arguments = ["train", "--config", toy_settings, "--allow-changed"]
    message = refused(*arguments, "run.sede")
    assert "--allow-changed run.sede: it takes a setting's key" in message
    assert "did you mean run.seed?" in message
    given = []
    monkeypatch.setattr("dtrain.train.run", lambda *start: given.append(start[1]) or 0)
    fields = ["plan", "data", "vocabulary", "model.dropout", "batch"]
    assert main([str(a) for a in arguments[:3]] + [f"--allow-changed={f}" for f in fields]) == 0
    assert main([str(a) for a in arguments[:3]]) == 0
    assert given == [fields, []]


@pytest.mark.slow
def test_train_by_name_is_a_world_of_one(toy_settings, tmp_path):
    place = f"--run.dir={tmp_path}/{{name}}"
    arguments = ["--config", toy_settings, place, "--run.max_steps=2"]
    result = subprocess.run(
        command("train", *arguments), capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "batch    1 ranks x 4 micro-batches x 128 tokens = 512 a step" in result.stdout
    assert "finished at step 2" in result.stdout
    config = load_config(tmp_path / "toy" / "config.yaml")
    assert prepared_directory(config.data, config.vocabulary).exists()
