"""How training would scale from 1 to 1024 GPUs, by arithmetic: step times, efficiency, what to set.

    python benchmarks/scaling.py              predictions alone: a few seconds
    python benchmarks/scaling.py --measure    also trains on one and two CPU ranks, to check the law

The law is `benchmarks/scaling_law.py`.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout is enough

from benchmarks.scaling_law import (
    FIXED,
    H200,
    MLPERF_FIXED,
    MLPERF_SECONDS_PER_TOKEN,
    MODELS,
    Model,
    Settings,
    efficiency,
    replay,
    step_seconds,
)
from benchmarks.yardstick import ROOT, Row, table, write_results

NUM_GPUS = tuple(2**i for i in range(11))
SHOWN_GPUS = (8, 16, 64, 256, 1024)
TOKENS = (3_125, 12_500, 25_000, 50_000)  # the first: the paper's 25,000 on eight GPUs
ONE_BUCKET = 1000
BUCKETS: tuple[Literal["auto"] | int, ...] = ("auto", 50, 100, 200, ONE_BUCKET)
DEFAULTS = Settings()
CHOICES = [
    Settings(dtype, size, shard)
    for shard in (False, True)
    for dtype in ("fp32", "bf16")
    for size in BUCKETS
]
"""What may be set, from what needs least thought."""
WORTH = 0.01
"""Of a step: what a choice must gain to be advised."""
COLOURS = ("#c2410c", "#0891b2", "#4338ca", "#1e293b")
"""Of the numbers of tokens; each darker than the one before, for eyes that see no hue."""


def advised(model: Model, num_gpus: int, tokens: float) -> Settings:
    """Choose the plainest settings that are nearly as quick as the quickest."""

    def seconds(settings: Settings) -> float:
        return step_seconds(H200, model, settings, num_gpus, tokens)

    best = min(map(seconds, CHOICES))
    return next(s for s in CHOICES if seconds(s) <= best / (1 - WORTH))


def advice() -> list[Row]:
    """Lay out what to set, with one column for each number of GPUs."""
    rows = list[Row]()
    for name, model in MODELS.items():
        for tokens in TOKENS:
            row: Row = {"model": name, "tokens a GPU": tokens}
            for num_gpus in SHOWN_GPUS:
                chosen = advised(model, num_gpus, tokens)
                words = [chosen.gradient_dtype, str(chosen.bucket_mb)]
                words += ["ZeRO-1"] * chosen.shard_optimizer
                row[f"{num_gpus} GPUs"] = "" if chosen == DEFAULTS else ", ".join(words)
            rows.append(row)
    return rows


def predictions() -> Iterator[Row]:
    """Predict each model's step by default and as advised; with few tokens otherwise too."""
    others = {
        "fp32, one bucket": Settings("fp32", ONE_BUCKET),
        "bf16, one bucket": Settings("bf16", ONE_BUCKET),
        "defaults, ZeRO-1": replace(DEFAULTS, shard_optimizer=True),
        "defaults, steps differ by 3 %": replace(DEFAULTS, spread=0.03),
        "defaults, compiled": replace(DEFAULTS, fixed_seconds=FIXED["compiled"]),
        "defaults, eager": replace(DEFAULTS, fixed_seconds=FIXED["eager"]),
    }
    for (name, model), tokens in itertools.product(MODELS.items(), TOKENS):
        for num_gpus in NUM_GPUS:
            chosen = {"defaults": DEFAULTS, "advised": advised(model, num_gpus, tokens)}
            kinds = chosen | (others if tokens == TOKENS[0] else {})
            for kind, settings in kinds.items():
                seconds = step_seconds(H200, model, settings, num_gpus, tokens)
                yield {
                    "model": name,
                    "tokens a GPU": tokens,
                    "GPUs": num_gpus,
                    "settings": kind,
                    "step ms": 1e3 * seconds,
                    "efficiency": efficiency(H200, model, settings, num_gpus, tokens),
                    "target tokens/s": num_gpus * tokens / seconds,
                }


def by_gpus(rows: Sequence[Row], tokens: Sequence[int], value: str) -> list[Row]:
    """Lay a value of predictions out with one column for each number of GPUs."""
    found = dict[tuple[object, ...], Row]()
    for row in rows:
        if row["tokens a GPU"] in tokens and row["GPUs"] in SHOWN_GPUS:
            keys = {key: row[key] for key in ("model", "tokens a GPU", "settings")}
            cell = row[value]
            assert isinstance(cell, float)
            line = found.setdefault(tuple(keys.values()), keys)
            line[f"{row['GPUs']} GPUs"] = f"{cell:.0%}" if value == "efficiency" else cell
    return list(found.values())


