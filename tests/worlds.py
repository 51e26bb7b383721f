"""Real ranks for tests: processes over gloo, forked after one import of torch."""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer would import it, for seconds, in every rank anew

from dtrain.distributed import World, alone
from dtrain.peers import process_state


def world_of(size: int, local_size: int) -> World:
    """What rank 0 of so many ranks on the CPU would be told, without the others."""
    return replace(alone("cpu"), size=size, local_size=local_size)


def run_world(
    size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120
) -> list[Any]:
    """Run `function(*arguments)` on `size` ranks; gives what each returned, in rank order.

    The ranks find each other as torchrun would have them: through the environment.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        context.Process(
            target=_be_rank, args=(rank, size, port, pipes[rank][1], function, arguments)
        )
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        results = []
        for rank, (receiver, _) in enumerate(pipes):
            assert receiver.poll(timeout), f"rank {rank} of {size} gave no answer in {timeout} s"
            outcome, value = receiver.recv()
            assert outcome == "ok", f"rank {rank} of {size} failed:\n{value}"
            results.append(value)
        return results
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()


def run_until_exit(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 60,
    during: Callable[[list[int]], object] = lambda _: None,
) -> list[tuple[int, str]]:
    """Run `function(*arguments)` on `size` ranks that may die of it; what it returns is their code.

    It is over when every rank has ended or is stopped; those are then killed. Meanwhile `during`
    gets their process ids, in rank order.

    Returns:
        Each rank's exit code, negative for the signal that killed it, and what it wrote to stderr.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        stderrs = [Path(folder) / f"rank-{rank}" for rank in range(size)]
        ranks = [
            context.Process(
                target=_die_as_rank, args=(rank, size, port, stderrs[rank], function, arguments)
            )
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        give_up = time.monotonic() + timeout
        try:
            during([process.pid or 0 for process in ranks])
            while any(process.is_alive() and not _is_stopped(process.pid) for process in ranks):
                late = [rank for rank in range(size) if ranks[rank].is_alive()]
                assert time.monotonic() < give_up, f"ranks {late} did not end in {timeout} s"
                time.sleep(0.05)
        finally:
            for process in ranks:
                process.kill()  # reaches stopped ones too
                process.join()
        return [
            (process.exitcode or 0, path.read_text(encoding="utf-8", errors="replace"))
            for process, path in zip(ranks, stderrs, strict=True)
        ]


def _die_as_rank(
    rank: int,
    size: int,
    port: int,
    stderr: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    with stderr.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
    _join(rank, size, port)
    sys.exit(function(*arguments))


def _is_stopped(process: int | None) -> bool:
    return process_state(process or 0)[1] in "Tt"


def _be_rank(
    rank: int,
    size: int,
    port: int,
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    _join(rank, size, port)
    try:
        pipe.send(("ok", function(*arguments)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def _join(rank: int, size: int, port: int) -> None:
    """Be one of the ranks, as torchrun would tell it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
