"""AdCo's loss and its pool's steps are the published ones, and a checkpoint goes on as if nothing had been."""

from __future__ import annotations

import copy
import io
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from tests.contrasts import random_rows
from undimix_plugins import HCL, Contrast, UnDiMix, Uniform, Weighting, importance_weights, watch
from undimix_plugins.methods.adco import AdCo

EXACT = {"rtol": 0, "atol": 1e-10}


def adversary(n_pool: int, width: int = 5, weighting: Weighting | None = None, **settings: float) -> AdCo:
    module = AdCo(width, n_pool, settings.pop("temperature", 0.2), weighting, **settings).double()  # type: ignore[arg-type]
    module.pool.copy_(3 * random_rows(n_pool, width, seed=n_pool, unit=False))
    return module


def batch(n: int, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    query = 2 * random_rows(n, width, seed=seed, unit=False)
    return query.requires_grad_(), (query.detach() + random_rows(n, width, seed=seed + 1)).requires_grad_()


def published(query: Tensor, key: Tensor, pool: Tensor, temperature: float) -> Tensor:
    """One query at a time: its key, the other keys, the pool."""
    losses = []
    for i in range(len(query)):
        q = query[i] / query[i].norm()
        terms = [(q @ (k / k.norm()) / temperature).exp() for k in key.detach()]
        negatives = [(q @ (r / r.norm()) / temperature).exp() for r in pool]
        losses.append(-(terms[i] / (sum(terms) + sum(negatives))).log())
    return torch.stack(losses).mean()


def closed_form(query: Tensor, key: Tensor, pool: Tensor, temperature: float) -> Tensor:
    """The gradient as the paper's section 3.3 has it, through the rows' normalisation, one row at a time."""
    n = len(query)
    queries, keys, units = (normalize(rows.detach(), dim=1) for rows in (query, key, pool))
    result = torch.zeros_like(pool)
    shares = torch.stack([(torch.cat([keys, units]) @ q / temperature).softmax(dim=0)[n:] for q in queries])
    for j in range(len(pool)):
        pulled = sum(shares[i, j] * queries[i] for i in range(n)) / n
        along = sum(shares[i, j] * (queries[i] @ units[j]) for i in range(n)) / n
        result[j] = (pulled - along * units[j]) / pool[j].norm() / temperature
    return result


@pytest.mark.parametrize("temperature", [0.5, 0.12, 0.02])
@pytest.mark.parametrize(("n", "n_pool"), [(1, 1), (2, 7), (5, 3), (7, 33)])
def test_published_loss_and_gradient(n: int, n_pool: int, temperature: float) -> None:
    module = adversary(n_pool, temperature=temperature)
    query, key = batch(n)
    loss, expected = module(query, key), published(query, key, module.pool, temperature)
    torch.testing.assert_close(loss, expected, **EXACT)
    (want,) = torch.autograd.grad(expected, query)
    loss.backward()
    torch.testing.assert_close(query.grad, want, **EXACT)
    assert key.grad is None


def test_the_authors_logits_have_all_keys() -> None:
    """Cross-entropy of [keys, pool] with the own key as the label."""
    module = adversary(9)
    query, key = batch(4)
    q, k = normalize(query, dim=1), normalize(key.detach(), dim=1)
    logits = torch.cat([q @ k.T, q @ normalize(module.pool, dim=1).T], dim=1) / 0.2
    torch.testing.assert_close(module(query, key), cross_entropy(logits, torch.arange(4)), **EXACT)


@pytest.mark.parametrize("memory_temperature", [0.5, 0.1, 0.02])
@pytest.mark.parametrize(("n", "n_pool"), [(1, 1), (2, 7), (5, 3), (7, 33)])
def test_steps_are_the_published_ones(n: int, n_pool: int, memory_temperature: float) -> None:
    """Several, so that momentum and decay count; as the authors write them and as torch's own optimiser makes them."""
    settings = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-2}
    module = adversary(n_pool, memory_temperature=memory_temperature, **settings)
    pool, velocity = module.pool.clone(), torch.zeros_like(module.pool)
    rows = module.pool.clone().requires_grad_()
    optimiser = torch.optim.SGD([rows], **settings, maximize=True)  # type: ignore[arg-type]
    for seed in range(4):
        query, key = batch(n, seed=10 * seed)
        module.step(query, key)
        gradient = -closed_form(query, key, pool, memory_temperature)
        velocity = 0.9 * velocity + gradient + 1e-2 * pool
        pool = pool - 0.3 * velocity
        optimiser.zero_grad()
        published(query.detach(), key, rows, memory_temperature).backward()
        optimiser.step()
        torch.testing.assert_close(module.pool, pool, **EXACT)
        torch.testing.assert_close(module.velocity, velocity, **EXACT)
        torch.testing.assert_close(module.pool, rows.detach(), **EXACT)
    assert query.grad is None


