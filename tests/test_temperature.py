"""A schedule of the temperature: the published cosine, and in which losses it finds a temperature."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.contrasts import random_rows
from undimix_plugins import HCL, AdCo, UnDiMix, Weighting, cosine_temperature, info_nce, two_views
from undimix_plugins.monitoring.temperature import TemperatureCycle, losses_with_temperature, set_temperature
from undimix_plugins.toolkit import WeightedLoss


def published(epoch: int, t_max: float, low: float, high: float) -> float:
    """The authors' code, whose `t_max` is half a period."""
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * epoch / t_max))


def test_it_is_the_published_schedule() -> None:
    """With the authors' settings for CIFAR: 2,000 epochs with a period of 400."""
    for epoch in range(1, 2001):
        expected = published(epoch, 200, 0.1, 1.0)
        assert cosine_temperature(epoch, 400) == pytest.approx(expected, abs=1e-12)
        assert TemperatureCycle(epochs=400).at(step=0, epoch=epoch, total=math.inf) == cosine_temperature(epoch, 400)
        assert TemperatureCycle().at(step=epoch, epoch=0, total=2000) == pytest.approx(expected, abs=1e-12)


@given(
    time=st.floats(0, 1e6),
    period=st.floats(1e-3, 1e6),
    bounds=st.tuples(st.floats(1e-3, 2), st.floats(1e-3, 2)).map(sorted),
)
def test_between_its_bounds_and_the_same_a_period_later(time: float, period: float, bounds: list[float]) -> None:
    low, high = bounds
    now = cosine_temperature(time, period, low, high)
    assert low <= now <= high
    assert cosine_temperature(0, period, low, high) == pytest.approx(high, abs=1e-12)
    assert cosine_temperature(period / 2, period, low, high) == pytest.approx(low, abs=1e-12)
    assert cosine_temperature(time + period, period, low, high) == pytest.approx(now, abs=1e-6 * max(1, time / period))


@pytest.mark.parametrize(
    ("cycle", "at", "expected"),
    [
        (TemperatureCycle(0.2, 0.6, steps=8), {"step": 2}, 0.4),
        (TemperatureCycle(0.2, 0.6, epochs=8), {"epoch": 4}, 0.2),
        (TemperatureCycle(0.2, 0.6, share=0.08), {"step": 2}, 0.4),
        (TemperatureCycle(0.2, 0.6), {"step": 10}, 0.2),
        (TemperatureCycle(0.3, 0.3), {"step": 7}, 0.3),
    ],
    ids=["steps", "epochs", "share", "default", "constant"],
)
def test_units(cycle: TemperatureCycle, at: dict[str, int], expected: float) -> None:
    assert cycle.at(**{"step": 1, "epoch": 1, "total": 100, **at}) == pytest.approx(expected)


BAD = {
    "low-0": ({"low": 0}, "low: expected a finite number above 0, got 0"),
    "high": ({"high": math.inf}, "high: expected a finite number above 0, got inf"),
    "order": ({"low": 0.5, "high": 0.1}, "low, high: expected low at most high, got low=0.5 and high=0.1"),
    "steps": ({"steps": 0}, "steps: expected a finite number above 0, got 0"),
    "epochs": ({"epochs": -1}, "epochs: expected a finite number above 0, got -1"),
    "share": ({"share": math.nan}, "share: expected a finite number above 0, got nan"),
    "two": ({"steps": 5, "share": 0.1}, "epochs, steps, share: expected at most one of the three, got steps=5, share="),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_refuses(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        TemperatureCycle(**settings)


def test_refuses_times() -> None:
    with pytest.raises(ValueError, match=r"^time: expected a finite number at least 0, got -1"):
        cosine_temperature(-1, 10)
    with pytest.raises(ValueError, match=r"^period: expected a finite number above 0, got 0"):
        cosine_temperature(1, 0)
    for total in (math.inf, -1):
        with pytest.raises(ValueError, match=r"^share: expected a training whose number of steps is known, got"):
            TemperatureCycle().at(step=0, epoch=0, total=total)
    with pytest.warns(UserWarning, match=r"^high=3\.0: at such a temperature all candidates count nearly the same"):
        cosine_temperature(0, 10, high=3.0)


class Loss(WeightedLoss):
    def __init__(self, weighting: Weighting, temperature: float = 0.5) -> None:
        super().__init__()
        self.temperature = temperature
        self.weigh(weighting)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return info_nce(two_views(first, second, self.temperature), self.weighting)


class Ranking(nn.Module):
    """A toolkit's: multiplies by a scale, and computes the temperature of it."""

    def __init__(self, scale: float | Tensor = 20) -> None:
        super().__init__()
        self.scale = scale

    @property
    def temperature(self) -> float:
        return 1 / self.scale


class Attention(nn.Module):
    """No loss, with a scale."""

    scale = 0.125

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.125


def test_where_it_finds_temperatures() -> None:
    """In weighted losses, the toolkit's own and `AdCo`, wherever they are; not in layers that have a scale."""
    loss, ranking, adversary, attention = Loss(UnDiMix()), Ranking(), AdCo(4, 8), Attention()
    wrapper = nn.Sequential(ranking)
    module = nn.ModuleDict({"a": attention, "b": nn.ModuleList([loss, loss]), "c": wrapper, "d": adversary})
    module.temperature = 0.7
    found = losses_with_temperature(module, (Ranking,))
    assert found == [loss, ranking, adversary]
    for each in found:
        set_temperature(each, 0.25)
    assert (loss.temperature, ranking.scale, ranking.temperature, adversary.temperature) == (0.25, 4.0, 0.25, 0.25)
    assert (attention.scale, module.temperature, adversary.memory_temperature) == (0.125, 0.7, 0.02)
    assert losses_with_temperature(module) == [loss, adversary]
    assert losses_with_temperature(attention) == []
    assert losses_with_temperature(attention, given=True) == [attention]
    assert losses_with_temperature(wrapper, (Ranking,), given=True) == [ranking]


@pytest.mark.parametrize("scale", [nn.Parameter(torch.tensor(20.0)), torch.tensor(20.0)], ids=["learned", "tensor"])
def test_no_schedule_for_a_tensor(scale: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^TemperatureSchedule: expected a number as Ranking\.scale, got a tensor; a"):
        losses_with_temperature(nn.Sequential(Ranking(scale)), (Ranking,))


def test_no_schedule_for_a_loss_without_a_temperature() -> None:
    """Whatever else has one."""
    without = Loss(UnDiMix())
    del without.temperature
    with pytest.raises(ValueError, match=r"expected losses with a number as their attribute .* got Loss without one"):
        losses_with_temperature(nn.ModuleList([Loss(UnDiMix()), without]))


@pytest.mark.parametrize("weighting", [UnDiMix(), HCL()], ids=str)
def test_the_compiler_takes_a_temperature_that_changes(weighting: Weighting) -> None:
    torch.compiler.reset()
    loss, views = Loss(weighting), random_rows(12, 4, seed=0).split(6)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    (found,) = losses_with_temperature(compiled)
    assert found is loss
    for step in (0, 1):
        set_temperature(found, cosine_temperature(step, 10))
        compiled(*views)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in (2, 4, 5, 8, 10):
            temperature = cosine_temperature(step, 10)
            set_temperature(found, temperature)
            expected = info_nce(two_views(*views, temperature), weighting)
            torch.testing.assert_close(compiled(*views), expected, rtol=1e-10, atol=1e-10)
