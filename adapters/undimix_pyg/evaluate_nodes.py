"""How good embeddings of nodes are: the accuracy of a linear probe on them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer
from torch import Tensor

from undimix_pyg.evaluate_embedding import INNER_FOLDS, as_array, checked_embeddings

STRENGTHS = [10.0**power for power in range(-1, 5)]


def evaluate_nodes(
    embeddings: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    train: Tensor | ArrayLike,
    test: Tensor | ArrayLike,
    val: Tensor | ArrayLike | None = None,
) -> float:
    """Trains a linear probe on frozen embeddings of nodes, as GRACE is evaluated.

    The probe is a logistic regression with an l2 penalty on embeddings of length 1:

        minimise over W:   1/2 |W|^2 + C * sum over training nodes i of -log softmax(W z_i / |z_i|)[y_i].

    It learns from the training nodes. C is one of 10^-1, 10^0, ..., 10^4. With validation nodes, the C of the highest
    accuracy on them is taken (the smallest of equal ones). Without them, C is chosen by 5-fold cross-validation within
    the training nodes. The test nodes are not used for that.

    Args:
        embeddings: Finite numbers [nodes, width], a tensor (on any device, with or without gradient) or an array.
        labels: The class of each node [nodes], of any dtype. Labels of nodes in no mask are not read.
        train: A mask of the nodes that the probe learns from, bool [nodes].
        test: A mask of the nodes that are scored, bool [nodes].
        val: A mask of the nodes that choose C, bool [nodes]; None to choose it within the training nodes.

    Returns:
        The accuracy on the test nodes, in [0, 1].

    Raises:
        ValueError: If the embeddings are not a matrix or are not finite; if there is not one label per embedding; if a
            mask is not bool, has another length or is empty, or masks overlap; if there are fewer than 2 classes among
            the training nodes; without `val`, if a class has fewer than 5 training nodes.

    References:
        Zhu et al.: Deep Graph Contrastive Representation Learning (GRACE), 2020, arXiv 2006.04131, section 4.1, after
        Velickovic et al.: Deep Graph Infomax, ICLR 2019, arXiv 1809.10341. Embeddings of length 1: the authors' code
        for GRACE, whose classifiers are one against the rest; this one is multinomial.

    Examples:
        >>> import torch
        >>> labels = torch.arange(60) % 3
        >>> embeddings = torch.eye(3)[labels] + 0.1 * torch.randn(60, 3)
        >>> train = torch.arange(60) < 30
        >>> evaluate_nodes(embeddings, labels, train=train, test=~train)
        1.0
    """
    x, y = checked_embeddings(embeddings, labels, of="nodes")
    given = {"train": train, "val": val, "test": test}
    masks = {name: _checked_mask(name, mask, len(x)) for name, mask in given.items() if mask is not None}
    for name, other in (("val", "train"), ("test", "train"), ("test", "val")):
        if name in masks and other in masks and (both := int((masks[name] & masks[other]).sum())):
            raise ValueError(f"{name}: expected no node of {other}, got {both}")
    classes, members = np.unique(y[masks["train"]], return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"labels: expected at least 2 classes among the training nodes, got {len(classes)}")
    if val is None and members.min() < INNER_FOLDS:
        raise ValueError(
            f"train: expected at least {INNER_FOLDS} nodes of each class, by which C is cross-validated, got "
            f"{members.min()} of class {classes[members.argmin()]}; give validation nodes, val=mask, to choose C by"
        )

    x_train, y_train = x[masks["train"]], y[masks["train"]]
    if val is None:
        grid = {"logisticregression__C": STRENGTHS}
        folds = StratifiedKFold(INNER_FOLDS)
        best = GridSearchCV(_probe(), grid, cv=folds, error_score="raise").fit(x_train, y_train)
    else:
        probes = [_probe(C=strength).fit(x_train, y_train) for strength in STRENGTHS]
        best = max(probes, key=lambda probe: probe.score(x[masks["val"]], y[masks["val"]]))
    return float(best.score(x[masks["test"]], y[masks["test"]]))


def _probe(**settings: float) -> Pipeline:
    probe: Pipeline = make_pipeline(Normalizer(), LogisticRegression(max_iter=2000, **settings))
    return probe


def _checked_mask(name: str, mask: Tensor | ArrayLike, nodes: int) -> NDArray[Any]:
    marks = as_array(mask)
    if marks.dtype != np.bool_ or marks.shape != (nodes,):
        several = f"; of several splits pass one, as in data.{name}_mask[:, 0]" if marks.ndim == 2 else ""
        raise ValueError(
            f"{name}: expected a mask of the nodes, bool [{nodes}], got {marks.dtype} {list(marks.shape)}{several}"
        )
    if not marks.any():
        raise ValueError(f"{name}: expected a mask of at least one node, got none")
    return marks
