"""The largest micro-batch that fits: found by all ranks together, recorded, and kept."""

import math
import resource
import weakref
from pathlib import Path

import pytest
import torch
from tiny_model import files_of
from worlds import run_world

from dtrain import auto_size, train
from dtrain.auto_size import _Trial, find_size, largest_fitting, linear_need, with_size
from dtrain.checkpoint import steps_saved
from dtrain.data.store import PreparedData
from dtrain.distributed import alone, connect
from dtrain.errors import UserError
from dtrain.learner import Learner
from dtrain.preemption import StopSignal
from dtrain.run_directory import RunDirectory
from dtrain.start import Ready, claimed

pytestmark = pytest.mark.slow  # each starts a training


def claim(config, world=None) -> Ready:
    """Start a training of no steps."""
    with claimed(config, world or alone("cpu"), StopSignal()) as ready:
        RunDirectory(config.run_dir).write_status("preempted", 0, 0, "stopped")
        return ready


@pytest.fixture
def auto(toy):
    """Make a toy config whose size is to be found, else as recorded at a first start."""

    def make(name="run", **changes):
        return toy(name, precision="fp32", batch__tokens_per_micro_batch="auto", **changes)

    return make


def open_data(config) -> PreparedData:
    return PreparedData.open(Path(config.data.dir))


# ------------------------------------------------------------------ who decides


def ask_for_sizes(limits: list[int]) -> tuple[int, list[int]]:
    with connect("cpu", 60) as world:
        asked = list[int]()

        def fits_here(size: int) -> bool:
            asked.append(size)
            return size <= limits[world.rank]

        return largest_fitting([512, 256, 128, 64], fits_here, world), asked


@pytest.mark.parametrize(
    ("limits", "found"), [([600, 130], 128), ([256, 512], 256), ([512, 512], 512), ([63, 512], 0)]
)
def test_the_smallest_device_decides_for_all(limits, found):
    first, second = run_world(2, ask_for_sizes, limits)
    assert first == second
    assert first[0] == found


def test_two_counts_make_a_line():
    asked = list[int]()

    def count(size: int) -> float:
        asked.append(size)
        return 1000 + 3 * size

    need = linear_need(count, [4096, 1024, 300, 128, 100], free=2**20)
    assert asked == [100, 300]
    assert need(4096) == pytest.approx(count(4096))


def test_a_second_count_that_fails_says_nothing_of_the_first_size():
    need = linear_need(lambda size: 1000 if size == 100 else math.inf, [4096, 300, 100], 2**20)
    assert [need(size) for size in (100, 300, 4096)] == [1000, math.inf, math.inf]


def test_what_might_take_too_much_is_not_tried_to_find_out():
    def count(size: int) -> float:
        assert size == 100
        return 1000 + 3 * size

    need = linear_need(count, [4096, 300, 100], free=2000)
    assert need(100) == count(100)
    assert need(4096) > 1000 + 3 * 4096


# ------------------------------------------------------------------ what fits


def test_the_largest_that_feeds_the_ranks_is_taken_and_said(auto):
    ready = claim(auto())
    assert ready.config.batch.target_slots == 512
    assert RunDirectory(ready.config.run_dir).config == ready.config
    assert ready.notices == [
        "batch.tokens_per_micro_batch auto: 512 (the largest divisor of 512 that feeds 1 rank; it "
        "fits in memory)"
    ]


def test_with_little_memory_a_smaller_one_is_taken_and_said(auto, monkeypatch):
    config, world = auto(), alone("cpu")
    trial = _Trial(config, open_data(config), world)
    need = 1.5 * trial.count(128) + trial.other_bytes(128)
    monkeypatch.setattr(auto_size, "free_memory", lambda _: int(1.4 * need))
    size, why = find_size(config, open_data(config), world)
    assert size == 128
    assert why.endswith(
        "128 (the largest divisor of 512 that fits in memory and feeds 1 rank; 256 would be too "
        "large)"
    )


def test_where_nothing_fits_the_start_is_refused(auto, monkeypatch):
    monkeypatch.setattr(auto_size, "free_memory", lambda _: 0)
    config = auto()
    with pytest.raises(UserError, match=r"not even 64 tokens, the smallest divisor of .* 512"):
        claim(config)
    assert not RunDirectory(config.run_dir).config_file.exists()


def test_where_not_even_the_model_fits_the_start_is_refused(auto, monkeypatch):
    def update(*_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Learner, "update", update)
    with pytest.raises(
        UserError, match=r"the model .* does not fit in the memory of cpu; make the"
    ):
        claim(auto())


def find_and_look_for_the_model(config) -> bool:
    """Find a size; says whether the model that it was tried with is still there."""
    models = []

    class Noted(_Trial):
        def judge(self, sizes):
            models.append(weakref.ref(self.learner.model))
            return super().judge(sizes)

    auto_size._Trial = Noted
    with connect("cpu", 60) as world:
        find_size(config, open_data(config), world)
        return models[0]() is not None


