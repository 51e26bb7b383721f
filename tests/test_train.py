"""The promises of a training run, end to end, on real ranks."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_account import run_with_nan
from worlds import run_world

from dtrain import fault, train
from dtrain.batch import Batch
from dtrain.checkpoint import steps_saved
from dtrain.config import Config
from dtrain.data.loader import LoadedStep, collate
from dtrain.data.plan import BatchPlan, Cursor, DistributedTokenSampler, PlannedStep
from dtrain.distributed import connect
from dtrain.errors import UserError
from dtrain.learner import Learner
from dtrain.loss import Objective
from dtrain.preemption import Deadline, StopSignal
from dtrain.start import claimed
from dtrain.supervision import watched

TIMING = {
    "train/tokens_per_second",
    "train/step_seconds",
    "train/data_wait_share",
    "train/forward_backward_share",
    "train/reduction_share",
    "train/optimizer_share",
    "train/between_steps_share",
    "train/slowest_rank",
    "train/slowest_rank_ratio",
    "train/tflops",
    "train/memory_gib",
}


def run(config: Config, stop_after: int = 0, signalled_rank: int = 0) -> int:
    """Train on this rank; one rank gets SIGTERM in the middle of step `stop_after`."""
    where = f"rank={signalled_rank},step={stop_after},point=after_backward"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fault.VARIABLE, f"{where},signal=TERM")
        return train.run(config)


def last_weights(config: Config) -> dict[str, str]:
    """SHA-256 of model and optimizer in the newest checkpoint."""
    newest = steps_saved(config.run_dir / "checkpoints")[0]
    files = json.loads((newest / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
    return {name: files[name]["sha256"] for name in ("model.safetensors", "optimizer.safetensors")}


def metrics_of(config: Config) -> list[dict[str, float]]:
    """All lines of metrics.jsonl, without what depends on the clock."""
    lines = (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMING}
        for line in lines
    ]


def status_of(config: Config) -> dict[str, object]:
    return json.loads((config.run_dir / "status.json").read_text(encoding="utf-8"))


def same_after_a_stop(toy, size: int, **changes: object) -> None:
    straight = toy("straight", **changes)
    stopped = toy("stopped", **changes)
    assert run_world(size, run, straight) == [0] * size
    assert run_world(size, run, stopped, 5, size - 1) == [0] * size
    assert status_of(stopped)["status"] == "preempted"
    assert status_of(stopped)["step"] == 5
    assert run_world(size, run, stopped) == [0] * size
    assert status_of(stopped)["status"] == "completed"
    assert last_weights(stopped) == last_weights(straight)
    assert metrics_of(stopped) == metrics_of(straight)
    assert [line["step"] for line in metrics_of(stopped)] == list(range(1, 13))


@pytest.mark.slow
def test_stop_and_go_on_is_the_same_run_bit_for_bit(toy):
    same_after_a_stop(toy, 1)


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step_and_go_on_the_same(toy):
    same_after_a_stop(toy, 2, validation__every_steps=6, validation__beam_size=2)


@pytest.mark.slow
def test_a_validation_that_a_stop_cut_off_is_made_up_for(toy):
    same_after_a_stop(toy, 1, validation__every_steps=5, validation__beam_size=1)
    assert [x["step"] for x in metrics_of(toy("stopped")) if "validation/bleu" in x] == [5, 10, 12]


def run_and_stop_in_validation(config: Config, step: int) -> int:
    """Train; the last rank gets SIGTERM in the middle of a step's validation."""
    with pytest.MonkeyPatch.context() as patch:
        where = f"rank={int(os.environ['WORLD_SIZE']) - 1},step={step},point=in_validation"
        patch.setenv(fault.VARIABLE, f"{where},signal=TERM")
        return train.run(config)


@pytest.mark.slow
def test_a_validation_that_is_cut_short_twice_is_made_all_the_same(toy):
    settings = {"validation__every_steps": 5, "validation__beam_size": 1}
    straight, stopped = toy("straight", **settings), toy("stopped", **settings)
    run_world(2, run, straight)
    for _ in range(2):
        assert run_world(2, run_and_stop_in_validation, stopped, 5) == [0, 0]
        assert (status_of(stopped)["status"], status_of(stopped)["step"]) == ("preempted", 5)
    run_world(2, run, stopped)
    assert metrics_of(stopped) == metrics_of(straight)
    assert last_weights(stopped) == last_weights(straight)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_more_ranks_and_several_buckets_go_on_bit_for_bit(toy, size):
    """Over 2 MiB of gradients: DistributedDataParallel reduces them in several buckets."""
    same_after_a_stop(toy, size, model__feed_forward_dim=8192, distributed__bucket_mb=1)


