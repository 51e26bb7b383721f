import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from dtrain.peers import Peer, Peers, Sign, here, process_state, read_sign


def sign_of(rank=1, **changes):
    process = changes.get("process", os.getpid())
    started, _ = process_state(process)
    sign = Sign(
        4, rank, "node7", here(), process, started, 1, 7, 2, "backward", 0.0, 0.0, False, ""
    )
    return replace(sign, **changes)


@pytest.fixture
def write(tmp_path):
    def put(sign):
        (tmp_path / f"rank-{sign.rank}.json").write_text(json.dumps(asdict(sign)))

    return put


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def wait_for_state(process, letters):
    give_up = time.monotonic() + 5
    while process_state(process)[1] not in letters:
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_a_file_is_read_as_it_was_written(tmp_path, write):
    sign = sign_of(phase="décodage")
    write(sign)
    assert read_sign(tmp_path, 1) == sign


@pytest.mark.parametrize("length", [0, 1, 40, -2])
def test_half_a_file_is_none(tmp_path, write, length):
    write(sign_of())
    path = tmp_path / "rank-1.json"
    path.write_bytes(path.read_bytes()[:length])
    assert read_sign(tmp_path, 1) is None


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"rank": 1}', "\0" * 100])
def test_a_strange_file_is_none(tmp_path, text):
    (tmp_path / "rank-1.json").write_text(text)
    assert read_sign(tmp_path, 1) is None


def test_beats_and_moves_are_told_apart_by_this_ranks_own_clock(tmp_path, write):
    peers = Peers(tmp_path, rank=0, size=2, attempt=4)
    write(sign_of(time=1e12))
    peers.look(10.0)
    assert (peers.seen[1].beaten, peers.seen[1].moved) == (10.0, 10.0)
    write(sign_of(beats=2, time=0.0))
    peers.look(11.0)
    assert (peers.seen[1].beaten, peers.moved) == (11.0, 10.0)
    write(sign_of(beats=3, moves=3))
    peers.look(12.0)
    assert (peers.seen[1].beaten, peers.moved) == (12.0, 12.0)
    peers.look(20.0)
    assert peers.silent(20.0, 8.0) == [peers.seen[1]]
    assert peers.silent(20.0, 8.1) == []


def test_files_of_an_earlier_attempt_count_for_nothing(tmp_path, write):
    peers = Peers(tmp_path, rank=0, size=3, attempt=4)
    write(sign_of(rank=1, attempt=3, why="an old story"))
    write(sign_of(rank=2))
    peers.look(1.0)
    assert peers.missing == [1]
    assert peers.failure() == ""


def test_a_failure_is_passed_on(tmp_path, write):
    peers = Peers(tmp_path, rank=0, size=3, attempt=4)
    write(sign_of(rank=2, ended=True, why="rank 2 has failed"))
    peers.look(1.0)
    assert peers.failure() == "rank 2 has failed"


def test_a_process_here_is_gone_stopped_or_blocked(sleeper):
    peer = Peer(sign_of(process=sleeper.pid), 0.0, 0.0)
    assert peer.state == "blocked"
    sleeper.send_signal(signal.SIGSTOP)
    wait_for_state(sleeper.pid, "T")
    assert peer.state == "stopped"
    sleeper.kill()
    wait_for_state(sleeper.pid, "Z")
    assert peer.state == "gone"  # before its parent has asked
    sleeper.wait()
    assert peer.state == "gone"


def test_another_process_of_the_same_id_is_not_it():
    sign = sign_of()
    assert Peer(replace(sign, started=sign.started + 1), 0.0, 0.0).state == "gone"
    assert Peer(sign, 0.0, 0.0).state == "blocked"


@pytest.mark.parametrize("machine", ["another boot or container", None])
def test_nothing_is_known_of_processes_elsewhere(machine):
    """Containers may share a host's name, and have process ids of their own."""
    sign = sign_of(machine=machine, process=2**22 + 1, started=5)
    assert Peer(sign, 0.0, 0.0).state == "silent"


def test_another_namespace_of_process_ids_is_elsewhere(tmp_path):
    program = f"from dtrain.peers import here; open({str(tmp_path / 'here')!r}, 'w').write(here())"
    unshare = ["unshare", "--pid", "--fork", sys.executable, "-c", program]
    made = subprocess.run(unshare, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no namespace can be made here: {made.stderr.strip()}")
    assert (tmp_path / "here").read_text() != here()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ended": True}, "has ended"),
        ({"started": 1}, "is gone"),
        ({}, "gave no sign of life for 9 s, though its process runs"),
        (
            {"machine": "another"},
            "gave no sign of life for 9 s: it is stopped or its machine is gone",
        ),
    ],
)
def test_a_sentence_names_rank_machine_process_and_place(changes, words):
    sign = sign_of(**changes)
    assert Peer(sign, 1.0, 0.0).describe(10.0) == (
        f"rank 1 on {sign.host} (process {os.getpid()}) {words}; it was last at step 7, backward"
    )
