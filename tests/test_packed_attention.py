"""The Triton kernels against a loop over sentences; without a GPU in Triton's interpreter."""

import json

import numpy as np
import pytest
import torch
from worlds import run_world

from dtrain import train
from dtrain.batch import Layout
from dtrain.kernels import attention, attention_choice
from dtrain.kernels.attention import attend, attend_to_self
from dtrain.model.attention import MultiHeadAttention

# Triton's interpreter takes its time.
pytestmark = [pytest.mark.slow, pytest.mark.any_device]

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="torch finds no GPU here")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}

# A block has 64 rows against 32 columns. These lie within blocks, end with them and go beyond.
RAGGED = [5, 1, 26, 40, 3], [33, 1, 7, 2, 38]
SIDES = {
    "ragged": (RAGGED, (80, 96)),
    "full": (RAGGED, (75, 81)),
    "single tokens": (([1] * 67, [1] * 67), (67, 70)),
    "one sentence": (([70], [33]), (70, 64)),
    "more slack than tokens": (([2], [1]), (70, 100)),
}


def reference(q, k, v, lengths, causal=False, kept=None):
    """Attend in float64, a softmax for each sentence; slack stays zero.

    `kept`, if given, says which attention weights stay and what they are multiplied by.
    """
    q, k, v = (x.double() for x in (q, k, v))
    out, query_start, key_start = torch.zeros_like(q), 0, 0
    for num_queries, num_keys in zip(*lengths, strict=True):
        queries = slice(query_start, query_start + num_queries)
        keys = slice(key_start, key_start + num_keys)
        scores = torch.einsum("qhd,khd->hqk", q[queries], k[keys]) / q.shape[-1] ** 0.5
        if causal:
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        weights = scores.softmax(-1)
        if kept is not None:
            weights = weights * kept[:, queries, keys]
        out[queries] = torch.einsum("hqk,khd->qhd", weights, v[keys])
        query_start, key_start = queries.stop, keys.stop
    return out


def layouts_of(lengths, slots) -> list[Layout]:
    sides = zip(lengths, slots, strict=True)
    layouts = [Layout.packed(np.array(lengths), slots, "packed") for lengths, slots in sides]
    return [layout.map(lambda tensor: tensor.to(DEVICE)) for layout in layouts]


def projections(slots, parts, head_dim=16, dtype=torch.float32) -> torch.Tensor:
    shape = [slots, parts, 2, head_dim][: 4 if parts > 1 else 1]
    shape += [2, head_dim] if parts == 1 else []
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def check(out, inputs, twin, weights, tolerance):
    """Compare output and gradients; weights reach into slack, where they must do nothing."""
    gradients = torch.autograd.grad(out, inputs, weights.to(out.dtype))
    expected = torch.autograd.grad((twin * weights).sum(), inputs)
    for ours, theirs in zip([out, *gradients], [twin, *expected], strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=tolerance, rtol=tolerance)


def check_self(case, causal, dtype=torch.float32, head_dim=16):
    (lengths, _), (slots, _) = SIDES[case]
    torch.manual_seed(0)
    qkv, weights = projections(slots, 3, head_dim, dtype), projections(slots, 1, head_dim)
    (layout,) = layouts_of([lengths], [slots])
    out = attend_to_self(qkv, layout, causal)
    assert out.dtype == dtype
    assert not out[sum(lengths) :].any()
    twin = reference(*qkv.unbind(1), (lengths, lengths), causal)
    check(out, [qkv], twin, weights.detach(), TOLERANCE[dtype])


def check_other(case, dtype=torch.float32, head_dim=16):
    lengths, slots = SIDES[case]
    torch.manual_seed(0)
    q, kv = projections(slots[0], 1, head_dim, dtype), projections(slots[1], 2, head_dim, dtype)
    out = attend(q, kv, *layouts_of(lengths, slots))
    assert out.dtype == dtype
    assert not out[sum(lengths[0]) :].any()
    weights = projections(slots[0], 1, head_dim).detach()
    twin = reference(q, *kv.unbind(1), lengths)
    check(out, [q, kv], twin, weights, TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [False, True])
def test_a_sentence_attends_to_itself(causal):
    check_self("ragged", causal)


@pytest.mark.parametrize("case", SIDES)
def test_a_sentence_attends_to_its_other_side(case):
    check_other(case)


def test_the_width_of_a_head_need_not_be_a_power_of_two():
    check_self("ragged", causal=True, head_dim=24)


def test_half_precision_is_as_good_as_its_numbers():
    check_self("ragged", causal=True, dtype=torch.float16)
    check_other("ragged", torch.float16)


def test_sentences_without_tokens_on_either_side_disturb_nobody():
    torch.manual_seed(0)
    q, kv = projections(6, 1), projections(7, 2)
    lengths = [3, 0, 2, 0], [2, 2, 0, 1]
    out = attend(q, kv, *layouts_of(lengths, (6, 7)))
    twin = attend(q, kv, *layouts_of(([3], [2]), (6, 7)))
    torch.testing.assert_close(out[:3], twin[:3])
    assert not out[3:].any()
    for gradient in torch.autograd.grad(out.sum(), (q, kv)):
        assert gradient.isfinite().all()


