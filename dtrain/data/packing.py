"""Fill micro-batches of fixed size with whole sentences, both sides at once."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

RESERVED_SENTENCES = 2  # room, in average sentences, left for closing the last gap exactly
CORRECTED = 0.4  # of its length: by so much a sentence that `fill` chooses evens out the two sides
VERSION = 2  # of the way to pack: another one makes another plan of the same data


def pack(source: Ids, target: Ids, source_slots: int, target_slots: int) -> list[Ids]:
    """Pack sentence pairs into micro-batches whose slots are nearly all filled, on both sides.

    Sentences of like length go together. Short sentences have, as a rule, another ratio of source
    to target than long ones, so each micro-batch takes a run from the long end of the remaining
    sentences and as many from the short end as bring the two sides into balance; the last gap is
    closed with the sentences that fit it best. Only the last micro-batch may stay part-empty by
    need. Deterministic; which of several equal sentences is taken follows the given order.

    Args:
        source: source tokens of each pair [n]; none above `source_slots`.
        target: target tokens of each pair [n]; none above `target_slots`.
        source_slots: slots of a micro-batch's source side.
        target_slots: slots of its target side.

    Returns:
        Indices of the pairs in each micro-batch; every pair stands in exactly one.
    """
    order = np.argsort(-(source * target_slots + target * source_slots), kind="stable")
    source, target = source[order], target[order]
    pool = _Pool(source, target, source_slots, target_slots)
    micro_batches = []
    while pool.source_left > source_slots or pool.target_left > target_slots:
        ends = _balanced_ends(pool, source_slots, target_slots)
        pool.take(ends)
        gap = source_slots - int(source[ends].sum()), target_slots - int(target[ends].sum())
        micro_batches.append(order[np.concatenate([ends, pool.fill(*gap)])])
    if pool.num_free:
        micro_batches.append(order[np.flatnonzero(pool.free)])
    return micro_batches


def _balanced_ends(pool: "_Pool", source_slots: int, target_slots: int) -> Ids:
    """Choose from the long end, and from the short end to balance, most of a micro-batch."""
    mean_target = pool.target_left / pool.num_free
    count = 1 + int(2 * target_slots / mean_target)  # as many as fill it, and as many again
    long, short = pool.longest(count), pool.shortest(count)
    long_source, long_target = _running_sum(pool.source[long]), _running_sum(pool.target[long])
    short_source, short_target = _running_sum(pool.source[short]), _running_sum(pool.target[short])
    source_budget = source_slots - RESERVED_SENTENCES * pool.source_left / pool.num_free
    target_budget = target_slots - RESERVED_SENTENCES * mean_target

    most = min(_num_within(long_source, source_budget), _num_within(long_target, target_budget))
    if most < 1:  # long sentences in few slots
        return long[:1]
    from_long = np.arange(most + 1)
    from_short = np.minimum(
        _num_within(short_source, source_budget - long_source[from_long]),
        _num_within(short_target, target_budget - long_target[from_long]),
    )
    from_short = np.minimum(from_short, pool.num_free - from_long)
    used_source = long_source[from_long] + short_source[from_short]
    used_target = long_target[from_long] + short_target[from_short]
    imbalance = np.abs(used_source - used_target * source_slots / target_slots)
    imbalance[from_long + from_short == 0] = np.inf
    # Of all balanced splits the one with most from the long end mixes lengths least.
    best = np.flatnonzero(imbalance <= max(2.0, imbalance.min()))[-1]
    # What the ends cannot balance `fill` can, if some long ones are left out for it.
    left_out = int(imbalance[best] / (CORRECTED * mean_target))
    num_long, num_short = max(0, from_long[best] - left_out), from_short[best]
    return np.concatenate([long[: num_long or int(num_short == 0)], short[:num_short]])


def _num_within(sums: Ids, budget: Any) -> Any:
    """Count how many sentences a budget holds, or each of some, given their running sums."""
    return np.searchsorted(sums, budget, "right") - 1


def _running_sum(lengths: Ids) -> Ids:
    sums = np.zeros(len(lengths) + 1, np.int64)
    lengths.cumsum(out=sums[1:])
    return sums


class _Pool:
    """The sentences still free, in order from long to short, and grouped by their two lengths."""

    def __init__(self, source: Ids, target: Ids, source_slots: int, target_slots: int) -> None:
        self.source, self.target = source, target
        self.free = np.ones(len(source), np.bool_)
        self.num_free = len(source)
        self.source_left, self.target_left = int(source.sum()), int(target.sum())
        self.first_free = self.last_free = 0  # places counted from either end
        pairs, self.group = np.unique(source * (target_slots + 1) + target, return_inverse=True)
        lengths = np.divmod(pairs, target_slots + 1)
        self.group_source, self.group_target = (side.astype(np.float64) for side in lengths)
        self.count = np.bincount(self.group, minlength=len(pairs))
        self.by_group = np.argsort(self.group, kind="stable")
        self.next = np.cumsum(self.count) - self.count
        self.ratio = source_slots / target_slots

    def longest(self, count: int) -> Ids:
        """Give the places of the longest that are free, the longest first."""
        self.first_free, places = _first_places(self.free, self.first_free, count)
        return places

    def shortest(self, count: int) -> Ids:
        """Give the places of the shortest that are free, the shortest first."""
        self.last_free, places = _first_places(self.free[::-1], self.last_free, count)
        return len(self.free) - 1 - places

    def take(self, places: Ids) -> None:
        """Let some be free no more."""
        self.free[places] = False
        self.num_free -= len(places)
        self.source_left -= int(self.source[places].sum())
        self.target_left -= int(self.target[places].sum())
        np.subtract.at(self.count, self.group[places], 1)

    def fill(self, source_gap: int, target_gap: int) -> Ids:
        """Take sentences one by one that leave the gap smallest and best balanced."""
        taken = list[int]()
        groups = np.flatnonzero(self.count)
        source, target = self.group_source[groups], self.group_target[groups]
        while True:
            fits = (source <= source_gap) & (target <= target_gap)
            groups, source, target = groups[fits], source[fits], target[fits]
            if not len(groups):
                break
            source_left, target_left = source_gap - source, target_gap - target
            left = np.minimum(source_left, target_left)
            # A rest of under six slots on either side is one that hardly a sentence can fill.
            score = np.abs(source_left - target_left * self.ratio) + np.where(left < 6, left, 0)
            score += 0.05 * (source_left + target_left)
            best = int(score.argmin())
            source_gap, target_gap = int(source_left[best]), int(target_left[best])
            taken.append(self._take_one(int(groups[best])))
            if not self.count[groups[best]]:
                source[best] = source_gap + 1  # fits no more
        return np.array(taken, np.int64)

    def _take_one(self, group: int) -> int:
        while not self.free[self.by_group[self.next[group]]]:
            self.next[group] += 1
        place = int(self.by_group[self.next[group]])
        self.free[place] = False  # without `take`, which is slow for one
        self.num_free -= 1
        self.source_left -= int(self.source[place])
        self.target_left -= int(self.target[place])
        self.count[group] -= 1
        return place


def _first_places(free: NDArray[np.bool_], start: int, count: int) -> tuple[int, Ids]:
    """Find the first free place from `start` on, and the first `count` of them."""
    start += int(free[start:].argmax())
    places = np.flatnonzero(free[start : start + 2 * count])
    if len(places) < count:
        places = np.flatnonzero(free[start:])
    return start, start + places[:count]
