"""Memory of a CPU: what a process may still take, what a piece of work would, what is kept."""

import ctypes
import resource
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path("/")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h

GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}
"""Where the kernel keeps a group's limit, its use, and what of that it would drop: v2 and v1."""


def free_memory(num_processes: int, root: Path = ROOT) -> int:
    """Give the bytes that this process may still take before the kernel refuses or kills it.

    That is the least of what the machine has, what its control groups (of a container or a batch
    job) leave, both shared with the other processes, and what `ulimit -v` leaves to each.

    Args:
        num_processes: how many on this machine want as much.
        root: of the files that say so. Linux only.
    """
    shared = min([_available(root), *_left_in_groups(root)]) // num_processes
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return max(0, shared)
    pages = int((root / "proc/self/statm").read_text(encoding="ascii").split()[0])
    return max(0, min(shared, limit - pages * resource.getpagesize()))


def keep_freed_memory() -> None:
    """From now on, let freed memory wait for the next tensor instead of going back to the kernel.

    Steps are alike, so what one frees the next one asks for. The kernel would hand it out page by
    page, zeroed: 0.2 microseconds each on bare metal, often ten times as much in a virtual machine.
    Nothing but glibc has these switches; elsewhere nothing happens.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_TRIM_THRESHOLD, -1)  # never give back what lies at the end
        set_option(M_MMAP_MAX, 0)  # no tensor gets a mapping of its own, which ends with it


def peak_bytes(work: Callable[[], object]) -> int:
    """Run `work` and give the most bytes of tensors that it had at once, beside those before.

    What an operation needs within itself, and what the allocator wastes, is not counted.
    """
    with _Tally() as tally:
        work()
    return tally.peak


class _Tally(TorchDispatchMode):
    """Follows every tensor that is made, forward and backward, to its end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.live = self.peak = 0
        self._known = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._known.update(_storages((args, kwargs)))  # views and in-place results are not new
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                self._known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.peak = max(self.peak, self.live)


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage()


def _available(root: Path) -> int:
    """Give what the machine could hand out without swapping."""
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {name: size.split()[0] for name, _, size in (line.partition(":") for line in lines)}
    return 1024 * int(sizes["MemAvailable"])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Give what each control group of this process, and each one around it, leaves."""
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controller, path = line.split(":", 2)
        if controller not in GROUPS:
            continue
        base, limit, used, droppable = GROUPS[controller]
        place = root / base / path.lstrip("/")
        while place.is_relative_to(root / base):
            # No file where a container hides its surroundings; the word `max` is no limit.
            with suppress(FileNotFoundError, ValueError):
                most, now = (int((place / name).read_text()) for name in (limit, used))
                stat = (place / "memory.stat").read_text(encoding="ascii").split()
                yield most - now + int(dict(zip(stat[::2], stat[1::2], strict=True))[droppable])
            place = place.parent
