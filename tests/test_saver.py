import errno
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from tiny_model import files_of, same, save_checkpoint, train_step, trained

from dtrain import checkpoint, fault, weights
from dtrain.checkpoint import CheckpointError, checkpoint_name
from dtrain.preemption import StopSignal
from dtrain.saver import MOST_FAILURES, Saver, Staging, contents

BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in a thread"])
STAGES = [point for point in fault.POINTS if "save" in point or "prune" in point]
POINTS = pytest.mark.parametrize("point", STAGES)


class Watched:
    """Makes savers, and keeps what they say and save."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said, self.saved = folder, [], []

    def __call__(self, **changes: object) -> Saver:
        settings = {"asynchronous": True, "keep_last": 5, "keep_best": 1, "protect": None}
        hooks = {"say": self.said.append, "on_saved": self.saved.append}
        return Saver(self.folder, **settings | hooks | changes)

    def steps(self) -> list[int]:
        """Steps of what is there, in order."""
        return sorted(map(checkpoint.step_of, checkpoint.steps_saved(self.folder)))

    def hidden(self) -> list[str]:
        """What a save has left behind that is no checkpoint."""
        known = {checkpoint_name(step) for step in self.steps()}
        return [path.name for path in self.folder.glob("*") if path.name not in known]


@pytest.fixture
def saver(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "checkpoints")


class SlowDisk:
    """Holds every fsync up until it is released."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        self._fsync = os.fsync

    def __call__(self, descriptor: int) -> None:
        self.reached.set()
        assert self.released.wait(60)
        self._fsync(descriptor)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk()
    monkeypatch.setattr(os, "fsync", disk)
    yield disk
    disk.released.set()


def in_child(task: Callable[[], None], variable: str = "") -> int | None:
    """Run something in a process of its own, with `DTRAIN_FAULT` set; gives its exit code."""

    def be_child() -> None:
        os.environ[fault.VARIABLE] = variable
        torch.set_num_threads(1)
        task()

    child = multiprocessing.get_context("fork").Process(target=be_child)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        pytest.fail("the process hangs")
    return child.exitcode


# ------------------------------------------------------------------ what is saved


@BOTH
def test_a_save_holds_the_values_of_its_step(saver, asynchronous):
    model, optimizer = trained()
    with saver(asynchronous=asynchronous) as its:
        its.save(2, model, optimizer, {"step": 2})
        expected = save_checkpoint(
            saver.folder.parent, checkpoint_name(2), model, optimizer, {"step": 2}
        )
    assert files_of(saver.folder / checkpoint_name(2)) == files_of(expected)
    assert saver.saved == [2]
    assert saver.said == []
    other, other_optimizer = trained(seed=1, steps=0)
    weights.load_module(other, saver.folder / checkpoint_name(2) / checkpoint.MODEL)
    path = saver.folder / checkpoint_name(2) / checkpoint.OPTIMIZER
    weights.load_optimizer(other_optimizer, other, path)
    assert same(model.state_dict(), other.state_dict())


def test_later_steps_do_not_leak_into_a_slow_save(saver, slow_disk, tmp_path):
    """Five more steps while nothing has reached the disk: bytes as of a save at once."""
    model, optimizer = trained()
    state = {"step": 2, "progress": {"cursor": {"offset": 1}}}
    with saver() as its:
        its.save(2, model, optimizer, state)
        assert slow_disk.reached.wait(60)
        for _ in range(5):
            train_step(model, optimizer)
        state["progress"]["cursor"]["offset"] = 99
        assert saver.saved == []
        slow_disk.released.set()
    twin, its_optimizer = trained()
    assert not same(model.state_dict(), twin.state_dict())
    state = {"step": 2, "progress": {"cursor": {"offset": 1}}}
    with Watched(tmp_path / "reference")(asynchronous=False) as reference:
        reference.save(2, twin, its_optimizer, state)
    expected = files_of(tmp_path / "reference" / checkpoint_name(2))
    assert files_of(saver.folder / checkpoint_name(2)) == expected


