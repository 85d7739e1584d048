"""i-Mix and Un-Mix are their papers' mixtures and losses, value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from tests import references
from tests.contrasts import Case, random_rows
from undimix_plugins import HCL, UnDiMix, Uniform, Weighting, in_batch_negatives, info_nce, two_views
from undimix_plugins.methods.mixing import IMix, Mixed, UnMix, _span

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def batch(n: int, *, bank: int = 0, seed: int = 0, width: int = 5) -> tuple[Tensor, Tensor, Tensor, Mixed]:
    """Raw queries, keys and a bank, and what the queries' inputs would be mixed of."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * n + bank, width, generator=generator, dtype=torch.float64)
    lam = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64) / 2
    mixed = Mixed(torch.empty(n, 0), torch.randperm(n, generator=generator), lam)
    return rows[:n].requires_grad_(), rows[n : 2 * n].requires_grad_(), rows[2 * n :], mixed


def slow_n_pair(queries: Tensor, keys: Tensor, bank: Tensor, mixed: Mixed, t: float) -> Tensor:
    """The paper's equation, one mixed input and one key at a time."""
    q, pool = normalize(queries, dim=1), normalize(torch.cat([keys, bank]), dim=1)
    losses = []
    for i in range(len(q)):
        exponentials = [(q[i] @ k / t).exp() for k in pool]
        total = sum(exponentials[1:], start=exponentials[0])
        own, other = (-(exponentials[j] / total).log() for j in (i, int(mixed.permutation[i])))
        losses.append(mixed.lam[i] * own + (1 - mixed.lam[i]) * other)
    return torch.stack(losses).mean()


def authors_n_pair(queries: Tensor, keys: Tensor, bank: Tensor, mixed: Mixed, t: float) -> Tensor:
    """As the authors' criterion has it: cross entropies of the same logits with two labels."""
    logits = normalize(queries, dim=1) @ normalize(torch.cat([keys, bank]), dim=1).T / t
    own, other = (
        cross_entropy(logits, labels, reduction="none") for labels in (torch.arange(len(queries)), mixed.permutation)
    )
    return (mixed.lam * own + (1 - mixed.lam) * other).mean()


@pytest.mark.parametrize("t", [1.0, 0.2])
@pytest.mark.parametrize("entries", [0, 6], ids=["n-pair", "bank"])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_i_mix_is_the_papers_loss(n: int, entries: int, t: float) -> None:
    queries, keys, bank, mixed = batch(n, bank=entries, seed=n)
    ours = IMix().n_pair(queries, keys, mixed, temperature=t, bank=bank if entries else None)
    gradients = torch.autograd.grad(ours, [queries, keys])
    for reference in (slow_n_pair, authors_n_pair):
        expected = reference(queries, keys, bank, mixed, t)
        torch.testing.assert_close(ours, expected, **EXACT)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, [queries, keys]), **EXACT)


