"""Saving pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def save_whole(figure: Figure, path: Path, **settings: Any) -> None:
    """Saves a figure whole or not at all. After an error or an interrupt, an earlier picture is still there.

    Args:
        figure: The figure to save.
        path: The path to save it at.
        settings: Settings of `savefig`. Give `format`: the path's ending does not count.

    Examples:
        >>> save_whole(Figure(), Path("empty.png"), format="png")
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, **settings)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
