import errno
import json
import os
import socket
import time
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest

from dtrain.checkpoint import checkpoint_name
from dtrain.config import load_config
from dtrain.data.vocabulary import Vocabulary
from dtrain.errors import GiveUpError, UserError
from dtrain.lock import RunLock
from dtrain.peers import Sign
from dtrain.run_directory import Attempt, RunDirectory


@pytest.fixture(scope="module")
def vocabulary(trained) -> Vocabulary:
    return Vocabulary.load(trained.run_dir)


@pytest.fixture
def run(toy, vocabulary) -> RunDirectory:
    """A run that was begun."""
    run = RunDirectory(toy().run_dir)
    run.claim(toy(), vocabulary)
    return run


def test_a_begun_run_has_its_settings_and_vocabulary(run, toy, vocabulary):
    assert RunDirectory.existing(run.path).config == toy()
    assert Vocabulary.load(run.path).fingerprint == vocabulary.fingerprint
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "vocabulary.model"}


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a run directory: it has no config\.yaml"):
        RunDirectory.existing(tmp_path)


def test_it_may_go_on_with_what_is_free_to_change(run, toy, vocabulary):
    longer = toy(run__max_steps=99, checkpoint__keep_last=2, distributed__timeout=7)
    run.check(longer)
    run.claim(longer, vocabulary)
    assert run.config == longer


def test_a_text_that_is_left_out_is_no_changed_setting(run, toy):
    run.check(toy(data__test="null", data__train="[]"))


def test_it_may_not_go_on_with_other_settings(run, toy):
    with pytest.raises(UserError) as caught:
        run.check(toy(run__seed=5, batch__tokens_per_step=256))
    message = str(caught.value)
    assert "run.seed: 1 -> 5; batch.tokens_per_step: 512 -> 256" in message
    assert "--run.name=NAME" in message
    assert run.config == toy()


def test_what_is_not_begun_may_have_any_settings(toy, tmp_path):
    RunDirectory(tmp_path / "new").check(toy(run__seed=5))
    assert not (tmp_path / "new").exists()


def test_the_settings_are_replaced_at_once_or_not_at_all(run, toy, vocabulary, monkeypatch):
    """A reader, or a kill in the middle, finds the old ones."""
    seen = []
    replace = type(run.path).replace

    def spy(path, target):
        seen.append(load_config(run.config_file))
        return replace(path, target)

    monkeypatch.setattr(type(run.path), "replace", spy)
    run.claim(toy(run__max_steps=99), vocabulary)
    assert seen == [toy()]


def test_what_is_allowed_to_change_may(run, toy):
    changed = toy(run__seed=5, batch__tokens_per_step=256)
    with pytest.raises(UserError) as caught:
        run.check(changed, ["run.seed"])
    assert "run.seed" not in str(caught.value)
    assert "batch.tokens_per_step: 512 -> 256" in str(caught.value)
    assert "--allow-changed batch.tokens_per_step" in str(caught.value)
    run.check(changed, ["run.seed", "batch"])  # a setting, and a section of them


def test_the_status_is_what_was_written_last(run):
    assert run.read_status() == {}
    run.write_status("running", 3, None, "saved")
    before = time.time()
    run.write_status("preempted", 5, 0, "stopped by SIGTERM")
    status = run.read_status()
    assert before - 1 < status.pop("time") <= time.time()
    assert status == {
        "status": "preempted",
        "step": 5,
        "exit_code": 0,
        "why": "stopped by SIGTERM",
        "final": False,
        "process": os.getpid(),
    }


def test_a_status_that_a_crash_spoilt_is_none_but_a_damaged_identity_is_named(run):
    run.status_file.touch()
    assert run.read_status() == {}
    run.identity_file.touch()
    with pytest.raises(UserError, match=r"run\.json is not JSON .*mend it or move it away"):
        run.attempts()


# ------------------------------------------------------------------ attempts


ENVIRON = {"SLURM_JOB_ID": "55", "SLURM_RESTART_COUNT": "2"}


def save_step(run: RunDirectory, step: int) -> None:
    (run.checkpoints / checkpoint_name(step)).mkdir(parents=True)


def test_an_attempt_is_noted_when_it_begins_and_when_it_ends(run):
    run.identity_file.write_text('{"wandb_id": "abc"}', encoding="utf-8")
    save_step(run, 40)
    begun = time.time()
    with RunLock(run.path, environ=ENVIRON) as lock, run.attempt(lock, 2, ["plan"]) as number:
        assert number == 1
        assert run.read_status()["status"] == "running"
        (attempt,) = run.attempts()
        assert begun - 1 < attempt.time < time.time() + 1
        assert (attempt.step, attempt.world_size, attempt.job, attempt.restart) == (40, 2, "55", 2)
        assert (attempt.host, attempt.allowed) == (socket.gethostname(), ["plan"])
        assert (attempt.status, attempt.ended, attempt.end_step) == (None, None, None)
        run.note_start(number, 30)
        run.write_status("preempted", 47, 0, "stopped by SIGTERM")
    (attempt,) = run.attempts()
    assert (attempt.step, attempt.end_step, attempt.exit_code) == (30, 47, 0)
    assert (attempt.status, attempt.why) == ("preempted", "stopped by SIGTERM")
    assert attempt.time <= attempt.ended <= time.time() + 1
    assert run.read_identity()["wandb_id"] == "abc"


