import ast
import inspect
import os
import signal
import textwrap
import threading
import time

import pytest
import torch
import yaml
from worlds import run_world

from dtrain.distributed import connect
from dtrain.preemption import RESERVE_SECONDS, STOP_SIGNALS, Deadline, StopSignal, seconds_of


def test_nothing_was_received_at_first():
    with StopSignal() as stop:
        assert stop.received is None
        assert stop.reason == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_each_stop_signal_sets_the_flag_and_its_name(number):
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
        assert stop.received == number
        assert stop.reason == number.name


def test_a_burst_of_signals_is_one_wish():
    with StopSignal() as stop:
        for i in range(50):
            os.kill(os.getpid(), STOP_SIGNALS[i % 3])
        assert stop.received == STOP_SIGNALS[49 % 3]


def test_a_signal_interrupts_no_work():
    with StopSignal() as stop:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        begun = time.monotonic()
        time.sleep(0.3)
        assert time.monotonic() - begun >= 0.3
        assert stop.reason == "SIGTERM"


def test_handlers_are_restored_after_an_error_too():
    def handlers():
        return [signal.getsignal(number) for number in STOP_SIGNALS]

    def failing():
        with StopSignal():
            assert not set(handlers()) & set(before)
            raise ZeroDivisionError

    before = handlers()
    with pytest.raises(ZeroDivisionError):
        failing()
    assert handlers() == before


def test_a_forked_child_does_nothing():
    """Such as one of a library: what it is told is not what this process is told."""
    with StopSignal() as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0 if stop.received is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert stop.received is None


def test_the_handler_only_assigns():
    """It may run between any two instructions: a call could meet itself half done."""
    source = textwrap.dedent(inspect.getsource(StopSignal._handle))
    (function,) = ast.parse(source).body
    assert all(isinstance(node, ast.Assign) for node in function.body)
    calls = [ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)]
    assert set(calls) <= {"os.getpid"}


def work_under_fire():
    """Wait for others in every way there is, while signals rain on this process."""
    done = threading.Event()

    def fire():
        for i in range(50):
            os.kill(os.getpid(), STOP_SIGNALS[i % 3])
            time.sleep(0.005)
        done.set()

    with StopSignal() as stop, connect("cpu", 30) as world:
        threading.Thread(target=fire).start()
        total, i, still_firing = 0.0, 0, True
        while still_firing:
            world.meet()
            total += world.sum(torch.ones(1)).item()
            i += 1
            (still_firing,) = world.agree(i, not done.is_set())
        world.from_main(lambda: time.sleep(0.1))
        return total == world.size * i and stop.received in STOP_SIGNALS


@pytest.mark.slow
def test_a_burst_disturbs_no_collective():
    assert run_world(2, work_under_fire) == [True, True]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (90, 90),
        (0.5, 0.5),
        ("90", 90),
        ("00:00:20", 20),
        ("12:30:05", 12 * 3600 + 30 * 60 + 5),
        ("100:00:00", 360_000),
        ("1-00:00:00", 86_400),
        ("2-03:04:05", 2 * 86_400 + 3 * 3600 + 4 * 60 + 5),
    ],
)
def test_a_time_limit_is_read(text, seconds):
    assert seconds_of(text) == seconds
    assert seconds_of(yaml.safe_load(str(text))) == seconds  # YAML takes 12:30:05 for a number


@pytest.mark.parametrize(
    "text",
    ["", "0", 0, -5, "00:00:00", "1:2:3", "12:60:00", "12:00:60", "1-12", "12h", "nan", "inf", "٣"],
)
def test_what_is_no_time_limit_is_refused_with_what_would_be(text):
    with pytest.raises(ValueError, match=r'is no time limit; it is seconds, like 3600, .*"12:00:0'):
        seconds_of(text)


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_run_leaves_while_a_step_and_its_saves_still_fit(clock):
    """Twenty minutes; steps of 7 s, one of 9 s; saves of 30 s."""
    deadline = Deadline("00:20:00", clock, {})
    num_steps = 0
    while not deadline.is_near():
        seconds = 9.0 if num_steps == 50 else 7.0
        clock.now += seconds
        deadline.note_step(seconds)
        num_steps += 1
        if num_steps % 20 == 0:
            clock.now += 30.0
            deadline.note_save(30.0)
    left = 1_001_200.0 - clock.now
    assert left >= 30.0 + 30.0 + RESERVE_SECONDS  # the save fits, and the one in flight before it
    assert left < 9.0 + 9.0 + 30.0 + 30.0 + RESERVE_SECONDS  # and no step was given away


def test_nothing_is_near_without_a_limit(clock):
    deadline = Deadline(None, clock, {})
    clock.now += 1e9
    assert not deadline.is_near()


def test_twenty_seconds_leave_ten_to_work_in(clock):
    deadline = Deadline(20, clock, {})
    clock.now += 9.9
    assert not deadline.is_near()
    clock.now += 0.1
    assert deadline.is_near()
    assert deadline.reason == "run.time_limit"


def test_the_end_of_the_job_counts_if_no_limit_was_given(clock):
    job = {"SLURM_JOB_END_TIME": "1000100"}
    deadline, own = Deadline(None, clock, job), Deadline(200, clock, job)
    clock.now = 1_000_100.0 - RESERVE_SECONDS - 1
    assert not deadline.is_near()
    clock.now += 1
    assert deadline.is_near()
    assert deadline.reason == "the job's time limit"
    assert not own.is_near()


@pytest.mark.parametrize("end", ["", "0", "999999", "Unknown", "NONE"])
def test_an_end_that_cannot_be_is_left_alone(clock, end):
    """Such as that of a job whose limit was raised while it ran."""
    deadline = Deadline(None, clock, {"SLURM_JOB_END_TIME": end})
    clock.now += 1e9
    assert not deadline.is_near()


def test_only_a_rank_that_was_not_told_itself_asks_torchrun_to_go_on():
    elastic, stop = {"TORCHELASTIC_MAX_RESTARTS": "3"}, StopSignal()
    assert stop.exit_code(elastic) == 1
    assert stop.exit_code({"TORCHELASTIC_MAX_RESTARTS": "0"}) == stop.exit_code({}) == 0
    stop.received = signal.SIGTERM
    assert stop.exit_code(elastic) == 0
