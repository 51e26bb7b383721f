"""The command line as a whole; what each command does is in test_commands.py."""

import argparse
import importlib
import subprocess
import sys
import time

import pytest

from dtrain import __version__
from dtrain.__main__ import COMMANDS, WITH_SETTINGS, main

HEAVY = ("datasets", "matplotlib", "sacrebleu", "sentencepiece", "torch", "wandb")

FLAGS = {
    "prepare": ["--config"],
    "train": ["--config", "--print-config", "--allow-changed", "--run.seed", "--precision"],
    "translate": ["RUN", "--checkpoint", "--beam-size", "--length-penalty", "--device"],
    "evaluate": ["RUN", "--checkpoint", "--beam-size", "--split", "--json", "--device"],
    "average": ["RUN", "--last"],
    "status": ["RUN", "--json", "--verdict"],
    "verify": ["RUN"],
    "inspect": ["RUN", "--step", "--micro-batch", "--checkpoint", "--text", "--json", "--device"],
    "submit": ["--config", "--nodes", "--time", "--allow-changed", "--dry-run"],
    "schedule": ["CONFIG", "--out"],
}


def ended(capsys, *arguments) -> tuple[int, str, str]:
    """Run a command that ends the process; gives exit code, output, and error output."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    streams = capsys.readouterr()
    return exit_.value.code, streams.out, streams.err


def test_help_lists_every_command_with_what_it_does(capsys):
    code, out, _ = ended(capsys, "--help")
    assert code == 0
    for name, summary in COMMANDS.items():
        assert f"{name} " in out
        assert summary in " ".join(out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_complete(capsys, command):
    code, out, _ = ended(capsys, command, "--help")
    assert code == 0
    assert COMMANDS[command] in " ".join(out.split())
    for flag in FLAGS[command]:
        assert flag in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_explained(command):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"dtrain.commands.{command}").add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []


def test_version(capsys):
    assert ended(capsys, "--version")[:2] == (0, f"dtrain {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly' (choose from"),
        (["translate"], "required: RUN"),
        (["translate", "runs/a", "--beam-size", "0"], "--beam-size: 0 is not at least 1"),
        (["average", "runs/a", "--last", "0"], "--last: 0 is not at least 1"),
        (["train"], "required: --config"),
        (["status", "runs/a", "--run.seed=3"], "dtrain: status does not know --run.seed=3; see"),
        (["evaluate", "runs/a", "more"], "dtrain: evaluate does not know more; see --help"),
        (["status", "nowhere"], "dtrain: nowhere is not a run directory"),
        (["train", "--config", "nowhere.yaml"], "dtrain: there is no config file nowhere.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message_and_exit_code_2(
    capsys, monkeypatch, arguments, complaint
):
    monkeypatch.delenv("RANK", raising=False)
    code, out, err = ended(capsys, *arguments)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("dtrain: ") + err.count("error: ") == 1 + err.count("dtrain: error: ")


@pytest.mark.parametrize("command", WITH_SETTINGS)
def test_settings_are_taken_where_there_are_any(capsys, toy_settings, command):
    arguments = [str(toy_settings)] if command == "schedule" else ["--config", str(toy_settings)]
    code, _, err = ended(capsys, command, *arguments, "--run.sede=3")
    assert code == 2
    assert "unknown setting run.sede = 3 (command line); did you mean run.seed?" in err


def python(*arguments) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.slow
def test_no_help_imports_anything_heavy():
    script = f"""
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from dtrain.__main__ import COMMANDS, main
for command in COMMANDS:
    with suppress(SystemExit), redirect_stdout(StringIO()):
        main([command, "--help"])
print([name for name in {HEAVY} if name in sys.modules])
"""
    result = python("-c", script)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.slow
def test_help_comes_at_once():
    """Within 1.5 s on a quiet machine; on a busy one in less time than torch takes to import."""

    def seconds(*words) -> float:
        begun = time.perf_counter()
        assert python(*words).returncode == 0
        return time.perf_counter() - begun

    limit = max(1.5, seconds("-c", "import torch"))
    assert seconds("-m", "dtrain", "--help") < limit
    assert seconds("-m", "dtrain", "train", "--help") < limit
    assert seconds("-m", "dtrain.train", "--help") < limit
