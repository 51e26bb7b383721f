"""What rank 0 does before training; `alone` and made-up worlds need no other process."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_model import save_checkpoint
from worlds import run_world, world_of

from dtrain import __main__, checkpoint, lock
from dtrain.checkpoint import steps_saved
from dtrain.data.preparation import prepare, prepared_directory
from dtrain.data.store import PreparedData
from dtrain.distributed import alone, connect
from dtrain.errors import UserError
from dtrain.lock import read_holder
from dtrain.parts import build_plan
from dtrain.preemption import StopSignal
from dtrain.run_directory import RunDirectory
from dtrain.start import Ready, check_identity, claimed, describe, get_ready, identity
from dtrain.verdict import verdict

ON_THE_CPU = {
    "precision": "fp32",
    "kernels__attention": "padded",
    "kernels__loss": "plain",
    "kernels__residual": "plain",
}
"""What `auto` means here."""


def make_ready(config, world=None, stop=None) -> Ready:
    return get_ready(config, world or alone("cpu"), stop or StopSignal())


@pytest.fixture
def unprepared(toy, tmp_path):
    """Makes settings whose tokens nobody has made yet."""

    def make(**changes):
        return toy("new", data__dir=tmp_path / "tokens", **changes)

    return make


@pytest.fixture
def python_stand_in(tmp_path, monkeypatch):
    """Puts a shell script into the place of the Python that `dtrain prepare` would run in."""

    def install(script: str) -> None:
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    return install


# ------------------------------------------------------------------ preparing


def refusal(config, world) -> str:
    with pytest.raises(UserError) as caught:
        make_ready(config, world)
    assert not Path(config.data.dir).exists()
    assert not config.run_dir.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "my recipes/toy.yaml", "--vocabulary.size=48"],
        ["train", "--config", "my recipes/toy.yaml", "--vocabulary.size=48"],
    ],
)
def test_on_two_nodes_it_asks_for_one_command_to_paste(unprepared, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["dtrain", *arguments])
    message = refusal(unprepared(), world_of(size=2, local_size=1))
    assert f"nothing is prepared in {unprepared().data.dir}" in message
    assert "--run.prepare=true" in message
    (command,) = re.findall(r"^ *(dtrain prepare .*)$", message, re.MULTILINE)
    words = shlex.split(command)
    assert words[2:] == ["--config", "my recipes/toy.yaml", "--vocabulary.size=48"]


def test_the_command_to_paste_makes_what_was_missing(unprepared, toy_settings, monkeypatch):
    config = unprepared()
    arguments = ["--config", str(toy_settings), f"--data.dir={config.data.dir}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    message = refusal(config, world_of(size=2, local_size=1))
    (command,) = re.findall(r"^ *dtrain (prepare .*)$", message, re.MULTILINE)
    assert __main__.main(shlex.split(command)) == 0
    assert make_ready(config, world_of(size=2, local_size=1)).data_dir == Path(config.data.dir)


@pytest.mark.parametrize(("size", "local_size"), [(1, 1), (2, 2), (4, 2)])
def test_prepare_false_never_prepares(unprepared, size, local_size):
    config = unprepared(run__prepare="false")
    assert "nothing is prepared" in refusal(config, world_of(size, local_size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "size", "local_size"), [("true", 2, 1), ("auto", 2, 2), ("auto", 1, 1)]
)
def test_it_prepares_what_is_missing(unprepared, wanted, size, local_size, capfd):
    config = unprepared(run__prepare=wanted)
    ready = make_ready(config, world_of(size, local_size))
    assert ready.data_dir == Path(config.data.dir)
    assert len(PreparedData.open(ready.data_dir).train) == 600
    assert "600 pairs" in capfd.readouterr().out


def test_what_is_prepared_needs_no_other_process(toy, python_stand_in):
    python_stand_in("exit 9")
    assert make_ready(toy()).data_dir == Path(toy().data.dir)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'dtrain: train.en is empty' >&2; exit 2", "train.en is empty"),
        ("exit 9", "preparing the data failed"),
    ],
)
def test_a_failed_preparation_is_one_message(unprepared, python_stand_in, script, message):
    python_stand_in(script)
    with pytest.raises(UserError) as caught:
        make_ready(unprepared())
    assert str(caught.value) == message


def test_the_preparing_process_gets_the_settings_as_resolved(unprepared, python_stand_in, tmp_path):
    python_stand_in(f'cp "$5" {tmp_path}/given.yaml; echo "$*" > {tmp_path}/words; exit 1')
    config = unprepared(vocabulary__size=50, **ON_THE_CPU)
    with pytest.raises(UserError):
        make_ready(config)
    assert (tmp_path / "words").read_text(encoding="utf-8").startswith("-m dtrain prepare --config")
    assert (tmp_path / "given.yaml").read_text(encoding="utf-8") == config.to_yaml()


def test_a_stop_signal_ends_the_preparation(unprepared, python_stand_in, tmp_path, capsys):
    python_stand_in(f"echo $$ > {tmp_path}/process; exec sleep 60")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    config, begun = unprepared(), time.monotonic()
    with StopSignal() as stop:
        timer.start()
        with claimed(config, alone("cpu"), stop) as ready:
            assert ready is None
    assert time.monotonic() - begun < 20
    child = int((tmp_path / "process").read_text(encoding="utf-8"))
    assert not Path(f"/proc/{child}").exists()
    run = RunDirectory(config.run_dir)
    why = "stopped by SIGTERM before training began"
    assert run.read_status()["status"] == run.attempts()[0].status == "preempted"
    assert run.read_status()["why"] == run.attempts()[0].why == why
    assert run.read_status()["exit_code"] == 0
    assert verdict(run, {}) == "requeue"
    assert capsys.readouterr().out == f"{why}; the same command goes on\n"


# ------------------------------------------------------------------ beginning and going on


def tuned(toy, base, tmp_path):
    """Settings of a run that starts from another's weights, its tokens prepared."""
    config = toy("tuned", run__init_from=base, data__dir=tmp_path / "tokens")
    vocabulary = config.vocabulary_of
    directory = prepared_directory(config.data, config.vocabulary, vocabulary)
    prepare(config.data, config.vocabulary, directory, lambda _: None, vocabulary)
    return config


