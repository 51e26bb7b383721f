"""Batched products of short sentences, against torch's kernel and one sentence after the other."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dtrain.batch import Layout
from dtrain.kernels import short_attention
from dtrain.kernels.attention import attend, attend_to_self
from dtrain.kernels.short_attention import LONGEST, can_attend

LENGTHS, MEMORY_LENGTHS = np.array([3, 7, 1, 4]), np.array([6, 2, 5, 1])
GROUPS = [np.array([2, 0]), np.array([3, 1])]


def layouts():
    return Layout.packed(LENGTHS, 18, groups=GROUPS), Layout.packed(
        MEMORY_LENGTHS, 16, groups=GROUPS
    )


@pytest.fixture
def no_torch_kernel(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)


def random(*shape):
    return torch.randn(*shape, 2, 4, dtype=torch.float64, requires_grad=True)


@pytest.mark.usefixtures("no_torch_kernel")
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_in_the_own_sentence_agree_with_finite_differences(causal):
    torch.manual_seed(0)
    layout, _ = layouts()
    assert torch.autograd.gradcheck(
        lambda x: attend_to_self(x, layout, causal)[: LENGTHS.sum()], random(18, 3), fast_mode=True
    )


@pytest.mark.usefixtures("no_torch_kernel")
def test_gradients_of_another_side_agree_with_finite_differences():
    torch.manual_seed(0)
    layout, memory_layout = layouts()
    assert torch.autograd.gradcheck(
        lambda q, kv: attend(q, kv, layout, memory_layout)[: LENGTHS.sum()],
        (random(18), random(16, 2)),
        fast_mode=True,
    )


def test_what_it_cannot_do_is_left_to_torchs_kernel(monkeypatch):
    layout, _ = layouts()
    x = torch.zeros(18, 3, 2, 4)
    assert can_attend(x, (layout,), 0.0)
    assert not can_attend(x.bfloat16(), (layout,), 0.0)
    assert not can_attend(x.to("meta"), (layout,), 0.0)
    assert not can_attend(x, (layout,), 0.1)
    assert not can_attend(x, (layout, Layout.padded(torch.tensor([3, 7]))), 0.0)
    assert not can_attend(x, (layout, Layout.packed(np.array([1, LONGEST + 1]), 99)), 0.0)
    called = []
    monkeypatch.setattr(short_attention.torch, "bmm", lambda *_: called.append(1))
    assert attend_to_self(x, layout, dropout=0.1).shape == (18, 2, 4)
    assert not called
