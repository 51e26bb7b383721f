"""Progress: how far a run is; with model, optimizer and scaler all that resuming needs."""

from dataclasses import asdict, dataclass, field
from typing import Any

from dtrain.data.plan import Cursor, PlannedStep


@dataclass
class Progress:
    """Counts of a run over all its attempts.

    Attributes:
        step: steps done.
        tokens: target tokens seen.
        cursor: where the next step begins.
        best_score: the best validation so far, higher is better.
        validations_since_best: validations without a better one.
        validated_step: the step judged last.
        skipped: steps whose gradient was not finite.
        skipped_in_a_row: how many of them the last steps were.
        train_seconds: time spent in the steps done; not in those that were lost and done again.
    """

    step: int = 0
    tokens: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    best_score: float | None = None
    validations_since_best: int = 0
    validated_step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    train_seconds: float = 0.0

    def advance(self, step: PlannedStep) -> None:
        """Count a step that was run."""
        self.step += 1
        self.tokens += step.num_target_tokens
        self.cursor = step.end

    def note_outcome(self, *, updated: bool, seconds: float) -> None:
        """Count how a step went: with or without an update of the weights."""
        self.skipped += not updated
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1
        self.train_seconds += seconds

    def note_score(self, score: float) -> bool:
        """Count a validation; says whether it is the best so far."""
        self.validated_step = self.step
        self.validations_since_best += 1
        is_best = self.best_score is None or score > self.best_score
        if is_best:
            self.best_score, self.validations_since_best = score, 0
        return is_best

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "Progress":
        """Read back what `to_json` gave."""
        return cls(**(state | {"cursor": Cursor(**state["cursor"])}))
