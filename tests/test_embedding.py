import torch
from torch import nn

from dtrain.model.embedding import TokenEmbedding


def test_vectors_are_looked_up_and_scaled_by_the_root_of_the_width():
    ours = TokenEmbedding(11, 16)
    twin = nn.Embedding.from_pretrained(ours.weight.detach())
    ids = torch.tensor([[1, 5, 10], [0, 0, 3]])
    torch.testing.assert_close(ours(ids), twin(ids) * 4)


def test_vectors_start_random_with_length_one():
    torch.manual_seed(0)
    lengths = TokenEmbedding(500, 256).weight.norm(dim=1)
    assert abs(lengths.mean().item() - 1) < 0.01
    assert lengths.std().item() < 0.1


def test_logits_use_the_same_matrix():
    embedding = TokenEmbedding(11, 16)
    hidden = torch.randn(2, 3, 16)
    torch.testing.assert_close(embedding.logits(hidden), hidden @ embedding.weight.T)
    assert list(embedding.state_dict()) == ["weight"]
