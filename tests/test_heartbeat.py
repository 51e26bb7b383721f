import ctypes
import json
import os
import platform
import re
import shutil
import signal
import threading
import time

import pytest
import torch
from worlds import run_until_exit

from dtrain import heartbeat
from dtrain.distributed import connect
from dtrain.heartbeat import Heartbeat
from dtrain.peers import read_sign
from dtrain.rank_log import RankLog

TIMEOUT = 4.0
QUICK_TIMEOUT = 2.0
HERE = platform.node()


def train(folder, one_step, timeout=QUICK_TIMEOUT, on_stuck=None):
    """Be a rank that runs `one_step(beating, world)`, as train.py would have it."""
    with connect("cpu", 60) as world, RankLog(folder / "logs", world.rank, attempt=1) as log:
        (folder / f"process-{world.rank}").write_text(str(os.getpid()))
        world.sum(torch.zeros(1))
        on_stuck = on_stuck or (folder / f"stuck-{world.rank}").write_text
        place = folder / "heartbeats", world.rank, world.size
        with Heartbeat(*place, timeout, attempt=1, log=log, on_stuck=on_stuck) as beating:
            beating.at(1, "backward")
            one_step(beating, world)
    return 0


@pytest.fixture
def quick(monkeypatch):
    """Beats follow so fast that a test need not wait for seconds."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.25)
    monkeypatch.setattr(heartbeat, "SILENCE_SECONDS", 1.5)


def process_of(folder, rank):
    return int((folder / f"process-{rank}").read_text())


def name_of(folder, rank):
    return f"rank {rank} on {HERE} (process {process_of(folder, rank)})"


def log_of(folder, rank):
    return (folder / "logs" / f"rank-{rank}.log").read_text(encoding="utf-8")


def hit(folder, number):
    (folder / "hit-at").write_text(str(time.time()))
    os.kill(os.getpid(), number)


def stop_on_rank_1(folder):
    def one_step(beating, world):
        beating.at(7, "backward")
        time.sleep(1.5)  # so that the file says so
        if world.rank == 1:
            hit(folder, signal.SIGSTOP)
        world.sum(torch.zeros(1))

    return one_step


def sleep_on_rank_1(beating, world):
    if world.rank == 1:
        time.sleep(60)
    beating.at(7, "reduction")
    world.sum(torch.zeros(1))


def block_python_on_rank_1(_beating, world):
    if world.rank == 1:
        ctypes.PyDLL(None).sleep(4)  # in C, without letting other threads of Python run
    world.sum(torch.zeros(1))


def work_long_on_rank_1(beating, world):
    if world.rank == 1:
        for _ in range(20):  # twice the time-out
            beating.at(1, "validation")
            time.sleep(0.2)
    world.sum(torch.zeros(1))


def hang_all_in_one_place(_beating, _world):
    time.sleep(60)


def fail_on_rank_1(_beating, world):
    if world.rank == 1:
        raise ArithmeticError("numbers ran out")
    time.sleep(60)


def name_the_lost(folder, what_rank_1_does):
    def one_step(beating, world):
        time.sleep(0.5)
        if world.rank == 1:
            return what_rank_1_does()
        try:
            world.sum(torch.zeros(1))
        except RuntimeError:
            (folder / f"lost-{world.rank}").write_text(beating.lost_peer())
            raise

    return one_step


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def leave_in_peace():
    pass


def fail():
    raise ArithmeticError("numbers ran out")


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_others_end_in_time_with_their_stacks(tmp_path):
    results = run_until_exit(3, train, tmp_path, stop_on_rank_1(tmp_path), TIMEOUT)
    seconds = time.time() - float((tmp_path / "hit-at").read_text())
    assert TIMEOUT < seconds < TIMEOUT + 5
    assert [code for code, _ in results] == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        blame = re.escape(name_of(tmp_path, 1)) + (
            r" gave no sign of life for \d+ s: it is stopped; it was last at step 7, backward"
        )
        wait = r"(nothing has moved for \d+ s|waited \d+ s for others)"  # who is first tells others
        message = rf"rank {rank}: {wait}; {blame}"
        for text in (results[rank][1], log_of(tmp_path, rank)):
            assert re.search(message, text)
            assert "Current thread" in text
            assert 'test_heartbeat.py", line' in text
            assert "in one_step" in text  # the main thread's stack, in a collective
        assert re.search(blame, (tmp_path / f"stuck-{rank}").read_text())
        sign = read_sign(tmp_path / "heartbeats", rank)
        assert sign.ended
        assert re.search(blame, sign.why)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_long_wait_for_a_rank_that_moves_is_no_hang(tmp_path):
    results = run_until_exit(3, train, tmp_path, work_long_on_rank_1)
    assert results == [(0, "")] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_rank_that_hangs_in_python_is_named_as_the_one_behind(tmp_path):
    results = run_until_exit(3, train, tmp_path, sleep_on_rank_1)
    assert [code for code, _ in results] == [1, 1, 1]
    blame = f"{name_of(tmp_path, 1)} hangs at step 1, backward; others wait for it at step 7, reduc"
    assert all(blame in text for _, text in results)
    assert "in sleep_on_rank_1" in log_of(tmp_path, 1)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_rank_whose_interpreter_is_blocked_is_named_by_the_others(tmp_path):
    results = run_until_exit(2, train, tmp_path, block_python_on_rank_1)
    assert results[0][0] == 1
    blame = rf"{re.escape(name_of(tmp_path, 1))} gave no sign of life for \d+ s, though its process"
    assert re.search(blame, results[0][1])


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_if_all_wait_in_one_place_nobody_is_accused(tmp_path):
    results = run_until_exit(2, train, tmp_path, hang_all_in_one_place)
    assert [code for code, _ in results] == [1, 1]
    assert all("all 2 ranks wait at step 1, backward" in text for _, text in results)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_one_process_alone_is_watched_too(tmp_path):
    ((code, text),) = run_until_exit(1, train, tmp_path, hang_all_in_one_place)
    assert code == 1
    assert f"{name_of(tmp_path, 0)} hangs at step 1, backward" in text


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("on_stuck", [lambda _: time.sleep(60), lambda _: 1 / 0])
def test_what_happens_on_the_way_out_holds_nobody_up(tmp_path, monkeypatch, on_stuck):
    monkeypatch.setattr(heartbeat, "ENDING_SECONDS", 0.5)
    ((code, text),) = run_until_exit(
        1, train, tmp_path, hang_all_in_one_place, 1.0, on_stuck, timeout=10
    )
    assert code == 1
    assert "hangs at step 1, backward" in text


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_who_cannot_write_accuses_nobody(tmp_path):
    """Else a full or read-only disk would turn a long validation into a hang."""

    def lose_the_folder(_beating, _world):
        shutil.rmtree(tmp_path / "heartbeats")
        time.sleep(2.5)

    assert run_until_exit(1, train, tmp_path, lose_the_folder, 1.0) == [(0, "")]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_failure_of_one_ends_those_who_wait_long_before_the_time_out(tmp_path):
    results = run_until_exit(3, train, tmp_path, fail_on_rank_1, 600.0, timeout=20)
    assert [code for code, _ in results] == [1, 1, 1]
    reason = f"{name_of(tmp_path, 1)} failed at step 1, backward: ArithmeticError: numbers ran out"
    assert re.search(rf"rank 0: waited \d+ s for others; {re.escape(reason)}", results[0][1])
    assert reason in results[2][1]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("what", "words"),
    [
        (die, "is gone; it was last at step 1, backward"),
        (leave_in_peace, "has ended; it was last at step 1, backward"),
        (fail, "failed at step 1, backward: ArithmeticError: numbers ran out"),
    ],
)
def test_a_lost_rank_is_named_by_those_whose_collective_failed(tmp_path, what, words):
    results = run_until_exit(3, train, tmp_path, name_the_lost(tmp_path, what))
    assert [results[rank][0] for rank in (0, 2)] == [1, 1]
    for rank in (0, 2):
        assert (tmp_path / f"lost-{rank}").read_text() == f"{name_of(tmp_path, 1)} {words}"


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_nobody_is_lost_if_all_are_alive(tmp_path):
    def one_step(beating, world):
        text = beating.lost_peer()
        (tmp_path / f"lost-{world.rank}").write_text(text)

    assert run_until_exit(2, train, tmp_path, one_step) == [(0, "")] * 2
    assert [(tmp_path / f"lost-{rank}").read_text() for rank in (0, 1)] == ["", ""]


@pytest.fixture
def log(tmp_path):
    with RankLog(tmp_path / "logs", 0, attempt=3) as log:
        yield log


@pytest.fixture
def make(tmp_path, log):
    """Makes this process's heartbeat, a rank of two."""

    def heartbeat(size=2, timeout=600.0):
        return Heartbeat(tmp_path / "heartbeats", 0, size, timeout, attempt=3, log=log)

    return heartbeat


