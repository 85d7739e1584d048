"""iSogCLR's loss and temperatures are those of the authors' algorithm, one sample and one negative at a time."""

from __future__ import annotations

import copy
import io
import math
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tests.contrasts import make_every_look_cost, random_rows
from undimix_plugins import ISogCLR

EXACT = {"rtol": 1e-10, "atol": 1e-10}
STATE = ("tau", "log_s", "u")


class Published:
    """Algorithm 1 with the authors' code for images: plain numbers in dictionaries, exponentials as they stand."""

    def __init__(
        self, rho: float, gamma: float, tau: float, least: float, most: float, eta: float, beta: float
    ) -> None:
        self.rho, self.gamma, self.start, self.eta, self.beta = rho, gamma, tau, eta, beta
        self.least, self.most = least, most
        self.tau: dict[int, float] = {}
        self.s: dict[int, float] = {}
        self.u: dict[int, float] = {}

    def __call__(self, z0: Tensor, z1: Tensor, index: list[int]) -> Tensor:
        views = [normalize(z0, dim=1), normalize(z1, dim=1)]
        total, n = torch.zeros((), dtype=z0.dtype), len(index)
        steps = {}
        for i, sample in enumerate(index):
            tau = self.tau.get(sample, self.start)
            averages, slopes = [], []
            for side in (0, 1):
                anchor, positive = views[side][i], views[side][i] @ views[1 - side][i]
                cosines = [anchor @ view[j] for view in views for j in range(n) if j != i]
                terms = [math.exp(c.item() / tau) for c in cosines]
                g = sum(terms) / len(terms)
                s = (1 - self.gamma) * self.s[sample] + self.gamma * g if sample in self.s else g
                weights = [term / s for term in terms]
                total = total + sum(w * c for w, c in zip(weights, cosines, strict=True)) / len(terms) - positive
                drift = sum(w * c.item() / tau for w, c in zip(weights, cosines, strict=True)) / len(terms)
                averages.append(s)
                slopes.append(math.log(s) + self.rho - drift)
            slope = max(-3.0, min(3.0, sum(slopes) / 2))
            u = (1 - self.beta) * self.u.get(sample, 0.0) + self.beta * slope
            steps[sample] = (sum(averages) / 2, u, max(self.least, min(self.most, tau - self.eta * u)))
        for sample, (s, u, tau) in steps.items():
            self.s[sample], self.u[sample], self.tau[sample] = s, u, tau
        return total / n


def views(n: int, seed: int, width: int = 5) -> tuple[Tensor, Tensor]:
    z0 = 3 * random_rows(n, width, seed=seed, unit=False)
    z1 = z0 + 0.7 * random_rows(n, width, seed=seed + 1000)
    return z0.requires_grad_(), z1.requires_grad_()


def in_float64(size: int, *settings: float, **further: float) -> ISogCLR:
    """Whose first temperatures are not those of float32."""
    criterion = ISogCLR(size, *settings, **further).double()
    criterion.tau.fill_(settings[2] if settings else 0.1)
    return criterion


