import numpy as np
import pytest
import torch
from torch_twins import DTYPES, TOLERANCE, shaken, tiny_settings, tokens_of, twin_encoder_layer

from dtrain.batch import Layout
from dtrain.model.embedding import TokenEmbedding
from dtrain.model.encoder import EncoderBlock, TransformerEncoder

LAYOUT = Layout.padded(torch.tensor([3, 7, 1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_block_equals_torchs_layer(norm, dtype):
    torch.manual_seed(0)
    ours = shaken(EncoderBlock(tiny_settings(norm=norm)).to(dtype))
    x = torch.randn(3, 7, 16, dtype=dtype)
    torch.testing.assert_close(
        tokens_of(ours(x, LAYOUT), LAYOUT),
        tokens_of(twin_encoder_layer(ours)(x, src_key_padding_mask=~LAYOUT.mask), LAYOUT),
        atol=TOLERANCE[dtype],
        rtol=0,
    )


def test_rectangles_in_rectangles_out_and_packs_likewise():
    encoder = shaken(TransformerEncoder(tiny_settings(), 20))
    ids = torch.randint(4, 20, (3, 7))
    cells = encoder(ids, LAYOUT)
    assert cells.shape == (3, 7, 16)
    slots = encoder(
        torch.cat([ids[LAYOUT.mask], torch.zeros(3, dtype=torch.int64)]),
        Layout.packed(np.array([3, 7, 1]), 14),
    )
    assert slots.shape == (14, 16)
    torch.testing.assert_close(slots[:11], tokens_of(cells, LAYOUT))


def test_borrowed_embeddings_are_used_but_not_registered():
    borrowed = TokenEmbedding(20, 16)
    encoder = TransformerEncoder(tiny_settings(), None).eval()
    assert not any("embedding" in name for name in encoder.state_dict())
    ids = torch.randint(4, 20, (3, 7))
    owner = TransformerEncoder(tiny_settings(), 20).eval()
    owner.load_state_dict({**encoder.state_dict(), "embedding.weight": borrowed.weight})
    assert torch.equal(encoder(ids, LAYOUT, borrowed), owner(ids, LAYOUT))


@pytest.mark.parametrize(("norm", "has_final_norm"), [("post", False), ("pre", True)])
def test_only_pre_norm_ends_with_a_norm(norm, has_final_norm):
    encoder = TransformerEncoder(tiny_settings(norm=norm), 20)
    assert ("norm.weight" in encoder.state_dict()) == has_final_norm
