import math

import numpy as np
import torch

from dtrain.batch import Layout
from dtrain.model.positional_encoding import PositionalEncoding, sinusoids


def test_the_papers_formula():
    table = sinusoids(40, 8)
    for position in (0, 1, 39):
        for i in range(4):
            angle = position / 10000 ** (2 * i / 8)
            assert table[position, 2 * i].item() == math.sin(angle)
            assert table[position, 2 * i + 1].item() == math.cos(angle)


def test_padded_in_padded_out():
    layout = Layout.padded(torch.tensor([5, 3]))
    x = torch.randn(2, 5, 8)
    y = PositionalEncoding(8)(x, layout)
    torch.testing.assert_close(y, x + sinusoids(5, 8).float())


def test_packed_positions_restart_at_each_sentence():
    layout = Layout.packed(np.array([5, 3]), 10)
    y = PositionalEncoding(8)(torch.zeros(10, 8), layout)
    table = sinusoids(5, 8).float()
    torch.testing.assert_close(y[:5], table)
    torch.testing.assert_close(y[5:8], table[:3])


def test_no_sentence_is_too_long():
    encoding = PositionalEncoding(8, length=4)
    with torch.inference_mode():
        encoding(torch.zeros(1, 9, 8), Layout.padded(torch.tensor([9])))
    assert not encoding.table.is_inference()
    x = torch.zeros(1, 33, 8, requires_grad=True)
    y = encoding(x, Layout.padded(torch.tensor([33])))
    torch.testing.assert_close(y[0], sinusoids(33, 8).float())


def test_a_longer_sentence_that_is_only_read_leaves_the_table_in_its_place():
    """Compiled steps would be compiled anew, and recorded ones would read freed memory."""
    encoding = PositionalEncoding(8, length=4)
    table = encoding.table
    for length in (9, 7, 33):
        y = encoding.eval()(torch.zeros(1, length, 8), Layout.padded(torch.tensor([length])))
        torch.testing.assert_close(y[0], sinusoids(length, 8).float())
        encoding.train()(torch.zeros(1, 4, 8), Layout.padded(torch.tensor([4])))
        assert encoding.table is table
    assert encoding.eval().up_to(34) is encoding.up_to(35)  # a token more costs no new table


def test_the_table_is_not_saved():
    assert PositionalEncoding(8).state_dict() == {}
