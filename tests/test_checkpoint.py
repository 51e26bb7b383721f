import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import TINY, same, save_checkpoint, trained
from worlds import run_world

from dtrain import checkpoint, durable, train, weights
from dtrain.batch import Batch
from dtrain.checkpoint import CheckpointError, checkpoint_name
from dtrain.commands.average import average
from dtrain.config import OptimizerSettings
from dtrain.errors import UserError
from dtrain.loss import Objective
from dtrain.model.transformer import Transformer
from dtrain.optimizer import build_optimizer
from dtrain.progress import Progress
from dtrain.run_directory import RunDirectory
from dtrain.saver import room_needed

FORMAT_1 = Path(__file__).parent / "fixtures" / "checkpoint-format-1" / "step-0000000003"


def test_a_checkpoint_gives_back_model_and_optimizer(tmp_path):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, "step-0000000002", model, optimizer, {"step": 2})
    assert checkpoint.verify(path) == ""
    assert checkpoint.read_state(path)["step"] == 2
    other, other_optimizer = trained(seed=1, steps=1)
    weights.load_module(other, path / checkpoint.MODEL)
    weights.load_optimizer(other_optimizer, other, path / checkpoint.OPTIMIZER)
    assert same(model.state_dict(), other.state_dict())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert same(optimizer.state[mine], other_optimizer.state[theirs])


def test_going_on_after_loading_is_going_on(tmp_path):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, "step-0000000002", model, optimizer, {})
    other, other_optimizer = trained(seed=1, steps=0)
    weights.load_module(other, path / checkpoint.MODEL)
    weights.load_optimizer(other_optimizer, other, path / checkpoint.OPTIMIZER)
    for each, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        each.eval().zero_grad()
        Objective(each, 0.1)(Batch.padded([[5, 6, 3]], [[7, 3]]))[0].backward()
        its_optimizer.step()
    assert same(model.state_dict(), other.state_dict())


