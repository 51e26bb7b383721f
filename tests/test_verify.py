"""`dtrain verify`, on a run directory with checkpoints of every kind."""

import os
import shutil
from pathlib import Path

import pytest
from tiny_model import save_checkpoint, trained

from dtrain import checkpoint
from dtrain.__main__ import main
from dtrain.commands.average import average
from dtrain.data.store import PreparedData
from dtrain.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Three steps, the second one judged, and the average of all."""
    run = RunDirectory(tmp_path / "run")
    for step in (9, 10, 100):
        name = checkpoint.checkpoint_name(step)
        save_checkpoint(run.checkpoints, name, *trained(steps=1), {"step": step})
    checkpoint.note_judgement(run.checkpoints / checkpoint.checkpoint_name(10), 35.971, {})
    average(run.checkpoints, checkpoint.steps_saved(run.checkpoints))
    run.config_file.write_text("validation: {every_steps: 0}", encoding="utf-8")
    return run


def verify(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Run the command; gives the exit code and the lines, and looks that nothing has changed."""
    before = snapshot(run.path)
    code = main(["verify", str(run.path)])
    assert snapshot(run.path) == before
    return code, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def snapshot(folder: Path) -> dict[Path, object]:
    """Names, times and content of all there is."""
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


def test_whole_ones_are_said_to_be_whole(run, capsys):
    (run.checkpoints / ".tmp-step-0000000101-7").mkdir()
    (run.checkpoints / "step-notes").mkdir()
    age = run.checkpoints / checkpoint.checkpoint_name(9)
    for file in age.iterdir():
        os.utime(file, (0, 0))
    code, lines = verify(run, capsys)
    assert code == 0
    assert lines[0] == "checkpoint step MiB age score verdict"
    first, *others = lines[1:]
    assert first.startswith("average-0000000100-of-3 100 0.0 ")
    assert others.pop().startswith("prepared data not looked for: data.train is empty")
    assert [line.split()[0] for line in others] == [f"step-{step:010d}" for step in (9, 10, 100)]
    assert " d whole" in others[0]
    assert "35.97 whole" in others[1]
    assert [line for line in lines if "a start goes on from here" in line] == [others[2]]


@pytest.mark.parametrize("name", ["step-0000000100", "step-0000000009", "average-0000000100-of-3"])
def test_one_that_is_damaged_is_named_and_the_code_is_1(run, capsys, name):
    flip(run.checkpoints / name / checkpoint.MODEL)
    code, lines = verify(run, capsys)
    assert code == 1
    (line,) = [line for line in lines if line.startswith(name)]
    assert line.endswith("model.safetensors is damaged: its SHA-256 is not the manifest's")
    (line,) = [line for line in lines if "a start goes on from here" in line]
    best = "step-0000000010" if name == "step-0000000100" else "step-0000000100"
    assert line.startswith(best)


def test_one_that_was_set_aside_is_shown_but_counts_only_if_it_was_the_last(run, capsys):
    flip(run.checkpoints / "step-0000000100" / checkpoint.OPTIMIZER)
    checkpoint.newest(run.checkpoints)
    code, lines = verify(run, capsys)
    assert code == 0
    (line,) = [line for line in lines if line.startswith("step-0000000100.corrupt 100 ")]
    assert "set aside: optimizer.safetensors is damaged" in line
    for path in checkpoint.steps_saved(run.checkpoints):
        shutil.rmtree(path)
    assert verify(run, capsys)[0] == 1  # an average is nothing to go on from


def test_one_of_a_newer_dtrain_is_not_called_damaged(run, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    model, optimizer = trained()
    save_checkpoint(run.checkpoints, "step-0000000200", model, optimizer, {"step": 200})
    monkeypatch.undo()
    code, lines = verify(run, capsys)
    assert code == 1
    assert lines[-2].endswith("has format 2; this dtrain reads up to 1: upgrade dtrain")


def test_one_that_cannot_be_read_now_is_not_called_damaged(run, capsys, monkeypatch):
    def unreadable(_: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "sha256", unreadable)
    code, lines = verify(run, capsys)
    assert code == 1
    assert all("cannot be read: [Errno 5] Input/output error" in line for line in lines[1:-1])


def test_one_that_a_training_deletes_meanwhile_is_left_out(run, capsys, monkeypatch):
    sha256 = checkpoint.sha256

    def pruned_meanwhile(path: Path) -> str:
        if "step-0000000009" in str(path) and path.exists():
            shutil.rmtree(path.parent)
        return sha256(path)

    monkeypatch.setattr(checkpoint, "sha256", pruned_meanwhile)
    assert main(["verify", str(run.path)]) == 0
    assert "step-0000000009" not in capsys.readouterr().out


def test_a_run_without_checkpoints(tmp_path, capsys):
    run = RunDirectory(tmp_path)
    run.config_file.write_text("validation: {every_steps: 0}", encoding="utf-8")
    code, lines = verify(run, capsys)
    assert code == 0
    assert lines[0] == f"there is no checkpoint in {tmp_path}/checkpoints yet"


def test_prepared_data_is_hashed_again(run, capsys, toy):
    """A start would not see it: it reads no tokens, and the size is right."""
    config = toy("run")
    data = run.path / "data"
    run.config_file.write_text(toy("run", data__dir=data).to_yaml(), encoding="utf-8")
    code, lines = verify(run, capsys)
    assert (code, lines[-1]) == (
        0,
        f"prepared data {data}: not there; the next start makes it again",
    )
    shutil.copytree(config.data.dir, data)
    code, lines = verify(run, capsys)
    assert code == 0
    assert lines[-1].startswith(f"prepared data {data}: whole, 0.")
    flip(data / "train" / "target.tokens")
    PreparedData.open(data)
    code, lines = verify(run, capsys)
    assert code == 1
    assert lines[-1].startswith(f"prepared data {data}/train/target.tokens has changed since")


def test_a_run_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["verify", str(tmp_path)])
    assert exit_.value.code == 2
    assert "is not a run directory" in capsys.readouterr().err
