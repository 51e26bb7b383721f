"""What settings mean on the ranks and devices at hand."""

from dataclasses import replace

import pytest
import torch
from worlds import world_of

from dtrain import kernel_choice, resolution
from dtrain.config import Config, DistributedSettings, KernelsSettings, ValidationSettings
from dtrain.distributed import World, alone
from dtrain.errors import UserError
from dtrain.preemption import StopSignal
from dtrain.resolution import check_cuda_graph
from dtrain.start import Ready, get_ready

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def make_ready(config: Config, world: World | None = None) -> Ready:
    return get_ready(config, world or alone("cpu"), StopSignal())


def test_threads_are_the_cores_shared_out_and_stay_so(toy, monkeypatch):
    monkeypatch.setattr(resolution, "num_cores", lambda: 8)
    first = make_ready(toy(run__threads="auto"), world_of(2, 2))
    assert first.config.run.threads == 4
    assert make_ready(toy(run__threads="auto"), world_of(4, 4)).config.run.threads == 4
    assert make_ready(toy(run__threads=2), world_of(4, 4)).config.run.threads == 2
    monkeypatch.setattr(resolution, "num_cores", lambda: 3)
    assert make_ready(toy("other", run__threads="auto"), world_of(4, 4)).config.run.threads == 1


def test_the_precision_is_recorded_and_stays_so(toy, monkeypatch):
    """Else a run would go on in another precision on a GPU that has a better one."""
    monkeypatch.setattr(resolution, "choose_precision", lambda _: "fp16")
    assert make_ready(toy()).config.precision == "fp16"
    monkeypatch.setattr(resolution, "choose_precision", lambda _: "bf16")
    assert make_ready(toy()).config.precision == "fp16"
    assert make_ready(toy("other")).config.precision == "bf16"


def test_the_attention_kernel_is_recorded_and_stays_so_as_long_as_it_works(toy, monkeypatch):
    asked = []

    def choose(config, _, recorded):
        asked.append((config.kernels.attention, recorded))
        return "varlen", ["packed hurts"]

    monkeypatch.setattr(kernel_choice, "choose_attention", choose)
    ready = make_ready(toy())
    assert ready.config.kernels.attention == "varlen"
    assert ready.notices == ["packed hurts"]
    make_ready(toy())
    make_ready(toy(kernels__attention="padded"))
    assert asked == [("auto", "auto"), ("auto", "varlen"), ("padded", "varlen")]


def test_more_ranks_than_micro_batches_are_refused_with_what_works(toy):
    assert make_ready(toy(), world_of(4, 4)).config.batch.micro_batches_per_step == 4
    with pytest.raises(UserError) as caught:
        make_ready(toy("wide"), world_of(8, 8))
    message = str(caught.value)
    assert "8 ranks cannot share the 4 micro-batches of a step; start at most 4" in message
    assert "set batch.tokens_per_micro_batch to 64 or less" in message
    assert not toy("wide").run_dir.exists()


def test_a_tree_of_three_ranks_is_refused_with_what_works(toy):
    config = toy(distributed__reduction="tree")
    assert make_ready(config, world_of(4, 4)).config.distributed.reduction == "tree"
    with pytest.raises(UserError, match=r"needs 1, 2, 4, 8, ... ranks, not 3; start 2, or use"):
        make_ready(config, world_of(3, 3))


@pytest.mark.parametrize(
    ("change", "num_ranks", "device", "missing"),
    [
        ({}, 1, GPU, None),
        ({}, 1, CPU, "a GPU"),
        ({"attention": "padded"}, 1, GPU, "batches of one shape"),
        ({}, 2, GPU, "distributed.reduction flat"),
        ({"reduction": "flat"}, 2, GPU, None),
        ({"reduction": "tree"}, 1, GPU, "distributed.reduction ddp or flat"),
        ({"reduction": "flat", "shard_optimizer": True}, 2, GPU, "distributed.shard_optimizer"),
        ({"cuda_graph": "auto", "attention": "padded"}, 2, CPU, None),
    ],
)
def test_what_cannot_be_recorded_is_refused_with_what_is_missing(
    change, num_ranks, device, missing
):
    kernels = {"attention": "packed", "cuda_graph": True} | {
        key: value for key, value in change.items() if key in KernelsSettings.model_fields
    }
    settings = DistributedSettings(**{k: v for k, v in change.items() if k not in kernels})
    wanted = Config(
        kernels=KernelsSettings(**kernels),
        distributed=settings,
        validation=ValidationSettings(every_steps=0),
    )
    world = replace(world_of(num_ranks, num_ranks), device=device)
    if missing is None:
        check_cuda_graph(wanted, world)
        return
    with pytest.raises(UserError, match=f"kernels.cuda_graph true needs {missing}"):
        check_cuda_graph(wanted, world)


def test_a_graph_without_batches_of_one_shape_is_refused_with_the_reason(toy, monkeypatch):
    chosen = KernelsSettings(attention="padded", cuda_graph=True, loss="plain", residual="plain")
    notices = ["the attention kernel packed is not used: it hurts", "the fused loss is not used: x"]
    monkeypatch.setattr(resolution, "choose_kernels", lambda *_: (chosen, notices))
    with pytest.raises(UserError) as caught:
        make_ready(
            toy(precision="fp32", kernels__cuda_graph=True), replace(alone("cpu"), device=GPU)
        )
    assert str(caught.value) == (
        "kernels.cuda_graph true needs batches of one shape: kernels.attention packed or varlen "
        "(the attention kernel packed is not used: it hurts); or leave it out"
    )
