import math

import pytest
import torch
import torch.nn.functional as F
from masks import assert_independent

from dtrain.kernels.dropout import dropout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 1_000_003  # not a multiple of the four elements that share a draw


def kept(p, seed=0, dtype=torch.float32, shape=(SIZE,)):
    torch.manual_seed(seed)
    return dropout(torch.ones(shape, dtype=dtype), p, training=True)


def test_nothing_happens_in_evaluation_or_with_probability_zero():
    x = torch.randn(3, 5)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x


@pytest.mark.parametrize("p", [0.001, 0.1, 0.3, 0.5, 0.9])
def test_rate_and_mean(p):
    y = kept(p)
    deviation = math.sqrt(p * (1 - p) / SIZE)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=5 * deviation + 2**-16)
    assert y.mean().item() == pytest.approx(1, abs=5 * deviation / (1 - p) + 1e-5)
    assert y.unique().numel() == 2


def test_scale_follows_the_realised_probability_exactly():
    """Where 2^-16 is coarse the probability is off, but the mean is not."""
    p = 1 - 1.4 / 2**16
    assert kept(p).max() == 2**16


@pytest.mark.parametrize("p", [0.1, 0.3])
def test_in_bf16_the_mean_stays_though_the_scale_is_rounded(p):
    y = kept(p, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    deviation = math.sqrt(p / (1 - p) / SIZE)
    assert y.double().mean().item() == pytest.approx(1, abs=5 * deviation + 2e-5)
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=0.004)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64, 256, 1024])
def test_elements_are_independent(lag):
    drops = (kept(0.2) == 0).double() - 0.2
    correlation = (drops[:-lag] * drops[lag:]).mean() / (0.2 * 0.8)
    assert abs(correlation.item()) < 5 / math.sqrt(SIZE)


def test_each_of_four_elements_that_share_a_draw_has_the_same_rate():
    drops = (kept(0.5) == 0)[: SIZE // 4 * 4].view(-1, 4).double().mean(0)
    assert (drops - 0.5).abs().max().item() < 5 * 0.5 / math.sqrt(SIZE / 4)


def test_calls_differ_seeds_decide():
    torch.manual_seed(1)
    first, second = (dropout(torch.ones(1000), 0.5, True) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(kept(0.5, seed=1, shape=1000), first)
    assert not torch.equal(kept(0.5, seed=2, shape=1000), first)


def test_number_of_threads_does_not_matter():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = kept(0.1)
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(kept(0.1), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (2, 3, 4)])
def test_backward_uses_the_mask_of_forward(shape):
    x = torch.randn(shape, requires_grad=True)
    y = dropout(x, 0.4, training=True)
    y.sum().backward()
    assert torch.equal(y, x * x.grad)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sites_and_steps_are_independent(p, dtype):
    masks = {}
    for step in (1, 2):
        torch.manual_seed(step)
        for site in ("encoder", "decoder", "embedding"):
            ones = torch.ones(300, 515, dtype=dtype, device=DEVICE)
            masks[f"{site}, step {step}"] = dropout(ones, p, training=True).float()
    if dtype == torch.float32:
        assert_independent(masks, p)
    else:  # whose scale is rounded, so only zeros are looked at
        assert_independent({k: (m != 0) / (1 - p) for k, m in masks.items()}, p)


def sites(a, b, c):
    """Dropout where a compiler has something to fuse it with.

    One of them falls on a reshape that is materialised: on GPUs Inductor gave groups of four the
    same mask there (https://github.com/pytorch/pytorch/issues/198333).
    """
    first = dropout(a.relu() + 0.0, 0.5, training=True)
    second = dropout(b.transpose(0, 1).contiguous(), 0.5, training=True)
    return first, second, dropout(torch.addmm(c, a, torch.zeros_like(c)), 0.5, training=True)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns of itself
def test_compiled_masks_are_independent_and_backward_has_those_of_forward():
    shape = 256, 256
    compiled = torch.compile(sites, fullgraph=True)
    masks = {}
    for step in (1, 2, 1):
        torch.manual_seed(step)
        inputs = [torch.ones(shape, device=DEVICE, requires_grad=True) for _ in range(3)]
        found = compiled(*inputs)
        gradients = torch.autograd.grad(sum(mask.sum() for mask in found), inputs)
        for name, mask, gradient in zip("abc", found, gradients, strict=True):
            assert torch.equal(mask, gradient.T if name == "b" else gradient), (name, step)
            earlier = masks.setdefault(f"{name}, step {step}", mask.detach())
            assert torch.equal(mask, earlier), (name, step)
    assert_independent(masks, 0.5)


def test_same_distribution_as_torch():
    torch.manual_seed(0)
    x = torch.randn(400, 500)
    ours, twin = dropout(x, 0.3, True), F.dropout(x, 0.3, True)
    assert ours.std().item() == pytest.approx(twin.std().item(), rel=0.01)
    assert ours.max().item() == pytest.approx(twin.max().item(), rel=0.2)
    assert ours.max() <= x.max() / 0.7 * 1.0001


def test_strided_input():
    x = torch.randn(6, 10).T
    y = dropout(x, 0.5, True)
    assert torch.equal(y[y != 0], 2 * x[y != 0])
