"""Graph contrastive learning in PyG with UnDiMix weights: GraphCL, InfoGraph, GRACE, their losses and evaluation."""

from undimix_plugins.toolkit import require

require("torch_geometric", extra="pyg")
require("sklearn", extra="pyg")

from undimix_pyg.adapter import weighted  # noqa: E402
from undimix_pyg.augmentations import (  # noqa: E402
    AttributeMasking,
    EdgePerturbation,
    NodeDropping,
    RandomWalkSubgraph,
)
from undimix_pyg.evaluate_embedding import Evaluation, evaluate_embedding  # noqa: E402
from undimix_pyg.evaluate_nodes import evaluate_nodes  # noqa: E402
from undimix_pyg.grace import GRACE  # noqa: E402
from undimix_pyg.grace_loss import GRACELoss  # noqa: E402
from undimix_pyg.graphcl import GraphCL  # noqa: E402
from undimix_pyg.graphcl_loss import GraphCLLoss  # noqa: E402
from undimix_pyg.infograph import InfoGraph  # noqa: E402
from undimix_pyg.infograph_loss import InfoGraphLoss  # noqa: E402

__all__ = [
    "GRACE",
    "AttributeMasking",
    "EdgePerturbation",
    "Evaluation",
    "GRACELoss",
    "GraphCL",
    "GraphCLLoss",
    "InfoGraph",
    "InfoGraphLoss",
    "NodeDropping",
    "RandomWalkSubgraph",
    "evaluate_embedding",
    "evaluate_nodes",
    "weighted",
]
