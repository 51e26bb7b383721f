"""The vocabulary: words to integer ids and back, by sentencepiece (Kudo and Richardson 2018).

The same text gives the same pieces on every machine: nothing is drawn at random, and the number
of threads, on which sentencepiece's sums depend, is fixed.
"""

import hashlib
import io
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from dtrain.data.settings import VocabularySettings
from dtrain.errors import UserError

# The ids of `dtrain.batch`, which cannot be imported without torch; a test keeps them equal.
PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3

TRAINER_THREADS = 16
MAX_TRAINING_LINES = 5_000_000
MAX_LINE_BYTES = 2**30


class Pairs(Protocol):
    """Pairs of source and target text that can be read more than once, such as a list."""

    def __len__(self) -> int:
        """Count the pairs."""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Begin to read them anew."""


class Vocabulary:
    """Pieces of words and their ids, shared by both languages or one set a side.

    Special tokens have the first ids: padding, unknown, begin and end of sentence, then one tag a
    language, `<en>` and `<de>`. Text cannot spell the first four; it can spell the tags, so that
    the lines of a multilingual corpus may begin with the language that is asked for.

    Attributes:
        source: sentencepiece model of the source side.
        target: model of the target side; the same object if `shared`.
    """

    def __init__(self, source: SentencePieceProcessor, target: SentencePieceProcessor) -> None:
        self.source = source
        self.target = target

    @classmethod
    def train(
        cls, pairs: Pairs, settings: VocabularySettings, languages: tuple[str, str]
    ) -> "Vocabulary":
        """Learn the pieces of some text.

        Args:
            pairs: training text, and none other. From above five million lines every k-th pair
                is taken.
            settings: size and kind of the vocabulary.
            languages: codes of the source and target languages, for the tags.

        Raises:
            UserError: if the text does not allow a vocabulary of that size.
        """
        every = max(1, -(-2 * len(pairs) // MAX_TRAINING_LINES))
        if settings.shared:
            lines = chain.from_iterable(islice(iter(pairs), 0, None, every))
            shared = learn(lines, settings, languages, "text")
            return cls(shared, shared)
        sources = (source for source, _ in islice(iter(pairs), 0, None, every))
        targets = (target for _, target in islice(iter(pairs), 0, None, every))
        return cls(
            learn(sources, settings, languages, f"{languages[0]} text"),
            learn(targets, settings, languages, f"{languages[1]} text"),
        )

    @classmethod
    def load(cls, directory: Path) -> "Vocabulary":
        """Read a vocabulary from the files that `save` writes.

        Raises:
            UserError: if they are missing or damaged.
        """
        if (directory / "vocabulary.model").exists():
            shared = load_model(directory / "vocabulary.model")
            return cls(shared, shared)
        return cls(load_model(directory / "source.model"), load_model(directory / "target.model"))

    def save(self, directory: Path) -> None:
        """Write `vocabulary.model`, or `source.model` and `target.model` if not shared."""
        directory.mkdir(parents=True, exist_ok=True)
        if self.shared:
            (directory / "vocabulary.model").write_bytes(self.source.serialized_model_proto())
        else:
            (directory / "source.model").write_bytes(self.source.serialized_model_proto())
            (directory / "target.model").write_bytes(self.target.serialized_model_proto())

    @property
    def shared(self) -> bool:
        """Whether both languages have the same pieces."""
        return self.source is self.target

    @property
    def source_size(self) -> int:
        """How many pieces the source side has, special tokens included."""
        return int(self.source.get_piece_size())

    @property
    def target_size(self) -> int:
        """How many pieces the target side has, special tokens included."""
        return int(self.target.get_piece_size())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over pieces and scores.

        Not over the files: sentencepiece also writes down there how it was called.
        """
        digest = hashlib.sha256(b"shared" if self.shared else b"separate")
        for model in (self.source,) if self.shared else (self.source, self.target):
            for index in range(model.get_piece_size()):
                piece = model.id_to_piece(index).encode()
                digest.update(struct.pack("<If", len(piece), model.get_score(index)) + piece)
        return digest.hexdigest()

    def tag_id(self, language: str) -> int:
        """Give the id of a language's tag on the source side, such as `<de>` for de.

        Raises:
            UserError: if the vocabulary has no such tag.
        """
        index = int(self.source.piece_to_id(tag(language)))
        if index == UNK_ID:
            raise UserError(f"the vocabulary has no tag {tag(language)}")
        return index

    def encode_source(self, lines: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Give the ids of each line, EOS_ID last, whatever the number of threads."""
        return encode(self.source, lines, num_threads)

    def encode_target(self, lines: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Give the ids of each line, EOS_ID last, whatever the number of threads."""
        return encode(self.target, lines, num_threads)

    def decode_target(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Give the text of each sentence of ids up to its first EOS_ID."""
        return [str(self.target.decode(spoken(sentence))) for sentence in ids]


def tag(language: str) -> str:
    """Spell the tag of a language."""
    return f"<{language}>"


def spoken(sentence: Sequence[int]) -> list[int]:
    """Keep what stands before EOS_ID, without padding and begin of sentence."""
    ids = [int(index) for index in sentence]
    end = ids.index(EOS_ID) if EOS_ID in ids else len(ids)
    return [index for index in ids[:end] if index not in (PAD_ID, BOS_ID)]


def encode(
    model: SentencePieceProcessor, lines: Sequence[str], num_threads: int
) -> list[list[int]]:
    """Give the ids of each line, EOS_ID last."""
    ids: list[list[int]] = model.encode(list(lines), add_eos=True, num_threads=num_threads)
    return ids


def learn(
    lines: Iterable[str], settings: VocabularySettings, languages: tuple[str, str], what: str
) -> SentencePieceProcessor:
    """Train one sentencepiece model on `lines`; `what` they are is said if it fails.

    Raises:
        UserError: if the text has too few different words, or too many different characters,
            for a vocabulary of the size asked for.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=settings.algorithm,
            vocab_size=settings.size,
            character_coverage=settings.character_coverage,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            user_defined_symbols=[tag(language) for language in dict.fromkeys(languages)],
            num_threads=TRAINER_THREADS,
            # Its default would silently leave out lines above 4 KiB.
            max_sentence_length=MAX_LINE_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(explain(str(error), settings, what)) from error
    return SentencePieceProcessor(model_proto=model.getvalue())


def explain(message: str, settings: VocabularySettings, what: str) -> str:
    """Turn sentencepiece's words about a failed training into what the user can do."""
    asked = f"vocabulary.size: {settings.size} is too"
    if largest := re.search(r"too high .* a value <= (\d+)", message):
        return f"{asked} large for the {what}; at most {largest[1]} is possible: set it to that"
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"{asked} small for the {what}, whose characters and special tokens alone take "
            f"{smallest[1]}; set it higher, or lower vocabulary.character_coverage"
        )
    return f"no vocabulary could be learned from the {what}: {message}"


def load_model(path: Path) -> SentencePieceProcessor:
    """Read one sentencepiece model.

    Raises:
        UserError: if the file is missing or is no such model.
    """
    try:
        return SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"the vocabulary {path} cannot be read: {error}") from error
