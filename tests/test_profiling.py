"""A look into some steps: what is written, when, and that it changes nothing."""

import gzip
import json
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from worlds import run_world

from dtrain import profiling, train
from dtrain.checkpoint import steps_saved
from dtrain.config import ProfileSettings
from dtrain.distributed import alone, connect
from dtrain.phases import PHASES, Phases
from dtrain.profiling import Profile, memory_curves

FILES = "model.safetensors", "optimizer.safetensors"


def profile_steps(
    folder: Path, settings: ProfileSettings | None, count: int, first: int = 1
) -> list[str]:
    """Multiply some matrices as steps; gives what was said."""
    said: list[str] = []
    phases = Phases(torch.device("cpu"))
    whole = Profile(settings, folder, alone("cpu"), phases, lambda _: nullcontext(), said.append)
    with whole as profile:
        for number in range(first, first + count):
            phases.wait_for_data()
            phases.at("before_backward")
            torch.ones(8, 16) @ torch.ones(16, 4)
            for point in ("after_backward", "before_optimizer", "after_optimizer"):
                phases.at(point)
            profile.note_step(number)
    return said


def trace(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def names(path: Path) -> list[str]:
    return [event["name"] for event in trace(path) if event.get("ph") == "X"]


def test_the_steps_that_were_asked_for_are_written(tmp_path):
    said = profile_steps(tmp_path / "profile", ProfileSettings(start=3, steps=2), 6, first=11)
    path = tmp_path / "profile" / "rank-0-steps-13-14.json.gz"
    assert {file.name for file in path.parent.iterdir()} == {
        "rank-0-steps-13-14.json.gz",
        "rank-0-steps-13-14.txt",
    }
    spans = names(path)
    assert spans.count("aten::mm") == 2
    assert [spans.count(f"dtrain: {phase}") for phase in PHASES] == [2] * len(PHASES)
    assert "aten::mm" in path.with_name("rank-0-steps-13-14.txt").read_text(encoding="utf-8")
    assert said == [
        f"steps 13 to 14 are in {path}: open it at https://ui.perfetto.dev; "
        f"rank-0-steps-13-14.txt lists the operators"
    ]


def test_a_start_that_ends_too_soon_writes_what_it_has_or_says_that_it_has_nothing(tmp_path):
    profile_steps(tmp_path, ProfileSettings(start=2, steps=9), 3)
    assert names(tmp_path / "rank-0-steps-2-3.json.gz").count("aten::mm") == 2
    for count in (0, 3):
        assert profile_steps(tmp_path / "none", ProfileSettings(start=4, steps=2), count) == [
            "nothing was profiled: this start ended before its step 4, as run.profile.start says"
        ]
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_written_is_said_and_no_more(tmp_path):
    (tmp_path / "profile").write_text("in the way", encoding="utf-8")
    [said] = profile_steps(tmp_path / "profile", ProfileSettings(start=2, steps=1), 3)
    assert said.startswith(f"warning: cannot write {tmp_path}/profile/rank-0-steps-2-2.json.gz: ")


def write_on_rank(folder: Path) -> tuple[float, list[str]]:
    """Profile a step; rank 0 takes a second to write, rank 1 cannot. Gives the seconds it took."""

    def write(*_: object) -> None:
        if world.rank == 1:
            raise OSError("no room")
        time.sleep(1)

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch, connect("cpu", 60) as world:
        patch.setattr(profiling, "_write_trace", write)
        phases = Phases(world.device)
        settings = ProfileSettings(start=2, steps=1)
        parts = world, phases, lambda _: nullcontext(), said.append
        with Profile(settings, folder, *parts) as profile:
            profile.note_step(1)
            world.meet()
            begun = time.monotonic()
            profile.note_step(2)
            return time.monotonic() - begun, said


@pytest.mark.slow
def test_ranks_wait_for_the_one_that_writes_longest(tmp_path):
    """Else the others would give up in their next collective."""
    (first, _), (second, said) = run_world(2, write_on_rank, tmp_path)
    assert first > 0.9
    assert second > 0.9
    assert said[0].endswith("rank-1-steps-2-2.json.gz: no room")


def test_without_the_setting_nothing_happens(tmp_path):
    assert profile_steps(tmp_path / "profile", None, 30) == []
    assert not (tmp_path / "profile").exists()


def test_memory_is_drawn_as_a_curve_for_each_device():
    def event(kind: int, number: int, allocated: int, reserved: int, ts: float) -> dict:
        facts = {"Total Allocated": allocated, "Total Reserved": reserved}
        facts |= {"Device Type": kind, "Device Id": number, "Bytes": 1, "Addr": 2}
        return {"ph": "i", "name": "[memory]", "pid": 5, "tid": 6, "ts": ts, "args": facts}

    events = [event(0, -1, 2**21, 0, 1.5), {"name": "aten::mm"}, event(1, 3, 2**20, 2**22, 2.5)]
    place = {"pid": 5, "tid": 6}
    assert memory_curves(events) == [
        {"ph": "C", "name": "MiB of cpu", **place, "ts": 1.5, "args": {"allocated": 2.0}},
        {
            "ph": "C",
            "name": "MiB of cuda:3",
            **place,
            "ts": 2.5,
            "args": {"allocated": 1.0, "reserved": 4.0},
        },
    ]


@pytest.mark.slow
def test_a_training_that_is_watched_learns_the_same_bits(toy):
    small = {"batch__tokens_per_step": 256, "run__max_steps": 5}
    plain = toy("plain", **small)
    watched = toy("watched", **small, run__profile__start=3, run__profile__steps=1)
    for config in (plain, watched):
        run_world(2, train.run, config)
    tensors = [
        [(steps_saved(config.run_dir / "checkpoints")[0] / name).read_bytes() for name in FILES]
        for config in (plain, watched)
    ]
    assert tensors[0] == tensors[1]
    assert not (plain.run_dir / "profile").exists()
    for rank in range(2):
        path = watched.run_dir / "profile" / f"rank-{rank}-steps-3-3.json.gz"
        spans = names(path)
        assert "aten::addmm" in spans
        assert any("ShortAttention" in name for name in spans)
        assert {f"dtrain: {phase}" for phase in PHASES} <= set(spans)
        assert [e for e in trace(path) if e.get("ph") == "C" and e["args"]["allocated"] > 0]
