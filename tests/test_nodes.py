"""What is refused if machines have not found each other, or do not see the same files."""

import os
import shutil
import socket
from pathlib import Path

import pytest
from worlds import run_world

from dtrain import nodes
from dtrain.data.store import MANIFEST
from dtrain.distributed import alone, connect
from dtrain.errors import UserError
from dtrain.nodes import check_nodes, check_shared, hosts_of


@pytest.mark.parametrize(
    ("started", "found", "is_refused"),
    [
        (None, 1, False),  # torchrun without srun, or no SLURM at all
        ("1", 1, False),
        ("2", 2, False),
        ("2", 1, True),
        ("8", 4, True),
        ("1", 2, False),  # a shell inside one node of the job started both by other means
    ],
)
def test_fewer_nodes_than_srun_started_are_refused(started, found, is_refused):
    environ = {"SLURM_STEP_NUM_NODES": started} if started else {}
    hosts = [f"n{i}" for i in range(found)]
    if not is_refused:
        check_nodes(hosts, environ)
        return
    with pytest.raises(UserError) as caught:
        check_nodes(hosts, environ)
    message = f"srun started this step on {started} nodes, but only {found} found each other"
    assert str(caught.value).startswith(f"{message} ({', '.join(hosts)})")


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path]:
    """A run directory, and a directory of prepared data."""
    for name in ("run", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / MANIFEST).write_text('{"here": true}', encoding="utf-8")
    return tmp_path / "run", tmp_path / "data"


def look(places: list[tuple[Path, Path]], nodes_of_ranks: list[int]) -> tuple[list[str], str]:
    """Be a rank on a machine that has run and data at these places; gives what it is told."""
    rank = int(os.environ["RANK"])
    node = nodes_of_ranks[rank]
    os.environ["LOCAL_RANK"] = str(nodes_of_ranks[:rank].count(node))
    socket.gethostname = lambda: f"n{node}"
    nodes.SECONDS_TO_APPEAR = 0.3
    with connect("cpu", 60) as world:
        hosts = hosts_of(world)
        try:
            check_shared(world, *places[node])
        except UserError as error:
            return hosts, str(error)
        return hosts, ""


def test_nodes_are_counted_whatever_their_number_of_ranks(places):
    assert run_world(3, look, [places, places], [0, 1, 1]) == [(["n0", "n1"], "")] * 3
    assert list(places[0].iterdir()) == []


@pytest.mark.slow
def test_who_does_not_see_the_run_directory_or_the_data_is_named(places, tmp_path):
    run, data = places
    shutil.copytree(data, tmp_path / "other data")
    (tmp_path / "other data" / MANIFEST).write_text('{"here": false}', encoding="utf-8")
    theirs = [places, (tmp_path / "nowhere", data), (run, tmp_path / "other data")]
    answers = run_world(4, look, theirs, [0, 1, 2, 2])
    assert len(set(map(str, answers))) == 1
    message = answers[0][1]
    assert f"n1 does not see the run directory {tmp_path}/nowhere;" in message
    assert f"n2 does not see the prepared data {tmp_path}/other data of n0" in message
    assert list(run.iterdir()) == []


def test_a_world_of_one_sees_what_it_sees(places):
    world = alone("cpu")
    assert hosts_of(world) == [socket.gethostname()]
    check_shared(world, *places)
    assert list(places[0].iterdir()) == []
