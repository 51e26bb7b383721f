"""Files and directories that are on disk whole or not at all, also after a kill or a power cut."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path


def to_json(value: object) -> bytes:
    """Give the content of a JSON file, in the one way in which dtrain writes it."""
    return (json.dumps(value, indent=1) + "\n").encode()


def write_json(path: Path, value: object) -> None:
    """Write JSON so that readers see the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        write_file(temporary, [to_json(value)])
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Write a file and wait until it is on disk; gives its `size` in bytes and its `sha256`."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def sha256(path: Path) -> str:
    """Hash a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_directory(new: Path, final: Path) -> Path:
    """Rename a directory to a name that may be taken; gives where the one that had it lies now.

    That is `NAME.replaced`, whole, so that a kill between the two renames loses nothing. It may be
    deleted once the new name is on disk.
    """
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    new.rename(final)
    return replaced


def sync_directory(path: Path) -> None:
    """Make sure that a directory's list of names is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(paths: Iterable[Path]) -> list[str]:
    """Delete directories; gives what could not be deleted, and why."""
    complaints = []
    for path in paths:
        try:
            shutil.rmtree(path)
        except OSError as error:
            complaints.append(f"{path} cannot be deleted: {error.strerror}")
    return complaints