def test_only_safetensors_and_json_and_plain_names(tmp_path):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, "step-0000000001", model, optimizer, {})
    assert sorted(file.name for file in path.iterdir()) == [
        "MANIFEST.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    from safetensors import safe_open

    with safe_open(path / checkpoint.MODEL, "pt") as file:
        names = set(file.keys())
    assert names == {name for name, _ in model.named_parameters()}
    assert not any("module." in name or "_orig_mod" in name for name in names)
    assert [file.name for file in tmp_path.iterdir()] == ["step-0000000001"]


FILES = [
    "MANIFEST.json",
    "judgement.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
]


def harm(path: Path, damage: str) -> None:
    """Flip a bit of a file, cut off its last byte, or delete it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= damage == "flip"
    path.write_bytes(content[:-1] if damage == "truncate" else content)
    if damage == "delete":
        path.unlink()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_any_damage_is_found_and_an_older_one_is_used(tmp_path, file, damage):
    model, optimizer = trained()
    good = save_checkpoint(tmp_path, "step-0000000001", model, optimizer, {})
    bad = save_checkpoint(tmp_path, "step-0000000002", model, optimizer, {})
    checkpoint.note_judgement(bad, 1.5, {"step": 2})
    harm(bad / file, damage)
    if (file, damage) == ("judgement.json", "delete"):  # a checkpoint may well have none
        assert checkpoint.newest(tmp_path) == (bad, [])
        return
    assert file in checkpoint.verify(bad)
    found, complaints = checkpoint.newest(tmp_path)
    assert found == good
    assert len(complaints) == 1
    assert "step-0000000002" in complaints[0]
    assert (tmp_path / "step-0000000002.corrupt").is_dir()
    assert checkpoint.newest(tmp_path) == (good, [])


@pytest.mark.parametrize("file", ["MANIFEST.json", "judgement.json", "state.json"])
def test_a_flip_of_any_byte_is_found(tmp_path, file):
    path = save_checkpoint(tmp_path, "step-0000000001", torch.nn.Linear(1, 1), None, {"step": 1})
    checkpoint.note_judgement(path, 1.5, {"step": 1, "cursor": {"epoch": 0}})
    whole = (path / file).read_bytes()
    assert checkpoint.verify(path) == ""
    for position in range(len(whole)):
        harmed = bytearray(whole)
        harmed[position] ^= 1 << position % 8
        (path / file).write_bytes(harmed)
        # A damaged manifest asks for other files, or other content, than there is.
        assert checkpoint.verify(path) != "", bytes(harmed)
    (path / file).write_bytes(whole)
    assert checkpoint.verify(path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_both_ranks_take_the_older_one(toy, damage):
    changes = {"checkpoint__every_steps": 2, "run__max_steps": 6}
    whole, harmed = toy("whole", **changes), toy("harmed", **changes | {"run__max_steps": 4})
    run_world(2, train.run, whole)
    run_world(2, train.run, harmed)
    folder = RunDirectory(harmed.run_dir).checkpoints
    harm(folder / checkpoint_name(4) / checkpoint.MODEL, damage)
    run_world(2, train.run, toy("harmed", **changes))
    assert (folder / f"{checkpoint_name(4)}.corrupt").is_dir()
    expected = RunDirectory(whole.run_dir).checkpoints
    for step in (2, 4, 6):
        for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
            here, there = (f / checkpoint_name(step) / file for f in (folder, expected))
            assert here.read_bytes() == there.read_bytes()


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    """Not even if somebody who can make a manifest put it there."""
    mark = tmp_path / "mark"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(mark),)

    bomb = pickle.dumps(Bomb())
    pickle.loads(bomb)
    mark.rmdir()  # so it does go off where something unpickles it
    path = save_checkpoint(tmp_path, "step-0000000001", *trained(), {"step": 1})
    for name in ("model.pt", "state.pkl", "__init__.py", ".metadata"):
        (path / name).write_bytes(bomb)
    assert checkpoint.newest(tmp_path) == (path, [])
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE):
        (path / file).write_bytes(bomb)
        manifest = json.loads((path / checkpoint.MANIFEST).read_text(encoding="utf-8"))
        facts = {"size": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
        manifest["files"][file] = facts
        durable.write_json(path / checkpoint.MANIFEST, manifest)
    model, optimizer = trained()
    with pytest.raises(UserError, match="not a whole safetensors file"):
        weights.load_module(model, path / checkpoint.MODEL)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        weights.load_optimizer(optimizer, model, path / checkpoint.OPTIMIZER)
    with pytest.raises(UnicodeDecodeError):
        checkpoint.read_state(path)
    assert "damaged" in checkpoint.verify(path)
    assert not mark.exists()


def test_half_a_checkpoint_does_not_exist(tmp_path):
    (tmp_path / ".tmp-step-0000000009-1").mkdir()
    assert checkpoint.newest(tmp_path) == (None, [])
    (tmp_path / "step-0000000009").mkdir()
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged"):
        checkpoint.newest(tmp_path)


def test_a_passing_read_error_condemns_no_checkpoint(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, "step-0000000001", trained()[0], None, {})

    def unreadable(_: Path) -> str:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256", unreadable)
        with pytest.raises(OSError, match="Input/output"):
            checkpoint.newest(tmp_path)
    assert checkpoint.newest(tmp_path) == (path, [])


def test_newest_is_by_number(tmp_path):
    model, _ = trained()
    for step in (9, 10, 100000000000):
        save_checkpoint(tmp_path, checkpoint.checkpoint_name(step), model, None, {})
    assert checkpoint.newest(tmp_path)[0].name == "step-100000000000"


def test_prune_keeps_the_last_and_the_best(tmp_path):
    model, _ = trained()
    for step, score in enumerate([1.0, 9.0, None, 3.0, 2.0, None], start=1):
        name = checkpoint.checkpoint_name(step)
        path = save_checkpoint(tmp_path, name, model, None, {"progress": {}})
        if score is not None:
            checkpoint.note_judgement(path, score, {"best_score": score})
    (tmp_path / ".tmp-step-1-2").mkdir()
    checkpoint.prune(tmp_path, keep_last=2, keep_best=2)
    kept = [int(path.name[5:]) for path in reversed(checkpoint.steps_saved(tmp_path))]
    assert kept == [2, 4, 5, 6]
    assert not list(tmp_path.glob(".tmp*"))
    assert checkpoint.choose(tmp_path, "best").name == "step-0000000002"
    assert checkpoint.choose(tmp_path, "last").name == "step-0000000006"
    assert checkpoint.choose(tmp_path, "4").name == "step-0000000004"
    with pytest.raises(CheckpointError, match=r"there is no checkpoint '3' .*step-0000000002"):
        checkpoint.choose(tmp_path, "3")


Case = namedtuple("Case", "scores keep_last keep_best protect kept")


@pytest.mark.parametrize(
    "case",
    [
        Case({1: None, 2: None, 3: None}, 1, 0, None, [3]),
        Case({1: None, 2: None, 3: None}, 5, 0, None, [1, 2, 3]),
        Case({1: 9.0, 2: 8.0, 3: None}, 1, 1, None, [1, 3]),
        Case({1: 9.0, 2: 8.0, 3: None}, 1, 2, None, [1, 2, 3]),
        Case({1: 1.0, 2: -2.0, 3: 3.0}, 1, 1, None, [3]),
        Case({1: -1.0, 2: -2.0, 3: -3.0}, 1, 1, None, [1, 3]),
        Case({9: None, 10: None, 100: None, 10**11: None}, 2, 0, None, [100, 10**11]),
        Case({4: None, 5: None}, 1, 0, 4, [4, 5]),
        Case({4: None, 5: None, 6: None}, 1, 0, 4, [6]),
        Case({4: None, 5: None, 6: None}, 1, 0, 5, [5, 6]),
        Case({}, 1, 1, None, []),
    ],
    ids=str,
)
def test_prune_table(tmp_path, case):
    make_directories(tmp_path, case.scores)
    protect = None if case.protect is None else tmp_path / checkpoint_name(case.protect)
    assert checkpoint.prune(tmp_path, case.keep_last, case.keep_best, protect) == []
    assert sorted(map(checkpoint.step_of, checkpoint.steps_saved(tmp_path))) == case.kept


def make_directories(folder: Path, scores: dict[int, float | None]) -> None:
    """What prune sees of checkpoints."""
    for step, score in scores.items():
        path = folder / checkpoint_name(step)
        path.mkdir()
        if score is not None:
            checkpoint.note_judgement(path, score, {})


@settings(max_examples=60, deadline=None)
@given(
    scores=st.dictionaries(st.integers(0, 10**11), st.none() | st.floats(-100, 100), max_size=8),
    keep_last=st.integers(1, 4),
    keep_best=st.integers(0, 3),
    protected=st.none() | st.integers(0, 7),
)
def test_prune_keeps_what_it_promises(scores, keep_last, keep_best, protected):
    steps = sorted(scores)
    protect = steps[protected] if protected is not None and protected < len(steps) else None
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_directories(folder, scores)
        protected_path = None if protect is None else folder / checkpoint_name(protect)
        checkpoint.prune(folder, keep_last, keep_best, protected_path)
        kept = set(map(checkpoint.step_of, checkpoint.steps_saved(folder)))
    last = set(steps[-keep_last:])
    assert last <= kept
    judged = [step for step in steps if scores[step] is not None]
    worst_kept = sorted((scores[step] for step in judged), reverse=True)[:keep_best]
    best = [step for step in judged if scores[step] in worst_kept]
    assert len(kept & set(best)) >= min(keep_best, len(judged))
    if protect is not None and len([step for step in steps if step > protect]) < 2:
        assert protect in kept
    assert kept <= last | set(best) | {protect}
    assert len(kept) <= keep_last + keep_best + 1


def test_prune_deletes_only_what_is_dtrains(tmp_path):
    make_directories(tmp_path, {1: None, 2: None, 3: None})
    strangers = ["step-x", "notes", "step-1.corrupt", "average-0000000001-of-2", "step-", ".git"]
    for name in strangers:
        (tmp_path / name).mkdir()
    (tmp_path / "step-0000000000").write_text("a file", encoding="utf-8")
    (tmp_path / ".tmp-step-0000000009-77").mkdir()
    (tmp_path / ".tmp-average-0000000009-of-2-77").mkdir()  # somebody averages at this moment
    checkpoint.prune(tmp_path, keep_last=1, keep_best=0)
    assert {path.name for path in tmp_path.iterdir()} == {
        *strangers,
        "step-0000000000",
        "step-0000000003",
        ".tmp-average-0000000009-of-2-77",
    }


def test_what_cannot_be_deleted_is_only_said(tmp_path, monkeypatch):
    make_directories(tmp_path, dict.fromkeys((1, 2, 3, 4)))
    rename = Path.rename

    def stubborn(self: Path, to: Path) -> Path:
        if self.name == "step-0000000002":
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", stubborn)
    (complaint,) = checkpoint.prune(tmp_path, 1, 0)
    assert "step-0000000002 cannot be deleted" in complaint
    assert "Permission denied" in complaint
    assert list(map(checkpoint.step_of, checkpoint.steps_saved(tmp_path))) == [4, 2]


def test_one_that_was_being_replaced_counts_until_the_new_one_is_there(tmp_path):
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, "step-0000000007", model, optimizer, {"step": 7})
    aside = path.rename(tmp_path / "step-0000000007.replaced")
    assert checkpoint.newest(tmp_path) == (aside, [])
    assert checkpoint.choose(tmp_path, "7") == aside
    assert checkpoint.prune(tmp_path, 1, 0) == []
    assert checkpoint.verify(aside) == ""
    again = save_checkpoint(tmp_path, "step-0000000007", model, optimizer, {"step": 7})
    assert checkpoint.newest(tmp_path) == (again, [])
    shutil.copytree(again, aside, dirs_exist_ok=True)
    assert checkpoint.steps_saved(tmp_path) == [again]
    checkpoint.newest(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["step-0000000007"]


def test_room_is_about_what_a_checkpoint_takes(tmp_path):
    torch.manual_seed(0)
    model = Transformer(TINY.model_copy(update={"hidden_dim": 64, "feed_forward_dim": 256}), 2000)
    optimizer = build_optimizer(model, OptimizerSettings())
    Objective(model, 0.1)(Batch.padded([[5, 6, 3]], [[7, 3]]))[0].backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, "step-0000000001", model, optimizer, {"step": 1})
    taken = sum(file.stat().st_size for file in path.iterdir())
    assert taken <= room_needed(model) <= 1.1 * taken


@pytest.mark.parametrize(
    ("saved", "free", "complaint"),
    [
        (0, 2000, ""),
        (0, 1999, "two checkpoints of 1,000 MiB"),
        (1, 1000, ""),
        (1, 999, "one more checkpoint of 1,000 MiB"),
        (3, 1000, ""),
    ],
)
def test_a_disk_without_room_is_refused(tmp_path, monkeypatch, saved, free, complaint):
    asked = []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: (asked.append(path), usage(0, 0, free * 2**20))[1]
    )
    folder = tmp_path / "run" / "checkpoints"
    for step in range(saved):
        (folder / checkpoint_name(step)).mkdir(parents=True)
    if complaint:
        message = f"{folder} has {free:,} MiB free, too few for {complaint}: make room.*run.dir"
        with pytest.raises(UserError, match=message):
            checkpoint.check_room(folder, 1000 * 2**20)
    else:
        checkpoint.check_room(folder, 1000 * 2**20)
    assert asked == [folder if saved else tmp_path]


def test_room_is_looked_for_where_a_relative_path_will_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.check_room(Path("runs/x/checkpoints"), 1)
    with pytest.raises(UserError, match="runs/x/checkpoints has"):
        checkpoint.check_room(Path("runs/x/checkpoints"), 2**60)


def test_format_version_1_loads(tmp_path):
    """What dtrain wrote when there was no other version; see README.md beside the files."""
    path = shutil.copytree(FORMAT_1, tmp_path / FORMAT_1.name)
    assert checkpoint.newest(tmp_path) == (path, [])
    state = checkpoint.read_state(path)
    progress = Progress.from_json(state["progress"])
    assert (state["step"], progress.step, progress.tokens, progress.cursor.offset) == (3, 3, 768, 6)
    assert (progress.best_score, progress.validated_step) == (0.0, 3)
    assert state["scaler"] == {}
    assert state["data"]["batch plan"].startswith("febbfb8a")
    assert checkpoint.score(path) == 0.0

    torch.manual_seed(0)
    model = Transformer(TINY, 32)
    optimizer = build_optimizer(model, OptimizerSettings())
    weights.load_module(model, path / checkpoint.MODEL)
    weights.load_optimizer(optimizer, model, path / checkpoint.OPTIMIZER)
    moments = {
        f"{name}.{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state[parameter].items()
    }
    assert fingerprint(model.state_dict()) == "f5e1b31dba4cef80"
    assert fingerprint(moments) == "40022c693f52cf4d"
    assert {float(tensor) for name, tensor in moments.items() if name.endswith("step")} == {3.0}


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().numpy().tobytes())
    return digest.hexdigest()[:16]


def test_average_is_the_mean_of_the_weights(tmp_path):
    models = [trained(seed)[0] for seed in range(3)]
    for step, model in enumerate(models):
        save_checkpoint(tmp_path, checkpoint.checkpoint_name(step), model, None, {"step": step})
    name = average(tmp_path, checkpoint.steps_saved(tmp_path))
    found = trained()[0]
    weights.load_module(found, checkpoint.choose(tmp_path, name) / checkpoint.MODEL)
    for key, value in found.state_dict().items():
        mean = torch.stack([model.state_dict()[key] for model in models]).double().mean(0)
        torch.testing.assert_close(value, mean.float(), rtol=0, atol=1e-7)
    assert checkpoint.newest(tmp_path)[0].name == "step-0000000002"


def test_a_newer_format_is_refused(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"format_version": 99}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="upgrade dtrain"):
        checkpoint.read_state(tmp_path)


def test_everything_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (events.append(str(Path(f"/proc/self/fd/{fd}").readlink())), sync(fd)),
    )
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (events.append("rename"), rename(self, to))[1]
    )
    save_checkpoint(tmp_path, "step-0000000001", *trained(), {})
    before = [Path(event).name for event in events[: events.index("rename")]]
    assert set(before) >= {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert before[-2] == "MANIFEST.json"
    assert before[-1].startswith(".tmp-")
    assert events[-1] == str(tmp_path)
