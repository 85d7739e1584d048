"""MMCL's duals are those of an SVM, its loss is the published one, and neither forms a matrix for each anchor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import normalize

from tests.contrasts import random_rows
from undimix_plugins.methods.mmcl import MMCL

EXACT = {"rtol": 0, "atol": 1e-10}
PRECISE = {"num_iters": 100_000, "stop_condition": 1e-13}
# Of few rows of small width: most duals inside, some at their bound, many at zero.
SETTINGS = [(0.07, 1.0, 0.1), (1.0, 1.0, 0.1), (1.0, 0.5, 0.3), (10.0, 1.0, 0.1), (10.0, math.inf, 0.1)]


def kernel(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    return (-(x - y).square().sum() / sigma).exp()


def dual_matrix(rows: Tensor, i: int, sigma: float, reg: float) -> tuple[Tensor, list[int]]:
    others = [j for j in range(len(rows)) if j != i]
    x = rows[i]
    matrix = torch.zeros(len(others), len(others), dtype=rows.dtype)
    for a, j in enumerate(others):
        for b, k in enumerate(others):
            matrix[a, b] = (
                kernel(x, x, sigma)
                + kernel(rows[j], rows[k], sigma)
                - kernel(x, rows[j], sigma)
                - kernel(x, rows[k], sigma)
                + reg * (j == k)
            )
    return matrix, others


def objective(matrix: Tensor, duals: Tensor) -> float:
    return float(duals @ matrix @ duals / 2 - 2 * duals.sum())


def optimum(matrix: Tensor, upper: float) -> Tensor:
    """By a quasi-Newton method with bounds, of another's making."""
    q = matrix.numpy()
    found = minimize(
        lambda a: a @ q @ a / 2 - 2 * a.sum(),
        np.zeros(len(q)),
        jac=lambda a: q @ a - 2,
        bounds=[(0, None if upper == math.inf else upper)] * len(q),
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-11, "maxiter": 20_000, "maxfun": 100_000},
    )
    return torch.from_numpy(found.x)


def optima(rows: Tensor, sigma: float, upper: float, reg: float) -> Tensor:
    result = torch.zeros(len(rows), len(rows), dtype=rows.dtype)
    for i in range(len(rows)):
        matrix, others = dual_matrix(rows, i, sigma, reg)
        result[i, others] = optimum(matrix, upper)
    return result


def published(z1: Tensor, z2: Tensor, duals: Tensor, sigma: float) -> Tensor:
    first, second = normalize(z1, dim=1), normalize(z2, dim=1)
    losses = []
    for i in range(len(first)):
        others = [j for j in range(len(first)) if j != i]
        of_negatives = [duals[i, j] * kernel(first[j], second[i], sigma) for j in others]
        of_positive = sum(duals[i, j] for j in others) * kernel(first[i], second[i], sigma)
        losses.append(sum(of_negatives) - of_positive)
    return torch.stack(losses).mean()


def views(n: int, width: int = 4) -> tuple[Tensor, Tensor]:
    z1 = 3 * random_rows(n, width, seed=n, unit=False)
    return z1.requires_grad_(), (z1.detach() + 0.5 * random_rows(n, width, seed=n + 1)).requires_grad_()


@pytest.mark.parametrize(("sigma", "upper", "reg"), SETTINGS)
@pytest.mark.parametrize("n", [2, 7, 12])
def test_descent_reaches_the_constrained_optimum(n: int, sigma: float, upper: float, reg: float) -> None:
    rows = random_rows(n, 4, seed=n)
    duals = MMCL(sigma, upper, reg, **PRECISE).duals(rows)
    torch.testing.assert_close(duals, optima(rows, sigma, upper, reg), rtol=1e-6, atol=1e-6)


def test_the_cases_come_by_both_bounds() -> None:
    duals = torch.cat([optima(random_rows(12, 4, seed=12), *setting).flatten() for setting in SETTINGS])
    assert (duals == 0).sum() > 100
    assert (duals == 1).sum() > 10
    assert ((duals > 0.01) & (duals < 0.99)).sum() > 100


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_the_duals_are_those_of_a_support_vector_machine(sigma: float) -> None:
    """Of x_i against the others, whose slack reg makes quadratic; the one's own multiplier has no bound."""
    n, upper, reg = 9, 0.6, 0.1
    rows = random_rows(n, 4, seed=3)
    duals = MMCL(sigma, upper, reg, **PRECISE).duals(rows)
    for i in range(n):
        gram = torch.stack([torch.stack([kernel(x, y, sigma) for y in rows]) for x in rows])
        gram = gram + reg * torch.eye(n, dtype=gram.dtype)
        gram[i, i] -= reg
        label = np.array([1 if j == i else -1 for j in range(n)])
        machine = SVC(C=upper, kernel="precomputed", class_weight={1: 1e3}, tol=1e-9).fit(gram.numpy(), label)
        multipliers = torch.zeros(n, dtype=rows.dtype)
        multipliers[torch.from_numpy(machine.support_).long()] = torch.from_numpy(np.abs(machine.dual_coef_[0]))
        torch.testing.assert_close(duals[i].sum(), multipliers[i], rtol=1e-6, atol=1e-6)
        multipliers[i] = 0
        torch.testing.assert_close(duals[i], multipliers, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("sigma", "upper", "reg"), SETTINGS)
