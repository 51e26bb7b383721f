"""World: ranks, devices and every collective. One process is a world of one."""

import faulthandler
import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Not all of them are in its __all__.
from torch.distributed import GradBucket, HashStore, ProcessGroup  # type: ignore[attr-defined]
from torch.distributed import distributed_c10d as c10d
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from dtrain.errors import UserError
from dtrain.waiting import beating, wait_for_main

# What PyTorch 2.13 calls forward_sync_buffers was broadcast_buffers before. Buffers are tables of
# positions, computed by each rank; what a rank reads in validation may even make one longer.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"

MEETING_SECONDS = 0.02
SECONDS_TO_LEAVE = 10.0


@dataclass(frozen=True)
class World:
    """The ranks of a run, and this one's place among them.

    Attributes:
        rank: of this process, from 0.
        size: number of ranks.
        local_size: ranks on this machine.
        device: where this rank computes.
        store: the ranks' shared key-value store, for waits longer than any time-out.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device
    store: c10d.Store
    _wrapped: list[DistributedDataParallel] = field(default_factory=list, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and speaks."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Machines that take part."""
        return self.size // self.local_size

    def wrap(
        self,
        module: nn.Module,
        bucket_mb: int | Literal["auto"] = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> nn.Module:
        """Let backward average gradients over the ranks; a world of one needs no wrapper.

        Args:
            module: gives the loss.
            bucket_mb: MiB of gradients that are reduced together, while backward goes on with the
                others. auto: what torch takes on a GPU; all at once on a CPU, whose cores have
                enough to do with backward.
            dtype: in which they travel and are summed, fp32 or bf16.
        """
        if self.size == 1:
            return module
        on_gpu = self.device.type == "cuda"
        if bucket_mb == "auto":
            bucket_mb = 0 if on_gpu else 1 + sum(p.nbytes for p in module.parameters()) // 2**20
        buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
        wrapped = DistributedDataParallel(
            module,
            device_ids=[self.device] if on_gpu else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=bucket_mb or None,  # None: 25, but 1 for the first
            **buffers,
        )
        if dtype is torch.bfloat16:
            wrapped.register_comm_hook(None, _reduce_in_bf16)
        self._wrapped.append(wrapped)
        return wrapped

    def unwrap(self) -> None:
        """Let go of all modules that were wrapped; none of them is called any more."""
        for module in self._wrapped:
            # They would hold the process group beyond its end, and whichever is the last to let go
            # of it ends its threads: these two while they keep Python's lock, for which a thread
            # may wait.
            del module.logger, module.reducer
        self._wrapped.clear()

    def accumulating(self, module: nn.Module) -> AbstractContextManager[None]:
        """Hold back the reduction; both forward and backward must happen inside."""
        if isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return nullcontext()

    def shard(
        self,
        kind: type[torch.optim.Optimizer],
        groups: list[dict[str, Any]],
        **settings: Any,
    ) -> torch.optim.Optimizer:
        """Make an optimizer whose moments are split over the ranks; a world of one needs none.

        ZeRO-1 (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, 5.1): each rank holds the
        moments of some parameters and updates those, then all get them from it. Every parameter
        belongs to one rank as a whole, so that the update is the same, bit for bit.

        Args:
            kind: the optimizer of one rank's share, which is the attribute `optim`.
            groups: of parameters, as any optimizer takes them.
            settings: for all of them.
        """
        if self.size == 1:
            return kind(groups, **settings)
        with warnings.catch_warnings():  # of what torch makes other optimizers with, for a second
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer(groups, kind, parameters_as_bucket_view=True, **settings)

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring tensors that each rank has under names of its own to rank 0, by way of the CPU.

        Returns:
            On rank 0 those of all other ranks; nothing elsewhere.
        """
        facts = self.gather([(name, t.shape, t.dtype) for name, t in tensors.items()])
        received = dict[str, Tensor]()
        if not self.is_main:
            for tensor in tensors.values():
                dist.send(tensor.cpu().contiguous(), 0)
            return received
        for rank, theirs in enumerate(facts[1:], start=1):
            for name, shape, dtype in theirs:
                received[name] = torch.empty(shape, dtype=dtype)
                dist.recv(received[name], rank)
        return received

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place, on whatever device it is."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, step: int, *wishes: bool) -> tuple[bool, ...]:
        """Tell for each wish whether any rank has it, at the same step on all.

        Raises:
            RuntimeError: if the ranks are not at the same step.
        """
        if self.size == 1:
            return wishes
        word = torch.tensor([step, -step, *wishes])
        dist.all_reduce(word, op=dist.ReduceOp.MAX)
        newest, oldest, *any_wish = word.tolist()
        if newest != -oldest:
            raise RuntimeError(f"ranks lost step: one is at {newest}, another at {-oldest}")
        return tuple(map(bool, any_wish))

    def gather(self, value: object) -> list[Any]:
        """Collect one picklable value of each rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def tree_sum(self, values: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place and in the order of a binary tree over them.

        Ranks exchange with the neighbour, then neighbouring pairs with each other, and so on: a
        sum of 8 is ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), on every rank, bit for bit, since
        a + b is b + a. The number of ranks must be a power of two.
        """
        theirs = torch.empty_like(values)
        distance = 1
        while distance < self.size:
            partner = self.rank ^ distance
            exchange = [
                dist.P2POp(dist.isend, values, partner),
                dist.P2POp(dist.irecv, theirs, partner),
            ]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            values += theirs
            distance *= 2
        return values

    def check_same(self, what: str, value: int) -> None:
        """Make sure that all ranks have the same 64-bit number.

        Raises:
            RuntimeError: on every rank, naming those that most others disagree with.
        """
        values = self.gather(value)
        usual = max(values, key=values.count)
        strange = [rank for rank, theirs in enumerate(values) if theirs != usual]
        if strange:
            names = ", ".join(map(str, strange))
            raise RuntimeError(
                f"ranks do not agree: {what} of rank {names} differ from the other ranks'. A fault "
                f"of memory, processor or link; the last checkpoint was the same on all ranks"
            )

    def meet(self) -> None:
        """Wait until every rank is here, for as long as the heartbeat lets them.

        For what lasts longer on one rank than collectives may wait for each other; a rank that
        never comes is the heartbeat's business.
        """
        if self.size == 1:
            return
        place = f"meeting/{self.store.add(f'meetings/{self.rank}', 1)}"
        self.store.add(place, 1)
        while self.store.add(place, 0) < self.size:
            time.sleep(MEETING_SECONDS)

    def leave(self) -> None:
        """Go, rank 0 last: it may hold the store that others still speak to."""
        left = self.store.add("left", 1)
        deadline = time.monotonic() + SECONDS_TO_LEAVE
        while self.is_main and left < self.size and time.monotonic() < deadline:
            time.sleep(MEETING_SECONDS)
            left = self.store.add("left", 0)

    def set_timeout(self, seconds: int) -> None:
        """Let collectives from now on fail after so many seconds without one of the ranks."""
        if self.size > 1:
            dist.barrier()  # nobody may be under the shorter limit while others are slow to start
        c10d._set_pg_timeout(timedelta(seconds=seconds))

    def call_off(self, what: str) -> None:
        """Tell all ranks, while they work apart, that something is not wanted any more."""
        self.store.set(f"off/{what}", "")

    def is_called_off(self, what: str) -> bool:
        """Whether any rank called something off."""
        return bool(self.store.check([f"off/{what}"]))

    def from_main(self, task: Callable[[], Any]) -> Any:
        """Let rank 0 run `task` and give all ranks its value (a picklable one).

        The others wait as long as rank 0 shows signs of life, however long that takes. A UserError
        of rank 0 is raised on every rank.
        """
        if self.size == 1:
            return task()
        shared: list[tuple[Any, str | None]] = [(None, None)]
        if self.is_main:
            with beating(self.store):
                try:
                    shared = [(task(), None)]
                except UserError as error:
                    shared = [(None, str(error))]
            self.store.add(f"done/{self._task_number()}", 1)
        else:
            wait_for_main(self.store, f"done/{self._task_number()}", self.rank)
        dist.broadcast_object_list(shared, src=0)
        value, mistake = shared[0]
        if mistake is not None:
            raise UserError(mistake)
        return value

    def _task_number(self) -> int:
        """Count this rank's calls of `from_main`, so that each waits for its own."""
        return int(self.store.add(f"calls/{self.rank}", 1))


def _reduce_in_bf16(group: ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Call torch's hook, which DistributedDataParallel refuses by its name where NCCL is not."""
    return bf16_compress_hook(group, bucket)


@contextmanager
def connect(device: str, timeout: int) -> Iterator[World]:
    """Join the ranks that torchrun started, or be a world of one.

    Args:
        device: auto, cpu or cuda.
        timeout: seconds after which a collective that a rank does not join fails.

    Raises:
        UserError: if the device is not there or the launcher's variables do not fit together.
    """
    chosen = _choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    if "RANK" in os.environ and not {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        raise UserError("RANK is set, but LOCAL_RANK or LOCAL_WORLD_SIZE is not; use torchrun")
    if "RANK" in os.environ:
        store, rank, size = next(rendezvous("env://", timeout=limit))
    else:
        store, rank, size = HashStore(), 0, 1
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if chosen.type == "cuda":  # NCCL connects here, and waits for ever for whom it cannot reach
        faulthandler.dump_traceback_later(timeout + SECONDS_TO_LEAVE, exit=True)
    dist.init_process_group(
        backend,
        store=c10d.PrefixStore("groups", store),
        rank=rank,
        world_size=size,
        timeout=limit,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    faulthandler.cancel_dump_traceback_later()
    world = World(rank, size, local_size, chosen, c10d.PrefixStore("dtrain", store))
    yield world
    # Only on success: after an error a peer may be stuck in a collective, and cleaning up joins it.
    world.unwrap()
    dist.destroy_process_group()
    world.leave()


def alone(device: str) -> World:
    """Be a world of one for a command that needs no other rank.

    Raises:
        UserError: if the device is not there.
    """
    return World(0, 1, 1, _choose_device(device), HashStore())


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch finds no GPU here; use --run.device=cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            f"start that many processes (--nproc_per_node={torch.cuda.device_count()})"
        )
    return torch.device("cuda", local_rank)
