import ctypes
import os
import platform
import warnings
from pathlib import Path

import pytest
from worlds import run_until_exit

from dtrain.errors import UserError
from dtrain.rank_log import RankLog


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "logs"


def text(folder, rank):
    return (folder / f"rank-{rank}.log").read_text(encoding="utf-8")


def be_logged(folder, function):
    with RankLog(folder, int(os.environ["RANK"]), attempt=1):
        function()


def divide_on_rank_1():
    assert 1 / (1 - int(os.environ["RANK"]))


def read_address_0():
    ctypes.string_at(0)


@pytest.mark.slow
def test_an_exception_leaves_its_traceback_in_the_log_of_its_rank(folder):
    codes = [code for code, _ in run_until_exit(2, be_logged, folder, divide_on_rank_1)]
    assert codes == [0, 1]
    assert "divide_on_rank_1" in text(folder, 1)
    assert "ZeroDivisionError: division by zero" in text(folder, 1)
    assert "Error" not in text(folder, 0)


def test_each_attempt_is_headed_with_place_and_process_and_none_is_lost(folder):
    for attempt in (1, 2):
        with RankLog(folder, 3, attempt) as log:
            log.note(f"said in attempt {attempt}")
    lines = [line.split(maxsplit=2)[2] for line in text(folder, 3).splitlines()]
    place = f"on {platform.node()}, process {os.getpid()}"
    assert lines == [
        f"attempt 1 {place}",
        "said in attempt 1",
        f"attempt 2 {place}",
        "said in attempt 2",
    ]


def test_a_warning_is_logged_and_shown(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    with RankLog(folder, 0, 1), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("a rare case", stacklevel=1)
    assert "UserWarning: a rare case" in text(folder, 0)
    assert shown == ["a rare case"]


@pytest.mark.slow
def test_a_crash_in_c_leaves_python_stacks(folder):
    ((code, _),) = run_until_exit(1, be_logged, folder, read_address_0)
    assert code == -11
    assert "Segmentation fault" in text(folder, 0)
    assert "in read_address_0" in text(folder, 0)


def test_a_mistake_of_the_user_has_no_traceback(folder):
    with pytest.raises(UserError), RankLog(folder, 0, 1):
        raise UserError("no such file: corpus.en")
    assert "UserError: no such file: corpus.en" in text(folder, 0)
    assert "Traceback" not in text(folder, 0)


def test_warnings_go_their_old_way_afterwards(folder):
    before = warnings.showwarning
    with RankLog(folder, 0, 1):
        assert warnings.showwarning != before
    assert warnings.showwarning is before


def test_a_full_disk_ends_nothing():
    with RankLog(FullDisk(), 0, 1) as log:
        log.note("nobody reads this")


class FullDisk:
    """A folder whose every file is /dev/full."""

    def __truediv__(self, _name):
        return Path("/dev/full")
