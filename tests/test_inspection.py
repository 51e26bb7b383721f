"""A run's steps are found again, with the weights, data and cursor that belong to them."""

import json
import math
import shutil
from itertools import islice
from pathlib import Path

import pytest
from conftest import Toy
from safetensors.torch import load_file, save_file
from worlds import run_world

from dtrain import checkpoint, inspection, train
from dtrain.cursors import CURSORS, Cursors
from dtrain.data import plan as plan_module
from dtrain.data.plan import BatchPlan, Cursor
from dtrain.data.preparation import prepare, prepared_directory
from dtrain.data.store import PreparedData
from dtrain.durable import write_json
from dtrain.errors import UserError
from dtrain.inspection import inspect_step
from dtrain.metrics import read_metrics
from dtrain.parts import build_plan
from dtrain.progress import Progress

CHANGES = {
    "run__max_steps": 9,
    "model__dropout": 0.2,
    "model__attention_dropout": 0.1,
    "model__num_encoder_layers": 2,
    "optimizer__max_grad_norm": 0.5,
}

pytestmark = pytest.mark.slow  # all of it looks at a trained run


def train_a_run(toy: Toy, name: str, **changes: object) -> Path:
    config = toy(name, checkpoint__every_steps=4, **(CHANGES | changes))
    run_world(1, train.run, config)
    return config.run_dir


@pytest.fixture(scope="module")
def run(toy_settings, tmp_path_factory) -> Path:
    """A run of 9 steps with dropout on one rank; checkpoints at 4, 8 and 9."""
    return train_a_run(Toy(toy_settings, tmp_path_factory.mktemp("inspected")), "inspected")


def logged(run: Path, step: int) -> dict[str, float]:
    [line] = [line for line in read_metrics(run / "metrics.jsonl") if line["step"] == step]
    return line


def is_the_step_that_was_trained(run: Path, step: int) -> None:
    seen, line = inspect_step(run, step), logged(run, step)
    assert seen.age == 0
    assert seen.gradient_norm == line["train/grad_norm"]
    # Sums of float64, which may be taken in another order.
    assert seen.loss == pytest.approx(line["train/loss"], rel=1e-13)
    assert seen.nll == pytest.approx(line["train/nll"], rel=1e-13)
    assert seen.epoch == line["epoch"]
    assert seen.first_not_finite == ""


@pytest.mark.parametrize("step", [1, 5, 9])
def test_with_the_weights_before_it_a_step_is_the_one_that_was_trained(run, step):
    """Step 1 with the initial weights; dropout is on; gradients were clipped after."""
    is_the_step_that_was_trained(run, step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16"}, {"precision": "fp16"}, {"distributed__reduction": "tree"}],
    ids=str,
)
def test_also_in_low_precision_and_with_other_sums(toy, changes):
    run = train_a_run(toy, "run", **changes)
    for step in (5, 9):
        is_the_step_that_was_trained(run, step)


@pytest.mark.slow
def test_a_run_that_began_with_another_ones_weights(run, toy, tmp_path):
    tuned = train_a_run(toy, "tuned", run__init_from=run, data__dir=tmp_path / "tokens")
    is_the_step_that_was_trained(tuned, 1)
    assert logged(tuned, 1)["train/loss"] < logged(run, 1)["train/loss"] - 0.5


def test_other_weights_are_said_to_be_older_or_newer(run):
    older = inspect_step(run, 7)
    assert (older.checkpoint, older.weights_step, older.age) == ("step-0000000004", 4, 2)
    assert older.loss == pytest.approx(logged(run, 7)["train/loss"], rel=0.2)
    assert older.gradient_norm != logged(run, 7)["train/grad_norm"]
    assert inspect_step(run, 4).checkpoint is None
    newer = inspect_step(run, 5, "last")
    assert (newer.checkpoint, newer.age) == ("step-0000000009", -5)
    assert inspect_step(run, 5, "8").checkpoint == "step-0000000008"


