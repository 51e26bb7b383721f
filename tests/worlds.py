"""Real ranks for tests: processes over gloo, forked after one import of torch."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch._dynamo  # the first optimizer would import it, for seconds, in every rank anew


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


def _be_rank(
    rank: int,
    size: int,
    port: int,
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        pipe.send(("ok", function(*arguments)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