@pytest.mark.parametrize("method", [UnDiMix(), UnDiMix(mixing="linear", hardness=0.5), HCL(0.5, 0.0)], ids=repr)
@pytest.mark.parametrize("entries", [0, 6], ids=["n-pair", "bank"])
def test_i_mix_with_weighted_negatives(entries: int, method: Weighting) -> None:
    """Weights of the negatives of either label; the other label's key is among them."""
    n, t = 5, 0.5
    queries, keys, bank, mixed = batch(n, bank=entries)
    q, pool = normalize(queries, dim=1), normalize(torch.cat([keys, bank]), dim=1)
    total = torch.zeros((), dtype=torch.float64)
    for positive, share in ((list(range(n)), mixed.lam), (mixed.permutation.tolist(), 1 - mixed.lam)):
        for i in range(n):  # an anchor's weights depend on the whole batch, its loss is read alone
            case = Case(q, pool[positive], pool, t, [-1] * n, [[j] for j in positive], True)
            only = Case(q[[i]], pool[[positive[i]]], pool, t, [-1], [[positive[i]]], True)
            if isinstance(method, UnDiMix):
                its = {(0, j): weight for (k, j), weight in references.weights_of(case, method).items() if k == i}
                loss = references.info_nce(only, its)
            else:
                loss, _ = references.hcl(only, 0.5, 0.0)
            total = total + share[i] * loss / n
    ours = IMix().n_pair(queries, keys, mixed, temperature=t, weighting=method, bank=bank if entries else None)
    torch.testing.assert_close(ours, total, rtol=1e-8, atol=1e-8)
    expected = torch.autograd.grad(total, [queries, keys])
    torch.testing.assert_close(torch.autograd.grad(ours, [queries, keys]), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("weighting", [None, UnDiMix()], ids=["plain", "UnDiMix"])
def test_unmixed_inputs_have_the_plain_loss(weighting: Weighting | None) -> None:
    queries, keys, _, mixed = batch(6)
    ours = IMix().n_pair(queries, keys, mixed._replace(lam=torch.ones(())), weighting=weighting)
    contrast = in_batch_negatives(normalize(queries, dim=1), normalize(keys, dim=1), 0.2)
    torch.testing.assert_close(ours, info_nce(contrast, weighting or Uniform()), **EXACT)


def test_i_mix_gradcheck() -> None:
    queries, keys, bank, mixed = batch(4, bank=3)
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def loss(q: Tensor, k: Tensor, t: Tensor) -> Tensor:
        return IMix().n_pair(q, k, mixed, temperature=t, bank=bank)

    assert torch.autograd.gradcheck(loss, (queries, keys, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_i_mix_in_other_dtypes(dtype: torch.dtype) -> None:
    queries, keys, _, mixed = (rows.to(dtype) if isinstance(rows, Tensor) else rows for rows in batch(7))
    ours = IMix().n_pair(queries, keys, mixed)
    assert ours.dtype == torch.float32
    expected = slow_n_pair(queries.double(), keys.double(), keys[:0].double(), mixed, 0.2)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


class Queue(nn.Module):
    """A criterion with a memory bank: MoCo's, which takes the keys in after the loss."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.register_buffer("queue", random_rows(entries, 5, seed=9))

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        q, k, queue = normalize(queries, dim=1), normalize(keys, dim=1), self.queue.clone()
        self.queue.copy_(torch.cat([k.detach(), queue])[: len(queue)])
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / 0.2
        return cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def simclr(first: Tensor, second: Tensor) -> Tensor:
    return info_nce(two_views(normalize(first, dim=1), normalize(second, dim=1), 0.3), UnDiMix())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_un_mix_is_the_authors_loss_with_a_queue(n: int) -> None:
    """Their three cross entropies are against one and the same queue, which then takes the keys in once."""
    queries, keys, _, mixed = batch(n, seed=n)
    mixed_queries = random_rows(n, 5, seed=3).requires_grad_()
    mixed = mixed._replace(lam=torch.tensor(0.3, dtype=torch.float64))
    criterion = Queue(7)
    queue, rows = criterion.queue.clone(), (queries, mixed_queries, keys)
    ours = UnMix().loss(criterion, *rows, mixed)

    q, q_mixed, k = (normalize(part, dim=1) for part in rows)
    losses = []
    for anchors in (q, q_mixed, q_mixed.flip(0)):
        each = []
        for i in range(n):
            positive = (anchors[i] @ k[i] / 0.2).exp()
            each.append(-(positive / (positive + sum((anchors[i] @ entry / 0.2).exp() for entry in queue))).log())
        losses.append(torch.stack(each).mean())
    expected = losses[0] + 0.3 * losses[1] + 0.7 * losses[2]
    torch.testing.assert_close(ours, expected, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(ours, rows), torch.autograd.grad(expected, rows), **EXACT)
    torch.testing.assert_close(criterion.queue, torch.cat([k.detach(), queue])[:7], **EXACT)


def test_convex_sum_of_any_criterion() -> None:
    queries, keys, _, mixed = batch(6)
    mixed = mixed._replace(lam=torch.tensor(0.8, dtype=torch.float64))
    permuted = torch.stack([keys[j] for j in mixed.permutation.tolist()])
    expected = 0.8 * simclr(queries, keys) + 0.2 * simclr(queries, permuted)
    torch.testing.assert_close(IMix(shared=True).loss(simclr, queries, keys, mixed), expected, **EXACT)

    criterion, twin = Queue(9), Queue(9)
    ours = IMix(shared=True).loss(criterion, queries, keys, mixed)
    before = twin.queue.clone()
    other = twin(queries, permuted)
    twin.queue.copy_(before)
    torch.testing.assert_close(ours, 0.8 * twin(queries, keys) + 0.2 * other, **EXACT)
    torch.testing.assert_close(criterion.queue, twin.queue, **EXACT)  # the keys are in it once, in their order

    # Where a call raises, the first or the last, the queue is as it was.
    for good in (0, 1):
        one, other = [queries, queries[:, :4]] if good else [queries[:, :4], queries]
        with pytest.raises(RuntimeError):
            UnMix().loss(criterion, one, other, keys, mixed)
        torch.testing.assert_close(criterion.queue, twin.queue, **EXACT)

    mixed_queries = random_rows(6, 5, seed=3)
    expected = simclr(queries, keys) + 0.8 * simclr(mixed_queries, keys) + 0.2 * simclr(mixed_queries.flip(0), keys)
    torch.testing.assert_close(UnMix().loss(simclr, queries, mixed_queries, keys, mixed), expected, **EXACT)


@given(st.integers(1, 9), st.sampled_from([(3,), (1, 4, 6), (2, 3, 5, 7)]), st.integers(0, 1000), st.booleans())
def test_mixup(n: int, shape: tuple[int, ...], seed: int, shared: bool) -> None:
    torch.manual_seed(seed)
    inputs = torch.rand(n, *shape, dtype=torch.float64)
    mixed = IMix(shared=shared)(inputs)
    assert sorted(mixed.permutation.tolist()) == list(range(n))
    assert mixed.lam.shape == (() if shared else (n,))
    assert ((mixed.lam >= 0.5) & (mixed.lam <= 1)).all()
    for i, j in enumerate(mixed.permutation.tolist()):
        lam = float(mixed.lam if shared else mixed.lam[i])
        torch.testing.assert_close(mixed.inputs[i], lam * inputs[i] + (1 - lam) * inputs[j], **EXACT)


@given(st.integers(1, 9), st.sampled_from([(4, 6), (1, 5, 5), (3, 9, 2)]), st.integers(0, 1000), st.booleans())
def test_cutmix(n: int, shape: tuple[int, ...], seed: int, reverse: bool) -> None:
    """A box of one place in all images, outside of which they are their own; lam is the share outside."""
    torch.manual_seed(seed)
    inputs = torch.arange(n, dtype=torch.float32).reshape(-1, *[1] * len(shape)) + torch.zeros(shape)
    mixed = UnMix(P=0.0)(inputs) if reverse else IMix(kind="cutmix")(inputs)
    others = mixed.permutation.tolist()
    assert others == list(range(n))[::-1] if reverse else sorted(others) == list(range(n))
    assert mixed.lam.shape == ()
    assert reverse or mixed.lam >= 0.5
    marks = [image != i for i, image in enumerate(mixed.inputs) if others[i] != i]
    for box in marks:
        assert torch.equal(box, marks[0])
        flat = box.reshape(-1, *shape[-2:])
        height, width = flat.any(dim=2).any(dim=0), flat.any(dim=1).any(dim=0)
        assert torch.equal(box, (height[:, None] & width).expand(shape))
        for side in (height, width):
            places = side.nonzero()[:, 0].tolist()
            assert not places or places == list(range(places[0], places[-1] + 1))  # without a gap
        assert float(mixed.lam) == pytest.approx(1 - float(box.double().mean()), abs=1e-6)
    for i, j in enumerate(others):
        assert set(mixed.inputs[i].flatten().tolist()) <= {float(i), float(j)}


@pytest.mark.parametrize("length", [1, 2, 7, 32])
def test_span_is_the_authors(length: int) -> None:
    for seed in range(20):
        share = torch.rand((), generator=torch.Generator().manual_seed(seed)).sqrt()
        torch.manual_seed(seed)
        marks = _span(length, share)
        torch.manual_seed(seed)
        centre, cut = int(torch.randint(length, ())), int(length * float(share))
        first, last = (min(max(edge, 0), length) for edge in (centre - cut // 2, centre + cut // 2))
        assert marks.tolist() == [first <= place < last for place in range(length)]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_lam_has_its_distribution(alpha: float) -> None:
    """The share of draws below a few places, against the Beta distribution's density summed up."""
    torch.manual_seed(0)
    inputs = torch.zeros(4000, 1)
    of_i_mix = IMix(alpha)(inputs).lam
    of_un_mix = torch.stack([UnMix(alpha, P=1.0)(inputs[:2]).lam for _ in range(4000)])
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = (grid * (1 - grid)) ** (alpha - 1)
    density /= density.sum()
    for place in (0.1, 0.3, 0.5, 0.6, 0.9):
        below = float(density[grid < place].sum())
        assert float((of_un_mix < place).double().mean()) == pytest.approx(below, abs=0.03)
        larger = float(density[(grid < place) & (grid > 1 - place)].sum())
        assert float((of_i_mix < place).double().mean()) == pytest.approx(larger, abs=0.03)


def test_un_mix_mixes_whole_images_with_probability_p() -> None:
    torch.manual_seed(0)
    inputs = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    whole = [len(UnMix(P=0.3)(inputs).inputs[0].unique()) == 1 for _ in range(1000)]
    empty = 1 / 8  # about how many boxes are too small for a pixel, and show nothing
    assert 0.3 < sum(whole) / 1000 < 0.3 + 2 * empty
    assert all(len(UnMix(P=1.0)(inputs).inputs[0].unique()) == 1 for _ in range(100))


def test_whole_images_mixed_with_the_reversed_batch() -> None:
    inputs = torch.rand(5, 3, dtype=torch.float64)
    mixed = UnMix(P=1.0)(inputs)
    assert mixed.permutation.tolist() == [4, 3, 2, 1, 0]
    for i in range(5):
        expected = float(mixed.lam) * inputs[i] + (1 - float(mixed.lam)) * inputs[4 - i]
        torch.testing.assert_close(mixed.inputs[i], expected, **EXACT)


@pytest.mark.parametrize("mix", [IMix(), IMix(kind="cutmix"), IMix(shared=True), UnMix(), UnMix(P=0.0)], ids=repr)
def test_torchs_seed_decides(mix: IMix | UnMix) -> None:
    inputs, drawn = torch.rand(8, 3, 9, 9), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(mix(inputs))
    assert all(torch.equal(one, other) for one, other in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0].inputs, drawn[2].inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mix", [IMix(1e-3), IMix(kind="cutmix"), UnMix(1e3, P=1.0), UnMix(P=0.0)], ids=repr)
def test_dtypes_and_extreme_numbers(mix: IMix | UnMix, dtype: torch.dtype) -> None:
    mixed = mix(torch.rand(64, 2, 5, 5).to(dtype))
    assert mixed.inputs.dtype == dtype
    assert mixed.inputs.isfinite().all()
    assert ((mixed.lam >= 0) & (mixed.lam <= 1)).all()


def test_gradients_reach_inputs() -> None:
    """Hidden layers can be mixed too."""
    inputs = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    for mix in (IMix(), UnMix(P=1.0)):
        mixed = mix(inputs)
        (gradient,) = torch.autograd.grad(mixed.inputs.sum(), inputs)
        lam = mixed.lam.expand(6)
        expected = lam.index_add(0, mixed.permutation, 1 - lam) if isinstance(mix, IMix) else lam + (1 - lam).flip(0)
        torch.testing.assert_close(gradient, expected.to(gradient)[:, None].expand(6, 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IMix(alpha=0.0), r"alpha: .*above 0, got 0\.0"),
        (lambda: IMix(alpha=math.inf), r"alpha: .*got inf"),
        (lambda: IMix(kind="cut"), r"kind: expected one of 'mixup', 'cutmix', got 'cut'"),
        (lambda: UnMix(beta=-1.0), r"beta: .*above 0, got -1\.0"),
        (lambda: UnMix(P=-0.5), r"P: .*at least 0, got -0\.5"),
        (lambda: UnMix(P=1.5), r"P: expected a number from 0 to 1, got 1\.5"),
        (
            lambda: IMix()(torch.zeros(4, 3, dtype=torch.uint8)),
            r"inputs: .*floating point .*\[n, \.\.\.\], got torch.uint8",
        ),
        (lambda: IMix()([1.0]), r"inputs: .*got list"),
        (lambda: IMix()(torch.zeros(0, 3)), r"inputs: expected at least one, got shape \[0, 3\]"),
        (lambda: IMix(kind="cutmix")(torch.zeros(4, 3)), r"inputs: .*\[n, \.\.\., height, width\], got .*\[4, 3\]"),
        (lambda: UnMix()(torch.zeros(4, 3)), r"inputs: .*\[n, \.\.\., height, width\], got .*\[4, 3\]"),
    ],
)
def test_refuses(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()  # type: ignore[operator]


def test_losses_refuse() -> None:
    queries, keys, bank, mixed = batch(4, bank=3)
    with pytest.raises(ValueError, match=r"^mixed: expected one lam for all.* got 4; n_pair takes these"):
        IMix().loss(simclr, queries, keys, mixed)
    one = mixed._replace(lam=torch.tensor(0.7))
    with pytest.raises(ValueError, match=r"^keys: expected 4 rows, as the mixed batch has, got 3"):
        IMix().loss(simclr, queries, keys[:3], one)
    with pytest.raises(ValueError, match=r"^mixed_queries: expected 4 rows, as the mixed batch has, got 2"):
        UnMix().loss(simclr, queries, queries[:2], keys, one)
    with pytest.raises(ValueError, match=r"^mixed: expected 3 rows, as queries has, got 4"):
        IMix().n_pair(queries[:3], keys[:3], mixed)
    with pytest.raises(ValueError, match=r"^bank: expected width 5, as keys has, got shape \[3, 4\]"):
        IMix().n_pair(queries, keys, mixed, bank=bank[:, :4])
    with pytest.raises(ValueError, match=r"^temperature: "):
        IMix().n_pair(queries, keys, mixed, temperature=0.0)
    with pytest.raises(TypeError, match=r"^weighting: expected an instance of Weighting"):
        IMix().n_pair(queries, keys, mixed, weighting=UnDiMix)  # type: ignore[arg-type]
