"""docs/promises.md and the tests agree."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "promises.md"
EXPECTED = [f"{chapter}{n}" for chapter, last in zip("ABCD", (10, 9, 6, 9), strict=True)
            for n in range(1, last + 1)]  # fmt: skip
ROW = re.compile(r"^\| ([A-E]\d+) \| (.+) \| (.+) \|$", re.MULTILINE)
ROWS = {name: re.findall(r"`(\S+\.py)::(\w+)`", tests) for name, _, tests in ROW.findall(
    PAGE.read_text(encoding="utf-8"))}  # fmt: skip


def names_of_tests(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith("test_")}


def test_every_promise_is_on_the_page():
    assert list(ROWS) == EXPECTED


@pytest.mark.parametrize("promise", EXPECTED)
def test_its_tests_are_there(promise):
    assert ROWS[promise], "a promise without a test"
    missing = [each for each in ROWS[promise] if each[1] not in names_of_tests(each[0])]
    assert not missing


def test_what_is_tested_by_killing_is_promised():
    cited = {test for tests in ROWS.values() for _, test in tests}
    assert names_of_tests("test_kill.py") <= cited
    assert names_of_tests("test_slurm.py") - cited <= {"test_srun_starts_the_ranks_by_itself"}
