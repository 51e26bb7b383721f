"""Verdict: whether a script should start a training again. It only reads.

A start is an attempt once it holds the run directory. Under SLURM, starts are counted by launches
of the job: one that never got as far as an attempt brought no checkpoint either, and of several
attempts in one launch, as torchrun makes them, one that did suffices.
"""

from collections.abc import Mapping
from typing import Literal

from dtrain.run_directory import Attempt, RunDirectory

Verdict = Literal["completed", "requeue", "stop"]

PATIENCE = 3
"""Starts in a row that may go by without a new checkpoint."""


def verdict(run: RunDirectory, environ: Mapping[str, str]) -> Verdict:
    """Say in a word what a script should do: nothing, start the same command again, or give up.

    Args:
        run: its directory, which need not be there.
        environ: the environment; SLURM_JOB_ID and SLURM_RESTART_COUNT count.
    """
    return _decide(run, environ)[0]


def explain(run: RunDirectory, environ: Mapping[str, str]) -> str:
    """Say the same in a sentence, with the reason."""
    return _decide(run, environ)[1]


def _decide(run: RunDirectory, environ: Mapping[str, str]) -> tuple[Verdict, str]:
    status, attempts = run.read_status(), run.attempts()
    launches = _launches(attempts, environ)
    if status.get("status") == "completed":
        return "completed", "nothing is left to do; a larger run.max_steps would go on"
    has_begun = not launches or bool(launches[-1])  # or else the status is an earlier launch's
    would_repeat = status.get("exit_code") == 2 or status.get("final", False)
    if has_begun and status.get("status") == "failed" and would_repeat:
        return "stop", f"the same command would fail again: {status['why']}"
    if not launches and not run.path.exists():
        return "stop", f"there is no {run.path}"
    progressed = _progressed(attempts, run.step_saved)
    last = launches[-PATIENCE:]
    if len(last) == PATIENCE and not any(progressed[i] for launch in last for i in launch):
        return "stop", f"{PATIENCE} starts in a row brought no new checkpoint"
    where = f"goes on from step {run.step_saved}" if run.step_saved else "begins from step 1"
    return "requeue", f"the same command {where}"


def _launches(attempts: list[Attempt], environ: Mapping[str, str]) -> list[list[int]]:
    """Group attempts by launch, in order; a launch of this job that came to none is empty.

    Outside of SLURM it is the job of the last attempt, if that ran in one, else each attempt is a
    launch of its own. Who submits another job has looked, so that earlier ones do not count.

    Returns:
        Indices of attempts.
    """
    job, restarts = environ.get("SLURM_JOB_ID"), int(environ.get("SLURM_RESTART_COUNT") or 0)
    if job is None and attempts:
        job, restarts = attempts[-1].job, attempts[-1].restart
    if job is None:
        return [[i] for i in range(len(attempts))]
    return [
        [i for i, attempt in enumerate(attempts) if (attempt.job, attempt.restart) == (job, number)]
        for number in range(restarts + 1)
    ]


def _progressed(attempts: list[Attempt], step_saved: int) -> list[bool]:
    """Tell of each attempt whether it brought a new checkpoint: what the next could go on from."""
    ends = [*(attempt.step for attempt in attempts[1:]), step_saved]
    return [end > attempt.step for attempt, end in zip(attempts, ends, strict=False)]
