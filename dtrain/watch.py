"""Watch: what goes on inside a model while it runs, layer by layer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dtrain.model.transformer import Transformer


@dataclass
class Tally:
    """How large values are: sizes of the finite ones, and how many there are of the others."""

    count: int = 0
    squares: float = 0.0
    largest: float = 0.0
    not_finite: int = 0

    def add(self, values: Tensor) -> None:
        """Count a tensor of any shape in."""
        values = values.detach()
        finite = values.isfinite()
        self.not_finite += values.numel() - int(finite.sum())
        values = values.where(finite, 0).double()
        self.count += values.numel()
        self.squares += values.square().sum().item()
        self.largest = max(self.largest, values.abs().max().item())

    @property
    def norm(self) -> float:
        """Euclidean length of all finite values together."""
        return math.sqrt(self.squares)

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return math.sqrt(self.squares / max(1, self.count))

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "Tally":
        """Count some tensors."""
        tally = cls()
        for tensor in tensors:
            tally.add(tensor)
        return tally


@dataclass
class Layer:
    """A layer, over all micro-batches that were run.

    Attributes:
        name: as its parameters are called.
        module: whose output is looked at.
        parameters: its own; none if it borrows them.
        weights: how large they are.
        gradient: of the loss for them.
        output: of its forward, in every slot.
    """

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]
    weights: Tally = field(default_factory=Tally)
    gradient: Tally = field(default_factory=Tally)
    output: Tally = field(default_factory=Tally)


def layers_of(model: Transformer) -> list[Layer]:
    """Cut a model into layers, in forward order; each parameter is in exactly one of them."""
    layers = []
    for side, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        embedding = [] if part.embedding is None else list(part.embedding.parameters())
        # Positions give out embeddings and positions together; a lent embedding has two callers.
        layers.append(Layer(f"{side}.embedding", part.positions, embedding))
        for i, block in enumerate(part.blocks):
            layers.append(Layer(f"{side}.blocks.{i}", block, list(block.parameters())))
        if list(part.norm.parameters()):
            layers.append(Layer(f"{side}.norm", part.norm, list(part.norm.parameters())))
    if model.decoder.output is not None:
        output = model.decoder.output
        layers.append(Layer("decoder.output", output, list(output.parameters())))
    return layers


class Watch:
    """Looks at what every module of a model gives out, for as long as the model is used.

    Attributes:
        layers: what was seen of each.
        states: the decoder's, of the last batch: [slots, hidden].
        first_not_finite: where the first value that is not finite came up; empty if none did.
    """

    def __init__(self, model: Transformer) -> None:
        self.layers = layers_of(model)
        self.states = torch.empty(0)
        self.first_not_finite = ""
        self._index = 0
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: self._check(name, output)
            )
        for layer in self.layers:
            layer.weights = Tally.of(layer.parameters)
            layer.module.register_forward_hook(
                lambda _module, _inputs, output, tally=layer.output: tally.add(output)
            )
        model.decoder.register_forward_hook(self._keep_states)

    def begin(self, index: int) -> None:
        """Say which micro-batch comes."""
        self._index = index

    def note(self, what: str, values: Tensor) -> None:
        """Remember where the first value that is not finite came up."""
        if not self.first_not_finite and not values.detach().isfinite().all():
            self.first_not_finite = f"{what}, micro-batch {self._index}"

    def note_gradients(self) -> None:
        """Look through the gradients of a micro-batch from the loss back."""
        for layer in reversed(self.layers):
            for parameter in layer.parameters:
                assert parameter.grad is not None
                self.note(f"the gradient of {layer.name}", parameter.grad)

    def _check(self, name: str, output: Tensor) -> None:
        self.note(f"the output of {name}", output)

    def _keep_states(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.states = output.detach()
