import json
import os
from pathlib import Path

import pytest
import torch

from dtrain import checkpoint
from dtrain.batch import Batch
from dtrain.checkpoint import CheckpointError
from dtrain.config import OptimizerSettings
from dtrain.loss import Objective
from dtrain.model.settings import ModelSettings
from dtrain.model.transformer import Transformer
from dtrain.optimizer import build_optimizer

TINY = ModelSettings(
    hidden_dim=8, num_heads=2, feed_forward_dim=16, num_encoder_layers=1, num_decoder_layers=1
)


def trained(seed=0, steps=2, target_size=None):
    torch.manual_seed(seed)
    model = Transformer(TINY, 12, target_size)
    optimizer = build_optimizer(model, OptimizerSettings())
    for _ in range(steps):
        Objective(model, 0.1)(Batch.padded([[5, 6, 3]], [[7, 3]]))[0].backward()
        optimizer.step()
    return model, optimizer


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_checkpoint_gives_back_model_and_optimizer(tmp_path):
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, "step-0000000002", model, optimizer, {"step": 2})
    assert checkpoint.verify(path) == ""
    assert checkpoint.read_state(path)["step"] == 2
    other, other_optimizer = trained(seed=1, steps=1)
    checkpoint.load_module(other, path / checkpoint.MODEL)
    checkpoint.load_optimizer(other_optimizer, other, path / checkpoint.OPTIMIZER)
    assert same(model.state_dict(), other.state_dict())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert same(optimizer.state[mine], other_optimizer.state[theirs])


def test_going_on_after_loading_is_going_on(tmp_path):
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, "step-0000000002", model, optimizer, {})
    other, other_optimizer = trained(seed=1, steps=0)
    checkpoint.load_module(other, path / checkpoint.MODEL)
    checkpoint.load_optimizer(other_optimizer, other, path / checkpoint.OPTIMIZER)
    for each, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        each.eval().zero_grad()
        Objective(each, 0.1)(Batch.padded([[5, 6, 3]], [[7, 3]]))[0].backward()
        its_optimizer.step()
    assert same(model.state_dict(), other.state_dict())


def test_only_safetensors_and_json_and_plain_names(tmp_path):
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, "step-0000000001", model, optimizer, {})
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


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_any_damage_is_found_and_an_older_one_is_used(tmp_path, file, damage):
    model, optimizer = trained()
    good = checkpoint.save(tmp_path, "step-0000000001", model, optimizer, {})
    bad = checkpoint.save(tmp_path, "step-0000000002", model, optimizer, {})
    content = bytearray((bad / file).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    (bad / file).write_bytes(content[:-1] if damage == "truncate" else content)
    if damage == "delete":
        (bad / file).unlink()
    assert file in checkpoint.verify(bad)
    found, complaints = checkpoint.newest(tmp_path)
    assert found == good
    assert len(complaints) == 1
    assert "step-0000000002" in complaints[0]
    assert (tmp_path / "step-0000000002.corrupt").is_dir()
    assert checkpoint.newest(tmp_path) == (good, [])


def test_half_a_checkpoint_does_not_exist(tmp_path):
    (tmp_path / ".tmp-step-0000000009-1").mkdir()
    assert checkpoint.newest(tmp_path) == (None, [])
    (tmp_path / "step-0000000009").mkdir()
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged"):
        checkpoint.newest(tmp_path)


def test_a_passing_read_error_condemns_no_checkpoint(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, "step-0000000001", trained()[0], None, {})

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
        checkpoint.save(tmp_path, checkpoint.checkpoint_name(step), model, None, {})
    assert checkpoint.newest(tmp_path)[0].name == "step-100000000000"


def test_prune_keeps_the_last_and_the_best(tmp_path):
    model, _ = trained()
    for step, score in enumerate([1.0, 9.0, None, 3.0, 2.0, None], start=1):
        name = checkpoint.checkpoint_name(step)
        path = checkpoint.save(tmp_path, name, model, None, {"progress": {}})
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


def test_average_is_the_mean_of_the_weights(tmp_path):
    models = [trained(seed)[0] for seed in range(3)]
    for step, model in enumerate(models):
        checkpoint.save(tmp_path, checkpoint.checkpoint_name(step), model, None, {"step": step})
    name = checkpoint.average(tmp_path, checkpoint.steps_saved(tmp_path))
    found = trained()[0]
    checkpoint.load_module(found, checkpoint.choose(tmp_path, name) / checkpoint.MODEL)
    for key, value in found.state_dict().items():
        mean = torch.stack([model.state_dict()[key] for model in models]).double().mean(0)
        torch.testing.assert_close(value, mean.float(), rtol=0, atol=1e-7)
    assert checkpoint.newest(tmp_path)[0].name == "step-0000000002"


@pytest.mark.parametrize("part", ["encoder", "decoder", "model"])
@pytest.mark.parametrize("target_size", [None, 15])
def test_parts_are_saved_and_loaded_by_themselves(tmp_path, part, target_size):
    (model, _), (other, _) = trained(0, 2, target_size), trained(1, 1, target_size)
    checkpoint.save_part(model, part, tmp_path / "part.safetensors")
    checkpoint.load_part(other, part, tmp_path / "part.safetensors")
    batch = Batch.padded([[5, 6, 3]], [[7, 3]])
    model.eval(), other.eval()
    memory = [m.encode(batch.source, batch.source_layout) for m in (model, other)]
    logits = [
        m.logits(m.decode(batch.target_in, batch.target_layout, memory[0], batch.source_layout))
        for m in (model, other)
    ]
    assert torch.equal(*memory) == (part in ("encoder", "model"))
    assert torch.equal(*logits) == (part in ("decoder", "model"))


def test_a_part_of_another_size_is_refused(tmp_path):
    checkpoint.save_part(trained()[0], "decoder", tmp_path / "part.safetensors")
    larger = Transformer(TINY.model_copy(update={"hidden_dim": 16}), 12)
    with pytest.raises(CheckpointError, match=r"part.safetensors does not fit the model's decoder"):
        checkpoint.load_part(larger, "decoder", tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match="does not hold this model's encoder"):
        checkpoint.load_part(trained()[0], "encoder", tmp_path / "part.safetensors")


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
    checkpoint.save(tmp_path, "step-0000000001", *trained(), {})
    before = [Path(event).name for event in events[: events.index("rename")]]
    assert set(before) >= {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert before[-2] == "MANIFEST.json"
    assert before[-1].startswith(".tmp-")
    assert events[-1] == str(tmp_path)
