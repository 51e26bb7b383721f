"""Checkpoints: write, verify, find, prune, load. Safetensors and JSON only; rank 0 writes.

A checkpoint is a directory that verifies: its MANIFEST.json, written last, names size and SHA-256
of every other file. It is made under a temporary name, synced, and renamed, so that at any moment
it is either whole or not there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dtrain.errors import UserError

FORMAT_VERSION = 1
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, MANIFEST, JUDGEMENT = "state.json", "MANIFEST.json", "judgement.json"


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit; the message names the file."""


def checkpoint_name(step: int) -> str:
    """Name the directory of a step's checkpoint."""
    return f"step-{step:010d}"


def save(
    folder: Path,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint `folder/name`, all or nothing.

    Args:
        folder: the run's `checkpoints` directory.
        name: of the new checkpoint; an older one of that name is replaced.
        model: its parameters are stored under their own names, without any wrapper's prefix.
        optimizer: over exactly the model's parameters; None to leave it out.
        state: what else is needed to go on; JSON values only.
    """
    tensors = {MODEL: _on_cpu(model.state_dict())}
    if optimizer is not None:
        tensors[OPTIMIZER] = dict(_moments(optimizer, model))
    return _write(folder, name, tensors, state)


def note_judgement(checkpoint: Path, score: float, progress: Mapping[str, Any]) -> None:
    """Add to a checkpoint how its model was judged afterwards, and the counts after that."""
    write_json(checkpoint / JUDGEMENT, {"score": score, "progress": progress})


def verify(checkpoint: Path) -> str:
    """Say what is wrong with a checkpoint; the empty string if it is whole.

    Raises:
        OSError: if it cannot be read now, which says nothing about it.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, facts in manifest["files"].items():
            path = checkpoint / name
            if path.stat().st_size != facts["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {facts['size']}"
            if sha256(path) != facts["sha256"]:
                return f"{name} is damaged: its SHA-256 is not the manifest's"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged: {error}"
    return ""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read `state.json`, with the counts after the validation if the model was judged.

    Raises:
        CheckpointError: if a newer version of dtrain wrote it.
    """
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    with suppress(FileNotFoundError, ValueError):
        judgement = json.loads((checkpoint / JUDGEMENT).read_text(encoding="utf-8"))
        state |= {"progress": judgement["progress"]}
    if state["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint} has format {state['format_version']}; this dtrain reads up to "
            f"{FORMAT_VERSION}: upgrade dtrain"
        )
    return state


def steps_saved(folder: Path) -> list[Path]:
    """List the checkpoints of single steps, newest first, by number; unverified."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that verifies, and say which newer ones do not.

    Bad ones are set aside as `NAME.corrupt`. Only rank 0 may call this: it chooses for all.

    Raises:
        CheckpointError: if there are checkpoints and none is whole.
        OSError: if one cannot be read now.
    """
    complaints = list[str]()
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
    if wanted == "last" and saved:
        path = saved[0]
    elif wanted == "best" and saved:
        path = max(saved, key=lambda item: (_score(item), item.name))
    elif wanted.isdecimal():
        path = folder / checkpoint_name(int(wanted))
    else:
        path = folder / wanted
    if not path.is_dir():
        names = ", ".join(item.name for item in sorted(folder.glob("[!.]*"))) or "none"
        raise CheckpointError(f"there is no checkpoint {wanted!r} in {folder} (there: {names})")
    problem = verify(path)
    if problem:
        raise CheckpointError(f"checkpoint {path}: {problem}")
    return path


def prune(folder: Path, keep_last: int, keep_best: int) -> None:
    """Delete all but the newest and the best checkpoints, and what a killed save left behind."""
    saved = steps_saved(folder)
    judged = [path for path in saved if _score(path) > float("-inf")]
    best = sorted(judged, key=_score, reverse=True)[:keep_best]
    for path in saved[keep_last:]:
        if path not in best:
            path.rename(path.with_name(f".tmp-{path.name}"))  # a kill leaves no half of it
    for path in folder.glob(".tmp-step-*"):
        shutil.rmtree(path, ignore_errors=True)


def average(folder: Path, checkpoints: Sequence[Path]) -> str:
    """Write the mean of some checkpoints' weights as another checkpoint; gives its name.

    Raises:
        CheckpointError: if one of them is damaged.
    """
    for path in checkpoints:
        problem = verify(path)
        if problem:
            raise CheckpointError(f"checkpoint {path}: {problem}")
    sums: dict[str, Tensor] = {}
    for path in checkpoints:
        for name, tensor in load_file(path / MODEL).items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + tensor.double()
    mean = {name: (total / len(checkpoints)).float() for name, total in sums.items()}
    step = read_state(checkpoints[0])["step"]
    name = f"average-{step:010d}-of-{len(checkpoints)}"
    state = {"step": step, "averaged": [path.name for path in checkpoints]}
    _write(folder, name, {MODEL: mean}, state)
    return name


def save_module(module: nn.Module, path: Path) -> None:
    """Write the parameters of a model, or of any part of one, by name."""
    save_file(_on_cpu(module.state_dict()), path)


def load_module(module: nn.Module, path: Path) -> None:
    """Read back what `save_module` wrote, strictly: every name and shape must fit.

    Raises:
        CheckpointError: naming the file and what does not fit.
    """
    try:
        module.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from None


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Write the optimizer's moments under the names of the parameters that they belong to."""
    save_file(dict(_moments(optimizer, model)), path)


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Read back what `save_optimizer` wrote.

    Raises:
        CheckpointError: if a moment is missing, superfluous or of another shape.
    """
    tensors = load_file(path)
    names = {name for name, _ in model.named_parameters()}
    unknown = {key for key in tensors if key.rpartition(".")[0] not in names}
    if unknown:
        raise CheckpointError(f"{path} has moments of unknown parameters: {sorted(unknown)[:3]}")
    for name, parameter in model.named_parameters():
        moments = {
            key.rpartition(".")[2]: tensor
            for key, tensor in tensors.items()
            if key.rpartition(".")[0] == name
        }
        if tensors and not moments:
            raise CheckpointError(f"{path} has no moments of {name}")
        for key, tensor in moments.items():
            if tensor.dim() and tensor.shape != parameter.shape:
                raise CheckpointError(f"{path}: {name}.{key} has shape {tuple(tensor.shape)}")
            # The step count too: the fused update reads it where the parameter lies.
            moments[key] = tensor.to(parameter.device)
        if moments:
            optimizer.state[parameter] = moments


def save_part(model: nn.Module, part: str, path: Path) -> None:
    """Write one part of a Transformer: `encoder` (with its embedding), `decoder` or `model`."""
    save_file(_on_cpu(_part_state(model, part)), path)


def load_part(model: nn.Module, part: str, path: Path) -> None:
    """Read back what `save_part` wrote into the same part of another Transformer of that size.

    Raises:
        CheckpointError: if names or shapes do not fit.
    """
    tensors, own = load_file(path), _part_state(model, part)
    if tensors.keys() != own.keys():
        odd = sorted(tensors.keys() ^ own.keys())
        raise CheckpointError(f"{path} does not hold this model's {part}: {odd[:3]}")
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model's {part}: {error}") from None


def write_json(path: Path, value: object) -> None:
    """Write JSON so that readers see the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def sha256(path: Path) -> str:
    """Hash a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(
    folder: Path, name: str, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write files of tensors, the state and the manifest; visible only when all is on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tmp-{name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file, content in tensors.items():
        save_file(content, temporary / file)
    write_json(temporary / STATE, {"format_version": FORMAT_VERSION, **state})
    files = {}
    for path in sorted(temporary.iterdir()):
        _sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(temporary / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
    _sync(temporary / MANIFEST)
    _sync(temporary)
    final = folder / name
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(folder)
    return final


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            yield f"{name}.{key}", tensor.detach().cpu()


def _part_state(model: nn.Module, part: str) -> dict[str, Tensor]:
    """Choose a part's parameters; the encoder's include an embedding that the decoder owns."""
    state: dict[str, Tensor] = model.state_dict()
    if part == "model":
        return state
    if part not in ("encoder", "decoder"):
        raise ValueError(f"a model has the parts encoder, decoder and model, not {part!r}")
    chosen = {name: t for name, t in state.items() if name.startswith(f"{part}.")}
    if part == "encoder" and not any(name.startswith("encoder.embedding.") for name in chosen):
        chosen |= {n: t for n, t in state.items() if n.startswith("decoder.embedding.")}
    return chosen


def _score(checkpoint: Path) -> float:
    """Read how good a checkpoint is (higher is better); minus infinity if it was not judged."""
    with suppress(FileNotFoundError, ValueError):
        return float(json.loads((checkpoint / JUDGEMENT).read_text(encoding="utf-8"))["score"])
    return float("-inf")


def _sync(path: Path) -> None:
    """Make sure that a file, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
