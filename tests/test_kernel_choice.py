import pytest
import torch
from worlds import run_world

from dtrain import kernel_choice, train
from dtrain.config import Config, KernelsSettings, ValidationSettings
from dtrain.data.vocabulary import Vocabulary
from dtrain.errors import UserError
from dtrain.inspection import inspect_step
from dtrain.kernel_choice import CHECKS, choose_attention, choose_fused, why_not
from dtrain.kernels import attention_choice
from dtrain.kernels.dropout import dropout
from dtrain.model.settings import ModelSettings
from dtrain.model.sublayer import Residual
from dtrain.parts import build_model
from dtrain.run_directory import RunDirectory

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HERE = GPU if torch.cuda.is_available() else CPU
PLAIN, FUSED = ({"loss": kind, "residual": kind} for kind in ("plain", "fused"))


def config(precision="fp32", **kernels):
    return Config(
        precision=precision,
        kernels=KernelsSettings(**kernels),
        model=ModelSettings(hidden_dim=48, num_heads=2),
        validation=ValidationSettings(every_steps=0),
    )


@pytest.fixture
def works(monkeypatch):
    """What is said of each kernel, as if this were a GPU: empty if it works."""
    said = {"loss": "", "residual": ""}
    checks = {name: lambda *_, name=name: said[name] for name in said}
    monkeypatch.setattr(kernel_choice, "CHECKS", checks)
    monkeypatch.setattr(kernel_choice, "why_not", lambda d: "" if d == GPU else "it needs a GPU")
    return said


def chosen(device, wanted=None, recorded=None):
    found, notices = choose_fused(
        config(**(wanted or {})), device, KernelsSettings(**(recorded or {}))
    )
    return {"loss": found.loss, "residual": found.residual}, notices


def test_auto_is_fused_where_it_works_and_plain_on_a_cpu(works):
    assert chosen(GPU) == (FUSED, [])
    assert chosen(CPU) == (PLAIN, [])
    works["loss"] = "loss is off by 12.0%"
    expected = {"loss": "plain", "residual": "fused"}
    assert chosen(GPU) == (expected, ["the fused loss is not used: loss is off by 12.0%"])


@pytest.mark.usefixtures("works")
def test_a_begun_run_keeps_what_it_had_if_that_works():
    assert chosen(GPU, recorded=PLAIN) == (PLAIN, [])
    assert chosen(GPU, recorded=FUSED) == (FUSED, [])
    found, notices = chosen(CPU, recorded=FUSED)
    assert found == PLAIN
    assert notices[1] == "the fused residual is not used: it needs a GPU"


def test_what_is_wanted_by_name_is_had_or_refused(works):
    assert chosen(GPU, wanted=PLAIN, recorded=FUSED) == (PLAIN, [])
    works["residual"] = "gradient of y is off by 3.0%"
    with pytest.raises(UserError, match=r"kernels\.residual fused .* off by 3\.0%; set it to auto"):
        chosen(GPU, wanted={"residual": "fused"})
    with pytest.raises(UserError, match=r"kernels\.loss fused .* cpu: it needs a GPU"):
        chosen(CPU, wanted={"loss": "fused"})


def test_a_cpu_has_no_fused_kernels():
    assert why_not(CPU) == "it needs a GPU"


@pytest.mark.slow  # interpreted
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_kernels_are_right(name, precision):
    pytest.importorskip("triton")
    assert CHECKS[name](config(precision), HERE) == ""


def drops_nothing(_x, y):
    return y


def drops_otherwise_in_backward(x, y):
    return x + dropout(y.detach(), 0.25, training=True) + (y - y.detach())


def fails(_x, _y):
    raise RuntimeError("no kernel image\nmore")


def fails_without_a_word(_x, _y):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (drops_nothing, "0.0% are dropped and not 25%"),
        (drops_otherwise_in_backward, "y is off by"),
        (fails, "RuntimeError: no kernel image"),
        (fails_without_a_word, "NotImplementedError"),
    ],
)
def test_a_residual_that_is_wrong_is_found_out(monkeypatch, kernel, complaint):
    def wrong(x, y, norm, *_, **__):
        return kernel(x, y) if norm is None else norm(kernel(x, y))

    monkeypatch.setattr(kernel_choice, "add_and_norm", wrong)
    assert CHECKS["residual"](config(), CPU).startswith(complaint)


def test_a_loss_that_is_wrong_is_found_out(monkeypatch):
    right = kernel_choice.smoothed_cross_entropy

    def wrong(hidden, weight, target, smoothing, fused):
        return right(hidden, weight, target, smoothing + 0.01 * fused)

    monkeypatch.setattr(kernel_choice, "smoothed_cross_entropy", wrong)
    assert "loss is off by" in CHECKS["loss"](config(), CPU)


def test_a_run_records_its_choice_and_its_parts_follow(toy):
    run_world(1, train.run, toy(run__max_steps=2))
    config = RunDirectory.existing(toy().run_dir).config
    kind = "fused" if HERE == GPU else "plain"
    assert (config.kernels.loss, config.kernels.residual) == (kind, kind)
    kernels = config.kernels.model_copy(update={"residual": "fused"})
    vocabulary = Vocabulary.load(toy().run_dir)
    model = build_model(config.model_copy(update={"kernels": kernels}), vocabulary)
    assert all(part.fused for part in model.modules() if isinstance(part, Residual))


@pytest.mark.skipif(HERE == GPU, reason="there it works")
def test_a_run_on_gpus_can_be_looked_at_without_one(toy):
    run_world(1, train.run, toy(run__max_steps=2))
    settings = toy().run_dir / "config.yaml"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("residual: plain", "residual: fused"), encoding="utf-8")
    assert inspect_step(toy().run_dir, 1).notices == [
        "the fused residual is not used: it needs a GPU"
    ]


@pytest.mark.parametrize(
    ("device", "wanted", "recorded", "broken", "expected", "told"),
    [
        (CPU, "auto", "auto", [], "padded", []),
        (GPU, "auto", "auto", [], "packed", []),
        (GPU, "auto", "auto", ["packed"], "varlen", ["packed"]),
        (GPU, "auto", "auto", ["packed", "varlen"], "padded", ["packed", "varlen"]),
        (GPU, "auto", "varlen", [], "varlen", []),
        (GPU, "auto", "padded", [], "padded", []),
        (GPU, "varlen", "packed", [], "varlen", []),
        (CPU, "auto", "packed", [], "padded", ["packed"]),
    ],
)
def test_the_attention_kernel_is_the_best_that_works_or_what_the_run_had(
    toy, monkeypatch, device, wanted, recorded, broken, expected, told
):
    def what_is_wrong(kernel: str, *_: object) -> str:
        return "it is off" if kernel in broken else ""

    monkeypatch.setattr(attention_choice, "what_is_wrong", what_is_wrong)
    config = toy(precision="bf16", kernels__attention=wanted)
    kernel, notices = choose_attention(config, device, recorded)
    assert kernel == expected
    why = "it is off" if device is GPU else "it needs a GPU"
    assert notices == [f"the attention kernel {name} is not used: {why}" for name in told]


def test_an_attention_kernel_that_was_asked_for_and_does_not_work_is_refused(toy):
    config = toy(precision="bf16", kernels__attention="packed")
    with pytest.raises(UserError) as caught:
        choose_attention(config, CPU)
    why = "kernels.attention packed does not work on this cpu: it needs a GPU"
    assert str(caught.value) == f"{why}; set it to auto or padded"
