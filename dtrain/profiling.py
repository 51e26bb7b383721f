"""Profile: some steps of a start seen from inside, for Perfetto (`run.profile`).

Each rank writes `RUN/profile/rank-N-steps-A-B.json.gz`, a trace of operators, kernels, phases and
memory for https://ui.perfetto.dev, and beside it a table of the operators. Memory is part of the
trace, since torch's own snapshots of it are pickles, which only its own viewer reads.
"""

import gzip
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from dtrain.config import ProfileSettings
from dtrain.distributed import World
from dtrain.phases import Phases

ROWS = 60  # of the table


class Profile:
    """Watches the steps that the settings name; a context manager around all steps of a start.

    Args:
        settings: which steps; None for none.
        folder: `RUN/profile`, made if there is something to write.
        world: this rank and its device.
        phases: shown as spans while steps are recorded.
        patiently: surrounds writing, which may take longer than a step.
        say: shows a message.
    """

    def __init__(
        self,
        settings: ProfileSettings | None,
        folder: Path,
        world: World,
        phases: Phases,
        patiently: Callable[[str], AbstractContextManager[None]],
        say: Callable[[str], None],
    ) -> None:
        self._settings, self._folder, self._world = settings, folder, world
        self._phases, self._patiently, self._say = phases, patiently, say
        self._count, self._number = 0, 0
        self._profiler: torch.profiler.profile | None = None

    def __enter__(self) -> "Profile":
        self._begin_if_due()
        return self

    def note_step(self, number: int) -> None:
        """Take note that a step of the run was done."""
        self._count, self._number = self._count + 1, number
        if self._profiler is not None:
            self._profiler.step()
        self._begin_if_due()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._settings is None or error is not None:
            return
        if self._profiler is not None:
            self._profiler.stop()
        if self._count < self._settings.start:
            self._say(
                f"nothing was profiled: this start ended before its step {self._settings.start}, "
                f"as run.profile.start says"
            )

    def _begin_if_due(self) -> None:
        """Begin one step ahead of the first: a profiler's own first step is slow."""
        if self._settings is None or self._count != self._settings.start - 2:
            return
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=0, warmup=1, active=self._settings.steps, repeat=1
            ),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
            acc_events=True,  # there is one cycle; else older versions warn of several
        )
        self._profiler.start()
        self._phases.are_shown = True

    def _write(self, profiler: torch.profiler.profile) -> None:
        """Write what was recorded, all ranks; a full disk is no reason to stop a training."""
        self._phases.are_shown = False
        assert self._settings is not None, "nothing is recorded without settings"
        recorded = min(self._settings.steps, self._count - self._settings.start + 1)
        if recorded < 1:  # this start ended after the step ahead
            return
        first = self._number - recorded + 1
        name = f"rank-{self._world.rank}-steps-{first}-{self._number}"
        path = self._folder / f"{name}.json.gz"
        sort_by = "self_cuda_time_total"
        if self._world.device.type == "cpu":
            sort_by = "self_cpu_time_total"
        outcome = (
            f"steps {first} to {self._number} are in {path}: open it at https://ui.perfetto.dev; "
            f"{name}.txt lists the operators"
        )
        with self._patiently("writing a profile"):
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                table = profiler.key_averages(group_by_input_shape=True)
                text = table.table(sort_by=sort_by, row_limit=ROWS)
                path.with_name(f"{name}.txt").write_text(text + "\n", encoding="utf-8")
                _write_trace(profiler, path)
            except OSError as error:
                outcome = f"warning: cannot write {path}: {error}"
            self._world.meet()  # it may take one rank longer than collectives wait for each other
        self._say(outcome)


def _write_trace(profiler: torch.profiler.profile, path: Path) -> None:
    """Export the trace, put curves of memory in, and compress it."""
    plain = path.with_name(f".{path.stem}")
    try:
        profiler.export_chrome_trace(str(plain))
        trace = json.loads(plain.read_text(encoding="utf-8"))
    finally:
        plain.unlink(missing_ok=True)
    trace["traceEvents"] += memory_curves(trace["traceEvents"])
    temporary = path.with_name(f".{path.name}")
    with gzip.open(temporary, "wt", encoding="utf-8", compresslevel=3) as file:
        json.dump(trace, file)
    temporary.replace(path)


def memory_curves(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make counters, which Perfetto draws as curves, of torch's allocations and releases.

    Args:
        events: of a Chrome trace; those named `[memory]` hold the bytes that are in use after them.

    Returns:
        An event of phase `C` for each, in MiB by device.
    """
    curves = []
    for event in events:
        if event.get("name") == "[memory]":
            facts = event["args"]
            device = f"cuda:{facts['Device Id']}" if facts["Device Type"] else "cpu"
            values = {"allocated": facts["Total Allocated"] / 2**20}
            if facts["Device Type"]:
                values["reserved"] = facts["Total Reserved"] / 2**20
            place = {key: event[key] for key in ("pid", "tid", "ts")}
            curves.append({"ph": "C", "name": f"MiB of {device}", **place, "args": values})
    return curves
