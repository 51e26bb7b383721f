import gzip
import json
from pathlib import Path

import pytest

from dtrain.data import corpus
from dtrain.data.corpus import Corpus, CorpusReport, content_hash, out_of_proportion, read_lines
from dtrain.data.settings import CorpusSettings, DataSettings
from dtrain.errors import UserError

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def text_corpus(directory, source: bytes, target: bytes, suffix: str = "") -> Corpus:
    paths = directory / f"text.en{suffix}", directory / f"text.de{suffix}"
    for path, content in zip(paths, (source, target), strict=True):
        path.write_bytes(gzip.compress(content) if suffix == ".gz" else content)
    settings = CorpusSettings(source=str(paths[0]), target=str(paths[1]))
    return Corpus(settings, "en", "de", "data.train[0]")


def dataset_corpus(**settings) -> Corpus:
    return Corpus(CorpusSettings(**settings), "en", "de", "data.train[0]")


def shared_corpus(name: str) -> Corpus:
    paths = [SHARED_DATA / f"{name}.{language}" for language in ("en", "de")]
    if not all(path.exists() for path in paths):
        pytest.skip(f"the real text {name} is not in ../shared/data")
    settings = CorpusSettings(source=str(paths[0]), target=str(paths[1]))
    return Corpus(settings, "en", "de", "data.train[0]")


def texts(pairs):
    return [(pair.source, pair.target) for pair in pairs]


def dropped(report):
    return {reason: (d.count, d.first_lines) for reason, d in report.dropped.items()}


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reads_lines_of_plain_and_compressed_files(tmp_path, suffix):
    pairs = text_corpus(tmp_path, b"one\ntwo\n", b"eins\nzwei", suffix).read()
    assert texts(pairs) == [("one", "eins"), ("two", "zwei")]


def test_lines_end_at_line_feeds_and_nowhere_else(tmp_path):
    odd = "a\u0085b\u2028c\x0bd\x0ce\x1cf\rg"
    path = tmp_path / "odd"
    path.write_bytes(f"{odd}\nnext\r\n".encode())
    assert list(read_lines(path)) == [odd, "next"]


def test_only_the_edges_of_a_line_are_stripped(tmp_path):
    path = tmp_path / "edges"
    path.write_bytes("\ufeff\u00a0 two\t words \n\n".encode())
    assert list(read_lines(path)) == ["two\t words", ""]


def test_reads_what_breaks_naive_readers():
    news = list(shared_corpus("odd/newstest2009").read())
    assert len(news) == 2525
    assert any("\u0085" in pair.target for pair in news)
    report = CorpusReport(corpus="wmt10k")
    kept = list(shared_corpus("odd/wmt10k").clean(report))
    assert report.dropped["blank"].first_lines[0] == 5
    assert len(kept) + sum(d.count for d in report.dropped.values()) == 10_000


def test_drops_lines_that_are_no_translation_of_real_text():
    report = CorpusReport(corpus="multi30k")
    assert len(list(shared_corpus("multi30k/train").clean(report))) == 28_998
    assert dropped(report) == {"ratio": (2, [16510, 16664])}


def test_reports_what_was_dropped_and_where_it_stood_first(tmp_path):
    source = [b"yes", b"", b"a long sentence that goes on and on and on"] + [b" \t"] * 7
    target = [b"ja", b"nein", b"ja"] + [b"nein"] * 7
    report = CorpusReport(corpus="toy")
    kept = text_corpus(tmp_path, b"\n".join(source), b"\n".join(target)).clean(report)
    assert texts(kept) == [("yes", "ja")]
    assert dropped(report) == {"blank": (8, [2, 4, 5, 6, 7]), "ratio": (1, [3])}


def test_ratio_spares_short_texts_and_dense_scripts():
    assert not out_of_proportion("No.", "Das kommt ja gar nicht in Frage!")
    assert not out_of_proportion("I could not agree with you more about that", "我完全同意")
    assert out_of_proportion("@@", "Ein Hund läuft über eine Wiese und trägt einen Stock.")


def test_unequal_line_counts_name_both_files_and_counts(tmp_path):
    unequal = text_corpus(tmp_path, b"one\ntwo\nthree\nfour\n", b"eins\nzwei\n")
    with pytest.raises(UserError, match=r"data.train\[0\].*text\.en has 4 lines.*text\.de has 2"):
        list(unequal.read())
    unequal = text_corpus(tmp_path, b"", b"eins\nzwei\n")
    with pytest.raises(UserError, match=r"text\.en has 0 lines.*text\.de has 2"):
        list(unequal.read())


