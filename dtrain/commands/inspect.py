"""`dtrain inspect`: run one step of a run again, and look at every layer."""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.commands.translate import positive

if TYPE_CHECKING:
    from dtrain.inspection import Inspection
    from dtrain.rerun import MicroBatch
    from dtrain.watch import Tally


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, e.g. runs/demo")
    parser.add_argument("--step", type=positive, required=True, metavar="N", help="which step")
    parser.add_argument(
        "--micro-batch", type=natural, metavar="I", help="only this one, from 0 (default: all)"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="STEP|best|last",
        help="whose weights (default: the newest before the step, else the initial ones)",
    )
    parser.add_argument(
        "--text", action="store_true", help="show the sentences, each with its loss, worst first"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="where to compute (default: as in the run; another draws other dropout)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Print what the step did, for a person or as JSON; writes nothing."""
    from dtrain.inspection import inspect_step

    seen = inspect_step(
        arguments.run,
        arguments.step,
        arguments.checkpoint,
        arguments.micro_batch,
        arguments.text,
        arguments.device,
    )
    text = json.dumps(facts(seen), ensure_ascii=False) if arguments.json else report(seen)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def natural(text: str) -> int:
    """Read a number from 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def report(seen: "Inspection") -> str:
    """Lay it out for reading."""
    parts = seen.micro_batches
    tokens, sentences = sum(p.tokens for p in parts), sum(len(p.ids) for p in parts)
    chosen = f"{len(parts)}" if len(parts) == seen.step_size else f"1 of {seen.step_size}"
    lines = [
        f"step        {seen.step} of {seen.run}, epoch {seen.epoch}: {chosen} micro-batches, "
        f"{sentences:,} sentences, {tokens:,} target tokens",
        f"weights     {seen.checkpoint or 'the initial ones'}, {_age(seen.age)}",
        f"computed    on {seen.device} in {seen.precision}",
        *(f"note        {notice}" for notice in seen.notices),
        f"loss        {seen.loss:.6f}   nll {seen.nll:.6f}   "
        f"gradient norm {seen.gradient_norm:.6g}",
        f"not finite  {seen.first_not_finite and 'first '}{seen.first_not_finite or 'nothing'}",
        "",
        f"{'':20}{'weights':>11}{'gradient':>22}{'output':>22}{'not finite: weights':>23}",
        f"{'layer':20}{'norm':>11}{'norm':>11}{'largest':>11}{'rms':>11}{'largest':>11}"
        f"{'/ gradient / output':>23}",
    ]
    for layer in seen.layers:
        own, output = bool(layer.parameters), layer.output.count > 0
        numbers = [
            _number(layer.weights.norm, own),
            _number(layer.gradient.norm, own),
            _number(layer.gradient.largest, own),
            _number(layer.output.rms, output),
            _number(layer.output.largest, output),
        ]
        not_finite = (f"{t.not_finite:,}" for t in (layer.weights, layer.gradient, layer.output))
        lines.append(f"{layer.name:20}{''.join(numbers)}{' / '.join(not_finite):>23}")
    lines += [
        "",
        "micro-batch  sentences  tokens        loss         nll  gradient norm  not finite",
    ]
    for part in parts:
        lines.append(
            f"{part.index:11}{len(part.ids):11,}{part.tokens:8,}{part.loss:12.6f}{part.nll:12.6f}"
            f"{part.gradient.norm:15.6g}{part.gradient.not_finite:12,}"
        )
    for part in parts:
        lines += _text(part)
    return "\n".join(lines)


def facts(seen: "Inspection") -> dict[str, Any]:
    """Give it as JSON holds it; what JSON has no number for as in metrics.jsonl."""
    return {
        "run": str(seen.run),
        "step": seen.step,
        "epoch": seen.epoch,
        "checkpoint": seen.checkpoint,
        "weights_step": seen.weights_step,
        "weights_age": seen.age,
        "device": seen.device,
        "precision": seen.precision,
        "notices": seen.notices,
        "tokens": sum(part.tokens for part in seen.micro_batches),
        "loss": _plain(seen.loss),
        "nll": _plain(seen.nll),
        "gradient_norm": _plain(seen.gradient_norm),
        "first_not_finite": seen.first_not_finite or None,
        "layers": [
            {
                "name": layer.name,
                "weights": _tally(layer.weights),
                "gradient": _tally(layer.gradient),
                "output": _tally(layer.output),
            }
            for layer in seen.layers
        ],
        "micro_batches": [
            {
                "index": part.index,
                "sentence_ids": part.ids,
                "tokens": part.tokens,
                "loss": _plain(part.loss),
                "nll": _plain(part.nll),
                "gradient": _tally(part.gradient),
                "sentences": [vars(s) | {"loss": _plain(s.loss)} for s in part.sentences],
            }
            for part in seen.micro_batches
        ],
    }


def _age(age: int) -> str:
    if age == 0:
        return "the very ones that the step began with"
    steps = f"{abs(age):,} step{'s' if abs(age) > 1 else ''}"
    return f"{steps} {'older' if age > 0 else 'newer'} than those that the step began with"


def _number(value: float, there: bool) -> str:
    return f"{value:11.4g}" if there else f"{'-':>11}"


def _text(part: "MicroBatch") -> list[str]:
    """Tell the sentences of a micro-batch, if they were asked for."""
    lines = ["", f"micro-batch {part.index}"] if part.sentences else []
    for sentence in part.sentences:
        lines += [
            f"  sentence {sentence.id}: {sentence.tokens} tokens, loss {sentence.loss:.4f} a token",
            f"    source  {sentence.source}",
            f"    target  {sentence.target}",
        ]
    return lines


def _plain(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def _tally(tally: "Tally") -> dict[str, float]:
    return {
        "count": tally.count,
        "norm": tally.norm,
        "rms": tally.rms,
        "largest": tally.largest,
        "not_finite": tally.not_finite,
    }