@pytest.mark.parametrize(
    ("error", "code", "final", "why"),
    [
        (ZeroDivisionError("by zero"), 1, False, "ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), 1, False, "KeyboardInterrupt: "),
        (UserError("a.en is empty"), 2, False, "a.en is empty"),
        (GiveUpError("ten in a row"), 1, True, "ten in a row"),
    ],
)
def test_a_failure_is_noted_with_the_step_it_happened_at(run, error, code, final, why):

    def training():
        with RunLock(run.path) as lock, run.attempt(lock, 1):
            run.write_status("running", 7, None, "saved")
            raise error

    with pytest.raises(type(error)):
        training()
    status, (attempt,) = run.read_status(), run.attempts()
    assert (status["status"], status["step"], status["exit_code"]) == ("failed", 7, code)
    assert (status["why"], status["final"]) == (why, final)
    assert (attempt.status, attempt.end_step, attempt.exit_code) == ("failed", 7, code)
    assert attempt.why == why


def test_a_full_disk_does_not_hide_the_failure(run, monkeypatch):
    def training():
        with RunLock(run.path) as lock, run.attempt(lock, 1):
            monkeypatch.setattr(run, "write_status", full_disk)
            raise ZeroDivisionError

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(ZeroDivisionError):
        training()


@pytest.mark.parametrize("fails", [True, False])
def test_who_lost_the_lock_writes_no_more(run, fails):
    with (
        pytest.raises(ZeroDivisionError) if fails else nullcontext(),
        RunLock(run.path) as lock,
        run.attempt(lock, 1),
    ):
        (run.path / "lock.json").write_text('{"token": "of another"}', encoding="utf-8")
        run.write_status("running", 9, None, "of the other")
        if fails:
            raise ZeroDivisionError
    assert run.read_status()["why"] == "of the other"
    assert run.attempts()[0].status is None


def killed_attempt(run: RunDirectory) -> float:
    """Leave an attempt without an end and its lock behind; gives its last beat."""
    with RunLock(run.path) as lock:
        run._begin(lock, 2, [])
        lock_file = run.path / "lock.json"
        left = replace(lock.myself, started=5)
    lock_file.write_text(json.dumps(asdict(left)), encoding="utf-8")
    beat = time.time() + 50
    os.utime(lock_file, (beat, beat))
    return beat


def test_an_attempt_without_an_end_was_killed(run):
    beat = killed_attempt(run)
    run.write_status("running", 7, None, "saved")
    with RunLock(run.path) as lock, run.attempt(lock, 1) as number:
        assert number == 2
        killed, now = run.attempts()
    assert (killed.status, killed.end_step, killed.exit_code) == ("killed", 7, None)
    assert killed.ended == pytest.approx(beat, abs=0.01)
    assert killed.why == "it could not say why"
    assert now.status is None


def test_what_the_ranks_of_a_killed_attempt_said_last_is_noted(run):
    killed_attempt(run)
    run.heartbeats.mkdir()
    sign = Sign(1, 0, "n1", None, 5, 5, 1, 9, 0, "backward", 0.0, time.time() + 70, True, "")
    signs = [
        sign,
        replace(sign, rank=1, step=8, why="rank 1 is out of memory", time=time.time() + 90),
        replace(sign, rank=2, attempt=0, step=99, why="long ago"),  # of an earlier attempt
    ]
    for sign in signs:
        path = run.heartbeats / f"rank-{sign.rank}.json"
        path.write_text(json.dumps(asdict(sign)), encoding="utf-8")
    assert run.signs(1) == signs[:2]
    with RunLock(run.path) as lock, run.attempt(lock, 1):
        killed = run.attempts()[0]
    assert killed.end_step == 9
    assert killed.ended == pytest.approx(signs[1].time)
    assert killed.why == "rank 1 is out of memory"


def test_attempts_of_an_older_dtrain_stay_as_they_are(run):
    old = {"time": 5.0, "step": 3, "world_size": 2}
    run.identity_file.write_text(json.dumps({"attempts": [old]}), encoding="utf-8")
    with RunLock(run.path) as lock, run.attempt(lock, 1):
        assert run.attempts()[0] == Attempt(**old, allowed=[])


def test_the_newest_checkpoint_tells_the_step_saved(run):
    assert run.step_saved == 0
    for step in (9, 100, 20):
        save_step(run, step)
    assert run.step_saved == 100
