"""Scaled dot-product attention over sentences, packed or padded (Vaswani et al. 2017, 3.2.1).

The layout says which kernel attends:

- `padded`: torch's own, after packed tokens [slots] are gathered into the cells of rectangles, one
  row a sentence; then they are brought back. On the CPU `short_attention.py` takes its place while
  sentences are short.
- `varlen`: torch's flash attention for variable lengths, for GPUs.
- `packed`: `packed_attention.py`, for GPUs and short sentences.

`padded` runs everywhere, and is what the others are tested against.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.batch import Layout, future_mask
from dtrain.kernels.cells import rectangles, to_cells, to_slots
from dtrain.kernels.short_attention import can_attend, short_attention


def attend(
    q: Tensor,
    kv: Tensor,
    query_layout: Layout,
    key_layout: Layout,
    dropout: float = 0.0,
) -> Tensor:
    """Let each query gather values from the keys of the same sentence on another side.

    Args:
        q: queries, [slots, heads, qkv] if packed, [N, L, heads, qkv] if padded.
        kv: keys and values, [slots, 2, heads, qkv] or [N, L, 2, heads, qkv].
        query_layout: where the sentences of `q` lie.
        key_layout: where the sentences of `kv` lie: as many as `query_layout` has.
        dropout: probability of dropping an attention weight.

    Returns:
        Like `q`; unspecified, but finite, in slack slots and empty cells, whose gradients are zero.
    """
    if query_layout.kernel == "packed":
        return _packed(q, kv, query_layout, key_layout, False, dropout)
    if query_layout.kernel == "varlen":
        k, v = _silenced(kv, key_layout).unbind(1)
        return _varlen(_silenced(q, query_layout), k, v, query_layout, key_layout, False, dropout)
    masks = key_masks(key_layout)
    if can_attend(q, (query_layout, key_layout), dropout):
        return short_attention(q, kv, query_layout, key_layout, masks)
    parts = to_cells(q, query_layout), to_cells(kv, key_layout), masks
    heads: list[Tensor] = []  # dynamo cannot trace list[Tensor]()
    for queries, cells, mask in zip(*parts, strict=True):
        k, v = cells.unbind(2)
        heads.append(scaled_dot_product(queries, k, v, mask, dropout=dropout))
    return to_slots(heads, query_layout)


def attend_to_self(
    qkv: Tensor, layout: Layout, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Let each token gather values from its own sentence.

    Args:
        qkv: queries, keys and values, [slots, 3, heads, qkv] or [N, L, 3, heads, qkv].
        layout: where the sentences lie.
        causal: no token sees a later one.
        dropout: probability of dropping an attention weight.

    Returns:
        [slots, heads, qkv] or [N, L, heads, qkv], otherwise as `attend`.
    """
    if layout.kernel == "packed":
        return _packed(qkv, None, layout, layout, causal, dropout)
    if layout.kernel == "varlen":
        q, k, v = _silenced(qkv, layout).unbind(1)
        return _varlen(q, k, v, layout, layout, causal, dropout)
    if can_attend(qkv, (layout,), dropout):
        widths = (columns for _, columns in layout.rectangles)
        masks = [future_mask(width) for width in widths] if causal else key_masks(layout)
        return short_attention(qkv, None, layout, layout, masks)
    heads: list[Tensor] = []  # dynamo cannot trace list[Tensor]()
    for cells, mask in zip(to_cells(qkv, layout), key_masks(layout), strict=True):
        q, k, v = cells.unbind(2)
        heads.append(scaled_dot_product(q, k, v, None if causal else mask, causal, dropout))
    return to_slots(heads, layout)


def _packed(
    x: Tensor,
    memory: Tensor | None,
    query_layout: Layout,
    key_layout: Layout,
    causal: bool,
    dropout: float,
) -> Tensor:
    # Imported where it is used: it needs Triton, which not every machine has.
    from dtrain.kernels.packed_attention import packed_attention

    return packed_attention(x, memory, query_layout, key_layout, causal, dropout)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_layout: Layout,
    key_layout: Layout,
    causal: bool,
    dropout: float,
) -> Tensor:
    """Call torch's kernel; where it is compiled or recorded, with numbers that never change.

    There the kernel is told of as many sentences as there are slots, most of them empty; a
    deterministic run clears memory for each of these.
    """
    from torch.nn.attention.varlen import varlen_attn  # takes seconds to import

    if dropout:
        raise ValueError("the varlen kernel cannot drop attention weights")
    assert query_layout.boundaries is not None, "the layout is of another kernel"
    assert key_layout.boundaries is not None, "the layout is of another kernel"
    # The compiler must not come to the second question: it would break its graph there.
    if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        # The sides have as many sentences as each other, and then any number of empty ones.
        count = min(len(query_layout.boundaries), len(key_layout.boundaries)) - 1
    else:
        count = query_layout.num_sentences
    out = varlen_attn(
        *(q, k, v, query_layout.boundaries[: count + 1], key_layout.boundaries[: count + 1]),
        *(query_layout.max_length, key_layout.max_length),
        window_size=(-1, 0) if causal else (-1, -1),
    )
    assert isinstance(out, Tensor), "nothing else was asked for"
    return _silenced(out, query_layout)


def _silenced(x: Tensor, layout: Layout) -> Tensor:
    """Put zeros into slack, in forward and in backward: torch's kernel leaves it as memory was."""
    assert layout.token_mask is not None, "the layout is packed"
    return x.where(layout.token_mask.view(-1, *[1] * (x.dim() - 1)), 0)


def scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(q k^T / sqrt(qkv)) v for padded sentences.

    Args:
        q: [N, query, heads, qkv].
        k: [N, key, heads, qkv].
        v: [N, key, heads, qkv].
        mask: True where attention is allowed, broadcastable to [N, heads, query, key]; all if None.
        causal: the i-th query sees the first i keys only; instead of `mask`.
        dropout: probability of dropping an attention weight.

    Returns:
        [N, query, heads, qkv].
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal).transpose(1, 2)


def key_mask(layout: Layout) -> Tensor:
    """Let every query see all tokens of its sentence and no padding: bool [N, 1, 1, L].

    A causal attention needs no such mask: padding comes last, where only padding can see it.
    """
    assert layout.mask is not None, "only rectangles have padding"
    return _seeing_something(layout.mask)


def key_masks(layout: Layout) -> list[Tensor]:
    """Give the key_mask of each rectangle."""
    if layout.slot_of_cell is None or layout.mask is None:
        return [key_mask(layout)]
    return [_seeing_something(mask) for mask in rectangles(layout.mask, layout)]


def _seeing_something(mask: Tensor) -> Tensor:
    """[rows, columns] -> [rows, 1, 1, columns], with a first cell for sentences without a token.

    A softmax over nothing is not finite.
    """
    is_first = torch.arange(mask.shape[1], device=mask.device) == 0
    return (mask | is_first)[:, None, None]
