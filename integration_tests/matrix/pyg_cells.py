"""This package's losses for PyG in a plain loop, on real graphs; their control is the published loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch_geometric import seed_everything
from torch_geometric.datasets import KarateClub
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCN, GIN

from integration_tests.matrix import plain_loop
from integration_tests.matrix.cells import LOGITS, TEMPERATURE, Lack, plugged
from integration_tests.matrix.plain_loop import BATCHES
from integration_tests.matrix.plain_losses import PlainGRACE, PlainGraphCL, PlainInfoGraph
from integration_tests.molecules import mutag
from undimix_plugins import Uniform
from undimix_pyg import GRACE, GRACELoss, GraphCL, GraphCLLoss, InfoGraph, InfoGraphLoss

WIDTH = 16


class Row(NamedTuple):
    """The published loss, ours, and a model and data for them."""

    plain: Callable[[float], nn.Module]
    ours: Callable[..., nn.Module]
    model: Callable[[], nn.Module]
    graphs: Callable[[], list[Any]]
    logits: float = LOGITS


@cache
def molecules() -> list[Any]:
    return list(mutag()[: 16 * BATCHES])


@cache
def club() -> list[Any]:
    return [KarateClub()[0]] * BATCHES


def gin() -> GIN:
    return GIN(7, WIDTH, num_layers=2, norm="batch_norm")


def grace() -> GRACE:
    model = GRACE(GCN(34, WIDTH, num_layers=2), WIDTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # the projections of an untrained model are all but one point
    return model


ROWS = {
    "GraphCLLoss": Row(PlainGraphCL, GraphCLLoss, lambda: GraphCL(gin(), WIDTH), molecules),
    "InfoGraphLoss": Row(PlainInfoGraph, InfoGraphLoss, lambda: InfoGraph(gin(), WIDTH), molecules),
    "GRACELoss": Row(PlainGRACE, GRACELoss, grace, club),
}


class Training(plain_loop.Training):
    rows = ROWS

    def make(self, row: Row, kind: str, dtype: torch.dtype) -> None:
        seed_everything(0)
        self.model = row.model().to(dtype)
        ours = row.ours(TEMPERATURE, weighting=Uniform())
        self.loss = row.plain(TEMPERATURE) if kind == "plain" else plugged(ours, kind)
        self.graphs = [graph.clone().update({"x": graph.x.to(dtype)}) for graph in row.graphs()]

    def batches(self, epoch: int) -> list[Any]:
        seed_everything(epoch)
        return list(DataLoader(self.graphs, batch_size=len(self.graphs) // BATCHES, shuffle=True))

    def given(self, batch: Any, model: Callable[..., Any]) -> tuple[Any, ...]:
        outputs: tuple[Any, ...] = model(batch)
        return outputs

    def compile(self, **settings: Any) -> None:
        """The encoder, and the loss; augmentations draw graphs of many sizes."""
        self.model.encoder.compile(**settings)
        self.loss.compile(**settings)

    def be_rank(self, rank: int) -> None:
        """Negatives are a process's own."""
        self.graphs = self.graphs[:: -1 if rank else 1]


MACHINERY = plain_loop.machinery(Training)
LACKS: dict[tuple[str, str], Lack] = {}
NOTES: dict[tuple[str, str], str] = {}
