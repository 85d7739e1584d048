"""What an old release of a toolkit lacks is refused there with a clear error; the bounds are those that are tested."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly import loss as lightly_losses
from sentence_transformers.sentence_transformer import losses
from torch import nn
from transformers import Trainer, TrainingArguments

import undimix_lightly
import undimix_sentence_transformers as ours
from integration_tests.text.tiny_models import encoder
from tests.releases import only_before
from undimix_plugins import undimix
from undimix_plugins.toolkit import release
from undimix_transformers import ImageTextLoss, SimCSELoss, trainer

ROOT = Path(__file__).parent.parent
PINNED = {
    name: dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints" / f"{name}.txt").read_text(), flags=re.MULTILINE))
    for name in ("oldest", "middle")
}


# --- lightly


@only_before("lightly", "1.5.23")
def test_directclr_loss_is_absent() -> None:
    expected = r"DirectCLRLoss: expected lightly 1.5.23 or newer, which has it, got 1\.5"
    with pytest.raises(ImportError, match=expected):
        undimix_lightly.DirectCLRLoss  # noqa: B018
    assert "DirectCLRLoss" not in undimix_lightly.__all__


@only_before("lightly", "1.5.21")
@pytest.mark.parametrize("name", ["DCLLoss", "DCLWLoss"])
def test_decoupled_losses_of_another_denominator_are_refused(name: str) -> None:
    expected = f"loss: expected {name} of lightly 1.5.21 or newer, got 1.5.20's, which has a denominator for each view"
    for make in (getattr(undimix_lightly, name), lambda: undimix(getattr(lightly_losses, name)())):
        with pytest.raises(TypeError, match=expected):
            make()


@only_before("lightly", "1.6")
def test_a_bank_without_a_width_is_refused() -> None:
    """lightly takes the width of the first batch."""
    with pytest.raises(
        ValueError, match=r"memory_bank_size: expected 0 or \(entries, width\), got 64, without a width"
    ):
        undimix(lightly_losses.NTXentLoss(memory_bank_size=64))


# --- sentence-transformers

LACKED: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "gather": ("5.1", ours.MultipleNegativesRankingLoss, {"gather_across_devices": True}),
    "guided": ("5.1", lambda model, **lacked: ours.GISTEmbedLoss(model, model, **lacked), {"contrast_anchors": False}),
    "directions": ("5.3", ours.MultipleNegativesRankingLoss, {"directions": ("query_to_doc", "doc_to_doc")}),
    "cached": ("5.3", ours.CachedMultipleNegativesRankingLoss, {"hardness_mode": "all_negatives"}),
    "tokens": ("5.7", ours.CachedMultipleNegativesRankingLoss, {"mini_batch_num_tokens": 60}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=only_before("sentence-transformers", LACKED[name][0])) for name in LACKED]
)
def test_arguments_that_the_host_lacks_are_refused(name: str) -> None:
    _, make, lacked = LACKED[name]
    expected = rf"{next(iter(lacked))}: expected .*, as \w+ of sentence-transformers 5\S+ has no such argument, got "
    with pytest.raises(TypeError, match=expected):
        make(encoder(), **lacked)


@only_before("sentence-transformers", "5.3")
def test_a_cached_symmetric_loss_of_mini_batches_is_refused() -> None:
    host, model = losses.CachedMultipleNegativesSymmetricRankingLoss, encoder()
    expected = (
        "loss: expected CachedMultipleNegativesSymmetricRankingLoss of sentence-transformers 5.3 or newer, got an"
    )
    for make in (lambda: undimix(host(model)), lambda: ours.CachedMultipleNegativesSymmetricRankingLoss(model)):
        with pytest.raises(TypeError, match=expected):
            make()


# --- transformers


@pytest.mark.parametrize("make", [SimCSELoss, lambda: ImageTextLoss(nn.Module())], ids=["SimCSELoss", "ImageTextLoss"])
def test_losses_that_the_trainer_would_not_call_are_refused(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a release that no environment of the tests has."""
    monkeypatch.setattr(trainer, "version", lambda package: "4.56.2")
    with pytest.raises(TypeError, match=r"loss: expected transformers 4\.57 or newer for \w+, got 4\.56\.2, whose"):
        make()


# --- torch


@only_before("torch", "2.6")
def test_a_trainer_resumes_no_training(tmp_path: Path) -> None:
    """transformers refuses to load what torch has saved."""
    model = nn.Linear(2, 2)
    args = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False
    )

    class Squares(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **further: Any) -> Any:
            return model(inputs["x"]).square().sum()

    data: Any = [{"x": torch.ones(2)}]
    Squares(model, args, train_dataset=data).train()
    with pytest.raises(ValueError, match=r"upgrade torch to at least v2\.6"):
        Squares(model, args, train_dataset=data).train(resume_from_checkpoint=True)


# --- bounds


def test_the_lower_bounds_are_tested() -> None:
    """Each but those of the tools is pinned by `make test-oldest`, and no pin is of anything else."""
    # Tools, and what old releases are too old for.
    others = re.compile("extra == '(test|dev|docs|benchmarks|stable-pretraining)'")
    asked = [line for line in requires("undimix-plugins") or [] if not others.search(line)]
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(asked), flags=re.MULTILINE))
    assert bounds.keys() == PINNED["oldest"].keys() - {"numpy", "pyarrow"}
    for name, pinned in PINNED["oldest"].items():
        if name in ("numpy", "pyarrow"):  # which only the toolkits need
            continue
        assert release(bounds[name]) == release(pinned)[: len(release(bounds[name]))], name
        assert not any(release(pinned)[len(release(bounds[name])) :]), name
    assert PINNED["middle"].keys() <= PINNED["oldest"].keys()


def test_the_manual_has_these_versions() -> None:
    table = re.findall(
        r"^\| `?([\w-]+)`? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (ROOT / "docs" / "support.md").read_text(),
        flags=re.MULTILINE,
    )
    rows = {name: (oldest, middle) for name, oldest, middle, _ in table}
    for name, pinned in PINNED["middle"].items():
        assert rows[name] == (PINNED["oldest"][name], pinned), name
