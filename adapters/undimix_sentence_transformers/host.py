"""The installed sentence-transformers: where it has what the adapter uses, and what an old release does without."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch.distributed as dist
from sentence_transformers import SentenceTransformer, SparseEncoder
from torch import Tensor, nn

from undimix_plugins.toolkit import release

RELEASE = release(version("sentence-transformers"))

if RELEASE >= (5, 4):
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator
else:
    from sentence_transformers import losses  # type: ignore[attr-defined,no-redef]
    from sentence_transformers.losses.MatryoshkaLoss import CachedLossDecorator  # type: ignore[import-not-found,no-redef]
if RELEASE >= (5, 1):
    from sentence_transformers.util import all_gather_with_grad
else:  # no loss takes `gather_across_devices`, so that nothing calls it
    all_gather_with_grad = None  # type: ignore[assignment]
if RELEASE >= (6, 0):
    from sentence_transformers.base.data_collator import DEFAULT_LABEL_COLUMNS
    from sentence_transformers.base.losses.merged_forward import embed_columns
    from sentence_transformers.util import get_rank
else:
    DEFAULT_LABEL_COLUMNS = ("label", "labels", "score", "scores") if RELEASE >= (5, 2) else ("label", "score")

    def get_rank() -> int:
        """The number of this process, 0 without others."""
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def embed_columns(model: nn.Module, sentence_features: Sequence[dict[str, Any]]) -> list[Tensor]:  # type: ignore[misc]
        """The embeddings [batch, width] of each column, one forward pass each."""
        return [model(features)["sentence_embedding"] for features in sentence_features]


__all__ = [
    "DEFAULT_LABEL_COLUMNS",
    "CachedLossDecorator",
    "Defaults",
    "SymmetricDefaults",
    "all_gather_with_grad",
    "embed_columns",
    "get_rank",
    "initialise",
    "losses",
    "tokenised",
    "warn_of_deprecation",
]


class Defaults:
    """The arguments that not every release of the host's losses has. Behind the host's class, whose own come first."""

    gather_across_devices: Any = False
    contrast_anchors: Any = True
    contrast_positives: Any = True
    directions: Any = ("query_to_doc",)
    partition_mode: Any = "joint"
    hardness_mode: Any = None
    hardness_strength: Any = 0.0
    mini_batch_num_tokens: Any = None


#: The release that brought each of them.
CAME_WITH = {
    **dict.fromkeys(("gather_across_devices", "contrast_anchors", "contrast_positives"), "5.1"),
    **dict.fromkeys(("directions", "partition_mode", "hardness_mode", "hardness_strength"), "5.3"),
    "mini_batch_num_tokens": "5.7",
}


class SymmetricDefaults(Defaults):
    """What the symmetric losses are, as directions."""

    directions: Any = ("query_to_doc", "doc_to_query")
    partition_mode: Any = "per_direction"


def initialise(loss: nn.Module, cls: type[nn.Module], *models: nn.Module, **arguments: Any) -> None:
    """Calls the host's `__init__` with the arguments that the installed release has.

    Raises:
        TypeError: If an argument that it lacks is not the default.
    """
    takes = inspect.signature(cls.__init__).parameters
    for name, value in arguments.items():
        given = tuple(value) if isinstance(value, list) else value
        if name not in takes and given != (default := getattr(type(loss), name)):
            raise TypeError(
                f"{name}: expected {default!r}, as {cls.__name__} of sentence-transformers "
                f"{version('sentence-transformers')} has no such argument, got {value!r}; releases from "
                f"{CAME_WITH[name]} on have it"
            )
    cls.__init__(loss, *models, **{name: value for name, value in arguments.items() if name in takes})


def tokenised(model: SentenceTransformer | SparseEncoder, texts: list[str]) -> dict[str, Any]:
    """A model's inputs for texts."""
    # `tokenize` until 5.3, deprecated since.
    preprocess: Any = getattr(model, "preprocess", None) or model.tokenize
    return dict(preprocess(texts))


def warn_of_deprecation(cls: type[nn.Module]) -> None:
    """Warns who makes an object of our class as the host does for its own."""
    if text := getattr(cls, "__deprecated__", None):
        warnings.warn(text, DeprecationWarning, stacklevel=3)
