import hashlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

from dtrain.data import encoding, preparation, store
from dtrain.data.corpus import read_lines
from dtrain.data.preparation import prepare, prepared_directory
from dtrain.data.settings import DataSettings, VocabularySettings
from dtrain.data.store import MappedFile, PreparedData
from dtrain.errors import UserError

VOCABULARY = VocabularySettings(size=100, character_coverage=1.0)


def made_up_lines(seed: int, num_lines: int) -> list[str]:
    random = Random(seed)
    words = [
        "".join(random.choices("abdeghiklmnorstuwäü", k=random.randint(1, 6))) for _ in "x" * 99
    ]
    return [" ".join(random.choices(words, k=random.randint(4, 7))) for _ in range(num_lines)]


def silence(line: str) -> None:
    """Take a line of progress, and say nothing."""


def write_corpus(directory, name, source, target):
    paths = {"source": directory / f"{name}.en", "target": directory / f"{name}.de"}
    for path, lines in zip(paths.values(), (source, target), strict=True):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {side: str(path) for side, path in paths.items()}


def settings(directory, **changes) -> DataSettings:
    """Two training corpora, 200 and 100 pairs; the eighth is too long, the 205th blank."""
    directory.mkdir(exist_ok=True)
    source, target = made_up_lines(1, 300), made_up_lines(2, 300)
    source[7] = " ".join(source[:60])
    target[7] = " ".join(target[:60])
    source[204] = ""
    judged = made_up_lines(3, 10), made_up_lines(4, 10)
    judged[0][4] = ""
    return DataSettings(
        **{
            "train": [
                write_corpus(directory, "a", source[:200], target[:200]),
                write_corpus(directory, "b", source[200:], target[200:]) | {"weight": 2},
            ],
            "validation": write_corpus(directory, "validation", *judged),
            "dir": str(directory / "prepared" / "{fingerprint}"),
            "max_length": 80,
        }
        | changes
    )


