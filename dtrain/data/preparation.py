"""Writes a token store: learns the vocabulary and encodes every sentence, once for all runs."""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path

import numpy as np

from dtrain.data.corpus import Corpus, CorpusReport, Pair, Split, corpora
from dtrain.data.settings import DataSettings, VocabularySettings
from dtrain.data.store import (
    FORMAT_VERSION,
    MANIFEST,
    SIDES,
    FileRecord,
    Manifest,
    Side,
    SplitReport,
    read_manifest,
    record_file,
    token_dtype,
)
from dtrain.data.vocabulary import Vocabulary
from dtrain.errors import UserError

CHUNK_PAIRS = 8192
SECONDS_BETWEEN_REPORTS = 3.0


def prepared_directory(
    data: DataSettings, vocabulary: VocabularySettings, vocabulary_of: Path | None = None
) -> Path:
    """Say where the tokens of these settings are kept; "{fingerprint}" stands for their key.

    Args:
        data: the texts.
        vocabulary: size and kind of the vocabulary to learn.
        vocabulary_of: a directory whose vocabulary is used instead, for fine-tuning.

    Raises:
        UserError: if a text file is missing, or there is nothing to learn from.
    """
    return Path(
        data.dir.replace("{fingerprint}", preparation_key(data, vocabulary, vocabulary_of)[:16])
    )


