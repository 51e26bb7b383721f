import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_twins import packed, random_ids

from dtrain.batch import BOS_ID, EOS_ID, PAD_ID, Batch, Layout, future_mask, pad_rows, padding_mask


@st.composite
def pairs_of_rows(draw):
    """As many source as target sentences, and slack behind each side."""
    sources = draw(st.lists(st.lists(st.integers(4, 99), max_size=6), min_size=1, max_size=6))
    targets = draw(
        st.lists(
            st.lists(st.integers(4, 99), max_size=6),
            min_size=len(sources),
            max_size=len(sources),
        )
    )
    slack = draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    return [[*s, EOS_ID] for s in sources], [[*t, EOS_ID] for t in targets], slack


def packed_with_slack(sources, targets, slack) -> Batch:
    return packed(
        sources, targets, sum(map(len, sources)) + slack[0], sum(map(len, targets)) + slack[1]
    )


@settings(deadline=None)
@given(pairs_of_rows())
def test_packed_holds_every_token_at_its_place_and_nothing_else(rows):
    sources, targets, slack = rows
    batch = packed_with_slack(*rows)
    expected = {"source": [], "target_in": [], "target_out": []}
    positions = {"source": [], "target": []}
    for source, target in zip(sources, targets, strict=True):
        expected["source"] += source
        expected["target_in"] += [BOS_ID, *target[:-1]]
        expected["target_out"] += target
        positions["source"] += range(len(source))
        positions["target"] += range(len(target))
    for name, ids in expected.items():
        behind = slack[name != "source"]
        assert getattr(batch, name).tolist() == ids + [PAD_ID] * behind
    for side, layout, behind in (
        ("source", batch.source_layout, slack[0]),
        ("target", batch.target_layout, slack[1]),
    ):
        assert layout.positions.tolist() == positions[side] + [0] * behind
        num_tokens = len(positions[side])
        assert layout.token_mask.tolist() == [True] * num_tokens + [False] * behind
    assert batch.num_tokens == sum(map(len, targets))


@settings(deadline=None)
@given(pairs_of_rows())
def test_without_a_rectangle_a_pack_says_where_each_sentence_lies(rows):
    sources, targets, slack = rows
    batch = packed(
        *(sources, targets),
        *(sum(map(len, sources)) + slack[0], sum(map(len, targets)) + slack[1]),
        *("packed", 99),
    )
    rectangle = packed_with_slack(*rows)
    for side, sentences, behind in (("source", sources, slack[0]), ("target", targets, slack[1])):
        layout, other = (getattr(b, f"{side}_layout") for b in (batch, rectangle))
        boundaries, sentence_of_slot = layout.boundaries.tolist(), layout.sentence_of_slot.tolist()
        slots = [slot for i in range(len(sentences)) for slot in range(*boundaries[i : i + 2])]
        assert slots == list(range(sum(map(len, sentences))))
        for i, sentence in enumerate(sentences):
            first, end = boundaries[i : i + 2]
            assert end - first == len(sentence) == layout.lengths[i]
            assert sentence_of_slot[first:end] == [i] * len(sentence)
        empty = len(sentences)  # which is what slack belongs to
        assert sentence_of_slot[len(slots) :] == [empty] * behind
        assert set(boundaries[empty:]) == {len(slots)}
        assert not layout.lengths[empty:].any()
        assert torch.equal(layout.positions, other.positions)
        assert torch.equal(layout.token_mask, other.token_mask)
        assert (layout.mask, layout.slot_of_cell, layout.cell_of_slot) == (None, None, None)
        assert (other.boundaries, other.sentence_of_slot, layout.max_length) == (None, None, 99)