def test_a_step_makes_the_pool_harder() -> None:
    module = adversary(16, temperature=0.1, memory_temperature=0.1, lr=0.01, weight_decay=0.0)
    query, key = batch(6)
    losses = []
    for _ in range(20):
        losses.append(module(query, key).item())
        module.step(query, key)
    assert all(after > before for before, after in pairwise(losses))


def test_the_order_of_the_two_steps_does_not_matter() -> None:
    """Stepping between the loss and its backward leaves the encoder's gradient as it is."""
    query, key = batch(6)
    before, after = adversary(16), adversary(16)
    loss = before(query, key)
    before.step(query, key)
    (one,) = torch.autograd.grad(loss, query)
    (other,) = torch.autograd.grad(after(query, key), query)
    after.step(query, key)
    assert torch.equal(one, other)
    assert torch.equal(before.pool, after.pool)


@pytest.mark.parametrize("weighting", [UnDiMix(), HCL(beta=1.0, tau_plus=0.0)], ids=["undimix", "hcl"])
def test_weightings_weigh_keys_and_pool(weighting: Weighting) -> None:
    """With what they say of each negative, the encoder's loss is the plain formula; the pool's step stays plain."""
    module, plain = adversary(9, weighting=weighting, temperature=0.5), adversary(9, temperature=0.5)
    query, key = batch(4)
    q, k, n = (normalize(rows.detach(), dim=1) for rows in (query, key, module.pool))
    pool = torch.cat([k, n])
    contrast = Contrast.of(q, k, pool, torch.arange(4)[:, None], 0.5, positives_in_pool=True)
    weights = importance_weights(contrast, weighting)
    terms = weights * (q @ pool.T / 0.5).exp()
    positives = ((q * k).sum(dim=1) / 0.5).exp()
    expected = -(positives / (positives + terms.sum(dim=1))).log().mean()
    torch.testing.assert_close(module(query, key).detach(), expected, **EXACT)
    assert (module(query, key) - plain(query, key)).abs() > 1e-3
    module.step(query, key)
    plain.step(query, key)
    assert torch.equal(module.pool, plain.pool)


def test_observers_see_the_loss_and_not_the_step() -> None:
    module = adversary(9)
    query, key = batch(4)
    seen: list[Contrast] = []
    with watch(lambda contrast, weighting: seen.append(contrast)):
        module(query, key)
        module.step(query, key)
    assert len(seen) == 1


def test_gradcheck() -> None:
    module = adversary(6)
    query, key = batch(3)
    assert torch.autograd.gradcheck(lambda q: module(q, key.detach()), (query,))


def test_a_checkpoint_goes_on_bit_for_bit() -> None:
    straight, first = AdCo(5, 12, lr=0.5), AdCo(5, 12, lr=0.5)
    first.load_state_dict(straight.state_dict())
    batches = [tuple(rows.detach().float() for rows in batch(4, seed=seed)) for seed in range(6)]
    for query, key in batches:
        straight.step(query, key)
    for query, key in batches[:3]:
        first.step(query, key)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = AdCo(5, 12, lr=0.5)
    second.load_state_dict(torch.load(file))
    for query, key in batches[3:]:
        second.step(query, key)
    assert torch.equal(second.pool, straight.pool)
    assert torch.equal(second.velocity, straight.velocity)
    assert not torch.equal(first.pool, straight.pool)


def test_the_pool_is_no_parameter() -> None:
    """An encoder's optimiser that is given all parameters would lower the loss with it."""
    module = AdCo(5, 12)
    assert list(module.parameters()) == []
    assert set(module.state_dict()) == {"pool", "velocity"}


def test_fill() -> None:
    module = adversary(10, width=4)
    module.step(*batch(3, width=4))
    taken: list[int] = []

    def batches() -> object:
        for seed in range(9):
            taken.append(seed)
            yield 5 * random_rows(4, 4, seed=seed, unit=False)

    module.fill(batches())  # type: ignore[arg-type]
    rows = torch.cat([random_rows(4, 4, seed=seed) for seed in range(3)])[:10]
    torch.testing.assert_close(module.pool, rows, **EXACT)
    assert taken == [0, 1, 2]
    assert torch.equal(module.velocity, torch.zeros_like(rows))


