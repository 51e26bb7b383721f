"""What a user sees of a mistake."""

import pytest

from dtrain.errors import UserError, shown_to_user


def test_a_mistake_is_one_message_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as exit_, shown_to_user():
        raise UserError("data/train.en is empty")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "dtrain: data/train.en is empty\n"


def test_other_ranks_leave_silently(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit_, shown_to_user():
        raise UserError("data/train.en is empty")
    assert exit_.value.code == 2
    assert not capsys.readouterr().err


def test_a_failure_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), shown_to_user():
        raise ZeroDivisionError
