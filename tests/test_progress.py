import json

from dtrain.data.plan import Cursor, PlannedStep
from dtrain.progress import Progress


def planned(tokens: int, end: Cursor) -> PlannedStep:
    return PlannedStep(
        epoch=0, micro_batches=(), num_source_tokens=7, num_target_tokens=tokens, end=end
    )


def test_a_step_counts_its_target_tokens_and_moves_the_cursor():
    progress = Progress()
    progress.advance(planned(100, Cursor(0, 2, 5)))
    progress.note_outcome(updated=True, seconds=0.5)
    progress.advance(planned(30, Cursor(1, 0, 3)))
    progress.note_outcome(updated=True, seconds=0.25)
    assert (progress.step, progress.tokens, progress.cursor) == (2, 130, Cursor(1, 0, 3))
    assert progress.train_seconds == 0.75


def test_skipped_updates_are_counted_and_so_is_how_many_came_in_a_row():
    progress, history = Progress(), []
    for updated in (True, False, False, True, False):
        progress.note_outcome(updated=updated, seconds=0.0)
        history.append((progress.skipped, progress.skipped_in_a_row))
    assert history == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]


def test_validations_since_the_best_are_counted():
    progress = Progress()
    history = []
    for score in (-3.0, -2.0, -2.0, -5.0, -1.0):
        progress.note_score(score)
        history.append((progress.best_score, progress.validations_since_best))
    assert history == [(-3.0, 0), (-2.0, 0), (-2.0, 1), (-2.0, 2), (-1.0, 0)]


def test_it_survives_json_bit_for_bit():
    progress = Progress(7, 2**40, Cursor(3, 1, 4), 0.1 + 0.2, 2)
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    assert Progress.from_json(json.loads(json.dumps(Progress().to_json()))) == Progress()