@pytest.mark.parametrize("kernel", ["varlen", "packed"])
def test_without_a_rectangle_shapes_are_those_of_the_slots_alone(kernel):
    def shapes(lengths: list[int]) -> dict[str, object]:
        values = dict(vars(Layout.packed(np.array(lengths), 9, kernel)))
        assert values.pop("num_sentences") == len(lengths)
        return {name: getattr(value, "shape", value) for name, value in values.items()}

    assert shapes([9]) == shapes([1] * 9) == shapes([2, 3]) == shapes([0])
    assert shapes([2, 3])["kernel"] == kernel
    assert shapes([2, 3])["max_length"] == 9
    with pytest.raises(ValueError, match="3 sentences do not fit into 2 slots"):
        Layout.packed(np.array([1, 0, 1]), 2, kernel)


@settings(deadline=None)
@given(pairs_of_rows())
def test_each_sentence_of_a_pack_is_a_row_of_one_of_its_rectangles(rows):
    sources, targets, _ = rows
    pack = packed_with_slack(*rows)
    found = {}
    for name in ("source", "target_in", "target_out"):
        layout, ids = getattr(pack, f"{name.split('_')[0]}_layout"), getattr(pack, name)
        cells = ids[layout.slot_of_cell].where(layout.mask, PAD_ID)
        assert torch.equal(cells[layout.cell_of_slot][layout.token_mask], ids[layout.token_mask])
        assert not layout.cell_of_slot[~layout.token_mask].any()
        found[name], cells = [], cells.tolist()
        for count, width in layout.rectangles:
            here = [[cells.pop(0) for _ in range(width)] for _ in range(count)]
            rows_here = [[token for token in row if token != PAD_ID] for row in here]
            assert max(map(len, rows_here)) == width
            assert all(
                r + [PAD_ID] * (width - len(r)) == h for r, h in zip(rows_here, here, strict=True)
            )
            found[name] += rows_here
        assert cells == []
    pairs = list(zip(found["source"], found["target_out"], strict=True))
    assert sorted(pairs) == sorted(zip(sources, targets, strict=True))
    assert found["target_in"] == [[BOS_ID, *row[:-1]] for row in found["target_out"]]
    sums = [len(source) + len(target) for source, target in pairs]
    assert sums == sorted(sums)  # similar ones stand together
    assert pack.num_tokens == sum(map(len, targets))


def test_padded_is_the_classic_rectangle():
    batch = Batch.padded([[5, 6, EOS_ID], [7, EOS_ID]], [[8, EOS_ID], [9, 10, 11, EOS_ID]])
    assert batch.source.tolist() == [[5, 6, EOS_ID], [7, EOS_ID, PAD_ID]]
    assert batch.target_in.tolist() == [[BOS_ID, 8, PAD_ID, PAD_ID], [BOS_ID, 9, 10, 11]]
    assert batch.target_out.tolist() == [[8, EOS_ID, PAD_ID, PAD_ID], [9, 10, 11, EOS_ID]]
    assert batch.source_layout.positions.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.source_layout.token_mask is None
    assert batch.num_tokens == 6


class Words:
    """A vocabulary of four words; its two sides differ."""

    def encode_source(self, lines):
        return [[4 + "abcd".index(word) for word in line.split()] + [EOS_ID] for line in lines]

    def encode_target(self, lines):
        return [[8 + "abcd".index(word) for word in line.split()] + [EOS_ID] for line in lines]


def test_from_text_encodes_each_side_by_its_own_half_of_the_vocabulary():
    batch = Batch.from_text(["a b", ""], ["c", "d d a"], Words())
    assert batch.source.tolist() == [[4, 5, EOS_ID], [EOS_ID, PAD_ID, PAD_ID]]
    assert batch.target_out.tolist() == [[10, EOS_ID, PAD_ID, PAD_ID], [11, 11, 8, EOS_ID]]
    assert batch.target_in.tolist() == [[BOS_ID, 10, PAD_ID, PAD_ID], [BOS_ID, 11, 11, 8]]