def test_staging_is_allocated_once_and_shares_no_memory():
    model, optimizer = trained()
    staging = Staging()

    def places(tensors: dict[str, dict[str, torch.Tensor]]) -> list[int]:
        return [tensor.data_ptr() for named in tensors.values() for tensor in named.values()]

    first = staging.copy(contents(model, optimizer))
    begun = places(first)
    assert not set(begun) & set(places(contents(model, optimizer)))
    train_step(model, optimizer)
    live = contents(model, optimizer)
    assert not same(first[checkpoint.MODEL], live[checkpoint.MODEL])
    second = staging.copy(live)
    assert places(second) == begun
    for file, named in live.items():
        assert same(second[file], named)
    assert staging.copy({checkpoint.MODEL: {}}) == {checkpoint.MODEL: {}}


@pytest.mark.gpu
def test_staging_of_a_gpu_is_pinned():
    tensors = {"file": {str(i): torch.randn(1000, 1000, device="cuda") for i in range(20)}}
    expected = {name: tensor.cpu() for name, tensor in tensors["file"].items()}
    copies = Staging().copy(tensors)["file"]
    for tensor in tensors["file"].values():
        tensor.zero_()
    assert all(copy.is_pinned() for copy in copies.values())
    assert same(copies, expected)


# ------------------------------------------------------------------ one at a time, in order


def test_one_save_is_in_flight_and_a_second_waits(saver, slow_disk):
    model, optimizer = trained()
    with saver() as its:
        its.save(1, model, optimizer, {"step": 1})
        assert slow_disk.reached.wait(60)
        returned = threading.Event()

        def save_again() -> None:
            its.save(2, model, optimizer, {"step": 2})
            returned.set()

        second = threading.Thread(target=save_again)
        second.start()
        assert not returned.wait(0.3)
        assert saver.steps() == []
        slow_disk.released.set()
        second.join(60)
        assert returned.is_set()
        assert saver.saved[0] == 1
    assert saver.steps() == saver.saved == [1, 2]


def test_a_judgement_waits_for_its_checkpoint_and_nobody_for_it(saver, slow_disk):
    model, optimizer = trained()
    with saver() as its:
        its.save(1, model, optimizer, {"step": 1})
        its.note_judgement(1, 31.5, {"step": 1, "best_score": 31.5})
        assert not slow_disk.released.is_set()
        assert saver.steps() == []
        slow_disk.released.set()
        its.wait()
        path = saver.folder / checkpoint_name(1)
        assert checkpoint.score(path) == 31.5
        assert checkpoint.read_state(path)["progress"] == {"step": 1, "best_score": 31.5}
        assert checkpoint.verify(path) == ""
    assert saver.said == []


@BOTH
def test_old_ones_are_pruned_and_the_one_gone_on_from_stays(saver, asynchronous):
    model, optimizer = trained()
    saver.folder.mkdir()
    origin = save_checkpoint(saver.folder, checkpoint_name(5), model, optimizer, {"step": 5})
    (saver.folder / ".tmp-step-0000000006-99").mkdir()
    seen = []
    changes = {"keep_last": 1, "protect": origin, "on_saved": lambda _: seen.append(saver.steps())}
    with saver(asynchronous=asynchronous, **changes) as its:
        for step in (6, 7, 8, 9):
            its.save(step, model, optimizer, {"step": step})
            if step == 7:
                its.note_judgement(7, 1.0, {})
    assert seen == [[5, 6], [7], [7, 8], [7, 9]]
    assert saver.hidden() == []


@pytest.mark.slow
@BOTH
def test_async_saves_stall_under_a_tenth(saver, monkeypatch, asynchronous):
    """On a disk that takes 0.1 s for each file."""
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(0.1))
    model, optimizer = trained()
    with saver(asynchronous=asynchronous) as its:
        stalls = []
        for step in (1, 2):
            its.wait()
            begun = time.perf_counter()
            its.save(step, model, optimizer, {"step": step})
            stalls.append(time.perf_counter() - begun)
    at_once = 6 * 0.1  # four files and two directories
    assert min(stalls) < 0.1 * at_once if asynchronous else min(stalls) >= at_once


