import os
import time

import pytest

from dtrain.config import load_config
from dtrain.data.vocabulary import Vocabulary
from dtrain.errors import UserError
from dtrain.run_directory import RunDirectory


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
        "process": os.getpid(),
    }


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), KeyboardInterrupt()])
def test_a_failure_is_noted_with_the_step_it_happened_at(run, error):

    def training():
        with run.failure_noted(True):
            run.write_status("running", 7, None, "saved")
            raise error

    with pytest.raises(type(error)):
        training()
    status = run.read_status()
    assert (status["status"], status["step"], status["exit_code"]) == ("failed", 7, 1)
    assert status["why"] == f"{type(error).__name__}: {error}"


def test_no_failure_no_note_and_other_ranks_note_nothing(run):
    with run.failure_noted(True):
        pass
    with pytest.raises(ZeroDivisionError), run.failure_noted(False):
        raise ZeroDivisionError
    assert run.read_status() == {}


def test_attempts_are_counted_beside_what_else_identifies_the_run(run):
    run.identity_file.write_text('{"wandb_id": "abc"}', encoding="utf-8")
    assert run.begin_attempt(step=0, world_size=2) == 1
    assert run.begin_attempt(step=5, world_size=3) == 2
    identity = run.read_identity()
    assert identity["wandb_id"] == "abc"
    facts = [(attempt["step"], attempt["world_size"]) for attempt in identity["attempts"]]
    assert facts == [(0, 2), (5, 3)]
