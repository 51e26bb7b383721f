"""`dtrain schedule`: draw the learning rate of a config."""

import argparse
from pathlib import Path

from dtrain.config import Config, explain_settings, load_config
from dtrain.errors import UserError
from dtrain.schedule import learning_rate

POINTS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    explain_settings(parser)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML settings")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="picture to write, .png, .svg or .pdf (default: NAME-schedule.png)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Write the picture and say where."""
    config = load_config(arguments.config, arguments.overrides)
    out = arguments.out or Path(f"{arguments.config.stem}-schedule.png")
    draw(config, out)
    print(f"wrote {out}")
    return 0


def draw(config: Config, out: Path) -> None:
    """Draw the learning rate over the steps of a run.

    Raises:
        UserError: if matplotlib is not installed, or the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'dtrain[plot]'") from None

    last, warmup = config.run.max_steps or 100_000, config.schedule.warmup_steps
    steps = sorted({1, warmup or 1, last, *range(1, last + 1, max(1, last // POINTS))})
    settings = config.schedule, config.optimizer.learning_rate, config.model.hidden_dim, last
    rates = [learning_rate(step, *settings) for step in steps]
    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, rates, color="#2b6cb0", linewidth=2)
    peak = max(rates)
    at = steps[rates.index(peak)]
    axes.plot([at], [peak], "o", color="#2b6cb0", clip_on=False)
    axes.annotate(
        f"{peak:.2e} at step {at:,}",
        (at, peak),
        xytext=(0, 7),
        textcoords="offset points",
        ha="left" if at < last / 2 else "right",
    )
    rise = f"{warmup:,} steps of warm-up" if warmup else "no warm-up"
    axes.set(
        title=f"{config.run.name}: {config.schedule.name}, {rise}",
        xlabel="step",
        ylabel="learning rate",
        xlim=(0, last),
        ylim=(0, peak * 1.12),
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:  # no such directory, or no such format
        raise UserError(f"--out {out}: {error}") from None
