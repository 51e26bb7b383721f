"""RunDirectory: a directory that a training owns; its settings, its status, its attempts."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dtrain.checkpoint import write_json
from dtrain.config import Config, changed_settings, load_config
from dtrain.data.vocabulary import Vocabulary
from dtrain.errors import UserError

Status = Literal["running", "completed", "preempted", "failed"]


class RunDirectory:
    """Paths and small files of `runs/NAME`; only rank 0 writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.status_file = path / "status.json"
        self.identity_file = path / "run.json"

    @classmethod
    def existing(cls, path: Path) -> "RunDirectory":
        """Open the directory of a training that has begun.

        Raises:
            UserError: if there is none at this path.
        """
        run = cls(path)
        if not run.config_file.exists():
            raise UserError(f"{path} is not a run directory: it has no {run.config_file.name}")
        return run

    def check(self, config: Config) -> None:
        """Make sure that a begun run goes on with the settings that it was begun with.

        Raises:
            UserError: naming each setting that differs and what to do.
        """
        changes = changed_settings(self.config, config) if self.config_file.exists() else []
        if changes:
            raise UserError(
                f"{self.path} was begun with other settings ({'; '.join(changes)}); set them "
                f"back, or start another run with --run.name=NAME"
            )

    def claim(self, config: Config, vocabulary: Vocabulary) -> None:
        """Keep the settings, and the vocabulary, so that the run is complete in itself."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.config_file.with_name(".config.yaml")
        temporary.write_text(config.to_yaml(), encoding="utf-8")
        temporary.replace(self.config_file)
        vocabulary.save(self.path)

    @property
    def config(self) -> Config:
        """The settings as the run last used them."""
        return load_config(self.config_file)

    def write_status(self, status: Status, step: int, exit_code: int | None, why: str) -> None:
        """Say where the run stands, for scripts and `dtrain status`."""
        value = {"status": status, "step": step, "exit_code": exit_code, "why": why}
        write_json(self.status_file, value | {"time": time.time(), "process": os.getpid()})

    @contextmanager
    def failure_noted(self, is_main: bool) -> Iterator[None]:
        """Write the status `failed` if what happens inside does, with the step it had last."""
        try:
            yield
        except BaseException as error:
            if is_main:
                step, code = (
                    self.read_status().get("step", 0),
                    2 if isinstance(error, UserError) else 1,
                )
                self.write_status("failed", step, code, f"{type(error).__name__}: {error}")
            raise

    def read_status(self) -> dict[str, Any]:
        """Read what `write_status` wrote last; empty if it never did."""
        try:
            status: dict[str, Any] = json.loads(self.status_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return status

    def read_identity(self) -> dict[str, Any]:
        """Read `run.json`: the W&B id and the attempts so far."""
        try:
            identity: dict[str, Any] = json.loads(self.identity_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return identity

    def begin_attempt(self, **facts: object) -> int:
        """Note in `run.json` that a training starts or goes on, and give its number, from 1."""
        identity = self.read_identity()
        attempts = identity.setdefault("attempts", [])
        attempts.append({"time": time.time(), **facts})
        write_json(self.identity_file, identity)
        return len(attempts)
