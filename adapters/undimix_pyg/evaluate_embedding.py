"""How good embeddings of graphs are: the accuracy of a support vector machine on them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.svm import SVC
from torch import Tensor

INNER_FOLDS = 5


class Evaluation(NamedTuple):
    """Accuracy on the held-out folds, in [0, 1].

    Attributes:
        accuracy: The mean over the folds.
        std: The standard deviation over the folds (not of the mean, and not over seeds).
    """

    accuracy: float
    std: float


def evaluate_embedding(
    embeddings: Tensor | ArrayLike, labels: Tensor | ArrayLike, *, folds: int = 10, seed: int = 0
) -> Evaluation:
    """Cross-validates a support vector machine on frozen embeddings, as is usual for TUDatasets.

    Folds are stratified and shuffled. For each held-out fold, the C of an RBF-kernel SVC is chosen from 10^-3, 10^-2,
    ..., 10^3 by 5-fold cross-validation within the other folds. The held-out labels are not used for that.

    Args:
        embeddings: Finite numbers [graphs, width], a tensor (on any device, with or without gradient) or an array.
        labels: The class of each graph [graphs], of any dtype.
        folds: How many folds, at least 2.
        seed: Shuffles the folds.

    Returns:
        The mean and the standard deviation of the folds' accuracies, in [0, 1].

    Raises:
        ValueError: If the embeddings are not a matrix or are not finite; if there is not one label per embedding; if
            there are fewer than 2 folds or classes; if a class has fewer members than folds, or fewer than 5 in a
            training part.

    References:
        You et al.: Graph Contrastive Learning with Augmentations, NeurIPS 2020, arXiv 2010.13902, section 5
        (unsupervised learning), after Sun et al.: InfoGraph, ICLR 2020, arXiv 1908.01000.

    Examples:
        >>> import torch
        >>> labels = torch.arange(40) % 2
        >>> evaluate_embedding(labels[:, None] + 0.1 * torch.randn(40, 3), labels)
        Evaluation(accuracy=1.0, std=0.0)
    """
    x, y = checked_embeddings(embeddings, labels, of="graphs")
    if folds < 2:
        raise ValueError(f"folds: expected at least 2, got {folds}")
    classes, y, members = np.unique(y, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"labels: expected at least 2 classes, got {len(classes)}")
    fewest = int(members.min())
    if fewest < folds or fewest - -(-fewest // folds) < INNER_FOLDS:
        raise ValueError(
            f"labels: expected classes with at least {folds} members, one for each fold, and {INNER_FOLDS} in every "
            f"training part, got {fewest} of class {classes[members.argmin()]}"
        )

    grid = {"C": [10.0**power for power in range(-3, 4)]}
    search = GridSearchCV(SVC(), grid, cv=StratifiedKFold(INNER_FOLDS), error_score="raise")
    outer = StratifiedKFold(folds, shuffle=True, random_state=seed)
    scores = cross_val_score(search, x, y, cv=outer, scoring="accuracy", error_score="raise")
    return Evaluation(float(scores.mean()), float(scores.std()))


def checked_embeddings(
    embeddings: Tensor | ArrayLike, labels: Tensor | ArrayLike, *, of: str
) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Embeddings [rows, width] in float64, and a label for each; a ValueError for others names what they are of."""
    x = as_array(embeddings).astype(np.float64)
    y = as_array(labels)
    if x.ndim != 2:
        raise ValueError(f"embeddings: expected shape [{of}, width], got {list(x.shape)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"labels: expected shape [{len(x)}], one class for each embedding, got {list(y.shape)}")
    if not np.isfinite(x).all():
        raise ValueError("embeddings: expected finite values, got NaN or infinity")
    return x, y


def as_array(values: Tensor | ArrayLike) -> NDArray[Any]:
    """An array of the same values, without gradient; floating-point tensors become float64."""
    if isinstance(values, Tensor):  # numpy has no bfloat16; double holds every float exactly
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)
