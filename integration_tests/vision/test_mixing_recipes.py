"""The recipes of i-Mix, Un-Mix and non-semantic negatives train, and a step of each is its method's objective."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import default_collate

from examples._shared.images import digit_views
from examples._shared.images import images as data_set
from undimix_plugins import IMix, UnDiMix, UnMix, undimix
from undimix_plugins.methods.mixing import Mixed

EXAMPLES = Path(__file__).parents[2] / "examples"
Recipe = Callable[[str], ModuleType]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as it is where a script is run
    return importlib.import_module


def views(count: int = 24) -> tuple[Tensor, Tensor]:
    """Two views of real digits, as the recipes' transform makes them."""
    torch.manual_seed(0)
    images, transform = data_set("MNIST", True), digit_views()
    first, second = default_collate([transform(images[i][0]) for i in range(count)])
    return first, second


def step(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    torch.manual_seed(5)
    loss: Tensor = model.training_step((list(batch), None, None), 0)
    torch.manual_seed(5)  # for who works it out again
    return loss


def bank_loss(queries: Tensor, keys: Tensor, bank: Tensor, further: Tensor | None = None) -> Tensor:
    """MoCo's, as its authors wrote it; with further logits [n, k]."""
    q, k = normalize(queries, dim=1), normalize(keys, dim=1)
    parts = [(q * k).sum(dim=1, keepdim=True), q @ bank.T]
    logits = torch.cat(parts if further is None else [*parts, further], dim=1)
    return cross_entropy(logits / 0.2, torch.zeros(len(q), dtype=torch.long))


@pytest.mark.parametrize("name", ["lightly_imix", "lightly_unmix", "lightly_non_semantic"])
def test_recipe_trains(recipe: Recipe, name: str) -> None:
    module = recipe(name)
    start, _, _ = module.train(True, epochs=0, progress=False)
    model, accuracy, _ = module.train(True, max_steps=2, progress=False)
    changed = [not torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters(), strict=True)]
    assert any(changed)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert accuracy > 0.5  # of features that are all but untrained; by chance .1


def test_i_mix_step(recipe: Recipe) -> None:
    module = recipe("lightly_imix")
    torch.manual_seed(1)
    model, batch = module.SimCLR(True), views()
    loss = step(model, batch)
    mixed = IMix(alpha=1.0)(batch[0])
    logits = normalize(model(mixed.inputs), dim=1) @ normalize(model(batch[1]), dim=1).T / 0.2
    own, other = (cross_entropy(logits, at, reduction="none") for at in (torch.arange(24), mixed.permutation))
    torch.testing.assert_close(loss, (mixed.lam * own + (1 - mixed.lam) * other).mean(), rtol=1e-5, atol=1e-5)


def test_un_mix_step(recipe: Recipe) -> None:
    module = recipe("lightly_unmix")
    torch.manual_seed(1)
    model, batch = module.MoCo(True), views()
    bank = model.criterion.memory_bank.bank.clone()
    loss = step(model, batch)
    mixed = UnMix(beta=1.0, P=0.5)(batch[0])
    query, of_mixed, key = model(batch[0]), model(mixed.inputs), model.forward_momentum(batch[1])
    expected = (
        bank_loss(query, key, bank)
        + mixed.lam * bank_loss(of_mixed, key, bank)
        + (1 - mixed.lam) * bank_loss(of_mixed.flip(0), key, bank)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    after = torch.cat([normalize(key, dim=1), bank[24:]])
    torch.testing.assert_close(model.criterion.memory_bank.bank, after, rtol=1e-5, atol=1e-5)
    assert model.criterion.memory_bank.bank_ptr.item() == 24


def test_non_semantic_step(recipe: Recipe) -> None:
    module = recipe("lightly_non_semantic")
    torch.manual_seed(1)
    model, batch = module.MoCo(True), views()
    bank = model.criterion.memory_bank.bank.clone()
    loss = step(model, batch)
    made = module.NonSemanticTransform("patch")(batch[0])
    query, key, of_patches = model(batch[0]), model.forward_momentum(batch[1]), model.forward_momentum(made)
    further = 2.0 * (normalize(query, dim=1) * normalize(of_patches, dim=1)).sum(dim=1, keepdim=True)
    torch.testing.assert_close(loss, bank_loss(query, key, bank, further), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "UnDiMix"])
@pytest.mark.parametrize("entries", [0, 20], ids=["in-batch", "bank"])
def test_lightlys_loss_is_called_as_if_once(entries: int, weighted: bool) -> None:
    """Each term is what a copy of the loss gives, and the bank of a step is that of the plain call."""
    torch.manual_seed(2)
    host = NTXentLoss(memory_bank_size=(entries, 8) if entries else 0)
    criterion: nn.Module = undimix(host, UnDiMix()) if weighted else host
    z0, z_mixed, z1 = torch.randn(3, 6, 8).requires_grad_()
    lam, permutation = torch.tensor(0.7), torch.tensor([3, 1, 0, 5, 4, 2])
    mixed = Mixed(z0, permutation, lam)
    for _ in range(3):
        copies = [copy.deepcopy(criterion) for _ in range(3)]
        expected = copies[0](z0, z1) + 0.7 * copies[1](z_mixed, z1) + (1 - 0.7) * copies[2](z_mixed.flip(0), z1)
        torch.testing.assert_close(UnMix().loss(criterion, z0, z_mixed, z1, mixed), expected)
        if entries:
            assert torch.equal(criterion.memory_bank.bank, copies[0].memory_bank.bank)
            assert torch.equal(criterion.memory_bank.bank_ptr, copies[0].memory_bank.bank_ptr)
        copies = [copy.deepcopy(criterion) for _ in range(2)]
        expected = 0.7 * copies[0](z_mixed, z1) + (1 - 0.7) * copies[1](z_mixed, z1[permutation])
        torch.testing.assert_close(IMix(shared=True).loss(criterion, z_mixed, z1, mixed), expected)
        if entries:
            assert torch.equal(criterion.memory_bank.bank, copies[0].memory_bank.bank)
