"""Parallel text in: pairs from files, .gz or `datasets`, and an account of what is dropped.

Everything streams: memory stays the same at any corpus size.
"""

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from pydantic import BaseModel, Field

from dtrain.data.settings import CorpusSettings, DataSettings
from dtrain.errors import UserError

Split = Literal["train", "validation", "test"]
Reason = Literal["blank", "too_long", "ratio", "undecodable"]
"""Why a pair is dropped: a side is blank, has too many tokens, is out of proportion to the other,
or is no text at all (a row of a data set without a string)."""

NUM_FIRST_LINES = 5
MAX_RATIO = 9
MIN_BYTES_FOR_RATIO = 40
WHOLE_HASH_BYTES = 64 * 2**20
HASH_BLOCK_BYTES = 2**16
NUM_HASH_BLOCKS = 64
ROWS_AT_ONCE = 1000


class Pair(NamedTuple):
    r"""A sentence and its translation, white space at the edges removed.

    Attributes:
        line: where it stands in its corpus, from 1.
        source: text, without "\n"; "" if undecodable.
        target: likewise.
        undecodable: whether a side of it is no text.
    """

    line: int
    source: str
    target: str
    undecodable: bool = False


class Dropped(BaseModel):
    """Pairs dropped for one reason: how many, and the numbers of the first lines."""

    count: int = 0
    first_lines: list[int] = Field(default_factory=list)


class CorpusReport(BaseModel):
    """What became of one corpus."""

    corpus: str
    kept: int = 0
    dropped: dict[Reason, Dropped] = Field(default_factory=dict)

    def drop(self, reason: Reason, line: int) -> None:
        """Count the pair at `line` as dropped."""
        dropped = self.dropped.setdefault(reason, Dropped())
        dropped.count += 1
        if len(dropped.first_lines) < NUM_FIRST_LINES:
            dropped.first_lines.append(line)