def test_fine_tuning_begins_with_the_best_checkpoint_and_once(toy, trained, tmp_path):
    config = tuned(toy, trained.run_dir, tmp_path)
    best = trained.run_dir / "checkpoints" / "step-0000000100"
    assert make_ready(config).weights_from == best
    data = PreparedData.open(tmp_path / "tokens")
    state = {"step": 1, "data": identity(data, build_plan(config, data))}
    folder = config.run_dir / "checkpoints"
    own = save_checkpoint(folder, "step-0000000001", torch.nn.Linear(1, 1), None, state)
    ready = make_ready(config)
    assert ready.resume_from == own
    assert ready.weights_from is None


def test_fine_tuning_from_a_run_without_checkpoints_begins_nothing(toy, trained, tmp_path):
    (tmp_path / "bare").mkdir()
    for name in ("config.yaml", "vocabulary.model"):
        shutil.copy(trained.run_dir / name, tmp_path / "bare" / name)
    config = tuned(toy, tmp_path / "bare", tmp_path)
    with pytest.raises(UserError, match="there is no checkpoint 'best'"):
        make_ready(config)
    assert not config.run_dir.exists()


def test_a_new_run_goes_on_from_nowhere(toy):
    ready = make_ready(toy())
    assert (ready.resume_from, ready.notices) == (None, [])
    assert ready.weights_from is None
    assert ready.config == toy(**ON_THE_CPU)


AS_TRAINED = {
    "run__max_steps": 100,
    "model__dropout": 0.0,
    "optimizer__learning_rate": 0.5,
    "schedule__warmup_steps": 40,
}


@pytest.fixture
def copied_run(toy, trained):
    """A copy of the trained run that may be spoilt, and its settings."""
    config = toy("copy", **AS_TRAINED)
    shutil.copytree(trained.run_dir, config.run_dir)
    return config