# ------------------------------------------------------------------ kills


@BOTH
@POINTS
@pytest.mark.slow
def test_a_kill_at_any_point_leaves_a_good_checkpoint(saver, point, asynchronous):
    """Killed while step 4 is saved; what there is verifies, and the next start goes on from it."""

    def until_killed() -> None:
        with saver(asynchronous=asynchronous, keep_last=2, keep_best=0) as its:
            for step in (1, 2, 3, 4):
                model, optimizer = trained(seed=step)
                its.save(step, model, optimizer, {"step": step})

    code = in_child(until_killed, f"step=4,point={point},signal=KILL")
    assert code == -signal.SIGKILL
    committed = STAGES.index(point) >= STAGES.index("in_save:renamed")
    found = checkpoint.steps_saved(saver.folder)
    assert [checkpoint.verify(path) for path in found] == [""] * len(found)
    newest, complaints = checkpoint.newest(saver.folder)
    assert checkpoint.step_of(newest) == (4 if committed else 3)
    assert complaints == []
    assert saver.hidden() == []
    model, optimizer = trained(seed=5)
    with saver(keep_last=2, protect=newest) as its:
        its.save(5, model, optimizer, {"step": 5})
    assert saver.steps() == [4 if committed else 3, 5]


@POINTS
@pytest.mark.slow
def test_a_kill_while_the_only_checkpoint_is_replaced_keeps_one(saver, point):
    model, optimizer = trained(seed=1)
    save_checkpoint(saver.folder, checkpoint_name(4), model, optimizer, {"step": 4})

    def replace() -> None:
        with saver(asynchronous=False, keep_last=1) as its:
            its.save(4, *trained(seed=2), {"step": 4})

    code = in_child(replace, f"point={point},signal=KILL")
    assert code == (0 if point == "in_prune" else -signal.SIGKILL)  # nothing to prune
    newest, _ = checkpoint.newest(saver.folder)
    assert checkpoint.verify(newest) == ""
    assert checkpoint.step_of(newest) == 4


@pytest.mark.slow
def test_a_kill_between_the_two_renames_keeps_the_old_one(saver):
    model, optimizer = trained(seed=1)
    save_checkpoint(saver.folder, checkpoint_name(4), model, optimizer, {"step": 4})
    before = files_of(saver.folder / checkpoint_name(4))

    def replace() -> None:
        rename = Path.rename

        def killed_after(self: Path, to: Path) -> Path:
            moved = rename(self, to)
            if to.name.endswith(".replaced"):
                os.kill(os.getpid(), signal.SIGKILL)
            return moved

        Path.rename = killed_after
        with saver(asynchronous=False) as its:
            its.save(4, *trained(seed=2), {"step": 4})

    assert in_child(replace) == -signal.SIGKILL
    newest, _ = checkpoint.newest(saver.folder)
    assert files_of(newest) == before


@pytest.mark.slow
def test_a_stop_signal_while_saving_loses_nothing(saver):
    """SIGTERM while step 2 is on its slow way to the disk: it gets there, and so does the last."""
    begun = multiprocessing.get_context("fork").Event()

    def train_until_stopped() -> None:
        fsync = os.fsync

        def slow(descriptor: int) -> None:
            begun.set()
            time.sleep(0.05)
            fsync(descriptor)

        os.fsync = slow
        model, optimizer = trained()
        with StopSignal() as stop, saver(keep_best=0) as its:
            its.save(2, model, optimizer, {"step": 2})
            assert begun.wait(60)
            os.kill(os.getpid(), signal.SIGTERM)
            assert saver.steps() == []
            step = 2
            while stop.received is None or step < 4:
                train_step(model, optimizer)
                step += 1
            its.save(step, model, optimizer, {"step": step})
            its.wait()
            assert saver.saved == [2, step]

    assert in_child(train_until_stopped) == 0
    two, last = reversed(checkpoint.steps_saved(saver.folder))
    assert [checkpoint.verify(path) for path in (two, last)] == ["", ""]
    for path in (two, last):
        model, _ = trained(steps=checkpoint.step_of(path))
        other, _ = trained(seed=1)
        weights.load_module(other, path / checkpoint.MODEL)
        assert same(other.state_dict(), model.state_dict())