def test_dropped_weights_are_those_of_the_seed_in_forward_and_in_backward():
    """Values that are rows of the identity show each weight as it was used."""
    lengths, slots, p = ([20, 12, 4], [9, 16, 5]), (40, 32), 0.3
    query_layout, key_layout = layouts_of(lengths, slots)
    q, kv = projections(slots[0], 1), projections(slots[1], 2)
    shown = torch.zeros_like(kv)
    for first, length in zip(np.cumsum([0, *lengths[1]])[:-1], lengths[1], strict=True):
        shown[first : first + length, 1] = torch.eye(16, device=DEVICE)[:length, None]
    kept = torch.zeros(2, *slots, dtype=torch.float64, device=DEVICE)

    def attended(kv):
        torch.manual_seed(5)
        return attend(q, kv, query_layout, key_layout, dropout=p)

    used = attended(shown.detach())
    starts = [np.cumsum([0, *side])[:-1] for side in lengths]
    for a, b, rows, columns in zip(*starts, *lengths, strict=True):
        block = used[a : a + rows, :, :columns].transpose(0, 1)
        kept[:, a : a + rows, b : b + columns] = (block != 0) / (1 - p)
    share = (kept > 0).sum().item() / (2 * sum(np.multiply(*lengths)))
    assert abs(share - (1 - p)) < 0.07  # four standard deviations
    weights = projections(slots[0], 1).detach()
    check(attended(kv), [q, kv], reference(q, *kv.unbind(1), lengths, kept=kept), weights, 1e-5)
    assert not torch.equal(attend(q, kv, query_layout, key_layout, dropout=p), attended(kv))


@pytest.mark.exhaustive
def test_the_operators_keep_their_promises_to_the_compiler():
    """That is: what they give has the type and shape that was announced, and nothing is changed."""
    from dtrain.kernels import packed_attention

    layout, key_layout = layouts_of(([3, 2], [1, 4]), (6, 8))
    q, kv, qkv = projections(6, 1), projections(8, 2), projections(6, 3)
    seed = torch.tensor([3], device=DEVICE)
    own, other = packed_attention._places(layout), packed_attention._places(key_layout)
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
    )
    for inputs in (
        (q, kv, *own, *other, seed, 0.5, False),
        (qkv, None, *own, *own, None, 0.0, True),
    ):
        torch.library.opcheck(packed_attention._attention, inputs, test_utils=tests)
        out, log_sum = packed_attention._attention(*inputs)
        of_gradient = torch.ones_like(out), out.detach(), log_sum.detach(), *inputs
        backward = packed_attention._attention_backward
        torch.library.opcheck(backward, of_gradient, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_it_compiles_in_one_piece_for_all_batches():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.manual_seed(0)
    module = MultiHeadAttention(32, 2, 16).to(DEVICE)
    x, memory = torch.randn(12, 32, device=DEVICE), torch.randn(14, 32, device=DEVICE)

    def both(layout, memory_layout):
        y = module(x, layout, causal=True)
        return module(y, layout, module.project_memory(memory), memory_layout)

    count = CompileCounterWithBackend("inductor" if DEVICE.type == "cuda" else "aot_eager")
    compiled = torch.compile(both, backend=count, fullgraph=True)
    parameters = list(module.parameters())
    for lengths in (([3, 2], [1, 4]), ([12], [9]), ([1, 1, 7], [5, 5, 1])):
        layouts = layouts_of(lengths, (12, 14))
        ours, twin = compiled(*layouts), both(*layouts)
        torch.testing.assert_close(ours, twin)
        torch.testing.assert_close(
            torch.autograd.grad(ours.square().sum(), parameters),
            torch.autograd.grad(twin.square().sum(), parameters),
        )
    assert count.frame_count == 1


@pytest.mark.slow
def test_a_training_is_the_same_as_in_rectangles(toy, monkeypatch):
    monkeypatch.setattr(attention_choice, "why_not", lambda *_: "")  # on the CPU, and in fp32
    monkeypatch.setattr(attention_choice, "what_is_wrong", lambda *_: "")
    losses = {}
    for kernel, projection in (("padded", "separate"), ("packed", "joined")):
        changes = {"run__max_steps": 2, "metrics__every_steps": 1, "validation__every_steps": 0}
        sizes = {"batch__tokens_per_step": 128, "batch__tokens_per_micro_batch": 64}
        kernels = {"kernels__attention": kernel, "kernels__memory_projection": projection}
        config = toy(kernel, **kernels, **changes, **sizes)
        run_world(1, train.run, config)
        lines = (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[kernel] = [json.loads(line)["train/loss"] for line in lines]
        # From now on there are no rectangles, and there is one product for the memory.
        for module, name in ((attention, "short_attention"), (attention, "to_cells")):
            monkeypatch.setattr(module, name, None)
        monkeypatch.setattr(MultiHeadAttention, "project_memory", None)
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-6)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_the_real_kernels(dtype, head_dim):
    for case in SIDES:
        check_other(case, dtype, head_dim)
        for causal in (False, True):
            check_self(case, causal, dtype, head_dim)


@pytest.mark.gpu
@needs_gpu
def test_the_bits_repeat():
    lengths = np.random.default_rng(0).integers(1, 90, 150)
    (layout,) = layouts_of([lengths], [int(lengths.sum()) + 50])
    qkv = projections(len(layout.positions), 3, 64, torch.bfloat16)

    def bits():
        torch.manual_seed(0)
        out = attend_to_self(qkv, layout, causal=True, dropout=0.1)
        return out.detach(), *torch.autograd.grad(out.square().sum(), qkv)

    first = bits()
    for _ in range(20):
        assert all(map(torch.equal, bits(), first))
