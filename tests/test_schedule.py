from itertools import pairwise

import pytest
import torch

from dtrain.schedule import ScheduleSettings, learning_rate


@pytest.mark.parametrize("step", [1, 2, 3999, 4000, 4001, 10**5])
def test_noam_is_equation_3_of_the_paper(step):
    settings = ScheduleSettings(name="noam", warmup_steps=4000)
    expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
    assert learning_rate(step, settings, 1.0, 512, 10**5) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(step, settings, 2.0, 512, 10**5) == pytest.approx(2 * expected, rel=1e-12)


def test_noam_peaks_at_the_end_of_warmup():
    settings = ScheduleSettings(name="noam", warmup_steps=100)
    rates = [learning_rate(step, settings, 1.0, 64, 0) for step in range(1, 1000)]
    assert rates.index(max(rates)) + 1 == 100


def rates_of(name, warmup=10, last=50, peak=0.3):
    settings = ScheduleSettings(name=name, warmup_steps=warmup)
    return [learning_rate(step, settings, peak, 512, last) for step in range(1, last + 1)]


@pytest.mark.parametrize("name", ["inverse_sqrt", "linear", "cosine", "constant"])
def test_others_rise_to_their_peak(name):
    rates = rates_of(name)
    assert rates[:10] == pytest.approx([0.03 * step for step in range(1, 11)])
    assert max(rates) == pytest.approx(0.3)


def test_linear_falls_at_a_constant_slope_to_zero():
    rates = rates_of("linear")
    slopes = {round(a - b, 12) for a, b in pairwise(rates[9:])}
    assert slopes == {round(0.3 / 40, 12)}
    assert rates[-1] == pytest.approx(0)


def test_cosine_and_linear_are_those_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name, make in {
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40),
        "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1, 1e-30, 40),
    }.items():
        optimizer = torch.optim.SGD([parameter], lr=0.3)
        scheduler = make(optimizer)
        for ours in rates_of(name)[9:]:
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
            optimizer.step()
            scheduler.step()


def test_inverse_sqrt_and_constant_after_warmup():
    assert rates_of("inverse_sqrt")[39] == pytest.approx(0.3 / 2)
    assert set(rates_of("constant")[9:]) == {0.3}


@pytest.mark.parametrize("name", ["noam", "inverse_sqrt", "linear", "cosine", "constant"])
def test_no_warmup_is_allowed(name):
    assert all(rate >= 0 for rate in rates_of(name, warmup=0))
    assert rates_of(name, warmup=0)[0] > 0