@dataclass(frozen=True)
class Corpus:
    """One parallel corpus.

    Attributes:
        settings: where its text is.
        source_language: code of the language translated from.
        target_language: code of the language translated to.
        key: the setting that names it, such as `data.train[0]`; errors begin with it.
    """

    settings: CorpusSettings
    source_language: str
    target_language: str
    key: str

    @property
    def title(self) -> str:
        """What a reader knows the corpus by."""
        settings = self.settings
        if settings.dataset is None:
            return f"{settings.source} + {settings.target}"
        parts = [settings.dataset, settings.name, settings.split]
        return " ".join(part for part in parts if part is not None)

    def read(self) -> Iterator[Pair]:
        """Yield every pair, blank ones and undecodable ones too.

        Raises:
            UserError: if a file is missing, empty, not UTF-8 or holds NUL bytes, if the two sides
                have different numbers of lines, or if the data set cannot be loaded.
        """
        return self._read_files() if self.settings.dataset is None else self._read_dataset()

    def clean(self, report: CorpusReport, check_ratio: bool = True) -> Iterator[Pair]:
        """Yield the pairs that are worth learning from; count the others in `report`."""
        for pair in self.read():
            reason = fault(pair, check_ratio)
            if reason is None:
                yield pair
            else:
                report.drop(reason, pair.line)

    def identity(self) -> dict[str, Any]:
        """Say what the text is, wherever it lies: hashes of files, settings of a data set.

        Raises:
            UserError: if a file is missing.
        """
        settings = self.settings
        if settings.dataset is None:
            return {side: content_hash(self._path(side)) for side in ("source", "target")}
        files = settings.data_files
        names = [files] if isinstance(files, str) else files or []
        local = [content_hash(Path(name)) if Path(name).is_file() else name for name in names]
        return settings.model_dump(exclude={"weight", "data_files"}) | {"data_files": local}

    def _path(self, side: Literal["source", "target"]) -> Path:
        path = Path(str(getattr(self.settings, side)))
        if not path.exists():
            raise UserError(f"{self.key}.{side}: {path} does not exist")
        if not path.is_file() or not os.access(path, os.R_OK):
            raise UserError(f"{self.key}.{side}: {path} is not a file that can be read")
        return path

    def _read_files(self) -> Iterator[Pair]:
        source_path, target_path = self._path("source"), self._path("target")
        sources, targets = read_lines(source_path), read_lines(target_path)
        line = 0
        for line, (source, target) in enumerate(zip_longest(sources, targets), start=1):
            if source is None or target is None:
                longer = line + sum(1 for _ in (targets if source is None else sources))
                counts = (line - 1, longer) if source is None else (longer, line - 1)
                raise UserError(
                    f"{self.key}: {source_path} has {counts[0]:,} lines but {target_path} has "
                    f"{counts[1]:,}; line by line, one must be the translation of the other"
                )
            yield Pair(line, source, target)
        if line == 0:
            raise UserError(f"{self.key}: {source_path} and {target_path} are empty")

    def _read_dataset(self) -> Iterator[Pair]:
        rows = self._load_dataset()
        line = 0
        for batch in rows.iter(batch_size=ROWS_AT_ONCE):
            for texts in zip(*self._columns(batch), strict=True):
                line += 1
                if all(is_text(text) for text in texts):
                    # A line break inside a row would tear it in two wherever text is kept in lines.
                    source, target = (text.replace("\n", " ").strip() for text in texts)
                    yield Pair(line, source, target)
                else:
                    yield Pair(line, "", "", undecodable=True)
        if line == 0:
            raise UserError(f"{self.key}: the data set {self.title} is empty")

    def _load_dataset(self) -> Any:
        # Imported here because it takes seconds, and text files need none of it.
        import datasets

        settings = self.settings
        try:
            return datasets.load_dataset(
                settings.dataset,
                name=settings.name,
                split=settings.split,
                revision=settings.revision,
                data_files=settings.data_files,
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            message = f"{self.key}: the data set {self.title} cannot be loaded: {error}"
            raise UserError(message) from error

    def _columns(self, batch: dict[str, list[Any]]) -> tuple[list[Any], list[Any]]:
        """Find source and target among the columns of some rows."""
        source_column, target_column = self.settings.source_column, self.settings.target_column
        if source_column is None or target_column is None:
            translations = batch.get("translation", [])
            # A row without a translation is dropped; one language that no row has is a mistake.
            found = {language for row in translations for language in row or {}}
            if not {self.source_language, self.target_language} <= found:
                raise UserError(
                    f"{self.key}: no `translation` column with {self.source_language} and "
                    f"{self.target_language} in {self.title} (columns {sorted(batch)}, languages "
                    f"{sorted(found)}); set source_column and target_column"
                )
            languages = self.source_language, self.target_language
            source, target = ([(row or {}).get(key) for row in translations] for key in languages)
            return source, target
        for name, column in (("source_column", source_column), ("target_column", target_column)):
            if column not in batch:
                raise UserError(
                    f"{self.key}.{name}: {self.title} has no column {column!r}, "
                    f"only {', '.join(sorted(batch))}"
                )
        return batch[source_column], batch[target_column]


def corpora(data: DataSettings) -> dict[Split, list[Corpus]]:
    """List the corpora of each split that has any."""
    languages = data.source_language, data.target_language
    train = [Corpus(c, *languages, f"data.train[{i}]") for i, c in enumerate(data.train)]
    splits: dict[Split, list[Corpus]] = {"train": train}
    if data.validation is not None:
        splits["validation"] = [Corpus(data.validation, *languages, "data.validation")]
    if data.test is not None:
        splits["test"] = [Corpus(data.test, *languages, "data.test")]
    return splits


def fault(pair: Pair, check_ratio: bool = True) -> Reason | None:
    """Say why a pair is not worth learning from; None if it is."""
    if pair.undecodable:
        return "undecodable"
    if not pair.source or not pair.target:
        return "blank"
    if check_ratio and out_of_proportion(pair.source, pair.target):
        return "ratio"
    return None


def out_of_proportion(source: str, target: str) -> bool:
    """Say whether one text is far too long to be the other's translation.

    Bytes are compared, not characters: the few characters of a Chinese sentence take three bytes
    each, which comes near the length of an English one. Short texts may differ as they like.
    """
    shorter, longer = sorted((len(source.encode()), len(target.encode())))
    return longer >= MIN_BYTES_FOR_RATIO and longer > MAX_RATIO * shorter


def read_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a text file, or of one in a .gz, white space at the edges removed.

    Lines end at "\n" and nowhere else: `str.splitlines` would also cut at U+0085 or U+2028, and
    put all lines behind it beside the wrong translation.

    Raises:
        UserError: if the file cannot be read, is not UTF-8, or holds NUL bytes.
    """
    try:
        with open_binary(path) as file:
            for number, raw in enumerate(file, start=1):
                yield decode(raw, path, number)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def open_binary(path: Path) -> BinaryIO | gzip.GzipFile:
    """Open a file, through gzip if its name says so."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def decode(raw: bytes, path: Path, number: int) -> str:
    """Turn the bytes of one line into text.

    Raises:
        UserError: if they are not UTF-8, or hold NUL.
    """
    if b"\0" in raw:
        raise UserError(f"{path}, line {number}: holds a NUL byte; is this a text file in UTF-8?")
    try:
        # Only a file's first bytes can be a byte order mark.
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: invalid UTF-8 (0x{raw[error.start]:02x} as byte "
            f"{error.start + 1}); convert the file or remove the line on both sides"
        ) from error


def is_text(text: object) -> bool:
    """Say whether a cell of a data set holds text that can be written as UTF-8."""
    if not isinstance(text, str) or "\0" in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


def content_hash(path: Path) -> str:
    """Hash what a file holds, not where it lies.

    Of a file above 64 MiB only its size, its time of change and blocks spread over it are taken:
    asking whether data is prepared should not read it all.
    """
    status = path.stat()
    with path.open("rb") as file:
        if status.st_size <= WHOLE_HASH_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
        for block in range(NUM_HASH_BLOCKS):
            last_start = status.st_size - HASH_BLOCK_BYTES
            file.seek(last_start * block // (NUM_HASH_BLOCKS - 1))
            digest.update(file.read(HASH_BLOCK_BYTES))
        return digest.hexdigest()
