"""The scripts that start things, with stand-ins for what they start."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A directory with the scripts and no .venv, where programs can be stood in for."""
    for script in ("launch/local.sh", "demo/run.sh"):
        (tmp_path / script).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / script, tmp_path / script)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for variable in ("OMP_NUM_THREADS", "PROCESSES", "SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(variable, raising=False)
    stand_in(tmp_path / "bin/nvidia-smi", "exit 9")
    stand_in(tmp_path / "bin/nproc", "echo ${OMP_NUM_THREADS:-8}")
    shown = "threads=$OMP_NUM_THREADS timeout=$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    stand_in(tmp_path / "bin/torchrun", f'printf "%s\\n" "$@" "{shown}"')
    return tmp_path


def stand_in(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def run(script, *arguments):
    command = [script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_local_starts_two_processes_without_a_gpu(checkout):
    lines = run(checkout / "launch/local.sh", "--config", "a b.yaml").stdout.splitlines()
    assert "--standalone" in lines
    assert "--nproc_per_node=2" in lines
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in lines
    assert lines[-5:-1] == ["-m", "dtrain.train", "--config", "a b.yaml"]
    assert lines[-1] == "threads=4 timeout=120"


def test_local_starts_a_process_for_each_gpu(checkout):
    stand_in(checkout / "bin/nvidia-smi", "exit 0")
    stand_in(checkout / "bin/python", "echo 8")
    lines = run(checkout / "launch/local.sh").stdout.splitlines()
    assert "--nproc_per_node=8" in lines
    assert lines[-1] == "threads=1 timeout=120"


def test_local_takes_the_numbers_it_is_given(checkout, monkeypatch):
    monkeypatch.setenv("PROCESSES", "3")
    monkeypatch.setenv("SHUTDOWN_TIMEOUT", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    lines = run(checkout / "launch/local.sh").stdout.splitlines()
    assert "--nproc_per_node=3" in lines
    assert lines[-1] == "threads=5 timeout=7"


@pytest.fixture
def demo(checkout):
    """A checkout where the demo's corpus, training and commands are stood in for."""
    corpus = 'mkdir -p "$3" && echo "a cat" > "$3/test.en"'
    stand_in(
        checkout / ".venv/bin/python",
        f'case "$*" in demo/make_corpus.py*) {corpus};; *) echo "BLEU of: $*";; esac',
    )
    stand_in(checkout / ".venv/bin/dtrain", "cat verdict")
    return checkout


def test_demo_trains_judges_and_says_what_to_try(demo):
    stand_in(demo / "launch/local.sh", 'echo "trained: $*"; echo completed > verdict')
    result = run(demo / "demo/run.sh")
    assert result.returncode == 0
    assert "trained: --config configs/demo.yaml" in result.stdout
    assert "BLEU of: -m dtrain evaluate runs/demo" in result.stdout
    assert 'echo "a cat" | .venv/bin/dtrain translate runs/demo' in result.stdout
    assert not (demo / "data/demo.partial").exists()


def test_demo_does_not_judge_what_failed(demo):
    stand_in(demo / "launch/local.sh", "echo requeue > verdict; exit 1")
    result = run(demo / "demo/run.sh")
    assert result.returncode == 1
    assert "make demo goes on from the last checkpoint" in result.stdout
    assert "BLEU" not in result.stdout


def test_demo_stopped_by_ctrl_c_says_how_to_go_on(demo):
    saving = "trap 'echo saved; exit 1' INT; touch begun; while :; do sleep 0.1; done"
    stand_in(demo / "launch/local.sh", saving)
    process = subprocess.Popen(
        [demo / "demo/run.sh"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while not (demo / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends Ctrl-C to all of them
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output.splitlines()[-3:] == ["saved", "", "Stopped: make demo goes on."]
    assert "BLEU" not in output
