"""Nodes: the machines of a run must all have found each other, and see the same files."""

import hashlib
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.data.store import MANIFEST
from dtrain.distributed import World
from dtrain.errors import UserError

SECONDS_TO_APPEAR = 20.0  # until a new file is seen on every node of a slow file system


def hosts_of(world: World) -> list[str]:
    """Name the machine of each node that takes part; every rank calls it."""
    names = world.gather(socket.gethostname() if _is_first_here() else None)
    return [name for name in names if name is not None]


def check_nodes(hosts: Sequence[str], environ: Mapping[str, str]) -> None:
    """Refuse to train on fewer nodes than srun started: the others would train on their own.

    Args:
        hosts: of the nodes whose ranks found each other.
        environ: the environment.

    Raises:
        UserError: naming both numbers.
    """
    started = int(environ.get("SLURM_STEP_NUM_NODES") or len(hosts))
    if len(hosts) < started:
        raise UserError(
            f"srun started this step on {started} nodes, but only {len(hosts)} found each other "
            f"({', '.join(hosts)}): give all nodes the same rendezvous address and port, one that "
            f"all of them reach. If fewer are meant, unset SLURM_STEP_NUM_NODES"
        )


def check_shared(world: World, run: Path, data_dir: Path) -> None:
    """Make sure that every node sees the run directory and the prepared data of rank 0.

    All ranks call it; the first of each node looks.

    Raises:
        UserError: on all ranks, naming the hosts that do not see one of them.
    """
    token, manifest = world.from_main(lambda: (_leave_token(run), _hash_of_manifest(data_dir)))
    missing = []
    if _is_first_here():
        deadline = time.monotonic() + SECONDS_TO_APPEAR
        while not (run / token).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        if not (run / token).exists():
            missing.append(f"the run directory {run.absolute()}")
        if _hash_of_manifest(data_dir) != manifest:
            missing.append(f"the prepared data {data_dir.absolute()}")
    answers = world.gather((socket.gethostname(), missing))
    if world.is_main:
        (run / token).unlink(missing_ok=True)
    complaints = [f"{host} does not see {' and '.join(what)}" for host, what in answers if what]
    if complaints:
        raise UserError(
            f"{'; '.join(complaints)} of {answers[0][0]}: both must lie on a file system that all "
            f"nodes share (--run.dir=PATH, --data.dir=PATH)"
        )


def _leave_token(run: Path) -> str:
    name = f".seen-{secrets.token_hex(8)}"
    (run / name).touch()
    return name


def _hash_of_manifest(data_dir: Path) -> str:
    try:
        return hashlib.sha256((data_dir / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""


def _is_first_here() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"
