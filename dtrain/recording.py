"""Recording: a GPU's work, recorded once as a CUDA graph and replayed with new inputs.

A replay asks nothing of Python, so that a step of thousands of small kernels takes no longer than
the kernels do. All shapes and all memory must stay as they were when it was recorded. Torch's
generator is asked anew at each replay: seed it before, and dropout differs as it does without.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dtrain.batch import Batch

_WARM_UPS = 3  # what is made lazily, compiled or tuned is so before the recording


class Recording:
    """Work that allocates what it needs once, and then runs without Python."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        """Run the work a few times, and record it.

        Args:
            work: reads and writes tensors that outlive it, on the current GPU, and never waits for
                the GPU; its result is a tensor.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads pin memory meanwhile, which only a global capture would forbid.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = work()

    def replay(self) -> Tensor:
        """Do the work once more; gives its result, which the next replay overwrites."""
        self._graph.replay()
        return self._result


class RecordedBackward:
    """Forward and backward of micro-batches that are all of one shape."""

    def __init__(self, backward: Callable[[Batch, Tensor], Tensor], example: Batch) -> None:
        """Record it; with a weight of zero, so that it adds nothing to the gradients.

        Args:
            backward: adds up the gradients of (batch, weight), in buffers that stay.
            example: a batch on the GPU, of the shape of all others.
        """
        self._inputs = [tensor.clone() for tensor in example.tensors()]
        self._weight = torch.zeros((), device=self._inputs[0].device)
        inputs = iter(self._inputs)
        batch = example.map(lambda _: next(inputs))
        self._recording = Recording(lambda: backward(batch, self._weight))

    def __call__(self, batch: Batch, weight: float) -> Tensor:
        """Run it with this batch, from pinned memory, and this weight.

        Raises:
            RuntimeError: if the batch has another shape.
        """
        for recorded, given in zip(self._inputs, batch.tensors(), strict=True):
            if recorded.shape != given.shape:
                raise RuntimeError(
                    f"a batch of another shape than was recorded: {list(given.shape)} instead of "
                    f"{list(recorded.shape)}"
                )
            recorded.copy_(given, non_blocking=True)
        self._weight.fill_(weight)
        return self._recording.replay()