@pytest.mark.slow
def test_another_seed_is_another_run(toy):
    first, again, other = toy("first"), toy("again"), toy("other", run__seed=2)
    for config in (first, again, other):
        run_world(1, run, config)
    assert last_weights(first) == last_weights(again)
    assert last_weights(first) != last_weights(other)


@pytest.mark.slow
def test_any_number_of_ranks_sees_the_same_plan_and_loss(toy):
    losses = {}
    for size in (1, 2, 3, 4):
        # A rate that suits the model: Adam at a wild one blows rounding up.
        config = toy(f"on-{size}", run__max_steps=40, optimizer__learning_rate=0.1)
        run_world(size, run, config)
        losses[size] = [line["train/loss"] for line in metrics_of(config)]
        tokens = [line["tokens"] for line in metrics_of(config)]
        assert tokens == [line["tokens"] for line in metrics_of(toy("on-1"))]
    for size in (2, 3, 4):
        worst = max(abs(a - b) for a, b in zip(losses[size], losses[1], strict=True))
        assert worst < 1e-5, f"{size} ranks differ by {worst}"


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(toy):
    straight, moved = toy("straight"), toy("moved")
    run_world(1, run, straight)
    run_world(3, run, moved, 5, 2)
    run_world(2, run, moved)
    for ours, theirs in zip(metrics_of(moved), metrics_of(straight), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["train/learning_rate"] == theirs["train/learning_rate"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_tree_gives_the_same_bits_on_any_number_of_ranks(toy, size):
    """The reference is one rank; dropout is on."""
    alone, shared = (toy(n, distributed__reduction="tree") for n in ("alone", "shared"))
    run_world(1, run, alone)
    run_world(size, run, shared)
    assert last_weights(shared) == last_weights(alone)
    assert metrics_of(shared) == metrics_of(alone)


@pytest.mark.slow
def test_the_tree_gives_the_same_bits_when_the_number_of_ranks_changes_on_the_way(toy):
    straight, moved = (toy(n, distributed__reduction="tree") for n in ("straight", "moved"))
    run_world(1, run, straight)
    run_world(2, run, moved, 3, 1)
    run_world(1, run, moved, 7, 0)
    run_world(4, run, moved)
    assert last_weights(moved) == last_weights(straight)
    assert metrics_of(moved) == metrics_of(straight)


@pytest.mark.slow
def test_split_moments_make_a_checkpoint_that_goes_on_anywhere(toy):
    """On two ranks, on four, whole on one and split on two again: as if on one all the time."""
    whole = {"distributed__reduction": "tree", "optimizer__max_grad_norm": 0.5}
    split = whole | {"distributed__shard_optimizer": True}
    straight, moved = toy("straight", **whole), toy("moved", **split)
    run_world(1, run, straight)
    run_world(2, run, moved, 3, 1)
    run_world(4, run, moved, 6, 0)
    run_world(1, run, toy("moved", **whole), 9, 0)
    run_world(2, run, moved)
    assert last_weights(moved) == last_weights(straight)
    assert metrics_of(moved) == metrics_of(straight)


# ------------------------------------------------------------------ gradients


Gradients = dict[str, np.ndarray]


def most_ragged_step(plan: BatchPlan) -> PlannedStep:
    """Find a step whose micro-batches have unequal numbers of tokens: full and part-empty ones."""

    def spread(step: PlannedStep) -> int:
        counts = [int(plan.lengths.target_lengths(ids).sum()) for ids in step.micro_batches]
        return max(counts) - min(counts)

    return max(islice(plan.steps(Cursor()), 60), key=spread)


@contextmanager
def training_on_rank(config: Config) -> Iterator[train.Training]:
    """All that a training consists of, not yet begun."""
    with (
        StopSignal() as stop,
        connect("cpu", 60) as world,
        claimed(config, world, stop) as ready,
        watched(ready, world) as heartbeat,
    ):
        yield train.Training(ready, world, stop, Deadline(None), heartbeat)


def gradients_of_a_step(config: Config) -> Gradients:
    """Run the first step as training does, and take the gradients instead of the update."""
    with training_on_rank(config) as training:
        training.metrics = train.Metrics.silent()
        training.account = training.open_account()
        training.rehearse()
        learner = training.learner
        taken: Gradients = {}

        def take(_: int) -> torch.Tensor:
            taken.update((n, p.grad.numpy().copy()) for n, p in learner.model.named_parameters())
            learner.optimizer.zero_grad(set_to_none=True)
            return torch.zeros(())

        learner.update = take
        sampler = DistributedTokenSampler(training.plan, training.world.size, training.world.rank)
        planned = most_ragged_step(training.plan)
        batches = [
            (i, collate(training.plan, training.data.train, ids))
            for i, ids in sampler.share(planned)
        ]
        training.train_step(LoadedStep(planned, batches), 0.0)
        return taken


def reference_gradients(config: Config, mean_of_means: bool = False) -> Gradients:
    """The same in float64: one process, whole sentences in padded batches."""
    with training_on_rank(config) as training:
        objective = Objective(training.learner.model.double(), config.loss.label_smoothing)
        planned = most_ragged_step(training.plan)
        for ids in planned.micro_batches:
            (source, source_lengths), (target, target_lengths) = training.data.train.gather(ids)
            batch = Batch.padded(
                [
                    s.tolist()
                    for s in torch.tensor(source.astype(int)).split(source_lengths.tolist())
                ],
                [
                    t.tolist()
                    for t in torch.tensor(target.astype(int)).split(target_lengths.tolist())
                ],
            )
            count = batch.num_tokens * len(planned.micro_batches)
            loss = objective(batch)[0]
            (loss / (count if mean_of_means else planned.num_target_tokens)).backward()
        return {name: p.grad.numpy() for name, p in training.learner.model.named_parameters()}


def worst_difference(found, expected) -> float:
    return max(float(np.abs(found[name] - expected[name]).max()) for name in expected)


def worlds_and_accumulations() -> list[object]:
    """Ranks, and micro-batches of each: some in every test run, the others take longer."""
    marks = {
        (w, a): [pytest.mark.slow, pytest.mark.exhaustive] for w in (1, 2, 3, 4) for a in (1, 2, 4)
    }
    marks |= {(1, 1): [], (2, 2): [], (3, 1): []}
    marks |= {(4, 1): [pytest.mark.slow], (3, 2): [pytest.mark.slow]}
    return [pytest.param(w, a, marks=marks[w, a]) for w, a in marks]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "accumulation"), worlds_and_accumulations())
