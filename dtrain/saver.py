"""Saver: a run's checkpoints, written while training goes on."""

import errno
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain import checkpoint
from dtrain.checkpoint import CheckpointError, checkpoint_name
from dtrain.weights import file_content, memory, moments

MOST_FAILURES = 3
"""So many saves in a row may fail before the run ends."""

ADVICE = {
    errno.ENOSPC: "make room on that disk, or keep fewer with checkpoint.keep_last",
    errno.EDQUOT: "make room within your quota, or keep fewer with checkpoint.keep_last",
    errno.EROFS: "make that disk writable, or put the run on another with --run.dir=PATH",
    errno.EACCES: "make that directory writable, or put the run elsewhere with --run.dir=PATH",
}
"""What a user can do about an OSError."""

Tensors = dict[str, dict[str, Tensor]]
"""By file and name."""


class SaveFailedError(CheckpointError):
    """The disk took no checkpoint; at the next start it may, and there must be room at least."""

    code = 1


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Give the tensors of a checkpoint; not copies but the tensors themselves.

    Args:
        model: its parameters go under their own names, without any wrapper's prefix.
        optimizer: over exactly the model's parameters.
    """
    return {
        checkpoint.MODEL: dict(model.state_dict()),
        checkpoint.OPTIMIZER: moments(optimizer, model),
    }


def room_needed(model: nn.Module) -> int:
    """Estimate the bytes of one checkpoint: weights, both moments, and the files' headers."""
    tensors = model.state_dict().values()
    return 3 * sum(tensor.nbytes for tensor in tensors) + 1024 * len(tensors) + 2**16


class Saver:
    """Writes checkpoints on rank 0; the training waits only until all values are copied.

    A context manager; leaving it waits for what is being written. A save that fails is said, and
    training goes on with the older checkpoints as they were; the third in a row ends the run.

    Args:
        folder: the run's `checkpoints` directory.
        asynchronous: write in a thread; else at once, in the same way.
        keep_last: see `checkpoint.prune`, as are the next two.
        keep_best: how many of the best by validation stay.
        protect: the checkpoint that the run went on from.
        say: takes messages for the user; called where the writing happens.
        on_saved: takes the step of each checkpoint that is on disk; called there too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        asynchronous: bool,
        keep_last: int,
        keep_best: int,
        protect: Path | None,
        say: Callable[[str], None],
        on_saved: Callable[[int], None],
    ) -> None:
        self.folder, self._say, self._on_saved = folder, say, on_saved
        self._prune = partial(checkpoint.prune, folder, keep_last, keep_best, protect)
        self._staging = Staging()
        self._writer = ThreadPoolExecutor(1, "saver") if asynchronous else None
        self._queue = deque[Future[None]]()
        self._failures: list[OSError] = []

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"besides, the last save failed: {failure!r}")
        finally:
            if self._writer is not None:
                self._writer.shutdown()

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        elsewhere: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Save the model as it is now; returns when later changes of it do no harm any more.

        Waits for the save before, if that is still being written.

        Args:
            step: the last one that it was trained with.
            model: see `contents`, as is the optimizer.
            optimizer: here.
            state: what else belongs into the checkpoint, as JSON can tell it.
            elsewhere: moments that this rank's optimizer does not hold, by name.

        Raises:
            SaveFailedError: if too many saves in a row have failed.
        """
        self._finish()
        self._check()
        tensors = contents(model, optimizer)
        tensors[checkpoint.OPTIMIZER] |= elsewhere or {}
        tensors = self._staging.copy(tensors)
        self._do(partial(self._write, step, tensors, deepcopy(dict(state))))

    def note_judgement(self, step: int, score: float, progress: Mapping[str, Any]) -> None:
        """Add to a step's checkpoint how it was judged, once it is written; does not wait for that.

        Raises:
            SaveFailedError: if too many saves in a row have failed.
        """
        while self._queue and self._queue[0].done():
            self._queue.popleft().result()
        self._check()
        self._do(partial(self._judge, step, score, deepcopy(dict(progress))))

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            SaveFailedError: if the last save failed.
        """
        self._finish()
        if self._failures:
            raise SaveFailedError(self._explain("the last save failed"))

    def _do(self, task: Callable[[], None]) -> None:
        if self._writer is None:
            task()
        else:
            self._queue.append(self._writer.submit(task))

    def _finish(self) -> None:
        """Wait for all tasks; what one of them raised, other than a failed save, comes out here."""
        while self._queue:
            self._queue.popleft().result()

    def _check(self) -> None:
        if len(self._failures) >= MOST_FAILURES:
            raise SaveFailedError(self._explain(f"{MOST_FAILURES} saves in a row failed"))

    def _explain(self, what: str) -> str:
        error = self._failures[-1]
        advice = ADVICE.get(error.errno or 0, "look after that disk")
        saved = checkpoint.steps_saved(self.folder)
        newest = f"goes on from {saved[0].name}" if saved else "begins anew"
        return f"{what} in {self.folder}: {error}; {advice}, then start the run again: it {newest}"

    def _write(self, step: int, tensors: Tensors, state: dict[str, Any]) -> None:
        name = checkpoint_name(step)
        try:
            files = {file: file_content(named) for file, named in tensors.items()}
            checkpoint.write(self.folder, name, files, state)
        except OSError as error:
            self._failures.append(error)
            count = f"{len(self._failures)} of {MOST_FAILURES} in a row before the run ends"
            self._say(f"warning: {self.folder / name} was not saved: {error} ({count})")
            return
        self._failures.clear()
        complaints = []
        try:
            complaints = self._prune()
            self._on_saved(step)
        except OSError as error:
            complaints.append(f"{self.folder / name} was saved, but after that: {error}")
        for complaint in complaints:
            self._say(f"warning: {complaint}")

    def _judge(self, step: int, score: float, progress: dict[str, Any]) -> None:
        path = self.folder / checkpoint_name(step)
        if not path.exists():
            return  # its save failed, which was said
        try:
            checkpoint.note_judgement(path, score, progress)
        except OSError as error:
            self._say(f"warning: the score of {path} was not noted: {error}")


class Staging:
    """Copies of tensors in the host's memory, in buffers that are allocated once.

    A copy is valid until the next one. Buffers for a GPU's tensors are pinned, so that all copies
    run at once and are waited for once.
    """

    def __init__(self) -> None:
        self._buffers: Tensors = {}

    def copy(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
        """Copy tensors, whose shapes are the same each time; done when it returns."""
        for file, named in tensors.items():
            buffers = self._buffers.setdefault(file, {})
            for name, tensor in named.items():
                if name not in buffers:
                    shape, kind, on_gpu = tensor.shape, tensor.dtype, tensor.is_cuda
                    buffers[name] = torch.empty(shape, dtype=kind, pin_memory=on_gpu)
                if tensor.is_cpu:  # without torch's threads: they would wait for each other
                    memory(buffers[name])[:] = memory(tensor)
                else:
                    buffers[name].copy_(tensor, non_blocking=True)
        devices = {tensor.device for named in tensors.values() for tensor in named.values()}
        for device in devices - {torch.device("cpu")}:
            torch.cuda.synchronize(device)
        return {
            file: {name: self._buffers[file][name] for name in named}
            for file, named in tensors.items()
        }
