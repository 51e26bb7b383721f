"""The scripts that start things, with stand-ins for what they start."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["launch/local.sh", "launch/job.sh", "launch/slurm.sbatch", "launch/srun.sbatch"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A directory with the scripts and no .venv, where programs can be stood in for."""
    for script in ("demo/run.sh", *SCRIPTS):
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


@pytest.fixture
def cluster(checkout, monkeypatch):
    """The inside of a job on two nodes of four GPUs, where what the scripts call is stood in for.

    The files `verdict` and `job` say what `dtrain status` and SLURM answer; `called` has the calls.
    """
    for variable in [name for name in os.environ if name.startswith(("DTRAIN_", "SLURM_"))]:
        monkeypatch.delenv(variable)
    job = {
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "n[3-4]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_ON_NODE": "32",
        "SLURM_NTASKS": "8",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_NODEID": "1",  # and the rest as a task on the second node finds it
        "SLURM_PROCID": "6",
        "SLURM_LOCALID": "2",
    }
    for variable, value in job.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(checkout)
    hosts = 'show hostnames n[3-4]") printf "n3\\nn4\\n"'
    stand_in(
        checkout / "bin/scontrol",
        f"""case "$*" in
        "{hosts};;
        "show job --oneliner 77") cat job;;
        "requeue 77") echo requeue >> called; kill -TERM $PPID;;
        esac""",
    )
    stand_in(
        checkout / "bin/python",
        """case "$*" in
        "-c "*) cat run;;
        *--verdict) cat verdict;;
        "-m dtrain status "*) echo "this is why";;
        *) printf "%s\\n" "$@"; env | grep -E "^(RANK|WORLD|LOCAL|MASTER)" | sort;;
        esac""",
    )
    stand_in(checkout / "bin/torchrun", 'printf "%s\\n" "$@"; env | grep -E "^(MASTER|OMP|TORCH)"')
    stand_in(
        checkout / "bin/srun",
        """echo srun >> called; printf "%s\\n" "$@"
        while [[ $1 == --* ]]; do shift; done; exec "$@\"""",
    )
    stand_in(checkout / "bin/sleep", "exit 0")
    (checkout / "run").write_text("/runs/toy\n", encoding="utf-8")
    answer(checkout, "completed", "RUNNING")
    return checkout


def answer(cluster, verdict: str, state: str, preempted: str = "None") -> None:
    facts = f"JobId=77 JobName=toy JobState={state} Restarts=0 PreemptTime={preempted} Nodes=2\n"
    (cluster / "job").write_text(facts, encoding="utf-8")
    (cluster / "verdict").write_text(f"{verdict}\n", encoding="utf-8")


def called(cluster) -> list[str]:
    path = cluster / "called"
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def test_slurm_starts_one_torchrun_a_node(cluster, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "32")
    result = run(cluster / "launch/slurm.sbatch", "--config", "a b.yaml")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert {"--cpus-per-task=32", "--distribution=block", "--kill-on-bad-exit=0"} <= set(lines)
    seen_by_torchrun = lines[len(lines) - 1 - lines[::-1].index("--node-rank=1") :]
    assert {
        "--nnodes=2",
        "--nproc-per-node=4",
        "--max-restarts=0",
        "--master-addr=n3",
        "--master-port=10539",
        "--rdzv-id=77.0",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "MASTER_ADDR=n3",
        "OMP_NUM_THREADS=8",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120",
    } <= set(seen_by_torchrun)
    behind = seen_by_torchrun[seen_by_torchrun.index("-m") :][:4]
    assert behind == ["-m", "dtrain.train", "--config", "a b.yaml"]


def test_slurm_without_gpus_starts_one_process_or_as_many_as_told(cluster, monkeypatch):
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    assert "--nproc-per-node=1\n" in run(cluster / "launch/slurm.sbatch").stdout
    monkeypatch.setenv("PROCESSES", "3")
    assert "--nproc-per-node=3\n" in run(cluster / "launch/slurm.sbatch").stdout


def test_srun_starts_ranks_that_know_their_place(cluster):
    result = run(cluster / "launch/srun.sbatch", "--config", "a b.yaml")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-10:] == [
        "-m",
        "dtrain.train",
        "--config",
        "a b.yaml",
        "LOCAL_RANK=2",
        "LOCAL_WORLD_SIZE=4",
        "MASTER_ADDR=n3",
        "MASTER_PORT=10539",
        "RANK=6",
        "WORLD_SIZE=8",
    ]


@pytest.mark.parametrize(
    ("variable", "value"), [("SLURM_NTASKS", "7"), ("SLURM_GPUS_PER_TASK", "1")]
)
def test_srun_refuses_what_would_leave_ranks_without_their_gpu(
    cluster, monkeypatch, variable, value
):
    monkeypatch.setenv(variable, value)
    result = run(cluster / "launch/srun.sbatch")
    assert (result.returncode, called(cluster)) == (2, [])
    assert "give --nodes, --ntasks-per-node and --gpus-per-node" in result.stderr


