"""The fused residual, on a GPU or interpreted on the CPU, against float64 and its plain twin."""

import numpy as np
import pytest
import torch
from masks import assert_independent
from torch import nn

from dtrain.kernels.residual import add_and_norm

# Triton's interpreter takes its time.
pytestmark = [pytest.mark.slow, pytest.mark.any_device]

fused_residual = pytest.importorskip("dtrain.kernels.fused_residual", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEVELS = 2**16


def philox(counter, key):
    """Philox 4x32-10 (Salmon et al. 2011): a counter and a key of 64 bits each to four words."""
    words = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    keys = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        high, low = divmod(words[0] * 0xD2511F53, 2**32)
        other_high, other_low = divmod(words[2] * 0xCD9E8D57, 2**32)
        words = [other_high ^ words[1] ^ keys[0], other_low, high ^ words[3] ^ keys[1], low]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return words


def dropped(seed, p, *shape):
    """Drop from ones, by the operator; gives zeros and the scale of what is kept."""
    torch.manual_seed(seed)
    ones = torch.ones(shape, device=DEVICE)
    return add_and_norm(torch.zeros_like(ones), ones, None, p, training=True, fused=True)


def random_problem(x_dtype, y_dtype, shape=(3, 45, 48)):
    torch.manual_seed(0)
    x, y, grad = (torch.randn(shape, device=DEVICE) for _ in range(3))
    norm = nn.LayerNorm(shape[-1], eps=1e-3, device=DEVICE)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return x.to(x_dtype).requires_grad_(), y.to(y_dtype).requires_grad_(), norm, grad


def test_the_reference_gives_the_words_that_its_authors_published():
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_masks_are_philox_of_seed_row_and_column():
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,), device=DEVICE).item()
    num_kept = round(0.7 * LEVELS)
    expected = np.zeros((7, 20))
    for row, column in np.ndindex(expected.shape):
        word = philox(row * 4 + column // 8, seed)[column % 8 // 2]  # 20 columns in a block of 32
        bits = word >> 16 if column % 2 else word % 2**16
        expected[row, column] = LEVELS / num_kept if bits < num_kept else 0
    np.testing.assert_allclose(dropped(5, 0.3, 7, 20).cpu(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("x_dtype", "y_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 0.004),
        (torch.bfloat16, torch.bfloat16, 0.004),
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("has_norm", [True, False])
def test_results_and_gradients_equal_float64s(x_dtype, y_dtype, tolerance, p, has_norm):
    x, y, norm, grad = random_problem(x_dtype, y_dtype)
    mask = dropped(3, p, *x.shape).double()
    torch.manual_seed(3)
    ours = add_and_norm(x, y, norm if has_norm else None, p, training=True, fused=True)
    assert ours.dtype == (y_dtype if has_norm else torch.promote_types(x_dtype, y_dtype))

    x64, y64 = (tensor.detach().double().requires_grad_() for tensor in (x, y))
    weights = [p.detach().double().requires_grad_() for p in norm.parameters()]
    theirs = x64 + y64 * mask
    if has_norm:
        theirs = nn.functional.layer_norm(theirs, theirs.shape[-1:], *weights, norm.eps)
    inputs = [x, y, *norm.parameters()][: 4 if has_norm else 2]
    gradients = torch.autograd.grad(ours, inputs, grad.to(ours.dtype))
    expected = torch.autograd.grad(theirs, [x64, y64, *weights][: len(inputs)], grad.double())
    for one, two in zip([ours, *gradients], [theirs, *expected], strict=True):
        assert (one - two).norm() <= tolerance * two.norm()
    assert [g.dtype for g in gradients] == [tensor.dtype for tensor in inputs]


@pytest.mark.parametrize("has_norm", [True, False])
def test_without_dropout_it_is_the_plain_twin(has_norm):
    x, y, norm, grad = random_problem(torch.float32, torch.float32, (70, 16))
    inputs = [x, y, *norm.parameters()][: 4 if has_norm else 2]
    results = []
    for fused in (True, False):
        out = add_and_norm(x, y, norm if has_norm else None, 0.0, training=True, fused=fused)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_gradient_is_zero_exactly_where_the_output_was_dropped():
    x = torch.zeros(200, 40, device=DEVICE)
    y = torch.randn(200, 40, device=DEVICE).exp().requires_grad_()
    out = add_and_norm(x, y, None, 0.5, training=True, fused=True)
    out.sum().backward()
    assert torch.equal(y.grad, (out != 0) * 2.0)


def test_strided_tensors():
    x, y, norm, _ = random_problem(torch.float32, torch.float32, (20, 16))
    turned = x.detach().T.contiguous().T, y.detach().T.contiguous().T
    results = []
    for pair in ((x, y), turned):
        torch.manual_seed(0)
        results.append(add_and_norm(*pair, norm, 0.2, training=True, fused=True))
    assert torch.equal(*results)


def test_evaluation_goes_the_plain_way():
    x, y, norm, _ = random_problem(torch.float32, torch.float32, (5, 16))
    assert torch.equal(add_and_norm(x, y, norm, 0.5, training=False, fused=True), norm(x + y))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_independent_and_the_seed_decides(p):
    def step(seed):
        torch.manual_seed(seed)
        ones = torch.ones(96, 512, device=DEVICE)
        zeros = torch.zeros_like(ones)
        return [add_and_norm(zeros, ones, None, p, True, fused=True) for _ in range(2)]

    one, again, other = step(1), step(1), step(2)
    assert all(map(torch.equal, one, again))
    names = "a site", "the next", "the next step's", "its next"
    assert_independent(dict(zip(names, [*one, *other], strict=True)), p)


def test_the_mean_stays_where_a_probability_is_rounded():
    (_, _, num_kept, scale), _ = fused_residual._sizes(torch.empty(1, 8), 1 - 1.4 / LEVELS, False)
    assert (num_kept, scale) == (1, LEVELS)


def test_rows_that_are_too_wide_are_refused():
    with pytest.raises(ValueError, match="16384"):
        dropped(0, 0.1, 1, 16385)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_operators_are_registered_as_torch_wants_them():
    x, y, norm, _ = random_problem(torch.float32, torch.float32, (4, 16))
    seed = torch.tensor([7], device=DEVICE)
    torch.library.opcheck(fused_residual._dropout_add, (x, y, seed, 0.5))
    arguments = (x, y, *norm.parameters(), seed, 0.5, 1e-5)
    torch.library.opcheck(fused_residual._dropout_add_norm, arguments)


def three_sites(x, y, norm):
    first = add_and_norm(x, y, norm, 0.3, training=True, fused=True)
    second = add_and_norm(first, y.tanh(), norm, 0.3, training=True, fused=True)
    return first, second, add_and_norm(second, y, None, 0.3, training=True, fused=True)


def results(function, x, y, norm):
    torch.manual_seed(4)
    out = function(x, y, norm)
    total = sum(part.square().sum() for part in out)
    return [*out, *torch.autograd.grad(total, (x, y, *norm.parameters()))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns of itself
def test_it_is_one_graph_with_what_surrounds_it():
    """And its seeds stay seeds: a compiler may take two draws for one, or draw in backward anew."""
    x, y, norm, _ = random_problem(torch.float32, torch.float32, (8, 16))
    compiled = torch.compile(three_sites, fullgraph=True, backend="aot_eager")
    expected, found = (results(f, x, y, norm) for f in (three_sites, compiled))
    assert all(map(torch.equal, expected, found))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_with_torchs_own_random_numbers_it_is_the_same():
    x, y, norm, _ = random_problem(torch.float32, torch.float32, (64, 512))
    with torch._inductor.config.patch(fallback_random=True):
        found = results(torch.compile(three_sites, fullgraph=True), x, y, norm)
    for one, two in zip(results(three_sites, x, y, norm), found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_replays_of_a_cuda_graph_differ_and_their_seed_decides():
    ones = torch.ones(96, 512, device=DEVICE, requires_grad=True)
    zeros = torch.zeros_like(ones)

    def work():
        sites = [add_and_norm(zeros, ones, None, 0.1, True, fused=True) for _ in range(2)]
        return [*sites, *(torch.autograd.grad(site.sum(), ones)[0] for site in sites)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = work()

    def replay(seed):
        if seed is not None:
            torch.manual_seed(seed)
        graph.replay()
        masks = [mask.clone() for mask in recorded]
        assert all(map(torch.equal, masks[:2], masks[2:]))  # forward's are backward's
        return masks[:2]

    one, further, again, other = replay(1), replay(None), replay(1), replay(2)
    assert all(map(torch.equal, one, again))
    names = [f"{when}, {site}" for when in ("one", "further", "other") for site in "ab"]
    assert_independent(dict(zip(names, [*one, *further, *other], strict=True)), 0.1)
    torch.manual_seed(1)
    assert all(map(torch.equal, one, work()[:2]))
