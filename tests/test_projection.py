import torch
from torch import nn

from dtrain.kernels.projection import project_jointly


def test_layers_applied_jointly_give_what_each_gives_and_the_same_gradients():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 4, dtype=torch.float64) for _ in range(3)]
    x = torch.randn(5, 7, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, 7, 4, dtype=torch.float64)
    inputs = [x, *(parameter for layer in layers for parameter in layer.parameters())]
    results = []
    for outs in (
        [layer(x) for layer in layers],
        project_jointly(x, [(layer.weight, layer.bias) for layer in layers]),
    ):
        loss = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
        results.append([*outs, *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(*results)
