"""The matrix as Markdown, and where it goes."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.embeddings.files import write_atomically

BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
NAMES = {
    "lightly": "lightly",
    "sentence_transformers": "sentence-transformers",
    "pyg": "PyG",
    "transformers": "transformers",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "open_clip": "open_clip",
    "stable_pretraining": "stable-pretraining",
}
LETTERS = string.ascii_lowercase
ABSENT = "the toolkit's training loop has no such feature"
Results = Mapping[tuple[str, str, str], Mapping[str, Any]]


def markdown(results: Results) -> str:
    """A table of what all toolkits have, one of what only sentence-transformers has, and the footnotes of both.

    Args:
        results: For each toolkit, row and column: "failed", "lacks" (whether the host does), "words" and "breaks".
    """
    toolkits = list(dict.fromkeys(toolkit for toolkit, _, _ in results))
    by_toolkit = {name: {column for toolkit, _, column in results if toolkit == name} for name in toolkits}
    columns = list(dict.fromkeys(column for _, _, column in results))
    shared = [column for column in columns if sum(column in has for has in by_toolkit.values()) > 1]
    footnotes: dict[str, int] = {}
    parts = [_table(results, toolkits, shared or columns, footnotes)]
    for name in toolkits:
        own = [column for column in columns if column in by_toolkit[name] and shared and column not in shared]
        if own:
            parts.append(_table(results, [name], own, footnotes))
    notes = [f"- ({LETTERS[number - 1]}) {words[0].upper()}{words[1:]}." for words, number in footnotes.items()]
    return "\n\n".join([*parts, "\n".join(notes)]).rstrip() + "\n"


def _table(results: Results, toolkits: Sequence[str], columns: Sequence[str], footnotes: dict[str, int]) -> str:
    """A row for each loss, under a row with its toolkit's name."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for toolkit in toolkits:
        lines.append(f"| **{NAMES[toolkit]}** |" + " |" * len(columns))
        for row in dict.fromkeys(row for other, row, _ in results if other == toolkit):
            texts = [_text(results.get((toolkit, row, column)), footnotes) for column in columns]
            lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _text(result: Mapping[str, Any] | None, footnotes: dict[str, int]) -> str:
    result = {"lacks": True, "words": ABSENT} if result is None else result
    if result.get("failed"):
        return "✗"
    words = result["words"]
    note = f" ({LETTERS[footnotes.setdefault(words, len(footnotes) + 1) - 1]})" if words else ""
    breaks = result.get("breaks")
    return ("-" if result["lacks"] else "✓" if breaks is None else f"✓ {breaks}") + note


def write(table: str, file: Path) -> bool:
    """Puts the table between the two markers, where the file has them: whole, or not at all."""
    text = file.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        return False
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomically(file, f"{before}{BEGIN}\n{table}{END}{after}")
    return True
