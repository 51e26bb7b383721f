"""torchrun with nodes that come and go; agents with addresses of their own stand in for nodes.

An agent is torchrun's own main function, in a fork of this process: that saves its slow imports.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from chaos import outcome
from torch.distributed import run as torchrun
from worlds import run_world

import dtrain
from dtrain import train
from dtrain.config import Config
from dtrain.run_directory import RunDirectory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has 127.0.0.2 by itself"),
]

SETTINGS = {
    "run__max_steps": 60,
    "checkpoint__every_steps": 5,
    "distributed__timeout": 10,
    "distributed__reduction": "tree",
}
PATIENCE = "last_call_timeout=1,keep_alive_interval=1"

# A step of the toy takes milliseconds; nobody could leave, or come while one rank is alone.
UNHURRIED = """
import os, time
from dtrain import fault

def strike(point, step=0, strike=fault.strike):
    if point == "after_optimizer":
        time.sleep(0.2 if os.environ["WORLD_SIZE"] == "1" else 0.05)
    strike(point, step)

fault.strike = strike
"""


class Node:
    """A pretended machine: an agent, and the rank that it starts and starts again."""

    def __init__(self, address: str, store: str, config: Config, folder: Path) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}"
        settings = folder / "run.yaml"
        settings.write_text(config.to_yaml(), encoding="utf-8")
        arguments = ["--nnodes=1:4", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-id=run"]
        arguments += ["--rdzv-backend=c10d", f"--rdzv-endpoint={store}"]
        arguments += [f"--rdzv-conf=is_host=0,{PATIENCE}", f"--local-addr={address}"]
        arguments += ["-m", "dtrain.train", "--config", str(settings)]
        path = f"{folder}:{Path(dtrain.__file__).parent.parent}"
        fork = multiprocessing.get_context("fork")
        self.agent: BaseProcess = fork.Process(target=self._run, args=(arguments, path))
        self.agent.start()

    def _run(self, arguments: list[str], path: str) -> None:
        file = os.open(self.output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": path}
        os.environ["OMP_NUM_THREADS"] = "1"
        torchrun.main(arguments)

    def signal(self, number: signal.Signals, *, agent: bool = True, rank: bool = True) -> None:
        """Send a signal to the agent and its rank, or to one of them."""
        process = self.agent.pid
        children = Path(f"/proc/{process}/task/{process}/children")
        ranks = children.read_text(encoding="utf-8").split() if self.agent.is_alive() else []
        for target in [process] * agent + [int(each) for each in ranks] * rank:
            with suppress(ProcessLookupError):
                os.kill(target, number)


class Nodes:
    """Starts nodes of one run; the store in which they find each other belongs to the test."""

    def __init__(self, config: Config, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(UNHURRIED, encoding="utf-8")
        self.config, self.folder = config, folder
        self.run = RunDirectory(config.run_dir)
        self.started: list[Node] = []
        self.store = torch.distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True
        )

    def start(self, address: str) -> Node:
        """Let a node come."""
        store = f"127.0.0.1:{self.store.port}"
        self.started.append(Node(address, store, self.config, self.folder))
        return self.started[-1]

    def wait_for_training(self, size: int, after: int = 0) -> int:
        """Wait until a start later than `after`, on `size` ranks, has saved; gives its number."""

        def trains() -> bool:
            last = self.run.attempts()[after:][-1:]
            return bool(last) and last[0].world_size == size and self.run.step_saved > last[0].step

        self._wait(trains, f"training on {size} ranks")
        return len(self.run.attempts())

    def wait_for_end(self) -> None:
        """Wait until every agent has ended."""
        self._wait(lambda: not any(n.agent.is_alive() for n in self.started), "the end")

    def _wait(self, there: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not there():
            if time.monotonic() > deadline:
                told = [node.output.read_text(encoding="utf-8") for node in self.started]
                pytest.fail(f"waited in vain for {what}:\n" + "\n----\n".join(told))
            time.sleep(0.05)


@pytest.fixture
def nodes(toy, tmp_path) -> Iterator[Nodes]:
    """Where nodes of a toy run start; none outlives the test."""
    made = Nodes(toy("run", **SETTINGS), tmp_path)
    yield made
    for node in made.started:
        node.signal(signal.SIGKILL)
        node.agent.join()


def die(node: Node) -> None:
    node.signal(signal.SIGKILL)


def leave(node: Node) -> None:
    node.signal(signal.SIGTERM, rank=False)


@pytest.mark.parametrize(
    ("address", "go"),
    [
        pytest.param("127.0.0.1", die, id="rank-0-dies"),
        pytest.param("127.0.0.2", die, id="rank-1-dies"),
        pytest.param("127.0.0.1", leave, id="rank-0-is-told"),
        pytest.param("127.0.0.2", leave, id="rank-1-is-told"),
    ],
)
def test_a_node_goes_and_comes_back_and_the_run_ends_as_if_undisturbed(nodes, toy, address, go):
    mine, other = (nodes.start(each) for each in ("127.0.0.1", "127.0.0.2"))
    going, staying = (mine, other) if address == "127.0.0.1" else (other, mine)
    begun = nodes.wait_for_training(2)
    go(going)
    alone = nodes.wait_for_training(1, after=begun)
    coming = nodes.start(address)
    nodes.wait_for_training(2, after=alone)
    nodes.wait_for_end()
    assert [staying.agent.exitcode, coming.agent.exitcode] == [0, 0]
    assert_ended_as_if_undisturbed(nodes, toy)


@pytest.mark.parametrize("hit", ["agent", "rank"])
def test_a_node_that_is_half_killed_is_made_whole(nodes, toy, hit):
    """A rank without an agent leaves when a new node comes; an agent starts a new rank."""
    staying, other = nodes.start("127.0.0.1"), nodes.start("127.0.0.2")
    begun = nodes.wait_for_training(2)
    other.signal(signal.SIGKILL, agent=hit == "agent", rank=hit == "rank")
    if hit == "agent":
        other = nodes.start("127.0.0.2")
    nodes.wait_for_training(2, after=begun)
    nodes.wait_for_end()
    assert [staying.agent.exitcode, other.agent.exitcode] == [0, 0]
    assert_ended_as_if_undisturbed(nodes, toy)


def assert_ended_as_if_undisturbed(nodes: Nodes, toy: Callable[..., Config]) -> None:
    assert nodes.run.read_status()["status"] == "completed"
    text = (nodes.run.path / "metrics.jsonl").read_text(encoding="utf-8")
    steps = [json.loads(line)["step"] for line in text.splitlines()]
    assert steps == list(range(1, SETTINGS["run__max_steps"] + 1))
    undisturbed = toy("undisturbed", **SETTINGS)
    assert run_world(1, train.run, undisturbed) == [0]
    assert outcome(nodes.config) == outcome(undisturbed)
