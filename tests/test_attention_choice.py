import numpy as np
import pytest
import torch

from dtrain.batch import Layout
from dtrain.kernels import attention, attention_choice
from dtrain.kernels.attention import attend, attend_to_self
from dtrain.kernels.attention_choice import what_is_wrong, why_not

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FINE = {"device": CUDA, "dtype": torch.bfloat16, "qkv_dim": 64, "dropout": 0.0}


@pytest.mark.parametrize(
    ("kernel", "changes", "reason"),
    [
        ("packed", {}, ""),
        ("varlen", {"dtype": torch.float16, "qkv_dim": 128}, ""),
        ("padded", {"device": CPU, "dtype": torch.float32, "qkv_dim": 5, "dropout": 0.5}, ""),
        ("packed", {"device": CPU}, "it needs a GPU"),
        ("varlen", {"dtype": torch.float32}, "it needs precision bf16 or fp16"),
        ("packed", {"qkv_dim": 256}, "it needs heads of 16 to 128 elements, a multiple of 8"),
        ("varlen", {"qkv_dim": 20}, "it needs heads of 16 to 128 elements, a multiple of 8"),
        ("varlen", {"dropout": 0.1}, "it needs model.attention_dropout 0"),
        ("packed", {"dropout": 0.1}, ""),
    ],
)
def test_a_kernel_says_what_it_needs(monkeypatch, kernel, changes, reason):
    monkeypatch.setattr(attention_choice.importlib.util, "find_spec", lambda _: "found")
    assert why_not(kernel, **(FINE | changes)) == reason


def test_without_triton_packed_is_out_and_varlen_is_not(monkeypatch):
    monkeypatch.setattr(attention_choice.importlib.util, "find_spec", lambda _: None)
    assert why_not("packed", **FINE) == "it needs the Python package triton"
    assert why_not("varlen", **FINE) == ""


def in_rectangles(x, memory, query_layout, key_layout, causal, dropout):
    """Does what `packed` should, by the padded kernel."""
    layouts = [
        Layout.packed(np.array([n for n in side.lengths.tolist() if n]), len(side.positions))
        for side in (query_layout, key_layout)
    ]
    if memory is None:
        return attend_to_self(x, layouts[0], causal, dropout)
    return attend(x, memory, *layouts, dropout)


def deaf_to_order(*inputs):
    return in_rectangles(*inputs[:4], False, 0.0)


def hiding_a_gradient(x, memory, *rest):
    return in_rectangles(x, None if memory is None else memory.detach() + 0 * memory, *rest)


def fails(*_):
    raise RuntimeError("no such instruction\nand much more")


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        (in_rectangles, ""),
        (deaf_to_order, "causal self-attention is off by "),
        (hiding_a_gradient, "gradient 1 of attention to the source is off by 100.0%"),
        (lambda *i: in_rectangles(*i) / 0, "self-attention is off by "),
        (fails, "RuntimeError: no such instruction"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_kernel_that_is_off_is_found_out(monkeypatch, kernel, wrong, dtype):
    monkeypatch.setattr(attention, "_packed", kernel)
    before = torch.get_rng_state()
    found = what_is_wrong("packed", CPU, dtype, 2, 16)
    assert found.startswith(wrong)
    assert bool(found) == bool(wrong)
    assert "\n" not in found
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_the_packed_kernel_passes_in_tritons_interpreter():
    pytest.importorskip("triton")
    device = CUDA if torch.cuda.is_available() else CPU
    assert what_is_wrong("packed", device, torch.float16, 1, 16) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
@pytest.mark.parametrize("kernel", ["varlen", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_the_kernels_pass_on_a_gpu(kernel, dtype, head_dim):
    assert what_is_wrong(kernel, CUDA, dtype, 4, head_dim) == ""