def test_it_goes_on_from_the_newest_whole_checkpoint_and_says_which_is_not(copied_run):
    newest, older, *_ = steps_saved(copied_run.run_dir / "checkpoints")
    assert make_ready(copied_run).resume_from == newest
    (newest / "state.json").write_text("{}", encoding="utf-8")
    ready = make_ready(copied_run)
    assert ready.resume_from == older
    (notice,) = ready.notices
    assert f"{newest} is set aside: state.json" in notice


@pytest.fixture
def other_text(toy, toy_text, tmp_path):
    """Settings of the copied run with another text, prepared."""
    pair = f"[{{source: {toy_text}/test.en, target: {toy_text}/test.de}}]"
    config = toy("copy", **AS_TRAINED, data__train=pair, data__dir=tmp_path / "tokens")
    prepare(config.data, config.vocabulary, tmp_path / "tokens", lambda _: None)
    return config


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_refused_it_leaves_the_run_as_it_was(copied_run, other_text):
    before = contents(copied_run.run_dir)
    with pytest.raises(UserError, match="was trained with another training text"):
        make_ready(other_text)
    assert before == contents(copied_run.run_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {"run__seed": 2},
        {"model__num_heads": 4},
        {"model__hidden_dim": 64},
        {"model__dropout": 0.1},
        {"batch__tokens_per_step": 256},
        {"optimizer__learning_rate": 1.0},
        {"schedule__warmup_steps": 20},
        {"loss__label_smoothing": 0.0},
        {"precision": "bf16"},
        {"validation__metric": "chrf"},
        {"data__max_length": 60},
        {"vocabulary__size": 50},
    ],
    ids=str,
)
def test_each_changed_setting_is_refused_by_name_and_can_be_allowed(copied_run, toy, changes):
    ((key, value),) = changes.items()
    field = key.replace("__", ".")
    changed = toy("copy", **({"precision": "fp32"} | AS_TRAINED | changes), run__prepare="false")
    with pytest.raises(UserError, match=rf"\({field}: \S+ -> {value}\)") as caught:
        make_ready(changed)
    assert f"--allow-changed {field}" in str(caught.value)
    RunDirectory(copied_run.run_dir).check(changed, [field])


@pytest.mark.parametrize(
    "changes",
    [
        {"run__max_steps": 200},
        {"run__device": "cpu"},
        {"metrics__every_steps": 3},
        {"wandb__project": "other"},
        {"checkpoint__keep_last": 2},
        {"validation__every_steps": 7},
        {"distributed__timeout": 9},
    ],
    ids=str,
)
def test_what_is_free_to_change_goes_on(copied_run, toy, changes):
    ready = make_ready(toy("copy", **(AS_TRAINED | changes)))
    assert ready.resume_from.name == "step-0000000100"
    assert RunDirectory(copied_run.run_dir).config == ready.config


def test_another_text_is_named_with_old_and_new_and_can_be_allowed(copied_run, other_text):
    saved = checkpoint.read_state(steps_saved(copied_run.run_dir / "checkpoints")[0])["data"]
    data = PreparedData.open(Path(other_text.data.dir))
    now = identity(data, build_plan(other_text, data))
    with pytest.raises(UserError) as caught:
        make_ready(other_text)
    for name in saved:
        assert f"another {name} ({saved[name][:12]} -> {now[name][:12]})" in str(caught.value)
    flags = "--allow-changed data --allow-changed vocabulary --allow-changed plan"
    assert str(caught.value).endswith(flags)
    with pytest.raises(UserError) as caught:
        get_ready(other_text, alone("cpu"), StopSignal(), ["data", "plan"])
    assert "training text" not in str(caught.value)
    ready = get_ready(other_text, alone("cpu"), StopSignal(), ["data", "vocabulary", "plan"])
    assert ready.step == 100


def test_a_model_that_does_not_fit_is_refused_before_its_settings_are_kept(copied_run, toy):
    changed = toy("copy", **(AS_TRAINED | {"model__feed_forward_dim": 32}))
    before = contents(copied_run.run_dir)
    with pytest.raises(UserError, match="does not fit the model"):
        get_ready(changed, alone("cpu"), StopSignal(), ["model"])
    assert before == contents(copied_run.run_dir)


