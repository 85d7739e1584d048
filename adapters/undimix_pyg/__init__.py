"""Graph contrastive learning in PyG with UnDiMix weights: augmentations, GraphCL, its loss and its evaluation."""

from undimix_plugins import require

require("torch_geometric", extra="pyg")
require("sklearn", extra="pyg")

from undimix_pyg.augmentations import (  # noqa: E402
    AttributeMasking,
    EdgePerturbation,
    NodeDropping,
    RandomWalkSubgraph,
)
from undimix_pyg.evaluate_embedding import Evaluation, evaluate_embedding  # noqa: E402
from undimix_pyg.graphcl import GraphCL  # noqa: E402
from undimix_pyg.graphcl_loss import GraphCLLoss, weighted  # noqa: E402

__all__ = [
    "AttributeMasking",
    "EdgePerturbation",
    "Evaluation",
    "GraphCL",
    "GraphCLLoss",
    "NodeDropping",
    "RandomWalkSubgraph",
    "evaluate_embedding",
    "weighted",
]
