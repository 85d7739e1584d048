"""Every example runs as a user would run it, a few steps long, and shows its help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))

RECIPES = {  # of methods that are no weightings
    "lightly_active_sampling.py",
    "lightly_adco.py",
    "lightly_imix.py",
    "lightly_mmcl.py",
    "lightly_non_semantic.py",
    "lightly_unmix.py",
    "sentence_transformers_ance.py",
}


def run(script: str, *arguments: str, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_there_is_a_script_per_toolkit() -> None:
    assert set(SCRIPTS) == {
        "demo.py",
        "lightly_moco.py",
        "lightly_simclr.py",
        *RECIPES,
        "pyg_grace.py",
        "pyg_graphcl.py",
        "sentence_transformers_mnrl.py",
        "transformers_simcse.py",
    }


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "demo.py"])
def test_script_runs(script: str, tmp_path: Path) -> None:
    if script not in RECIPES:  # which have the same command line
        assert "--data" in run(script, "--help", folder=tmp_path)
    printed = run(script, "--max-steps", "2", "--seed", "1", folder=tmp_path)
    assert printed.count("before training: ") == 1
    assert printed.count(" s)") == 2  # plain and weighted, with their seconds
    assert not any(tmp_path.iterdir())  # nothing is left behind


def test_demo_runs(tmp_path: Path) -> None:
    printed = run("demo.py", "--seeds", "1", "--max-steps", "2", folder=tmp_path)
    for modality in ("vision", "text", "graphs"):
        assert f"| {modality}" in printed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]
