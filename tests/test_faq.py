"""The messages that the manual quotes are those that the code prints."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("undimix_plugins", "adapters") for path in sorted((ROOT / folder).rglob("*.py"))]
PAGE = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
QUOTED = [
    " ".join(block.split()) for block in re.findall(r"```text\n(.*?)\n```", PAGE, flags=re.DOTALL)
]  # wrapped there
LEAST = 30  # characters that a message has to have fixed: a pattern of fewer may match by chance


def pattern_of(node: ast.expr) -> tuple[str, int]:
    """What a string that is put together at run time may be, and how many of its characters are fixed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value), len(node.value)
    parts: list[tuple[str, int]] = []
    if isinstance(node, ast.JoinedStr):
        parts = [pattern_of(value) for value in node.values]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [pattern_of(node.left), pattern_of(node.right)]
    return ("".join(part for part, _ in parts), sum(fixed for _, fixed in parts)) if parts else (".*", 0)


def strings_of(path: Path) -> list[str]:
    """The patterns of a module's strings that are long enough to tell apart."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.expr)]
    patterns = [pattern_of(node) for node in nodes]
    return [pattern for pattern, fixed in patterns if fixed >= LEAST]


PATTERNS = [re.compile(pattern, flags=re.DOTALL) for path in SOURCES for pattern in strings_of(path)]


def test_there_are_twenty() -> None:
    assert len(QUOTED) == len(set(QUOTED)) >= 20


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda quoted: quoted[:50])
def test_message_is_in_the_source(quoted: str) -> None:
    kind, _, message = quoted.partition(": ")
    assert re.fullmatch(r"\w+(Error|Warning)", kind)
    assert any(pattern.fullmatch(message) for pattern in PATTERNS)