def test_too_little_room_for_two_checkpoints_is_said(toy, monkeypatch):
    config, usage = toy(), shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(UserError, match="MiB free, too few for two checkpoints"):
        make_ready(config)
    assert not config.run_dir.exists()


# ------------------------------------------------------------------ owning the run directory


def own(config, **arguments) -> Ready:
    """Claim a run, as a training of no steps does."""
    with claimed(config, alone("cpu"), StopSignal(), **arguments) as ready:
        run = RunDirectory(config.run_dir)
        run.write_status("preempted", ready.step, 0, "stopped")
        assert read_holder(config.run_dir) == ready.lock.myself
        assert not ready.is_lost
        assert run.attempts()[-1].status is None
        return ready


def test_a_start_is_an_attempt_from_the_step_it_goes_on_from(copied_run):
    newest, older, *_ = steps_saved(copied_run.run_dir / "checkpoints")
    (newest / "state.json").write_text("{}", encoding="utf-8")
    ready = own(copied_run, allowed=["plan"])
    assert (ready.attempt, ready.step) == (2, checkpoint.step_of(older))
    attempt = RunDirectory(copied_run.run_dir).attempts()[-1]
    assert (attempt.step, attempt.end_step) == (ready.step, ready.step)
    assert (attempt.status, attempt.allowed, attempt.world_size) == ("preempted", ["plan"], 1)
    assert read_holder(copied_run.run_dir) is None


def test_a_second_training_is_refused_and_changes_nothing(toy, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    config, world = toy(), alone("cpu")
    with claimed(config, world, StopSignal()):
        before = contents(config.run_dir)
        with (
            pytest.raises(UserError, match="is being trained by process"),
            claimed(config, world, StopSignal()),
        ):
            pass
        assert before == contents(config.run_dir)


@pytest.mark.slow
def test_a_second_launch_is_refused_by_one_message(toy, toy_settings):
    config = toy()
    with claimed(config, alone("cpu"), StopSignal()) as ready:
        before = contents(config.run_dir)
        place = ["--run.name=run", f"--run.dir={config.run_dir}"]
        launch = [sys.executable, "-m", "dtrain.train", "--config", toy_settings, *place]
        second = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=60)
        assert before == contents(config.run_dir)
        holder = ready.lock.myself.describe()
    assert second.returncode == 2
    assert second.stderr.startswith(f"dtrain: {config.run_dir} is being trained by {holder}")
    assert second.stderr.count("\n") == 1


def test_a_takeover_is_noticed_and_the_killed_attempt_gets_its_end(toy):
    config = toy()
    with claimed(config, alone("cpu"), StopSignal()) as ready:
        left = replace(ready.lock.myself, started=5)
        run = RunDirectory(config.run_dir)
        run_json = run.identity_file.read_bytes()
    run.identity_file.write_bytes(run_json)
    (config.run_dir / "lock.json").write_text(json.dumps(asdict(left)), encoding="utf-8")
    ready = own(config)
    assert ready.attempt == 2
    assert "is taken over from process" in ready.notices[0]
    assert [attempt.status for attempt in run.attempts()] == ["killed", "preempted"]


def test_a_refused_start_is_noted_and_stops(copied_run, toy):
    changed = toy("copy", **(AS_TRAINED | {"run__seed": 2}))
    with pytest.raises(UserError), claimed(changed, alone("cpu"), StopSignal()):
        pass
    run = RunDirectory(copied_run.run_dir)
    assert run.read_status()["status"] == run.attempts()[-1].status == "failed"
    assert run.read_status()["exit_code"] == 2
    assert "run.seed: 1 -> 2" in run.read_status()["why"]
    assert verdict(run, {}) == "stop"
    assert read_holder(copied_run.run_dir) is None
    own(copied_run)
    assert verdict(run, {}) == "requeue"


