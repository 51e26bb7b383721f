"""Translates with dtrain, as a contestant of benchmarks/decode_speed.py.

python benchmarks/own_decoding.py NAME FOLDER RUN CHECKPOINT LENGTH_PENALTY
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.peers.translating import Sentence, Task, translated
from benchmarks.peers.turns import Turns
from dtrain.memory import keep_freed_memory
from dtrain.parts import trained_model
from dtrain.search import search


def main(name: str, folder: Path, run: Path, checkpoint: str, length_penalty: float) -> None:
    """Translate as asked."""
    turns = Turns()
    task = Task.read(folder)
    torch.set_num_threads(task.threads)
    keep_freed_memory()
    model = trained_model(run, checkpoint)[0]

    def translate(batch: list[Sentence]) -> list[Sentence]:
        with torch.inference_mode():
            found = search(model, batch, task.beam_size, length_penalty)
        return [hypothesis.ids for hypothesis in found]

    turns.take(translated(folder, name, translate))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