def test_one_micro_batch_is_what_it_was_in_the_step(run):
    whole = inspect_step(run, 5)
    one = inspect_step(run, 5, only=2)
    assert [part.index for part in one.micro_batches] == [2]
    assert one.micro_batches[0] == whole.micro_batches[2]
    assert one.loss == whole.micro_batches[2].loss
    assert (whole.step_size, one.step_size) == (4, 4)
    assert one.gradient_norm == pytest.approx(one.micro_batches[0].gradient.norm, rel=1e-6)


def test_nothing_is_written(run):
    def state() -> dict[Path, tuple[int, int]]:
        folders = run, prepared_directory(*settings)
        files = [path for folder in folders for path in folder.rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    config = inspection.RunDirectory.existing(run).config
    settings = config.data, config.vocabulary
    before = state()
    inspect_step(run, 5, with_text=True)
    assert state() == before


# ------------------------------------------------------------------ a step that went wrong


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A run to do harm to."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def plant(folder: Path, name: str, value: float) -> None:
    """Put a value into the weights of a checkpoint that verifies all the same."""
    weights = load_file(folder / checkpoint.MODEL)
    weights[name].view(-1)[0] = value
    save_file(weights, folder / checkpoint.MODEL)
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    size = (folder / checkpoint.MODEL).stat().st_size
    record = {"size": size, "sha256": checkpoint.sha256(folder / checkpoint.MODEL)}
    manifest["files"][checkpoint.MODEL] = record
    write_json(path, manifest)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_planted_weight_is_found_in_its_layer(copy, value):
    plant(copy / "checkpoints/step-0000000004", "encoder.blocks.1.feed_forward.outer.bias", value)
    seen = inspect_step(copy, 5)
    assert seen.first_not_finite == (
        "the output of encoder.blocks.1.feed_forward.outer, micro-batch 0"
    )
    bad = {layer.name: layer.weights.not_finite for layer in seen.layers}
    assert {name for name, count in bad.items() if count} == {"encoder.blocks.1"}
    layers = {layer.name: layer for layer in seen.layers}
    assert layers["encoder.blocks.0"].output.not_finite == 0
    assert layers["encoder.blocks.1"].output.not_finite > 0
    assert layers["encoder.blocks.0"].gradient.not_finite > 0
    assert not math.isfinite(seen.gradient_norm)
    assert layers["encoder.blocks.0"].weights.norm > 0
    assert inspect_step(copy, 9).first_not_finite == ""


def test_a_damaged_checkpoint_is_passed_over(copy):
    with (copy / "checkpoints/step-0000000004" / checkpoint.MODEL).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x00" if file.read(1) != b"\x00" else b"\x01")
    seen = inspect_step(copy, 5)
    assert seen.checkpoint is None
    assert len(seen.notices) == 1
    assert "step-0000000004 is passed over" in seen.notices[0]
    with pytest.raises(UserError, match="damaged"):
        inspect_step(copy, 5, "4")


def test_without_any_checkpoint_the_first_step_is_still_exact(copy):
    shutil.rmtree(copy / "checkpoints")
    is_the_step_that_was_trained(copy, 1)
    assert inspect_step(copy, 9).age == 8


def test_a_compiled_run_is_said_to_differ(copy):
    edit(copy, "compile: auto", "compile: true")
    assert "compiled" in inspect_step(copy, 5).notices[0]


# ------------------------------------------------------------------ refusals


def edit(run: Path, old: str, new: str) -> None:
    path = run / "config.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def refusal(run: Path, *arguments, **more) -> str:
    with pytest.raises(UserError) as caught:
        inspect_step(run, *arguments, **more)
    return str(caught.value)


def test_what_is_not_there_is_refused(run, tmp_path):
    assert "is not a run directory" in refusal(tmp_path, 5)
    assert refusal(run, 10) == f"--step 10: {run} ends at step 9"
    assert "there is no checkpoint '5'" in refusal(run, 5, "5")
    assert refusal(run, 5, only=4) == "--micro-batch 4: a step has 4, numbered from 0"


def test_a_step_behind_the_last_epoch_is_refused(copy):
    edit(copy, "max_epochs: 0", "max_epochs: 1")
    edit(copy, "max_steps: 9", "max_steps: 0")
    assert inspect_step(copy, 9).epoch == 0
    assert "ends after epoch 1, before it" in refusal(copy, 40)


def test_data_that_is_gone_is_refused(copy, toy_text):
    edit(copy, f"{toy_text}/prepared", f"{toy_text}/elsewhere")
    message = refusal(copy, 5)
    assert f"the training data {toy_text}/elsewhere is gone" in message
    assert f"dtrain prepare --config {copy}/config.yaml" in message


def test_text_that_changed_is_refused(copy, toy_text, tmp_path):
    lines = (toy_text / "train.en").read_text(encoding="utf-8").split("\n")
    (tmp_path / "new.en").write_text("\n".join(["red red dog", *lines[1:]]), encoding="utf-8")
    edit(copy, f"{toy_text}/train.en", f"{tmp_path}/new.en")
    assert "was prepared from other texts" in refusal(copy, 5)
    edit(copy, f"{toy_text}/prepared", f"{tmp_path}/prepared")
    config = inspection.RunDirectory.existing(copy).config
    settings = config.data, config.vocabulary
    prepare(*settings, prepared_directory(*settings), lambda _: None)
    assert "was trained with another training text" in refusal(copy, 5)
    assert "was trained with another training text" in refusal(copy, 1)


def test_a_plan_that_changed_is_refused(copy):
    edit(copy, "tokens_per_step: 512", "tokens_per_step: 1024")
    assert "another batch plan than" in refusal(copy, 5)


# ------------------------------------------------------------------ finding a step


@pytest.fixture
def plan(toy, monkeypatch) -> BatchPlan:
    """A plan of several windows an epoch."""
    monkeypatch.setattr(plan_module, "BLOCK_PAIRS", 16)
    monkeypatch.setattr(plan_module, "WINDOW_BLOCKS", 8)
    config = toy()
    data = PreparedData.open(prepared_directory(config.data, config.vocabulary))
    return build_plan(config, data)


def test_a_step_is_found_by_packing_its_window_alone(plan, tmp_path, monkeypatch):
    steps = list(islice(plan.steps(Cursor()), 90))
    file = tmp_path / CURSORS
    kept = Cursors(file, 1, Cursor(), pytest.fail)
    for number, step in enumerate(steps, start=1):
        kept.note(number + 1, step.end)
    packed = []
    pack_window = BatchPlan._pack_window
    monkeypatch.setattr(
        BatchPlan, "_pack_window", lambda *place: packed.append(place[1:]) or pack_window(*place)
    )
    for number in (1, 2, 17, 40, 41, 60, 89, 90):
        packed.clear()
        plan._window = None
        found = inspection.find_step(plan, file, number, {})
        expected = steps[number - 1]
        assert [ids.tolist() for ids in found.micro_batches] == [
            ids.tolist() for ids in expected.micro_batches
        ]
        assert found.end == expected.end
        assert len(packed) <= 2


def test_a_checkpoints_cursor_serves_too(plan, tmp_path, monkeypatch):
    """A run from before there was a file of cursors, or whose file was lost."""
    steps = list(islice(plan.steps(Cursor()), 40))
    progress = Progress(step=38, cursor=steps[37].end)
    state = {"step": 38, "progress": progress.to_json()}
    begun = []
    cut = BatchPlan.steps
    monkeypatch.setattr(BatchPlan, "steps", lambda self, at: begun.append(at) or cut(self, at))
    for number, start in ((39, steps[37].end), (40, steps[37].end), (38, Cursor())):
        found = inspection.find_step(plan, tmp_path / CURSORS, number, state)
        assert found.end == steps[number - 1].end
        assert begun.pop() == start
