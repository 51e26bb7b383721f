"""One training at a time in a run directory, whoever died before and whoever comes at once."""

import json
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dtrain import lock as lock_module
from dtrain.errors import UserError
from dtrain.lock import FILE, Holder, RunLock, read_holder, silence_of_holder
from dtrain.preemption import StopSignal

ELSEWHERE = replace(
    Holder.myself({}), token="other", host="n7", place="another machine", process=1, job="55"
)


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock_module, "POLL_SECONDS", 0.01)


def leave(folder: Path, holder: Holder, age: float = 0.0) -> None:
    """Leave a lock behind, as a training that was killed does."""
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(json.dumps(asdict(holder)), encoding="utf-8")
    os.utime(folder / FILE, (time.time() - age,) * 2)


def refusal(folder: Path, **arguments) -> str:
    """Try to take a lock that is held; nothing of the attempt may stay."""
    before = sorted(folder.iterdir()), (folder / FILE).read_bytes()
    with pytest.raises(UserError) as caught, RunLock(folder, **arguments):
        pass
    assert (sorted(folder.iterdir()), (folder / FILE).read_bytes()) == before
    return str(caught.value)


def test_it_is_there_while_it_is_held(tmp_path):
    environ = {"SLURM_JOB_ID": "55", "SLURM_RESTART_COUNT": "2"}
    assert read_holder(tmp_path) is None
    assert silence_of_holder(tmp_path) is None
    with RunLock(tmp_path / "run", environ=environ) as lock:
        holder = read_holder(tmp_path / "run")
        assert holder == lock.myself
        assert (holder.process, holder.job, holder.restart) == (os.getpid(), "55", 2)
        assert f"process {os.getpid()} on {os.uname().nodename}, SLURM job 55" in holder.describe()
        assert not holder.is_gone
        assert (lock.notice, lock.last_beat, lock.lost) == ("", None, False)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE]
        assert 0 <= silence_of_holder(tmp_path / "run") < 10
    assert list((tmp_path / "run").iterdir()) == []
    with RunLock(tmp_path / "run") as lock:
        assert lock.notice == ""


def test_it_beats_while_the_main_thread_is_busy(tmp_path):
    with RunLock(tmp_path):
        first = (tmp_path / FILE).stat().st_mtime_ns
        deadline = time.monotonic() + 5
        while (tmp_path / FILE).stat().st_mtime_ns == first:
            assert time.monotonic() < deadline


def test_a_second_training_is_refused_with_the_first_ones_name_and_age(tmp_path):
    with RunLock(tmp_path, environ={"SLURM_JOB_ID": "55"}) as first:
        message = refusal(tmp_path)
        assert f"{tmp_path} is being trained by {first.myself.describe()}, last seen" in message
        assert "alive 0 s ago" in message
        assert "--run.name=NAME" in message
        assert first.beat()


def test_it_is_given_back_after_a_failure_too(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ dead holders


def holder_that_ends_at_once(folder: Path, reap: bool) -> int:
    """Let another process take the lock and die with it; it stays a zombie unless reaped."""
    child = os.fork()
    if not child:
        try:
            RunLock(folder).__enter__()
        finally:
            os._exit(9)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    if reap:
        os.waitpid(child, 0)
    return child


@pytest.mark.parametrize("reap", [True, False], ids=["gone", "zombie"])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, reap):
    child = holder_that_ends_at_once(tmp_path, reap)
    beat = (tmp_path / FILE).stat().st_mtime
    with RunLock(tmp_path) as lock:
        assert f"{tmp_path} is taken over from process {child} on" in lock.notice
        assert "its process is gone" in lock.notice
        assert lock.last_beat == beat
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
        assert lock.beat()
    if not reap:
        os.waitpid(child, 0)


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path):
    leave(tmp_path, replace(Holder.myself({}), started=5))
    with RunLock(tmp_path) as lock:
        assert "its process is gone" in lock.notice


@pytest.mark.parametrize("place", ["another machine", None])
def test_a_process_that_cannot_be_seen_from_here_is_not_gone(place):
    assert not replace(ELSEWHERE, place=place, process=2**22 + 5).is_gone


@pytest.mark.parametrize(
    ("environ", "is_taken"),
    [
        ({"SLURM_JOB_ID": "55", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "55"}, False),  # a second step of the same job
        ({"SLURM_JOB_ID": "56", "SLURM_RESTART_COUNT": "1"}, False),
        ({}, False),
    ],
)
def test_a_requeued_job_takes_its_own_lock_over_at_once(tmp_path, environ, is_taken):
    leave(tmp_path, ELSEWHERE)
    if is_taken:
        with RunLock(tmp_path, environ=environ) as lock:
            assert "from process 1 on n7, SLURM job 55: SLURM has started its job" in lock.notice
    else:
        with beating(tmp_path):
            refusal(tmp_path, environ=environ)


