import ast
import inspect
import os
import signal
import textwrap
import threading
import time

import pytest

from dtrain.preemption import STOP_SIGNALS, StopSignal


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
