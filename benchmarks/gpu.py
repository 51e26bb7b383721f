"""The one command for everything about dtrain that needs a GPU: checks it and measures it.

    python benchmarks/gpu.py --out DIR

takes at most eight minutes and needs the checkout, torch, and no network: its text is made up on
the spot. Each section runs in a process and a time of its own; if one fails, the others go on and
the exit code is 1. `--device cpu --tiny` goes the same ways without a GPU, to see that they work;
its figures mean nothing.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial, partialmethod
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout is enough

try:
    import torch
    from torch import Tensor, nn

    from benchmarks.yardstick import (
        ROOT,
        Row,
        Shape,
        describe_machine,
        matmul_rate,
        open_training,
        synchronize,
        table,
        training_flops,
        write_corpus,
        write_results,
    )
    from dtrain import checkpoint, train
    from dtrain.batch import Batch
    from dtrain.config import Config
    from dtrain.data.preparation import num_cores, prepare
    from dtrain.data.store import PreparedData
    from dtrain.learner import Learner
    from dtrain.loss import Objective
    from dtrain.model.settings import ModelSettings
    from dtrain.parts import memory_gib, seed_position
    from dtrain.reduction import DdpReduction
except ModuleNotFoundError as missing:
    sys.exit(f"benchmarks/gpu.py needs the Python package {missing.name}, which is not here")

PEAKS = {"H200": 989.5e12, "H100 80GB HBM3": 989.5e12, "A100": 312e12}
"""FLOP/s of dense bf16 matrix products by data sheet, by a part of the device's name."""

MODELS = {
    "base": ModelSettings(),
    "big": ModelSettings(hidden_dim=1024, num_heads=16, feed_forward_dim=4096, dropout=0.3),
    "short": ModelSettings(num_encoder_layers=2, num_decoder_layers=2),
    "tiny": ModelSettings(
        hidden_dim=32,
        num_heads=2,
        feed_forward_dim=64,
        num_encoder_layers=1,
        num_decoder_layers=1,
    ),
}
"""The paper's two, and base with fewer layers, where compiling would take too long."""

FP32_LIMITS = 1e-5, 1e-3
BF16_LIMITS = 1e-3, 0.05
"""How far loss and gradient may be off, relative to their size."""

MODES = {False: "eager", True: "compiled"}


class CheckFailedError(Exception):
    """Something is not as it must be; the rows say how far off."""


@dataclass(frozen=True)
class Task:
    """What is measured, and where.

    Attributes:
        device: cuda or cpu.
        is_tiny: with small numbers of everything, to see that all ways can be gone.
        folder: for text, tokens and runs.
    """

    device: str
    is_tiny: bool
    folder: Path

    @property
    def torch_device(self) -> torch.device:
        """The device as torch names it."""
        return torch.device(self.device)

    @property
    def seconds_a_product(self) -> float:
        """For how long a matrix product is repeated to measure it."""
        return 0.01 if self.is_tiny else 0.3

    @property
    def vocabulary_size(self) -> int:
        """Pieces of the vocabulary that both languages share."""
        return 128 if self.is_tiny else 32_000

    def model(self, name: str) -> ModelSettings:
        """Choose from MODELS."""
        return MODELS["tiny" if self.is_tiny else name]

    def config(
        self, model: ModelSettings, tokens: int, name: str = "run", **settings: object
    ) -> Config:
        """Give the settings of a run, one micro-batch a step; keys as `kernels__compile`."""
        tokens = 128 if self.is_tiny else tokens
        text = {"source": str(self.folder / "train.en"), "target": str(self.folder / "train.de")}
        sections: dict[str, Any] = {
            "run": {"name": name, "dir": str(self.folder / "runs/{name}"), "device": self.device},
            "data": {
                "train": [text],
                "dir": str(self.folder / "prepared"),
                "max_length": min(tokens, 256),
            },
            "vocabulary": {"size": self.vocabulary_size},
            "model": model,
            "batch": {"tokens_per_step": tokens, "tokens_per_micro_batch": tokens},
            "precision": "bf16",
            "kernels": {"compile": False},
            "validation": {"every_steps": 0},
            "checkpoint": {"every_steps": 0},
            "wandb": {"mode": "disabled"},
        }
        for key, value in settings.items():
            section, _, rest = key.partition("__")
            sections[section] = {**sections[section], rest: value} if rest else value
        return Config.model_validate(sections)


# ------------------------------------------------------------------ the sections


def make_data(task: Task) -> Iterator[Row]:
    """Make up text with lengths like WMT 2014's and prepare it as `dtrain prepare` does."""
    begun = time.perf_counter()
    pairs, words, kinds = (400, 6, 200) if task.is_tiny else (60_000, 23, 150_000)
    write_corpus(task.folder, pairs, words, kinds)
    config = task.config(task.model("base"), 4096)
    prepare(config.data, config.vocabulary, Path(config.data.dir), print)
    manifest = PreparedData.open(Path(config.data.dir)).manifest
    split = manifest.splits["train"]
    yield {
        "pairs": split.num_pairs,
        "source tokens a sentence": split.source_tokens / split.num_pairs,
        "target tokens a sentence": split.target_tokens / split.num_pairs,
        "seconds": time.perf_counter() - begun,
    }


