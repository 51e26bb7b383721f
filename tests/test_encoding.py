"""Text to ids: in order, and the same from any number of processes."""

import os
import signal
import time
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from dtrain.data import encoding
from dtrain.data.corpus import Pair
from dtrain.data.encoding import Encoder
from dtrain.data.settings import VocabularySettings
from dtrain.data.vocabulary import Vocabulary
from dtrain.errors import UserError

MAX_LENGTH = 12


def made_up_pairs(count: int) -> list[Pair]:
    """Numbers as text, and some pairs that are of no use: one blank, too long, none once read."""
    odd = {5: ("", "x"), 17: ("a", "\u200b"), 23: ("a b c d" * 4, "d"), 30: ("x", "y" * 60)}
    return [Pair(i + 1, *odd.get(i % 40, (f"{i} {i * i}", f"{i:b}"))) for i in range(count)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Vocabulary]:
    directory = tmp_path_factory.mktemp("vocabulary")
    text = [("0123456789 abc", "01xy d"), ("12 345 67 890", "101 0 11 00")]
    settings = VocabularySettings(size=30, character_coverage=1.0)
    vocabulary = Vocabulary.train(text, settings, ("en", "de"))
    vocabulary.save(directory)
    return directory, vocabulary


def flat(chunks, side: str) -> list[list[int]]:
    """The sentences of a side of some chunks."""
    return [
        sentence.tolist()
        for chunk in chunks
        for sentence in np.split(getattr(chunk, side)[0], getattr(chunk, side)[1].cumsum())[:-1]
    ]


def one_by_one(pairs, vocabulary):
    """What is to come out: each line encoded alone."""
    source, target, dropped = [], [], {}
    for pair in pairs:
        (ids,), (others,) = (
            vocabulary.encode_source([pair.source]),
            vocabulary.encode_target([pair.target]),
        )
        if len(ids) == 1 or len(others) == 1:
            dropped[pair.line] = "blank"
        elif (pair.source, pair.target) == ("x", "y" * 60):
            dropped[pair.line] = "ratio"
        elif len(ids) > MAX_LENGTH or len(others) > MAX_LENGTH:
            dropped[pair.line] = "too_long"
        else:
            source.append(ids)
            target.append(others)
    return source, target, dropped


@pytest.mark.parametrize("num_processes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_line_as_if_it_were_alone_and_in_order(saved, monkeypatch, num_processes):
    monkeypatch.setattr(encoding, "CHUNK_PAIRS", 16)
    directory, vocabulary = saved
    pairs = made_up_pairs(330)
    with Encoder(directory, MAX_LENGTH, num_processes) as encoder:
        chunks = list(encoder.encode(pairs, check_ratio=True))
    source, target, dropped = one_by_one(pairs, vocabulary)
    assert flat(chunks, "source") == source
    assert flat(chunks, "target") == target
    assert {line: reason for c in chunks for reason, line in c.dropped} == dropped
    assert set(dropped.values()) == {"blank", "ratio", "too_long"}
    assert [chunk.num_pairs for chunk in chunks] == [16] * 20 + [10]
    assert {chunk.source[0].dtype for chunk in chunks} == {np.dtype(np.uint16)}


@pytest.mark.slow
def test_only_some_of_the_text_is_read_ahead(saved, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_PAIRS", 16)
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield Pair(read, "1", "1")

    with Encoder(saved[0], MAX_LENGTH, 2) as encoder:
        assert len(list(islice(encoder.encode(endless(), check_ratio=True), 5))) == 5
    assert read == 16 * (5 + 2 * encoding.CHUNKS_AHEAD)


@pytest.mark.slow
def test_a_process_that_is_killed_is_no_hang(saved):
    def pairs():
        for number, pair in enumerate(made_up_pairs(400_000)):
            if number == 40_000:
                os.kill(active_children()[0].pid, signal.SIGKILL)
            yield pair

    begun = time.monotonic()
    with (
        pytest.raises(UserError, match="a process that encoded text was killed"),
        Encoder(saved[0], MAX_LENGTH, 2) as encoder,
    ):
        list(encoder.encode(pairs(), check_ratio=True))
    assert time.monotonic() - begun < 60
    assert not active_children()
