"""Atomic writes: a file or folder is replaced when its new content is complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, then moves it to `path`.

    If the writing fails, `path` stays as it was and the temporary file or folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file as a whole, or leaves it as it was."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")