def matrix_products(task: Task) -> Iterator[Row]:
    """Measure how fast the device multiplies: a large square, then what the models multiply."""
    tokens, size = (64, 64) if task.is_tiny else (32_768, 8192)
    shapes: list[Shape] = [(size, size, size)]
    for name in ("base", "big"):
        width, inner = task.model(name).hidden_dim, task.model(name).feed_forward_dim
        pieces = task.vocabulary_size
        pairs = [(width, width), (width, 3 * width), (width, inner), (inner, width)]
        shapes += [(tokens, k, n) for k, n in [*pairs, (width, pieces)]]
    for shape in dict.fromkeys(shapes):
        rate = matmul_rate(shape, torch.bfloat16, task.torch_device, task.seconds_a_product)
        yield {
            "bf16 matrix product": "x".join(map(str, shape)),
            "TFLOP/s": rate / 1e12,
            "of the data sheet": share(rate, peak(task.torch_device)),
        }


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
        loss, _ = learner.backward(batch, 1 / batch.num_tokens).tolist()
        named = learner.model.named_parameters()
        return Gradients(
            loss / batch.num_tokens,
            {name: p.grad.detach().double().cpu() for name, p in named if p.grad is not None},
        )


def correctness(task: Task) -> Iterator[Row]:
    """Compare loss and gradients: fp32 with float64 on the CPU, bf16 with fp32; then compiled.

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
    half = gradients(task.config(base, 2048))
    checks.append(compare("base: bf16 against fp32", half, full, BF16_LIMITS))
    yield checks[-1]
    full = gradients(in_fp32(short))
    half = gradients(task.config(short, 2048, kernels__compile=True))
    checks.append(compare("2+2 layers: bf16, compiled, against fp32", half, full, BF16_LIMITS))
    yield checks[-1]
    too_far = [str(check["what"]) for check in checks if not check["within"]]
    if too_far:
        raise CheckFailedError(f"too far off: {'; '.join(too_far)}")


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
        learner.reduction = DdpReduction(world, learner.reduction.objective)
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
    half = 2 if task.is_tiny else 10
    differing = []
    for compiled, mode in MODES.items():
        straight, stopped = (
            partial(
                task.config,
                task.model("short"),
                3136,
                f"{name}-{mode}",
                kernels__compile=compiled,
            )
            for name in ("straight", "stopped")
        )
        begun = time.perf_counter()
        whole = trained(straight, 2 * half)
        trained(stopped, half)
        resumed = trained(stopped, 2 * half)
        yield {
            "mode": mode,
            "steps": f"{2 * half} = {half} + {half}",
            **{f"same {name}": whole[name] == resumed[name] for name in whole},
            "seconds": time.perf_counter() - begun,
        }
        if whole != resumed:
            differing.append(mode)
    if differing:
        raise CheckFailedError(f"a resumed run differs from an uninterrupted one: {differing}")


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


def speed(task: Task, name: str) -> Iterator[Row]:
    """Measure training steps as `dtrain.train` runs them, eager and compiled."""
    size = (64,) * 3 if task.is_tiny else (8192,) * 3
    ceiling = matmul_rate(size, torch.bfloat16, task.torch_device, task.seconds_a_product)
    for tokens in (32_768, 4096):
        for compiled, mode in MODES.items():
            config = task.config(task.model(name), tokens, kernels__compile=compiled)
            yield {"model": name, "mode": mode, **speed_row(task, config, ceiling)}


def speed_row(task: Task, config: Config, ceiling: float) -> Row:
    """Train for some seconds, and say how fast."""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    with open_training(config) as (training, loader):
        steps = iter(loader)

        def run(count: int, seconds: float) -> tuple[int, int, int, float]:
            """Train up to so many steps, or so long; gives steps, tokens a side, and seconds."""
            begun, done, source, target = time.perf_counter(), 0, 0, 0
            while done < count and time.perf_counter() - begun < seconds:
                step = next(steps)
                training.train_step(step, time.perf_counter())
                done += 1
                source += step.plan.num_source_tokens
                target += step.plan.num_target_tokens
            synchronize(training.world.device)
            return done, source, target, time.perf_counter() - begun

        begun = time.perf_counter()
        training.rehearse()
        synchronize(training.world.device)
        discarded = time.perf_counter() - begun
        *_, first = run(1, 1)
        run(2 if task.is_tiny else 5, 60)
        graphs_at_first = graphs["unique_graphs"]
        if training.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        done, source, target, seconds = run(2 if task.is_tiny else 100, 10)
        flops = training_flops(config.model, training.data.vocabulary.target_size, source, target)
        return {
            "tokens a step": config.batch.tokens_per_step,
            "target tokens/s": target / seconds,
            "MFU": share(flops / seconds, peak(training.world.device)),
            "of matmul rate": share(flops / seconds, ceiling),
            "ms a step": 1000 * seconds / done,
            "memory GiB": memory_gib(training.world.device),
            "discarded backward s": discarded,
            "first step s": first,
            "graphs": graphs["unique_graphs"],
            "recompiled later": graphs["unique_graphs"] - graphs_at_first,
        }


def peak(device: torch.device) -> float | None:
    """Look up what the device's data sheet promises, in FLOP/s; None if that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def share(rate: float, whole: float | None) -> str:
    """Say which part of a whole a rate is."""
    return f"unknown ({rate / 1e12:.3g} TFLOP/s)" if whole is None else f"{rate / whole:.1%}"