# ------------------------------------------------------------------ the command


def report(
    rows: Sequence[Row], measured: Sequence[Row], facts: Row
) -> tuple[dict[str, object], str]:
    """Say it in JSON values and in Markdown."""
    command = shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]])
    plain = [row for row in rows if row["settings"] in ("defaults", "advised")]
    markdown = "\n".join(
        [
            "# Scaling on paper\n",
            f"`{command}`\n",
            "Predicted for H200s, eight in a machine, in bf16, with a CUDA graph's fixed time "
            "unless said otherwise. Nothing of it was measured on a GPU; what goes into it stands "
            "in `benchmarks/scaling_law.py`, each number with its source.\n",
            "## What to set\n",
            "`distributed.gradient_dtype` and `distributed.bucket_mb`, where they gain more than "
            f"{WORTH:.0%} of a step over the defaults (empty: nothing to set). More than one "
            "machine's GPUs wait for each bucket's latency: fewer, larger buckets. "
            f"{ONE_BUCKET} MiB is all at once. `shard_optimizer` gains no time anywhere: it saves "
            "memory alone.\n",
            table(advice()),
            "## Efficiency: against one GPU with as many tokens\n",
            table(by_gpus(plain, TOKENS, "efficiency")),
            f"## Other settings, {TOKENS[0]:,} tokens a GPU: ms a step\n",
            "A step that is slow for another reason hides more of the exchange, and so has the "
            "better efficiency: only times compare.\n",
            table(by_gpus(rows, TOKENS[:1], "step ms")),
            "## Published: MLPerf 0.7, Transformer-big on A100s\n",
            f"A step takes {1e3 * MLPERF_FIXED:.1f} ms and {1e6 * MLPERF_SECONDS_PER_TOKEN:.2f} us "
            "a token: two numbers for five systems; exchange is in the first.\n",
            table(replay()),
            *measured_part(measured, facts),
        ]
    )
    results: dict[str, object] = {
        "command": command,
        "predictions": list(rows),
        "advice": advice(),
        "mlperf": replay(),
        "machine": facts,
        "measured": list(measured),
    }
    return results, markdown


def measured_part(measured: Sequence[Row], facts: Row) -> list[str]:
    """Say how the law did on CPU ranks, if it was tried."""
    if not measured:
        return []
    return [
        "## Measured: two CPU ranks of one thread each\n",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "\nThe law was given a line through the step times of one rank, and the time of an "
        "all-reduce of as many bytes as the gradients'. Medians, ms. `alone`: the other core "
        "idle. `both apart`: two ranks at once that exchange nothing, the slower one of each "
        "step. `from apart`: the law on these instead, so that sharing the machine is no part of "
        "the error.\n",
        table(measured),
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw efficiency over the number of GPUs, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(MODELS), figsize=(11, 4.6), sharey=True, layout="constrained"
    )
    for axes, name in zip(panels, MODELS, strict=True):
        free = 100.0  # where the next label has room
        for tokens, colour in list(zip(TOKENS, COLOURS, strict=True))[::-1]:
            for kind, style in (("defaults", (0, (1, 1.2))), ("advised", "-")):
                values = [
                    100 * float(str(row["efficiency"]))
                    for row in rows
                    if (row["model"], row["tokens a GPU"], row["settings"]) == (name, tokens, kind)
                ]
                axes.plot(NUM_GPUS, values, color=colour, linestyle=style, linewidth=1.8)
            place = min(values[-1], free)
            axes.text(NUM_GPUS[-1] * 1.1, place, f"{tokens:,}", color=colour, va="center")
            free = place - 4.5
        axes.set_title(f"Transformer-{name}: target tokens a GPU at the right")
        axes.set_xscale("log", base=2)
        axes.set_xticks(NUM_GPUS, [f"{count}" for count in NUM_GPUS])
        axes.set_xlim(1, 1024 * 2.2)
        axes.set_ylim(0, 103)
        axes.set_xlabel("GPUs, eight in a machine")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("efficiency, %")
    figure.supxlabel(
        "Predicted, not measured. Solid: settings as advised; dotted: defaults (fp32, 25 MiB).",
        fontsize="small",
        color="#475569",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Predict, measure if asked to, print, write and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="check the law on two CPU ranks")
    parser.add_argument("--rounds", type=int, default=10, help="of measuring")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    measured, facts = list[Row](), Row()
    if options.measure:
        from benchmarks.scaling_measured import measure

        measured, facts = measure(options.rounds)
    rows = list(predictions())
    write_results(options.out, "scaling", *report(rows, measured, facts))
    draw(rows, options.out / "scaling.png")


if __name__ == "__main__":
    main()
