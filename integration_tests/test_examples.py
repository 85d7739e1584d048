"""Every example runs as a user would run it, a few steps long, and shows its help."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
IN_DEMO = {"lightly_simclr.py", "pyg_graphcl.py", "sentence_transformers_mnrl.py"}  # whose `train` the demo calls
STEPS = {
    script: ["--seeds", "1", "--max-steps", "2", "--picture", "demo.partial"]
    if script == "demo.py"
    else ["--max-steps", "2", "--seed", "1"]
    for script in SCRIPTS
    if script not in IN_DEMO
}

# Runs scripts one after the other in one process, which imports the toolkits once; each in a folder of its own.
DRIVER = """
import contextlib, io, json, os, runpy, sys, traceback
examples, root, *runs = json.loads(sys.argv[1])
sys.path.insert(0, examples)
results = {}
for name, script, arguments in runs:
    folder, printed, failure = os.path.join(root, name), io.StringIO(), ""
    os.makedirs(folder)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(os.path.join(examples, script), run_name="__main__")
        except SystemExit as ended:
            failure = str(ended.code or "")
        except BaseException:
            failure = traceback.format_exc()
    results[name] = {"printed": printed.getvalue(), "failure": failure, "left": sorted(os.listdir(folder))}
with open(os.path.join(root, "results.json"), "w") as file:
    json.dump(results, file)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def results(root: Path) -> Any:
    """What each script printed, what it failed with and what it left behind, for its help and for a run."""
    runs = [(f"help {script}", script, ["--help"]) for script in SCRIPTS if script != "demo.py"]
    runs += [(f"run {script}", script, arguments) for script, arguments in STEPS.items()]
    runs.append(("demo.py without a folder", "demo.py", ["--picture", "nowhere/demo.png"]))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    given = json.dumps([str(EXAMPLES), str(root), *runs])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, given], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "results.json").read_text(encoding="utf-8"))


def test_there_is_a_script_per_toolkit() -> None:
    assert set(SCRIPTS) == {
        "demo.py",
        "lightly_active_sampling.py",
        "lightly_adco.py",
        "lightly_imix.py",
        "lightly_mmcl.py",
        "lightly_moco.py",
        "lightly_non_semantic.py",
        "lightly_simclr.py",
        "lightly_unmix.py",
        "pyg_grace.py",
        "pyg_graphcl.py",
        "sentence_transformers_ance.py",
        "sentence_transformers_mnrl.py",
        "transformers_simcse.py",
    }


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "demo.py"])
def test_script_shows_its_help(script: str, results: dict[str, Any]) -> None:
    result = results[f"help {script}"]
    assert not result["failure"]
    assert "--data" in result["printed"]


@pytest.mark.parametrize("script", [script for script in STEPS if script != "demo.py"])
def test_script_runs(script: str, results: dict[str, Any]) -> None:
    result = results[f"run {script}"]
    assert not result["failure"]
    assert result["printed"].count("before training: ") == 1
    assert result["printed"].count(" s)") == 2  # plain and weighted, with their seconds
    assert not result["left"]


def test_demo_runs(root: Path, results: dict[str, Any]) -> None:
    result = results["run demo.py"]
    assert not result["failure"]
    for modality in ("vision", "text"):
        assert f"| {modality}" in result["printed"]
    assert ("| graphs" in result["printed"]) == (find_spec("grakel") is not None)
    assert (root / "run demo.py" / "demo.partial").read_bytes().startswith(b"\x89PNG")
    assert result["left"] == ["demo.partial"]


class Unwell(Text):
    """Drawn by half."""

    def draw(self, renderer: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["demo.png", "x.partial", "x.part"])
def test_picture_is_whole_or_as_it_was(name: str, tmp_path: Path) -> None:
    save_whole, figure, path = (
        runpy.run_path(str(EXAMPLES / "_shared" / "saving.py"))["save_whole"],
        Figure(),
        tmp_path / name,
    )
    save_whole(figure, path, format="png")
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")
    figure.add_artist(Unwell())
    with pytest.raises(KeyboardInterrupt):
        save_whole(figure, path, format="png")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


def test_demo_refuses_a_picture_that_it_could_not_save(results: dict[str, Any]) -> None:
    """Before it trains for minutes."""
    assert results["demo.py without a folder"]["failure"] == "2"
    assert results["demo.py without a folder"]["left"] == []
