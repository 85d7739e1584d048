"""What tests skip in an old release of torch or a toolkit, because it is not there."""

from __future__ import annotations

import re
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from undimix_plugins.toolkit import release

OURS = [Path(__file__).parent.parent / part for part in ("undimix_plugins", "adapters")]
ASKED = "got an unexpected keyword|has no attribute|cannot import|No module"
# What the error of a test says that needs a part of a package, and the release that this part came with.
LACKED = r"got an unexpected keyword argument '{0}'|^{0}: expected .* has no such argument"
CAME_WITH = [
    ("torch", "2.6", "module 'torch.compiler' has no attribute 'set_stance'"),
    ("torch", "2.6", "users to upgrade torch to at least v2.6"),  # with it, a Trainer loads its own checkpoints
    ("lightly", "1.5.21", "^loss: expected DCLW?Loss of lightly 1.5.21 or newer"),
    (
        "lightly",
        "1.5.23",
        "has no attribute 'DirectCLRLoss'|cannot import name 'DirectCLRLoss'|^DirectCLRLoss: expected lightly 1.5.23",
    ),
    ("sentence-transformers", "5.3", "^loss: expected CachedMultipleNegativesSymmetricRankingLoss of"),
    ("sentence-transformers", "5.3", "losses' has no attribute 'CachedSpladeLoss'"),
    ("sentence-transformers", "5.4", "'SentenceTransformer' object has no attribute 'preprocess'"),
    ("sentence-transformers", "5.5", "'DistributedDataParallel' object is not subscriptable"),  # AdaptiveLayerLoss
    ("sentence-transformers", "6.0", "No module named 'sentence_transformers.multi_vector_encoder'"),
    # CLIP's mask, in float64; test_image_text.py runs there, with torch's default dtype.
    ("transformers", "5.0", "value cannot be converted to type float without overflow"),
    *(
        ("sentence-transformers", since, LACKED.format(argument))
        for since, arguments in (
            ("5.1", ("gather_across_devices", "contrast_anchors", "contrast_positives")),
            ("5.3", ("directions", "partition_mode", "hardness_mode", "hardness_strength")),
            ("5.4", ("modality_config",)),
            ("5.7", ("mini_batch_num_tokens",)),
        )
        for argument in arguments
    ),
]


def is_installed(package: str) -> bool:
    """Whether a package is there: the core's tests need no toolkit, and stable-pretraining needs newer releases."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def is_older(package: str, than: str) -> bool:
    """Whether the installed release is older than one."""
    return is_installed(package) and release(version(package)) < release(than)


def only_before(package: str, since: str) -> Any:
    """Marks a test of what is refused in releases before one."""
    newer = not is_older(package, since)
    return pytest.mark.skipif(
        newer, reason=f"{package} {version(package)} is not older than {since}: nothing to refuse"
    )


def needs(package: str, since: str, before: str) -> None:
    """Skips a test in releases before one, and says what is different there."""
    if is_older(package, since):
        pytest.skip(f"{package} {version(package)} is older than {since}: {before}")


def skip_for(error: Exception) -> None:
    """Skips a test whose error says that the installed release lacks what the test needs.

    But if our code asked a host for what that lacks, the error is ours.
    """
    frames = traceback.extract_tb(error.__traceback__)
    of_ours = any(Path(frame.filename).is_relative_to(part) for frame in frames for part in OURS)
    for package, since, text in CAME_WITH:
        found = re.search(text, str(error)) if is_older(package, since) else None
        if found and not (of_ours and re.search(ASKED, found[0])):
            pytest.skip(f"{package} {version(package)} is older than {since}: {found[0]}")
