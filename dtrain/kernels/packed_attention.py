"""Attention over packed slots in Triton: each block of queries reads the keys of its sentences.

Flash attention (Dao 2023) with a mask of sentences. Where sentences are short, a variable-length
flash kernel spends a whole tile on each; here a tile of queries spans several sentences, and its
keys are those from the first sentence's first to the last one's last. Scores and sums are fp32.
Every element of every gradient is written by one program, in a fixed order: the bits repeat.

Its plain twin is the padded attention of `kernels/attention.py`. It takes part in torch.compile as
one opaque operator, and runs on the CPU in Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtrain.batch import Layout

# Tensor cores want 64 rows for a group of four warps. What is read against them goes in blocks of
# 32, which is a sentence: a larger block would mostly be masked. Sizes are fixed: choosing them by
# trial would cost time at each start, and bits would depend on the outcome.
ROWS, COLUMNS = 64, 32
LAUNCH = {"num_warps": 4, "num_stages": 2}


def packed_attention(
    x: Tensor,
    memory: Tensor | None,
    query_layout: Layout,
    key_layout: Layout,
    causal: bool,
    dropout: float,
) -> Tensor:
    """Attend within packed sentences.

    Args:
        x: queries [slots, heads, qkv] if there is a memory, else queries, keys and values
            [slots, 3, heads, qkv].
        memory: keys and values [slots, 2, heads, qkv].
        query_layout: where the sentences of `x` lie.
        key_layout: where those of `memory` lie; `query_layout` if there is none.
        causal: no query sees a later key; only without memory.
        dropout: probability of dropping an attention weight, drawn by torch's generator.

    Returns:
        [slots, heads, qkv]; zero in slack.
    """
    # On the device, so that each replay of a CUDA graph draws another one.
    seed = torch.randint(2**62, (1,), device=x.device) if dropout else None
    places = _places(query_layout) + _places(key_layout)
    return _attention(x, memory, *places, seed, dropout, causal)[0]


def _places(layout: Layout) -> tuple[Tensor, Tensor]:
    assert layout.sentence_of_slot is not None, "the layout is of another kernel"
    assert layout.boundaries is not None, "the layout is of another kernel"
    return layout.sentence_of_slot, layout.boundaries


@torch.library.custom_op("dtrain::packed_attention", mutates_args=())
def _attention(
    x: Tensor,
    memory: Tensor | None,
    query_sentences: Tensor,
    query_boundaries: Tensor,  # noqa: ARG001, backward is given the same inputs
    key_sentences: Tensor,  # noqa: ARG001, likewise
    key_boundaries: Tensor,
    seed: Tensor | None,
    dropout: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Give the output, and for each query the logarithm of its softmax's sum: fp32 [heads, slots].

    That logarithm is to base 2 and of scores as they are multiplied in the kernel.
    """
    q, k, v = _split(x, memory)
    num_queries, num_heads, head_dim = q.shape
    out = q.new_empty(num_queries, num_heads, head_dim)
    log_sum = q.new_empty(num_heads, num_queries, dtype=torch.float32)
    _forward_kernel[(triton.cdiv(num_queries, ROWS), num_heads)](
        *(q, k, v, out, log_sum),
        *(query_sentences, key_boundaries, seed),
        *(num_queries, len(k), *q.stride()[:2], *k.stride()[:2]),
        *(head_dim**-0.5, dropout),
        **_constants(head_dim, dropout, causal),
    )
    return out, log_sum


