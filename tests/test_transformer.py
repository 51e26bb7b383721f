import pytest
import torch
from torch_twins import (
    DTYPES,
    TOLERANCE,
    packed,
    random_ids,
    shaken,
    tiny_settings,
    tokens_of,
    twin_transformer,
    unpacked,
)

from dtrain.batch import EOS_ID, Batch
from dtrain.model.positional_encoding import sinusoids
from dtrain.model.transformer import Transformer

V = 20
SOURCES, TARGETS = random_ids([5, 2, 7, 4], V), random_ids([3, 6, 1, 5], V, seed=1)


def tiny_model(dtype=torch.float32, **changes) -> Transformer:
    torch.manual_seed(0)
    return shaken(Transformer(tiny_settings(**changes), V).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_logits_equal_torchs_transformer(norm, dtype):
    ours = tiny_model(dtype, norm=norm)
    for part in (ours.encoder, ours.decoder):
        part.positions.table = sinusoids(16, 16).to(dtype)
    batch = Batch.padded(SOURCES, TARGETS)
    matrix, table = ours.decoder.embedding.weight, sinusoids(16, 16).to(dtype)
    hidden = twin_transformer(ours)(
        matrix[batch.source] * 4 + table[:7],
        matrix[batch.target_in] * 4 + table[:6],
        tgt_mask=torch.ones(6, 6, dtype=torch.bool).triu(1),
        src_key_padding_mask=~batch.source_layout.mask,
        memory_key_padding_mask=~batch.source_layout.mask,
    )
    torch.testing.assert_close(
        tokens_of(ours(batch), batch.target_layout),
        tokens_of(hidden @ matrix.T, batch.target_layout),
        atol=TOLERANCE[dtype],
        rtol=0,
    )


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_packed_equals_padded_gradients_too(norm):
    model = tiny_model(torch.float64, norm=norm)
    rectangle, pack = Batch.padded(SOURCES, TARGETS), packed(SOURCES, TARGETS, 24, 16)
    padded_logits = tokens_of(model(rectangle), rectangle.target_layout)
    packed_logits = unpacked(model(pack), pack.target_layout)
    torch.testing.assert_close(packed_logits, padded_logits, atol=1e-10, rtol=0)
    weights = torch.randn_like(packed_logits)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad((packed_logits * weights).sum(), parameters),
        torch.autograd.grad((padded_logits * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("make", [Batch.padded, lambda s, t: packed(s, t, 24, 20)])
def test_a_future_token_changes_no_earlier_logit(make):
    model = tiny_model()
    changed = [list(target) for target in TARGETS]
    changed[1][3] = 4 + (changed[1][3] + 1) % (V - 4)  # target_in has it at position 4
    batches = [make(SOURCES, targets) for targets in (TARGETS, changed)]
    rows = tokens_of if batches[0].target_in.dim() == 2 else unpacked
    before, after = (rows(model(batch), batch.target_layout) for batch in batches)
    place = len(TARGETS[0]) + 4
    assert torch.equal(before[:place], after[:place])
    assert not torch.allclose(before[place], after[place])


def test_padding_changes_nothing():
    model = tiny_model()
    alone, company = (
        model(Batch.padded(SOURCES[:n], TARGETS[:n]))[0, : len(TARGETS[0])] for n in (1, 4)
    )
    torch.testing.assert_close(alone, company)


def test_neighbours_in_a_pack_change_nothing():
    model = tiny_model()
    others = random_ids([5, 2, 7, 4], V, seed=2), random_ids([3, 6, 1, 5], V, seed=3)
    first, second = (
        model(packed(s[:2] + SOURCES[2:3] + s[3:], t[:2] + TARGETS[2:3] + t[3:], 24, 16))
        for s, t in (others, (SOURCES, TARGETS))
    )
    place = slice(3 + 6, 3 + 6 + 1)
    torch.testing.assert_close(first[place], second[place])
    assert not torch.allclose(first[0], second[0])


def test_slack_ids_change_nothing():
    model = tiny_model(torch.float64)
    batch = packed(SOURCES, TARGETS, 24, 20)

    def gradients():
        logits = unpacked(model(batch), batch.target_layout)
        return torch.autograd.grad(logits.square().sum(), list(model.parameters()))

    before = gradients()
    batch.source[18:], batch.target_in[15:] = 9, 11
    for a, b in zip(before, gradients(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_gradients_agree_with_finite_differences(norm):
    settings = tiny_settings(
        norm=norm, hidden_dim=4, feed_forward_dim=6, num_encoder_layers=1, num_decoder_layers=1
    )
    torch.manual_seed(0)
    model = shaken(Transformer(settings, 7).double())
    batch = packed(random_ids([3, 2], 7), random_ids([2, 3], 7), 6, 6)
    names, values = zip(*model.named_parameters(), strict=True)

    def logits(*parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, named, (batch,))[:5]

    assert torch.autograd.gradcheck(logits, values, fast_mode=True)


def test_dropout_acts_in_training_only():
    model, batch = tiny_model(dropout=0.3), Batch.padded(SOURCES, TARGETS)
    assert torch.equal(model(batch), model(batch))
    model.train()
    assert not torch.allclose(model(batch), model(batch))
    torch.manual_seed(1)
    first = model(batch)
    torch.manual_seed(1)
    assert torch.equal(model(batch), first)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_each_matrix_is_registered_once_where_it_belongs(shared, tied):
    model = Transformer(tiny_settings(tie_embeddings=tied), V, None if shared else V + 1)
    expected = {"decoder.embedding.weight"}
    expected |= set() if tied else {"decoder.output.weight"}
    expected |= set() if shared and tied else {"encoder.embedding.weight"}
    matrices = {
        name for name in model.state_dict() if "embedding" in name or name.endswith("output.weight")
    }
    assert matrices == expected
    assert set(model.state_dict()) == set(dict(model.named_parameters()))
    target_size = V if shared else V + 1
    assert model(Batch.padded(SOURCES, TARGETS)).shape == (4, 6, target_size)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_empty_batch_touches_every_parameter(norm, tied):
    model = tiny_model(norm=norm, tie_embeddings=tied).train()
    model(Batch.empty(8, 8)).sum().mul(0).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name


def test_names_in_the_state_dict():
    names = set(tiny_model().state_dict())
    for name in (
        "decoder.embedding.weight",
        "encoder.blocks.0.attention.qkv_proj.weight",
        "encoder.blocks.1.feed_forward.outer.bias",
        "decoder.blocks.0.memory_attention.o_proj.weight",
        "decoder.blocks.1.feed_forward_residual.norm.weight",
    ):
        assert name in names


@torch.no_grad()
def test_generate_takes_the_likeliest_token_each_time():
    model = tiny_model(max_decode_length=9)
    batch = Batch.padded(SOURCES, TARGETS)
    translations = model.generate(batch.source, batch.source_layout)
    for source, translation in zip(SOURCES, translations, strict=True):
        assert len(translation) <= 9
        logits = model(Batch.padded([source], [[*translation, EOS_ID]]))[0]
        logits[:, [0, 2]] = -torch.inf
        likeliest = logits.argmax(-1).tolist()
        assert likeliest[: len(translation)] == translation
        assert likeliest[-1] == EOS_ID or len(translation) == 9


def test_a_translation_has_at_most_fifty_tokens_more_than_its_source():
    batch = Batch.padded(SOURCES, TARGETS)
    assert tiny_model().decode_limits(batch.source_layout).tolist() == [55, 52, 57, 54]
    assert tiny_model(max_decode_length=53).decode_limits(batch.source_layout).max() == 53
