import pytest
import safetensors.torch
import torch
from tiny_model import TINY, same, trained

from dtrain import weights
from dtrain.batch import Batch
from dtrain.model.transformer import Transformer
from dtrain.weights import WeightsError


def test_files_are_as_safetensors_would_write_them():
    tensors = {
        "b.step": torch.tensor(3.0),
        "a": torch.arange(6.0).reshape(2, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.float16),
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0),
        "count": torch.tensor([7]),
        "mask": torch.tensor([True, False, True]),
        "größe": torch.ones(1, dtype=torch.float64),
    }
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    content = b"".join(weights.file_content(tensors))
    assert same(safetensors.torch.load(content), whole)
    alike = {name: t for name, t in whole.items() if t.dtype is torch.float32}
    assert b"".join(weights.file_content(alike)) == safetensors.torch.save(alike)


def test_a_model_is_written_as_safetensors_would(tmp_path):
    model, optimizer = trained()
    weights.save_module(model, tmp_path / "model.safetensors")
    weights.save_optimizer(optimizer, model, tmp_path / "optimizer.safetensors")
    for name, tensors in (
        ("model", dict(model.state_dict())),
        ("optimizer", weights.moments(optimizer, model)),
    ):
        written = (tmp_path / f"{name}.safetensors").read_bytes()
        assert written == safetensors.torch.save(tensors)


def test_moments_that_do_not_fit_are_refused(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "optimizer.safetensors"
    whole = weights.moments(optimizer, model)
    name = next(name for name, p in model.named_parameters() if p.dim() == 2)
    for change, complaint in (
        ({f"{name}x.exp_avg": torch.zeros(1)}, "moments of unknown parameters"),
        ({f"{name}.exp_avg": torch.zeros(1, 1)}, r"exp_avg has shape \(1, 1\)"),
    ):
        safetensors.torch.save_file(whole | change, path)
        with pytest.raises(WeightsError, match=complaint):
            weights.load_optimizer(optimizer, model, path)
    missing = {key: tensor for key, tensor in whole.items() if not key.startswith(f"{name}.")}
    safetensors.torch.save_file(missing, path)
    with pytest.raises(WeightsError, match=f"no moments of {name}"):
        weights.load_optimizer(optimizer, model, path)


def test_an_optimizer_of_some_parameters_takes_no_more_than_their_moments(tmp_path):
    """As each rank has one where moments are split; all of the file is checked all the same."""
    path = tmp_path / "optimizer.safetensors"
    model, optimizer = trained()
    whole = weights.moments(optimizer, model)
    weights.save_optimizer(optimizer, model, path)
    some = torch.optim.Adam(list(model.parameters())[::3])
    weights.load_optimizer(some, model, path)
    names = {
        name for name, p in model.named_parameters() if p in set(some.param_groups[0]["params"])
    }
    expected = {key: t for key, t in whole.items() if key.rpartition(".")[0] in names}
    assert same(weights.moments(some, model), expected)
    assert 0 < len(expected) < len(whole) / 2
    missing = next(name for name, _ in model.named_parameters() if name not in names)
    rest = {key: t for key, t in whole.items() if not key.startswith(f"{missing}.")}
    safetensors.torch.save_file(rest, path)
    with pytest.raises(WeightsError, match=f"no moments of {missing}"):
        weights.load_optimizer(some, model, path)


@pytest.mark.parametrize("part", ["encoder", "decoder", "model"])
@pytest.mark.parametrize("target_size", [None, 15])
def test_parts_are_saved_and_loaded_by_themselves(tmp_path, part, target_size):
    (model, _), (other, _) = trained(0, 2, target_size), trained(1, 1, target_size)
    weights.save_part(model, part, tmp_path / "part.safetensors")
    weights.load_part(other, part, tmp_path / "part.safetensors")
    batch = Batch.padded([[5, 6, 3]], [[7, 3]])
    model.eval(), other.eval()
    memory = [m.encode(batch.source, batch.source_layout) for m in (model, other)]
    logits = [
        m.logits(m.decode(batch.target_in, batch.target_layout, memory[0], batch.source_layout))
        for m in (model, other)
    ]
    assert torch.equal(*memory) == (part in ("encoder", "model"))
    assert torch.equal(*logits) == (part in ("decoder", "model"))


def test_a_part_of_another_size_is_refused(tmp_path):
    weights.save_part(trained()[0], "decoder", tmp_path / "part.safetensors")
    larger = Transformer(TINY.model_copy(update={"hidden_dim": 16}), 12)
    with pytest.raises(WeightsError, match=r"part.safetensors does not fit the model's decoder"):
        weights.load_part(larger, "decoder", tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match="does not hold this model's encoder"):
        weights.load_part(trained()[0], "encoder", tmp_path / "part.safetensors")


def test_a_file_that_is_something_else_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (b"", b"not tensors at all", bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"model.safetensors is not a whole safetensors"):
            weights.load_module(trained()[0], path)
