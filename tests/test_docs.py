"""What the documents name is there: links, files, settings, commands, rooms of the house."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from dtrain.__main__ import COMMANDS, WITH_SETTINGS
from dtrain.config import FREE_TO_CHANGE, Config, load_config

ROOT = Path(__file__).parent.parent
PLACES = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "configs/**/*.md", "launch/**/*.md")
DOCUMENTS = sorted(
    path for place in PLACES for path in ROOT.glob(place) if ".venv" not in path.parts
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCUMENTS}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PLACEHOLDER = re.compile(r"\bRESULT_[A-Z0-9_]+|\| COMMIT \|")
FILES_OF_A_RUN = {"json", "jsonl", "safetensors", "model", "py"}
"""What stands behind the dot in `metrics.jsonl`, `vocabulary.model` and the like."""


def settings() -> Iterator[tuple[str, object]]:
    """Every setting that the command line takes, with its default."""
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            for key, item in section.model_fields.items():
                yield f"{name}.{key}", item.get_default(call_default_factory=True)
        else:
            yield name, field.default


SETTINGS = dict(settings())


def blocks(text: str, *kinds: str) -> list[str]:
    """The fenced blocks of some languages."""
    return [body for kind, body in FENCE.findall(text) if kind in kinds]


def spans(text: str) -> list[str]:
    """What stands between backticks in the prose."""
    return SPAN.findall(FENCE.sub("", text))


def code(text: str) -> list[str]:
    """Everything that is set as code: lines of blocks, and spans of the prose."""
    return [line for _, body in FENCE.findall(text) for line in body.splitlines()] + spans(text)


def anchors(text: str) -> set[str]:
    """The names that headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of each row of the table below a heading."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


@pytest.mark.parametrize("name", TEXTS)
def test_relative_links_lead_somewhere(name):
    broken = []
    for link in LINK.findall(FENCE.sub("", TEXTS[name])):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        leads = target.exists()
        if leads and anchor:
            leads = anchor in anchors(target.read_text(encoding="utf-8"))
        if not leads:
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name):
    named = {span for span in spans(TEXTS[name]) if re.fullmatch(r"[\w./-]+\.(py|sh|yaml)", span)}
    places = [ROOT, ROOT / "dtrain", ROOT / "tests", (ROOT / name).parent]
    missing = {file for file in named if not any((place / file).exists() for place in places)}
    assert missing <= {"config.yaml"}  # of a run directory


@pytest.mark.parametrize("name", TEXTS)
def test_settings_that_are_named_exist(name):
    unknown = set()
    for text in code(TEXTS[name]):
        unknown |= set(re.findall(r"--(\w+\.\w+)", text)) - SETTINGS.keys() - {"section.key"}
    for span in spans(TEXTS[name]):
        key = re.fullmatch(r"(\w+)\.(\w+)(=.*)?", span)
        if key and key[1] in Config.model_fields and key[2] not in FILES_OF_A_RUN:
            unknown |= {f"{key[1]}.{key[2]}"} - SETTINGS.keys()
    assert not unknown


def test_the_table_of_settings_is_complete_and_has_the_defaults():
    rows = [row for row in table(TEXTS["docs/training.md"], "Settings") if row[0].startswith("`")]
    told = {key.strip("`"): yaml.safe_load(default) for key, default, _ in rows}
    known = {k: list(v) if isinstance(v, tuple) else v for k, v in SETTINGS.items()}
    known["run.dir"], known["data.dir"] = "runs/{name}", "prepared/{fingerprint}"
    assert told == known
    assert list(told) == list(known)


def test_what_a_run_may_change_is_told():
    text = TEXTS["docs/resume.md"].partition("\n## What a run may change\n")[2]
    free = text.partition("Free are")[2].partition("\n## ")[0]
    told = {span for span in SPAN.findall(free) if span in FREE_TO_CHANGE}
    assert told == set(FREE_TO_CHANGE)


@pytest.mark.parametrize("name", TEXTS)
def test_settings_in_yaml_load(name, tmp_path):
    for number, block in enumerate(blocks(TEXTS[name], "yaml")):
        file = tmp_path / f"block-{number}.yaml"
        file.write_text(block, encoding="utf-8")
        load_config(file)


@pytest.mark.parametrize("name", TEXTS)
def test_commands_that_are_named_exist(name):
    named = {
        command for text in code(TEXTS[name]) for command in re.findall(r"\bdtrain ([a-z]+)", text)
    }
    assert named <= COMMANDS.keys()


@pytest.mark.parametrize("name", TEXTS)
def test_commands_can_be_read_as_they_stand(name):
    """Their flags and settings are known, in shell blocks and in the prose."""
    lines = [line for body in blocks(TEXTS[name], "sh") for line in body.splitlines()]
    for text in [*lines, *spans(TEXTS[name])]:
        command, arguments = command_in(text)
        if not arguments or {"--help", "…"} & set(arguments):
            continue
        parser = argparse.ArgumentParser(text)
        importlib.import_module(f"dtrain.commands.{command}").add_arguments(parser)
        known, overrides = parser.parse_known_args(arguments)
        assert command in WITH_SETTINGS or not overrides, text
        if command in WITH_SETTINGS and known.config.suffix:  # not the word FILE
            load_config(ROOT / known.config, overrides)


def command_in(text: str) -> tuple[str, list[str]]:
    """The command of dtrain in a shell line, by whatever launcher, and its arguments."""
    for part in re.split(r" [|<>] ", text):
        words = shlex.split(part, comments=True)
        if words[:1] == ["dtrain"] and words[1:]:
            return words[1], words[2:]
        scripts = ("launch/local.sh", "launch/slurm.sbatch", "launch/srun.sbatch")
        for launcher in ("dtrain.train", *scripts):
            if launcher in words:
                return "train", words[words.index(launcher) + 1 :]
    return "", []


def test_the_tree_is_the_packages():
    tree = next(
        body for body in blocks(TEXTS["docs/architecture.md"], "") if body.startswith("dtrain/\n")
    )
    told, folder = [], ""
    for line in tree.splitlines()[1:]:
        name = line.split()[0]
        folder = name if name.endswith("/") else folder if line.startswith("    ") else ""
        if name.endswith(".py"):
            told.append(folder + name)
    package = ROOT / "dtrain"
    there = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sorted(told) == sorted(there)


def test_every_part_is_where_the_table_says():
    heading = "The parts of the Transformer and their rooms"
    missing = []
    for part, file, names, _ in table(TEXTS["docs/architecture.md"], heading):
        text = (ROOT / "dtrain" / file.strip("`")).read_text(encoding="utf-8")
        missing += [
            (part, name)
            for name in SPAN.findall(names)
            if not re.search(rf"\b(class|def) {name}\b|\bself\.{name} = ", text)
        ]
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_no_result_is_left_to_fill_in(name):
    assert not PLACEHOLDER.findall(TEXTS[name])
