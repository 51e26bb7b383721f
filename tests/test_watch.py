import math

import pytest
import torch

from dtrain.batch import Batch
from dtrain.loss import Objective
from dtrain.model.settings import ModelSettings
from dtrain.model.transformer import Transformer
from dtrain.watch import Tally, Watch, layers_of

NAN, INF = float("nan"), float("inf")
SOURCES, TARGETS = [[9, 8, 7, 3], [6, 3]], [[5, 6, 3], [8, 9, 10, 11, 3]]


def make_model(vocabularies=(20, None), **changes) -> Transformer:
    torch.manual_seed(1)
    sizes = {"hidden_dim": 8, "num_heads": 2, "feed_forward_dim": 16, "dropout": 0.0}
    layers = {"num_encoder_layers": 2, "num_decoder_layers": 3}
    return Transformer(ModelSettings(**(sizes | layers | changes)), *vocabularies)


def run(model: Transformer) -> Watch:
    watch = Watch(model)
    watch.begin(5)
    loss, _ = Objective(model, 0.1)(Batch.padded(SOURCES, TARGETS))
    watch.note("the loss", loss)
    loss.backward()
    watch.note_gradients()
    return watch


def test_a_tally_counts_finite_values_and_the_others():
    tally = Tally.of([torch.tensor([3.0, NAN, -4.0]), torch.tensor([[INF], [-INF], [0.0]])])
    assert (tally.norm, tally.largest, tally.not_finite, tally.count) == (5.0, 4.0, 3, 6)
    assert tally.rms == pytest.approx(5 / math.sqrt(6))
    assert (Tally().norm, Tally().rms) == (0.0, 0.0)


def test_a_tally_does_not_overflow():
    assert Tally.of([torch.full((4,), 1e30)]).norm == pytest.approx(2e30)
    assert Tally.of([torch.full((4,), 6e4, dtype=torch.float16)]).norm == pytest.approx(
        1.2e5, rel=1e-3
    )


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabularies", [(20, None), (20, 30)])
def test_each_parameter_is_in_one_layer(norm, tied, vocabularies):
    model = make_model(vocabularies, norm=norm, tie_embeddings=tied)
    layers = layers_of(model)
    listed = [id(p) for layer in layers for p in layer.parameters]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    norms = ("encoder.norm", "decoder.norm") if norm == "pre" else ()
    names = [layer.name for layer in layers]
    assert [name for name in names if name.endswith(".norm")] == list(norms)
    assert ("decoder.output" in names) is not tied
    names_of = {id(p): name for name, p in model.named_parameters()}
    for layer in layers:
        assert all(names_of[id(p)].startswith(layer.name) for p in layer.parameters)


def test_layers_come_in_forward_order_with_what_went_through_them():
    model = make_model()
    seen = {}
    for i, block in enumerate(model.decoder.blocks):
        block.register_forward_hook(
            lambda _m, _x, y, i=i: seen.update({f"decoder.blocks.{i}": y.detach()})
        )
    watch = run(model)
    assert [layer.name for layer in watch.layers] == [
        "encoder.embedding",
        "encoder.blocks.0",
        "encoder.blocks.1",
        "decoder.embedding",
        "decoder.blocks.0",
        "decoder.blocks.1",
        "decoder.blocks.2",
    ]
    assert watch.first_not_finite == ""
    layers = {layer.name: layer for layer in watch.layers}
    for name, output in seen.items():
        assert layers[name].output.norm == pytest.approx(output.norm().item(), rel=1e-6)
        assert layers[name].output.largest == output.abs().max().item()
    assert layers["encoder.embedding"].output.count == 2 * 4 * 8
    assert layers["decoder.embedding"].output.count == 2 * 5 * 8
    assert layers["decoder.embedding"].weights.norm == pytest.approx(
        model.decoder.embedding.weight.norm().item(), rel=1e-6
    )
    assert torch.equal(watch.states, seen["decoder.blocks.2"])


@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("encoder.blocks.1.feed_forward.outer.weight", "encoder.blocks.1"),
        ("decoder.blocks.0.feed_forward.inner.bias", "decoder.blocks.0"),
        (
            "decoder.blocks.2.feed_forward_residual.norm.weight",
            "decoder.blocks.2",
        ),
        (
            "decoder.blocks.1.memory_attention.o_proj.bias",
            "decoder.blocks.1",
        ),
    ],
)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_planted_value_is_found_in_its_layer(weight, layer, value):
    model = make_model()
    with torch.no_grad():
        model.get_parameter(weight).view(-1)[0] = value
    watch = run(model)
    assert watch.first_not_finite == f"the output of {weight.rpartition('.')[0]}, micro-batch 5"
    assert {one.name: one.weights.not_finite for one in watch.layers if one.weights.not_finite} == {
        layer: 1
    }
    broken = [one.name for one in watch.layers if one.output.not_finite]
    assert broken[0] == layer


def test_a_planted_value_is_found_even_if_attention_hides_it():
    """The CPU's fused attention gives zeros where all scores are NaN."""
    model = make_model()
    with torch.no_grad():
        model.get_parameter("decoder.blocks.0.attention.qkv_proj.bias")[0] = NAN
    culprit = "the output of decoder.blocks.0.attention.qkv_proj, micro-batch 5"
    assert run(model).first_not_finite == culprit


def test_a_loss_that_overflows_is_found():
    model = make_model(tie_embeddings=False)
    with torch.no_grad():
        model.decoder.output.weight.fill_(3e38)
    assert run(model).first_not_finite == "the loss, micro-batch 5"


def test_a_gradient_that_overflows_is_found_where_it_came_up():
    model = make_model()
    explode = lambda gradient: gradient * INF  # noqa: E731
    model.decoder.blocks[1].feed_forward.inner.weight.register_hook(explode)
    model.encoder.blocks[0].feed_forward.inner.weight.register_hook(explode)
    watch = run(model)
    assert watch.first_not_finite == "the gradient of decoder.blocks.1, micro-batch 5"


def test_only_the_first_is_kept():
    watch = Watch(make_model())
    watch.begin(1)
    watch.note("something fine", torch.ones(3))
    watch.note("one", torch.tensor([1.0, NAN]))
    watch.begin(2)
    watch.note("two", torch.tensor([INF]))
    assert watch.first_not_finite == "one, micro-batch 1"


def test_watching_changes_nothing():
    plain, watched = make_model(), make_model()
    Objective(plain, 0.1)(Batch.padded(SOURCES, TARGETS))[0].backward()
    run(watched)
    gradients = [[p.grad for p in model.parameters()] for model in (plain, watched)]
    assert all(map(torch.equal, *gradients))
