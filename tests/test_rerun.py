"""A step run again is the step that was trained."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worlds import run_world

from dtrain import train
from dtrain.batch import Batch
from dtrain.data.plan import Cursor
from dtrain.data.preparation import prepared_directory
from dtrain.data.store import PreparedData
from dtrain.distributed import alone
from dtrain.loss import Objective
from dtrain.metrics import read_metrics
from dtrain.optimizer import clip_gradients
from dtrain.parts import build_model, build_plan, seed_position
from dtrain.rerun import Rerun

pytestmark = pytest.mark.slow  # all of it looks at a trained run


@pytest.fixture
def parts(toy):
    """Model, plan and data of a toy run, with dropout."""
    config = toy(precision="fp32")
    data = PreparedData.open(prepared_directory(config.data, config.vocabulary))
    return config, build_model(config, data.vocabulary), build_plan(config, data), data


def rerun(parts, chosen=range(4), step=1, texts=None):
    """Run the first step of the plan under any number."""
    config, model, plan, data = parts
    again = Rerun(config, model, plan, data.train, alone("cpu"))
    sums = again.run(step, next(plan.steps(Cursor())), chosen, texts)
    return again, sums


def one_micro_batch(parts, index: int, step: int = 1) -> tuple[float, float]:
    """A micro-batch's loss a token and its gradient's norm, by hand."""
    config, model, plan, data = parts
    planned = next(plan.steps(Cursor()))
    ids = planned.micro_batches[index]
    model.zero_grad()
    seed_position(config.run.seed, step, index)
    batch = Batch.packed(*data.train.gather(ids), plan.source_slots, plan.target_slots)
    loss, _ = Objective(model, config.loss.label_smoothing)(batch)
    (loss / planned.num_target_tokens).backward()
    norm = clip_gradients(model, 0.0).item()
    model.zero_grad()
    return loss.item() / batch.num_tokens, norm


def test_each_micro_batch_is_what_it_is_alone(parts):
    again, sums = rerun(parts)
    assert len(again.micro_batches) == 4
    for index, part in enumerate(again.micro_batches):
        loss, norm = one_micro_batch(parts, index)
        assert part.index == index
        assert part.loss == pytest.approx(loss, rel=1e-12)
        assert part.gradient.norm == pytest.approx(norm, rel=1e-6)
    tokens = [part.tokens for part in again.micro_batches]
    assert sum(tokens) == next(parts[2].steps(Cursor())).num_target_tokens
    total = sum(part.loss * part.tokens for part in again.micro_batches)
    assert sums[0].item() == pytest.approx(total, rel=1e-12)


def test_the_gradient_is_the_sum_over_micro_batches(parts):
    again, _ = rerun(parts)
    model = parts[1]
    together = [p.grad.clone() for p in model.parameters()]
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for index in range(4):
        one_micro_batch_sums(parts, index, sums)
    for ours, theirs in zip(together, sums, strict=True):
        assert torch.equal(ours, theirs)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in sums))
    assert again.gradient_norm == pytest.approx(norm, rel=1e-6)


def one_micro_batch_sums(parts, index, sums) -> None:
    rerun_of_one(parts, index)
    for total, parameter in zip(sums, parts[1].parameters(), strict=True):
        total += parameter.grad


def rerun_of_one(parts, index):
    parts[1].zero_grad()
    return rerun(parts, [index])[0]


def test_a_micro_batch_alone_has_the_dropout_that_it_has_in_the_step(parts):
    whole = rerun(parts)[0].micro_batches[2]
    alone_ = rerun_of_one(parts, 2).micro_batches[0]
    assert (alone_.loss, alone_.nll, alone_.gradient) == (whole.loss, whole.nll, whole.gradient)
    parts[1].zero_grad()
    assert rerun(parts, [2], step=2)[0].micro_batches[0].loss != whole.loss


def test_layers_hold_the_whole_gradient(parts):
    again, _ = rerun(parts)
    squares = sum(layer.gradient.squares for layer in again.watch.layers)
    assert math.sqrt(squares) == pytest.approx(again.gradient_norm, rel=1e-6)
    largest = max(p.grad.abs().max().item() for p in parts[1].parameters())
    assert max(layer.gradient.largest for layer in again.watch.layers) == largest


def test_a_tree_of_gradients_gives_the_same_norms(parts, toy):
    plain, _ = rerun(parts)
    parts[1].zero_grad()
    tree, _ = rerun((toy(precision="fp32", distributed__reduction="tree"), *parts[1:]))
    assert tree.gradient_norm == pytest.approx(plain.gradient_norm, rel=1e-6)
    assert [p.gradient for p in tree.micro_batches] == [p.gradient for p in plain.micro_batches]
    assert (
        rerun((toy(precision="fp32", distributed__reduction="tree"), *parts[1:]), [3])[
            0
        ].gradient_norm
        > 0
    )


def test_sentences_are_told_with_their_losses_the_worst_first(parts):
    data = parts[3]
    again, _ = rerun(parts, texts=data.vocabulary)
    for part in again.micro_batches:
        assert sorted(s.id for s in part.sentences) == sorted(part.ids)
        losses = [s.loss for s in part.sentences]
        assert losses == sorted(losses, reverse=True)
        total = sum(s.loss * s.tokens for s in part.sentences)
        assert total / part.tokens == pytest.approx(part.loss, rel=1e-5)
        for sentence in part.sentences:
            words = [f"X{word}" for word in sentence.source.split()[::-1]]
            assert sentence.target.split() == words


def test_sentences_of_a_broken_one_come_first(parts):
    config, model, plan, data = parts
    ids = next(plan.steps(Cursor())).micro_batches[0]
    _, (_, lengths) = data.train.gather(ids)
    culprit = int(np.argmax(lengths))
    plain, _ = rerun(parts, [0], texts=data.vocabulary)
    again = Rerun(config, model, plan, data.train, alone("cpu"))
    first = int(lengths[:culprit].sum())

    def break_it(_module, _inputs, output):
        output = output.clone()
        output[first] = math.nan
        return output

    model.zero_grad()
    hook = model.decoder.blocks[-1].register_forward_hook(break_it, prepend=True)
    again.run(1, next(plan.steps(Cursor())), [0], data.vocabulary)
    hook.remove()
    worst, *others = again.micro_batches[0].sentences
    assert worst.id == ids[culprit]
    assert math.isnan(worst.loss)
    assert [s for s in plain.micro_batches[0].sentences if s.id != worst.id] == others


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_computed_as_in_the_run(toy, precision):
    config = toy(precision=precision, run__max_steps=3, checkpoint__every_steps=1)
    run_world(1, train.run, config)
    logged = read_metrics(config.run_dir / "metrics.jsonl")[2]
    data = PreparedData.open(prepared_directory(config.data, config.vocabulary))
    plan = build_plan(config, data)
    model = build_model(config, data.vocabulary)
    folder = config.run_dir / "checkpoints" / "step-0000000002"
    model.load_state_dict(load_file(folder / "model.safetensors"))
    state = train.checkpoint.read_state(folder)
    again = Rerun(config, model, plan, data.train, alone("cpu"), state["scaler"])
    first, second, third = (step for step, _ in zip(plan.steps(Cursor()), range(3), strict=False))
    assert first.end != second.end
    sums = again.run(3, third, range(4), None)
    assert (sums[0] / third.num_target_tokens).item() == pytest.approx(
        logged["train/loss"], rel=1e-12
    )
    assert again.gradient_norm == logged["train/grad_norm"]
