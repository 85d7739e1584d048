"""The list of methods names what there is, and the manual shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import undimix_plugins
from undimix_plugins import Uniform, Weighting
from undimix_plugins.methods import catalogue

MANUAL = Path(__file__).parent.parent / "docs" / "methods.md"


def test_the_manual_has_the_list() -> None:
    """`python -m undimix_plugins methods --markdown` gives what stands between the marks."""
    text = MANUAL.read_text(encoding="utf-8")
    _, _, rest = text.partition("<!-- methods -->\n")
    listed, _, _ = rest.partition("<!-- /methods -->")
    assert listed == catalogue.markdown()


def test_every_weighting_is_listed() -> None:
    public = (getattr(undimix_plugins, name) for name in undimix_plugins.__all__)
    weightings = {each.__name__ for each in public if isinstance(each, type) and issubclass(each, Weighting)}
    listed = [method.name for method in catalogue.METHODS]
    assert weightings - {Weighting.__name__, Uniform.__name__} <= set(listed)
    assert len(set(listed)) == len(listed)


def test_the_command_prints_them() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "undimix_plugins", "methods"], capture_output=True, text=True, check=True
    )
    for method in catalogue.METHODS:
        assert f"{method.name}, arXiv {method.source}: " in ran.stdout
        assert method.equation[:40] in ran.stdout.replace("\n    ", " ")
    assert max(map(len, ran.stdout.splitlines())) <= 80
    assert '"one line" means undimix(loss, Method())' in ran.stdout
    assert ran.stdout.endswith("are in examples/ of the repository.\n")