def test_gradients_are_those_of_one_process_in_float64(toy, size, accumulation):
    count = size * accumulation
    config = toy("run", batch__tokens_per_step=128 * count, model__dropout=0.0)
    expected = run_world(1, reference_gradients, config)[0]
    for found in run_world(size, gradients_of_a_step, config):
        assert worst_difference(found, expected) < 1e-6
    if count > 1:
        means = run_world(1, reference_gradients, config, True)[0]
        assert worst_difference(means, expected) > 1e-5, "the usual mistake would go unnoticed"


@pytest.mark.slow
def test_gradients_of_the_tree_are_those_of_one_process_in_float64(toy):
    config = toy("run", model__dropout=0.0, distributed__reduction="tree")
    expected = run_world(1, reference_gradients, config)[0]
    for found in run_world(2, gradients_of_a_step, config):
        assert worst_difference(found, expected) < 1e-6


@pytest.mark.slow
def test_uneven_shares_give_the_same_gradients(toy):
    """Four micro-batches on three ranks: two of the ranks run an empty one besides."""
    config = toy("run", model__dropout=0.0)
    expected = run_world(1, reference_gradients, config)[0]
    for found in run_world(3, gradients_of_a_step, config):
        assert worst_difference(found, expected) < 1e-6


# ------------------------------------------------------------------ who writes


def written_paths(config: Config) -> list[str]:
    """Train, and note every file or directory of the run that this rank creates or renames."""
    written, folder = [], str(config.run_dir)

    def note(event: str, arguments: tuple[object, ...]) -> None:
        path = str(arguments[0]) if arguments else ""
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
        )
        if writes and path.startswith(folder):
            written.append(path.removeprefix(folder))

    sys.addaudithook(note)
    train.run(config)
    return written


@pytest.mark.slow
def test_only_rank_0_writes(toy):
    first, *others = run_world(3, written_paths, toy("run", checkpoint__every_steps=4))
    assert len(first) > 10
    for written in others:
        assert {path.split("/")[1] for path in written} == {"heartbeats", "logs"}


# ------------------------------------------------------------------ starts and refusals


