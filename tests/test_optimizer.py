import math

import pytest
import torch
from torch import nn
from worlds import run_world

from dtrain.config import OptimizerSettings
from dtrain.distributed import connect
from dtrain.optimizer import build_optimizer, clip_gradients, set_learning_rate, step_unless
from dtrain.weights import moments

SETTINGS = {"learning_rate": 0.01, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3}
UNFUSED = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "fused": False, "foreach": False}


def twins() -> tuple[nn.Module, nn.Module]:
    """Two equal modules with matrices, biases and a norm."""
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)))
    return pair[0], pair[1]


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(3, 4, generator=generator)).pow(2).sum().backward()
        optimizer.step()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adam_is_torchs_with_l2_on_everything(decay):
    ours, theirs = twins()
    train(ours, build_optimizer(ours, OptimizerSettings(**SETTINGS, weight_decay=decay)))
    train(theirs, torch.optim.Adam(theirs.parameters(), **UNFUSED, weight_decay=decay))
    assert_same(ours, theirs)


def test_adamw_is_torchs_and_decays_matrices_only():
    ours, theirs = twins()
    settings = OptimizerSettings(name="adamw", **SETTINGS, weight_decay=0.3)
    train(ours, build_optimizer(ours, settings))
    matrices = [theirs[0].weight, theirs[2].weight]
    others = [theirs[0].bias, theirs[1].weight, theirs[1].bias, theirs[2].bias]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    train(theirs, torch.optim.AdamW(groups, **UNFUSED))
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_every_parameter_is_in_one_group_and_the_update_is_fused(name):
    module = twins()[0]
    optimizer = build_optimizer(module, OptimizerSettings(name=name))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())
    assert all(group["fused"] for group in optimizer.param_groups)


def test_the_defaults_are_the_papers():
    group = build_optimizer(twins()[0], OptimizerSettings()).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-9, 0.0)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_rate_that_is_set_is_the_next_updates(name):
    module = twins()[0]
    optimizer = build_optimizer(module, OptimizerSettings(name=name, **SETTINGS))
    set_learning_rate(optimizer, 0.0)
    before = [p.clone() for p in module.parameters()]
    train(module, optimizer, steps=1)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    set_learning_rate(optimizer, 0.5)
    train(module, optimizer, steps=1)
    assert not any(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_is_torchs(max_norm):
    ours, theirs = twins()
    for module in (ours, theirs):
        module(torch.ones(3, 4)).pow(2).sum().backward()
    norm = clip_gradients(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    torch.testing.assert_close(norm, expected)
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


def test_without_a_maximum_the_norm_is_measured_and_nothing_is_scaled():
    module, same = twins()
    for each in (module, same):
        each(torch.ones(3, 4)).pow(2).sum().backward()
    norm = clip_gradients(module, 0.0)
    assert norm.item() == pytest.approx(
        math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in same.parameters()))
    )
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(module.parameters(), same.parameters(), strict=True)
    )


def test_a_parameter_without_gradient_does_not_count():
    module = twins()[0]
    module[0].weight.grad = torch.full((5, 4), 2.0)
    assert clip_gradients(module, 1.0).item() == pytest.approx(math.sqrt(20 * 4))
    assert module[0].weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


# ------------------------------------------------------------------ moments split over the ranks


def whole_and_split(name: str) -> dict[str, object]:
    """Train two equal modules on each rank, one with all moments and one with a share of them."""
    settings = OptimizerSettings(name=name, **SETTINGS, weight_decay=0.1)
    with connect("cpu", 60) as world:
        pair = []
        for sharing in (None, world):
            torch.manual_seed(0)
            module = nn.Sequential(*[nn.Linear(16, 16) for _ in range(8)])
            pair.append((module, build_optimizer(module, settings, sharing)))
        same_weights = []
        for step in range(5):
            for module, optimizer in pair:
                scaler = torch.amp.GradScaler("cpu")
                wrapped = world.wrap(module)
                rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(world.rank))
                is_lost = step == 2 and world.rank == 1
                loss = wrapped(rows / 0 if is_lost else rows).pow(2).sum()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = clip_gradients(module, 0.5)
                set_learning_rate(optimizer, 0.01 * (step + 1))
                step_unless(~norm.isfinite(), optimizer)
                optimizer.zero_grad()
            ours, theirs = (list(module.parameters()) for module, _ in pair)
            same_weights.append(all(map(torch.equal, ours, theirs)))
        module, optimizer = pair[1]
        mine = moments(optimizer, module)
        everything = mine | world.collect(mine)
        expected = moments(pair[0][1], pair[0][0])
        return {
            "same": same_weights,
            "finite": all(p.isfinite().all() for p in module.parameters()),
            "mine": sum(t.numel() for key, t in mine.items() if "exp_avg" in key),
            "names": sorted(mine),
            "all": sum(t.numel() for key, t in expected.items() if "exp_avg" in key),
            "collected": world.rank > 0
            or (
                everything.keys() == expected.keys()
                and all(torch.equal(everything[key], expected[key]) for key in expected)
            ),
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("adam", 2), pytest.param("adamw", 4, marks=pytest.mark.slow)]
)
def test_split_moments_give_the_same_weights_and_take_a_share_of_the_memory(name, size):
    """Adam and AdamW, clipped, with a loss scale; the third update is skipped as one is lost."""
    ranks = run_world(size, whole_and_split, name)
    for rank in ranks:
        assert rank["same"] == [True] * 5
        assert rank["finite"]
        assert rank["mine"] == rank["all"] / size
    names = [name for rank in ranks for name in rank["names"]]
    assert len(names) == len(set(names)) == 8 * 2 * 3
    assert ranks[0]["collected"]


def test_a_world_of_one_splits_nothing():
    def be_alone() -> bool:
        with connect("cpu", 60) as world:
            return type(build_optimizer(twins()[0], OptimizerSettings(), world)) is torch.optim.Adam

    assert run_world(1, be_alone) == [True]