# ------------------------------------------------------------------ disks that fail


@BOTH
@POINTS
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EROFS"])
def test_a_failed_save_is_said_and_training_goes_on(saver, monkeypatch, asynchronous, point, error):
    model, optimizer = trained()
    with saver(asynchronous=asynchronous, keep_last=1, keep_best=0) as its:
        its.save(1, model, optimizer, {"step": 1})
        its.wait()
        monkeypatch.setenv(fault.VARIABLE, f"step=2,point={point},error={error}")
        its.save(2, model, optimizer, {"step": 2})
        if point.startswith("in_save"):
            with pytest.raises(CheckpointError, match=os.strerror(getattr(errno, error))):
                its.wait()
        else:
            its.wait()  # it was saved; only old ones could not be deleted
        (message,) = saver.said
        assert message.startswith("warning: ")
        assert str(saver.folder) in message
        assert os.strerror(getattr(errno, error)) in message
        assert all(checkpoint.verify(path) == "" for path in checkpoint.steps_saved(saver.folder))
        its.save(3, model, optimizer, {"step": 3})
        its.wait()
    assert saver.steps() == [3]
    assert saver.hidden() == []
    assert len(saver.said) == 1


@BOTH
def test_the_third_failure_in_a_row_ends_the_run(saver, monkeypatch, asynchronous):
    model, optimizer = trained()
    message = (
        rf"3 saves in a row failed in {saver.folder}: .*No space left on device; make room on that "
        rf"disk.*, then start the run again: it goes on from {checkpoint_name(3)}"
    )
    its = saver(asynchronous=asynchronous)
    for step, fails in enumerate([True, True, False, True, True, True], start=1):
        setting = "point=in_save:model_written,error=ENOSPC" if fails else ""
        monkeypatch.setenv(fault.VARIABLE, setting)
        its.save(step, model, optimizer, {"step": step})
        if step < 6:
            its.note_judgement(step, 1.0, {})  # of what was not saved: there is nothing to note
        its._finish()
    monkeypatch.setenv(fault.VARIABLE, "")
    with pytest.raises(CheckpointError, match=message):
        its.save(7, model, optimizer, {"step": 7})
    with pytest.raises(CheckpointError, match=message):
        its.note_judgement(3, 1.0, {})
    with pytest.raises(CheckpointError, match="the last save failed"), its:
        pass
    assert saver.steps() == saver.saved == [3]
    assert saver.hidden() == []
    assert ["(1 of 3 in a row" in text for text in saver.said].count(True) == 2
    assert len(saver.said) == 5


