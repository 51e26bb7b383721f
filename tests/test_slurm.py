"""The launch scripts on a real SLURM of two nodes, which the tests start themselves.

tests/slurm/install brings Debian's packages; without them all of this is skipped.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Toy
from slurm.cluster import Cluster, cluster, what_is_missing
from worlds import run_world

from dtrain import train

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

STEPS = 120


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """A SLURM for the tests of this file."""
    missing = what_is_missing()
    if missing:
        pytest.skip(f"no SLURM: {missing}")
    with cluster() as running:
        running.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        yield running


@pytest.fixture(scope="module")
def undisturbed(toy_settings, tmp_path_factory) -> dict[str, str]:
    """The hashes of the run as it goes on two ranks without SLURM."""
    toy = Toy(toy_settings, tmp_path_factory.mktemp("undisturbed"))
    config = toy(run__max_steps=STEPS)
    run_world(2, train.run, config)
    return hashes(config.run_dir)


def hashes(run: Path) -> dict[str, str]:
    """SHA-256 of weights and of moments in the last checkpoint."""
    manifest = run / f"checkpoints/step-{STEPS:010d}/MANIFEST.json"
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    return {name: files[name]["sha256"] for name in ("model.safetensors", "optimizer.safetensors")}


class Job:
    """A submitted training of one process a node, in a run directory of its own."""

    def __init__(self, slurm: Cluster, number: str, run: Path, log: Path) -> None:
        self.slurm, self.number, self.run, self.log = slurm, number, run, log

    @property
    def text(self) -> str:
        """The job's log, of all attempts."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    @property
    def status(self) -> dict[str, object]:
        """What the run says of itself."""
        return json.loads((self.run / "status.json").read_text(encoding="utf-8"))

    def steps(self) -> list[int]:
        """The steps in metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def state(self) -> tuple[str, int]:
        """RUNNING, PENDING and so on, and how often SLURM requeued it."""
        facts = self.slurm.job(self.number)
        return facts["JobState"], int(facts["Restarts"])

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait until something has become of the job."""
        deadline = time.monotonic() + 120
        while not done():
            assert time.monotonic() < deadline, f"{self.slurm.job(self.number)}\n{self.text}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        """Wait until the training has made a step."""
        self.wait(lambda: step in self.steps())

    def wait_for(self, state: str, restarts: int) -> None:
        """Wait until SLURM says so of the job."""
        self.wait(lambda: self.state() == (state, restarts))

    def told_to_stop(self) -> None:
        """Send what `--signal=B:USR1@120` sends 120 seconds before the time limit."""
        self.slurm.command("scancel", "--batch", "--signal=USR1", self.number)

    def start_again(self) -> None:
        """Start the requeued job at once; SLURM would let it wait for two minutes."""
        self.wait(lambda: self.slurm.job(self.number)["Reason"] == "BeginTime")
        time.sleep(1.5)  # in the same second its nodes would still refuse it
        self.slurm.command("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        self.wait(lambda: self.state()[0] == "RUNNING")


@pytest.fixture
def submit(slurm, toy_settings, tmp_path):
    """Submits a training of the toy run; it is cancelled afterwards if it still is there."""
    jobs = []

    def begin(*options: str, by: str = "dtrain") -> Job:
        settings = ["--config", toy_settings, f"--run.dir={tmp_path}/{{name}}"]
        settings += [f"--run.max_steps={STEPS}", "--run.name=toy"]
        log = tmp_path / "toy/slurm-{}.log"
        if by == "dtrain":
            said = slurm.command(sys.executable, "-m", "dtrain", "submit", *options, *settings)
            number = re.search(r"submitted job (\d+)", said)[1]
        else:
            log = tmp_path / "slurm-{}.log"
            output = f"--output={log}".format("%j")
            script = "launch/slurm.sbatch"
            number = slurm.command("sbatch", "--parsable", output, *options, script, *settings)
        jobs.append(Job(slurm, number, tmp_path / "toy", Path(str(log).format(number))))
        return jobs[-1]

    yield begin
    for job in jobs:
        slurm.command("scancel", job.number)


def test_stopped_before_the_time_limit_and_preempted_it_ends_as_if_undisturbed(
    slurm, submit, undisturbed
):
    job = submit("--nodes=2")
    job.wait_for_step(5)
    job.told_to_stop()
    job.wait_for("PENDING", restarts=1)
    assert job.status["status"] == "preempted"

    job.start_again()
    job.wait_for_step(job.status["step"] + 5)
    slurm.command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=true")
    job.wait(lambda: slurm.job(job.number).get("PreemptTime", "None") != "None")
    preempted = time.monotonic()
    job.wait_for("PENDING", restarts=2)
    requeued = time.monotonic()
    assert job.status["status"] == "preempted"

    job.start_again()
    started = time.monotonic()
    job.wait_for_step(job.status["step"] + 1)
    resumed = time.monotonic()
    print(f"saved and requeued after {requeued - preempted:.1f} s, resumed {resumed - started:.1f}")

    job.wait_for("COMPLETED", restarts=2)
    assert job.status["status"] == "completed"
    meeting = rf"attempt (\d): 2 nodes x 1 processes, rendezvous at {slurm.nodes[0]}:(\d+),"
    places = re.findall(meeting, job.text)
    assert [attempt for attempt, _ in places] == ["1", "2", "3"]
    assert len({port for _, port in places}) == 3
    assert job.steps() == list(range(1, STEPS + 1))
    assert hashes(job.run) == undisturbed


def test_srun_starts_the_ranks_by_itself(submit, undisturbed):
    job = submit("--nodes=2", "--launcher=srun")
    job.wait_for_step(5)
    job.told_to_stop()
    job.wait_for("PENDING", restarts=1)
    job.start_again()
    job.wait_for("COMPLETED", restarts=1)
    assert "torchrun" not in job.text
    assert job.steps() == list(range(1, STEPS + 1))
    assert hashes(job.run) == undisturbed


def test_a_cancelled_job_saves_and_does_not_come_back(slurm, submit):
    job = submit("--nodes=2", by="sbatch")
    job.wait_for_step(5)
    slurm.command("scancel", job.number)
    job.wait_for("CANCELLED", restarts=0)
    assert job.status["status"] == "preempted", job.text
    assert (job.run / f"checkpoints/step-{job.status['step']:010d}/MANIFEST.json").exists()
    assert "SLURM is ending this job itself, so it is not requeued here" in job.text


def test_a_job_that_gets_nowhere_is_given_up_at_the_third_attempt(slurm, submit, monkeypatch):
    fault = "step=2,point=before_optimizer,signal=KILL"
    monkeypatch.setitem(slurm.environment, "DTRAIN_FAULT", fault)
    job = submit("--nodes=1", "--launcher=srun")
    for restarts in (1, 2):
        job.wait_for("PENDING", restarts)
        job.start_again()
    job.wait_for("FAILED", restarts=2)
    assert "verdict: stop" in job.text
    assert "3 starts in a row brought no new checkpoint" in job.text
