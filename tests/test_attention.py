import sys
import types

import numpy as np
import pytest
import torch
from torch_twins import DTYPES, TOLERANCE, shaken, tokens_of, twin_attention, unpacked

from dtrain.batch import Layout
from dtrain.kernels import short_attention
from dtrain.kernels.attention import attend, attend_to_self
from dtrain.kernels.cells import to_cells
from dtrain.model.attention import MultiHeadAttention

QUERY_LENGTHS, KEY_LENGTHS = np.array([3, 7, 1, 4]), np.array([6, 2, 5, 1])
QUERY_SLOTS, KEY_SLOTS = 18, 16  # three and two of them slack


def attend_sentence_by_sentence(q, k, v, query_lengths, key_lengths, causal):
    """The plain twin: one softmax for each sentence, no padding, no packing."""
    rows, query_start, key_start = [], 0, 0
    for query_length, key_length in zip(query_lengths, key_lengths, strict=True):
        one_q = q[query_start : query_start + query_length]
        one_k = k[key_start : key_start + key_length]
        one_v = v[key_start : key_start + key_length]
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k) / q.shape[-1] ** 0.5
        if causal:
            later = torch.ones(query_length, key_length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), one_v))
        query_start, key_start = query_start + query_length, key_start + key_length
    return torch.cat(rows)


@pytest.fixture(params=[0, short_attention.LONGEST], ids=["torchs-kernel", "products"])
def _ways(request, monkeypatch):
    """Both ways in which rectangles attend on the CPU."""
    monkeypatch.setattr(short_attention, "LONGEST", request.param)