def test_the_empty_batch_has_the_shape_of_all_others_and_counts_nothing():
    batch = Batch.empty(6, 4)
    assert batch.source.shape == (6,)
    assert batch.target_in.shape == batch.target_out.shape == (4,)
    assert batch.num_tokens == 0
    assert set(batch.target_out.tolist()) == {PAD_ID}
    assert batch.source.tolist() == [EOS_ID] + [PAD_ID] * 5
    assert batch.target_in.tolist() == [BOS_ID] + [PAD_ID] * 3
    for layout in (batch.source_layout, batch.target_layout):
        assert layout.lengths.tolist() == [1]
        assert layout.token_mask.sum() == 1


@pytest.mark.parametrize(("slots", "message"), [((4, 9), "5 tokens"), ((5, 6), "7 tokens")])
def test_what_does_not_fit_is_refused(slots, message):
    sources, targets = random_ids([2, 3], 20), random_ids([4, 3], 20)
    packed(sources, targets, 5, 7)
    with pytest.raises(ValueError, match=f"{message} do not fit into"):
        packed(sources, targets, *slots)


def test_padding_mask_equals_a_loop():
    lengths, width = [3, 0, 5, 1], 6
    mask = padding_mask(torch.tensor(lengths), width)
    for row, length in enumerate(lengths):
        for column in range(width):
            assert mask[row, column] == (column < length)
    assert mask.dtype == torch.bool


def test_future_mask_equals_a_loop():
    mask = future_mask(5)
    for query in range(5):
        for key in range(5):
            assert mask[query, key] == (key <= query)
    assert mask.dtype == torch.bool
    assert future_mask(1).tolist() == [[True]]


def test_a_rectangle_may_be_wider_than_its_longest_sentence():
    layout = Layout.padded(torch.tensor([2, 1]), 4)
    assert layout.mask.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert layout.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert Layout.padded(torch.tensor([2, 1])).mask.shape == (2, 2)


def test_rows_are_padded_behind():
    ids, layout = pad_rows([[5], [6, 7, 8]])
    assert ids.tolist() == [[5, PAD_ID, PAD_ID], [6, 7, 8]]
    assert layout.lengths.tolist() == [1, 3]


@pytest.mark.parametrize(("kind", "tensors"), [("rectangle", 6), ("packed", 5), ("padded", 3)])
def test_map_changes_every_tensor_and_nothing_else(kind, tensors):
    rows = random_ids([2, 3], 20), random_ids([4, 3], 20)
    kernel = "packed" if kind == "packed" else "padded"
    batch = Batch.padded(*rows) if kind == "padded" else packed(*rows, 8, 8, kernel)
    changed = batch.map(lambda tensor: tensor.clone())
    num_tensors = 0
    for ours, theirs in (
        (batch, changed),
        (batch.source_layout, changed.source_layout),
        (batch.target_layout, changed.target_layout),
    ):
        for name, tensor in vars(ours).items():
            if isinstance(tensor, torch.Tensor):
                num_tensors += 1
                assert getattr(theirs, name) is not tensor
                assert torch.equal(getattr(theirs, name), tensor)
            elif not isinstance(tensor, Layout):
                assert getattr(theirs, name) == tensor
    assert num_tensors == 3 + 2 * tensors
    assert changed.num_tokens == batch.num_tokens == 7


def test_to_moves_all_of_it():
    batch = packed(random_ids([2], 20), random_ids([4], 20), 8, 8).to(torch.device("meta"))
    layouts = vars(batch.source_layout) | vars(batch.target_layout)
    tensors = [t for t in (vars(batch) | layouts).values() if isinstance(t, torch.Tensor)]
    assert len(tensors) == 9
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_ids_of_any_integer_type_become_int64():
    row = np.array([5, 6, EOS_ID], np.uint16), np.array([3])
    batch = Batch.packed(row, row, 4, 4)
    assert batch.source.dtype == batch.target_in.dtype == batch.target_out.dtype == torch.int64
    assert batch.target_in.tolist() == [BOS_ID, 5, 6, PAD_ID]
