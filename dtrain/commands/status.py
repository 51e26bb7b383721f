"""`dtrain status`: where a run stands, what became of its attempts, what happens next."""

import argparse
import itertools
import json
import os
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.errors import UserError

if TYPE_CHECKING:
    from dtrain.peers import Sign
    from dtrain.run_directory import Attempt, RunDirectory

ATTEMPTS_SHOWN = 5
WHY_SHOWN = 80  # characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, e.g. runs/demo")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--verdict", action="store_true", help="print one word: completed, requeue or stop"
    )


def main(arguments: argparse.Namespace) -> int:
    """Print the status for a person, as JSON, or as the one word that scripts act on.

    Raises:
        UserError: if there is no such run, unless only the verdict is asked for.
    """
    from dtrain.run_directory import RunDirectory
    from dtrain.verdict import verdict

    run = RunDirectory(arguments.run)
    if arguments.verdict:
        print(verdict(run, os.environ))
        return 0
    if not any(path.exists() for path in (run.config_file, run.status_file, run.identity_file)):
        raise UserError(f"{run.path} is not a run directory: it has no {run.config_file.name}")
    found = facts(run)
    print(json.dumps(found) if arguments.json else table(found))
    return 0


def facts(run: "RunDirectory") -> dict[str, Any]:
    """Gather all there is to know, as JSON values."""
    from dtrain.checkpoint import steps_saved
    from dtrain.lock import silence_of_holder
    from dtrain.metrics import read_metrics
    from dtrain.verdict import explain, verdict

    status, attempts = run.read_status(), run.attempts()
    running = running_now(run, len(attempts))
    if attempts and attempts[-1].status is None and not running:
        last_beat = time.time() - (silence_of_holder(run.path) or time.time())
        run.presume_killed(len(attempts), attempts[-1], last_beat)
    config = run.config if run.config_file.exists() else None
    lines = read_metrics(run.path / "metrics.jsonl")
    saved = steps_saved(run.checkpoints)[::-1]
    good = next((path for path in reversed(saved) if has_all_files(path)), None)
    metric = config.validation.metric if config else "bleu"
    return {
        "run": str(run.path),
        **{key: status.get(key) for key in ("status", "step", "exit_code", "why")},
        "verdict": verdict(run, os.environ),
        "next": explain(run, os.environ),
        "max_steps": config.run.max_steps if config else 0,
        "metric": metric,
        "epoch": next((line["epoch"] for line in reversed(lines) if "epoch" in line), None),
        "last_metrics": lines[-1] if lines else {},
        "speed": next((x for x in reversed(lines) if "train/tokens_per_second" in x), {}),
        "best": best_of(lines, metric),
        "checkpoints": [path.name for path in saved],
        "last_checkpoint": good.name if good else None,
        "last_checkpoint_age_seconds": time.time() - good.stat().st_mtime if good else None,
        "set_aside": sorted(path.name for path in run.checkpoints.glob("*.corrupt")),
        "attempts": [asdict(attempt) for attempt in attempts],
        "running": running,
        "goodput": goodput(attempts, good, time.time() if running else None),
    }


def has_all_files(checkpoint: Path) -> bool:
    """Whether a checkpoint's files are there with the sizes of its manifest; none is hashed."""
    from dtrain.checkpoint import MANIFEST

    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {name: (checkpoint / name).stat().st_size for name in files}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(sizes[name] == files[name]["size"] for name in files)