@pytest.mark.parametrize("script", ["slurm.sbatch", "srun.sbatch"])
def test_every_attempt_meets_elsewhere(cluster, monkeypatch, script):
    first = run(cluster / "launch" / script)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = run(cluster / "launch" / script)
    assert "attempt 1: " in first.stderr
    assert "rendezvous at n3:10539," in first.stderr
    assert "attempt 2: " in second.stderr
    assert "rendezvous at n3:10540," in second.stderr
    if script == "slurm.sbatch":
        assert "--rdzv-id=77.1" in second.stdout


@pytest.mark.parametrize("script", ["slurm.sbatch", "srun.sbatch"])
@pytest.mark.parametrize(
    ("verdict", "state", "preempted", "code", "calls"),
    [
        ("completed", "RUNNING", "None", 0, ["srun"]),
        ("completed", "RUNNING", "2026-01-02T03:04:05", 0, ["srun"]),
        ("requeue", "RUNNING", "None", -signal.SIGTERM, ["srun", "requeue"]),
        ("requeue", "RUNNING", "2026-01-02T03:04:05", -signal.SIGTERM, ["srun", "requeue"]),
        ("requeue", "COMPLETING", "None", 1, ["srun"]),  # cancelled
        ("stop", "RUNNING", "None", 1, ["srun"]),
        ("stop", "RUNNING", "2026-01-02T03:04:05", -signal.SIGTERM, ["srun", "requeue"]),
        ("stop", "COMPLETING", "None", 1, ["srun"]),
        ("", "RUNNING", "None", 1, ["srun"]),
    ],
)
def test_the_verdict_and_slurm_decide_whether_it_comes_back(
    cluster, script, verdict, state, preempted, code, calls
):
    answer(cluster, verdict, state, preempted)
    result = run(cluster / "launch" / script)
    assert (result.returncode, called(cluster)) == (code, calls), result.stderr
    gives_up = code == 1 and verdict != "requeue"
    assert ("this is why" in result.stderr) == gives_up
    assert ("SLURM is ending this job itself" in result.stderr) == (
        (verdict, state) == ("requeue", "COMPLETING")
    )


def test_a_controller_that_is_down_is_asked_again(cluster):
    answer(cluster, "requeue", "RUNNING")
    comes_back = '[[ $(wc -l < asked) -ge 3 ]] || exit 1; "$0".real "$@"'
    (cluster / "bin/scontrol").rename(cluster / "bin/scontrol.real")
    hosts = '[[ $2 == hostnames ]] && exec "$0".real "$@"'
    real = (cluster / "bin/scontrol.real").read_text(encoding="utf-8")
    stand_in(cluster / "bin/scontrol.real", real.replace("PPID", "(ps -o ppid= $PPID)"))
    stand_in(cluster / "bin/scontrol", f"{hosts}\necho >> asked; {comes_back}")
    result = run(cluster / "launch/slurm.sbatch")
    assert (result.returncode, called(cluster)) == (-signal.SIGTERM, ["srun", "requeue"])


def test_a_controller_that_stays_down_is_said(cluster):
    answer(cluster, "requeue", "RUNNING")
    stand_in(cluster / "bin/scontrol", "[[ $2 == hostnames ]] && echo n3")
    result = run(cluster / "launch/slurm.sbatch")
    assert (result.returncode, called(cluster)) == (1, ["srun"])
    assert "could not be requeued; the same sbatch command goes on" in result.stderr


@pytest.mark.parametrize("script", ["slurm.sbatch", "srun.sbatch"])
def test_nothing_is_started_without_a_host_or_with_a_mistake_in_the_settings(cluster, script):
    stand_in(cluster / "bin/scontrol", "exit 1")
    result = run(cluster / "launch" / script)
    assert (result.returncode, called(cluster)) == (2, [])
    assert "scontrol names no host of n[3-4]" in result.stderr
    stand_in(cluster / "bin/python", "echo 'dtrain: unknown setting' >&2; exit 2")
    result = run(cluster / "launch" / script)
    assert (result.returncode, called(cluster)) == (2, [])
    assert result.stderr == "dtrain: unknown setting\n"


def test_started_without_sbatch_it_says_so(cluster, monkeypatch):
    monkeypatch.delenv("SLURM_SUBMIT_DIR")
    result = run(cluster / "launch/slurm.sbatch")
    assert result.returncode != 0
    assert "start this with sbatch" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_sigusr1_goes_to_srun_and_sigterm_does_not(cluster, number):
    """srun would take SIGTERM as an order to kill its tasks, who have one from SLURM anyway."""
    answer(cluster, "requeue", "RUNNING" if number == signal.SIGUSR1 else "COMPLETING")
    stand_in(
        cluster / "bin/srun",
        """trap 'echo saved; exit 0' USR1; trap 'echo killed; exit 1' TERM
        touch begun; for _ in {1..10}; do /bin/sleep 0.05; done; echo ended""",
    )
    process = subprocess.Popen(
        [cluster / "launch/slurm.sbatch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while not (cluster / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    if number == signal.SIGUSR1:
        assert (output, called(cluster)) == ("saved\n", ["requeue"]), errors
    else:
        assert (output, called(cluster)) == ("ended\n", []), errors
