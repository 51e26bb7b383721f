"""Draw a run's training curve: losses above, validation BLEU below.

python benchmarks/curve.py runs/NAME/metrics.jsonl docs/images/NAME.png
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from dtrain.metrics import read_metrics


def draw(metrics: Path, picture: Path) -> None:
    """Read `metrics.jsonl` and write a PNG."""
    lines = read_metrics(metrics)
    figure = Figure(figsize=(8, 5.2), dpi=150, layout="constrained")
    losses, scores = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for axes, key, label, style in (
        (losses, "train/nll", "training, with dropout", {"color": "#9db8d2", "linewidth": 1.2}),
        (losses, "validation/nll", "validation", {"color": "#1f4e79", "marker": "o", "ms": 4}),
        (
            scores,
            "validation/bleu",
            "validation, greedy",
            {"color": "#b5651d", "marker": "o", "ms": 4},
        ),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    last = [line for line in lines if "validation/bleu" in line][-1]
    scores.annotate(
        f"{last['validation/bleu']:.1f}",
        (last["step"], last["validation/bleu"]),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
    )
    losses.set(title=metrics.parent.name, ylabel="loss, nats a token")
    losses.set_ylim(bottom=0)
    scores.set(xlabel="step", ylabel="BLEU", ylim=(0, last["validation/bleu"] * 1.25))
    figure.savefig(picture)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
