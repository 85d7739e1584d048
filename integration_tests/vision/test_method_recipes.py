"""The recipes of methods that are no weightings, in lightly and Lightning: a few steps of each example."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lightly.models.modules.memory_bank import MemoryBankModule

from undimix_plugins.methods.adco import AdCo
from undimix_plugins.methods.mmcl import MMCL

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """An example as a module, as `python examples/...` finds it and what it imports."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    module = importlib.import_module(request.param)
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            monkeypatch.delitem(sys.modules, name)
    return module


@pytest.mark.parametrize(
    "example", ["lightly_adco", "lightly_mmcl", "lightly_active_sampling"], indirect=True, ids=lambda name: name
)
@pytest.mark.parametrize("method", [False, True], ids=["plain", "method"])
def test_recipe_trains(example: ModuleType, method: bool) -> None:
    untrained, _, _ = example.train(method, max_steps=0, progress=False)
    model, score, seconds = example.train(method, max_steps=2, progress=False)
    assert seconds > 0
    assert 0.2 < score <= 1  # 10 classes; even untrained features tell some apart
    changed = [
        not torch.equal(one, other)
        for one, other in zip(untrained.backbone.parameters(), model.backbone.parameters(), strict=True)
    ]
    assert any(changed)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("example", ["lightly_adco"], indirect=True)
def test_the_pool_is_filled_and_learns(example: ModuleType) -> None:
    filled, _, _ = example.train(True, max_steps=1, progress=False)
    pool = filled.criterion.pool
    assert isinstance(filled.criterion, AdCo)
    assert filled.criterion.velocity.norm() > 0
    lengths = pool.norm(dim=1)  # of keys 1, when drawn at random about 11; a step changes them a little
    assert 0.5 < lengths.min() < lengths.max() < 3
    assert (lengths - 1).abs().max() > 1e-6
    saved = filled.state_dict()
    assert torch.equal(saved["criterion.pool"], pool)
    optimised = {id(p) for group in filled.configure_optimizers().param_groups for p in group["params"]}
    assert id(pool) not in optimised


@pytest.mark.parametrize("example", ["lightly_mmcl"], indirect=True)
def test_the_loss_is_the_max_margin_one(example: ModuleType) -> None:
    assert isinstance(example.SimCLR(True).criterion, MMCL)


@pytest.mark.parametrize("example", ["lightly_active_sampling"], indirect=True)
def test_the_bank_gets_chosen_candidates(example: ModuleType) -> None:
    """Each row that was enqueued is one of the candidates, and as many as queries were."""
    model, _, _ = example.train(True, max_steps=1, progress=False)
    bank, candidates = model.criterion.memory_bank, model.candidates
    assert isinstance(bank, MemoryBankModule)
    enqueued = bank.bank[:128]
    distances = torch.cdist(enqueued, candidates.bank).amin(dim=1)
    # The latest keys took the place of the oldest 128 of the 1024 after the choice.
    assert (distances < 1e-3).float().mean() > 0.5
    assert torch.cdist(bank.bank[128:], candidates.bank).amin() > 1e-3  # the rest is as it was made
    before = bank.bank.clone()
    model.criterion(torch.randn(128, 128, requires_grad=True), torch.randn(128, 128))
    assert torch.equal(bank.bank, before)
