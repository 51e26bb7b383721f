"""The cross-entropy kernel, on a GPU or interpreted on the CPU, against float64."""

import pytest
import torch
import torch.nn.functional as F

from dtrain import loss as loss_module
from dtrain.batch import PAD_ID
from dtrain.loss import smoothed_cross_entropy

# Triton's interpreter takes its time.
pytestmark = [pytest.mark.slow, pytest.mark.any_device]

kernel = pytest.importorskip("dtrain.kernels.cross_entropy", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 9
SIZES = [13, 4096, 4096 + 17]  # of vocabularies: the kernel takes 4096 logits at a time


def random_problem(size, dtype=torch.float32, spread=4.0):
    torch.manual_seed(0)
    logits = (spread * torch.randn(ROWS, size, device=DEVICE)).to(dtype)
    target = torch.randint(1, size, (ROWS,), device=DEVICE)
    target[0], target[1], target[2::4] = 1, size - 1, PAD_ID
    return logits, target


def reference(logits, target, smoothing):
    """Each row's loss and nll, and the gradient of the loss's sum; float64.

    The loss is that of label smoothing without the mean of the logits, times `smoothing`.
    """
    exact = logits.double().requires_grad_()
    options = {"ignore_index": PAD_ID, "reduction": "none"}
    whole = F.cross_entropy(exact, target, label_smoothing=smoothing, **options)
    loss = whole + smoothing * exact.mean(1) * (target != PAD_ID)
    (gradient,) = torch.autograd.grad(loss.sum(), exact)
    return loss.detach(), F.cross_entropy(exact.detach(), target, **options), gradient


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_equal_float64s(size, smoothing, dtype):
    logits, target = random_problem(size, dtype)
    loss, nll, gradient = reference(logits, target, smoothing)
    scale = 64.0 if dtype == torch.float16 else 1.0
    found = kernel.cross_entropy(logits, target, smoothing, scale, True)
    for one, two in zip(found, (loss, nll), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5)
    # What the type cannot hold is rounded, and nothing else.
    rounding = {"rtol": max(torch.finfo(dtype).eps, 1e-5), "atol": 1e-6}
    torch.testing.assert_close(logits.double() / scale, gradient, **rounding)
    assert not logits[2::4].any()


def test_without_gradient_logits_stay():
    logits, target = random_problem(13)
    before = logits.clone()
    found = kernel.cross_entropy(logits, target, 0.1, 1.0, False)
    assert torch.equal(logits, before)
    again = kernel.cross_entropy(logits, target, 0.1, 1.0, True)
    assert all(map(torch.equal, found, again))


def test_logits_may_be_large_and_far_apart():
    logits, target = random_problem(4096 + 17, spread=1e4)
    loss, _, gradient = reference(logits, target, 0.1)
    found, _ = kernel.cross_entropy(logits, target, 0.1, 1.0, True)
    torch.testing.assert_close(found.double(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-3, atol=1e-6)


def test_rows_may_lie_apart_but_not_their_logits():
    logits, target = random_problem(13)
    _, _, gradient = reference(logits, target, 0.1)
    wide = torch.full((ROWS, 16), 7.0, device=DEVICE)
    wide[:, :13] = logits
    kernel.cross_entropy(wide[:, :13], target, 0.1, 1.0, True)
    torch.testing.assert_close(wide[:, :13].double(), gradient, rtol=1e-5, atol=1e-6)
    assert (wide[:, 13:] == 7).all()
    with pytest.raises(ValueError, match="side by side"):
        kernel.cross_entropy(logits.T.contiguous().T, target, 0.1, 1.0, True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)],
)
def test_the_loss_of_states_equals_float64s_in_slices(monkeypatch, dtype, tolerance):
    size, width = 130, 8
    for name in ("_CPU_SLICE", "_GPU_SLICE"):
        monkeypatch.setattr(loss_module, name, 5 * size)
    logits, target = random_problem(size)
    torch.manual_seed(1)
    hidden, weight = (torch.randn(n, width, device=DEVICE) for n in (ROWS, size))
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    options = {"ignore_index": PAD_ID, "reduction": "sum"}
    logits = exact[0] @ exact[1].T
    loss = F.cross_entropy(logits, target, label_smoothing=0.1, **options)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        found, nll = smoothed_cross_entropy(*inputs, target, 0.1, fused=True)
    assert found.item() == pytest.approx(loss.item(), rel=tolerance)
    assert nll.item() == pytest.approx(F.cross_entropy(logits, target, **options).item(), rel=0.02)
    gradients = zip(
        torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * loss, exact), strict=True
    )
    for one, two in gradients:
        assert one.dtype == torch.float32
        assert (one - two).norm() < tolerance * two.norm()


def test_fp16_keeps_the_probabilities_that_it_cannot_hold():
    """Each wrong token's e / V lies among fp16's coarsest numbers: it is not rounded there."""
    hidden = torch.zeros(2, 8, device=DEVICE, requires_grad=True)
    weight = torch.zeros(4096, 8, device=DEVICE)
    hidden.data[:, 0], weight[:, 0], weight[5, 0] = 1, -12, 12
    target = torch.tensor([5, 5], device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        loss, _ = smoothed_cross_entropy(hidden, weight, target, 1e-3, fused=True)
    options = {"label_smoothing": 1e-3, "reduction": "sum"}
    expected = F.cross_entropy(hidden.double() @ weight.double().T, target, **options)
    gradient, expected = (torch.autograd.grad(value, hidden)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, expected, rtol=0.004, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns of itself
def test_it_is_one_graph_with_what_surrounds_it():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (ROWS, 13))
    _, target = random_problem(13)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(smoothed_cross_entropy, fullgraph=True, backend=backend)
    results = []
    for function in (smoothed_cross_entropy, compiled):
        loss, nll = function(hidden, weight, target, 0.1, True)
        results.append([loss, nll, *torch.autograd.grad(loss, (hidden, weight))])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_operator_is_registered_as_torch_wants_it():
    logits, target = random_problem(13)
    torch.library.opcheck(kernel.cross_entropy, (logits, target, 0.1, 1.0, True))
