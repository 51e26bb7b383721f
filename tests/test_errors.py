"""What a user sees of a mistake."""

import pytest

from dtrain.errors import GiveUpError, UserError, exit_code, shown_to_user


def test_a_mistake_is_one_message_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as exit_, shown_to_user():
        raise UserError("data/train.en is empty")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "dtrain: data/train.en is empty\n"


def test_other_ranks_let_rank_0_speak_first(capsys, monkeypatch):
    """Its launcher ends them meanwhile, unless rank 0 knows of no mistake."""
    said_after = []

    def sleep(seconds):
        said_after.append((seconds, capsys.readouterr().err))

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as exit_, shown_to_user():
        raise UserError("local rank 3 has no GPU")
    assert exit_.value.code == 2
    assert said_after == [(10.0, "")]
    assert capsys.readouterr().err == "dtrain: local rank 3 has no GPU\n"


def test_a_failure_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), shown_to_user():
        raise ZeroDivisionError


def test_a_training_that_gives_up_is_one_message_too(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as exit_, shown_to_user():
        raise GiveUpError("ten steps in a row")
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "dtrain: ten steps in a row\n"


@pytest.mark.parametrize(
    ("error", "code"), [(UserError(), 2), (GiveUpError(), 1), (OSError(), 1), (SystemExit(), 1)]
)
def test_only_a_users_mistake_has_exit_code_2(error, code):
    assert exit_code(error) == code
