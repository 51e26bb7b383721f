"""What `dtrain inspect` prints; that it is true is in test_inspection.py."""

import json
import os
import re
import subprocess
import sys

import pytest

from dtrain.__main__ import main
from dtrain.inspection import inspect_step
from dtrain.weights import load_module

pytestmark = pytest.mark.slow  # all of it looks at a trained run


@pytest.fixture
def run(trained):
    """A run of 100 steps with checkpoints at 40, 80 and 100."""
    return trained.run_dir


@pytest.fixture
def shown(capsys, run):
    """Runs the command on the run; gives what it printed."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["inspect", str(run), *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return call


def row(text: str, name: str) -> list[str]:
    [line] = [line for line in text.split("\n") if re.match(rf"\s*{re.escape(name)}\s", line)]
    return line.split()


def test_a_table_of_layers_and_one_of_micro_batches(shown, run):
    text, seen = shown("--step", 41), inspect_step(run, 41)
    assert f"step        41 of {run}, epoch {seen.epoch}: 4 micro-batches, " in text
    assert "weights     step-0000000040, the very ones that the step began with\n" in text
    assert "computed    on cpu in fp32\n" in text
    assert f"loss        {seen.loss:.6f}   nll {seen.nll:.6f}   gradient norm " in text
    assert "not finite  nothing\n" in text
    for layer in seen.layers:
        numbers = row(text, layer.name)[1:]
        assert numbers[-5:] == ["0", "/", "0", "/", "0"]
        sizes = layer.weights.norm, layer.gradient.norm, layer.gradient.largest
        own = [f"{size:.4g}" if layer.parameters else "-" for size in sizes]
        output = [f"{size:.4g}" for size in (layer.output.rms, layer.output.largest)]
        assert numbers[:-5] == [*own, *output]
    for part in seen.micro_batches:
        index, sentences, tokens, loss, *_ = row(text, str(part.index))
        assert (int(index), int(sentences), int(tokens)) == (
            part.index,
            len(part.ids),
            part.tokens,
        )
        assert loss == f"{part.loss:.6f}"
    assert max(map(len, text.split("\n")[1:])) <= 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", 42], "step-0000000040, 1 step older than those that the step began with"),
        (["--step", 3], "the initial ones, 2 steps older than those"),
        (["--step", 1], "the initial ones, the very ones that the step began with"),
        (["--step", 41, "--checkpoint", "last"], "step-0000000100, 60 steps newer than those"),
        (["--step", 41, "--checkpoint", 80], "step-0000000080, 40 steps newer than those"),
    ],
)
def test_it_says_whose_weights_it_used(shown, arguments, said):
    assert f"weights     {said}" in shown(*arguments)


def test_text_shows_the_sentences_of_a_micro_batch(shown, run):
    text = shown("--step", 41, "--micro-batch", 3, "--text")
    assert "1 of 4 micro-batches" in text
    [part] = inspect_step(run, 41, only=3).micro_batches
    ids = [int(found) for found in re.findall(r"^  sentence (\d+): ", text, re.MULTILINE)]
    assert sorted(ids) == sorted(part.ids)
    losses = [float(found) for found in re.findall(r"loss ([\d.]+) a token", text)]
    assert losses == sorted(losses, reverse=True)
    for source, target in re.findall(r"    source  (.*)\n    target  (.*)", text):
        assert target == " ".join(f"X{word}" for word in source.split()[::-1])
    assert "sentence" not in shown("--step", 41, "--micro-batch", 3).replace("sentences", "")


def test_json_holds_the_same(shown, run):
    facts, seen = json.loads(shown("--step", 41, "--json")), inspect_step(run, 41)
    assert facts["loss"] == seen.loss
    assert facts["gradient_norm"] == seen.gradient_norm
    assert (facts["checkpoint"], facts["weights_age"]) == ("step-0000000040", 0)
    assert facts["first_not_finite"] is None
    assert [layer["name"] for layer in facts["layers"]] == [layer.name for layer in seen.layers]
    assert facts["layers"][1]["gradient"]["norm"] == seen.layers[1].gradient.norm
    assert [part["sentence_ids"] for part in facts["micro_batches"]] == [
        part.ids for part in seen.micro_batches
    ]
    assert all(part["sentences"] == [] for part in facts["micro_batches"])
    told = json.loads(shown("--step", 41, "--json", "--text", "--micro-batch", 0))
    [part] = told["micro_batches"]
    assert sorted(sentence["id"] for sentence in part["sentences"]) == sorted(part["sentence_ids"])


def test_what_is_not_finite_is_shown_and_is_valid_json(shown, monkeypatch):
    """A weight that a checkpoint holds as NaN."""
    load = load_module

    def load_broken(module, path):
        load(module, path)
        module.decoder.blocks[0].feed_forward.inner.bias.data[3] = float("nan")

    monkeypatch.setattr("dtrain.weights.load_module", load_broken)
    text = shown("--step", 41, "--text")
    culprit = "the output of decoder.blocks.0.feed_forward.inner, micro-batch 0"
    assert f"not finite  first {culprit}\n" in text
    assert "loss        nan   nll nan   gradient norm nan\n" in text
    weights, _, gradient, _, output = row(text, "decoder.blocks.0")[-5:]
    assert weights == "1"
    assert int(gradient.replace(",", "")) > 1
    assert int(output.replace(",", "")) > 1

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    facts = json.loads(shown("--step", 41, "--json"), parse_constant=refuse)
    assert facts["first_not_finite"] == culprit
    assert float(facts["loss"]) != float(facts["loss"])


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_mistake(run):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dtrain", "inspect", str(run), "--step", "41"]
    with open(writer, "wb") as gone:  # noqa: PTH123  # a descriptor, not a path
        result = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, check=False)
    assert result.returncode == 0
    assert result.stderr == b""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "0"], "0 is not at least 1"),
        (["--step", "5", "--micro-batch", "-1"], "-1 is below 0"),
        (["--step", "101"], "ends at step 100"),
        (["--step", "5", "--micro-batch", "4"], "a step has 4, numbered from 0"),
        ([], "--step"),
    ],
)
def test_mistakes_are_one_message(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", str(run), *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