def best_of(lines: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Find the line of metrics with the best validation; empty if there was none."""
    key, sign = f"validation/{metric}", -1 if metric == "nll" else 1
    judged = [line for line in lines if key in line]
    return max(judged, key=lambda line: sign * float(line[key]), default={})


def running_now(run: "RunDirectory", attempt: int) -> dict[str, Any] | None:
    """Say who trains in the directory at this moment, if anybody does."""
    from dtrain.lock import STALE_SECONDS, read_holder, silence_of_holder

    holder, silence = read_holder(run.path), silence_of_holder(run.path)
    if holder is None or silence is None or holder.is_gone or silence > STALE_SECONDS:
        return None
    return {
        "by": holder.describe(),
        "host": holder.host,
        "process": holder.process,
        "job": holder.job,
        "silence_seconds": silence,
        "ranks": where_ranks_are(run.signs(attempt)),
    }


def where_ranks_are(signs: Sequence["Sign"]) -> list[dict[str, Any]]:
    """Put ranks together that are at the same place, the hindmost first."""

    def place(sign: "Sign") -> tuple[int, str]:
        return sign.step, sign.phase

    groups = itertools.groupby(sorted(signs, key=place), key=place)
    return [
        {"step": step, "phase": phase, "ranks": sorted(sign.rank for sign in group)}
        for (step, phase), group in groups
    ]


def goodput(
    attempts: Sequence["Attempt"], checkpoint: Path | None, now: float | None
) -> dict[str, float] | None:
    """Compare the seconds spent in steps that count with those that passed.

    A step counts once it is in a checkpoint, so that what runs now is measured up to that.

    Args:
        attempts: of the run.
        checkpoint: the newest good one.
        now: Unix seconds, if an attempt is running.

    Returns:
        `train_seconds`, and shares: `while_running`, of the time that attempts ran, and
        `since_first_start`. None if it is not known.
    """
    from dtrain.checkpoint import read_state

    if checkpoint is None or not attempts:
        return None
    train_seconds = read_state(checkpoint).get("progress", {}).get("train_seconds")
    if train_seconds is None:
        return None
    *earlier, last = attempts
    saved = checkpoint.stat().st_mtime
    end = last.ended or (saved if saved > last.time else now or last.time)
    ran = sum((a.ended or a.time) - a.time for a in earlier) + end - last.time
    return {
        "train_seconds": train_seconds,
        "while_running": train_seconds / max(ran, train_seconds, 1e-9),
        "since_first_start": train_seconds / max(end - attempts[0].time, train_seconds, 1e-9),
    }


def table(found: dict[str, Any]) -> str:
    """Lay the facts out for reading, in one screen."""
    lines = [("run", found["run"]), ("status", _status(found))]
    if found["running"]:
        alive = _duration(found["running"]["silence_seconds"])
        lines.append(("", f"{found['running']['by']}, last seen alive {alive} ago"))
        for place in found["running"]["ranks"]:
            phase = place["phase"].replace("_", " ")
            lines.append(("", f"{_ranks(place['ranks'])} at step {place['step']}, {phase}"))
    lines.append(("step", _step(found)))
    if found["speed"]:
        lines.append(("speed", _speed(found["speed"])))
    if found["best"]:
        name = {"bleu": "BLEU", "chrf": "chrF", "nll": "loss"}[found["metric"]]
        score = found["best"][f"validation/{found['metric']}"]
        lines.append((f"best {name}", f"{score:.2f} at step {found['best']['step']}"))
    lines.append(("checkpoint", _checkpoint(found)))
    lines.append(("attempts", str(len(found["attempts"]))))
    numbered = list(enumerate(found["attempts"], start=1))
    for number, attempt in numbered[-ATTEMPTS_SHOWN:]:
        is_running = found["running"] is not None and number == len(numbered)
        lines.append(("", _attempt(number, attempt, is_running)))
    if found["goodput"]:
        share, of_all = found["goodput"]["while_running"], found["goodput"]["since_first_start"]
        lines.append(
            (
                "goodput",
                f"{100 * share:.1f} % while it ran, {100 * of_all:.1f} % since the first start",
            )
        )
    ended = "if it ended now, " if found["running"] else ""
    lines.append(("next", f"{ended}{found['next']}"))
    lines.append(("verdict", found["verdict"]))
    return "\n".join(f"{name:<12} {text}" for name, text in lines)


def _status(found: dict[str, Any]) -> str:
    if not found["status"]:
        return "not begun"
    if found["status"] == "running" and not found["running"]:
        last = found["attempts"][-1]["why"] if found["attempts"] else ""
        return f"killed: {last or 'it could not say why'}; before that: {found['why']}"
    return f"{found['status']}: {found['why']}"


def _step(found: dict[str, Any]) -> str:
    places = [place["step"] for place in found["running"]["ranks"]] if found["running"] else []
    step = max([found["step"] or 0, found["last_metrics"].get("step", 0), *places])
    text = str(step)
    if found["max_steps"]:
        text += f" of {found['max_steps']} ({100 * step // found['max_steps']} %)"
    if found["epoch"] is not None:
        text += f", epoch {found['epoch'] + 1}"
    return text


def _speed(line: dict[str, float]) -> str:
    """Say how fast the last logged step was, and what its time went to."""
    text = f"{line['train/tokens_per_second']:,.0f} target tokens/s"
    if "train/mfu" in line:
        text += f", {100 * line['train/mfu']:.1f} % of the devices' peak"
    shares = {
        "data": "train/data_wait_share",
        "forward and backward": "train/forward_backward_share",
        "reduction": "train/reduction_share",
        "optimizer": "train/optimizer_share",
    }
    parts = [f"{name} {100 * line[key]:.0f} %" for name, key in shares.items() if key in line]
    return f"{text}; {', '.join(parts)}" if parts else text


def _checkpoint(found: dict[str, Any]) -> str:
    text = "none yet"
    if found["last_checkpoint"]:
        age = _duration(found["last_checkpoint_age_seconds"])
        text = f"{found['last_checkpoint']}, {age} old"
    if found["set_aside"]:
        text += f"; set aside as damaged: {', '.join(found['set_aside'])}"
    return text


def _attempt(number: int, attempt: dict[str, Any], is_running: bool) -> str:
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(attempt["time"]))
    reached = "" if attempt["end_step"] is None else f" to {attempt['end_step']}"
    count = attempt["world_size"]
    where = f" on {attempt['host']}" if attempt["host"] else ""
    where += f", job {attempt['job']}" if attempt["job"] else ""
    where += f", allowed {', '.join(attempt['allowed'])}" if attempt["allowed"] else ""
    why = textwrap.shorten(attempt["why"], WHY_SHOWN, placeholder=" ...")
    ended = f"{attempt['status']}: {why}" if attempt["status"] else "no end was noted"
    return (
        f"{number}  {begun}  step {attempt['step']}{reached}, {count} "
        f"rank{'s' if count > 1 else ''}{where}; {'running' if is_running else ended}"
    )


def _ranks(ranks: Sequence[int]) -> str:
    """Name ranks in few words: `ranks 0-3, 6`."""
    parts = []
    for _, group in itertools.groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in group]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.0f} days"
    if hours >= 2:
        return f"{hours:.0f} hours"
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{seconds:.0f} seconds"