@pytest.fixture
def sign(tmp_path):
    return lambda: read_sign(tmp_path / "heartbeats", 0)


def test_the_file_says_who_where_and_since_when(make, sign, tmp_path):
    before = time.time()
    with make():
        first = sign()
        assert (first.rank, first.host, first.process) == (0, HERE, os.getpid())
        assert (first.attempt, first.step, first.phase) == (3, 0, "starting")
        assert before <= first.since <= first.time <= time.time()
    assert json.loads((tmp_path / "heartbeats" / "rank-0.json").read_bytes())["ended"] is True


def test_moves_are_counted_within_a_step(make, sign):
    with make() as beating:
        for _ in range(5):
            beating.at(6, "forward")
        beating.at(7, "forward")
        beating.at(7, "backward")
    assert (sign().step, sign().moves, sign().phase) == (7, 1, "backward")


def test_leaving_is_quick_and_ends_the_thread(make, sign):
    begun = time.monotonic()
    with make():
        assert "heartbeat" in [thread.name for thread in threading.enumerate()]
    assert time.monotonic() - begun < 0.5
    assert "heartbeat" not in [thread.name for thread in threading.enumerate()]
    assert (sign().ended, sign().why) == (True, "")


def test_an_error_is_left_behind_for_the_others(make, sign):
    beating = make()
    beating.at(7, "backward")
    with pytest.raises(ZeroDivisionError), beating:
        raise ZeroDivisionError("by nothing")
    place = f"rank 0 on {HERE} (process {os.getpid()})"
    assert sign().why == f"{place} failed at step 7, backward: ZeroDivisionError: by nothing"


