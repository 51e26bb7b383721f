"""What masks of dropout must be like, wherever they come from."""

import itertools
import math

from torch import Tensor


def assert_independent(masks: dict[str, Tensor], p: float) -> None:
    """Look at zeros and scaled ones [rows, columns] of several sites or steps, all of one shape.

    Rate and mean must be right, and no element may tell of a neighbour in its row or column, nor of
    any near its place at another site.
    """
    size = next(iter(masks.values())).numel()
    deviation = math.sqrt(p / (1 - p))
    scores = {}
    for name, mask in masks.items():
        assert mask.unique().numel() == 2, name
        rate, mean = (mask == 0).double().mean().item(), mask.double().mean().item()
        assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / size) + 2**-16, (name, rate)
        assert abs(mean - 1) < 5 * deviation / math.sqrt(size) + 1e-5, (name, mean)
        scores[name] = (mask.double() - 1) / deviation
    for (name, a), (other, b) in itertools.combinations_with_replacement(scores.items(), 2):
        for lag in (0, 1, 2, 3, 4, 5, 7, 8, 16, 32):
            assert lag == 0 or _unrelated(a[lag:], b[: len(b) - lag]), (name, other, "rows", lag)
            if name != other or lag:
                right = a[:, lag:], b[:, : b.shape[1] - lag]
                assert _unrelated(*right), (name, other, "columns", lag)


def _unrelated(a: Tensor, b: Tensor) -> bool:
    return abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())