def preparation_key(
    data: DataSettings, vocabulary: VocabularySettings, vocabulary_of: Path | None = None
) -> str:
    """Hash all that decides what is prepared: settings and texts, but no paths and no weights.

    Raises:
        UserError: if a text file is missing, or there is nothing to learn from.
    """
    if not data.train:
        raise UserError("data.train is empty: name at least one corpus to learn from")
    identity = {
        "format_version": FORMAT_VERSION,
        "languages": [data.source_language, data.target_language],
        "max_length": data.max_length,
        "vocabulary": (
            vocabulary.model_dump()
            if vocabulary_of is None
            else Vocabulary.load(vocabulary_of).fingerprint
        ),
        "corpora": {
            split: [corpus.identity() for corpus in group] for split, group in corpora(data).items()
        },
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def is_prepared(
    data: DataSettings,
    vocabulary: VocabularySettings,
    directory: Path,
    vocabulary_of: Path | None = None,
) -> bool:
    """Say whether `directory` holds what `prepare` would write there.

    Raises:
        UserError: if it holds something else.
    """
    if not (directory / MANIFEST).exists():
        if directory.exists() and any(directory.iterdir()):
            raise UserError(f"data.dir: {directory} holds other files; name a new directory")
        return False
    if read_manifest(directory).key != preparation_key(data, vocabulary, vocabulary_of):
        raise UserError(
            f"data.dir: {directory} was prepared from other texts or settings; delete it, or put "
            '"{fingerprint}" into data.dir so that each has its own'
        )
    return True


def prepare(
    data: DataSettings,
    vocabulary: VocabularySettings,
    directory: Path,
    report: Callable[[str], None],
    vocabulary_of: Path | None = None,
) -> None:
    """Learn the vocabulary and write all tokens, unless that was done before.

    A directory appears complete or not at all; if another process was quicker, its result stays.

    Args:
        data: the texts.
        vocabulary: size and kind of the vocabulary.
        directory: what `prepared_directory` gave.
        report: is told every few seconds how far it is, one line at a time.
        vocabulary_of: as for `prepared_directory`.

    Raises:
        UserError: for any mistake in the texts or settings, naming file and line, or key.
    """
    if is_prepared(data, vocabulary, directory, vocabulary_of):
        return
    partial = directory.with_name(f"{directory.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        write_prepared(data, vocabulary, partial, report, vocabulary_of)
        try:
            partial.rename(directory)
        except OSError:
            if not is_prepared(data, vocabulary, directory, vocabulary_of):
                raise
    except OSError as error:
        raise UserError(f"data.dir: {directory} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_prepared(
    data: DataSettings,
    settings: VocabularySettings,
    directory: Path,
    report: Callable[[str], None],
    vocabulary_of: Path | None,
) -> None:
    """Write vocabulary, tokens, texts and, last, the manifest into a directory."""
    key = preparation_key(data, settings, vocabulary_of)
    groups = corpora(data)
    for split, group in groups.items():
        (directory / split).mkdir()
        if split != "train":
            write_text(group, directory / split)
    training_text = TrainingText(groups["train"], Progress(report, "reading train"))
    if vocabulary_of is None:
        languages = data.source_language, data.target_language
        report(f"prepare: learning {settings.size:,} pieces from {len(training_text):,} pairs")
        vocabulary = Vocabulary.train(training_text, settings, languages)
    else:
        vocabulary = Vocabulary.load(vocabulary_of)
    vocabulary.save(directory)

    splits: dict[Split, SplitReport] = {}
    for split, group in groups.items():
        total = len(training_text) if split == "train" else None
        progress = Progress(report, split, total)
        splits[split] = write_tokens(
            group, vocabulary, data.max_length, directory / split, progress, split == "train"
        )
    train = splits["train"]
    if train.num_pairs == 0:
        raise UserError(f"data.train: nothing is left to learn from ({summary(train.corpora)})")

    for split, report_of_split in splits.items():
        if report_of_split.num_pairs == 0:
            raise UserError(
                f"data.{split}: no pair can be judged ({summary(report_of_split.corpora)})"
            )

    files = sorted(path for path in directory.rglob("*") if path.is_file())
    records = {path.relative_to(directory).as_posix(): record_file(path) for path in files}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        key=key,
        fingerprint=content_fingerprint(records, train.corpora, vocabulary),
        source_language=data.source_language,
        target_language=data.target_language,
        max_length=data.max_length,
        shared_vocabulary=vocabulary.shared,
        source_vocabulary_size=vocabulary.source_size,
        target_vocabulary_size=vocabulary.target_size,
        vocabulary_fingerprint=vocabulary.fingerprint,
        length_ratio=train.source_tokens / train.target_tokens,
        splits=splits,
        files=records,
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


class Progress:
    """Says every few seconds how many pairs are done."""

    def __init__(self, report: Callable[[str], None], what: str, total: int | None = None) -> None:
        self._report = report
        self._what = what
        self._of_total = "" if total is None else f"/{total:,}"
        self._done = 0
        self._next = time.monotonic() + SECONDS_BETWEEN_REPORTS

    def advance(self, num_pairs: int) -> None:
        """Count `num_pairs` more as done."""
        self._done += num_pairs
        if time.monotonic() >= self._next:
            self._report(f"prepare: {self._what} {self._done:,}{self._of_total} pairs")
            self._next = time.monotonic() + SECONDS_BETWEEN_REPORTS


class TrainingText:
    """The cleaned pairs of all training corpora, counted once, read as often as need be."""

    def __init__(self, group: list[Corpus], progress: Progress) -> None:
        self._corpora = group
        reports = [CorpusReport(corpus=corpus.title) for corpus in group]
        for corpus, report in zip(group, reports, strict=True):
            for _ in corpus.clean(report):
                report.kept += 1
                progress.advance(1)
        self._num_pairs = sum(report.kept for report in reports)
        if self._num_pairs == 0:
            raise UserError(f"data.train: nothing is left to learn from ({summary(reports)})")

    def __len__(self) -> int:
        return self._num_pairs

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for corpus in self._corpora:
            for pair in corpus.clean(CorpusReport(corpus=corpus.title)):
                yield pair.source, pair.target


def write_text(group: list[Corpus], directory: Path) -> None:
    """Keep every line of both sides, so that translations can be compared line by line."""
    with (
        (directory / "source.txt").open("wb") as source,
        (directory / "target.txt").open("wb") as target,
    ):
        for corpus in group:
            for pair in corpus.read():
                source.write(f"{pair.source}\n".encode())
                target.write(f"{pair.target}\n".encode())


def write_tokens(
    group: list[Corpus],
    vocabulary: Vocabulary,
    max_length: int,
    directory: Path,
    progress: Progress,
    check_ratio: bool,
) -> SplitReport:
    """Encode the pairs of a split, chunk by chunk, and write those that are fit to be used."""
    reports = [CorpusReport(corpus=corpus.title) for corpus in group]
    with ExitStack() as stack:
        source, target = (
            stack.enter_context(SideWriter(directory, side, token_dtype(size)))
            for side, size in zip(
                SIDES, (vocabulary.source_size, vocabulary.target_size), strict=True
            )
        )
        for corpus, report in zip(group, reports, strict=True):
            for pairs in chunks(corpus.clean(report, check_ratio)):
                kept = encode_pairs(pairs, vocabulary, max_length, report)
                source.append([ids for ids, _ in kept])
                target.append([ids for _, ids in kept])
                report.kept += len(kept)
                progress.advance(len(pairs))
        return SplitReport(
            corpora=reports, source_tokens=source.num_tokens, target_tokens=target.num_tokens
        )


def encode_pairs(
    pairs: list[Pair], vocabulary: Vocabulary, max_length: int, report: CorpusReport
) -> list[tuple[list[int], list[int]]]:
    """Encode pairs on all cores; drop those that are too long, or blank once normalised."""
    threads = num_cores()
    sources = vocabulary.encode_source([pair.source for pair in pairs], threads)
    targets = vocabulary.encode_target([pair.target for pair in pairs], threads)
    kept = []
    for pair, source, target in zip(pairs, sources, targets, strict=True):
        if min(len(source), len(target)) == 1:  # nothing but the end of sentence
            report.drop("blank", pair.line)
        elif max(len(source), len(target)) > max_length:
            report.drop("too_long", pair.line)
        else:
            kept.append((source, target))
    return kept


class SideWriter:
    """Appends sentences to the token and offset files of one side."""

    def __init__(self, directory: Path, side: Side, dtype: np.dtype[np.integer]) -> None:
        self.num_tokens = 0
        self._dtype = dtype
        self._tokens = (directory / f"{side}.tokens").open("wb")
        self._offsets = (directory / f"{side}.offsets").open("wb")
        self._offsets.write(np.zeros(1, "<i8").tobytes())

    def __enter__(self) -> "SideWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._tokens.close()
        self._offsets.close()

    def append(self, sentences: list[list[int]]) -> None:
        """Write the ids of some sentences behind those before."""
        ends = np.fromiter(map(len, sentences), np.int64, len(sentences)).cumsum()
        tokens = np.fromiter(chain.from_iterable(sentences), self._dtype)
        self._tokens.write(tokens.tobytes())
        self._offsets.write((self.num_tokens + ends).astype("<i8").tobytes())
        self.num_tokens += len(tokens)


def chunks(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Cut a stream into lists of `CHUNK_PAIRS`."""
    stream = iter(pairs)
    while chunk := list(islice(stream, CHUNK_PAIRS)):
        yield chunk


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summary(reports: list[CorpusReport]) -> str:
    """Say in a few words what was dropped: "3 blank, 1 ratio"."""
    counts: dict[str, int] = {}
    for report in reports:
        for reason, dropped in report.dropped.items():
            counts[reason] = counts.get(reason, 0) + dropped.count
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "none dropped"


def content_fingerprint(
    files: dict[str, FileRecord], training: list[CorpusReport], vocabulary: Vocabulary
) -> str:
    """Hash what training sees: tokens and where they are cut, sizes of corpora, vocabulary."""
    content = {
        "files": {name: file.sha256 for name, file in files.items() if name.startswith("train/")},
        "corpus_sizes": [corpus.kept for corpus in training],
        "vocabulary": vocabulary.fingerprint,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