def batches(count: int, n: int, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each with samples that others have had before, and some that are new."""
    draw = torch.Generator().manual_seed(count)
    return [(*views(n, seed), torch.randperm(size, generator=draw)[:n]) for seed in range(count)]


SETTINGS = {
    "authors-cifar": (0.4, 0.8, 0.1, 0.05, 1.0, 0.03, 0.5),
    "authors-class": (6.0, 0.8, 0.07, 0.05, 1.0, 0.001, 0.9),
    "no-memory": (0.2, 1.0, 0.3, 0.05, 0.5, 0.1, 1.0),
    "long-memory": (0.0, 0.1, 0.2, 0.1, 0.25, 0.2, 0.2),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_is_the_published_algorithm(settings: tuple[float, ...]) -> None:
    """Losses, gradients and states over steps in which samples come back."""
    ours, published = in_float64(12, *settings), Published(*settings)
    for z0, z1, index in batches(6, 5, 12):
        loss, expected = ours(z0, z1, index), published(z0, z1, index.tolist())
        torch.testing.assert_close(loss, expected, **EXACT)
        torch.testing.assert_close(
            torch.autograd.grad(loss, (z0, z1)), torch.autograd.grad(expected, (z0, z1)), **EXACT
        )
        for sample in published.tau:
            assert ours.tau[sample].item() == pytest.approx(published.tau[sample], abs=1e-10)
            assert ours.log_s[sample].item() == pytest.approx(math.log(published.s[sample]), abs=1e-10)
            assert ours.u[sample].item() == pytest.approx(published.u[sample], abs=1e-10)
    unseen = [sample for sample in range(12) if sample not in published.tau]
    assert (ours.log_s[unseen] == -math.inf).all()
    torch.testing.assert_close(ours.tau[unseen], torch.full((len(unseen),), settings[2], dtype=torch.float64))


def test_the_settings_come_by_both_bounds_and_the_clip() -> None:
    low, high = ISogCLR(5, 6.0, 1.0, eta=1.0), ISogCLR(5, 0.0, 1.0, 0.05, eta=3.0)
    z0, z1 = views(5, seed=0)
    for _ in range(3):
        low(z0, z1, torch.arange(5))
        high(z0, z1, torch.arange(5))
    torch.testing.assert_close(low.tau, torch.full((5,), 0.05))
    torch.testing.assert_close(high.tau, torch.full((5,), 1.0))
    assert low.u.max() <= 3


def test_a_temperature_stops_where_the_divergence_is_rho() -> None:
    """What `rho` is: KL of the softmax over an anchor's negatives from uniform weights, in the mean of both views."""
    criterion = ISogCLR(20, rho=0.3, tau_min=0.01, tau_max=2.0, eta=0.02, gamma=1.0, beta_u=1.0).double()
    z0, z1 = views(20, seed=3)
    for _ in range(300):
        criterion(z0, z1, torch.arange(20))
    rows = normalize(torch.cat([z0, z1]).detach(), dim=1)
    negative = ~torch.eye(20, dtype=torch.bool).repeat(2, 2)
    for i in range(20):
        divergences = []
        for anchor in (i, i + 20):
            p = (rows[anchor] @ rows[negative[anchor]].T / criterion.tau[i]).softmax(dim=0)
            divergences.append((p * (p * 38).log()).sum().item())
        assert sum(divergences) / 2 == pytest.approx(0.3, abs=1e-3)


@given(
    n=st.integers(1, 6),
    size=st.integers(6, 9),
    seed=st.integers(0, 10**6),
    rho=st.floats(0, 10),
    gamma=st.floats(0.01, 1),
    bounds=st.tuples(st.floats(0.001, 1.0), st.floats(0.001, 1.0), st.floats(0.001, 1.0)).map(sorted),
    eta=st.floats(0, 10),
    beta=st.floats(0.01, 1),
    repeats=st.booleans(),
)
def test_always_finite_and_within_bounds(
    n: int,
    size: int,
    seed: int,
    rho: float,
    gamma: float,
    bounds: list[float],
    eta: float,
    beta: float,
    repeats: bool,
) -> None:
    """In float32, at temperatures at which exponentials overflow."""
    least, start, most = bounds
    criterion = ISogCLR(size, rho, gamma, start, least, most, eta, beta)
    draw = torch.Generator().manual_seed(seed)
    for step in range(3):
        z0, z1 = (z.detach().float().requires_grad_() for z in views(n, seed + step))
        index = torch.randint(size, (n,), generator=draw) if repeats else torch.randperm(size, generator=draw)[:n]
        before = copy.deepcopy(criterion.state_dict())
        loss = criterion(z0, z1, index)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (z0, z1)))
        assert loss.isfinite()
        assert (criterion.tau >= least * (1 - 1e-6)).all()
        assert (criterion.tau <= most * (1 + 1e-6)).all()
        assert criterion.u.abs().max() <= 3 + 1e-5
        others = [sample for sample in range(size) if sample not in index.tolist()]
        for name in STATE:
            assert torch.equal(getattr(criterion, name)[others], before[name][others])


def test_the_order_of_samples_does_not_matter() -> None:
    one, other = ISogCLR(9).double(), ISogCLR(9).double()
    z0, z1 = views(6, seed=1)
    index, order = torch.tensor([8, 0, 3, 5, 1, 7]), torch.tensor([5, 2, 0, 1, 4, 3])
    for _ in range(3):
        torch.testing.assert_close(one(z0, z1, index), other(z1[order], z0[order], index[order]), **EXACT)
    for name in STATE:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **EXACT)