@contextmanager
def beating(folder: Path):
    """Touch a lock every few milliseconds, as a holder on another machine would."""
    ended = threading.Event()

    def beat():
        while not ended.wait(0.02):
            os.utime(folder / FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    ended.set()
    thread.join()


def test_after_a_minute_without_a_beat_a_holder_is_dead(tmp_path):
    leave(tmp_path, ELSEWHERE, age=61)
    with RunLock(tmp_path) as lock:
        assert "no sign of life for 61 s" in lock.notice
        assert abs(lock.last_beat - (time.time() - 61)) < 5


def test_a_holder_of_which_nothing_is_known_is_watched(tmp_path, monkeypatch):
    """It beats: it lives. It does not: after a minute it is dead."""
    leave(tmp_path, ELSEWHERE)
    with beating(tmp_path):
        assert "process 1 on n7, SLURM job 55, last seen alive 0 s ago" in refusal(tmp_path)
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.5)
    os.utime(tmp_path / FILE)
    begun = time.monotonic()
    with RunLock(tmp_path) as lock:
        assert "no sign of life" in lock.notice
    assert 0.4 < time.monotonic() - begun < 10


def test_clocks_need_not_agree(tmp_path, monkeypatch):
    """Only times that the file server set are compared."""
    leave(tmp_path, ELSEWHERE)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with beating(tmp_path):
        assert "last seen alive 0 s ago" in refusal(tmp_path)


def test_a_stop_signal_ends_the_watch(tmp_path):
    leave(tmp_path, ELSEWHERE)
    stop = StopSignal()
    threading.Timer(0.1, setattr, (stop, "received", 15)).start()
    assert "stopped by SIGTERM while waiting to see whether process 1 on n7" in refusal(
        tmp_path, stop=stop
    )


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": "n7"}'])
def test_a_damaged_lock_is_in_nobodys_way_for_long(tmp_path, text):
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    os.utime(tmp_path / FILE, (time.time() - 61,) * 2)
    with RunLock(tmp_path) as lock:
        assert "an unknown host" in lock.notice


def test_a_directory_that_cannot_be_written_is_the_users_business(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="cannot lock the run directory"),
        RunLock(tmp_path / "file" / "run"),
    ):
        pass


# ------------------------------------------------------------------ several at once


def test_who_was_taken_over_notices_and_keeps_its_hands_off(tmp_path):
    with RunLock(tmp_path) as lock:
        (tmp_path / FILE).rename(tmp_path / "moved")  # as if it had slept for a minute
        leave(tmp_path, ELSEWHERE)
        deadline = time.monotonic() + 5
        while not lock.lost:
            assert time.monotonic() < deadline
        assert not lock.beat()
        beat = (tmp_path / FILE).stat().st_mtime_ns
        time.sleep(0.15)
        assert (tmp_path / FILE).stat().st_mtime_ns == beat
    assert read_holder(tmp_path) == ELSEWHERE


def test_a_lock_that_vanished_is_lost(tmp_path):
    with RunLock(tmp_path) as lock:
        (tmp_path / FILE).unlink()
        assert not lock.beat()
        assert lock.lost


def test_a_file_server_that_is_away_for_a_while_loses_nothing(tmp_path, monkeypatch):
    with RunLock(tmp_path) as lock:

        def away(_):
            raise TimeoutError

        monkeypatch.setattr(lock_module, "read_holder", away)
        assert lock.beat()
        monkeypatch.undo()
        assert lock.beat()


@pytest.mark.parametrize("is_stale", [True, False])
def test_of_many_at_once_one_wins(tmp_path, is_stale):
    for turn in range(5):
        folder = tmp_path / str(turn)
        folder.mkdir()
        if is_stale:
            leave(folder, ELSEWHERE, age=100)
        start, everybody_tried = threading.Barrier(6), threading.Barrier(6)
        won, refused = [], []

        def train(folder=folder, start=start, tried=everybody_tried, won=won, refused=refused):
            start.wait(20)
            try:
                with RunLock(folder) as lock:
                    won.append(lock)
                    tried.wait(20)
                    assert lock.beat()
            except UserError as error:
                refused.append(error)
                tried.wait(20)

        threads = [threading.Thread(target=train) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(refused)) == (1, 5)
        assert bool(won[0].notice) == is_stale
        assert list(folder.iterdir()) == []


def test_who_judged_too_long_does_not_take_a_new_lock_over(tmp_path, monkeypatch):
    """The slow one found the holder dead; by the time it acts a quick one has succeeded it."""
    leave(tmp_path, ELSEWHERE, age=100)
    watch = RunLock._watch
    quick = RunLock(tmp_path)

    def slow_watch(self, spot, holder):
        verdict = watch(self, spot, holder)
        if self is not quick and holder == ELSEWHERE and not quick._thread.is_alive():
            quick.__enter__()
        return verdict

    monkeypatch.setattr(RunLock, "_watch", slow_watch)
    with pytest.raises(UserError, match="is being trained by"), RunLock(tmp_path):
        pass
    assert quick.beat()
    quick.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_who_died_while_taking_over_is_succeeded_as_well(tmp_path):
    leave(tmp_path, ELSEWHERE, age=100)
    dead = replace(Holder.myself({}), token="dead", started=5)
    claim = tmp_path / f".{FILE}.after-{ELSEWHERE.token}"
    claim.write_text(json.dumps(asdict(dead)), encoding="utf-8")
    with RunLock(tmp_path) as lock:
        assert read_holder(tmp_path) == lock.myself
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
