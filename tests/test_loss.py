import pytest
import torch
import torch.nn.functional as F
from torch_twins import packed, random_ids, tiny_settings

from dtrain import loss as loss_module
from dtrain.batch import PAD_ID, Batch
from dtrain.loss import Objective, smoothed_cross_entropy
from dtrain.model.transformer import Transformer

TOKENS, E, V = 37, 8, 13


@pytest.fixture(autouse=True, params=[V * 5, V * 1000], ids=["sliced", "whole"])
def _slices(request, monkeypatch):
    monkeypatch.setattr(loss_module, "_CPU_SLICE", request.param)


def random_problem(dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, E, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, E, dtype=dtype, requires_grad=True)
    target = torch.randint(1, V, (TOKENS,))
    target[::4] = PAD_ID
    return hidden, weight, target


def twin(hidden, weight, target, smoothing):
    return F.cross_entropy(
        hidden @ weight.T,
        target,
        ignore_index=PAD_ID,
        label_smoothing=smoothing,
        reduction="sum",
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradients_equal_torchs(smoothing, dtype, tolerance):
    hidden, weight, target = random_problem(dtype)
    loss, nll = smoothed_cross_entropy(hidden, weight, target, smoothing)
    reference = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = twin(*reference, target, smoothing)
    close = {"rtol": tolerance, "atol": 100 * tolerance, "check_dtype": False}
    torch.testing.assert_close(loss, expected, **close)
    torch.testing.assert_close(nll, twin(*reference, target, 0.0), **close)
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(3 * expected, reference), strict=True):
        torch.testing.assert_close(a, b, **close)


def test_gradients_agree_with_finite_differences():
    hidden, weight, target = random_problem()
    assert torch.autograd.gradcheck(
        lambda h, w: smoothed_cross_entropy(h, w, target, 0.1)[0], (hidden, weight), fast_mode=True
    )


def test_padded_shapes_and_pads_that_count_nothing():
    hidden, weight, target = random_problem()
    flat = smoothed_cross_entropy(hidden[:36], weight, target[:36], 0.1)
    rows = smoothed_cross_entropy(hidden[:36].view(4, 9, E), weight, target[:36].view(4, 9), 0.1)
    torch.testing.assert_close(flat, rows)
    nothing = smoothed_cross_entropy(hidden, weight, torch.full_like(target, PAD_ID), 0.1)
    assert [part.item() for part in nothing] == [0, 0]
    gradients = torch.autograd.grad(nothing[0], (hidden, weight))
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_only_the_loss_has_a_gradient():
    loss, nll = smoothed_cross_entropy(*random_problem(), 0.1)
    assert loss.requires_grad
    assert not nll.requires_grad


def test_without_gradients_none_is_computed(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)
    hidden, weight, target = random_problem()
    with torch.no_grad():
        loss, _ = smoothed_cross_entropy(hidden, weight, target, 0.1)
    torch.testing.assert_close(loss, twin(hidden, weight, target, 0.1).detach())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_in_low_precision_sums_and_gradients_stay_fp32(dtype, tolerance):
    hidden, weight, target = random_problem(torch.float32)
    with torch.autocast("cpu", dtype):
        loss, nll = smoothed_cross_entropy(hidden, weight, target, 0.1)
    expected = twin(hidden, weight, target, 0.1)
    assert {loss.dtype, nll.dtype} == {torch.float32}
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    for ours, theirs in zip(
        gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_fp16_keeps_the_probabilities_that_it_cannot_hold():
    """Each wrong token's e / V lies among fp16's coarsest numbers: it is not rounded there."""
    num_classes = 4096
    hidden, weight = torch.zeros(2, E, requires_grad=True), torch.zeros(num_classes, E)
    hidden.data[:, 0], weight[:, 0], weight[5, 0] = 1, -12, 12
    target = torch.tensor([5, 5])
    with torch.autocast("cpu", torch.float16):
        loss, _ = smoothed_cross_entropy(hidden, weight, target, 1e-3)
    expected = twin(hidden, weight, target, 1e-3)
    gradient, expected = (torch.autograd.grad(value, hidden)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, expected, rtol=0.004, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_objective_equals_the_models_logits_and_torchs_loss(tied):
    torch.manual_seed(0)
    model = Transformer(tiny_settings(tie_embeddings=tied), 20).double().eval()
    batch = packed(random_ids([5, 2], 20), random_ids([3, 6], 20), 8, 12)
    loss, nll = Objective(model, 0.1)(batch)
    logits = model(batch)
    expected = F.cross_entropy(
        logits, batch.target_out, ignore_index=PAD_ID, label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert 0 < nll.item() < loss.item() * 2


def test_an_empty_batch_gives_every_parameter_a_gradient_of_zero():
    model = Transformer(tiny_settings(), 20)
    loss, nll = Objective(model, 0.1)(Batch.empty(8, 8))
    loss.backward()
    assert [loss.item(), nll.item()] == [0, 0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name
