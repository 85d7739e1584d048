"""UnDiMix's weights against a full slow loop, their invariants, and the places where there is little to weigh."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tests import references
from tests.contrasts import Case, bank, in_batch, random_rows, rectangular
from undimix_plugins import Contrast, UnDiMix, Uniform, effective_number, importance_weights, info_nce, two_views
from undimix_plugins.toolkit import LastLayerInputs

EXACT = {"rtol": 1e-10, "atol": 1e-10}

CASES = {
    "in-batch-6": in_batch(3),
    "in-batch-10-raw": in_batch(5, 3, temperature=0.8, unit=False),
    "bank-3x7": bank(3, 7, temperature=0.8),
    "bank-5x4-raw": bank(5, 4, unit=False),
    "rectangular-4x9": rectangular(4, 9, offset=3, temperature=0.8),
    "in-batch-12-spread": in_batch(6, 3, temperature=0.5),
    "rectangular-4x9-wide-spread": rectangular(4, 9, offset=3, temperature=0.4),
    "rectangular-5x7-raw": rectangular(5, 7, offset=1, unit=False),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

STRENGTHS = {
    "all": (0.3, 0.7, 1.1),
    "similarity": (1.0, 0.0, 0.0),
    "influence": (0.0, 1.0, 0.0),
    "diversity": (0.0, 0.0, 2.0),
    "two": (0.5, 0.0, 0.25),
}
METHODS = {
    f"{mixing}-{gradient}-{distance}-{name}": UnDiMix(
        *strengths, hardness=1.5, mixing=mixing, gradient=gradient, distance=distance
    )
    for mixing, gradient, distance, (name, strengths) in itertools.product(
        ("geometric", "linear"), ("embedding", "weight"), ("cosine", "euclidean"), STRENGTHS.items()
    )
    # A component of strength 0 is the same whatever its options.
    if (gradient == "embedding" or strengths[1]) and (distance == "cosine" or strengths[2])
}
METHODS |= {
    "negative": UnDiMix(-0.5, 0.8, -1.2),
    "default": UnDiMix(),
    "soft": UnDiMix(hardness=0.01),
    "hard-linear": UnDiMix(hardness=20.0, mixing="linear"),
}


def log_weights(contrast: Contrast, method: UnDiMix) -> Tensor:
    return method.log_weights(method.prepare(contrast), slice(0, len(contrast.anchors)))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@each_case
def test_log_weights(case: Case, method: UnDiMix) -> None:
    negative = case.is_negative()
    result, expected = log_weights(case.contrast(), method), references.log_weights(case, method)
    torch.testing.assert_close(result[negative], expected[negative], **EXACT)
    weights = importance_weights(case.contrast(), method)
    assert torch.equal(weights, result.exp().masked_fill(~negative, 0))
    mean = weights.sum(dim=1) / negative.sum(dim=1)
    torch.testing.assert_close(mean, torch.ones_like(mean), **EXACT)


@pytest.mark.parametrize("mixing", ["geometric", "linear"])
@each_case
def test_blocks_of_anchors(case: Case, mixing: str) -> None:
    """Any block of anchors gives its part of the whole."""
    method = UnDiMix(mixing=mixing)
    whole = log_weights(case.contrast(), method)
    prepared = method.prepare(case.contrast())
    for size in (1, 2, len(case.anchors)):
        blocks = [method.log_weights(prepared, slice(k, k + size)) for k in range(0, len(case.anchors), size)]
        torch.testing.assert_close(torch.cat(blocks), whole, **EXACT)


def test_detached() -> None:
    views = random_rows(6, 4, seed=0).requires_grad_()
    contrast = Contrast.of(views, views, views, None, 0.5, last_layer=LastLayerInputs(views, views))
    constant = [
        UnDiMix(gradient="weight", detached=True),
        UnDiMix(mixing="linear", distance="euclidean"),
        UnDiMix(similarity=0.0),
        UnDiMix(hardness=0.0),
    ]
    for method in constant:
        assert not method.carries_gradient
        assert not log_weights(contrast, method).requires_grad
    assert UnDiMix().carries_gradient
    assert log_weights(contrast, UnDiMix()).requires_grad
    with torch.no_grad():
        assert not log_weights(contrast, UnDiMix()).requires_grad


@pytest.mark.parametrize("mixing", ["geometric", "linear"])
@each_case
def test_without_hardness_it_is_the_plain_loss(case: Case, mixing: str) -> None:
    plain = info_nce(case.contrast(), Uniform())
    torch.testing.assert_close(
        info_nce(case.contrast(), UnDiMix(hardness=0.0, mixing=mixing)), plain, rtol=0, atol=1e-12
    )
    assert (info_nce(case.contrast(), UnDiMix(mixing=mixing)) - plain).abs() > 1e-3


@pytest.mark.parametrize("method", [UnDiMix(), UnDiMix(mixing="linear"), UnDiMix(distance="euclidean")], ids=str)
class TestFewNegatives:
    def test_one_pair(self, method: UnDiMix) -> None:
        """No negatives at all."""
        views = random_rows(2, 4, seed=0).requires_grad_()
        contrast = two_views(views[:1], views[1:], 0.1)
        assert torch.equal(importance_weights(contrast, method), torch.zeros(2, 2).double())
        loss = info_nce(contrast, method)
        loss.backward()
        assert loss == 0
        assert torch.equal(views.grad, torch.zeros_like(views))

    def test_two_pairs(self, method: UnDiMix) -> None:
        """Two negatives each: any two scores are standardised to -1 and 1, and are equally far from each other."""
        case = in_batch(2)
        negative = case.is_negative()
        result, expected = log_weights(case.contrast(), method), references.log_weights(case, method)
        torch.testing.assert_close(result[negative], expected[negative], **EXACT)

    def test_a_single_negative(self, method: UnDiMix) -> None:
        case = bank(3, 1)
        assert torch.equal(importance_weights(case.contrast(), method), torch.ones(3, 1).double())

    def test_everything_excluded_for_one_anchor(self, method: UnDiMix) -> None:
        case = bank(3, 4)._replace(excluded=[[], [3, 0, 2, 1], [2]])
        leaf = case.pool.clone().requires_grad_()
        loss = info_nce(case._replace(pool=leaf).contrast(), method)
        loss.backward()
        weights = importance_weights(case.contrast(), method)
        assert torch.equal(weights[1], torch.zeros(4).double())
        torch.testing.assert_close(loss, references.info_nce(case, weights), **EXACT)
        assert leaf.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("rotated", [False, True], ids=["as-made", "rotated"])
    @pytest.mark.parametrize("temperature", [0.5, 0.02])
    def test_coincident(self, method: UnDiMix, dtype: torch.dtype, rotated: bool, temperature: float) -> None:
        """Scores that differ by rounding alone, which differs from row to row, are no ground for weights."""
        for pairs, width in ((2, 3), (9, 16), (64, 128)):
            # Equal rows of different lengths, so that normalising rounds each its own way.
            rows = random_rows(1, width, seed=0, dtype=dtype) * torch.linspace(0.5, 2, 2 * pairs, dtype=dtype)[:, None]
            if rotated:
                rows = rows @ rotation(width, seed=1).to(dtype)
            views = normalize(rows, dim=1).requires_grad_()
            batch = two_views(views[:pairs], views[pairs:], temperature)
            memory = Contrast.of(views[:pairs], views[pairs:], views.detach(), None, temperature)
            for contrast in (batch, memory):
                weights = importance_weights(contrast, method)
                assert torch.equal(weights[contrast.is_negative(slice(None))].unique(), torch.ones(1, dtype=dtype))
                loss = info_nce(contrast, method)
                (gradient,) = torch.autograd.grad(loss, views)
                assert gradient.isfinite().all()
                torch.testing.assert_close(loss.item(), math.log(1 + contrast.count[0].item()), rtol=1e-5, atol=0)


def rotation(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(random_rows(width, width, seed)).Q


@pytest.mark.parametrize("temperature", [0.05, 0.02, 0.01])
def test_influence_alone_in_float32(temperature: float) -> None:
    """Gradients as small as exp(-1/t), whose products no float32 holds, still weigh as in float64.

    All pairs are near-duplicates but one, whose gradients are so much larger that the others' vanish beside them;
    that pair's own views compare the others alone. A score's relative error is some eps/t (test_components), and
    standardised scores reach about 8.
    """
    pairs = 32
    first = random_rows(pairs, 128, seed=0)
    second = normalize(first + 0.02 * random_rows(pairs, 128, seed=1), dim=1)
    second[0] = random_rows(1, 128, seed=2)[0]
    method = UnDiMix(similarity=0.0, influence=1.0, diversity=0.0)
    exact = importance_weights(two_views(first, second, temperature), method)
    result = importance_weights(two_views(first.float(), second.float(), temperature), method)
    bound = 64 * torch.finfo(torch.float32).eps / temperature
    for rows in ([0, pairs], list(range(1, pairs))):
        assert (result[rows] - exact[rows]).abs().max() < bound * exact[rows].max()


def test_concentrated_embeddings_in_float32() -> None:
    """When training starts, cosines are .99 on average: what is left of them in float32 is eps over their deviation."""
    pairs, width = 64, 128
    rows = random_rows(1, width, seed=0) + 0.1 * random_rows(2 * pairs, width, seed=1)
    views = normalize(rows, dim=1)
    cosines = views @ views.T
    assert 0.98 < cosines.mean() < 0.995
    bound = 32 * torch.finfo(torch.float32).eps / cosines[cosines < 0.9999].std().item()
    for mixing in ("geometric", "linear"):
        method = UnDiMix(mixing=mixing)
        exact = importance_weights(two_views(views[:pairs], views[pairs:], 0.1), method)
        single = views.float()
        result = importance_weights(two_views(single[:pairs], single[pairs:], 0.1), method)
        assert ((result - exact).abs() / exact.clamp(min=1)).max() < bound


seeds = st.integers(0, 2**32 - 1)
methods = st.builds(
    UnDiMix,
    similarity=st.floats(0.1, 2),
    influence=st.floats(0.1, 2),
    diversity=st.floats(0.1, 2),
    hardness=st.floats(0, 2),
    mixing=st.sampled_from(["geometric", "linear"]),
    gradient=st.sampled_from(["embedding", "weight"]),
    distance=st.sampled_from(["cosine", "euclidean"]),
)
cases = st.one_of(
    st.builds(in_batch, st.integers(1, 7), st.integers(2, 6), seed=seeds),
    st.builds(bank, st.integers(1, 7), st.integers(1, 12), st.integers(2, 6), seed=seeds),
    st.integers(4, 12).flatmap(
        lambda m: st.builds(rectangular, st.integers(1, m // 2), st.just(m), st.integers(0, m // 2), seed=seeds)
    ),
)
# Rounding, relative to deviations that are small by chance.
INVARIANT = {"rtol": 1e-9, "atol": 1e-9}


@given(case=cases, method=methods)
def test_mean_weight_is_one(case: Case, method: UnDiMix) -> None:
    weights, count = importance_weights(case.contrast(), method), case.is_negative().sum(dim=1)
    torch.testing.assert_close(weights.sum(dim=1), count.double(), **EXACT)


@given(case=cases, method=methods, seed=seeds)
def test_permuting_the_pool(case: Case, method: UnDiMix, seed: int) -> None:
    order = torch.randperm(len(case.pool), generator=torch.Generator().manual_seed(seed))
    place = {int(old): new for new, old in enumerate(order)} | {-1: -1}
    permuted = case._replace(
        anchors=case.anchors.clone(),
        pool=case.pool[order],
        own_columns=[place[j] for j in case.own_columns],
        excluded=[[place[j] for j in row] for row in case.excluded],
        pool_inputs=case.pool_inputs[order],
    )
    before, after = case.contrast(), permuted.contrast()
    weights = importance_weights(before, method)
    torch.testing.assert_close(importance_weights(after, method), weights[:, order], **INVARIANT)
    torch.testing.assert_close(info_nce(after, method), info_nce(before, method), **INVARIANT)


@given(case=cases, method=methods, seed=seeds)
def test_rotating_all_embeddings(case: Case, method: UnDiMix, seed: int) -> None:
    q = rotation(case.pool.shape[1], seed)
    pool = case.pool @ q
    anchors = pool if case.anchors is case.pool else case.anchors @ q
    rotated = case._replace(anchors=anchors, positives=case.positives @ q, pool=pool)
    before, after = case.contrast(), rotated.contrast()
    torch.testing.assert_close(importance_weights(after, method), importance_weights(before, method), **INVARIANT)
    torch.testing.assert_close(info_nce(after, method), info_nce(before, method), **INVARIANT)


@given(pairs=st.integers(2, 7), seed=seeds, method=methods)
def test_twins_weigh_the_same(pairs: int, seed: int, method: UnDiMix) -> None:
    """Equal rows have equal similarities and distances to the rest. Their tasks are alike too, since each has the other
    among its candidates. So where both are negatives, no score tells them apart.
    """
    case = in_batch(pairs, seed=seed)
    views, inputs = case.pool.clone(), case.anchor_inputs.clone()
    views[1], inputs[1] = views[0], inputs[0]
    other = [row[0] for row in case.excluded]
    twins = case._replace(
        anchors=views, positives=views[other], pool=views, anchor_inputs=inputs, pool_inputs=inputs.clone()
    )
    weights = importance_weights(twins.contrast(), method)
    both = [i for i in range(2 * pairs) if i not in (0, 1, other[0], other[1])]
    torch.testing.assert_close(weights[both, 0], weights[both, 1], **INVARIANT)


@given(n=st.integers(1, 4), entries=st.integers(2, 6), seed=seeds, method=methods)
def test_twins_in_a_bank_weigh_the_same(n: int, entries: int, seed: int, method: UnDiMix) -> None:
    case = bank(n, entries, seed=seed)
    pool, inputs = case.pool.clone(), case.pool_inputs.clone()
    pool[1], inputs[1] = pool[0], inputs[0]
    weights = importance_weights(case._replace(pool=pool, pool_inputs=inputs).contrast(), method)
    torch.testing.assert_close(weights[:, 0], weights[:, 1], **INVARIANT)


@given(case=cases, component=st.sampled_from(["similarity", "influence", "diversity"]), sign=st.sampled_from([-1, 1]))
def test_harder_means_fewer(case: Case, component: str, sign: int) -> None:
    """Tilting one fixed score: log n_eff = 2 K(h) - K(2h) + const, K convex, so it falls as h grows."""
    strengths = {"similarity": 0.0, "influence": 0.0, "diversity": 0.0, component: float(sign)}
    counts = [
        effective_number(importance_weights(case.contrast(), UnDiMix(**strengths, hardness=hardness)))
        for hardness in (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 20.0)
    ]
    torch.testing.assert_close(counts[0], case.is_negative().sum(dim=1).double(), **EXACT)
    for softer, harder in itertools.pairwise(counts):
        assert (harder <= softer + 1e-10).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mixing", ["geometric", "linear"])
def test_all_weight_on_one_negative(mixing: str, dtype: torch.dtype) -> None:
    """Exponents far beyond what exp() can hold. Their own rounding, of some eps, is multiplied by the hardness."""
    views = random_rows(12, 5, seed=0, dtype=dtype)
    contrast = two_views(views[:6], views[6:], 0.5)
    hardness = 1e4
    weights = importance_weights(contrast, UnDiMix(similarity=0.0, diversity=0.0, hardness=hardness, mixing=mixing))
    torch.testing.assert_close(weights.sum(dim=1), contrast.count, rtol=8 * torch.finfo(dtype).eps * hardness, atol=0)
    assert (effective_number(weights) < 2.1).all()  # two views may share the top


def test_strengths_count_relative_to_each_other_under_linear_mixing() -> None:
    contrast = in_batch(5).contrast()
    weights = importance_weights(contrast, UnDiMix(0.1, 0.2, 0.3, mixing="linear"))
    for scale in (1e-300, 10.0, 1e307):
        scaled = UnDiMix(0.1 * scale, 0.2 * scale, 0.3 * scale, mixing="linear")
        torch.testing.assert_close(importance_weights(contrast, scaled), weights, **EXACT)


BAD_SETTINGS = {
    "hardness-below-0": ({"hardness": -0.5}, r"hardness: .*at least 0, got -0\.5"),
    "hardness-inf": ({"hardness": math.inf}, r"hardness: .*finite.* got inf"),
    "hardness-nan": ({"hardness": math.nan}, r"hardness: .*finite.* got nan"),
    "similarity-nan": ({"similarity": math.nan}, r"similarity: expected a finite number, got nan"),
    "influence-inf": ({"influence": math.inf}, r"influence: expected a finite number, got inf"),
    "diversity-text": ({"diversity": "0.5"}, r"diversity: expected a finite number, got '0\.5'"),
    "diversity-true": ({"diversity": True}, r"diversity: expected a finite number, got True"),
    "all-0": (
        {"similarity": 0, "influence": 0, "diversity": 0},
        r"similarity, influence, diversity: expected at least one strength other than 0, got all 0.*Uniform",
    ),
    "linear-negative": ({"influence": -1.0, "mixing": "linear"}, r"influence: .*at least 0, got -1\.0"),
    "mixing": ({"mixing": "harmonic"}, r"mixing: expected one of 'linear', 'geometric', got 'harmonic'"),
    "gradient": ({"gradient": "bias"}, r"gradient: expected one of 'embedding', 'weight', got 'bias'"),
    "distance": ({"distance": "dot"}, r"distance: expected one of 'cosine', 'euclidean', got 'dot'"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        UnDiMix(**settings)  # type: ignore[arg-type]


def test_gradient_at_the_weight_needs_the_inputs() -> None:
    views = random_rows(6, 4, seed=0)
    contrast = two_views(views[:3], views[3:], 0.5)
    with pytest.raises(ValueError, match=r"gradient='weight' .*anchor_inputs and pool_inputs, got None"):
        info_nce(contrast, UnDiMix(gradient="weight"))
    # Without influence nothing needs them.
    without = UnDiMix(influence=0.0, gradient="weight")
    assert torch.equal(importance_weights(contrast, without), importance_weights(contrast, UnDiMix(influence=0.0)))
