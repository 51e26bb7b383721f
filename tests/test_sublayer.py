import pytest
import torch
from torch import nn
from torch_twins import shaken, tiny_settings

from dtrain.model.sublayer import FeedForward, Residual


def test_feed_forward():
    ours = shaken(FeedForward(16, 24))
    twin = nn.Sequential(ours.inner, nn.ReLU(), ours.outer)
    x = torch.randn(5, 16)
    torch.testing.assert_close(ours(x), twin(x))


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_residual(norm):
    residual = shaken(Residual(tiny_settings(norm=norm)))
    x = torch.randn(5, 16)
    expected = residual.norm(x + x.sin()) if norm == "post" else x + residual.norm(x).sin()
    torch.testing.assert_close(residual(x, torch.sin), expected)


def test_dropout_falls_on_the_sublayers_output_only_and_only_in_training():
    residual = Residual(tiny_settings(norm="pre", dropout=0.5))
    x, y = torch.zeros(50, 16), torch.ones(50, 16)
    assert residual(x, lambda _: y).unique().tolist() == [0, 2]
    assert residual(y, lambda _: x).unique().tolist() == [1]
    assert residual.eval()(x, lambda _: y).unique().tolist() == [1]