def test_mistakes_name_file_and_line(tmp_path):
    with pytest.raises(UserError, match=r"text\.de, line 2: invalid UTF-8 \(0xe4 as byte 4\)"):
        list(text_corpus(tmp_path, b"one\ntwo\n", "eins\nzweä".encode("latin-1")).read())
    with pytest.raises(UserError, match=r"text\.en, line 2: holds a NUL byte"):
        list(text_corpus(tmp_path, b"one\ntw\0o\n", b"eins\nzwei\n").read())
    with pytest.raises(UserError, match=r"text\.en and .*text\.de are empty"):
        list(text_corpus(tmp_path, b"", b"").read())
    missing = CorpusSettings(source=str(tmp_path / "text.en"), target=str(tmp_path / "no"))
    with pytest.raises(UserError, match=r"data\.train\[0\]\.target: .* does not exist"):
        list(Corpus(missing, "en", "de", "data.train[0]").read())
    folder = CorpusSettings(source=str(tmp_path), target=str(tmp_path))
    with pytest.raises(UserError, match=r"data\.test\.source: .* is not a file that can be read"):
        list(Corpus(folder, "en", "de", "data.test").read())


def test_a_damaged_gz_file_is_named(tmp_path):
    damaged = text_corpus(tmp_path, b"one\n" * 999, b"eins\n" * 999, ".gz")
    path = tmp_path / "text.de.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"text\.de\.gz cannot be read"):
        list(damaged.read())


def test_identity_is_of_the_content_and_not_of_the_path(tmp_path):
    folders = [tmp_path / name for name in ("here", "there", "changed")]
    for folder in folders:
        folder.mkdir()
    here, there = (text_corpus(folder, b"one\n", b"eins\n") for folder in folders[:2])
    changed = text_corpus(folders[2], b"one\n", b"zwei\n")
    assert here.identity() == there.identity()
    assert here.identity() != changed.identity()


def test_a_large_file_is_hashed_by_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "WHOLE_HASH_BYTES", 1000)
    monkeypatch.setattr(corpus, "HASH_BLOCK_BYTES", 10)
    path = tmp_path / "large"
    path.write_bytes(b"a" * 5000)
    before = content_hash(path)
    assert content_hash(path) == before
    path.write_bytes(b"a" * 4999 + b"b")
    assert content_hash(path) != before


def test_corpora_are_listed_by_split():
    files = {"source": "a", "target": "b"}
    data = DataSettings(train=[files, files], test=files)
    keys = {split: [c.key for c in group] for split, group in corpus.corpora(data).items()}
    assert keys == {"train": ["data.train[0]", "data.train[1]"], "test": ["data.test"]}


@pytest.fixture
def _own_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


ROWS = [("one", "eins"), (" two\nlines ", "zwei"), ("", "leer"), (None, "nichts"), ("x\0", "x")]


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_reads_a_translation_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"translation": {"en": source, "de": target}} for source, target in ROWS]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    report = CorpusReport(corpus="rows")
    read = dataset_corpus(dataset="json", data_files=str(path))
    assert texts(read.clean(report)) == [("one", "eins"), ("two lines", "zwei")]
    assert dropped(report) == {"blank": (1, [3]), "undecodable": (2, [4, 5])}
    other = Corpus(read.settings, "en", "fr", "data.test")
    with pytest.raises(UserError, match=r"data\.test: no `translation` column with en and fr"):
        list(other.read())


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_reads_two_named_columns(tmp_path, kind):
    import datasets

    rows = datasets.Dataset.from_dict({"english": ["one", "two"], "german": ["eins", "zwei"]})
    path = str(tmp_path / f"rows.{kind}")
    getattr(rows, f"to_{kind}")(path)
    columns = {"source_column": "english", "target_column": "german"}
    read = dataset_corpus(dataset=kind, data_files=[path], **columns)
    assert texts(read.read()) == [("one", "eins"), ("two", "zwei")]
    wrong = dataset_corpus(dataset=kind, data_files=[path], **columns | {"target_column": "de"})
    with pytest.raises(UserError, match=r"target_column: .* has no column 'de', only english"):
        list(wrong.read())


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_a_data_set_that_is_not_there_is_named(tmp_path):
    missing = dataset_corpus(dataset="json", data_files=str(tmp_path / "missing.json"))
    with pytest.raises(UserError, match=r"data\.train\[0\]: the data set json train cannot be"):
        list(missing.read())


def test_identity_of_a_data_set_follows_its_local_files(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("1")
    rows = dataset_corpus(dataset="json", data_files=str(path))
    before = rows.identity()
    assert dataset_corpus(dataset="json", data_files=[str(path)], weight=3).identity() == before
    path.write_text("2")
    assert rows.identity() != before
    assert dataset_corpus(dataset="wmt14", name="de-en").identity()["name"] == "de-en"
