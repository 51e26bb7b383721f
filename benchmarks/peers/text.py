"""Pieces as text, for toolkits that read words: piece 17 is the word `piece17`. numpy alone."""

from pathlib import Path

from benchmarks.peers.turns import BOS, EOS, PAD, UNK, Assignment, Rows

NAMES = {PAD: "<pad>", UNK: "<unk>", BOS: "<s>", EOS: "</s>"}
IDS = {"pad": PAD, "unk": UNK, "bos": BOS, "eos": EOS}


def words_of(task: Assignment) -> list[str]:
    """Give the word of each id of the vocabulary."""
    return [NAMES.get(i, f"piece{i}") for i in range(task.vocabulary_size)]


def write_text(folder: Path, name: str, task: Assignment, data: Path) -> None:
    """Write `name.source` and `name.target`, a sentence a line, its end left out."""
    words = words_of(task)
    for side in ("source", "target"):
        rows = Rows.read(data, side)
        lines = [" ".join(words[i] for i in rows[row][:-1]) for row in range(len(rows))]
        (folder / f"{name}.{side}").write_text("\n".join(lines) + "\n", encoding="utf-8")
