"""`dtrain submit`, with a stand-in for sbatch; test_slurm.py has the real one."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from dtrain.__main__ import main
from dtrain.commands import submit
from dtrain.commands.train import parse_start
from dtrain.config import load_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Stands in for sbatch: notes how it was called, and says 77."""
    program = tmp_path / "bin/sbatch"
    program.parent.mkdir()
    noted = 'printf "%s\\n" "$DTRAIN_CHECKOUT" "$PATH" "$@" > "${0%/*}/called"'
    program.write_text(f"#!/bin/sh\n{noted}\necho '77;there'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


@pytest.fixture
def ask(toy_settings, tmp_path, capsys):
    """Runs `dtrain submit` on the toy run; gives exit code, output and error output."""

    def run(*arguments: str) -> tuple[int, str, str]:
        place = ["--config", str(toy_settings), f"--run.dir={tmp_path}/runs/{{name}}"]
        try:
            code = main(["submit", *place, *arguments])
        except SystemExit as exit_:
            code = exit_.code
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


def test_it_submits_the_script_with_options_before_and_settings_behind(
    sbatch, ask, tmp_path, toy_settings
):
    code, out, err = ask(
        *("--nodes", "2", "--gpus-per-node", "8", "--time", "24:00:00", "--partition", "a100"),
        *("--account", "us", "--sbatch", "--qos=low --comment='a b'", "--run.name=first"),
    )
    assert (code, err) == (0, "")
    checkout, path, *words = (sbatch.parent / "called").read_text(encoding="utf-8").splitlines()
    assert checkout == str(ROOT)
    assert path.split(":")[0] == str(Path(sys.executable).parent)
    run = tmp_path / "runs/first"
    assert words == [
        "--parsable",
        "--job-name=first",
        "--nodes=2",
        "--gpus-per-node=8",
        "--time=24:00:00",
        "--partition=a100",
        "--account=us",
        f"--output={run}/slurm-%j.log",
        "--qos=low",
        "--comment=a b",
        str(ROOT / "launch/slurm.sbatch"),
        "--config",
        str(toy_settings),
        f"--run.dir={tmp_path}/runs/{{name}}",
        "--run.name=first",
    ]
    assert run.is_dir()  # or SLURM could not write the log
    assert "submitted job 77\n" in out
    assert f"{run}/slurm-77.log" in out
    assert "scancel 77" in out


def test_what_may_have_changed_is_handed_on_in_words_that_training_knows(sbatch, ask):
    changed = ["--allow-changed", "run.seed", "--allow-changed=plan"]
    assert ask(*changed, "--run.seed=3")[0] == 0
    words = (sbatch.parent / "called").read_text(encoding="utf-8").splitlines()
    config, allowed = parse_start(words[words.index("--config") :])
    assert (config.run.seed, allowed) == (3, ["run.seed", "plan"])
    code, _, err = ask("--allow-changed", "run.sede")
    assert code == 2
    assert "did you mean run.seed?" in err


def test_srun_has_a_task_for_each_gpu(sbatch, ask):
    assert ask("--launcher", "srun", "--gpus-per-node", "4")[0] == 0
    words = (sbatch.parent / "called").read_text(encoding="utf-8").splitlines()
    assert {"--gpus-per-node=4", "--ntasks-per-node=4", "--nodes=1"} <= set(words)
    assert str(ROOT / "launch/srun.sbatch") in words


@pytest.mark.parametrize("launcher", submit.SCRIPTS)
def test_a_dry_run_shows_script_and_command_and_needs_no_slurm(ask, tmp_path, launcher):
    code, out, _ = ask("--launcher", launcher, "--dry-run")
    assert code == 0
    script = ROOT / submit.SCRIPTS[launcher]
    assert out.startswith(script.read_text(encoding="utf-8"))
    command = shlex.split(out.splitlines()[-1])
    assert command[0] == "sbatch"
    assert str(script) in command
    assert not (tmp_path / "runs").exists()


def test_what_the_job_would_miss_is_said_now(ask, tmp_path):
    other = f"--data.dir={tmp_path}/none/{{fingerprint}}"
    code, _, err = ask("--dry-run", "--nodes", "2", other)
    assert code == 0
    assert f"nothing is prepared in {tmp_path}/none/" in err
    assert "dtrain prepare --config" in err
    assert shlex.quote(other) in err
    for harmless in (["--nodes", "1"], ["--nodes", "2", "--run.prepare=true"]):
        assert ask("--dry-run", other, *harmless)[2] == ""
    assert "nothing is prepared" in ask("--dry-run", other, "--run.prepare=false")[2]


def test_refusals_are_one_message(ask, sbatch, monkeypatch, tmp_path):
    complaint = "#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n"
    sbatch.write_text(complaint, encoding="utf-8")
    code, out, err = ask()
    assert (code, out) == (2, "")
    assert "invalid partition" in err
    sbatch.unlink()
    if shutil.which("sbatch") is None:
        assert "dtrain: there is no sbatch here" in ask()[2]
    monkeypatch.setattr(submit, "CHECKOUT", tmp_path)
    code, _, err = ask("--dry-run")
    assert code == 2
    assert f"there is no {tmp_path}/launch/slurm.sbatch" in err


def test_the_scripts_take_the_settings_as_they_are_given(ask):
    """What the command hands on is what the job reads: the same run directory."""
    words = shlex.split(ask("--dry-run", "--run.name=a b")[1].splitlines()[-1])
    config, *overrides = words[words.index("--config") + 1 :]
    assert load_config(Path(config), overrides).run_dir.name == "a b"
