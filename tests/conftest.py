"""What holds for all tests: one thread, so that ranks do not fight for cores and bits repeat."""

import random
from pathlib import Path

import pytest
import torch
from worlds import run_world

from dtrain import train
from dtrain.config import Config, load_config
from dtrain.data.preparation import prepare, prepared_directory

torch.set_num_threads(1)

WORDS = [
    "red",
    "blue",
    "small",
    "big",
    "old",
    "new",
    "cat",
    "dog",
    "bird",
    "house",
    "sees",
    "likes",
]


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy language: its translation says the words backwards, with a capital X in front."""
    folder = tmp_path_factory.mktemp("toy")
    generator = random.Random(5)
    for split, size in (("train", 600), ("validation", 12), ("test", 12)):
        lines = [generator.choices(WORDS, k=generator.randint(2, 9)) for _ in range(size)]
        source = "".join(" ".join(words) + "\n" for words in lines)
        target = "".join(" ".join(f"X{word}" for word in words[::-1]) + "\n" for words in lines)
        (folder / f"{split}.en").write_text(source, encoding="utf-8")
        (folder / f"{split}.de").write_text(target, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def toy_settings(toy_text: Path) -> Path:
    """A config file of a tiny run on the toy language, its tokens prepared."""
    settings = toy_text / "toy.yaml"
    splits = "\n".join(
        f"  {split}: {dash}{{source: {toy_text}/{split}.en, target: {toy_text}/{split}.de}}"
        for split, dash in (("train", "\n  - "), ("validation", ""), ("test", ""))
    )
    settings.write_text(
        f"""
data:
  dir: {toy_text}/prepared
  max_length: 40
{splits}
vocabulary: {{size: 48}}
model: {{hidden_dim: 32, num_heads: 2, feed_forward_dim: 64, num_encoder_layers: 1,
        num_decoder_layers: 1, max_decode_length: 40}}
batch: {{tokens_per_step: 512, tokens_per_micro_batch: 128}}
schedule: {{warmup_steps: 20}}
run: {{max_steps: 12, threads: 1, dir: "{toy_text}/runs/{{name}}"}}
distributed: {{timeout: 60}}
validation: {{every_steps: 0}}
checkpoint: {{every_steps: 0}}
metrics: {{every_steps: 1}}
wandb: {{mode: disabled}}
""",
        encoding="utf-8",
    )
    config = load_config(settings)
    directory = prepared_directory(config.data, config.vocabulary)
    prepare(config.data, config.vocabulary, directory, lambda _: None)
    return settings


@pytest.fixture(scope="session")
def trained(toy_settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of 100 steps for those who only look at one: checkpoints at 40, 80 and 100."""
    make = Toy(toy_settings, tmp_path_factory.mktemp("trained"))
    config = make(
        "trained",
        run__max_steps=100,
        model__dropout=0.0,
        optimizer__learning_rate=2.0,
        schedule__warmup_steps=40,
        checkpoint__every_steps=40,
        validation__every_steps=100,
        validation__beam_size=2,
        metrics__every_steps=8,
    )
    run_world(1, train.run, config)
    return config


class Toy:
    """Makes toy settings with some of them changed, each run in a directory of its own."""

    def __init__(self, settings: Path, folder: Path) -> None:
        self.settings, self.folder = settings, folder

    def __call__(self, name: str = "run", **changes: object) -> Config:
        overrides = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
        place = [f"--run.name={name}", f"--run.dir={self.folder}/{{name}}"]
        return load_config(self.settings, [*place, *overrides])


@pytest.fixture
def toy(toy_settings: Path, tmp_path: Path) -> Toy:
    """Make a toy config: `toy("name", run__max_steps=5)`."""
    return Toy(toy_settings, tmp_path)