def prepared(data: DataSettings, vocabulary=VOCABULARY, report=silence) -> PreparedData:
    directory = prepared_directory(data, vocabulary)
    prepare(data, vocabulary, directory, report)
    return PreparedData.open(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataSettings:
    return settings(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="module")
def ready(data) -> PreparedData:
    return prepared(data)


def sentences(side) -> list[list[int]]:
    tokens, lengths = side
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("shared", [True, False])
def test_holds_the_ids_of_every_pair_in_order(data, shared):
    chosen = VocabularySettings(size=90, character_coverage=1.0, shared=shared)
    ready = prepared(data, chosen)
    sides = [
        [line for corpus in data.train for line in read_lines(Path(getattr(corpus, side)))]
        for side in ("source", "target")
    ]
    kept = [pair for i, pair in enumerate(zip(*sides, strict=True)) if i not in (7, 204)]
    source, target = ready.train.gather(np.arange(len(ready.train)))
    assert sentences(source) == ready.vocabulary.encode_source([pair[0] for pair in kept])
    assert sentences(target) == ready.vocabulary.encode_target([pair[1] for pair in kept])


def test_gathers_any_sentences_in_the_order_asked(ready):
    everything = [sentences(side) for side in ready.train.gather(np.arange(len(ready.train)))]
    ids = np.array([297, 0, 5, 5, 131])
    for side, whole in zip(ready.train.gather(ids), everything, strict=True):
        assert sentences(side) == [whole[i] for i in ids]
    lengths = ready.train.source_lengths(ids), ready.train.target_lengths(ids)
    for found, whole in zip(lengths, everything, strict=True):
        assert found.dtype == np.int64
        assert found.tolist() == [len(whole[i]) for i in ids]


def test_gathering_nothing_gives_nothing(ready):
    for tokens, lengths in ready.train.gather(np.empty(0, np.int64)):
        assert len(tokens) == len(lengths) == 0


def test_the_manifest_counts_what_was_kept_and_dropped(ready):
    manifest = ready.manifest
    assert manifest.corpus_sizes == [199, 99]
    first, second = manifest.splits["train"].corpora
    assert first.dropped["too_long"].first_lines == [8]
    assert second.dropped["blank"].first_lines == [5]
    source, target = ready.train.gather(np.arange(298))
    assert manifest.splits["train"].source_tokens == len(source[0])
    assert manifest.length_ratio == len(source[0]) / len(target[0])
    assert manifest.source_vocabulary_size == ready.vocabulary.source_size == 100


def test_text_keeps_every_line_and_tokens_only_the_usable(ready):
    source, target = ready.text("validation")
    assert source == [line if i != 4 else "" for i, line in enumerate(made_up_lines(3, 10))]
    assert target == made_up_lines(4, 10)
    assert len(ready.validation) == 9
    assert ready.test is None
    with pytest.raises(UserError, match="no test text"):
        ready.text("test")


def test_text_is_cut_at_line_feeds_only(tmp_path):
    data = settings(tmp_path / "text")
    odd = write_corpus(tmp_path, "odd", ["a\u0085b\u2028c\rd"], ["x\x1cy"])
    ready = prepared(data.model_copy(update={"test": data.validation.model_validate(odd)}))
    assert ready.text("test") == (["a\u0085b\u2028c\rd"], ["x\x1cy"])


def test_blank_after_normalisation_is_blank(tmp_path):
    data = settings(tmp_path / "text")
    odd = write_corpus(tmp_path, "odd", ["\u200b", "das"], ["x", "y"])
    ready = prepared(data.model_copy(update={"test": data.validation.model_validate(odd)}))
    assert len(ready.test) == 1
    assert ready.manifest.splits["test"].corpora[0].dropped["blank"].first_lines == [1]


def test_a_split_without_tokens_is_refused(tmp_path):
    data = settings(tmp_path / "text")
    blank = write_corpus(tmp_path, "blank", [""], [""])
    with pytest.raises(UserError, match=r"data.test: no pair can be judged \(1 blank\)"):
        prepared(data.model_copy(update={"test": data.validation.model_validate(blank)}))


def test_large_vocabularies_take_four_bytes_a_token():
    assert store.token_dtype(2**16) == np.uint16
    assert store.token_dtype(2**16 + 1) == np.uint32


def test_the_place_depends_on_content_and_settings_and_on_no_path_or_weight(data, tmp_path):
    def name(changed, vocabulary=VOCABULARY):
        return prepared_directory(changed, vocabulary).name

    here = name(data)
    elsewhere = settings(tmp_path / "elsewhere")
    assert name(elsewhere) == here
    heavier = [corpus.model_copy(update={"weight": 5}) for corpus in data.train]
    assert name(data.model_copy(update={"train": heavier})) == here
    assert name(data.model_copy(update={"max_length": 81})) != here
    assert name(data.model_copy(update={"train": data.train[::-1]})) != here
    assert name(data.model_copy(update={"target_language": "nl"})) != here
    assert name(data, VOCABULARY.model_copy(update={"size": 99})) != here


def test_prepared_twice_it_is_the_same(ready, tmp_path):
    again = prepared(settings(tmp_path / "again"))
    assert again.directory != ready.directory
    assert again.manifest.files == ready.manifest.files
    assert again.manifest.fingerprint == ready.manifest.fingerprint


@pytest.mark.slow
def test_any_number_of_processes_prepares_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_PAIRS", 32)
    data = settings(tmp_path / "text")
    made = [tmp_path / name for name in ("one", "two")]
    for number, directory in enumerate(made, start=1):
        prepare(data, VOCABULARY, directory, silence, num_processes=number)
    files = [sorted(path for path in place.rglob("*") if path.is_file()) for place in made]
    assert [path.relative_to(made[0]) for path in files[0]] == [
        path.relative_to(made[1]) for path in files[1]
    ]
    assert [path.name for path in files[0]].count("target.tokens") == 2
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes(), one


def test_hashes_and_sizes_are_those_of_the_files(ready):
    found = {
        path.relative_to(ready.directory).as_posix(): (
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in ready.directory.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert {name: (r.size, r.sha256) for name, r in ready.manifest.files.items()} == found


def test_offsets_are_where_sentences_begin(ready):
    for side, tokens in (("source", 0), ("target", 1)):
        offsets = np.fromfile(ready.directory / "train" / f"{side}.offsets", np.int64)
        ends = [row.tolist().index(3) + 1 for row in rows_of(ready.train, tokens)]
        assert offsets.tolist() == [0, *itertools.accumulate(ends)]


def rows_of(train, side: int):
    """Each sentence of a side, gathered alone."""
    return [train.gather(np.array([i]))[side][0] for i in range(len(train))]


def test_other_content_has_another_fingerprint(ready, tmp_path):
    shorter = prepared(settings(tmp_path / "shorter", max_length=28))
    assert shorter.manifest.fingerprint != ready.manifest.fingerprint


def test_what_is_prepared_is_not_prepared_again(data, ready):
    before = (ready.directory / "manifest.json").stat().st_mtime_ns
    prepare(data, VOCABULARY, ready.directory, report=pytest.fail)
    assert (ready.directory / "manifest.json").stat().st_mtime_ns == before


def test_a_quicker_process_keeps_its_result(tmp_path, monkeypatch):
    data = settings(tmp_path / "text")
    directory = prepared_directory(data, VOCABULARY)
    write_prepared = preparation.write_prepared

    def slow(*arguments):
        monkeypatch.setattr(preparation, "write_prepared", write_prepared)
        prepare(data, VOCABULARY, directory, silence)
        (directory / "mark").touch()
        write_prepared(*arguments)

    monkeypatch.setattr(preparation, "write_prepared", slow)
    prepare(data, VOCABULARY, directory, silence)
    assert (directory / "mark").exists()
    assert list(directory.parent.iterdir()) == [directory]


def test_a_preparation_that_fails_leaves_nothing(tmp_path):
    data = settings(tmp_path / "text")
    (tmp_path / "text" / "b.de").write_bytes(b"\xff\n")
    directory = prepared_directory(data, VOCABULARY)
    with pytest.raises(UserError, match=r"b\.de, line 1: invalid UTF-8"):
        prepare(data, VOCABULARY, directory, silence)
    assert list(directory.parent.iterdir()) == []


def test_other_settings_do_not_overwrite_a_named_directory(tmp_path):
    data = settings(tmp_path / "text", dir=str(tmp_path / "mine"))
    prepared(data)
    other = data.model_copy(update={"max_length": 70})
    with pytest.raises(UserError, match="mine was prepared from other texts or settings"):
        prepared(other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="full holds other files"):
        prepared(data.model_copy(update={"dir": str(tmp_path / "full")}))


def test_progress_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "PAIRS_BETWEEN_CLOCKS", 100)
    data, told = settings(tmp_path / "text"), []
    directory = prepared_directory(data, VOCABULARY)
    prepare(data, VOCABULARY, directory, told.append, seconds_between_reports=0)
    assert re.fullmatch(r"prepare: reading train: 100 pairs, [\d,]+ a second", told[0])
    assert "prepare: learning 100 pieces from 299 pairs" in told
    encoding = r"prepare: encoding train: 200 of 300 pairs, [\d,]+ a second, 0:0\d left"
    assert any(re.fullmatch(encoding, line) for line in told)


def test_mistakes_in_the_settings_are_named(tmp_path):
    data = settings(tmp_path / "text")
    with pytest.raises(UserError, match=r"data\.train is empty"):
        prepared_directory(data.model_copy(update={"train": []}), VOCABULARY)
    (tmp_path / "text" / "b.en").unlink()
    with pytest.raises(UserError, match=r"data\.train\[1\]\.source: .*b\.en does not exist"):
        prepared_directory(data, VOCABULARY)


def test_nothing_left_to_learn_from_is_a_mistake(tmp_path):
    data = settings(tmp_path / "text")
    blank = [write_corpus(tmp_path, "blank", ["", "x"], ["", ""])]
    with pytest.raises(UserError, match=r"data\.train: nothing is left .*2 blank"):
        prepared(DataSettings(train=blank, dir=data.dir))
    with pytest.raises(UserError, match=r"data\.train: nothing is left .*too_long"):
        prepared(data.model_copy(update={"max_length": 2}))


@pytest.fixture
def fresh(tmp_path) -> PreparedData:
    return prepared(settings(tmp_path / "text"))


def test_a_file_of_the_wrong_size_is_named(fresh):
    tokens = fresh.directory / "train" / "target.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train/target\.tokens is damaged"):
        PreparedData.open(fresh.directory)
    tokens.unlink()
    with pytest.raises(UserError, match=r"train/target\.tokens is damaged"):
        PreparedData.open(fresh.directory)


def test_a_changed_byte_is_found(fresh):
    fresh.verify()
    offsets = fresh.directory / "validation" / "source.offsets"
    content = bytearray(offsets.read_bytes())
    content[20] ^= 1
    offsets.write_bytes(content)
    with pytest.raises(UserError, match=r"validation/source\.offsets has changed"):
        PreparedData.open(fresh.directory).verify()


def test_a_start_reads_no_tokens(fresh):
    """So that it takes no longer for a larger corpus; `verify` sees what it cannot."""
    for kind in ("tokens", "offsets"):
        path = fresh.directory / "train" / f"source.{kind}"
        path.write_bytes(bytes(path.stat().st_size))
        opened = PreparedData.open(fresh.directory)
        assert len(opened.train) == 298
        with pytest.raises(UserError, match=r"train/source\.(tokens|offsets) has changed"):
            opened.verify()


def memory_of_files() -> int:
    """Bytes of mapped files that this process holds."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile:"))


def test_what_was_read_is_given_back(tmp_path):
    path, size = tmp_path / "numbers", 2**26
    with path.open("wb") as file:
        file.truncate(size)
    mapped = MappedFile(path, np.dtype(np.uint16))
    before = memory_of_files()
    assert not mapped.numbers.any()
    held = memory_of_files()
    mapped.give_back()
    assert held - before > 0.9 * size
    assert memory_of_files() - before < 0.1 * size
    assert mapped.numbers[-1] == 0


PLAN_AN_EPOCH = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from dtrain.data.plan import BatchPlan
from dtrain.data.settings import BatchSettings
from dtrain.data.store import TokenStore

directory, size = Path(sys.argv[1]), int(sys.argv[2])
directory.mkdir()
offsets = np.cumsum(np.resize([0, *range(4, 44)], size + 1))
for side in ("source", "target"):
    offsets.tofile(directory / f"{side}.offsets")
    with (directory / f"{side}.tokens").open("wb") as file:
        file.truncate(2 * int(offsets[-1]))
del offsets
train = TokenStore(directory, SimpleNamespace(source_size=9, target_size=9))
settings = BatchSettings(tokens_per_step=2**16, tokens_per_micro_batch=2**16)
plan = BatchPlan(train, settings, 2**16, seed=1)

def own_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))

held = []
for index in range(plan.num_windows):
    for ids in plan.window(0, index):
        train.gather(ids)
    held.append(own_mib())
print(plan.num_windows, held[3], max(held))
"""


@pytest.mark.slow
def test_an_epoch_takes_no_more_memory_than_its_first_windows(tmp_path):
    num_windows, early, most = run_python(PLAN_AN_EPOCH, tmp_path / "train", 600_000)
    assert num_windows > 15
    assert most < 300
    assert most < early + 10  # offsets are 10 MB, tokens 56


def run_python(program: str, *arguments: object) -> list[float]:
    """Run a program in a process of its own; gives the numbers that it prints."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


PREPARE_TEXT = """
import sys
from pathlib import Path
from dtrain.data.preparation import prepare
from dtrain.data.settings import DataSettings, VocabularySettings

folder, vocabulary, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
folder.mkdir()
for side in ("source", "target"):
    with (folder / side).open("w") as file:
        file.writelines(f"das ist {i} oder {i * 7919}\\n" for i in range(size))
train = [{"source": str(folder / "source"), "target": str(folder / "target")}]
data = DataSettings.model_validate({"train": train, "dir": str(folder / "out")})
prepare(data, VocabularySettings(), folder / "out", lambda _: None, vocabulary, num_processes=1)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")))
"""


@pytest.mark.slow
def test_a_longer_text_takes_no_more_memory(tmp_path, ready):
    (short,) = run_python(PREPARE_TEXT, tmp_path / "short", ready.directory, 10_000)
    (long,) = run_python(PREPARE_TEXT, tmp_path / "long", ready.directory, 40_000)
    assert long < short + 8  # all ids of the longer one, as Python holds them, would be over 20


def test_a_missing_old_or_damaged_manifest_is_refused(fresh, tmp_path):
    with pytest.raises(UserError, match="holds no prepared data; run `dtrain prepare`"):
        PreparedData.open(tmp_path / "nowhere")
    path = fresh.directory / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format_version": 0}))
    with pytest.raises(UserError, match="format version 0, not 1"):
        PreparedData.open(fresh.directory)
    for damaged in ("{", "[]", "{}", json.dumps(content | {"files": None})):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            PreparedData.open(fresh.directory)
