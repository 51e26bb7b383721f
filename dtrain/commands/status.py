"""`dtrain status`: where a run stands."""

import argparse
import json
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, e.g. runs/demo")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--verdict", action="store_true", help="print one word: completed, requeue or stop"
    )


def main(arguments: argparse.Namespace) -> int:
    """Print the status for a person, as JSON, or as the one word that scripts act on."""
    from dtrain.metrics import read_metrics
    from dtrain.run_directory import RunDirectory

    run = RunDirectory.existing(arguments.run)
    status = run.read_status()
    if arguments.verdict:
        print(verdict(status))
        return 0
    lines = read_metrics(run.path / "metrics.jsonl")
    saved = list(run.checkpoints.glob("step-*[0-9]"))
    saved.sort(key=lambda path: int(path.name[5:]))
    facts: dict[str, Any] = {
        "run": str(run.path),
        **{key: status.get(key) for key in ("status", "step", "exit_code", "why")},
        "verdict": verdict(status),
        "max_steps": run.config.run.max_steps,
        "last_metrics": lines[-1] if lines else {},
        "best": max((line for line in lines if "validation/bleu" in line), key=_bleu, default={}),
        "checkpoints": [path.name for path in saved],
        "last_checkpoint_age_seconds": time.time() - saved[-1].stat().st_mtime if saved else None,
        "attempts": run.read_identity().get("attempts", []),
    }
    print(json.dumps(facts) if arguments.json else table(facts))
    return 0


def verdict(status: dict[str, Any]) -> str:
    """Say what a script should do: completed (nothing), requeue (start again) or stop (look)."""
    return {"completed": "completed", "failed": "stop"}.get(status.get("status", ""), "requeue")


def table(facts: dict[str, Any]) -> str:
    """Lay the facts out for reading."""
    best = facts["best"]
    step = max(facts["step"] or 0, facts["last_metrics"].get("step", 0))
    status = f"{facts['status']}: {facts['why']}" if facts["status"] else "not begun"
    lines = [
        f"run          {facts['run']}",
        f"status       {status}",
        f"step         {step}" + (f" of {facts['max_steps']}" if facts["max_steps"] else ""),
    ]
    if best:
        lines.append(f"best BLEU    {best['validation/bleu']:.2f} at step {best['step']}")
    if facts["checkpoints"]:
        age = facts["last_checkpoint_age_seconds"]
        lines.append(f"checkpoint   {facts['checkpoints'][-1]}, {_duration(age)} old")
    lines.append(f"attempts     {len(facts['attempts'])}")
    lines.append(f"verdict      {facts['verdict']}")
    return "\n".join(lines)


def _bleu(line: dict[str, float]) -> float:
    return line["validation/bleu"]


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 2:
        return f"{hours:.0f} hours"
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{seconds:.0f} seconds"
