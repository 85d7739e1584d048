"""float16 rows of zeros, and tiny ones, in every adapter: they have gradient 0, and the others a finite one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightly import loss as lightly_losses
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import BoW
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from integration_tests.text.tiny_models import encoder
from tests.contrasts import random_rows
from undimix_plugins import UnDiMix, Uniform, undimix
from undimix_pyg import GRACELoss, GraphCLLoss, InfoGraphLoss
from undimix_transformers import ImageTextLoss, SimCSELoss

Call = Callable[[nn.Module, list[Tensor]], Tensor]


def model() -> SentenceTransformer:
    return SentenceTransformer(modules=[BoW(vocab=["a"])], device="cpu")


def guided() -> nn.Module:
    tiny = encoder()  # asked for its tokenizer alone
    return losses.CachedGISTEmbedLoss(tiny, tiny, temperature=0.2)


def clip() -> nn.Module:
    module = nn.Module()
    module.logit_scale = nn.Parameter(torch.tensor(2.6592))
    return module


def two(loss: nn.Module, views: list[Tensor]) -> Tensor:
    return loss(*views)  # type: ignore[no-any-return]


def regions(loss: nn.Module, views: list[Tensor]) -> Tensor:
    masks = torch.tensor([[0, 1], [1, 1], [0, 0]])
    return loss(*(view.unflatten(0, (3, 2)) for view in views), masks, masks)  # type: ignore[no-any-return]


def regions_of_predictions(loss: nn.Module, views: list[Tensor]) -> Tensor:
    masks = torch.tensor([[0, 1], [1, 1], [0, 0]])
    halves = [view.unflatten(0, (3, 2)) for view in views]
    return loss(*halves, *halves, masks, masks)  # type: ignore[no-any-return]


CALLS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    **{
        name: (lambda name=name: getattr(lightly_losses, name)(temperature=0.1), two)  # type: ignore[misc]
        for name in ("NTXentLoss", "DCLLoss", "DCLWLoss", "MACLLoss")
    },
    "NTXentLoss-bank": (lambda: lightly_losses.NTXentLoss(0.1, memory_bank_size=(9, 4)), two),
    "DirectCLRLoss": (lambda: lightly_losses.DirectCLRLoss(4, 0.1), two),
    "DetConSLoss": (lambda: lightly_losses.DetConSLoss(0.1, gather_distributed=False), regions),
    "DetConBLoss": (lambda: lightly_losses.DetConBLoss(0.1, gather_distributed=False), regions_of_predictions),
    "MultipleNegativesRankingLoss": (
        lambda: losses.MultipleNegativesRankingLoss(model()),
        lambda loss, views: loss.compute_loss_from_embeddings(views, None),  # type: ignore[operator]
    ),
    "CachedGISTEmbedLoss": (
        guided,
        lambda loss, views: loss.calculate_loss(  # type: ignore[operator]
            [[view] for view in views], [[view.detach().roll(1, 1)] for view in views]
        ),
    ),
    "GraphCLLoss": (GraphCLLoss, two),
    "GRACELoss": (GRACELoss, two),
    "InfoGraphLoss": (InfoGraphLoss, lambda loss, views: loss(*views, torch.tensor([0, 0, 1, 2, 4, 5]))),
    "SimCSELoss": (
        SimCSELoss,
        lambda loss, views: loss(BaseModelOutput(last_hidden_state=torch.stack(views, 1).flatten(0, 1)[:, None])),
    ),
    "ImageTextLoss": (
        lambda: ImageTextLoss(clip()),
        lambda loss, views: loss({"text_embeds": views[0], "image_embeds": views[1]}),
    ),
}


@pytest.mark.parametrize("weighting", [Uniform(), UnDiMix()], ids=["Uniform", "UnDiMix"])
@pytest.mark.parametrize("name", CALLS)
def test_rows_without_a_direction(name: str, weighting: Uniform | UnDiMix) -> None:
    make, call = CALLS[name]
    views = [random_rows(6, 4, seed).half() for seed in (0, 1)]
    for view in views:
        view[1], view[4] = 0, torch.tensor([6e-8, -6e-8, 0, 6e-8])
        view.requires_grad_()
    loss = call(undimix(make(), weighting), views)
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, views):
        assert gradient.isfinite().all()
        assert gradient[[1, 4]].count_nonzero() == 0
        assert gradient[[0, 2, 3, 5]].count_nonzero() > 0


def test_with_a_last_layer() -> None:
    """Whose inputs are divided by the lengths of its outputs."""
    layer = nn.Linear(4, 4, bias=False).double()
    loss = undimix(lightly_losses.NTXentLoss(0.1), last_layer=layer)
    inputs = random_rows(12, 4, 0)
    inputs[[1, 4, 8]] *= torch.tensor([[0.0], [1e-20], [1e-300]], dtype=torch.float64)
    value = loss(*layer(inputs).chunk(2))
    assert value.isfinite()
    (gradient,) = torch.autograd.grad(value, layer.weight)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 100
