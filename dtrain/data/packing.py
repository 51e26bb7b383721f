"""Fill micro-batches of fixed size with whole sentences, both sides at once."""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

RESERVED_SENTENCES = 8  # room, in average sentences, left for closing the last gap exactly


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
    source_left, target_left = int(source.sum()), int(target.sum())
    remaining = np.arange(len(order))
    micro_batches = []
    while source_left > source_slots or target_left > target_slots:
        taken = _balanced_ends(source, target, remaining, source_slots, target_slots)
        pool.take(taken)
        gap = source_slots - int(source[taken].sum()), target_slots - int(target[taken].sum())
        taken = np.concatenate([taken, pool.fill(*gap)])
        source_left -= int(source[taken].sum())
        target_left -= int(target[taken].sum())
        remaining = remaining[pool.free[remaining]]
        micro_batches.append(order[taken])
    if len(remaining):
        micro_batches.append(order[remaining])
    return micro_batches


def _balanced_ends(
    source: Ids, target: Ids, remaining: Ids, source_slots: int, target_slots: int
) -> Ids:
    """Take from the long end of `remaining`, and from the short end to balance, most of a batch.

    Sentences are sorted by length; `remaining` are their places in that order.
    """
    count = min(len(remaining), target_slots)
    long, short = remaining[:count], remaining[::-1][:count]
    long_source, long_target = _running_sum(source[long]), _running_sum(target[long])
    short_source, short_target = _running_sum(source[short]), _running_sum(target[short])
    ratio = source_slots / target_slots
    budget = target_slots - RESERVED_SENTENCES * long_target[-1] / count

    from_long = np.arange(max(2, int(np.searchsorted(long_target, budget, "right"))))
    from_short = np.searchsorted(short_target, budget - long_target[from_long], "right") - 1
    from_short = np.clip(from_short, 0, len(remaining) - from_long)
    used_source = long_source[from_long] + short_source[from_short]
    used_target = long_target[from_long] + short_target[from_short]
    imbalance = np.abs(used_source - used_target * ratio)
    fits = (used_source <= source_slots) & (used_target <= target_slots)
    imbalance[~fits | (from_long + from_short == 0)] = np.inf
    if not np.isfinite(imbalance).any():  # long sentences in few slots
        return remaining[:1]
    # Of all balanced splits the one with most from the long end mixes lengths least.
    best = np.flatnonzero(imbalance <= max(2.0, imbalance.min()))[-1]
    return np.concatenate([long[: from_long[best]], short[: from_short[best]]])


def _running_sum(lengths: Ids) -> Ids:
    sums = np.zeros(len(lengths) + 1, np.int64)
    lengths.cumsum(out=sums[1:])
    return sums


class _Pool:
    """The sentences still free, grouped by their pair of lengths for quick search."""

    def __init__(self, source: Ids, target: Ids, source_slots: int, target_slots: int) -> None:
        pairs, self.group = np.unique(source * (target_slots + 1) + target, return_inverse=True)
        lengths = np.divmod(pairs, target_slots + 1)
        self.source, self.target = (side.astype(np.float64) for side in lengths)
        self.count = np.bincount(self.group, minlength=len(pairs))
        self.by_group = np.argsort(self.group, kind="stable")
        self.next = np.cumsum(self.count) - self.count
        self.not_empty = np.arange(len(pairs))
        self.free = np.ones(len(source), np.bool_)
        self.ratio = source_slots / target_slots

    def take(self, ids: Ids) -> None:
        self.free[ids] = False
        np.subtract.at(self.count, self.group[ids], 1)

    def fill(self, source_gap: int, target_gap: int) -> Ids:
        """Take sentences one by one that leave the gap smallest and best balanced."""
        self.not_empty = self.not_empty[self.count[self.not_empty] > 0]
        source, target = self.source[self.not_empty], self.target[self.not_empty]
        taken = list[int]()
        while len(source):
            source_left, target_left = source_gap - source, target_gap - target
            left = np.minimum(source_left, target_left)
            # A rest of under six slots on either side is one that hardly a sentence can fill.
            score = np.abs(source_left - target_left * self.ratio) + np.where(left < 6, left, 0)
            score += 0.05 * (source_left + target_left)
            score[left < 0] = np.inf
            best = int(score.argmin())
            if left[best] < 0:  # nothing fits
                break
            source_gap -= int(source[best])
            target_gap -= int(target[best])
            group = int(self.not_empty[best])
            taken.append(self._take_one(group))
            if not self.count[group]:
                source[best] = source_gap + 1  # fits nowhere any more
        return np.array(taken, np.int64)

    def _take_one(self, group: int) -> int:
        while not self.free[self.by_group[self.next[group]]]:
            self.next[group] += 1
        sentence = int(self.by_group[self.next[group]])
        self.free[sentence] = False
        self.count[group] -= 1
        return sentence