@_attention.register_fake
def _(x: Tensor, memory: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    num_queries, num_heads, head_dim = _split(x, memory)[0].shape
    log_sum = x.new_empty(num_heads, num_queries, dtype=torch.float32)
    return x.new_empty(num_queries, num_heads, head_dim), log_sum


@torch.library.custom_op("dtrain::packed_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    out: Tensor,
    log_sum: Tensor,
    x: Tensor,
    memory: Tensor | None,
    query_sentences: Tensor,
    query_boundaries: Tensor,
    key_sentences: Tensor,
    key_boundaries: Tensor,
    seed: Tensor | None,
    dropout: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Give the gradients of `x` and of `memory`, the second empty if there is none."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dmemory = x.new_empty(0)
    if memory is not None:
        dmemory = torch.empty_like(memory, memory_format=torch.contiguous_format)
    q, k, v = _split(x, memory)
    dq, dk, dv = _split(dx, None if memory is None else dmemory)
    num_queries, num_heads, head_dim = q.shape
    inner = torch.empty_like(log_sum)  # grad · out for each query
    sizes = num_queries, len(k), *q.stride()[:2], *k.stride()[:2], *dq.stride()[:2]
    constants = _constants(head_dim, dropout, causal)
    grad = grad.contiguous()
    _query_gradient_kernel[(triton.cdiv(num_queries, ROWS), num_heads)](
        *(q, k, v, out, log_sum, grad, inner, dq),
        *(query_sentences, key_boundaries, seed),
        *(*sizes, head_dim**-0.5, dropout),
        **constants,
    )
    _key_gradient_kernel[(triton.cdiv(len(k), ROWS), num_heads)](
        *(q, k, v, log_sum, grad, inner, dk, dv),
        *(key_sentences, query_boundaries, seed),
        *(*sizes[:-2], *dk.stride()[:2], head_dim**-0.5, dropout),
        **constants,
    )
    return dx, dmemory


@_attention_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    x, memory = inputs[3:5]
    dmemory = x.new_empty(0) if memory is None else memory.new_empty(memory.shape)
    return x.new_empty(x.shape), dmemory


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout, ctx.causal = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    memory = ctx.saved_tensors[3]
    dx, dmemory = _attention_backward(grad, *ctx.saved_tensors, ctx.dropout, ctx.causal)
    return dx, None if memory is None else dmemory, *[None] * 7


_attention.register_autograd(_differentiate, setup_context=_save)


def _split(x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Give queries, keys and values, each [slots, heads, qkv]; keys and values with equal strides.

    Heads lie one behind the other: only the strides of slots and heads vary.
    """
    q, k, v = x.unbind(1) if memory is None else (x, *memory.unbind(1))
    assert q.stride(2) == k.stride(2) == 1, "the elements of a head lie side by side"
    return q, k, v


def _constants(head_dim: int, dropout: float, causal: bool) -> dict[str, Any]:
    """What kernels are compiled for. A matrix product is at least 16 wide and a power of two."""
    width = max(16, triton.next_power_of_2(head_dim))
    blocks = {"row_block": ROWS, "column_block": COLUMNS, **LAUNCH}
    return {"head_dim": head_dim, "width": width, "causal": causal, "drops": dropout > 0, **blocks}


# ------------------------------------------------------------------ the kernels
#
# Rows are what a program owns, columns what it reads against them. A sentence's columns are
# boundaries[sentence] to boundaries[sentence + 1]; slack belongs to an empty sentence. Addresses
# are counted in 64 bits: heads, layers and slots together may go beyond 2^31 elements.


@triton.jit
def _columns_of(
    rows: tl.tensor, num_rows: tl.tensor, sentences: tl.tensor, boundaries: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Give for each row the first column of its sentence and the one after its last."""
    inside = rows < num_rows
    sentence = tl.load(sentences + rows, mask=inside, other=0)
    first = tl.load(boundaries + sentence, mask=inside, other=2147483647)
    end = tl.load(boundaries + sentence + 1, mask=inside, other=0)
    return first, end


@triton.jit
def _load(
    start: tl.tensor,
    slots: tl.tensor,
    num_slots: tl.tensor,
    slot_stride: tl.tensor,
    head_dim: tl.constexpr,
    width: tl.constexpr,
) -> tl.tensor:
    """Read [slots, width] of one head, zeros where there is nothing."""
    elements = tl.arange(0, width)
    places = start + slots.to(tl.int64)[:, None] * slot_stride + elements[None, :]
    there = (slots < num_slots)[:, None] & (elements < head_dim)[None, :]
    return tl.load(places, mask=there, other=0.0)


@triton.jit
def _store(
    start: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    num_slots: tl.tensor,
    slot_stride: tl.tensor,
    head_dim: tl.constexpr,
    width: tl.constexpr,
) -> None:
    elements = tl.arange(0, width)
    places = start + slots.to(tl.int64)[:, None] * slot_stride + elements[None, :]
    there = (slots < num_slots)[:, None] & (elements < head_dim)[None, :]
    tl.store(places, values.to(start.dtype.element_ty), mask=there)


@triton.jit
def _place(
    head: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
) -> tl.tensor:
    """Number the attention weights. A number alone decides about dropout, in backward as well."""
    return (head * num_queries + queries).to(tl.int64) * num_keys + keys


@triton.jit
def _forward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    log_sum: tl.tensor,
    sentences: tl.tensor,
    boundaries: tl.tensor,
    seed: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    q_slot: tl.tensor,
    q_head: tl.tensor,
    k_slot: tl.tensor,
    k_head: tl.tensor,
    scale: tl.tensor,
    dropout: tl.tensor,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    causal: tl.constexpr,
    drops: tl.constexpr,
    row_block: tl.constexpr,
    column_block: tl.constexpr,
) -> None:
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    queries = tl.program_id(0) * row_block + tl.arange(0, row_block)
    first, end = _columns_of(queries, num_queries, sentences, boundaries)
    if causal:
        end = tl.minimum(end, queries + 1)
    one_q = _load(q + head * q_head, queries, num_queries, q_slot, head_dim, width)
    scale *= 1.4426950408889634  # powers of two are what the hardware has: log2(e)
    highest = tl.full([row_block], float("-inf"), tl.float32)
    total = tl.zeros([row_block], tl.float32)
    values = tl.zeros([row_block, width], tl.float32)
    for start in range(tl.min(first) // column_block * column_block, tl.max(end), column_block):
        keys = start + tl.arange(0, column_block)
        one_k = _load(k + head * k_head, keys, num_keys, k_slot, head_dim, width)
        one_v = _load(v + head * k_head, keys, num_keys, k_slot, head_dim, width)
        seen = (first[:, None] <= keys[None, :]) & (keys[None, :] < end[:, None])
        scores = tl.dot(one_q, tl.trans(one_k), input_precision="ieee") * scale
        scores = tl.where(seen, scores, float("-inf"))
        before = highest
        highest = tl.maximum(highest, tl.max(scores, 1))
        # Nothing seen yet: -inf less -inf would not be a number.
        level = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(before - level)
        total = total * shrink + tl.sum(weights, 1)
        if drops:
            place = _place(head, queries[:, None], keys[None, :], num_queries, num_keys)
            kept = tl.rand(tl.load(seed), place) >= dropout
            weights = tl.where(kept, weights / (1.0 - dropout), 0.0)
        values = values * shrink[:, None]
        values += tl.dot(weights.to(one_v.dtype), one_v, input_precision="ieee")
    level = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.where(total == 0.0, 1.0, total)  # slack has seen nothing
    slot_stride = num_heads * head_dim
    start_out = out + head * head_dim
    _store(start_out, values / total[:, None], queries, num_queries, slot_stride, head_dim, width)
    inside = queries < num_queries
    tl.store(log_sum + head * num_queries + queries, level + tl.log2(total), mask=inside)


@triton.jit
def _query_gradient_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    log_sum: tl.tensor,
    grad: tl.tensor,
    inner: tl.tensor,
    dq: tl.tensor,
    sentences: tl.tensor,
    boundaries: tl.tensor,
    seed: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    q_slot: tl.tensor,
    q_head: tl.tensor,
    k_slot: tl.tensor,
    k_head: tl.tensor,
    dq_slot: tl.tensor,
    dq_head: tl.tensor,
    scale: tl.tensor,
    dropout: tl.tensor,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    causal: tl.constexpr,
    drops: tl.constexpr,
    row_block: tl.constexpr,
    column_block: tl.constexpr,
) -> None:
    head = tl.program_id(1)
    slot_stride = tl.num_programs(1) * head_dim
    queries = tl.program_id(0) * row_block + tl.arange(0, row_block)
    inside = queries < num_queries
    first, end = _columns_of(queries, num_queries, sentences, boundaries)
    if causal:
        end = tl.minimum(end, queries + 1)
    one_q = _load(q + head * q_head, queries, num_queries, q_slot, head_dim, width)
    start_out, start_grad = out + head * head_dim, grad + head * head_dim
    one_out = _load(start_out, queries, num_queries, slot_stride, head_dim, width)
    one_grad = _load(start_grad, queries, num_queries, slot_stride, head_dim, width)
    product = tl.sum(one_out.to(tl.float32) * one_grad.to(tl.float32), 1)
    of_head = head * num_queries + queries
    tl.store(inner + of_head, product, mask=inside)  # the other kernel, which runs next, reads it
    level = tl.load(log_sum + of_head, mask=inside, other=0.0)
    gradient = tl.zeros([row_block, width], tl.float32)
    for start in range(tl.min(first) // column_block * column_block, tl.max(end), column_block):
        keys = start + tl.arange(0, column_block)
        one_k = _load(k + head * k_head, keys, num_keys, k_slot, head_dim, width)
        one_v = _load(v + head * k_head, keys, num_keys, k_slot, head_dim, width)
        seen = (first[:, None] <= keys[None, :]) & (keys[None, :] < end[:, None])
        scores = tl.dot(one_q, tl.trans(one_k), input_precision="ieee")
        scores = tl.where(seen, scores * (scale * 1.4426950408889634), float("-inf"))
        weights = tl.exp2(scores - level[:, None])
        of_weights = tl.dot(one_grad, tl.trans(one_v), input_precision="ieee")
        if drops:
            place = _place(head, queries[:, None], keys[None, :], num_queries, num_keys)
            kept = tl.rand(tl.load(seed), place) >= dropout
            of_weights = tl.where(kept, of_weights / (1.0 - dropout), 0.0)
        of_scores = weights * (of_weights - product[:, None])
        gradient += tl.dot(of_scores.to(one_k.dtype), one_k, input_precision="ieee")
    start_dq = dq + head * dq_head
    _store(start_dq, gradient * scale, queries, num_queries, dq_slot, head_dim, width)


@triton.jit
def _key_gradient_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    log_sum: tl.tensor,
    grad: tl.tensor,
    inner: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    sentences: tl.tensor,
    boundaries: tl.tensor,
    seed: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    q_slot: tl.tensor,
    q_head: tl.tensor,
    k_slot: tl.tensor,
    k_head: tl.tensor,
    dk_slot: tl.tensor,
    dk_head: tl.tensor,
    scale: tl.tensor,
    dropout: tl.tensor,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    causal: tl.constexpr,
    drops: tl.constexpr,
    row_block: tl.constexpr,
    column_block: tl.constexpr,
) -> None:
    """As the others, mirrored: keys are rows, and columns are the queries of their sentence."""
    head = tl.program_id(1)
    slot_stride = tl.num_programs(1) * head_dim
    keys = tl.program_id(0) * row_block + tl.arange(0, row_block)
    first, end = _columns_of(keys, num_keys, sentences, boundaries)
    if causal:
        first = tl.maximum(first, keys)
    one_k = _load(k + head * k_head, keys, num_keys, k_slot, head_dim, width)
    one_v = _load(v + head * k_head, keys, num_keys, k_slot, head_dim, width)
    of_keys = tl.zeros([row_block, width], tl.float32)
    of_values = tl.zeros([row_block, width], tl.float32)
    for start in range(tl.min(first) // column_block * column_block, tl.max(end), column_block):
        queries = start + tl.arange(0, column_block)
        inside = queries < num_queries
        of_head = head * num_queries + queries
        level = tl.load(log_sum + of_head, mask=inside, other=0.0)
        product = tl.load(inner + of_head, mask=inside, other=0.0)
        one_q = _load(q + head * q_head, queries, num_queries, q_slot, head_dim, width)
        start_grad = grad + head * head_dim
        one_grad = _load(start_grad, queries, num_queries, slot_stride, head_dim, width)
        seen = (first[:, None] <= queries[None, :]) & (queries[None, :] < end[:, None])
        scores = tl.dot(one_k, tl.trans(one_q), input_precision="ieee")
        scores = tl.where(seen, scores * (scale * 1.4426950408889634), float("-inf"))
        weights = tl.exp2(scores - level[None, :])
        of_weights = tl.dot(one_v, tl.trans(one_grad), input_precision="ieee")
        used = weights
        if drops:
            place = _place(head, queries[None, :], keys[:, None], num_queries, num_keys)
            kept = tl.rand(tl.load(seed), place) >= dropout
            used = tl.where(kept, weights / (1.0 - dropout), 0.0)
            of_weights = tl.where(kept, of_weights / (1.0 - dropout), 0.0)
        of_values += tl.dot(used.to(one_grad.dtype), one_grad, input_precision="ieee")
        of_scores = weights * (of_weights - product[None, :])
        of_keys += tl.dot(of_scores.to(one_q.dtype), one_q, input_precision="ieee")
    start_dk, start_dv = dk + head * dk_head, dv + head * dk_head
    _store(start_dk, of_keys * scale, keys, num_keys, dk_slot, head_dim, width)
    _store(start_dv, of_values, keys, num_keys, dk_slot, head_dim, width)
