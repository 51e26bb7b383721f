"""The command of record, as a person or a batch system starts and stops it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dtrain

pytestmark = pytest.mark.slow

TORCHRUN = Path(sys.executable).parent / "torchrun"


@pytest.fixture
def start(toy_settings, tmp_path):
    """Starts `torchrun ... -m dtrain.train` on two processes; its run is tmp_path/toy."""
    started = []

    def begin(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        launch = [TORCHRUN, "--standalone", "--nproc_per_node=2", "-m", "dtrain.train"]
        settings = ["--config", toy_settings, f"--run.dir={tmp_path}/{{name}}", *arguments]
        process = subprocess.Popen(
            [*launch, *settings],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def output_of(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=120)[0]


def status_of(run: Path) -> dict[str, object]:
    return json.loads((run / "status.json").read_text(encoding="utf-8"))


def steps_logged(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while not steps_logged(run)[step - 1 :]:
        assert process.poll() is None, output_of(process)
        assert time.monotonic() < deadline, "it does not get going"
        time.sleep(0.05)


def no_traceback_of_ours(output: str) -> bool:
    """torchrun shows its own about the rank that failed."""
    return f'File "{Path(dtrain.__file__).parent}' not in output


def test_told_to_stop_it_saves_and_the_same_command_goes_on_to_the_end(start, tmp_path):
    process = start("--run.max_steps=120")
    wait_for_step(process, tmp_path / "toy", 5)
    process.send_signal(signal.SIGTERM)
    output = output_of(process)
    status = status_of(tmp_path / "toy")
    assert status["status"] == "preempted", output
    assert status["exit_code"] == 0
    assert 5 <= status["step"] < 120
    assert f"stopped by SIGTERM after step {status['step']}; the same command goes on" in output
    assert no_traceback_of_ours(output)

    process = start("--run.max_steps=120")
    output = output_of(process)
    assert process.returncode == 0, output
    assert f"attempt 2, from step {status['step']}" in output
    assert status_of(tmp_path / "toy")["status"] == "completed"
    assert steps_logged(tmp_path / "toy") == list(range(1, 121))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run.sede=3"], "unknown setting run.sede = 3 (command line); did you mean run.seed?"),
        (["--data.max_length=64", "--run.prepare=false"], "nothing is prepared in"),
    ],
    ids=["before-torch-is-imported", "with-both-ranks-connected"],
)
def test_a_mistake_is_one_message_and_no_traceback(start, tmp_path, arguments, message):
    process = start(*arguments, f"--data.dir={tmp_path}/tokens")
    assert_refused(process, message)
    assert not (tmp_path / "toy" / "config.yaml").exists(), "the corrected command begins anew"


def test_the_message_comes_through_when_rank_0_is_the_slowest(start, tmp_path):
    """torchrun ends all ranks as soon as it sees one fail."""
    late = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(2)\n"
    (tmp_path / "sitecustomize.py").write_text(late, encoding="utf-8")
    assert_refused(start("--run.sede=3", PYTHONPATH=str(tmp_path)), "unknown setting run.sede")


def assert_refused(process: subprocess.Popen[str], message: str) -> None:
    output = output_of(process)
    assert process.returncode != 0
    assert output.count("dtrain: ") == 1, output
    assert f"dtrain: {message}" in output
    first_failure = output.partition("Root Cause")[2]
    assert re.search(r"rank +: 0 .*\n.*exitcode +: 2 ", first_failure), output
    assert no_traceback_of_ours(output)