def test_nothing_is_left_of_a_trial_on_several_ranks(auto):
    assert run_world(2, find_and_look_for_the_model, auto()) == [False, False]


def test_a_trial_that_fails_does_no_harm(auto):
    config = auto()
    trial = _Trial(config, open_data(config), alone("cpu"))
    assert not trial.fits_beside(2**60, 64)
    assert trial.fits_beside(2**20, 64)
    assert trial.learner.optimizer.state  # moments take their part of the memory


@pytest.mark.parametrize(("reduction", "copies"), [("ddp", 1), ("tree", 6)])
def test_what_a_step_holds_besides_is_counted(auto, reduction, copies):
    """A tree over 8 micro-batches has partial sums of 1, 2 and 4, the newest, and an exchange."""
    config = auto(distributed__reduction=reduction)
    trial = _Trial(config, open_data(config), alone("cpu"))
    weights = sum(4 * p.numel() for p in trial.learner.model.parameters())
    assert trial.other_bytes(64) == (copies + 3) * weights


def find_in_little_room(config, room: int) -> int:
    """Find a size with no more address space than there is now, and `room` bytes; run it."""
    world, data = alone("cpu"), open_data(config)
    _Trial(config, data, world)  # torch's own first memory
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    used = int(pages) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    size, _ = find_size(config, data, world)
    trial = _Trial(config, data, world)
    assert trial.fits_beside(0, size)
    return size


@pytest.mark.slow
def test_a_limit_of_memory_leads_to_what_fits_in_it(auto):
    config = auto(batch__tokens_per_step=2**19)
    (less,) = run_world(1, find_in_little_room, config, 50 * 2**20)
    (more,) = run_world(1, find_in_little_room, config, 200 * 2**20)
    assert 2**9 < less < more < 2**19


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
def test_a_gpu_with_little_memory_gets_a_smaller_one(auto):
    config = auto(batch__tokens_per_step=2**21)
    world, data = alone("cuda"), open_data(config)
    whole, _ = find_size(config, data, world)
    held = torch.empty(int(0.8 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device="cuda")
    part, _ = find_size(config, data, world)
    del held
    assert part < whole


# ------------------------------------------------------------------ recorded and kept


@pytest.mark.slow
def test_it_is_kept_on_other_ranks_and_is_as_good_as_given(auto, toy):
    """One rank would take 512 by itself; a run with 256 from the beginning is the reference."""
    tree = {"distributed__reduction": "tree"}
    found = auto("auto", **tree, run__max_steps=4)
    assert run_world(2, train.run, found) == [0, 0]
    assert RunDirectory(found.run_dir).config.batch.tokens_per_micro_batch == 256
    assert run_world(1, train.run, auto("auto", **tree, run__max_steps=8)) == [0]
    given = toy("given", **tree, batch__tokens_per_micro_batch=256, run__max_steps=8)
    assert run_world(1, train.run, given) == [0]
    last, reference = (
        files_of(steps_saved(config.run_dir / "checkpoints")[0]) for config in (found, given)
    )
    assert last.keys() == reference.keys()
    for name in last.keys() - {"MANIFEST.json", "state.json"}:
        assert last[name] == reference[name]


def test_a_begun_run_keeps_the_size_it_was_given(auto, toy):
    begun = claim(toy())
    again = claim(auto())
    assert again.config == begun.config
    assert again.notices == []


def test_a_kept_size_that_cannot_feed_the_ranks_is_refused(auto):
    config = auto()
    claim(config)
    with pytest.raises(UserError, match="2 ranks cannot share the 1 micro-batches of a step"):
        run_claims(config, 2)


def run_claims(config, size: int) -> None:
    """Claim a run on several ranks; a refusal is raised here."""
    for refusal in run_world(size, claim_or_refuse, config):
        if refusal:
            raise UserError(refusal)


def claim_or_refuse(config) -> str:
    with connect("cpu", 60) as world:
        try:
            claim(config, world)
        except UserError as error:
            return str(error)
    return ""


def test_ranks_that_no_size_can_feed_are_refused(auto):
    config = auto(data__max_length=300)
    with pytest.raises(UserError, match=r"at least 2 equal parts.*tokens_per_step to 600"):
        run_claims(config, 2)


def test_a_size_that_no_longer_divides_the_step_is_found_anew(auto, toy):
    claim(toy(batch__tokens_per_micro_batch=128))
    config = auto(batch__tokens_per_step=192)
    with pytest.raises(UserError, match=r"tokens_per_micro_batch: 128 -> auto"):
        claim(config)
    with claimed(config, alone("cpu"), StopSignal(), ["batch"]) as ready:
        assert ready.config == with_size(ready.config, 192)
        RunDirectory(config.run_dir).write_status("preempted", 0, 0, "stopped")
