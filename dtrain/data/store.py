"""The token store: ids of every sentence in flat files, memory-mapped.

```
prepared/FINGERPRINT/
  manifest.json          what is here, and what was dropped
  vocabulary.model       source.model and target.model if not shared
  train/                 source.tokens, source.offsets, target.tokens, target.offsets
  validation/ test/      the same, and the text itself: source.txt, target.txt
```
Sentence *i* of a side is `tokens[offsets[i] : offsets[i + 1]]`, the end of sentence included.
The directory is made by `dtrain.data.preparation`; hashes are taken while it is written, and
opening it looks at sizes alone.
"""

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dtrain.data.corpus import CorpusReport, Split
from dtrain.data.vocabulary import Vocabulary
from dtrain.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SENTENCES_HELD = 2**14  # read before the memory of their pages is given back

Number = TypeVar("Number", bound=np.integer)
Side = Literal["source", "target"]
SIDES: tuple[Side, Side] = ("source", "target")
Ragged = tuple[NDArray[np.integer], NDArray[np.int64]]
"""Sentences of one side end to end: all tokens in one row, and the lengths that cut it."""


class SplitReport(BaseModel):
    """What is kept of one split: its corpora in the order of the settings, tokens a side."""

    model_config = ConfigDict(frozen=True)

    corpora: list[CorpusReport]
    source_tokens: int
    target_tokens: int

    @property
    def num_pairs(self) -> int:
        """How many pairs there are tokens of."""
        return sum(corpus.kept for corpus in self.corpora)


