import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data.packing import pack

lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=300)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(40, 200), st.integers(40, 200))
def test_each_sentence_once_and_no_side_over_its_slots(pairs, source_slots, target_slots):
    source, target = np.array(pairs).T
    micro_batches = pack(source, target, source_slots, target_slots)
    assert sorted(np.concatenate(micro_batches)) == list(range(len(pairs)))
    for ids in micro_batches:
        assert len(ids)
        assert source[ids].sum() <= source_slots
        assert target[ids].sum() <= target_slots


@pytest.mark.parametrize("slots", [2048, 4096, 16384])
def test_slots_are_nearly_all_filled_on_both_sides(slots):
    """Lengths as in real text: the short sentences have another ratio than the long ones."""
    random = np.random.default_rng(1)
    target = np.clip(random.gamma(5, 4, 30_000), 3, 100).astype(np.int64)
    source = np.clip(target * 0.9 + 2 + random.normal(0, 2.5, len(target)), 3, 100).astype(np.int64)
    source_slots = int(-(-slots * source.sum() / target.sum() // 8) * 8)
    micro_batches = pack(source, target, source_slots, slots)[:-1]
    assert np.mean([source[ids].sum() / source_slots for ids in micro_batches]) > 0.99
    assert np.mean([target[ids].sum() / slots for ids in micro_batches]) > 0.99


def test_sentences_of_like_length_go_together():
    random = np.random.default_rng(2)
    target = random.integers(3, 60, 5000)
    micro_batches = pack(target, target, 1024, 1024)
    cells = sum(len(ids) * target[ids].max() for ids in micro_batches)
    shuffled = random.permutation(5000)
    random_cells = sum(len(ids) * target[ids].max() for ids in np.array_split(shuffled, 150))
    assert cells < 0.75 * random_cells
