"""One step of a model, against torch's own pieces put together by hand."""

import torch
from torch.nn import functional as F
from worlds import run_world

from dtrain.config import Config
from dtrain.data.loader import Loader
from dtrain.data.plan import Cursor, DistributedTokenSampler
from dtrain.data.preparation import prepared_directory
from dtrain.data.store import PreparedData
from dtrain.distributed import alone
from dtrain.learner import Learner
from dtrain.parts import build_plan


def opened(config: Config) -> PreparedData:
    return PreparedData.open(prepared_directory(config.data, config.vocabulary))


def test_three_steps_are_those_of_torchs_adam(toy):
    """Cross-entropy with smoothing, clipping and Adam are torch's; the rate is the paper's."""
    # An epsilon that hides rounding in gradients that are zero, which Adam would blow up.
    settings = {"optimizer__max_grad_norm": 0.5, "optimizer__epsilon": 1e-3, "precision": "fp32"}
    config = toy(model__dropout=0.0, **settings)
    data = opened(config)
    learner, reference = (Learner(config, data.vocabulary, alone("cpu")) for _ in range(2))
    model = reference.model
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-3)
    plan = build_plan(config, data)
    with Loader(DistributedTokenSampler(plan, 1, 0), data.train, Cursor(), False) as loader:
        for number, step in zip((1, 2, 3), loader, strict=False):
            learned = learner.learn(number, step, lambda *_: None)
            adam.zero_grad()
            losses = []
            for _, batch in step.micro_batches:
                logits = model.hidden(batch) @ model.decoder.output_weight.T
                loss = F.cross_entropy(
                    logits, batch.target_out, ignore_index=0, label_smoothing=0.1, reduction="sum"
                )
                losses.append(loss.item())
                (loss / step.plan.num_target_tokens).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            adam.param_groups[0]["lr"] = 32**-0.5 * min(number**-0.5, number * 20**-1.5)
            adam.step()
            torch.testing.assert_close(learned.sums[:, 0].tolist(), losses, rtol=1e-5, atol=0)
            torch.testing.assert_close(learned.norm, norm.item(), rtol=1e-5, atol=0)
            assert learned.updated
    for ours, theirs in zip(learner.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_rehearsal_leaves_nothing_behind(toy):
    config = toy(precision="fp32")
    data = opened(config)
    plan = build_plan(config, data)
    learner = Learner(config, data.vocabulary, alone("cpu"))
    before = [p.clone() for p in learner.model.parameters()]
    with Loader(DistributedTokenSampler(plan, 1, 0), data.train, Cursor(), False) as loader:
        learner.try_out(next(iter(loader)).micro_batches[0][1])
    assert all(map(torch.equal, learner.model.parameters(), before))
    assert all(p.grad is None for p in learner.model.parameters())
    assert not learner.optimizer.state


def test_the_fingerprint_is_that_of_every_bit(toy):
    """A rank that differs in one bit of one weight or moment is found; see also test_train.py."""

    def differ(config: Config) -> list[str]:
        from dtrain.distributed import connect

        messages = []
        with connect("cpu", 60) as world:
            data = opened(config)
            learner = Learner(config, data.vocabulary, world)
            parameter = next(learner.model.parameters())
            learner.optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            for tensor in (parameter.data, learner.optimizer.state[parameter]["exp_avg"]):
                learner.check_same_everywhere(1)
                if world.rank == 1:
                    tensor.view(torch.int32)[3, 2] ^= 1
                try:
                    learner.check_same_everywhere(2)
                except RuntimeError as error:
                    messages.append(str(error))
                if world.rank == 1:
                    tensor.view(torch.int32)[3, 2] ^= 1
        return messages

    for messages in run_world(3, differ, toy(precision="fp32")):
        assert ["after step 2 of rank 1 differ" in message for message in messages] == [True, True]