@pytest.mark.parametrize("n", [2, 7, 12])
def test_by_default_descent_stops_near_the_optimum(n: int, sigma: float, upper: float, reg: float) -> None:
    """By less of the objective than the stop condition's share."""
    rows = random_rows(n, 4, seed=n)
    criterion = MMCL(sigma, upper, reg)
    duals, best = criterion.duals(rows), optima(rows, sigma, upper, reg)
    for i in range(n):
        matrix, others = dual_matrix(rows, i, sigma, reg)
        reached, least = objective(matrix, duals[i, others]), objective(matrix, best[i, others])
        assert least - 1e-9 <= reached <= least + criterion.stop_condition * abs(least)


@pytest.mark.parametrize("eta", [None, 0.01])
def test_descent_is_the_published_iteration(eta: float | None) -> None:
    """An anchor at a time, from 0 and 1, with its own matrix."""
    rows = random_rows(7, 4, seed=1)
    criterion = MMCL(1.0, 0.8, 0.1, eta=eta, num_iters=300)
    duals = criterion.duals(rows)
    steps = []
    for i in range(7):
        matrix, others = dual_matrix(rows, i, 1.0, 0.1)
        length = 1 / matrix.norm() if eta is None else eta
        a = y = torch.zeros(6, dtype=rows.dtype)
        momentum, still, step = 1.0, 0, 0
        while step < 300 and still < 2:
            new = (y - length * (matrix @ y - 2)).clamp(0, 0.8)
            following = 0.5 * (math.sqrt(momentum**4 + 4 * momentum**2) - momentum**2)
            y = new + momentum * (1 - momentum) / (momentum**2 + following) * (new - a)
            momentum = following
            change = ((new - a) / (a + 1e-7)).abs().mean()
            a = new
            still = still + 1 if change < 1e-2 else 0
            step += 1
        steps.append(step)
        torch.testing.assert_close(duals[i, others], a, **EXACT)
    assert len(set(steps)) > 1  # they do not stop together


@pytest.mark.parametrize(("sigma", "upper", "reg"), SETTINGS)
@pytest.mark.parametrize("n", [2, 7, 12])
def test_inverse_is_the_clipped_solution(n: int, sigma: float, upper: float, reg: float) -> None:
    rows = random_rows(n, 4, seed=n)
    duals = MMCL(sigma, upper, reg, "inverse").duals(rows)
    assert torch.equal(duals.diagonal(), torch.zeros(n, dtype=duals.dtype))
    for i in range(n):
        matrix, others = dual_matrix(rows, i, sigma, reg)
        solution = torch.linalg.solve(matrix, torch.full((n - 1,), 2.0, dtype=rows.dtype))
        torch.testing.assert_close(duals[i, others], solution.clamp(0, upper), **EXACT)


def test_inverse_is_the_optimum_where_nothing_is_clipped_and_else_is_not() -> None:
    rows = random_rows(12, 4, seed=12)
    inside = MMCL(0.07, 1.0, 0.1, "inverse").duals(rows)
    assert int(((inside > 0) & (inside < 1)).sum()) == 12 * 11
    torch.testing.assert_close(inside, optima(rows, 0.07, 1.0, 0.1), rtol=1e-6, atol=1e-6)
    clipped = MMCL(10.0, 1.0, 0.1, "inverse").duals(rows)
    assert (clipped - optima(rows, 10.0, 1.0, 0.1)).abs().max() > 0.1


@given(
    n=st.integers(2, 9), sigma=st.floats(0.05, 20), upper=st.floats(0.1, 5), reg=st.floats(0.05, 1), seed=st.integers(0)
)
def test_optimality_conditions(n: int, sigma: float, upper: float, reg: float, seed: int) -> None:
    """At the optimum the gradient is 0 inside, at least 0 at the lower bound and at most 0 at the upper one."""
    rows = random_rows(n, 3, seed=seed % 2**32)
    duals = MMCL(sigma, upper, reg, **PRECISE).duals(rows)
    for i in range(n):
        matrix, others = dual_matrix(rows, i, sigma, reg)
        a = duals[i, others]
        gradient = matrix @ a - 2
        assert ((a >= 0) & (a <= upper)).all()
        assert (gradient[a < upper] > -1e-6).all()
        assert (gradient[a > 0] < 1e-6).all()


