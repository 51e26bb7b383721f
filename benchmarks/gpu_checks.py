"""What must be right on a GPU: its own tests, dropout, gradients, collectives, a resumed run."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_task import FUSED, PLAIN, CheckFailedError, Task, attempted
from benchmarks.yardstick import ROOT, Row, open_training, synchronize
from dtrain import checkpoint, train
from dtrain.batch import Batch
from dtrain.config import Config
from dtrain.learner import Learner
from dtrain.parts import seed_position
from dtrain.reduction import DdpReduction

FP32_LIMITS = 1e-5, 1e-3
BF16_LIMITS = 1e-3, 0.05
"""How far loss and gradient may be off, relative to their size."""

TESTS_SECONDS = 170

WAYS: dict[str, dict[str, bool]] = {
    "eager": {},
    "recorded": {"cuda_graph": True},
    "compiled": {"compile": True},
}

# ------------------------------------------------------------------ the tests that need a GPU


def gpu_test_files() -> list[Path]:
    """List the files with tests for a GPU, without those of the benchmarks themselves."""
    paths = (ROOT / "tests").glob("test_*.py")
    return [
        path
        for path in sorted(paths)
        if "benchmark" not in path.name
        and re.search(r"mark\.(gpu|any_device)", path.read_text(encoding="utf-8"))
    ]


def gpu_tests(_task: Task) -> Iterator[Row]:
    """Run the tests that need a GPU and those that take one; their output goes to the log."""
    marks = "(gpu or any_device) and not exhaustive"
    options = ["-m", marks, "-v", "--tb=short", "-p", "no:cacheprovider", "-W", "default"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, gpu_test_files())]
    begun, output, why = time.perf_counter(), "", ""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_SECONDS, check=False
        )
        output = done.stdout + done.stderr
        if done.returncode:
            why = f"pytest ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode() + (error.stderr or b"").decode()
        why = f"the tests were not done after {TESTS_SECONDS} seconds"
    sys.stdout.write(output)
    sys.stdout.flush()
    outcomes = re.findall(r"^\S+::.*? (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
    counts = {kind.lower(): outcomes.count(kind) for kind in ("PASSED", "FAILED", "SKIPPED")}
    yield {"test": "all together", **counts, "seconds": time.perf_counter() - begun}
    for name, message in re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", output, re.MULTILINE):
        yield {"test": name, "failed because": message}
    if why:
        lines = output.strip().splitlines() or [""]
        raise CheckFailedError(f"{why}: {lines[-1]}")


# ------------------------------------------------------------------ dropout, compiled


def compiled_dropout(task: Task) -> Iterator[Row]:
    """Look at masks under torch.compile, with torch's own random numbers and with Inductor's.

    Only torch's own are used, and must be right; whether Inductor's are is good to know.
    """
    wrong = False
    for name, own in (("torch's own", True), ("Inductor's", False)):
        with torch._inductor.config.patch(fallback_random=own):
            row = masks(task.compile(two_sites), task)
        wrong |= own and not all(value for value in row.values() if isinstance(value, bool))
        yield {"random numbers": name, **row}
    if wrong:
        raise CheckFailedError("compiled dropout is not what it is uncompiled")


def two_sites(x: Tensor) -> tuple[Tensor, Tensor]:
    """Drop elements twice, each time others."""
    return F.dropout(x, 0.1), F.dropout(x, 0.1)


def masks(function: Callable[[Tensor], tuple[Tensor, Tensor]], task: Task) -> Row:
    """Compare a compiled function's masks with each other, with its gradient, and with eager."""
    shape, device = (task.tokens, 512), task.torch_device
    ones = torch.ones(shape, device=device).requires_grad_()
    grads = [torch.rand(shape, device=device) for _ in range(2)]

    def run(
        function: Callable[[Tensor], tuple[Tensor, Tensor]], seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        one, two = function(ones)
        return one.detach(), two.detach(), torch.autograd.grad((one, two), ones, grads)[0]

    one, two, gradient = run(function, 1)
    again, other, eager = run(function, 1), run(function, 2), run(two_sites, 1)
    dropped = (one == 0).float().mean().item()
    return {
        "as eager": torch.equal(one, eager[0]) and torch.equal(two, eager[1]),
        "backward drops the same": torch.allclose(gradient, one * grads[0] + two * grads[1]),
        "sites differ": not torch.equal(one, two),
        "seed decides": torch.equal(one, again[0]) and not torch.equal(one, other[0]),
        "dropped": f"{dropped:.2%} of 10%",
        "dropped as many": abs(dropped - 0.1) < 5 * (0.09 / ones.numel()) ** 0.5,
    }


# ------------------------------------------------------------------ loss and gradients


@dataclass(frozen=True)
class Gradients:
    """What one backward gives: the loss, nats a token, and each parameter's gradient, float64."""

    loss: float
    of: dict[str, Tensor]


def gradients(config: Config, in_float64: bool = False) -> Gradients:
    """Run the trainer's forward and backward over the plan's first micro-batch."""
    torch._dynamo.reset()
    with open_training(config) as (training, loader):
        learner = training.learner
        if in_float64:
            learner.model.double()
        _, batch = next(iter(loader)).micro_batches[0]
        if config.kernels.cuda_graph is True:
            learner.record(batch.to(training.world.device))
        loss, _ = learner.backward(batch, 1 / batch.num_tokens).tolist()
        named = learner.model.named_parameters()
        return Gradients(
            loss / batch.num_tokens,
            {name: p.grad.detach().double().cpu() for name, p in named if p.grad is not None},
        )


def correctness(task: Task) -> Iterator[Row]:
    """Compare loss and gradients: fp32 with float64 on the CPU, bf16 with fp32, in all ways.

    bf16 keeps eight bits of each number: gradients differ by some percent; by a mistake, far more.
    """
    base, short = (
        task.model(name).model_copy(update={"dropout": 0.0}) for name in ("base", "short")
    )
    in_fp32 = partial(task.config, tokens=2048, precision="fp32")
    full = gradients(in_fp32(base))
    exact = gradients(in_fp32(base, run__device="cpu"), in_float64=True)
    checks = [compare("base: fp32 against float64", full, exact, FP32_LIMITS)]
    yield checks[-1]
    full_short = gradients(in_fp32(short))
    for fused, way in [(False, "eager"), (True, "eager"), (True, "recorded"), (True, "compiled")]:
        if task.device == "cpu" and fused and way != "compiled":
            continue  # there it is what the way before was
        model, twin = (base, full) if way == "eager" else (short, full_short)
        kernels = task.kernels(FUSED if fused else PLAIN, **WAYS[way])
        size = "base" if way == "eager" else "2+2 layers"
        what = f"{size}: bf16, {way}, {'fused' if fused else 'plain'}, against fp32"
        config = task.config(model, 2048, kernels=kernels)
        checks.append(attempted({"what": what}, partial(compare_in_bf16, what, config, twin)))
        yield checks[-1]
    too_far = [str(check["what"]) for check in checks if not check.get("within")]
    if too_far:
        raise CheckFailedError(f"too far off: {'; '.join(too_far)}")


def compare_in_bf16(what: str, config: Config, expected: Gradients) -> Row:
    """Compare a configuration's gradients with those in fp32."""
    return compare(what, gradients(config), expected, BF16_LIMITS)


def compare(what: str, found: Gradients, expected: Gradients, limits: tuple[float, float]) -> Row:
    """Give relative differences of loss and gradient, and whether they are within limits."""
    loss = abs(found.loss - expected.loss) / abs(expected.loss)
    off = {name: (found.of[name] - gradient).norm() for name, gradient in expected.of.items()}
    norms = {name: gradient.norm() for name, gradient in expected.of.items()}
    total = float(torch.stack([*off.values()]).norm() / torch.stack([*norms.values()]).norm())
    worst = max(off, key=lambda name: float(off[name] / norms[name]))
    return {
        "what": what,
        "loss": found.loss,
        "loss off by": f"{loss:.1e} of {limits[0]:.0e}",
        "gradient off by": f"{total:.1e} of {limits[1]:.0e}",
        "within": loss <= limits[0] and total <= limits[1],  # a nan is not
        "worst parameter": f"{worst}, {float(off[worst] / norms[worst]):.1e}",
    }


# ------------------------------------------------------------------ a world of one, and a resume


def world_of_one(task: Task) -> Iterator[Row]:
    """Let NCCL do all that it does among many ranks, with one: sums, agreement, gradients."""
    as_torchrun = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # any that is free
    }
    config = task.config(task.model("short"), 2048)
    with mock.patch.dict(os.environ, as_torchrun), open_training(config) as (training, loader):
        # World skips what a single rank needs not do, so it is told of another.
        world = replace(training.world, size=2)
        numbers = torch.arange(2**10 if task.is_tiny else 2**26, device=world.device) / 7
        begun = time.perf_counter()
        same = torch.equal(world.sum(numbers.clone()), numbers)
        synchronize(world.device)
        yield {"what": "sum over ranks", "right": same, "seconds": time.perf_counter() - begun}
        agreed = world.agree(3, True, False) == (True, False)
        yield {"what": "agreement", "right": agreed}

        _, batch = next(iter(loader)).micro_batches[0]
        learner = training.learner
        alone = gradients_of(learner, batch)
        learner.reduction = DdpReduction(world, learner.reduction.objective, config.distributed)
        reduced = gradients_of(learner, batch)
        equal = all(torch.equal(reduced[name], gradient) for name, gradient in alone.items())
        yield {"what": "gradients through DistributedDataParallel", "right": equal}
    if not (same and agreed and equal):
        raise CheckFailedError("a collective changed what it should have left alone")


