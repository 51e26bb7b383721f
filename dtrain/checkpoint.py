"""Checkpoints: write, verify, find, prune. Safetensors and JSON only; rank 0 writes.

A checkpoint is a directory that verifies: its MANIFEST.json, written last, names size and SHA-256
of every other file. It is made under a temporary name, synced, and renamed, so that at any moment
it is either whole or not there.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtrain.durable import (
    delete,
    replace_directory,
    sha256,
    sync_directory,
    to_json,
    write_file,
    write_json,
)
from dtrain.errors import UserError
from dtrain.fault import strike

FORMAT_VERSION = 1
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, MANIFEST, JUDGEMENT = "state.json", "MANIFEST.json", "judgement.json"

Piece = bytes | memoryview

_STEP = re.compile(r"step-([0-9]+)(\.replaced)?")


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or cannot be written; the message names it."""


def checkpoint_name(step: int) -> str:
    """Name the directory of a step's checkpoint."""
    return f"step-{step:010d}"


def write(
    folder: Path, name: str, tensors: Mapping[str, Iterable[Piece]], state: Mapping[str, Any]
) -> Path:
    """Write a checkpoint `folder/name`, all or nothing; an older one of that name is replaced.

    Args:
        folder: the run's `checkpoints` directory.
        name: of the new checkpoint.
        tensors: the pieces of each file of tensors, by the file's name.
        state: what else is needed to go on; JSON values only.

    Raises:
        OSError: if it cannot be written; all others are as they were.
    """
    step = state.get("step", 0)
    strike("in_save:staged", step)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f".tmp-{name}-*"):
        shutil.rmtree(stale)
    temporary = folder / f".tmp-{name}-{os.getpid()}"
    try:
        temporary.mkdir()
        strike("in_save:begun", step)
        files = {}
        for file, pieces in tensors.items():
            files[file] = write_file(temporary / file, pieces)
            if file == MODEL:
                strike("in_save:model_written", step)
        text = to_json({"format_version": FORMAT_VERSION, **state})
        files[STATE] = write_file(temporary / STATE, [text])
        strike("in_save:files_written", step)
        text = to_json({"format_version": FORMAT_VERSION, "files": files})
        write_file(temporary / MANIFEST, [text])
        strike("in_save:manifest_written", step)
        sync_directory(temporary)
        replaced = replace_directory(temporary, folder / name)
        strike("in_save:renamed", step)
        sync_directory(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder / name


def note_judgement(checkpoint: Path, score: float, progress: Mapping[str, Any]) -> None:
    """Add to a checkpoint how its model was judged afterwards, and the counts after that."""
    facts = {"score": score, "progress": progress}
    write_json(checkpoint / JUDGEMENT, facts | {"sha256": _fingerprint(facts)})


def score(checkpoint: Path) -> float:
    """Read how good a checkpoint is (higher is better); minus infinity if it was not judged."""
    with suppress(FileNotFoundError, CheckpointError):
        return float(_read_judgement(checkpoint)["score"])
    return float("-inf")


def verify(checkpoint: Path) -> str:
    """Say what is wrong with a checkpoint; the empty string if it is whole.

    Raises:
        OSError: if it cannot be read now, which says nothing about it.
    """
    try:
        _check_files(checkpoint)
        with suppress(FileNotFoundError):
            _read_judgement(checkpoint)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except CheckpointError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged: {error}"
    return ""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read `state.json`, with the counts after the validation if the model was judged.

    Raises:
        CheckpointError: if a newer version of dtrain wrote it.
    """
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if state["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint} has format {state['format_version']}; this dtrain reads up to "
            f"{FORMAT_VERSION}: upgrade dtrain"
        )
    with suppress(FileNotFoundError):
        state |= {"progress": _read_judgement(checkpoint)["progress"]}
    return state


def step_of(checkpoint: Path) -> int:
    """Give the step of one of `steps_saved`."""
    return int(checkpoint.name.removesuffix(".replaced")[5:])


def steps_saved(folder: Path) -> list[Path]:
    """List the checkpoints of single steps, newest first, by number; unverified.

    One that was about to be replaced, `NAME.replaced`, counts until the new one is in its place.
    """
    found = [
        path
        for path in folder.glob("step-*")
        if (match := _STEP.fullmatch(path.name))
        and path.is_dir()
        and not (match[2] and path.with_suffix("").exists())
    ]
    return sorted(found, key=step_of, reverse=True)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that verifies, and say which newer ones do not.

    Bad ones are set aside as `NAME.corrupt`, and what killed saves left behind is deleted. Only
    rank 0 may call this, before it trains: it chooses for all.

    Raises:
        CheckpointError: if there are checkpoints and none is whole.
        OSError: if one cannot be read now.
    """
    complaints = _clean(folder)
    for path in steps_saved(folder):
        problem = verify(path)
        if not problem:
            return path, complaints
        aside = path.with_name(f"{path.name}.corrupt")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        complaints.append(f"checkpoint {path} is set aside: {problem}")
    corrupt = sorted(folder.glob("*.corrupt"))
    if corrupt:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged: {', '.join(p.name for p in corrupt)}. "
            f"Delete them to begin from step 1, or start another run with --run.name=NAME"
        )
    return None, complaints


