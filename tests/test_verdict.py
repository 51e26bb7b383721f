"""Whether to start again, as a table: what the attempts did, and where it is asked."""

from dataclasses import asdict

import pytest

from dtrain.checkpoint import checkpoint_name
from dtrain.durable import write_json
from dtrain.run_directory import Attempt, RunDirectory
from dtrain.verdict import explain, verdict


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def begin(run: RunDirectory, starts=(), saved: int = 0) -> None:
    """Make a run of attempts that started at these steps, the newest checkpoint at `saved`.

    A start is a step, or (step, job, restart).
    """
    attempts = []
    for start in starts:
        step, job, restart = start if isinstance(start, tuple) else (start, None, 0)
        attempts.append(asdict(Attempt(0.0, step, 1, "n1", job, restart)))
    (run.checkpoints / checkpoint_name(saved)).mkdir(parents=True)
    write_json(run.identity_file, {"attempts": attempts})


def slurm(restart: int | None = None, job: str = "55") -> dict[str, str]:
    count = {} if restart is None else {"SLURM_RESTART_COUNT": str(restart)}
    return {"SLURM_JOB_ID": job} | count


# ------------------------------------------------------------------ what the status says


@pytest.mark.parametrize("environ", [{}, slurm(), slurm(1), slurm(7)])
def test_completed_is_completed(run, environ):
    begin(run, [0, 0, 0, 0])
    run.write_status("completed", 12, 0, "finished at step 12")
    assert verdict(run, environ) == "completed"


@pytest.mark.parametrize(
    ("status", "exit_code", "final", "word"),
    [
        ("failed", 2, False, "stop"),
        ("failed", 1, True, "stop"),
        ("failed", 1, False, "requeue"),
        ("preempted", 0, False, "requeue"),
        ("running", None, False, "requeue"),  # who asks does so after its end: it was killed
    ],
)
@pytest.mark.parametrize("environ", [{}, slurm()])
def test_a_failure_that_would_repeat_stops(run, status, exit_code, final, word, environ):
    begin(run, [(0, environ.get("SLURM_JOB_ID"), 0)])
    run.write_status(status, 7, exit_code, "because", final=final)
    assert verdict(run, environ) == word
    if word == "stop":
        assert explain(run, environ) == "the same command would fail again: because"


def test_what_an_earlier_launch_was_refused_for_does_not_stop_this_one(run):
    """It did not get as far as saying anything, so that the status is not about it."""
    begin(run, [(0, "54", 0)])
    run.write_status("failed", 0, 2, "no such text")
    assert verdict(run, slurm(job="54")) == "stop"
    assert verdict(run, {}) == "stop"
    assert verdict(run, slurm(job="55")) == "requeue"


# ------------------------------------------------------------------ attempts without progress


@pytest.mark.parametrize(
    ("starts", "saved", "word"),
    [
        ([], 0, "requeue"),
        ([0], 0, "requeue"),
        ([0, 0], 0, "requeue"),
        ([0, 0, 0], 0, "stop"),
        ([0, 0, 0, 0], 0, "stop"),
        ([0, 0, 0], 5, "requeue"),  # the last one saved something
        ([0, 5, 5], 5, "requeue"),  # the first one did
        ([0, 5, 5, 5], 5, "stop"),
        ([0, 5, 5, 5], 9, "requeue"),
        ([0, 5, 5, 9, 9], 9, "requeue"),
        ([5, 9, 5, 5], 5, "stop"),  # what was saved is damaged
        ([5, 9, 5], 5, "requeue"),
    ],
)
def test_three_in_a_row_without_a_new_checkpoint_stop(run, starts, saved, word):
    begin(run, starts, saved)
    run.write_status("running", saved, None, "saved")
    assert verdict(run, {}) == word
    if word == "stop":
        assert explain(run, {}) == "3 starts in a row brought no new checkpoint"
    elif saved:
        assert explain(run, {}) == f"the same command goes on from step {saved}"
    else:
        assert explain(run, {}) == "the same command begins from step 1"


@pytest.mark.parametrize(
    ("starts", "saved", "restart", "word"),
    [
        # launches that never got as far as an attempt
        ([], 0, None, "requeue"),
        ([], 0, 1, "requeue"),
        ([], 0, 2, "stop"),
        ([(0, "55", 0)], 5, 2, "requeue"),
        ([(0, "55", 0)], 5, 3, "stop"),
        ([(0, "55", 0), (5, "55", 3)], 9, 3, "requeue"),
        ([(0, "55", 1)], 0, 2, "stop"),
        # several attempts in one launch: one that progressed suffices
        ([(0, "55", 0)] * 4, 0, 0, "requeue"),
        ([(0, "55", 0)] * 4 + [(0, "55", 1)], 0, 1, "requeue"),
        ([(0, "55", 0), (0, "55", 1), (0, "55", 2), (0, "55", 2)], 0, 2, "stop"),
        ([(0, "55", 0), (0, "55", 1), (4, "55", 1), (4, "55", 2), (4, "55", 3)], 4, 3, "requeue"),
        ([(0, "55", 0), (0, "55", 1), (4, "55", 2), (4, "55", 3), (4, "55", 4)], 4, 4, "stop"),
        # those of another job, or of none, count for nothing
        ([(0, "54", 0), (0, "54", 1), (0, "54", 2)], 0, 0, "requeue"),
        ([0, 0, 0], 0, 0, "requeue"),
    ],
)
def test_under_slurm_launches_of_the_job_are_counted(run, starts, saved, restart, word):
    begin(run, starts, saved)
    run.write_status("running", saved, None, "saved")
    assert verdict(run, slurm(restart)) == word


def test_from_elsewhere_the_answer_is_that_of_the_last_job(run):
    begin(run, [0, 0, (0, "55", 0), (0, "55", 1)])
    assert verdict(run, {}) == verdict(run, slurm(1)) == "requeue"
    begin(run, [(0, "55", 0), (0, "55", 1), (0, "55", 2)], saved=1)
    (run.checkpoints / checkpoint_name(1)).rmdir()
    assert verdict(run, {}) == verdict(run, slurm(2)) == "stop"


@pytest.mark.parametrize(
    ("environ", "word"), [({}, "stop"), (slurm(), "requeue"), (slurm(1), "requeue")]
)
def test_without_a_run_directory_only_slurm_tries_again(run, environ, word):
    assert verdict(run, environ) == word
    assert verdict(run, slurm(2)) == "stop"
    assert not run.path.exists()
    assert explain(run, {}) == f"there is no {run.path}"