def test_what_was_refused_at_first_begins_afresh_when_corrected(toy):
    wrong, right = toy(run__prepare="false", vocabulary__size=50), toy(run__seed=7)
    with pytest.raises(UserError), claimed(wrong, alone("cpu"), StopSignal()):
        pass
    assert verdict(RunDirectory(wrong.run_dir), {}) == "stop"
    ready = own(right)
    assert (ready.attempt, ready.step) == (2, 0)
    assert RunDirectory(right.run_dir).config.run.seed == 7


def test_a_failure_of_the_training_is_noted(toy):
    config = toy()
    with pytest.raises(ZeroDivisionError), claimed(config, alone("cpu"), StopSignal()):
        raise ZeroDivisionError
    run = RunDirectory(config.run_dir)
    assert run.attempts()[-1].why == "ZeroDivisionError: "
    assert (run.read_status()["exit_code"], verdict(run, {})) == (1, "requeue")


def test_who_lost_the_lock_knows(toy):
    config = toy()
    with claimed(config, alone("cpu"), StopSignal()) as ready:
        (config.run_dir / "lock.json").unlink()
        ready.lock.beat()
        assert ready.is_lost
    assert RunDirectory(config.run_dir).attempts()[0].status is None


def test_a_step_of_more_nodes_than_found_each_other_is_refused(toy, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    config = toy()
    with (
        pytest.raises(UserError, match="on 2 nodes, but only 1 found"),
        claimed(config, alone("cpu"), StopSignal()),
    ):
        pass
    assert verdict(RunDirectory(config.run_dir), {}) == "stop"


def claim(config) -> tuple[int, bool]:
    with connect("cpu", 60) as world, claimed(config, world, StopSignal()) as ready:
        if world.is_main:
            RunDirectory(config.run_dir).write_status("preempted", 0, 0, "stopped")
        return ready.attempt, ready.lock is not None


def claim_and_fail(config) -> str:
    with pytest.raises(UserError) as caught:
        claim(config)
    return str(caught.value)


def test_every_rank_gets_ready_and_one_holds_the_lock(toy):
    assert run_world(2, claim, toy()) == [(1, True), (1, False)]
    assert RunDirectory(toy().run_dir).attempts()[0].world_size == 2


def test_every_rank_is_refused_alike(toy):
    wrong = toy(run__prepare="false", vocabulary__size=50)
    first, second = run_world(2, claim_and_fail, wrong)
    assert first == second
    assert RunDirectory(wrong.run_dir).attempts()[0].status == "failed"


# ------------------------------------------------------------------ identity and description


def test_identity_tells_text_vocabulary_and_plan_apart(toy):
    ready = make_ready(toy())
    data = PreparedData.open(ready.data_dir)
    now = identity(data, build_plan(ready.config, data))
    assert set(now) == {"training text", "vocabulary", "batch plan"}
    assert len(set(now.values())) == 3
    reseeded = identity(data, build_plan(toy(run__seed=2), data))
    assert {name for name in now if now[name] != reseeded[name]} == {"batch plan"}
    check_identity(now, now, Path("runs/a"))
    with pytest.raises(
        UserError, match=r"runs/a was trained with another batch plan \(\w{12} -> \w{12}\) than"
    ):
        check_identity(now, reseeded, Path("runs/a"))
    with pytest.raises(UserError, match=r"another training text \(.*\) and another batch plan"):
        check_identity(now | {"training text": "x"}, reseeded, Path("runs/a"))


def test_the_first_lines_say_what_will_run(toy):
    ready = make_ready(toy(run__threads=3))
    data = PreparedData.open(ready.data_dir)
    num_tokens = int(data.train.target_lengths(torch.arange(600).numpy()).sum())
    lines = describe(ready, data, world_of(3, 3), torch.bfloat16, 12345)
    assert lines == [
        "batch    3 ranks x 2 micro-batches x 128 tokens = 512 a step",
        "device   CPU, 3 threads a rank, bfloat16",
        "model    12,345 parameters, vocabulary 48",
        f"data     600 pairs, {num_tokens:,} target tokens, from {ready.data_dir}",
    ]
