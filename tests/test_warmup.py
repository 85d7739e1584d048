"""A warm-up of the hardness: the schedule, what is between the plain loss and a weighting, and what a loss keeps."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.contrasts import bank, in_batch, random_rows
from undimix_plugins import (
    HCL,
    Contrast,
    UnDiMix,
    Uniform,
    Weighting,
    effective_number,
    hardness_share,
    importance_weights,
    info_nce,
    two_views,
)
from undimix_plugins.monitoring.warmup import set_hardness, weighted_losses
from undimix_plugins.toolkit import WeightedLoss
from undimix_plugins.weightings.weighting import Softened

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Tilted(Weighting):
    """Weights that carry a gradient and have no mean of 1."""

    def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
        return 1.5 * contrast.logits(rows) - 0.3


class Debiased(Tilted):
    """A method that changes more than weights."""

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        return negatives - 0.2 * positives + 0.1 * count.log()


class OnlyTheNearest(Weighting):
    """Weights of 0."""

    def log_weights(self, contrast: Contrast, rows: slice) -> Tensor:
        logits = contrast.logits(rows).detach().masked_fill(~contrast.is_negative(rows), -torch.inf)
        return torch.zeros_like(logits).masked_fill(logits < logits.amax(dim=1, keepdim=True), -torch.inf)


WEIGHTINGS = {
    "UnDiMix": UnDiMix(hardness=2.0),
    "linear": UnDiMix(mixing="linear"),
    "HCL": HCL(beta=0.7, tau_plus=0.2),
    "Uniform": Uniform(),
    "own": Tilted(),
    "own-combine": Debiased(),
    "own-zeros": OnlyTheNearest(),
    "softened": Debiased().softened(0.5),
}
each_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
CONTRASTS = {"in-batch": in_batch(5).contrast(), "bank": bank(4, 9).contrast()}


def value_and_gradient(views: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    views = views.clone().requires_grad_()
    loss = info_nce(two_views(*views.chunk(2), 0.5), weighting)
    return loss.detach(), torch.autograd.grad(loss, views)[0]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("settings", "total", "length"), [({"steps": 8}, math.inf, 8), ({"share": 0.3}, 50, 15)])
def test_schedule(shape: str, settings: dict[str, float], total: float, length: int) -> None:
    shares = [hardness_share(step, total, **settings, shape=shape) for step in range(length + 5)]
    done = [step / length for step in range(length)]
    expected = done if shape == "linear" else [math.sin(math.pi * x / 2) ** 2 for x in done]
    assert shares[:length] == pytest.approx(expected, abs=1e-15)
    assert shares[length:] == [1.0] * 5


@given(
    step=st.integers(0, 10**9),
    total=st.integers(1, 10**9),
    share=st.floats(1e-6, 1),
    shape=st.sampled_from(["linear", "cosine"]),
)
def test_it_never_falls(step: int, total: int, share: float, shape: str) -> None:
    now, later = (hardness_share(at, total, share=share, shape=shape) for at in (step, step + 1))
    assert 0 <= now <= later <= 1
    assert hardness_share(0, total, share=share, shape=shape) == 0
    assert hardness_share(total, total, share=share, shape=shape) == 1


BAD = {
    "both": ({"steps": 5, "share": 0.5}, r"steps, share: expected one of the two, got steps=5 and share=0\.5"),
    "neither": ({}, "steps, share: expected one of the two, got steps=None and share=None"),
    "steps-0": ({"steps": 0}, "steps: expected a finite number at least 1, got 0"),
    "steps-as-a-share": ({"steps": 0.1}, r"steps: expected a finite number at least 1, got 0\.1"),
    "share-0": ({"share": 0.0}, r"share: expected a finite number above 0, got 0\.0"),
    "share-as-steps": ({"share": 100}, "share: expected a number above 0 and at most 1, got 100"),
    "shape": ({"steps": 5, "shape": "step"}, "shape: expected one of 'linear', 'cosine', got 'step'"),
    "step": ({"steps": 5, "step": -1}, "step: expected a finite number at least 0, got -1"),
    "endless": (
        {"share": 0.1, "total": math.inf},
        "share: expected a training whose number of steps is known, got inf",
    ),
    "unknown": ({"share": 0.1, "total": -1}, "share: expected a training whose number of steps is known, got -1"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        hardness_share(**{"step": 0, "total": 10, **settings})  # type: ignore[arg-type]


@each_weighting
@pytest.mark.parametrize("contrast", CONTRASTS.values(), ids=CONTRASTS)
def test_from_the_plain_loss_to_the_weighting(weighting: Weighting, contrast: Contrast) -> None:
    none, all_of_it = weighting.softened(0), weighting.softened(1)
    torch.testing.assert_close(info_nce(contrast, none), info_nce(contrast, Uniform()), rtol=0, atol=1e-12)
    assert all_of_it == weighting
    just_begun = info_nce(contrast, weighting.softened(1e-9))
    if weighting is not WEIGHTINGS["own-zeros"]:  # which leaves negatives out or does not
        torch.testing.assert_close(just_begun, info_nce(contrast, Uniform()), rtol=0, atol=1e-7)
    torch.testing.assert_close(info_nce(contrast, weighting.softened(1 - 1e-9)), info_nce(contrast, weighting))


@each_weighting
def test_gradients_at_the_ends(weighting: Weighting) -> None:
    views = random_rows(10, 4, seed=0)
    for share, expected in ((0, Uniform()), (1, weighting)):
        for got, wanted in zip(
            value_and_gradient(views, weighting.softened(share)), value_and_gradient(views, expected), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_ours_stay_what_they_are() -> None:
    """So that the fast path is taken, and a repr tells the settings."""
    assert UnDiMix(0.1, 0.2, 0.3, hardness=2, mixing="linear").softened(0.25) == UnDiMix(
        0.1, 0.2, 0.3, hardness=0.5, mixing="linear"
    )
    assert HCL(beta=2.0, tau_plus=0.4).softened(0.5) == HCL(beta=1.0, tau_plus=0.2)
    assert Uniform().softened(0.5) == Uniform()
    assert type(UnDiMix().softened(0)) is UnDiMix
    assert repr(Uniform().softened(0.3)) == "Uniform()"
    assert Softened(HCL(), 0.5).citation == HCL().citation


def test_what_is_in_between() -> None:
    """Powers of the weights, one anchor and one negative at a time; the rest moves in logarithms too."""
    case, share = in_batch(4), 0.4
    contrast, weighting = case.contrast(), Debiased()
    weights = importance_weights(contrast, weighting)
    losses = []
    for i in range(len(case.anchors)):
        positive = (case.anchors[i] @ case.positives[i]).item() / case.temperature
        logits = {j: (case.anchors[i] @ case.pool[j]).item() / case.temperature for j in case.negatives(i)}
        powers = sum(weights[i, j].item() ** share * math.exp(logit) for j, logit in logits.items())
        combined = math.log(powers) - 0.2 * positive + 0.1 * math.log(len(logits))
        between = (1 - share) * math.log(powers) + share * combined
        losses.append(math.log(1 + math.exp(between - positive)))
    got = info_nce(contrast, weighting.softened(share)).item()
    assert got == pytest.approx(sum(losses) / len(losses), abs=1e-12)
    torch.testing.assert_close(importance_weights(contrast, weighting.softened(share)), weights**share, **EXACT)


@given(shares=st.lists(st.floats(0, 1), min_size=2, max_size=6), seed=st.integers(0, 10))
def test_harder_means_fewer(shares: list[float], seed: int) -> None:
    contrast = in_batch(4, seed=seed).contrast()
    for weighting in (Tilted(), HCL(beta=2.0), UnDiMix(1.0, 0.0, 0.0), OnlyTheNearest()):
        counts = [effective_number(importance_weights(contrast, weighting.softened(share))) for share in sorted(shares)]
        for softer, harder in itertools.pairwise(counts):
            assert (harder <= softer + 1e-10).all()


@each_weighting
@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, math.inf, True, "half", None])
def test_no_share(weighting: Weighting, share: object) -> None:
    with pytest.raises(ValueError, match=f"^share: expected a .*number .*, got {share!r}"):
        weighting.softened(share)  # type: ignore[arg-type]


class Loss(WeightedLoss):
    def __init__(self, weighting: Weighting) -> None:
        super().__init__()
        self.weigh(weighting)


@each_weighting
def test_a_loss_keeps_its_full_weighting(weighting: Weighting) -> None:
    loss = Loss(weighting)
    for share in (0, 0.25, 0.5):
        set_hardness(loss, share)
        assert loss.weighting == weighting.softened(share)
    set_hardness(loss, 1)
    assert loss.weighting is weighting
    assert vars(loss).keys() == vars(Loss(weighting)).keys()


@pytest.mark.parametrize("move", [copy.deepcopy, copy.copy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_wherever_the_loss_goes(move: object) -> None:
    loss = Loss(UnDiMix(hardness=2.0))
    set_hardness(loss, 0.25)
    moved = move(loss)  # type: ignore[operator]
    assert moved.weighting == UnDiMix(hardness=0.5)
    set_hardness(moved, 0.5)
    assert moved.weighting == UnDiMix(hardness=1.0)
    set_hardness(moved, 1)
    assert moved.weighting == UnDiMix(hardness=2.0)
    assert loss.weighting == UnDiMix(hardness=0.5)


def test_a_weighting_set_in_between_is_the_full_one() -> None:
    loss = Loss(UnDiMix(hardness=2.0))
    set_hardness(loss, 0.25)
    loss.weighting = HCL(beta=1.0, tau_plus=0.0)
    set_hardness(loss, 0.5)
    assert loss.weighting == HCL(beta=0.5, tau_plus=0.0)
    loss.weighting = UnDiMix(hardness=1.0)  # as hard as the first one's half
    set_hardness(loss, 0.5)
    assert loss.weighting == UnDiMix(hardness=0.5)
    set_hardness(loss, 1)
    assert loss.weighting == UnDiMix(hardness=1.0)


def test_losses_inside_a_module() -> None:
    first, second = Loss(UnDiMix()), Loss(HCL())
    module = torch.nn.ModuleList([first, torch.nn.Sequential(second), torch.nn.ReLU(), first])
    assert weighted_losses(module) == [first, second]
    assert weighted_losses(first) == [first]
    assert weighted_losses(torch.nn.ReLU()) == []


class CompiledLoss(Loss):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return info_nce(two_views(first, second, 0.5), self.weighting)


@pytest.mark.parametrize("weighting", [UnDiMix(hardness=2.0), HCL()], ids=str)
def test_the_compiler_takes_a_hardness_that_changes(weighting: Weighting) -> None:
    torch.compiler.reset()
    loss, views = CompiledLoss(weighting), random_rows(12, 4, seed=0).split(6)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for share in (0.0, 0.1):
        set_hardness(loss, share)
        compiled(*views)
    with torch.compiler.set_stance("fail_on_recompile"):
        for share in (0.2, 0.5, 0.9, 1.0):
            set_hardness(loss, share)
            expected = info_nce(two_views(*views, 0.5), weighting.softened(share))
            torch.testing.assert_close(compiled(*views), expected, **EXACT)
