import pytest
import torch
from torch_twins import DTYPES, TOLERANCE, shaken, tiny_settings, tokens_of, twin_decoder_layer

from dtrain.batch import Layout
from dtrain.model.decoder import DecoderBlock, TransformerDecoder

LAYOUT = Layout.padded(torch.tensor([3, 7, 1]))
MEMORY_LAYOUT = Layout.padded(torch.tensor([2, 4, 5]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_block_equals_torchs_layer(norm, dtype):
    torch.manual_seed(0)
    ours = shaken(DecoderBlock(tiny_settings(norm=norm)).to(dtype))
    x, memory = torch.randn(3, 7, 16, dtype=dtype), torch.randn(3, 5, 16, dtype=dtype)
    memory_kv = ours.memory_attention.project_memory(memory)
    twin = twin_decoder_layer(ours)(
        x,
        memory,
        tgt_mask=torch.ones(7, 7, dtype=torch.bool).triu(1),
        memory_key_padding_mask=~MEMORY_LAYOUT.mask,
    )
    torch.testing.assert_close(
        tokens_of(ours(x, LAYOUT, memory_kv, MEMORY_LAYOUT), LAYOUT),
        tokens_of(twin, LAYOUT),
        atol=TOLERANCE[dtype],
        rtol=0,
    )


def test_one_product_for_the_memory_of_all_layers_changes_no_result():
    """Against one product a layer, and one sentence after the other, in float64."""
    torch.manual_seed(0)
    decoder = shaken(TransformerDecoder(tiny_settings(num_decoder_layers=3), 20).double())
    ids, memory = torch.randint(4, 20, (3, 7)), torch.randn(3, 5, 16, dtype=torch.float64)
    inputs = [memory.requires_grad_(), *decoder.parameters()]
    results = []
    for decoder.joins_memory in (False, True):
        out = tokens_of(decoder(ids, LAYOUT, memory, MEMORY_LAYOUT), LAYOUT)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append(
            [out, *torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)]
        )
    assert results[0][1].abs().max() > 0
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("length", [7, 40])
def test_the_cache_equals_recomputation(norm, length):
    torch.manual_seed(0)
    decoder = shaken(TransformerDecoder(tiny_settings(norm=norm), 20).double())
    decoder.positions.table = decoder.positions.table[:4]
    ids, memory = torch.randint(4, 20, (3, length)), torch.randn(3, 5, 16, dtype=torch.float64)
    layout = Layout.padded(torch.full((3,), length))
    whole = decoder(ids, layout, memory, MEMORY_LAYOUT)
    state = decoder.start(memory, MEMORY_LAYOUT)
    steps = [decoder.step(ids[:, t, None], state) for t in range(length)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_the_cache_follows_the_rivals():
    """Rivals multiply, change places and drop out; a sentence leaves."""
    torch.manual_seed(0)
    decoder = shaken(TransformerDecoder(tiny_settings(), 20).double())
    memory = torch.randn(3, 5, 16, dtype=torch.float64)
    state = decoder.start(memory, MEMORY_LAYOUT)
    decoder.step(torch.tensor([[4], [5], [6]]), state)
    state.select(None, torch.zeros(3, 2, dtype=torch.int64))
    decoder.step(torch.tensor([[7, 8], [9, 10], [11, 12]]), state)
    state.select(torch.tensor([0, 2]), torch.tensor([[1, 1], [0, 1]]))
    hidden = decoder.step(torch.tensor([[13, 14], [15, 16]]), state)
    ids = torch.tensor([[4, 8, 13], [4, 8, 14], [6, 11, 15], [6, 12, 16]])
    sentence = torch.tensor([0, 0, 2, 2])
    whole = decoder(
        ids,
        Layout.padded(torch.full((4,), 3)),
        memory[sentence],
        Layout.padded(MEMORY_LAYOUT.lengths[sentence]),
    )
    torch.testing.assert_close(hidden.flatten(0, 1), whole[:, -1])


def test_the_output_layer_is_the_embedding_or_its_own():
    tied = TransformerDecoder(tiny_settings(), 20)
    untied = TransformerDecoder(tiny_settings(tie_embeddings=False), 20)
    hidden = torch.randn(2, 16)
    assert tied.output_weight is tied.embedding.weight
    assert "output.weight" not in tied.state_dict()
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.embedding.weight.T)
    torch.testing.assert_close(untied.logits(hidden), hidden @ untied.output.weight.T)
    assert untied.output_weight is untied.output.weight
    assert not torch.equal(untied.output.weight, untied.embedding.weight)