@pytest.mark.parametrize("solver", ["pgd", "inverse"])
@pytest.mark.parametrize("sigma", [0.5, 10.0])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_published_loss_and_gradient(n: int, sigma: float, solver: str) -> None:
    z1, z2 = views(n)
    criterion = MMCL(sigma, solver=solver)
    loss, expected = criterion(z1, z2), published(z1, z2, criterion.duals(z1), sigma)
    torch.testing.assert_close(loss, expected, **EXACT)
    for got, want in zip(torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_gradcheck_of_the_second_view() -> None:
    """The duals are constants in this one."""
    z1, z2 = views(5)
    assert torch.autograd.gradcheck(lambda z: MMCL(1.0)(z1.detach(), z), (z2,))


def test_the_duals_are_constants_and_the_lengths_do_not_count() -> None:
    z1, z2 = views(6)
    criterion = MMCL(1.0)
    assert not criterion.duals(z1).requires_grad
    torch.testing.assert_close(criterion(5 * z1, z2 / 7), criterion(z1, z2), **EXACT)


@pytest.mark.parametrize("solver", ["pgd", "inverse"])
def test_an_anchors_duals_follow_the_rows(solver: str) -> None:
    """In another order, and whatever other anchors' duals are."""
    rows = random_rows(9, 4, seed=5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    criterion = MMCL(2.0, solver=solver)
    torch.testing.assert_close(criterion.duals(rows[order]), criterion.duals(rows)[order][:, order], **EXACT)


@pytest.mark.parametrize("solver", ["pgd", "inverse"])
@pytest.mark.parametrize("sigma", [0.07, 10.0])
def test_single_precision(sigma: float, solver: str) -> None:
    rows = random_rows(64, 16, seed=0)
    settings = {"sigma": sigma, "solver": solver, "num_iters": 200, "stop_condition": 0.0}
    double, single = (MMCL(**settings).duals(z) for z in (rows, rows.float()))
    assert single.dtype == torch.float32
    assert ((single - double).norm() / double.norm()) < 1e-4
    half = rows[:8].bfloat16()
    assert MMCL(sigma, solver=solver)(half, half).dtype == torch.float32


@pytest.mark.parametrize("solver", ["pgd", "inverse"])
def test_one_sample_has_no_negatives(solver: str) -> None:
    z1, z2 = views(1)
    loss = MMCL(solver=solver)(z1, z2)
    loss.backward()
    assert loss == 0
    assert torch.equal(z1.grad, torch.zeros_like(z1))


@pytest.mark.parametrize("solver", ["pgd", "inverse"])
def test_copies(solver: str) -> None:
    """Of the anchor itself, of another, and rows of zeros."""
    rows = random_rows(6, 4, seed=0)
    rows[1] = rows[0]
    rows[3] = rows[2]
    rows[4] = 0
    duals = MMCL(1.0, 0.7, solver=solver).duals(rows)
    assert duals.isfinite().all()
    torch.testing.assert_close(duals[0, 1], torch.tensor(0.7, dtype=duals.dtype), rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["pgd", "inverse"])
def test_memory_is_for_pairs(solver: str) -> None:
    """No tensor has a number for each three of the batch."""
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            sizes.extend(each.numel() for each in (result, *args) if isinstance(each, Tensor))
            return result

    rows = random_rows(40, 4, seed=0)
    with Sizes():
        MMCL(1.0, solver=solver, num_iters=30).duals(rows)
    assert max(sizes) == 40 * 40


def test_shown_settings() -> None:
    shown = repr(MMCL(solver="inverse"))
    assert "sigma=0.07, C=1.0, reg=0.1, solver='inverse'" in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, r"sigma: .*above 0, got 0\.0"),
        ({"C": -1}, r"C: .*above 0, got -1"),
        ({"C": math.nan}, r"C: .*got nan"),
        ({"reg": 0}, r"reg: .*above 0, got 0"),
        ({"solver": "newton"}, r"solver: expected one of 'pgd', 'inverse', got 'newton'"),
        ({"num_iters": 0}, r"num_iters: .*at least 1, got 0"),
        ({"num_iters": 1.5}, r"num_iters: expected a whole number, got 1\.5"),
        ({"eta": -0.1}, r"eta: .*above 0, got -0\.1"),
        ({"stop_condition": -1e-3}, r"stop_condition: .*at least 0, got -0\.001"),
    ],
    ids=str,
)
def test_refuses_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        MMCL(**settings)  # type: ignore[arg-type]


def test_refuses_views() -> None:
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"^z2: expected width 3, as z1 has"):
        MMCL()(z, torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"^z2: expected 4 rows, as z1 has, got 3"):
        MMCL()(z, z[:3])
    with pytest.raises(ValueError, match=r"^z1: expected finite embeddings, got a non-finite value in row 0"):
        MMCL()(torch.full((4, 3), math.inf), z)
