import os
import re
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from dtrain import parts
from dtrain.batch import NUM_RECTANGLES
from dtrain.data.preparation import prepare, prepared_directory
from dtrain.data.store import PreparedData
from dtrain.data.vocabulary import Vocabulary
from dtrain.errors import UserError
from dtrain.parts import (
    build_model,
    build_plan,
    choose_precision,
    configure_torch,
    memory_gib,
    seed_position,
    trained_model,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def vocabulary(trained) -> Vocabulary:
    return Vocabulary.load(trained.run_dir)


def same(left, right) -> bool:
    left, right = left.state_dict(), right.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left | right)


def test_the_seed_decides_the_initial_weights(toy, vocabulary):
    torch.manual_seed(99)
    first = build_model(toy(), vocabulary)
    torch.manual_seed(100)
    assert same(first, build_model(toy(), vocabulary))
    assert not same(first, build_model(toy(run__seed=2), vocabulary))


def test_languages_with_a_vocabulary_each_have_an_embedding_each(toy, vocabulary):
    proto = vocabulary.target.serialized_model_proto()
    separate = Vocabulary(vocabulary.source, SentencePieceProcessor(model_proto=proto))
    assert not separate.shared
    num_shared, num_separate = (
        sum(p.numel() for p in build_model(toy(), v).parameters()) for v in (vocabulary, separate)
    )
    assert num_separate - num_shared == vocabulary.source_size * 32


def test_a_trained_model_has_the_weights_of_its_checkpoint(trained):
    model, config, vocabulary, path = trained_model(trained.run_dir, "40")
    assert path == trained.run_dir / "checkpoints" / "step-0000000040"
    assert config.run.name == "trained"
    assert vocabulary.target_size == config.vocabulary.size
    assert not model.training
    saved = load_file(path / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert not same(model, trained_model(trained.run_dir, "last")[0])


def test_a_run_or_checkpoint_that_is_not_there_is_a_mistake(trained, tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        trained_model(tmp_path, "best")
    with pytest.raises(UserError, match="there is no checkpoint '41'"):
        trained_model(trained.run_dir, "41")


def test_the_plan_visits_each_corpus_as_often_as_its_weight_says(toy, toy_text, tmp_path):
    pair = "{{source: {0}/{1}.en, target: {0}/{1}.de, weight: {2}}}"
    corpora = [pair.format(toy_text, *corpus) for corpus in (("validation", 3), ("test", 1))]
    config = toy(data__train=f"[{', '.join(corpora)}]", data__dir=tmp_path / "tokens")
    data = prepared(config)
    plan = build_plan(config, data)
    visits = [0] * len(data.train)
    for index in range(plan.num_windows):
        for ids in plan.window(0, index):
            for i in ids.tolist():
                visits[i] += 1
    assert visits == [3] * 12 + [1] * 12


def prepared(config) -> PreparedData:
    directory = prepared_directory(config.data, config.vocabulary)
    prepare(config.data, config.vocabulary, directory, lambda _: None)
    return PreparedData.open(directory)


def test_slots_are_the_micro_batchs_and_the_sources_share_of_it(toy):
    config = toy()
    data = prepared(config)
    plan = build_plan(config, data)
    assert plan.target_slots == 128
    everything = torch.arange(len(data.train)).numpy()
    ratio = (
        data.train.source_lengths(everything).sum() / data.train.target_lengths(everything).sum()
    )
    assert 128 * ratio <= plan.source_slots < 128 * ratio + 8
    assert plan.seed == config.run.seed
    assert (plan.kernel, plan.max_length) == ("padded", config.data.max_length)
    assert build_plan(toy(kernels__attention="packed"), data).kernel == "packed"
    assert plan.num_rectangles == NUM_RECTANGLES
    assert build_plan(toy(kernels__compile=True), data).num_rectangles == 1


def test_randomness_depends_on_seed_step_and_index_alone():
    def drawn(*place: int) -> list[float]:
        seed_position(*place)
        return torch.rand(4).tolist()

    places = [(1, 2, 3), (1, 3, 2), (2, 2, 3), (1, 2, 4), (0, 0, 0)]
    first = [drawn(*place) for place in places]
    assert [drawn(*place) for place in reversed(places)] == first[::-1]
    assert len({tuple(numbers) for numbers in first}) == len(places)


@pytest.mark.parametrize(
    ("device", "native_bf16", "expected"),
    [(CPU, True, "fp32"), (CUDA, True, "bf16"), (CUDA, False, "fp16")],
)
def test_precision_is_the_best_that_the_device_has(monkeypatch, device, native_bf16, expected):
    # With emulation every GPU "supports" bf16, at a crawl.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: native_bf16 or emulated)
    assert choose_precision(device) == expected


def test_threads_are_set_as_the_run_wants_them(toy):
    try:
        configure_torch(toy(run__threads=3), CPU)
        assert torch.get_num_threads() == 3
        configure_torch(toy(run__threads="auto"), CPU)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_cublas_is_told_to_be_deterministic_before_anything_can_ask_it(monkeypatch):
    """Kernels are tried on a GPU before torch is configured, and torch looks only once."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    runpy.run_path(parts.__file__)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    runpy.run_path(parts.__file__)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_determinism_is_switched_on_for_gpus_only(toy, monkeypatch):
    switched = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", switched.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    configure_torch(toy(), CPU)
    configure_torch(toy(run__deterministic="false"), CUDA)
    assert switched == []
    configure_torch(toy(), CUDA)
    assert switched == [True]


def test_memory_is_what_the_kernel_counted():
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    most = int(re.search(r"VmHWM:\s+(\d+) kB", text)[1])
    assert memory_gib(CPU) == pytest.approx(most / 2**20, rel=0.05)
