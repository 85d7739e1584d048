"""The manual's examples run, its reference is whole, and links work on unbuilt pages. `make docs` checks the rest."""

from __future__ import annotations

import importlib
import re
import tempfile
from pathlib import Path

import pytest

import tests.quiet_imports  # noqa: F401
import undimix_plugins
from tests.releases import is_installed, needs
from undimix_plugins import toolkit

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
LACKING = () if is_installed("stable-pretraining") else ("stable-pretraining",)
BLOCKS = {
    f"{page}-{number}": block
    for page, text in PAGES.items()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL), start=1)
    if page not in LACKING
}
REFERENCE = {
    "core": "undimix_plugins",
    "lightly": "undimix_lightly",
    "sentence-transformers": "undimix_sentence_transformers",
    "pyg": "undimix_pyg",
    "transformers": "undimix_transformers",
    "pytorch-metric-learning": "undimix_pytorch_metric_learning",
    "open-clip": "undimix_open_clip",
    "stable-pretraining": "undimix_stable_pretraining",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # what examples save goes with it
        monkeypatch.setattr(tempfile, "tempdir", folder)
        exec(compile(BLOCKS[name], f"{name} of docs", "exec"), {"__name__": "__main__"})
        monkeypatch.undo()


@pytest.mark.parametrize("page", [page for page in REFERENCE if page not in LACKING])
def test_reference_has_every_public_name_once(page: str) -> None:
    if page == "lightly":
        needs("lightly", "1.5.23", "it has no DirectCLRLoss, which the page names")
    if page == "sentence-transformers":
        needs("sentence-transformers", "6.0", "it has no losses of late interaction, which the page names")
    text = (DOCS / "api" / f"{page}.md").read_text(encoding="utf-8")
    module = importlib.import_module(REFERENCE[page])
    assert f".. currentmodule:: {module.__name__}\n" in text
    public = [name for name in module.__all__ if not name.startswith("__")]
    assert sorted(re.findall(r"\.\. auto\w+:: (\w+)", text)) == sorted(public)


def test_reference_has_what_an_adapter_imports_once() -> None:
    """What a training script imports, too, is on that page."""
    text = (DOCS / "api" / "toolkit.md").read_text(encoding="utf-8")
    own = set(toolkit.__all__) - set(undimix_plugins.__all__)
    assert sorted(re.findall(r"\.\. auto\w+:: (\w+)", text)) == sorted(own)


@pytest.mark.parametrize("page", [page for page in REFERENCE if page not in ("core", *LACKING)])
def test_toolkit_page_names_every_loss(page: str) -> None:
    module = importlib.import_module(REFERENCE[page])
    losses = [name for name in module.__all__ if name.endswith("Loss")]
    assert losses
    assert [name for name in losses if f"`{name}`" not in PAGES[page]] == []


def prose_of(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """The anchors that a code host gives to headings; those of `(name)=` are there in the built manual alone."""
    headings = re.findall(r"^#+ (.*)", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


WITH_LINKS = [*ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md"), *DOCS.glob("*.md"), *(DOCS / "api").glob("*.md")]


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_work_where_pages_are_not_built(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"", prose_of(page))
    broken = []
    for link in map("".join, links):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not re.match(r"\w+:", link) and not (
            target.exists() and (not anchor or target.suffix != ".md" or anchor in anchors_of(target))
        ):
            broken.append(link)
    assert broken == []
