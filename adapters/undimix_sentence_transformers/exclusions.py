"""Candidates that the batch itself shows to be no negatives: the same text, or the same class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from undimix_plugins.toolkit import gather_constants

# Odd numbers of 64 bits (2^64 over the golden ratio, and two of SplitMix64), which spread what they multiply.
SPREAD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
KEPT = "_undimix_text_keys"  # the attribute of a column's token ids


def text_keys(features: Mapping[str, Any]) -> Tensor:
    """A number for each text of a column, which only the same text has (but for a chance of 2^-64).

    A loss such as `MatryoshkaLoss` calls the one inside several times with the same features, into which the model
    writes what it makes of them: then the numbers are those of the first time, kept beside the token ids.

    Args:
        features: What the model is given: padded tokens ("input_ids", "attention_mask"), flattened ones
            ("cu_seq_lens_q"), or those of a static embedding ("offsets").

    Returns:
        Integers [texts], int64.

    Raises:
        ValueError: For features without token ids, or with images or sounds beside, which they do not tell apart; for
            features that a model has written into before.

    Examples:
        >>> tokens = torch.tensor([[5, 6, 0], [5, 6, 7], [5, 6, 9]])
        >>> keys = text_keys({"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]])})
        >>> keys[0] == keys[2], keys[0] == keys[1]
        (tensor(True), tensor(False))
    """
    tokens = features.get("input_ids")
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"exclude_duplicates: expected inputs with 'input_ids', which tell texts apart, got {sorted(features)}"
        )
    version = 0 if tokens.is_inference() else tokens._version
    if "sentence_embedding" in features:
        kept_at, keys = vars(tokens).get(KEPT, (None, tokens))
        if kept_at != version:
            raise ValueError(
                "exclude_duplicates: expected inputs as the model is given them, got some that a model has written its "
                "'sentence_embedding' into"
            )
        return cast(Tensor, keys)
    keys = _keys(features, tokens)
    vars(tokens)[KEPT] = (version, keys)
    return keys


def _keys(features: Mapping[str, Any], tokens: Tensor) -> Tensor:
    beside = [key for key, value in features.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if beside:
        raise ValueError(f"exclude_duplicates: expected texts alone, whose tokens tell them apart, got {beside} beside")
    if "offsets" in features or "cu_seq_lens_q" in features:
        starts = features["offsets"] if "offsets" in features else features["cu_seq_lens_q"][:-1]
        tokens, starts = tokens.flatten(), starts.long()
        places = torch.arange(len(tokens), device=tokens.device)
        text = torch.searchsorted(starts, places, right=True) - 1
        keys = torch.zeros(len(starts), dtype=torch.long, device=tokens.device)
        return keys.scatter_add(0, text, _spread(tokens, places - starts[text]))
    mask = features.get("attention_mask")
    mask = torch.ones_like(tokens) if mask is None else mask
    places = mask.long().cumsum(dim=1) - 1  # padding on the left moves none
    return (_spread(tokens, places) * mask.bool()).sum(dim=1)


def _spread(tokens: Tensor, places: Tensor) -> Tensor:
    """A number that looks random for each token and place; arithmetic wraps around."""
    mixed = (tokens.long() + 1) * SPREAD[0] + (places + 1) * SPREAD[1]
    mixed = (mixed ^ (mixed >> 30)) * SPREAD[2]
    return mixed ^ (mixed >> 27)


class Known(NamedTuple):
    """What a batch says of its own texts.

    Attributes:
        keys: Of each column's texts, each [batch]; empty where duplicates count as any negative.
        labels: The samples' classes [batch], or None.
    """

    keys: Sequence[Tensor] = ()
    labels: Tensor | None = None

    def mask(self, width: int, *, hard: bool, everywhere: bool) -> Callable[[slice], Tensor] | None:
        """Which candidates are no negatives of a sample's query or document, for a `Contrast`; None where all may be.

        A candidate is none where it, or the text that it is paired with, is the anchor or its positive (hard negatives
        are paired with none), or where it belongs to a sample of the anchor's class (queries and positives do).

        Args:
            width: How many candidates there are.
            hard: Whether each column of hard negatives follows the samples' own, queries or positives.
            everywhere: Whether they are those of all processes.
        """
        if not self.keys and self.labels is None:
            return None

        def of_all(rows: Tensor) -> Tensor:
            return gather_constants(rows) if everywhere else rows

        same: list[tuple[Tensor, Tensor]] = []
        if self.keys:
            query, positive, *others = (of_all(key) for key in (self.keys if hard else self.keys[:2]))
            for theirs in (torch.cat([query, *others]), torch.cat([positive, *others])):
                same += [(mine, theirs) for mine in self.keys[:2]]
        if self.labels is not None:
            same.append((self.labels, of_all(self.labels)))

        def mask(rows: slice) -> Tensor:
            marks = torch.zeros(len(same[0][0][rows]), width, dtype=torch.bool, device=same[0][0].device)
            for mine, theirs in same:
                marks[:, : len(theirs)] |= mine[rows, None] == theirs
            return marks

        return mask
