import errno
import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from dtrain import durable


def test_what_is_written_is_on_disk_and_described(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(Path(f"/proc/self/fd/{fd}").readlink()), sync(fd))
    )
    path = tmp_path / "file"
    facts = durable.write_file(path, [b"ab", memoryview(b"cde")])
    assert path.read_bytes() == b"abcde"
    assert facts == {"size": 5, "sha256": hashlib.sha256(b"abcde").hexdigest()}
    assert durable.sha256(path) == facts["sha256"]
    assert synced == [path]


def test_json_is_replaced_in_one_go(tmp_path):
    path = tmp_path / "status.json"
    durable.write_json(path, {"step": 0})
    torn, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                torn.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    writers = [
        threading.Thread(
            target=lambda: [durable.write_json(path, {"step": "9" * n}) for n in range(200)]
        )
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    assert not torn
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    durable.write_json(path, {"step": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            durable.write_json(path, {"step": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]


def test_a_directory_is_never_missing_while_it_is_replaced(tmp_path, monkeypatch):
    seen, rename = [], Path.rename
    for name in ("old", "new", "final.replaced"):
        (tmp_path / name).mkdir()
    (tmp_path / "old").rename(tmp_path / "final")

    def watched(self: Path, to: Path) -> Path:
        result = rename(self, to)
        seen.append({path.name for path in tmp_path.iterdir()} & {"final", "final.replaced"})
        return result

    monkeypatch.setattr(Path, "rename", watched)
    (tmp_path / "new" / "mark").touch()
    replaced = durable.replace_directory(tmp_path / "new", tmp_path / "final")
    assert seen == [{"final.replaced"}, {"final", "final.replaced"}]
    assert (tmp_path / "final" / "mark").exists()
    assert replaced == tmp_path / "final.replaced"
    (tmp_path / "next").mkdir()
    assert durable.replace_directory(tmp_path / "next", tmp_path / "fresh").exists() is False


def test_what_cannot_be_deleted_is_said_and_the_rest_is_deleted(tmp_path):
    (tmp_path / "full" / "inside").mkdir(parents=True)
    complaints = durable.delete([tmp_path / "not-there", tmp_path / "full"])
    assert complaints == [f"{tmp_path}/not-there cannot be deleted: No such file or directory"]
    assert not list(tmp_path.iterdir())
