"""What surrounds a training on each rank: its log, its heartbeat, and the name of who failed."""

from collections.abc import Iterator
from contextlib import contextmanager

from dtrain.distributed import World
from dtrain.heartbeat import Heartbeat
from dtrain.rank_log import RankLog
from dtrain.run_directory import RunDirectory
from dtrain.start import Ready


@contextmanager
def watched(ready: Ready, world: World) -> Iterator[Heartbeat]:
    """Show where this rank is, end it if all ranks hang, and name the rank that failed first."""
    directory, patience = RunDirectory(ready.config.run_dir), ready.config.distributed

    def note_failure(message: str) -> None:
        if ready.lock is not None and ready.lock.beat():  # rank 0, if the run is still its own
            directory.note_failure(ready.attempt, RuntimeError(message))

    with (
        RankLog(directory.path / "logs", world.rank, ready.attempt) as log,
        Heartbeat(
            directory.heartbeats,
            world.rank,
            world.size,
            patience.first_step_timeout,
            attempt=ready.attempt,
            log=log,
            on_stuck=note_failure,
        ) as heartbeat,
    ):
        try:
            yield heartbeat
        except RuntimeError as error:  # what a collective raises when a peer is gone
            lost = heartbeat.lost_peer()
            if not lost:
                raise
            raise RuntimeError(lost) from error
