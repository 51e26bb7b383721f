"""What holds for all tests: one thread, so that ranks do not fight for cores and bits repeat."""

import os
from pathlib import Path

import pytest
import torch

# Without a GPU Triton's kernels are interpreted. It must know before it is imported, as below.
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

from toy_language import write_settings, write_text
from worlds import run_world

from dtrain import train
from dtrain.config import Config, load_config

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU here"))


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of the toy language."""
    return write_text(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def toy_settings(toy_text: Path) -> Path:
    """A config file of a tiny run on the toy language, its tokens prepared."""
    return write_settings(toy_text)


@pytest.fixture(scope="session")
def trained(toy_settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of 100 steps for those who only look at one: checkpoints at 40, 80 and 100."""
    make = Toy(toy_settings, tmp_path_factory.mktemp("trained"))
    config = make(
        "trained",
        run__max_steps=100,
        model__dropout=0.0,
        optimizer__learning_rate=0.5,
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
