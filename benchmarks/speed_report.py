"""What a contest of trainers showed: JSON values, Markdown tables and a bar chart."""

import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.contest import Contest, Entry, Turn
from benchmarks.peers.turns import Step
from benchmarks.yardstick import Row, table, training_flops
from dtrain.model.settings import ModelSettings

QUIET = 0.1  # cores that may work for others in a round that counts as quiet
OUR_COLOUR, THEIR_COLOUR = "#c2410c", "#64748b"


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, with least and most: `1,523 (1,464 to 1,582)`."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"


def contestant_row(
    entry: Entry, contest: Contest, model: ModelSettings, vocabulary_size: int, ceiling: float
) -> Row:
    """Sum a contestant up; one that was not measured has only the reason why."""
    why = entry.missing or contest.failed.get(entry.name)
    if why:
        return {"contestant": entry.title, "target tokens/s": "not measured", "notes": why}
    turns = contest.turns[entry.name]
    flops = [
        training_flops(
            model, vocabulary_size, turn.total("source_tokens"), turn.total("target_tokens")
        )
        / turn.seconds
        for turn in turns
    ]
    seconds = sum(turn.seconds for turn in turns)
    whole = [sum(turn.total(what) for turn in turns) for what in Step.__dataclass_fields__]
    source, target, source_cells, target_cells, _ = whole
    return {
        "contestant": entry.title,
        "target tokens/s": spread([turn.rate for turn in turns]),
        "per CPU second": spread([turn.cpu_rate for turn in turns]),
        "share of matmul rate": f"{statistics.median(flops) / ceiling:.0%}",
        "target tokens a step": target / sum(len(turn.steps) for turn in turns),
        "fill of source, target": f"{source / source_cells:.1%}, {target / target_cells:.1%}",
        "peak memory MiB": turns[-1].memory_mib,
        "first step after s": contest.starts[entry.name],
        "cores used": sum(turn.cpu_seconds for turn in turns) / seconds,
        "by others": sum(turn.foreign_seconds for turn in turns) / seconds,
        "last loss": turns[-1].total("loss") / len(turns[-1].steps),
        "notes": entry.notes,
    }


def ratio_row(first: Entry, other: Entry, contest: Contest) -> Row:
    """Compare the first contestant with another, round by round."""
    rounds = list(zip(contest.turns[first.name], contest.turns[other.name], strict=True))
    quiet = [(a, b) for a, b in rounds if max(a.foreign_cores, b.foreign_cores) < QUIET]
    by_clock = spread(_ratios(quiet, "rate"), 2) if quiet else "none"
    return {
        f"{first.title} against": other.title,
        "ratio of target tokens/s": spread(_ratios(rounds, "rate"), 2),
        "in quiet rounds": f"{by_clock}, {len(quiet)} of {len(rounds)}",
        "per CPU second": spread(_ratios(rounds, "cpu_rate"), 2),
    }


def _ratios(rounds: Sequence[tuple[Turn, Turn]], name: str) -> list[float]:
    return [getattr(a, name) / getattr(b, name) for a, b in rounds]


def report(
    heading: str,
    contest: Contest,
    entries: Sequence[Entry],
    model: ModelSettings,
    vocabulary_size: int,
    facts: Row,
) -> tuple[dict[str, object], str]:
    """Say it in JSON values and in Markdown.

    Args:
        heading: of the page.
        contest: what happened.
        entries: who was to take part; the first is compared with all others.
        model: whose arithmetic is counted.
        vocabulary_size: of its output layer.
        facts: what describes the machine.
    """
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    medians = {shape: statistics.median(rates) for shape, rates in contest.products.items()}
    ceiling = max(medians.values())
    rows = [contestant_row(e, contest, model, vocabulary_size, ceiling) for e in entries]
    columns = max(rows, key=len)
    rows = [{column: row.get(column, "") for column in columns} for row in rows]
    ratio_rows = list(_ratio_rows(contest, entries))
    product_rows: list[Row] = [
        {
            "matrix product": "x".join(map(str, shape)),
            "GFLOP/s": spread([rate / 1e9 for rate in rates]),
        }
        for shape, rates in contest.products.items()
    ]
    markdown = "\n".join(
        [
            f"# {heading}\n",
            f"`{command}`\n",
            *(f"- {name}: {value}" for name, value in facts.items()),
            f"\nMedian (least to most) of the rounds. In quiet ones less than {QUIET} cores worked "
            "for others. The share is that of the fastest of the matrix products below.\n",
            *(table(each) for each in (ratio_rows, rows, product_rows) if each),
        ]
    )
    results: dict[str, object] = {
        "command": command,
        "machine": facts,
        "ratios": ratio_rows,
        "contestants": rows,
        "products": product_rows,
        "failed": contest.failed,
        "rounds": {name: [asdict(turn) for turn in turns] for name, turns in contest.turns.items()},
    }
    return results, markdown


def _ratio_rows(contest: Contest, entries: Sequence[Entry]) -> Iterator[Row]:
    first, *others = entries
    if first.name in contest.turns:
        yield from (ratio_row(first, e, contest) for e in others if e.name in contest.turns)


def draw(contest: Contest, entries: Sequence[Entry], path: Path, caption: str) -> None:
    """Draw target tokens a second and peak memory as bars, the first contestant in another colour.

    Args:
        contest: what happened.
        entries: who was to take part; those not measured are left to the table.
        path: the picture, .png or .svg.
        caption: below it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [entry for entry in entries if entry.name in contest.turns]
    titles = [entry.title for entry in shown]
    colours = [OUR_COLOUR if entry is entries[0] else THEIR_COLOUR for entry in shown]
    quarters = [quartiles([turn.rate for turn in contest.turns[entry.name]]) for entry in shown]
    middles = [middle for _, middle, _ in quarters]
    reach = [[m - low for low, m, _ in quarters], [high - m for _, m, high in quarters]]
    memory = [contest.turns[entry.name][-1].memory_mib for entry in shown]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 1.2 + 0.45 * len(shown)), width_ratios=(2, 1), layout="constrained"
    )
    left.barh(titles, middles, xerr=reach, color=colours, ecolor="#1e293b", capsize=3)
    for row, (_, middle, high) in enumerate(quarters):  # behind the whisker, which stays free
        left.annotate(
            f"{middle:,.0f}", (high, row), (6, 0), textcoords="offset points", va="center"
        )
    left.set_title("target tokens a second, median and quartiles of the rounds")
    bars = right.barh(titles, memory, color=colours)
    right.bar_label(bars, [f"{value:,.0f}" for value in memory], padding=3)
    right.set_title("peak memory, MiB")
    right.set_yticks([])
    for axes in (left, right):
        axes.margins(x=0.2)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption, fontsize="small", color="#475569")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Give the lower quartile, the median and the upper quartile; one value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