@BOTH
def test_a_full_disk(saver, asynchronous):
    """A real one, of half a MiB: it holds five checkpoints, not seven."""
    saver.folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(saver.folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        model, optimizer = trained()
        its = saver(asynchronous=asynchronous, keep_last=99)

        def fill() -> None:
            for step in count(1):
                its.save(step, model, optimizer, {"step": step})

        with pytest.raises(CheckpointError, match=r"No space left on device; make room"):
            fill()
        step = len(saver.saved) + MOST_FAILURES + 1
        assert len(saver.said) == MOST_FAILURES
        assert all("No space left" in text for text in saver.said)
        assert saver.saved == list(range(1, step - MOST_FAILURES))
        assert saver.steps() == saver.saved
        assert len(saver.saved) > 3
        assert all(checkpoint.verify(path) == "" for path in checkpoint.steps_saved(saver.folder))
        assert saver.hidden() == []
        with saver(asynchronous=asynchronous, keep_last=2) as new:
            (saver.folder / checkpoint_name(1)).rename(saver.folder / ".tmp-step-0000000001")
            checkpoint.prune(saver.folder, 2, 0)  # somebody made room
            new.save(step, model, optimizer, {"step": step})
        assert saver.saved[-1] == step
    finally:
        subprocess.run(["umount", str(saver.folder)], check=True)


def test_a_directory_that_cannot_be_written_is_said(saver):
    saver.folder.parent.mkdir(exist_ok=True)
    saver.folder.write_text("a file where the directory should be", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"the last save failed.*begins anew"), saver() as its:
        its.save(1, *trained(), {"step": 1})


@BOTH
def test_a_hook_that_fails_on_the_disk_costs_no_checkpoint(saver, asynchronous):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with saver(asynchronous=asynchronous, on_saved=full) as its:
        its.save(1, *trained(), {"step": 1})
        its.wait()
    assert saver.steps() == [1]
    (message,) = saver.said
    assert "was saved, but after that: " in message


def test_a_score_that_cannot_be_noted_is_said(saver, monkeypatch):
    with saver() as its:
        its.save(1, *trained(), {"step": 1})

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        its.wait()
        monkeypatch.setattr(checkpoint, "write_json", full)
        its.note_judgement(1, 1.0, {})
        its.wait()
    (message,) = saver.said
    assert "the score of" in message
    assert checkpoint.verify(saver.folder / checkpoint_name(1)) == ""


# ------------------------------------------------------------------ bugs, and leaving


@BOTH
@pytest.mark.parametrize("then", ["save", "note_judgement", "wait", "leave"])
def test_a_bug_where_the_writing_happens_comes_out(saver, asynchronous, then):
    def buggy(_: int) -> None:
        raise KeyError("a bug")

    def train() -> None:
        with saver(asynchronous=asynchronous, on_saved=buggy) as its:
            its.save(1, *trained(), {"step": 1})
            while not its._queue[0].done():
                time.sleep(0.001)
            if then == "save":
                its.save(2, *trained(), {"step": 2})
            elif then == "note_judgement":
                its.note_judgement(1, 1.0, {})
            elif then == "wait":
                its.wait()

    with pytest.raises(KeyError, match="a bug"):
        train()
    assert saver.steps() == [1]


def fail_in_training(its: Saver) -> None:
    """Save, and go wrong for another reason."""
    with its:
        its.save(1, *trained(), {"step": 1})
        raise ZeroDivisionError


def test_leaving_waits_for_the_disk_also_with_an_error(saver, slow_disk):
    threading.Timer(0.2, slow_disk.released.set).start()
    with pytest.raises(ZeroDivisionError) as caught:
        fail_in_training(saver())
    assert saver.saved == saver.steps() == [1]
    assert not hasattr(caught.value, "__notes__")


def test_an_error_of_training_is_not_hidden_by_one_of_saving(saver, monkeypatch):
    monkeypatch.setenv(fault.VARIABLE, "point=in_save:begun,error=EIO")
    with pytest.raises(ZeroDivisionError) as caught:
        fail_in_training(saver())
    assert "Input/output error" in caught.value.__notes__[0]


@pytest.mark.slow
def test_a_process_that_ends_without_leaving_still_writes(saver):
    def forgetful() -> None:
        saver().save(1, *trained(), {"step": 1})
        raise SystemExit(3)

    assert in_child(forgetful) == 3
    assert checkpoint.verify(saver.folder / checkpoint_name(1)) == ""


# ------------------------------------------------------------------ benchmarks/save_stall.py


@pytest.mark.slow
def test_the_benchmark_compares_both_kinds_of_save(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    from benchmarks import save_stall

    rounds = save_stall.measure(*save_stall.make_state(is_tiny=True), tmp_path, rounds=3)
    assert all(0 < one.stall < one.stall + one.written for one in rounds)
    results, markdown = save_stall.report(rounds, 2**20, {"cores": 2})
    assert results["median ratio"] > 0
    assert len(results["rounds"]) == 3
    assert "| ratio | 2 |" in markdown
    (manifest,) = (tmp_path / "async").glob("step-*/MANIFEST.json")
    manifest.write_text("{}", encoding="utf-8")
    with pytest.raises(RuntimeError, match="differs"):
        save_stall.check_equal(tmp_path, manifest.parent.name)