@pytest.mark.slow
def test_missing_tokens_are_prepared_by_rank_0(toy, tmp_path):
    config = toy("run", run__max_steps=2, data__dir=tmp_path / "tokens")
    assert run_world(2, run, config) == [0, 0]
    assert (tmp_path / "tokens" / "manifest.json").exists()


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        train.run(config)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_mistake_in_the_data_is_one_error_on_all_ranks(toy, tmp_path, size):
    (tmp_path / "a.en").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "a.de").write_text("eins\n", encoding="utf-8")
    pair = f"[{{source: {tmp_path}/a.en, target: {tmp_path}/a.de}}]"
    config = toy("run", data__train=pair, data__dir=tmp_path / "tokens")
    messages = run_world(size, refusal, config)
    assert len(set(messages)) == 1
    assert "a.en" in messages[0]
    assert "a.de" in messages[0]
    assert not (config.run_dir / "config.yaml").exists(), "the corrected command begins anew"
    assert (status_of(config)["status"], status_of(config)["exit_code"]) == ("failed", 2)


def test_changed_settings_are_refused_and_named(toy):
    run_world(1, run, toy("run", run__max_steps=2))
    message = run_world(1, refusal, toy("run", run__seed=3, model__dropout=0.2))[0]
    assert "run.seed: 1 -> 3" in message
    assert "model.dropout: 0.1 -> 0.2" in message
    assert "--run.name=" in message


@pytest.mark.slow
def test_changed_text_is_refused(toy, toy_text, tmp_path):
    run_world(1, run, toy("run", run__max_steps=2))
    lines = (toy_text / "train.en").read_text(encoding="utf-8").split("\n")
    (tmp_path / "new.en").write_text("\n".join(["red red dog", *lines[1:]]), encoding="utf-8")
    pair = f"[{{source: {tmp_path}/new.en, target: {toy_text}/train.de}}]"
    changed = toy("run", data__train=pair, data__dir=tmp_path / "tokens")
    vocabulary = (changed.run_dir / "vocabulary.model").read_bytes()
    message = run_world(1, refusal, changed)[0]
    assert re.search(r"another training text \([0-9a-f]{12} -> [0-9a-f]{12}\)", message)
    assert re.search(r"another vocabulary \([0-9a-f]{12} -> [0-9a-f]{12}\)", message)
    assert "--allow-changed data" in message
    assert (changed.run_dir / "vocabulary.model").read_bytes() == vocabulary


@pytest.mark.slow
def test_more_steps_go_on_and_a_finished_run_stays_as_it_is(toy):
    run_world(1, run, toy("run", run__max_steps=3))
    run_world(1, run, toy("run", run__max_steps=6))
    weights = last_weights(toy("run"))
    (toy("run").run_dir / "status.json").write_text('{"status": "running"}', encoding="utf-8")
    run_world(1, run, toy("run", run__max_steps=6))
    assert status_of(toy("run"))["status"] == "completed"
    assert last_weights(toy("run")) == weights
    assert [line["step"] for line in metrics_of(toy("run"))] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_epochs_end_a_run(toy):
    config = toy("run", run__max_steps=0, run__max_epochs=2)
    run_world(1, run, config)
    lines = metrics_of(config)
    assert lines[-1]["epoch"] == 1
    assert status_of(config)["status"] == "completed"


@pytest.mark.slow
def test_fine_tuning_starts_from_another_runs_weights_and_vocabulary(toy, toy_text, tmp_path):
    base = toy("base", run__max_steps=3)
    run_world(1, run, base)
    pair = f"[{{source: {toy_text}/test.en, target: {toy_text}/test.de}}]"
    tuned = toy(
        "tuned",
        run__init_from=base.run_dir,
        data__train=pair,
        data__dir=tmp_path / "tokens",
        optimizer__learning_rate=1e-30,
        run__max_steps=1,
    )
    run_world(1, run, tuned)
    same = [(c.run_dir / "vocabulary.model").read_bytes() for c in (base, tuned)]
    assert same[0] == same[1]
    weights = [
        load_file(steps_saved(c.run_dir / "checkpoints")[0] / "model.safetensors")
        for c in (base, tuned)
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)


def test_a_failure_is_written_down(toy):
    config = toy("run")

    def failing(config: Config) -> None:
        Learner.update = lambda *_: 1 / 0
        train.run(config)

    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_world(1, failing, config)
    assert status_of(config)["status"] == "failed"
    assert "ZeroDivisionError" in str(status_of(config)["why"])


