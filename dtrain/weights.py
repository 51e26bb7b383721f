"""Weights and moments in safetensors files, by name: of a model, a part of one, an optimizer."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dtrain.errors import UserError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the types that a model may have."""


class WeightsError(UserError):
    """A file of tensors is damaged or does not fit; the message names it."""


def file_content(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Give the content of a safetensors file piece by piece, without a copy of the tensors.

    The same bytes as the package's `save`, whose `save_file` hides the number of an OSError: a full
    disk could not be told from a bug. On the CPU the pieces are the tensors' own memory.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        kind = DTYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield memory(tensor.cpu())


def memory(tensor: Tensor) -> memoryview:
    """Give the bytes of a CPU's tensor, in order; its own memory if that is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_file(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, onto the CPU.

    Raises:
        WeightsError: if it is no such file; whatever it is instead is not run.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from None


def moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Name an optimizer's moments after the parameters that they belong to: `WEIGHT.exp_avg`.

    If they are split over the ranks it is this rank's share.
    """
    state = _own_share(optimizer).state
    return {
        f"{name}.{key}": tensor.detach()
        for name, parameter in model.named_parameters()
        for key, tensor in state.get(parameter, {}).items()
    }


def save_module(module: nn.Module, path: Path) -> None:
    """Write the parameters of a model, or of any part of one, by name."""
    _save(module.state_dict(), path)


def load_module(module: nn.Module, path: Path) -> None:
    """Read back what `save_module` wrote, strictly: every name and shape must fit.

    Raises:
        WeightsError: naming the file and what does not fit.
    """
    tensors = read_file(path)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit the model: {error}") from None


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Write the optimizer's moments under the names of the parameters that they belong to."""
    _save(moments(optimizer, model), path)


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Read back what `save_optimizer` wrote; this rank's share of it, if moments are split.

    Raises:
        WeightsError: if a moment is missing, superfluous or of another shape, whosever it is.
    """
    share = _own_share(optimizer)
    own = {parameter for group in share.param_groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    keys: dict[str, list[str]] = defaultdict(list)
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            for key in names:
                keys[key.rpartition(".")[0]].append(key)
            for name in keys.keys() - parameters.keys():
                raise WeightsError(f"{path} has moments of unknown parameters: {keys[name][:3]}")
            for name, parameter in parameters.items():
                if keys and name not in keys:
                    raise WeightsError(f"{path} has no moments of {name}")
                for key in keys.get(name, ()):
                    shape = file.get_slice(key).get_shape()
                    if shape not in ([], list(parameter.shape)):
                        raise WeightsError(f"{path}: {key} has shape {tuple(shape)}")
                if name in keys and parameter in own:
                    # A copy, as the file may go. The step count too lies where the parameter does,
                    # since the fused update reads it there.
                    share.state[parameter] = {
                        key.rpartition(".")[2]: file.get_tensor(key).to(parameter.device, copy=True)
                        for key in keys[name]
                    }
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from None


def save_part(model: nn.Module, part: str, path: Path) -> None:
    """Write one part of a Transformer: `encoder` (with its embedding), `decoder` or `model`."""
    _save(_part_state(model, part), path)


def load_part(model: nn.Module, part: str, path: Path) -> None:
    """Read back what `save_part` wrote into the same part of another Transformer of that size.

    Raises:
        WeightsError: if names or shapes do not fit.
    """
    tensors, own = read_file(path), _part_state(model, part)
    if tensors.keys() != own.keys():
        odd = sorted(tensors.keys() ^ own.keys())
        raise WeightsError(f"{path} does not hold this model's {part}: {odd[:3]}")
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit the model's {part}: {error}") from None


def _own_share(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Give the optimizer of the parameters that this rank updates: of all, unless it is split."""
    share: torch.optim.Optimizer = getattr(optimizer, "optim", optimizer)
    return share


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        file.writelines(file_content(tensors))


def _part_state(model: nn.Module, part: str) -> dict[str, Tensor]:
    """Choose a part's parameters; the encoder's include an embedding that the decoder owns."""
    state: dict[str, Tensor] = model.state_dict()
    if part == "model":
        return state
    if part not in ("encoder", "decoder"):
        raise ValueError(f"a model has the parts encoder, decoder and model, not {part!r}")
    chosen = {name: t for name, t in state.items() if name.startswith(f"{part}.")}
    if part == "encoder" and not any(name.startswith("encoder.embedding.") for name in chosen):
        chosen |= {n: t for n, t in state.items() if n.startswith("decoder.embedding.")}
    return chosen