class FileRecord(BaseModel):
    """Size in bytes and SHA-256 of a file."""

    model_config = ConfigDict(frozen=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """What a prepared directory holds.

    Attributes:
        key: what `preparation_key` gave for the settings and texts it was made of.
        fingerprint: SHA-256 of the content that training sees; equal content trains equally.
        length_ratio: source tokens a target token in the training split.
        files: by path relative to the directory.
    """

    model_config = ConfigDict(frozen=True)

    format_version: int = Field(strict=True)
    key: str
    fingerprint: str
    source_language: str
    target_language: str
    max_length: int
    shared_vocabulary: bool
    source_vocabulary_size: int
    target_vocabulary_size: int
    vocabulary_fingerprint: str
    length_ratio: float
    splits: dict[Split, SplitReport]
    files: dict[str, FileRecord]

    @property
    def corpus_sizes(self) -> list[int]:
        """Pairs of each training corpus, in the order in which they stand in the store."""
        return [corpus.kept for corpus in self.splits["train"].corpora]


class TokenStore:
    """The sentences of one split, memory-mapped: opening reads nothing of them."""

    def __init__(self, directory: Path, vocabulary: Vocabulary) -> None:
        self._source = MappedSide(directory, "source", token_dtype(vocabulary.source_size))
        self._target = MappedSide(directory, "target", token_dtype(vocabulary.target_size))

    def __len__(self) -> int:
        return len(self._source)

    def source_lengths(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the source tokens of sentences `ids` [N] -> [N]."""
        return self._source.lengths(ids)

    def target_lengths(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the target tokens of sentences `ids` [N] -> [N]."""
        return self._target.lengths(ids)

    def gather(self, ids: NDArray[np.int64]) -> tuple[Ragged, Ragged]:
        """Give the source and target sentences `ids` [N], in that order, end to end."""
        return self._source.gather(ids), self._target.gather(ids)


class MappedSide:
    """The tokens [num_tokens] and offsets [num_sentences + 1] of one side of a split."""

    def __init__(self, directory: Path, side: Side, dtype: np.dtype[np.integer]) -> None:
        self._tokens = MappedFile(directory / f"{side}.tokens", dtype)
        self._offsets = MappedFile(directory / f"{side}.offsets", np.dtype(np.int64))
        self._num_held = 0

    def __len__(self) -> int:
        return len(self._offsets.numbers) - 1

    def lengths(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the tokens of sentences `ids` [N] -> [N]."""
        self._note_read(len(ids))
        return self._offsets.numbers[ids + 1] - self._offsets.numbers[ids]

    def gather(self, ids: NDArray[np.int64]) -> Ragged:
        """Copy the sentences `ids` [N] out, end to end."""
        lengths = self.lengths(ids)
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(lengths.sum())
        positions += np.repeat(self._offsets.numbers[ids] - starts, lengths)
        return self._tokens.numbers[positions], lengths

    def _note_read(self, num_sentences: int) -> None:
        """Give memory back now and then; else, over an epoch, a process would hold the corpus."""
        self._num_held += num_sentences
        if self._num_held > SENTENCES_HELD:
            self._num_held = 0
            self._tokens.give_back()
            self._offsets.give_back()


class MappedFile(Generic[Number]):
    """A file mapped into memory.

    Attributes:
        numbers: what it holds, in one row.
    """

    def __init__(self, path: Path, dtype: np.dtype[Number]) -> None:
        self._map: mmap.mmap | None = None
        self.numbers: NDArray[Number] = np.empty(0, dtype)
        if path.stat().st_size > 0:  # nothing cannot be mapped
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.numbers = np.frombuffer(self._map, dtype)

    def give_back(self) -> None:
        """Let go of the pages read so far; they stay in the system's cache, to be read again."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class PreparedData:
    """A prepared directory, open for reading.

    Attributes:
        directory: where it is.
        manifest: what it holds.
        vocabulary: learned from its training split.
        train: tokens to learn from.
        validation: tokens to judge on during training, if there are any.
        test: tokens to judge on at the end, if there are any.
    """

    directory: Path
    manifest: Manifest
    vocabulary: Vocabulary
    train: TokenStore
    validation: TokenStore | None
    test: TokenStore | None

    @classmethod
    def open(cls, directory: Path) -> "PreparedData":
        """Open what `prepare` wrote.

        Raises:
            UserError: if it is not there, of another format version, or a file of it is missing
                or of the wrong size.
        """
        manifest = read_manifest(directory)
        for name, record in manifest.files.items():
            path = directory / name
            size = path.stat().st_size if path.exists() else None
            if size != record.size:
                raise UserError(
                    f"{path} is damaged ({size} bytes, {record.size} expected); "
                    f"delete {directory} and prepare it again"
                )
        vocabulary = Vocabulary.load(directory)
        stores = {split: TokenStore(directory / split, vocabulary) for split in manifest.splits}
        return cls(
            directory,
            manifest,
            vocabulary,
            stores["train"],
            stores.get("validation"),
            stores.get("test"),
        )

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            UserError: naming the first file that is not as it was written.
        """
        for name, record in self.manifest.files.items():
            if record_file(self.directory / name) != record:
                raise UserError(
                    f"{self.directory / name} has changed since it was prepared; "
                    f"delete {self.directory} and prepare it again"
                )

    def text(self, split: Literal["validation", "test"]) -> tuple[list[str], list[str]]:
        """Give all source and target lines of a split, blank and too long ones too.

        Raises:
            UserError: if the data has no such split.
        """
        if split not in self.manifest.splits:
            raise UserError(f"{self.directory} has no {split} text; set data.{split}")
        source, target = (
            (self.directory / split / f"{side}.txt").read_bytes().decode().split("\n")[:-1]
            for side in SIDES
        )
        return source, target


def token_dtype(vocabulary_size: int) -> np.dtype[np.integer]:
    """Choose the smallest type that holds every id."""
    return np.dtype("<u2") if vocabulary_size <= 2**16 else np.dtype("<u4")


class SideWriter:
    """Writes the token and offset files of one side, and hashes them on the way."""

    def __init__(self, directory: Path, side: Side, dtype: np.dtype[np.integer]) -> None:
        self.num_tokens = 0
        self._dtype = dtype
        self._paths = directory / f"{side}.tokens", directory / f"{side}.offsets"
        self._files = [path.open("wb") for path in self._paths]
        self._digests = [hashlib.sha256() for _ in self._paths]
        self._write(np.empty(0, dtype), np.zeros(1, np.int64))

    def __enter__(self) -> "SideWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def append(self, sentences: Ragged) -> None:
        """Write the ids of some sentences behind those before."""
        tokens, lengths = sentences
        self._write(tokens, self.num_tokens + np.cumsum(lengths))
        self.num_tokens += len(tokens)

    def records(self) -> dict[Path, FileRecord]:
        """Give size and hash of both files as written so far."""
        sizes = [file.tell() for file in self._files]
        hashes = [digest.hexdigest() for digest in self._digests]
        return {
            path: FileRecord(size=size, sha256=sha256)
            for path, size, sha256 in zip(self._paths, sizes, hashes, strict=True)
        }

    def _write(self, tokens: NDArray[np.integer], offsets: NDArray[np.int64]) -> None:
        numbers = tokens.astype(self._dtype), offsets.astype("<i8")
        for row, file, digest in zip(numbers, self._files, self._digests, strict=True):
            file.write(row.data)
            digest.update(row.data)


def read_manifest(directory: Path) -> Manifest:
    """Read a prepared directory's manifest.

    Raises:
        UserError: if there is none, or it is of another format version or damaged.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {content['format_version']}, not {FORMAT_VERSION}; "
                f"delete {directory} and prepare it again"
            )
        return Manifest.model_validate(content)
    except FileNotFoundError as error:
        raise UserError(f"{directory} holds no prepared data; run `dtrain prepare`") from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        message = f"{path} is damaged ({error}); delete {directory} and prepare it again"
        raise UserError(message) from error


def record_file(path: Path) -> FileRecord:
    """Measure and hash a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileRecord(size=path.stat().st_size, sha256=digest.hexdigest())