def gradients_of(learner: Learner, batch: Batch) -> dict[str, Tensor]:
    """Give each parameter's gradient over a micro-batch, dropout included."""
    learner.optimizer.zero_grad(set_to_none=True)
    seed_position(1, 1, 0)
    learner.backward(batch, 1 / batch.num_tokens)
    named = learner.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def resume(task: Task) -> Iterator[Row]:
    """Train 2N steps at once, and N and N: deterministic, so that every bit must be the same."""
    differing = []
    for way, others in WAYS.items():
        if task.device == "cpu" and way == "recorded":
            continue
        row = attempted({"way": way}, partial(resume_row, task, way, others))
        yield row
        if not (row.get("same weights") and row.get("same moments")):
            differing.append(way)
    if differing:
        raise CheckFailedError(f"a resumed run differs from an uninterrupted one: {differing}")


def resume_row(task: Task, way: str, others: dict[str, bool]) -> Row:
    """Train whole and in halves."""
    half = 2 if task.is_tiny else 10
    kernels = task.kernels(FUSED, **others)
    straight, stopped = (
        partial(task.config, task.model("short"), 3136, f"{name}-{way}", kernels=kernels)
        for name in ("straight", "stopped")
    )
    begun = time.perf_counter()
    whole = trained(straight, 2 * half)
    trained(stopped, half)
    resumed = trained(stopped, 2 * half)
    return {
        "steps": f"{2 * half} = {half} + {half}",
        **{f"same {name}": whole[name] == resumed[name] for name in whole},
        "seconds": time.perf_counter() - begun,
    }


def trained(config: Callable[..., Config], max_steps: int) -> dict[str, str]:
    """Train as `python -m dtrain.train` does; gives SHA-256 of weights and moments at the end."""
    torch._dynamo.reset()  # a restart finds nothing compiled
    settings = config(run__max_steps=max_steps)
    train.run(settings)
    newest = checkpoint.steps_saved(settings.run_dir / "checkpoints")[0]
    files = json.loads((newest / checkpoint.MANIFEST).read_text(encoding="utf-8"))["files"]
    return {
        "weights": files[checkpoint.MODEL]["sha256"],
        "moments": files[checkpoint.OPTIMIZER]["sha256"],
    }