def test_gradcheck() -> None:
    """The gradient of a first call is that of the cosines' sum with the softmax held as it is."""
    criterion = in_float64(4)
    index = torch.arange(4)
    z0, z1 = views(4, seed=2)
    rows = normalize(torch.cat([z0, z1]), dim=1).detach()
    negative = ~torch.eye(4, dtype=torch.bool).repeat(2, 2)
    p = (rows @ rows.T / 0.1).masked_fill(~negative, -math.inf).softmax(dim=1)

    def linear(a: Tensor, b: Tensor) -> Tensor:
        unit = normalize(torch.cat([a, b]), dim=1)
        return ((p * (unit @ unit.T)).sum() - 2 * (unit[:4] * unit[4:]).sum()) / 4

    assert torch.autograd.gradcheck(linear, (z0, z1))
    got = torch.autograd.grad(criterion(z0, z1, index), (z0, z1))
    torch.testing.assert_close(got, torch.autograd.grad(linear(z0, z1), (z0, z1)), **EXACT)


def test_a_sample_that_is_in_a_batch_twice() -> None:
    """It is no negative of itself, and its state is the mean of both updates."""
    z0, z1 = views(4, seed=4)
    criterion, index = in_float64(9), torch.tensor([2, 7, 2, 5])
    criterion(z0, z1, index)
    rows = normalize(torch.cat([z0, z1]).detach(), dim=1)
    negatives = {0: [1, 3, 5, 7], 2: [1, 3, 5, 7]}
    logs = []
    for i, others in negatives.items():
        sums = [(rows[at] @ rows[others].T / 0.1).exp().mean() for at in (i, i + 4)]
        logs.append(math.log(sum(sums) / 2))
    assert criterion.log_s[2].item() == pytest.approx(sum(logs) / 2, abs=1e-10)
    one = ISogCLR(9)
    assert one(z0[:1], z1[:1], torch.tensor([3])) == 0
    assert one.log_s[3] == -math.inf


def test_an_evaluation_and_broken_batches_leave_the_state() -> None:
    criterion = ISogCLR(6)
    z0, z1 = (z.detach().float() for z in views(6, seed=5))
    index = torch.arange(6)
    before = copy.deepcopy(criterion.state_dict())
    criterion(z0, z1, index)  # without gradient
    with torch.no_grad():
        criterion(z0.requires_grad_(), z1, index)
    criterion.eval()(z0, z1, index)
    criterion.train()
    with pytest.raises(ValueError, match="z1: expected finite embeddings"):
        criterion(z0, z1.log(), index)
    torch.testing.assert_close(criterion.state_dict(), before, rtol=0, atol=0)
    criterion(z0, z1, index)
    assert not torch.equal(criterion.tau, before["tau"])


def test_not_finite_on_a_device_whose_values_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    make_every_look_cost(monkeypatch)
    criterion = ISogCLR(6)
    z0, z1 = (z.detach().float() for z in views(6, seed=5))
    before = copy.deepcopy(criterion.state_dict())
    z0[2] = math.inf
    assert criterion(z0.requires_grad_(), z1, torch.arange(6)).isnan()
    torch.testing.assert_close(criterion.state_dict(), before, rtol=0, atol=0)


def test_a_checkpoint_goes_on_bit_for_bit() -> None:
    whole, begun, resumed = ISogCLR(12), ISogCLR(12), ISogCLR(12)
    given_batches = [(z0.detach().float().requires_grad_(), z1.float(), at) for z0, z1, at in batches(6, 5, 12)]
    losses = [whole(*batch) for batch in given_batches]
    for batch in given_batches[:3]:
        begun(*batch)
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    assert [resumed(*batch) for batch in given_batches[3:]] == losses[3:]
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert set(whole.state_dict()) == set(STATE)
    assert list(whole.parameters()) == []


