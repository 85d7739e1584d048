"""What integration tests share; the option that runs the whole matrix of losses and machinery, and its table."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration_tests.matrix.table import markdown, write

PAGE = Path(__file__).parent.parent / "docs" / "support.md"


@pytest.fixture(scope="module")
def frozen() -> Iterator[None]:
    """Keeps what is imported out of garbage collections, of which a Trainer makes one for each training."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="run every loss in every machinery, and write the table")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the table; the table of a whole run goes into docs/support.md."""
    if not config.getoption("--matrix"):
        return
    results = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(getattr(report, "user_properties", []))
            if "cell" in properties and report.when == "call":
                results.append({**properties, "failed": outcome == "failed"})
    if not results:
        return
    results.sort(key=lambda result: result["place"])
    table = markdown({tuple(result["cell"]): result for result in results})
    whole = len(results) == results[0]["of"]
    written = whole and write(table, PAGE)
    terminalreporter.write_line(f"\n{table}\n{PAGE.name}: {'written' if written else 'left as it was'}")
