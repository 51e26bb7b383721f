"""Recorded work. What only a GPU can show is marked so; the rest runs with a stand-in that replays
by doing the work again in the same memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dtrain import recording
from dtrain.batch import Batch
from dtrain.config import Config
from dtrain.data.loader import LoadedStep, Loader
from dtrain.data.plan import Cursor, DistributedTokenSampler
from dtrain.data.preparation import prepared_directory
from dtrain.data.store import PreparedData
from dtrain.distributed import alone
from dtrain.learner import Learner
from dtrain.parts import build_plan
from dtrain.recording import RecordedBackward


class DoneAgain:
    """Like a Recording: the result stays where it was, whatever is replayed."""

    def __init__(self, work):
        for _ in range(3):
            work()
        self.work, self.result = work, work()

    def replay(self) -> Tensor:
        return self.result.copy_(self.work())


@pytest.fixture
def done_again(monkeypatch):
    for module in ("dtrain.recording", "dtrain.learner"):
        monkeypatch.setattr(f"{module}.Recording", DoneAgain)


def other_words(step: LoadedStep, shift: int) -> LoadedStep:
    """The same lengths with other tokens: all batches have one shape, whatever the kernel."""

    def turned(ids: Tensor) -> Tensor:
        return torch.where(ids > 3, 4 + (ids - 4 + shift) % 20, ids)

    (index, batch) = step.micro_batches[0]
    changed = {name: turned(getattr(batch, name)) for name in ("source", "target_in", "target_out")}
    return LoadedStep(step.plan, [(index, replace(batch, **changed))])


def train(config: Config, record: bool) -> tuple[list[float], list[Tensor]]:
    """Norms, and weights and moments, after four steps; the third has a gradient of NaN."""
    data = PreparedData.open(prepared_directory(config.data, config.vocabulary))
    learner, plan = (
        Learner(config, data.vocabulary, alone(config.run.device)),
        build_plan(config, data),
    )
    norms = []
    with Loader(DistributedTokenSampler(plan, 1, 0), data.train, Cursor(), False) as loader:
        step = next(iter(loader))
        if record:
            learner.record(step.micro_batches[0][1].to(learner.world.device))
        for number in (1, 2, 3, 4):
            bias = next(p for name, p in learner.model.named_parameters() if name.endswith("bias"))
            kept = bias.detach().clone()
            bias.data.fill_(torch.nan if number == 3 else 0.01)
            norms.append(learner.learn(number, other_words(step, number), lambda *_: None).norm)
            bias.data.copy_(kept)
    states = [t for p in learner.model.parameters() for t in learner.optimizer.state[p].values()]
    return norms, [tensor.detach().clone() for tensor in (*learner.model.parameters(), *states)]


@pytest.mark.usefixtures("done_again")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_recorded_steps_are_the_same_steps(toy, precision):
    """Tokens, weight, rate and gradients reach the recorded memory; warm-ups leave no trace."""
    config = toy(precision=precision, optimizer__max_grad_norm=0.5, batch__tokens_per_step=128)
    plain, recorded = train(config, record=False), train(config, record=True)
    assert [norm == norm for norm in plain[0]] == [True, True, False, True]  # NaN is not itself
    assert str(plain[0]) == str(recorded[0])
    assert all(map(torch.equal, plain[1], recorded[1]))


@pytest.mark.usefixtures("done_again")
def test_a_batch_of_another_shape_is_refused():
    recorded = RecordedBackward(lambda batch, _: batch.source.sum(), Batch.empty(8, 8))
    recorded(Batch.empty(8, 8), 1.0)
    with pytest.raises(RuntimeError, match=r"another shape than was recorded: \[9\] instead of"):
        recorded(Batch.empty(8, 9), 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_recorded_steps_are_the_same_steps(toy, precision):
    config = toy(precision=precision, run__device="cuda", batch__tokens_per_step=128)
    plain, recorded = train(config, record=False), train(config, record=True)
    assert str(plain[0]) == str(recorded[0])
    assert all(map(torch.equal, plain[1], recorded[1]))


@pytest.mark.gpu
def test_dropout_follows_the_seed_in_every_replay():
    ones = torch.ones(10_000, device="cuda")
    drop = recording.Recording(lambda: torch.nn.functional.dropout(ones, 0.5))

    def mask(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return drop.replay().clone()

    first, second, again = mask(1), mask(2), mask(1)
    torch.manual_seed(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(second, torch.nn.functional.dropout(ones, 0.5))


FUSED = {"attention": "packed", "loss": "fused", "residual": "fused"}
WAYS = {"plain": {}, "fused": FUSED, "recorded": FUSED | {"cuda_graph": True}}


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_waits_for_the_gpu(toy, way):
    """Torch itself reports every call that makes the program wait."""
    kernels = {f"kernels__{name}": value for name, value in WAYS[way].items()}
    config = toy(precision="bf16", run__device="cuda", **kernels)
    data = PreparedData.open(prepared_directory(config.data, config.vocabulary))
    learner, plan = Learner(config, data.vocabulary, alone("cuda")), build_plan(config, data)
    with Loader(DistributedTokenSampler(plan, 1, 0), data.train, Cursor(), True) as loader:
        steps = iter(loader)
        first = next(steps)
        if config.kernels.cuda_graph is True:
            learner.record(first.micro_batches[0][1].to(learner.world.device))
        learner.learn(1, first, lambda *_: None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            learned = learner.learn(2, next(steps), lambda *_: None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert learned.updated
