import numpy as np
import torch

from dtrain.batch import Layout
from dtrain.kernels.cells import to_cells, to_slots


def test_gradients_of_the_gathers_are_exact():
    layout = Layout.packed(np.array([3, 1, 2]), 8, groups=[np.array([1]), np.array([2, 0])])
    assert layout.rectangles == ((1, 1), (2, 3))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def tokens(rectangles: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([cells.flatten(0, 1) for cells in rectangles])[layout.mask]

    slots, cells = random(8, 2), (random(1, 1, 2), random(2, 3, 2))
    assert torch.autograd.gradcheck(lambda x: tokens(to_cells(x, layout)), slots)
    assert torch.autograd.gradcheck(lambda *x: to_slots(x, layout)[layout.token_mask], cells)
    torch.testing.assert_close(to_slots(to_cells(slots, layout), layout)[:6], slots[:6])
