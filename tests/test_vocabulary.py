import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import sentencepiece

from dtrain import batch
from dtrain.data import vocabulary as module
from dtrain.data.settings import VocabularySettings
from dtrain.data.vocabulary import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Vocabulary
from dtrain.errors import UserError


def made_up_pairs(num_pairs: int) -> list[tuple[str, str]]:
    """Sentences of made-up words, the same in every process."""
    random = Random(1)
    words = [
        ["".join(random.choices(syllables, k=random.randint(1, 4))) for _ in range(400)]
        for syllables in (("ba", "the", "on", "shi", "ing", "r"), ("un", "schä", "der", "ge", "ß"))
    ]
    return [
        (" ".join(random.choices(words[0], k=6)), " ".join(random.choices(words[1], k=5)))
        for _ in range(num_pairs)
    ]


PAIRS = made_up_pairs(300)
LANGUAGES = "en", "de"


def settings(**changes) -> VocabularySettings:
    return VocabularySettings(**{"size": 60, "character_coverage": 1.0} | changes)


@pytest.fixture(scope="module")
def shared() -> Vocabulary:
    return Vocabulary.train(PAIRS, settings(), LANGUAGES)


@pytest.fixture(scope="module")
def separate() -> Vocabulary:
    return Vocabulary.train(PAIRS, settings(size=45, shared=False), LANGUAGES)


def test_special_ids_are_those_of_a_batch(shared):
    assert (PAD_ID, UNK_ID, BOS_ID, EOS_ID) == (
        batch.PAD_ID,
        batch.UNK_ID,
        batch.BOS_ID,
        batch.EOS_ID,
    )
    pieces = [shared.source.id_to_piece(i) for i in range(6)]
    assert pieces == ["<pad>", "<unk>", "<s>", "</s>", "<en>", "<de>"]


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
@pytest.mark.parametrize("is_shared", [True, False])
def test_round_trip(algorithm, is_shared):
    chosen = settings(size=50, algorithm=algorithm, shared=is_shared)
    vocabulary = Vocabulary.train(PAIRS, chosen, LANGUAGES)
    targets = [target for _, target in PAIRS]
    ids = vocabulary.encode_target(targets)
    assert all(sentence[-1] == EOS_ID and EOS_ID not in sentence[:-1] for sentence in ids)
    assert vocabulary.decode_target(ids) == targets
    assert vocabulary.source_size == vocabulary.target_size == 50
    assert vocabulary.shared == is_shared


def test_pieces_are_those_of_sentencepiece(shared):
    direct = sentencepiece.SentencePieceProcessor(
        model_proto=shared.source.serialized_model_proto()
    )
    for source, _ in PAIRS:
        assert shared.encode_source([source]) == [[*direct.encode(source), EOS_ID]]


def test_text_cannot_spell_special_tokens(shared):
    for text in ("<s>", "</s>", "<pad>", "the <s> on </s> the <pad> on"):
        (ids,) = shared.encode_source([text])
        assert ids[-1] == EOS_ID
        assert not {PAD_ID, BOS_ID, EOS_ID} & set(ids[:-1])


def test_text_can_spell_language_tags(shared, separate):
    for vocabulary in (shared, separate):
        (ids,) = vocabulary.encode_source(["<de> bashi the"])
        assert vocabulary.tag_id("de") in ids
        assert vocabulary.tag_id("en") not in ids
        with pytest.raises(UserError, match="no tag <fr>"):
            vocabulary.tag_id("fr")


def test_decoding_stops_at_the_end_and_drops_padding(shared):
    (ids,) = shared.encode_target(["schäder unge"])
    assert shared.decode_target([[BOS_ID, *ids, *ids, PAD_ID]]) == ["schäder unge"]
    assert shared.decode_target([[PAD_ID, *ids[:-1]], [EOS_ID], []]) == ["schäder unge", "", ""]


def test_threads_change_no_ids(shared):
    lines = [source for source, _ in PAIRS] * 20
    assert shared.encode_source(lines, num_threads=4) == shared.encode_source(lines)


def test_saved_and_loaded_it_is_the_same(shared, separate, tmp_path):
    for vocabulary, names in (
        (shared, ["vocabulary.model"]),
        (separate, ["source.model", "target.model"]),
    ):
        directory = tmp_path / names[0]
        directory.mkdir()
        vocabulary.save(directory)
        assert sorted(path.name for path in directory.iterdir()) == names
        loaded = Vocabulary.load(directory)
        assert loaded.fingerprint == vocabulary.fingerprint
        assert loaded.shared == vocabulary.shared
    assert shared.fingerprint != separate.fingerprint


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"source\.model cannot be read"):
        Vocabulary.load(tmp_path)
    (tmp_path / "vocabulary.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"vocabulary\.model cannot be read"):
        Vocabulary.load(tmp_path)


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_a_size_that_the_text_does_not_allow_is_refused_with_one_that_it_does(algorithm):
    with pytest.raises(UserError, match=r"vocabulary.size: 5000 is too large .* at most \d+") as e:
        Vocabulary.train(PAIRS, settings(size=5000, algorithm=algorithm), LANGUAGES)
    largest = int(str(e.value).split("at most ")[1].split()[0])
    allowed = settings(size=largest, algorithm=algorithm)
    assert Vocabulary.train(PAIRS, allowed, LANGUAGES).source_size == largest
    with pytest.raises(UserError, match=r"vocabulary.size: 16 is too small for the en text"):
        Vocabulary.train(PAIRS, settings(size=16, algorithm=algorithm, shared=False), LANGUAGES)


def test_of_very_long_text_every_kth_pair_is_taken(monkeypatch):
    monkeypatch.setattr(module, "MAX_TRAINING_LINES", len(PAIRS))
    sampled = Vocabulary.train(PAIRS, settings(size=50), LANGUAGES)
    monkeypatch.undo()
    expected = Vocabulary.train(PAIRS[::2], settings(size=50), LANGUAGES)
    assert sampled.fingerprint == expected.fingerprint


TRAIN_AND_PRINT = """
from test_vocabulary import fingerprints
print(*fingerprints())
"""


def fingerprints() -> list[str]:
    pairs = made_up_pairs(3000)
    chosen = [settings(size=200, algorithm=algorithm) for algorithm in ("unigram", "bpe")]
    return [Vocabulary.train(pairs, one, LANGUAGES).fingerprint for one in chosen]


@pytest.mark.slow
def test_another_process_on_one_core_learns_the_same_pieces():
    def one_core():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    here = fingerprints()
    folder = Path(__file__).parent
    for limit in (None, one_core):
        process = subprocess.run(
            [sys.executable, "-c", TRAIN_AND_PRINT],
            env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{folder.parent}"},
            preexec_fn=limit,
            capture_output=True,
            text=True,
            check=True,
        )
        assert process.stdout.split() == here
