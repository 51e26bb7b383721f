import math

import pytest
import torch
import torch.nn.functional as F

from dtrain.kernels.dropout import dropout

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
        torch.set_num_threads(3)
        assert torch.equal(kept(0.1), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (2, 3, 4)])
def test_backward_uses_the_mask_of_forward(shape):
    x = torch.randn(shape, requires_grad=True)
    y = dropout(x, 0.4, training=True)
    y.sum().backward()
    assert torch.equal(y, x * x.grad)


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