@pytest.mark.slow
def test_patience_ends_a_run(toy):
    config = toy(
        "run",
        validation__every_steps=1,
        validation__beam_size=1,
        validation__patience=2,
        optimizer__learning_rate=1e-30,
    )
    run_world(1, run, config)
    assert status_of(config)["step"] == 3
    assert status_of(config)["status"] == "completed"


# ------------------------------------------------------------------ numbers


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_keeps_weights_and_moments_in_fp32(toy, precision):
    same_after_a_stop(toy, 1, precision=precision)
    newest = steps_saved(toy("stopped").run_dir / "checkpoints")[0]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert {tensor.dtype for tensor in load_file(newest / file).values()} == {torch.float32}
    scaler = json.loads((newest / "state.json").read_text(encoding="utf-8"))["scaler"]
    assert bool(scaler) == (precision == "fp16")
    assert (
        metrics_of(toy("stopped"))[-1]["train/loss"] < metrics_of(toy("stopped"))[0]["train/loss"]
    )


def scales_of(config: Config) -> list[float]:
    """The loss scale on this rank after each step."""
    after_step, scales = train.Training.after_step, []

    def noting(self):
        scales.append(self.learner.scaler.get_scale())
        return after_step(self)

    train.Training.after_step = noting
    run_with_nan(config, 4, 5)
    return scales


@pytest.mark.slow
def test_the_loss_scale_is_the_same_on_all_ranks_and_survives_a_stop(toy):
    config = toy("run", precision="fp16", run__max_steps=8)
    first, second = run_world(2, scales_of, config)
    assert first == second
    assert first[2:5] == [2.0**16, 2.0**15, 2.0**14]
    assert run_world(1, scales_of, toy("run", precision="fp16", run__max_steps=9)) == [[2.0**14]]


# ------------------------------------------------------------------ agreement


def run_diverging(config: Config) -> str:
    """Train on several ranks, one of which has its weights changed behind its back at step 5."""
    update = Learner.update

    def diverging(self, step):
        if step == 5 and self.world.rank == 1:
            with torch.no_grad():
                next(self.model.parameters()).flatten()[3] += 1e-6
        return update(self, step)

    Learner.update = diverging
    train.CHECK_EVERY_STEPS = 3
    with pytest.raises(RuntimeError) as caught:
        train.run(config)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["ddp", "tree"])
def test_a_rank_whose_weights_diverge_is_caught_at_the_next_check(toy, reduction):
    config = toy("run", distributed__reduction=reduction)
    for message in run_world(2, run_diverging, config):
        assert "after step 6 of rank" in message


def run_checking_every_step(config: Config) -> int:
    train.CHECK_EVERY_STEPS = 1
    return train.run(config)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ranks_agree_bit_for_bit_after_each_of_fifty_steps(toy):
    config = toy("run", run__max_steps=50)
    assert run_world(3, run_checking_every_step, config) == [0] * 3


def run_in_new_process(config: Config) -> None:
    """Train where nothing was compiled before: a fork would wait for the compiler's threads."""
    path = config.run_dir.parent / f"{config.run.name}.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "dtrain.train", "--config", str(path)]
    subprocess.run(command, check=True, timeout=300)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_compiled_training_is_the_same_training(toy):
    plain, compiled = toy("plain", run__max_steps=3), toy("compiled", run__max_steps=3)
    run_world(1, run, plain)
    compiled = toy("compiled", run__max_steps=3, kernels__compile="true", model__dropout=0.0)
    eager = toy("eager", run__max_steps=3, model__dropout=0.0)
    run_in_new_process(compiled)
    run_world(1, run, eager)
    for ours, theirs in zip(metrics_of(compiled), metrics_of(eager), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-4)
    names = [
        set(load_file(steps_saved(c.run_dir / "checkpoints")[0] / "model.safetensors"))
        for c in (compiled, plain)
    ]
    assert names[0] == names[1]


@pytest.mark.slow
def test_it_learns_the_toy_language(toy):
    config = toy(
        "run",
        run__max_steps=500,
        model__hidden_dim=64,
        model__dropout=0.0,
        schedule__warmup_steps=100,
        optimizer__learning_rate=0.7,
        validation__every_steps=500,
        validation__beam_size=2,
        metrics__every_steps=50,
    )
    run_world(2, run, config, timeout=240)
    assert metrics_of(config)[-1]["validation/bleu"] > 50  # 86 here; untrained it is under 5
