import json
import time
from itertools import islice

import pytest
from test_plan import make_plan

from dtrain import cursors as cursors_module
from dtrain.cursors import CURSORS, Cursors, find
from dtrain.data import plan as plan_module
from dtrain.data.plan import Cursor


@pytest.fixture
def path(tmp_path):
    return tmp_path / CURSORS


@pytest.fixture(scope="module")
def begins():
    """Where steps 1, 2, ... of a small plan of many windows begin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "BLOCK_PAIRS", 16)
        patch.setattr(plan_module, "WINDOW_BLOCKS", 8)
        plan = make_plan(500, micro_batches=3)
        assert plan.num_windows > 2
        return [Cursor(), *(step.end for step in islice(plan.steps(Cursor()), 60))]


def refuse(message: str) -> None:
    raise AssertionError(message)


def train(path, begins, first: int, last: int) -> None:
    """Run the steps `first` to `last` as a training would."""
    kept = Cursors(path, first, begins[first - 1], refuse)
    for step in range(first, last + 1):
        kept.note(step + 1, begins[step])


def expected(begins, last: int) -> list[dict[str, int]]:
    """One line for each window that a step begins in, but for the first."""
    lines, window = [], (0, 0)
    for step, cursor in enumerate(begins[: last + 1], start=1):
        if (cursor.epoch, cursor.window) != window:
            window = cursor.epoch, cursor.window
            lines.append({"step": step, **vars(cursor)})
    return lines


def lines_of(path) -> list[dict[str, int]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_for_each_window(path, begins):
    train(path, begins, 1, 60)
    assert lines_of(path) == expected(begins, 60)
    assert len(lines_of(path)) > 6
    assert len(lines_of(path)) < 30


def test_every_stop_and_kill_leaves_the_same_file(path, begins):
    """Stopped after any step, and done again from any step before."""
    straight = path.with_name("straight.jsonl")
    train(straight, begins, 1, 60)
    for stopped_after in range(1, 60, 4):
        for resumed_at in range(1, stopped_after + 2):
            path.unlink(missing_ok=True)
            train(path, begins, 1, stopped_after)
            train(path, begins, resumed_at, 60)
            assert path.read_bytes() == straight.read_bytes()


def test_lines_beyond_the_step_gone_on_from_are_cut_off(path, begins):
    train(path, begins, 1, 60)
    Cursors(path, 20, begins[19], refuse)
    assert lines_of(path) == expected(begins, 19)


@pytest.mark.parametrize("rest", [1, 7, 30])
def test_a_half_written_line_is_written_anew(path, begins, rest):
    train(path, begins, 1, 60)
    whole = path.read_bytes()
    last = lines_of(path)[-1]["step"]
    path.write_bytes(whole[:-rest])
    assert find(path, 60)[0] < last
    train(path, begins, last - 1, 60)
    assert path.read_bytes() == whole


def test_find_gives_the_last_one_not_after_the_step(path, begins):
    train(path, begins, 1, 60)
    for step in range(1, 61):
        found, cursor = find(path, step)
        assert found <= step
        assert cursor == begins[found - 1]
        here = begins[step - 1]
        assert (cursor.epoch, cursor.window) == (here.epoch, here.window)


def test_no_file_means_the_start(path):
    assert find(path, 7) == (1, Cursor())


@pytest.mark.parametrize(
    "damage", [b"\x00\x00\n", b"[]\n", b"7\n", b'{"step": 3}\n', b'{"step": "x"}\n', b"\xff\n"]
)
def test_damaged_lines_are_passed_over_and_their_gap_is_closed(path, begins, damage):
    train(path, begins, 1, 60)
    path.write_bytes(damage + path.read_bytes())
    here = begins[59]
    assert begins[find(path, 60)[0] - 1] == find(path, 60)[1]
    Cursors(path, 60, here, refuse)
    assert find(path, 60) == (60, here)
    assert lines_of(path) == [{"step": 60, **vars(here)}]


def test_a_run_from_before_there_were_cursors_gets_a_line_where_it_goes_on(path, begins):
    train(path, begins, 40, 60)
    assert lines_of(path)[0] == {"step": 40, **vars(begins[39])}
    assert lines_of(path)[1:] == [line for line in expected(begins, 60) if line["step"] > 40]


def test_a_disk_that_refuses_is_said_once_and_ends_nothing(tmp_path, begins):
    said = []
    kept = Cursors(tmp_path / "missing" / CURSORS, 1, Cursor(), said.append)
    for step in range(2, 61):
        kept.note(step, begins[step - 1])
    assert len(said) == 1
    assert "cursors.jsonl" in said[0]
    assert "No such file" in said[0]


def test_a_disk_that_was_full_for_a_while_leaves_whole_lines(path, begins):
    said = []
    kept = Cursors(path, 1, Cursor(), said.append)
    for step in range(2, 61):
        if step == 30:
            path.write_bytes(path.read_bytes() + b'{"step": 2')  # as far as the disk took it
        kept.note(step, begins[step - 1])
    assert lines_of(path) == expected(begins, 59)


def test_a_step_of_the_same_window_costs_nothing(path, monkeypatch):
    kept = Cursors(path, 1, Cursor(), refuse)
    monkeypatch.setattr(cursors_module, "json", None)  # no line can be made
    begun = time.process_time()
    for step in range(10_000):
        kept.note(step, Cursor(offset=step))
    assert time.process_time() - begun < 1  # some 3 ms; opening a file would take ten times that
    assert not path.exists()


def test_a_long_run_is_searched_quickly(path):
    with path.open("w", encoding="utf-8") as file:
        for i in range(1, 30_001):
            place = {"epoch": i // 3, "window": i % 3, "offset": 2}
            file.write(json.dumps({"step": 33 * i, **place}) + "\n")
    begun = time.process_time()
    assert find(path, 900_000) == (33 * 27_272, Cursor(9090, 2, 2))
    assert time.process_time() - begun < 5  # about 0.1 s
