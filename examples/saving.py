"""How pictures are saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def save_whole(figure: Figure, path: Path, **settings: Any) -> None:
    """Whole or not at all: where it fails or is interrupted, an earlier picture stays and nothing is left beside it.

    Args:
        figure: What to save.
        path: Where to.
        settings: Of `savefig`: `format`, which the path's name does not tell, and others.

    Examples:
        >>> save_whole(Figure(), Path("empty.png"), format="png")
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, **settings)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