def test_the_file_of_an_earlier_attempt_is_replaced_whatever_its_length(make, sign, tmp_path):
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats" / "rank-0.json").write_text("x" * 10_000)
    with make():
        assert sign().attempt == 3


def test_files_have_one_length_so_that_a_full_disk_can_hold_the_next(make, tmp_path):
    path = tmp_path / "heartbeats" / "rank-0.json"
    with make() as beating:
        before = path.stat().st_size
        beating.at(10**9, "ü" * 1000)
    assert path.stat().st_size == before


def test_who_is_alone_need_not_look_for_others(make):
    with make(size=1) as beating:
        begun = time.monotonic()
        assert beating.lost_peer() == ""
        assert time.monotonic() - begun < 0.5


def test_a_move_costs_microseconds(make):
    beating = make()
    begun = time.perf_counter()
    for i in range(10_000):
        beating.at(i // 10, "backward")
    assert time.perf_counter() - begun < 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_rank_that_was_not_seen_yet_is_named(tmp_path):
    """Its file of an earlier attempt does not count."""

    def end_alone():
        (tmp_path / "heartbeats").mkdir()
        with RankLog(tmp_path / "logs", 1, 1) as log:
            for attempt, rank, timeout in ((1, 1, 600), (2, 0, QUICK_TIMEOUT)):
                folder = tmp_path / "heartbeats"
                with Heartbeat(folder, rank, 2, timeout, attempt=attempt, log=log):
                    time.sleep(0 if attempt == 1 else 60)

    ((code, text),) = run_until_exit(1, end_alone)
    assert code == 1
    assert re.search(r"rank 0: nothing has moved for \d s; rank 1 has not begun\n", text)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_suspended_job_is_not_stuck_when_it_goes_on(tmp_path):
    """SLURM suspends all ranks together; the clock must stand still for them."""

    def be_suspended(_beating, _world):
        if os.fork() == 0:
            time.sleep(3)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        time.sleep(0.6)  # the thread has seen the last move
        begun = time.monotonic()
        os.kill(os.getpid(), signal.SIGSTOP)
        assert time.monotonic() - begun > QUICK_TIMEOUT
        time.sleep(0.6)  # the thread beats again

    pid = os.fork()
    if pid == 0:
        os._exit(train(tmp_path, be_suspended))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