def test_precisions() -> None:
    """float32 is float64 but for rounding; half precision is compared in float32; the state stays out of it."""
    double, single = ISogCLR(8).double(), ISogCLR(8)
    z0, z1 = views(6, seed=6)
    index = torch.arange(6, dtype=torch.uint8)
    for _ in range(3):
        got = single(z0.float(), z1.float(), index)
        torch.testing.assert_close(got.double(), double(z0, z1, index), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single.tau.double(), double.tau, rtol=1e-5, atol=1e-6)
    halved = ISogCLR(8).to(torch.bfloat16)
    assert {buffer.dtype for buffer in halved.buffers()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss = halved(z0.bfloat16(), z1.bfloat16(), index)
    assert loss.dtype == torch.float32
    assert (halved.tau[:6] != 0.1).all()


def test_the_compiler_takes_it_whole() -> None:
    torch.compiler.reset()
    eager, compiled = ISogCLR(8).double(), torch.compile(ISogCLR(8).double(), fullgraph=True, backend="eager")
    for seed in range(3):
        z0, z1 = views(6, seed=seed)
        index = torch.arange(6)
        torch.testing.assert_close(compiled(z0, z1, index), eager(z0, z1, index), **EXACT)
    torch.testing.assert_close(compiled._orig_mod.state_dict(), eager.state_dict(), **EXACT)


def on_a_rank(rank: int, ranks: int, root: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/init", rank=rank, world_size=ranks)
    criterion, results = ISogCLR(12).double(), []
    for z0, z1, index in batches(3, 8, 12):
        own = slice(4 * rank, 4 * rank + 4)
        loss = criterion(z0[own], z1[own], index[own])
        results.append((loss.detach(), *(gradient / ranks for gradient in torch.autograd.grad(loss, (z0, z1)))))
    try:
        criterion(z0[: 4 - rank], z1[: 4 - rank], index[: 4 - rank])
        refusal = "nothing"
    except ValueError as error:
        refusal = str(error)
    torch.save({"results": results, "state": criterion.state_dict(), "refusal": refusal}, f"{root}/{rank}.pt")
    time.sleep(0.5)  # with torch 2.4, a group that ends while its threads drop their last tensors waits for ever
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Losses, gradients as DistributedDataParallel averages them, and the state on each."""
    mp.spawn(on_a_rank, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    criterion = ISogCLR(12).double()
    for step, (z0, z1, index) in enumerate(batches(3, 8, 12)):
        loss = criterion(z0, z1, index)
        for rank in ranks:
            torch.testing.assert_close(rank["results"][step][0], loss.detach(), **EXACT)
        for at, expected in enumerate(torch.autograd.grad(loss, (z0, z1)), start=1):
            torch.testing.assert_close(sum(rank["results"][step][at] for rank in ranks), expected, **EXACT)
    for rank in ranks:
        torch.testing.assert_close(rank["state"], criterion.state_dict(), **EXACT)
        assert "z0: expected as many rows on every process" in rank["refusal"]


def test_shown_settings() -> None:
    expected = "size=9, rho=0.4, gamma=0.8, tau_min=0.05, tau_max=1.0, eta=0.03, beta_u=0.5, grad_clip=3.0"
    assert expected in repr(ISogCLR(9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"size: .*at least 1, got 0"),
        ({"size": 2.5}, r"size: expected a whole number, got 2\.5"),
        ({"rho": -0.1}, r"rho: .*at least 0, got -0\.1"),
        ({"gamma": 0.0}, r"gamma: .*above 0, got 0\.0"),
        ({"gamma": 1.5}, r"gamma: expected a number above 0 and at most 1, got 1\.5"),
        ({"beta_u": 2}, r"beta_u: expected a number above 0 and at most 1, got 2"),
        ({"tau_min": 0.0}, r"tau_min: .*above 0, got 0\.0"),
        (
            {"tau_init": 0.01},
            r"tau_init: expected a temperature from tau_min to tau_max, got tau_init=0\.01, tau_min=0",
        ),
        ({"tau_max": 0.01}, "tau_init: expected a temperature from tau_min to tau_max, got"),
        ({"eta": math.inf}, r"eta: .*got inf"),
        ({"grad_clip": 0}, r"grad_clip: .*above 0, got 0"),
    ],
    ids=str,
)
def test_refuses_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ISogCLR(**({"size": 8} | settings))  # type: ignore[arg-type]


def test_refuses_what_does_not_fit() -> None:
    criterion, rows = ISogCLR(8), torch.randn(3, 4)
    for index, message in {
        None: r"None; ISogCLR learns a temperature for each sample, so the data set has to give its index",
        (0, 1): r"torch.int64 \[2\]",
        (0.0, 1.0, 2.0): r"torch.float32 \[3\]",
        "012": "str",
    }.items():
        given_index = torch.tensor(index) if isinstance(index, tuple) else index
        expected = rf"^index: expected the place of each sample in the data set, integers of shape \[3\], got {message}"
        with pytest.raises(ValueError, match=expected):
            criterion(rows, rows, given_index)  # type: ignore[arg-type]
    for at in (-1, 8):
        with pytest.raises(ValueError, match=rf"^index: expected numbers from 0 to 7, for size=8, got .*{abs(at)}"):
            criterion(rows, rows, torch.tensor([0, at, 2]))
    with pytest.raises(ValueError, match=r"^z1: expected 3 rows, as z0 has, got 2"):
        criterion(rows, rows[:2], torch.arange(3))
    with pytest.raises(ValueError, match=r"^index: expected index, embeddings and loss on one device, got meta, cpu"):
        criterion(rows, rows, torch.arange(3, device="meta"))
