"""Write the demo corpus: English sentences and their German translations, made by a grammar.

    python demo/make_corpus.py --out data/demo [--seed 1]

It needs no network and nothing but Python. The seed decides all: the files are the same on every
machine. No sentence of validation or test occurs in training, in either language.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from author import Author, Pair

NUM_PAIRS = {"validation": 200, "test": 500, "train": 40_000}


def distinct_pairs(seed: int) -> Iterator[Pair]:
    """Pairs without end, no sentence of either language twice.

    Raises:
        AssertionError: if a sentence got two translations, which the grammar must not give.
    """
    author = Author(seed)
    translation: dict[str, str] = {}
    translated: set[str] = set()
    while True:
        english, german = author.write()
        assert translation.setdefault(english, german) == german, (english, german)
        if german not in translated:
            translated.add(german)
            yield english, german


def make_corpus(seed: int) -> dict[str, list[Pair]]:
    """The pairs of each split, by its name."""
    pairs = distinct_pairs(seed)
    return {split: list(islice(pairs, count)) for split, count in NUM_PAIRS.items()}


def write_corpus(corpus: dict[str, list[Pair]], directory: Path) -> None:
    """Write SPLIT.en and SPLIT.de, line by line each other's translations."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, pairs in corpus.items():
        for language, lines in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
            text = "".join(f"{line}\n" for line in lines)
            (directory / f"{split}.{language}").write_bytes(text.encode())


def main() -> None:
    """Write the corpus where the command line says."""
    parser = argparse.ArgumentParser(description="Write the English-German demo corpus.")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="directory to write to")
    parser.add_argument("--seed", type=int, default=1, help="another seed, another corpus")
    arguments = parser.parse_args()
    corpus = make_corpus(arguments.seed)
    write_corpus(corpus, arguments.out)
    counts = ", ".join(f"{len(pairs):,} {split}" for split, pairs in corpus.items())
    english, german = corpus["validation"][0]
    print(f"{arguments.out}: {counts} pairs, such as “{english}” “{german}”")


if __name__ == "__main__":
    main()
