"""Weights & Biases, fed from `metrics.jsonl` and `samples.jsonl` by a process of its own.

Training only writes files; this process reads behind it. So a W&B that hangs, raises or is slow
costs the training nothing, no point is ever dropped for want of room, and what W&B has not got
after a crash is sent at the next start:

- online, W&B says which step it has last, and the feed goes on behind it;
- offline, where W&B cannot resume, each start records the run anew from step 1, so that the newest
  `offline-run-...` directory holds all of it and is the only one to sync.

    python -m dtrain.wandb_feed < job.json      # started by WandbFeed, not by hand
"""

import contextlib
import json
import netrc
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import wandb

Outcome = Literal["completed", "preempted", "failed"]
"""How a training ended, for W&B; a preempted one will go on."""

_SECONDS_TO_INIT = 60.0
_SECONDS_TO_FINISH = {"completed": 75.0, "preempted": 10.0, "failed": 10.0}


class WandbFeed:
    """The training's end of the feed: starts the process, passes its messages on, ends it."""

    def __init__(
        self,
        run: Path,
        run_id: str,
        settings: Mapping[str, Any],
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Start the process.

        Args:
            run: the run directory; W&B's files go to its `wandb`.
            run_id: the W&B id of the run, the same at each start.
            settings: a dumped `WandbSettings`.
            config: settings of the run, for W&B to show.
            say: shows a message; called from another thread.
        """
        self._say = say
        (run / "wandb").mkdir(exist_ok=True)
        job = json.dumps(
            {
                "run": str(run),
                "id": run_id,
                "settings": settings,
                "config": config,
                "parent": os.getpid(),
                "argv": sys.argv,
            }
        )
        package_root = str(Path(__file__).parent.parent)
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._log = run / "wandb" / "feed.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dtrain.wandb_feed"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the training
            )
        assert self._process.stdin is not None
        self._orders = self._process.stdin
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._tell(job)

    def close(self, outcome: Outcome) -> None:
        """Let W&B take what it has not got yet, for a bounded time."""
        seconds = _SECONDS_TO_FINISH[outcome]
        self._tell(outcome)
        patience = min(5.0, seconds)
        if not self._ended(patience):
            self._say(f"waiting for W&B, {seconds:.0f} s at most")
        if not self._ended(seconds - patience):
            self._process.kill()
            self._process.wait()
            self._say(f"W&B did not finish within {seconds:.0f} s; metrics.jsonl has everything")
        elif self._process.returncode != 0:
            self._say(f"W&B stopped, see {self._log}; metrics.jsonl has everything")
        self._listener.join(1.0)
        with contextlib.suppress(OSError):
            self._orders.close()

    def _ended(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # it has ended: then there is nobody to tell
            self._orders.write(line + "\n")
            self._orders.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as messages:
            for line in messages:
                self._say(json.loads(line))


def main() -> None:
    """Feed W&B until the training says how it ended, or has ended without a word."""
    # The scheduler's signals reach this process too; it is the training that they are meant for.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    # W&B may print what it likes: that goes to the log, as standard error does already.
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    orders = open(0, "rb", buffering=0)  # noqa: SIM115 - unbuffered, so that `select` sees all
    job = json.loads(orders.readline())
    threading.Thread(target=_end_with, args=(job["parent"],), daemon=True).start()
    sys.argv = job["argv"]
    # What an offline run needs for its upload stays with it, not in a home directory.
    os.environ.setdefault("WANDB_DATA_DIR", str(Path(job["run"], "wandb", "data").absolute()))
    with tempfile.TemporaryDirectory(prefix="dtrain-", ignore_cleanup_errors=True) as folder:
        # W&B leaves temporary files behind, and cleans up slowly where the network is down.
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        _Feed(job, orders, messages).run()
    os._exit(0)


def _end_with(parent: int) -> None:
    """End this process soon after the training's, even if W&B hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(_SECONDS_TO_FINISH["failed"])
    os._exit(1)


class _Feed:
    """The process's end: reads settled lines and gives them to W&B."""

    def __init__(self, job: Mapping[str, Any], orders: FileIO, messages: TextIO) -> None:
        self._job = job
        self._orders = orders
        self._run = Path(job["run"])
        self._settings = job["settings"]
        self._messages = messages

    def run(self) -> None:
        """Open a W&B run, feed it to the end of the training, and finish it."""
        try:
            run = self._open()
            if run is None:
                return
            outcome = self._follow(run)
            if outcome == "preempted":
                run.mark_preempting()
            run.finish(exit_code=0 if outcome == "completed" else 1)
            if run.offline:
                self._say(f"W&B was offline; to upload the run:\n  {_sync_command(run)}")
        except Exception as error:  # whatever it is, it must not reach the training
            traceback.print_exc()
            self._say(f"W&B stopped ({_first_line(error)}); metrics.jsonl has everything")

    def _open(self) -> "wandb.Run | None":
        """Open the W&B run in the wanted mode, or offline where that fails."""
        import wandb

        machine = wandb.setup(wandb.Settings(silent=True)).settings
        wanted = self._settings["mode"]
        # The machine's mode is what WANDB_MODE or `wandb offline` have set.
        mode = machine.mode if wanted == "auto" else wanted
        if mode == "disabled":
            return None
        if mode in ("offline", "dryrun"):
            return self._init("offline")
        if not _has_key(machine):
            if wanted == "online":
                self._say("W&B has no key for this machine (`wandb login`); it records offline")
            return self._init("offline")
        try:
            run = self._init("online")
        except Exception as error:
            traceback.print_exc()
            self._say(f"W&B cannot be reached ({_first_line(error)}); it records offline")
            wandb.teardown()  # or the run's id would count as being in use
            return self._init("offline")
        self._say(f"W&B: {run.url}")
        return run

    def _init(self, mode: Literal["online", "offline"]) -> "wandb.Run":
        import wandb

        given = self._settings
        training = int(self._job["parent"])
        # A project at its default counts as unset, so that WANDB_PROJECT can name another.
        project = given["project"]
        if project == "dtrain":
            project = os.environ.get("WANDB_PROJECT", project)
        wanted: dict[str, Any] = {
            "allow_val_change": True,
            "console": "off",
            "finish_timeout": _SECONDS_TO_FINISH["completed"] - 10.0,
            "init_timeout": _SECONDS_TO_INIT,
            "program": self._job["argv"][0],
            "save_code": False,
            "silent": True,
            "stop_fn": lambda: os.kill(training, signal.SIGINT),  # the stop button on W&B's page
            "x_stats_pid": training,
        }
        chosen = {
            name: value
            for name, value in wanted.items()
            if name in wandb.Settings.model_fields and f"WANDB_{name.upper()}" not in os.environ
        }
        run = wandb.init(
            id=self._job["id"],
            dir=self._run,
            mode=mode,
            resume="allow" if mode == "online" else None,
            project=project,
            entity=given["entity"],
            name=given["name"] or os.environ.get("WANDB_NAME") or self._run.resolve().name,
            group=given["group"],
            tags=given["tags"] or None,
            notes=given["notes"],
            config=self._job["config"],
            settings=wandb.Settings(**chosen),
        )
        for names in ("*", "train/*", "validation/*"):
            run.define_metric(names, step_metric="step")
        return run

    def _follow(self, run: "wandb.Run") -> str:
        """Give W&B each step that it has not got, until the training ends; say how it ended."""
        import wandb

        metrics = _SettledLines(self._run / "metrics.jsonl")
        samples = _SettledLines(self._run / "samples.jsonl")
        rows: list[list[Any]] = []
        columns: list[str | int] = ["step", "source", "reference", "translation"]
        first_step = run.starting_step
        outcome = None
        while outcome is None:
            outcome = self._heard()
            ended = outcome is not None
            for values in metrics.read(ended):
                step = values["step"]
                rows += [[row[str(name)] for name in columns] for row in samples.read(True)]
                due = [row for row in rows if row[0] <= step]
                rows = [row for row in rows if row[0] > step]
                if step < first_step:
                    continue
                if due:
                    values["validation/samples"] = wandb.Table(columns=columns, data=due)
                run.log(values, step=step)
        return outcome

    def _heard(self) -> str | None:
        """Wait a moment for the training's last word; a training that is gone has failed."""
        ready, _, _ = select.select([self._orders], [], [], 1.0)
        if ready:
            return self._orders.readline().decode().strip() or "failed"
        # A process forked by the training may hold the pipe open.
        return None if os.getppid() == self._job["parent"] else "failed"

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the training is gone
            self._messages.write(json.dumps(text) + "\n")
            self._messages.flush()


class _SettledLines:
    """Reads a growing file of JSON lines, each once.

    The last line is left for later, as the training may still add values to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def read(self, to_end: bool) -> Iterator[dict[str, Any]]:
        """Give the lines that are new; with `to_end` also the last one."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            lines = file.read().splitlines(keepends=True)
        if not to_end:
            lines = lines[:-1]
        for line in lines:
            if not line.endswith(b"\n"):
                return
            self._position += len(line)
            with contextlib.suppress(ValueError):
                yield {name: _number(value) for name, value in json.loads(line).items()}


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _has_key(machine: "wandb.Settings") -> bool:
    """Look where W&B looks for a key, but never ask for one."""
    if machine.api_key or machine.identity_token_file:
        return True
    path = os.environ.get("NETRC") or Path.home() / ".netrc"
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(path).authenticators(urlsplit(machine.base_url).netloc) is not None
    return False


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _sync_command(run: "wandb.Run") -> str:
    folder = Path(run.dir).parent.absolute()
    with contextlib.suppress(ValueError):
        folder = folder.relative_to(Path.cwd())
    beside = Path(sys.executable).with_name("wandb")
    program = "wandb" if shutil.which("wandb") or not beside.exists() else str(beside)
    return f"{shlex.quote(program)} sync {shlex.quote(str(folder))}"


if __name__ == "__main__":
    main()