def test_too_few_to_fill_leave_the_pool_as_it_is() -> None:
    module = adversary(10)
    before = module.pool.clone()
    with pytest.raises(ValueError, match=r"^batches: expected at least 10 rows, as the pool has, got 8"):
        module.fill(random_rows(4, 5, seed=seed) for seed in range(2))
    assert torch.equal(module.pool, before)


def test_precisions() -> None:
    """The loss and the step in float32 are those in float64 but for rounding; half precision is compared in float32."""
    double = adversary(33)
    single = AdCo(5, 33, 0.2)
    single.pool.copy_(double.pool)
    query, key = batch(7)
    q, k = query.detach().float(), key.detach().float()
    torch.testing.assert_close(single(q, k).double(), double(query, key).detach(), rtol=1e-5, atol=1e-5)
    for each, (one, other) in ((single, (q, k)), (double, (query, key))):
        each.step(one, other)
    torch.testing.assert_close(single.pool.double(), double.pool, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert single(q.bfloat16(), k.bfloat16()).dtype == torch.float32
        single.step(q.bfloat16(), k.bfloat16())
    assert single.pool.isfinite().all()


def test_a_step_that_fails_leaves_the_pool_and_its_momentum() -> None:
    module = adversary(9)
    query, key = batch(4)
    module.step(query, key)
    before = copy.deepcopy(module.state_dict())
    module.lr = None  # type: ignore[assignment]  # as a schedule might return by mistake
    with pytest.raises(TypeError):
        module.step(query, key)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_no_grad_around_a_step() -> None:
    one, other = adversary(9), adversary(9)
    query, key = batch(4)
    one.step(query, key)
    with torch.no_grad():
        other.step(query, key)
    assert torch.equal(one.pool, other.pool)


def on_a_rank(rank: int, ranks: int, root: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/init", rank=rank, world_size=ranks)
    module = adversary(9)
    query, key = (rows.detach()[4 * rank : 4 * rank + 4] for rows in batch(8))
    loss = module(query, key)
    for _ in range(3):
        module.step(query, key)
    try:
        module(query[: 4 - rank], key[: 4 - rank])
        refusal = "nothing"
    except ValueError as error:
        refusal = str(error)
    torch.save({"loss": loss, "pool": module.pool, "refusal": refusal}, f"{root}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(on_a_rank, (2, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    module = adversary(9)
    query, key = batch(8)
    loss = module(query, key).detach()
    for _ in range(3):
        module.step(query, key)
    torch.testing.assert_close(sum(result["loss"] for result in results) / 2, loss, **EXACT)
    for result in results:
        torch.testing.assert_close(result["pool"], module.pool, **EXACT)
        assert "query: expected as many rows on every process" in result["refusal"]
    assert torch.equal(results[0]["pool"], results[1]["pool"])


def test_shown_settings() -> None:
    assert "width=5, size=9, temperature=0.12, weighting=Uniform(), memory_temperature=0.02, lr=3.0" in repr(AdCo(5, 9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, r"width: .*at least 1, got 0"),
        ({"size": 2.5}, r"size: expected a whole number, got 2\.5"),
        ({"temperature": 0.0}, r"temperature: .*above 0, got 0\.0"),
        ({"memory_temperature": -1.0}, r"memory_temperature: .*above 0, got -1\.0"),
        ({"lr": math.inf}, r"lr: .*got inf"),
        ({"momentum": 1.0}, r"momentum: .*below 1, got 1\.0"),
        ({"weight_decay": -1e-4}, r"weight_decay: .*at least 0, got -0\.0001"),
    ],
    ids=str,
)
def test_refuses_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        AdCo(**({"width": 4, "size": 8} | settings))  # type: ignore[arg-type]


def test_refuses_what_does_not_fit() -> None:
    module = AdCo(4, 8)
    rows = torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"^weighting: "):
        AdCo(4, 8, weighting=Uniform)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^key: expected 3 rows, as query has, got 2"):
        module(rows, rows[:2])
    with pytest.raises(ValueError, match=r"^query: expected width 4, as pool has, got shape \[3, 5\]"):
        module.step(torch.randn(3, 5), torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"^query: expected torch.float32, as pool has, got torch.float64"):
        module(rows.double(), rows.double())
    with pytest.raises(ValueError, match=r"^batches: expected width 4, as pool has"):
        module.fill([torch.randn(8, 5)])