def choose(folder: Path, wanted: str) -> Path:
    """Find the checkpoint that a user asks for, and verify it.

    Args:
        folder: the run's `checkpoints` directory.
        wanted: a step, `best` (by validation; the newest if none was judged), `last`, or the name
            of an averaged checkpoint.

    Raises:
        CheckpointError: if there is none or it is damaged.
    """
    saved = steps_saved(folder)
    path = folder / wanted
    if wanted == "last" and saved:
        path = saved[0]
    elif wanted == "best" and saved:
        path = max(saved, key=lambda item: (score(item), step_of(item)))
    elif wanted.isdecimal():
        path = next((item for item in saved if step_of(item) == int(wanted)), path)
    if not path.is_dir():
        names = ", ".join(item.name for item in sorted(folder.glob("[!.]*"))) or "none"
        raise CheckpointError(f"there is no checkpoint {wanted!r} in {folder} (there: {names})")
    problem = verify(path)
    if problem:
        raise CheckpointError(f"checkpoint {path}: {problem}")
    return path


def prune(folder: Path, keep_last: int, keep_best: int, protect: Path | None = None) -> list[str]:
    """Delete all but the newest and the best checkpoints, and what a killed save left behind.

    Args:
        folder: the run's `checkpoints` directory; what dtrain did not name stays.
        keep_last: how many of the newest stay, at least 1.
        keep_best: how many of the best by validation stay besides.
        protect: stays until there are two newer ones; the one that the run went on from.

    Returns:
        What could not be deleted, and why.
    """
    saved = steps_saved(folder)
    judged = [path for path in saved if score(path) > float("-inf")]
    kept = {*saved[:keep_last], *sorted(judged, key=score, reverse=True)[:keep_best]}
    kept |= {path for path in saved[:2] if protect is not None and path.name == protect.name}
    last = step_of(saved[0]) if saved else 0
    strike("before_prune", last)
    complaints = []
    for path in reversed(saved):
        if path not in kept:
            try:
                path.rename(path.with_name(f".tmp-{path.name}"))  # a kill leaves no half of it
                strike("in_prune", last)
            except OSError as error:
                complaints.append(f"{path} cannot be deleted: {error}")
    return complaints + _clean(folder)


def check_room(folder: Path, bytes_of_one: int) -> None:
    """Make sure that the disk has room for two checkpoints, or for one more if there is one.

    Args:
        folder: the run's `checkpoints` directory, which need not be there yet.
        bytes_of_one: what one takes.

    Raises:
        UserError: naming the room, what is needed, and what to do.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    count, named = (1, "one more checkpoint") if steps_saved(folder) else (2, "two checkpoints")
    if free < count * bytes_of_one:
        raise UserError(
            f"the disk of {folder} has {free / 2**20:,.0f} MiB free, too few for {named} of "
            f"{bytes_of_one / 2**20:,.0f} MiB: make room, or put the run on another disk with "
            f"--run.dir=PATH"
        )


def _clean(folder: Path) -> list[str]:
    """Delete what killed saves left behind; gives what could not be deleted, and why."""
    replaced = [path for path in folder.glob("step-*.replaced") if path.with_suffix("").exists()]
    return delete([*folder.glob(".tmp-step-*"), *replaced])


def _check_files(checkpoint: Path) -> None:
    """Compare the files of a checkpoint with its manifest, and that with itself.

    Raises:
        CheckpointError: saying what differs; or what reading a damaged manifest raises.
    """
    text = (checkpoint / MANIFEST).read_bytes()
    manifest = json.loads(text)
    if to_json(manifest) != text:
        raise CheckpointError(f"{MANIFEST} is damaged: it is not as it was written")
    for name, facts in manifest["files"].items():
        path = checkpoint / name
        size = path.stat().st_size
        if size != facts["size"]:
            raise CheckpointError(f"{name} has {size} bytes instead of {facts['size']}")
        if sha256(path) != facts["sha256"]:
            raise CheckpointError(f"{name} is damaged: its SHA-256 is not the manifest's")
    state = json.loads((checkpoint / STATE).read_bytes())
    if state["format_version"] != manifest["format_version"]:
        raise CheckpointError(f"{MANIFEST} is damaged: {STATE} has another format_version")


def _read_judgement(checkpoint: Path) -> dict[str, Any]:
    """Read what `note_judgement` wrote.

    Raises:
        FileNotFoundError: if the model was not judged.
        CheckpointError: if the file is damaged.
    """
    text = (checkpoint / JUDGEMENT).read_bytes()
    try:
        facts = dict(json.loads(text))
        whole = to_json(facts) == text
        digest = facts.pop("sha256", None)  # which early ones have not
        whole &= facts.keys() == {"score", "progress"} and digest in (None, _fingerprint(facts))
    except (ValueError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{JUDGEMENT} is damaged: it is not as it was written")
    return facts


def _fingerprint(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
