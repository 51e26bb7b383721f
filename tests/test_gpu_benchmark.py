"""gpu.py without a GPU, all of it tiny: not its figures are judged, but that it goes every way."""

import json
import sys
from functools import partialmethod, reduce
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# E402: these are found by the path that was just set.
from benchmarks import gpu, gpu_calibration, gpu_checks, gpu_task, gpu_training, yardstick  # noqa: E402
from dtrain.loss import Objective  # noqa: E402

pytestmark = pytest.mark.slow  # whole sections run


@pytest.fixture(autouse=True)
def _no_group_left():
    """Contestants are left in the middle, where their process ends; here it goes on."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> gpu.Task:
    """A CPU in place of the GPU, with text to train on."""
    task = gpu.Task("cpu", True, tmp_path_factory.mktemp("gpu"))
    assert [row["pairs"] for row in gpu.make_data(task)] == [400]
    return task


def compiles(test):
    """Mark a test that compiles."""
    warning = "ignore:.*should not be instantiated:DeprecationWarning"  # torch's own, of its tracer
    marks = (
        pytest.mark.slow,
        pytest.mark.usefixtures("_traced"),
        pytest.mark.filterwarnings(warning),
    )
    return reduce(lambda function, mark: mark(function), marks, test)


@pytest.fixture
def _traced(monkeypatch: pytest.MonkeyPatch):
    """Compile as the script does where it is tiny."""
    monkeypatch.setattr(Objective, "compile", partialmethod(nn.Module.compile, backend="eager"))


PARTS = {
    "matrix_products": "forward TFLOP/s",
    "attention": "ns a token",
    "cross_entropy": "ns a token",
    "residual": "ns a token",
    "optimizer": "us",
}


@compiles
@pytest.mark.parametrize("part", PARTS)
def test_parts_are_measured_beside_predictions(tiny_task, part):
    """Without a GPU the kernels of Triton and of flash attention are skipped, with a reason."""
    rows = list(getattr(gpu_calibration, part)(tiny_task))
    assert not any("failed" in row for row in rows)
    skipped = {str(row["skipped"]) for row in rows if "skipped" in row}
    assert skipped == ({"it needs a GPU"} if part in GPU_KERNELS else set())
    measured = [row for row in rows if "skipped" not in row]
    assert all(row[PARTS[part]] > 0 for row in measured)
    assert all(any("predicted" in name for name in row) for row in measured[1:])


GPU_KERNELS = {"attention", "cross_entropy", "residual"}


@pytest.mark.parametrize("name", ["base", "big"])
def test_parts_and_predictions_are_of_the_same_model(name):
    model = gpu.Task("cuda", False, Path()).model(name)
    counts = (12, 6, 18 + 6, 12, 12, 1)  # queries to the source are as wide as outputs
    shapes = gpu_calibration.layers(model, 32_768).values()
    weights = sum(count * k * n for count, (k, n) in zip(counts, shapes, strict=True))
    assert 6 * weights == yardstick.training_flops(model, 32_768, 1, 1)
    kinds = {"A": ("padded", "plain"), "B": ("varlen", "compiled"), "C": ("packed", "fused")}
    for letter, (kernel, kind) in kinds.items():
        parts = gpu_calibration.ATTENTION_NS[name][kernel] + gpu_calibration.LOSS_NS[name][kind]
        parts += gpu_calibration.RESIDUAL_NS[name][kind]
        assert 0 < parts < 1e9 / gpu_training.PREDICTED[name, 32_768][letter]


def test_a_row_that_fails_does_not_stop_the_others():
    def fail() -> dict[str, object]:
        raise RuntimeError("no such kernel\nmore")

    row = gpu_task.attempted({"way": "a"}, fail)
    assert row == {"way": "a", "failed": "RuntimeError: no such kernel"}


@compiles
def test_compiled_dropout_is_looked_at(tiny_task):
    for row in gpu_checks.compiled_dropout(tiny_task):
        assert all(value for value in row.values() if isinstance(value, bool))


def test_wrong_masks_are_seen(tiny_task):
    def one_mask(x):
        y = torch.nn.functional.dropout(x, 0.2)
        return y, y

    row = gpu_checks.masks(one_mask, tiny_task)
    assert not row["sites differ"]
    assert not row["as eager"]
    assert not row["dropped as many"]
    assert row["backward drops the same"]


@pytest.mark.slow
def test_outcomes_of_tests_are_counted(tiny_task, tmp_path, monkeypatch):
    tests = tmp_path / "test_it.py"
    text = "import pytest\nmark = pytest.mark.gpu\n@mark\ndef test_a(): pass\n"
    text += "@mark\ndef test_b(): assert 1 == 2\ndef test_c(): assert False\n"
    tests.write_text(text, encoding="utf-8")
    assert any(path.name == "test_recording.py" for path in gpu_checks.gpu_test_files())
    monkeypatch.setattr(gpu_checks, "gpu_test_files", lambda: [tests])
    rows = gpu_checks.gpu_tests(tiny_task)
    counted, failed = next(rows), next(rows)
    assert (counted["passed"], counted["failed"], counted["skipped"]) == (1, 1, 0)
    assert "test_b" in str(failed["test"])
    with pytest.raises(gpu_task.CheckFailedError, match="pytest ended with 1"):
        next(rows)


def test_a_wrong_gradient_is_found():
    right = gpu_checks.Gradients(2.0, {"a": torch.ones(3), "b": torch.ones(2)})
    for found, fits in (
        (gpu_checks.Gradients(2.0, {"a": torch.ones(3), "b": torch.full((2,), 1.01)}), True),
        (gpu_checks.Gradients(2.0, {"a": torch.ones(3), "b": torch.zeros(2)}), False),
        (gpu_checks.Gradients(2.1, right.of), False),
        (gpu_checks.Gradients(float("nan"), right.of), False),
    ):
        assert gpu_checks.compare("x", found, right, gpu_checks.BF16_LIMITS)["within"] is fits


def test_a_world_of_one_is_checked(tiny_task):
    assert all(row["right"] for row in gpu_checks.world_of_one(tiny_task))


@compiles
def test_correctness_is_checked(tiny_task):
    rows = list(gpu_checks.correctness(tiny_task))
    assert [row.get("failed", row.get("within")) for row in rows] == [True, True, True]


@compiles
@pytest.mark.exhaustive
def test_resume_is_checked(tiny_task):
    for row in gpu_checks.resume(tiny_task):
        assert row["same weights"]
        assert row["same moments"]


def test_eager_steps_are_measured_beside_predictions(tiny_task):
    rows = list(gpu_training.speed(tiny_task, "base", gpu_training.EAGER[:1]))
    assert not any("failed" in row for row in rows)
    assert [row["predicted tokens/s"] for row in rows] == [542e3, 225e3]
    assert [row["graphs"] for row in rows] == [0, 0]
    assert "unknown" in str(rows[0]["MFU"])


@compiles
@pytest.mark.exhaustive
def test_compiled_steps_are_measured(tiny_task):
    kernels = tiny_task.kernels(gpu_task.FUSED, compile=True)
    config = tiny_task.config(tiny_task.model("base"), 4096, kernels=kernels)
    row = gpu_training.speed_row(tiny_task, config, 1e12)
    assert row["graphs"] > 0
    assert row["graph breaks"] == 0


def test_a_step_with_another_kernel_than_wanted_is_no_measurement(tiny_task):
    config = tiny_task.config(tiny_task.model("base"), 4096)
    with yardstick.open_training(config) as (training, loader):
        kernels = config.kernels.model_copy(update={"attention": "packed"})
        training.config = config.model_copy(update={"kernels": kernels})
        with pytest.raises(RuntimeError, match="padded and not packed"):
            gpu_training.waits(training, next(iter(loader)))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_failing_sections_do_not_stop_the_others(tmp_path, capsys):
    """Without the section that makes up the data, those that need it fail."""
    task = gpu.Task("cpu", True, tmp_path / "nothing")
    assert not gpu.measure(["world", "products"], task, tmp_path / "out", 120)
    sections = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))["sections"]
    assert sections["world"]["status"] == "failed"
    assert "train.en" in sections["world"]["error"]
    assert sections["products"]["status"] == "ok"
    assert "Traceback" in (tmp_path / "out" / "gpu.log").read_text(encoding="utf-8")
    assert "NCCL, a world of one: failed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_section_ends_with_its_time(tmp_path):
    result = gpu.run_section("products", gpu.Task("cpu", True, tmp_path), tmp_path / "log", 0.1)
    assert result.status == "failed"
    assert "not done after" in str(result.error)


@pytest.mark.gpu
def test_all_of_it_on_a_gpu(tmp_path):
    task = gpu.Task("cuda", True, tmp_path)
    names = [name for name in gpu.SECTIONS if name != "tests"]  # which run by themselves
    assert gpu.measure(names, task, tmp_path / "out", 480)
