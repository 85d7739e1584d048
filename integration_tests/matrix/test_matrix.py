"""Every supported loss in every machinery of its toolkit's own loop; `--matrix` runs all, else a few."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from integration_tests.matrix import (
    lightly_cells,
    open_clip_cells,
    pyg_cells,
    pytorch_metric_learning_cells,
    sentence_transformers_cells,
    transformers_cells,
)
from integration_tests.matrix.cells import cells, check
from tests.releases import is_installed

pytestmark = pytest.mark.usefixtures("frozen")

Record = Callable[[str, object], None]
# What takes seconds is chosen once for all that share a Trainer.
TOOLKITS: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "lightly": (lightly_cells, ()),
    "sentence_transformers": (sentence_transformers_cells, ("compile",)),
    "pyg": (pyg_cells, ("compile", "SIGKILL", "DDP")),
    "transformers": (transformers_cells, ("compile", "SIGKILL", "DDP")),
    "pytorch_metric_learning": (pytorch_metric_learning_cells, ("compile", "SIGKILL", "DDP")),
    "open_clip": (open_clip_cells, ("compile", "SIGKILL", "DDP")),
}
if is_installed("stable-pretraining"):  # not beside old releases of the others
    import tests.quiet_imports  # noqa: F401
    from integration_tests.matrix import stable_pretraining_cells

    TOOLKITS["stable_pretraining"] = (stable_pretraining_cells, ("compile", "SIGKILL", "DDP"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.function.__name__.removeprefix("test_")
    parameters = []
    if name in TOOLKITS:
        toolkit, left_out = TOOLKITS[name]
        every = metafunc.config.getoption("--matrix", default=False)
        chosen = cells(toolkit.ROWS, toolkit.MACHINERY, every, left_out)
        parameters = [pytest.param(*cell, id=" - ".join(cell)) for cell in chosen]
    metafunc.parametrize(("row", "column"), parameters)


def run_cell(toolkit: str, row: str, column: str, root: Path, record: Record) -> None:
    module, _ = TOOLKITS[toolkit]
    lack = module.LACKS.get((row, column))
    record("cell", (toolkit, row, column))
    place = zip((TOOLKITS, module.ROWS, module.MACHINERY), (toolkit, row, column), strict=True)
    record("place", [list(names).index(name) for names, name in place])
    record("of", sum(len(other.ROWS) * len(other.MACHINERY) for other, _ in TOOLKITS.values()))
    record("words", lack.words if lack else module.NOTES.get((row, column), ""))
    record("lacks", lack is not None)
    weighted = check(module.MACHINERY[column], module.ROWS[row], root, lack)
    record("breaks", None if weighted is None else weighted.breaks)


def test_lightly(row: str, column: str, tmp_path: Path, record_property: Record) -> None:
    run_cell("lightly", row, column, tmp_path, record_property)


def test_sentence_transformers(row: str, column: str, tmp_path: Path, record_property: Record) -> None:
    run_cell("sentence_transformers", row, column, tmp_path, record_property)


def test_pyg(row: str, column: str, tmp_path: Path, record_property: Record) -> None:
    run_cell("pyg", row, column, tmp_path, record_property)


def test_transformers(row: str, column: str, tmp_path: Path, record_property: Record) -> None:
    run_cell("transformers", row, column, tmp_path, record_property)


def test_pytorch_metric_learning(row: str, column: str, tmp_path: Path, record_property: Record) -> None:
    run_cell("pytorch_metric_learning", row, column, tmp_path, record_property)


def test_open_clip(row: str, column: str, tmp_path: Path, record_property: Record) -> None:
    run_cell("open_clip", row, column, tmp_path, record_property)


def test_stable_pretraining(row: str, column: str, tmp_path: Path, record_property: Record) -> None:
    run_cell("stable_pretraining", row, column, tmp_path, record_property)