@pytest.mark.usefixtures("_ways")
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_equals_a_loop_over_sentences(dtype):
    torch.manual_seed(0)
    query_layout = Layout.packed(QUERY_LENGTHS, QUERY_SLOTS)
    key_layout = Layout.packed(KEY_LENGTHS, KEY_SLOTS)
    q = torch.randn(QUERY_SLOTS, 2, 4, dtype=dtype, requires_grad=True)
    kv = torch.randn(KEY_SLOTS, 2, 2, 4, dtype=dtype, requires_grad=True)
    inputs = q, kv
    ours = unpacked(attend(q, kv, query_layout, key_layout), query_layout)
    twin = attend_sentence_by_sentence(q, *kv.unbind(1), QUERY_LENGTHS, KEY_LENGTHS, causal=False)
    torch.testing.assert_close(ours, twin, atol=TOLERANCE[dtype], rtol=0)
    weights = torch.randn_like(twin)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((twin * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.usefixtures("_ways")
@pytest.mark.parametrize("causal", [False, True])
def test_attend_to_self_equals_the_loop(causal):
    torch.manual_seed(0)
    layout = Layout.packed(QUERY_LENGTHS, QUERY_SLOTS)
    qkv = torch.randn(QUERY_SLOTS, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.unbind(1)
    ours = attend_to_self(qkv, layout, causal)
    twin = attend_sentence_by_sentence(q, k, v, QUERY_LENGTHS, QUERY_LENGTHS, causal)
    torch.testing.assert_close(unpacked(ours, layout), twin)
    weights = torch.randn_like(twin)
    (gradient,) = torch.autograd.grad((unpacked(ours, layout) * weights).sum(), qkv)
    (expected,) = torch.autograd.grad((twin * weights).sum(), qkv)
    torch.testing.assert_close(gradient, expected)


class FlashStandIn(torch.autograd.Function):
    """What torch's kernel promises, on the CPU; where no sentence is, it leaves not-a-numbers."""

    @staticmethod
    def forward(ctx, q, k, v, query_boundaries, key_boundaries, causal):
        lengths = ctx.lengths = [b.diff().tolist() for b in (query_boundaries, key_boundaries)]
        ctx.causal = causal
        ctx.save_for_backward(q, k, v)
        out = torch.full_like(q, torch.nan)
        out[: sum(lengths[0])] = attend_sentence_by_sentence(q, k, v, *lengths, causal)
        return out

    @staticmethod
    def backward(ctx, grad):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = attend_sentence_by_sentence(*inputs, *ctx.lengths, ctx.causal)
        gradients = torch.autograd.grad(out, inputs, grad[: len(out)])
        for i, gradient in enumerate(gradients):
            gradient[sum(ctx.lengths[i > 0]) :] = torch.nan
        return *gradients, None, None, None


@pytest.fixture
def flash_stand_in(monkeypatch):
    """Takes the place of torch's kernel; gives the longest sentences that it was told of."""
    told = []

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert len(cu_seq_q) == len(cu_seq_k) == len(QUERY_LENGTHS) + 1  # no empty sentence
        told.append((max_q, max_k))
        return FlashStandIn.apply(q, k, v, cu_seq_q, cu_seq_k, window_size == (-1, 0))

    module = types.ModuleType("torch.nn.attention.varlen")  # the real one takes seconds to import
    module.varlen_attn = varlen_attn
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return told


def test_varlen_equals_the_padded_kernel_and_leaves_slack_alone(flash_stand_in):
    torch.manual_seed(0)
    qkv = torch.randn(QUERY_SLOTS, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    q = torch.randn(QUERY_SLOTS, 2, 4, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(KEY_SLOTS, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(QUERY_SLOTS, 2, 4, dtype=torch.float64)
    results = {}
    for kernel in ("varlen", "padded"):
        layout = Layout.packed(QUERY_LENGTHS, QUERY_SLOTS, kernel, 8)
        key_layout = Layout.packed(KEY_LENGTHS, KEY_SLOTS, kernel, 7)
        outs = {
            attend_to_self(qkv, layout): [qkv],
            attend_to_self(qkv, layout, causal=True): [qkv],
            attend(q, kv, layout, key_layout): [q, kv],
        }
        results[kernel] = [unpacked(out, layout) for out in outs]
        for out, inputs in outs.items():
            assert out.isfinite().all()
            results[kernel] += torch.autograd.grad(out, inputs, weights)
    torch.testing.assert_close(results["varlen"], results["padded"])
    assert flash_stand_in == [(8, 8), (8, 8), (8, 7)]
    with pytest.raises(ValueError, match="varlen kernel cannot drop"):
        attend_to_self(qkv, Layout.packed(QUERY_LENGTHS, QUERY_SLOTS, "varlen"), dropout=0.1)


def test_padded_cells_attend_like_packed_slots():
    torch.manual_seed(0)
    layout = Layout.packed(QUERY_LENGTHS, QUERY_SLOTS)
    rectangle = Layout.padded(torch.from_numpy(QUERY_LENGTHS))
    qkv = torch.randn(QUERY_SLOTS, 3, 2, 4)
    for causal in (False, True):
        slots = attend_to_self(qkv, layout, causal)
        cells = attend_to_self(to_cells(qkv, layout)[0], rectangle, causal)
        torch.testing.assert_close(unpacked(slots, layout), tokens_of(cells, rectangle))


def test_slack_is_finite_and_has_no_gradient_whatever_arrives_there():
    layout = Layout.packed(np.array([3, 2, 0]), 9)
    qkv = torch.randn(9, 3, 2, 4, requires_grad=True)
    for causal in (False, True):
        out = attend_to_self(qkv, layout, causal)
        assert out.isfinite().all()
        (gradient,) = torch.autograd.grad(out, qkv, torch.full_like(out, 1e6))
        assert gradient.isfinite().all()
        assert gradient[5:].abs().max() == 0


def test_sentences_without_tokens_disturb_nobody():
    """A packed batch has a fixed number of sentences; those left over are empty."""
    filled, with_empty = (Layout.packed(np.array(lengths), 8) for lengths in ([3, 4], [3, 4, 0, 0]))
    q, kv, qkv = torch.randn(8, 2, 4), torch.randn(8, 2, 2, 4), torch.randn(8, 3, 2, 4)
    torch.testing.assert_close(
        attend(q, kv, filled, filled)[:7], attend(q, kv, with_empty, with_empty)[:7]
    )
    for causal in (False, True):
        torch.testing.assert_close(
            attend_to_self(qkv, filled, causal)[:7], attend_to_self(qkv, with_empty, causal)[:7]
        )


def test_dropped_attention_weights_change_the_result_only_in_training():
    layout = Layout.packed(QUERY_LENGTHS, QUERY_SLOTS)
    attention = MultiHeadAttention(8, 2, 4, dropout=0.5)
    x = torch.randn(QUERY_SLOTS, 8)
    assert not torch.allclose(attention(x, layout)[:15], attention(x, layout)[:15])
    attention.eval()
    assert torch.equal(attention(x, layout)[:15], attention(x, layout)[:15])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_equals_torch(dtype, causal):
    torch.manual_seed(0)
    ours = shaken(MultiHeadAttention(16, 2, 8).to(dtype))
    layout = Layout.padded(torch.from_numpy(QUERY_LENGTHS))
    x = torch.randn(4, 7, 16, dtype=dtype)
    later = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    twin, _ = twin_attention(ours)(x, x, x, key_padding_mask=~layout.mask, attn_mask=later)
    torch.testing.assert_close(
        tokens_of(ours(x, layout, causal=causal), layout),
        tokens_of(twin, layout),
        atol=TOLERANCE[dtype],
        rtol=0,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_to_memory_equals_torch(dtype):
    torch.manual_seed(0)
    ours = shaken(MultiHeadAttention(16, 2, 8).to(dtype))
    layout = Layout.padded(torch.from_numpy(QUERY_LENGTHS))
    memory_layout = Layout.padded(torch.from_numpy(KEY_LENGTHS))
    x, memory = torch.randn(4, 7, 16, dtype=dtype), torch.randn(4, 6, 16, dtype=dtype)
    twin, _ = twin_attention(ours)(x, memory, memory, key_padding_mask=~memory_layout.mask)
    torch.testing.assert_close(
        tokens_of(ours(x, layout, ours.project_memory(memory), memory_layout), layout),
        tokens_of(twin, layout),
        atol=TOLERANCE[dtype],
        rtol=0,
    )


def test_the_fused_projection_and_its_start():
    attention = MultiHeadAttention(12, 3, 5)
    assert attention.qkv_proj.weight.shape == (3 * 3 * 5, 12)
    assert attention.o_proj.weight.shape == (12, 3 * 5)
    bound = (6 / (12 + 3 * 3 * 5)) ** 0.5
    assert 0.9 * bound < attention.qkv_proj.weight.abs().max().item() <= bound
    assert attention.qkv_proj.bias.abs().max() == 0