@dataclass(frozen=True)
class Section:
    """A part of the report: how to measure it, row by row, and the seconds that it may take."""

    title: str
    measure: Callable[[Task], Iterator[Row]]
    seconds: float


SECTIONS = {
    "data": Section("Made-up data", make_data, 60),
    "products": Section("Matrix products", matrix_products, 30),
    "correctness": Section("Correctness", correctness, 90),
    "world": Section("NCCL, a world of one", world_of_one, 45),
    "resume": Section("Resume, bit for bit", resume, 90),
    "base": Section("Training speed, base", partial(speed, name="base"), 200),
    "big": Section("Training speed, big", partial(speed, name="big"), 200),
}
"""In the order in which they are run: what comes last has the time that is left."""


# ------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Result:
    """What came of a section; rows that it gave before it failed are kept."""

    status: Literal["ok", "failed", "skipped"]
    seconds: float
    error: str | None
    rows: list[Row]


def run_section(name: str, task: Task, log: Path, seconds: float) -> Result:
    """Run a section in a process of its own, and end it when its time is over."""
    begun = time.monotonic()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=be_section, args=(name, task, log, there))
    process.start()
    there.close()
    rows = list[Row]()
    while True:
        if not here.poll(max(0.0, begun + seconds - time.monotonic())):
            error = f"it was not done after {seconds:.0f} seconds"
            break
        try:
            is_end, value = here.recv()
        except EOFError:
            error = f"its process died; {log.name} may say why"
            break
        if is_end:
            error = value
            break
        rows.append(value)
    process.kill()
    process.join()
    spent = round(time.monotonic() - begun, 1)
    return Result("failed" if error else "ok", spent, error, rows)


def be_section(name: str, task: Task, log: Path, pipe: Connection) -> None:
    """Measure a section in this process; what it prints goes to the log."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if task.is_tiny:  # to compile for the CPU takes a minute and a C++ compiler
        Objective.compile = partialmethod(nn.Module.compile, backend="eager")  # type: ignore[assignment]
    try:
        for row in SECTIONS[name].measure(task):
            pipe.send((False, row))
        pipe.send((True, None))
    except Exception as error:
        traceback.print_exc()
        pipe.send((True, f"{type(error).__name__}: {error}"))


def measure(names: list[str], task: Task, out: Path, seconds: float) -> bool:
    """Run sections while there is time, and write the report; says whether none failed."""
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "gpu.log").resolve()
    log.unlink(missing_ok=True)
    end = time.monotonic() + seconds
    facts = describe_machine(task.torch_device, num_cores())
    results: dict[str, Result] = {}
    for name in names:
        left = end - time.monotonic()
        if left < 15:
            results[name] = Result("skipped", 0, "no time was left", [])
        else:
            results[name] = run_section(name, task, log, min(SECTIONS[name].seconds, left))
        print(f"{name:12} {results[name].status} {results[name].seconds} s", flush=True)
    values = {"machine": facts, "sections": {name: asdict(r) for name, r in results.items()}}
    write_results(out, "gpu", values, report(facts, results))
    return all(result.status != "failed" for result in results.values())


def report(facts: Row, results: dict[str, Result]) -> str:
    """Lay the results out in Markdown."""
    command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    parts = ["# dtrain on a GPU\n", f"`{command}`\n"]
    parts += [f"- {name}: {value}" for name, value in facts.items()]
    for name, result in results.items():
        parts.append(f"\n## {SECTIONS[name].title}: {result.status}, {result.seconds} s\n")
        if result.error:
            parts.append(f"{result.error}\n")
        if result.rows:
            parts.append(table(result.rows))
    return "\n".join(parts) + "\n"


def main() -> int:
    """Check and measure; the exit code is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small numbers of everything")
    parser.add_argument("--only", action="append", choices=[n for n in SECTIONS if n != "data"])
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; `--device cpu --tiny` only checks the script itself")
    names = [name for name in SECTIONS if name in ("data", *(options.only or SECTIONS))]
    with tempfile.TemporaryDirectory() as folder:
        task = Task(options.device, options.tiny, Path(folder))
        return 0 if measure(names, task, options.out, 60 * options.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
