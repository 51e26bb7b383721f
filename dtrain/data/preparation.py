"""Writes a token store: learns the vocabulary and encodes every sentence, once for all runs."""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from dtrain.data.corpus import Corpus, CorpusReport, Split, corpora
from dtrain.data.encoding import Encoder
from dtrain.data.settings import DataSettings, VocabularySettings
from dtrain.data.store import (
    FORMAT_VERSION,
    MANIFEST,
    SIDES,
    FileRecord,
    Manifest,
    SideWriter,
    SplitReport,
    read_manifest,
    record_file,
    token_dtype,
)
from dtrain.data.vocabulary import Vocabulary
from dtrain.errors import UserError

PAIRS_A_PROCESS = 20_000  # fewer are encoded in less time than another process needs to start
PAIRS_BETWEEN_CLOCKS = 1000  # read before the time is asked for, which takes time itself


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
    *,
    seconds_between_reports: float = 10.0,
    num_processes: int | None = None,
) -> None:
    """Learn the vocabulary and write all tokens, unless that was done before.

    A directory appears complete or not at all; if another process was quicker, its result stays.
    What is written does not depend on the number of processes.

    Args:
        data: the texts.
        vocabulary: size and kind of the vocabulary.
        directory: what `prepared_directory` gave.
        report: is told now and then how far it is, one line at a time.
        vocabulary_of: as for `prepared_directory`.
        seconds_between_reports: how often that is, at most.
        num_processes: that encode; as many as there are cores, and work for, if None.

    Raises:
        UserError: for any mistake in the texts or settings, naming file and line, or key.
    """
    if is_prepared(data, vocabulary, directory, vocabulary_of):
        return
    partial = directory.with_name(f"{directory.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        progress = Progress(report, seconds_between_reports)
        write_prepared(data, vocabulary, partial, progress, vocabulary_of, num_processes)
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
    progress: "Progress",
    vocabulary_of: Path | None,
    num_processes: int | None,
) -> None:
    """Write vocabulary, tokens, texts and, last, the manifest into a directory."""
    key = preparation_key(data, settings, vocabulary_of)
    groups = corpora(data)
    for split, group in groups.items():
        (directory / split).mkdir()
        if split != "train":
            write_text(group, directory / split)
    training_text = TrainingText(groups["train"], progress)
    if vocabulary_of is None:
        languages = data.source_language, data.target_language
        progress.say(f"learning {settings.size:,} pieces from {len(training_text):,} pairs")
        vocabulary = Vocabulary.train(training_text, settings, languages)
    else:
        vocabulary = Vocabulary.load(vocabulary_of)
    vocabulary.save(directory)
    records = {path: record_file(path) for path in directory.rglob("*") if path.is_file()}

    splits: dict[Split, SplitReport] = {}
    if num_processes is None:
        num_processes = max(1, min(num_cores(), training_text.num_lines // PAIRS_A_PROCESS))
    with Encoder(directory, data.max_length, num_processes) as encoder:
        for split, group in groups.items():
            progress.begin(f"encoding {split}", training_text.num_lines if split == "train" else 0)
            splits[split], written = write_tokens(
                group, vocabulary, encoder, directory / split, progress, split == "train"
            )
            records |= written
    train = splits["train"]
    if train.num_pairs == 0:
        raise UserError(f"data.train: nothing is left to learn from ({summary(train.corpora)})")

    for split, report_of_split in splits.items():
        if report_of_split.num_pairs == 0:
            raise UserError(
                f"data.{split}: no pair can be judged ({summary(report_of_split.corpora)})"
            )

    files = {path.relative_to(directory).as_posix(): records[path] for path in sorted(records)}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        key=key,
        fingerprint=content_fingerprint(files, train.corpora, vocabulary),
        source_language=data.source_language,
        target_language=data.target_language,
        max_length=data.max_length,
        shared_vocabulary=vocabulary.shared,
        source_vocabulary_size=vocabulary.source_size,
        target_vocabulary_size=vocabulary.target_size,
        vocabulary_fingerprint=vocabulary.fingerprint,
        length_ratio=train.source_tokens / train.target_tokens,
        splits=splits,
        files=files,
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


class Progress:
    """Says now and then what is being done, how much of it is, how fast, and how long it takes."""

    def __init__(self, report: Callable[[str], None], seconds_between: float) -> None:
        self._report, self._seconds_between = report, seconds_between
        self.begin("", 0)

    def say(self, what: str) -> None:
        """Report something at once."""
        self._report(f"prepare: {what}")

    def begin(self, what: str, total: int) -> None:
        """Turn to the next thing to do: so many pairs; 0 if nobody knows."""
        self._what, self._total, self._done = what, total, 0
        self._begun = time.monotonic()
        self._next = self._begun + self._seconds_between

    def advance(self, num_pairs: int) -> None:
        """Count `num_pairs` more as done."""
        self._done += num_pairs
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._seconds_between
            self.say(", ".join(self._parts(now - self._begun)))

    def _parts(self, seconds: float) -> Iterator[str]:
        rate = self._done / max(seconds, 1e-9)
        if not self._total:
            yield f"{self._what}: {self._done:,} pairs"
            yield f"{rate:,.0f} a second"
            return
        yield f"{self._what}: {self._done:,} of {self._total:,} pairs"
        yield f"{rate:,.0f} a second"
        minutes, left = divmod(round((self._total - self._done) / rate), 60)
        yield f"{minutes}:{left:02} left"


class TrainingText:
    """The cleaned pairs of all training corpora, counted once, read as often as need be.

    Attributes:
        num_lines: pairs there are, dropped ones included.
    """

    def __init__(self, group: list[Corpus], progress: Progress) -> None:
        self._corpora = group
        progress.begin("reading train", 0)
        reports = [CorpusReport(corpus=corpus.title) for corpus in group]
        for corpus, report in zip(group, reports, strict=True):
            for _ in corpus.clean(report):
                report.kept += 1
                if report.kept % PAIRS_BETWEEN_CLOCKS == 0:
                    progress.advance(PAIRS_BETWEEN_CLOCKS)
        self._num_pairs = sum(report.kept for report in reports)
        dropped = sum(d.count for report in reports for d in report.dropped.values())
        self.num_lines = self._num_pairs + dropped
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
    encoder: Encoder,
    directory: Path,
    progress: Progress,
    check_ratio: bool,
) -> tuple[SplitReport, dict[Path, FileRecord]]:
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
            for chunk in encoder.encode(corpus.read(), check_ratio):
                source.append(chunk.source)
                target.append(chunk.target)
                for reason, line in chunk.dropped:
                    report.drop(reason, line)
                report.kept += len(chunk.source[1])
                progress.advance(chunk.num_pairs)
        report_of_split = SplitReport(
            corpora=reports, source_tokens=source.num_tokens, target_tokens=target.num_tokens
        )
        return report_of_split, source.records() | target.records()


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
