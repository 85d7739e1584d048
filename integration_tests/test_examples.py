"""Every example runs as a user would run it, a few steps long, and shows its help."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from sklearn.datasets import load_digits
from torch import Tensor

from examples._shared.graphs import INK, DigitGraphs
from examples._shared.texts import halves, lee_articles, lee_retrieval, lee_split
from tests.releases import is_installed, is_older

EXAMPLES = Path(__file__).parent.parent / "examples"
EVERY = sorted(path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
LACKING = {  # in old releases
    "stable_pretraining_simclr.py": not is_installed("stable-pretraining"),
    "sentence_transformers_multi_vector.py": is_older("sentence-transformers", "6.0"),
}
SCRIPTS = [script for script in EVERY if not LACKING.get(script)]
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
    assert set(EVERY) == {
        "demo.py",
        "lightly_active_sampling.py",
        "lightly_adco.py",
        "lightly_imix.py",
        "lightly_isogclr.py",
        "lightly_mmcl.py",
        "lightly_moco.py",
        "lightly_non_semantic.py",
        "lightly_simclr.py",
        "lightly_temperature.py",
        "lightly_unmix.py",
        "open_clip_digits.py",
        "pyg_grace.py",
        "pyg_graphcl.py",
        "pytorch_metric_learning_supcon.py",
        "sentence_transformers_ance.py",
        "sentence_transformers_mnrl.py",
        "sentence_transformers_multi_vector.py",
        "stable_pretraining_simclr.py",
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
    for modality in ("vision", "text", "graphs"):
        assert f"| {modality}" in result["printed"]
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


def test_retrieval_ranks_the_other_half_among_held_out_articles() -> None:
    trained, held_out = lee_split()
    assert len(trained) == 195
    assert len(held_out) == 98
    assert len({*trained, *held_out}) == 195 + 98  # no article is in both, or twice
    assert {*trained, *held_out} == set(lee_articles())

    generator = torch.Generator().manual_seed(0)
    vectors = {half: torch.randn(4, generator=generator) for article in held_out for half in halves(article)}
    expected = 0.0
    for article in held_out:
        first, _ = halves(article)
        cosines = {
            other: torch.cosine_similarity(vectors[first], vectors[halves(other)[1]], dim=0).item()
            for other in held_out
        }
        rank = sorted(cosines, key=lambda other: -cosines[other]).index(article) + 1
        expected += 1 / rank / len(held_out)

    def embed(texts: list[str]) -> Tensor:
        return torch.stack([vectors[text] for text in texts])

    assert lee_retrieval(embed) == pytest.approx(expected, rel=1e-5)


def test_digit_graphs_join_the_pixels_with_ink() -> None:
    pixels, digits = load_digits(return_X_y=True)
    dataset = DigitGraphs()
    assert len(dataset) == len(digits) == 1797
    assert dataset.y.tolist() == digits.tolist()
    for index in (0, 1796):
        graph, image = dataset[index], pixels[index].reshape(8, 8)
        inked = [(row, column) for row in range(8) for column in range(8) if image[row, column] >= INK]
        for node, (row, column) in zip(graph.x.tolist(), inked, strict=True):
            assert node == pytest.approx([image[row, column] / 16, row / 7 - 0.5, column / 7 - 0.5], abs=1e-6)
        edges = {
            (i, j)
            for i, (row, column) in enumerate(inked)
            for j, (other_row, other_column) in enumerate(inked)
            if i != j and abs(row - other_row) <= 1 and abs(column - other_column) <= 1
        }
        assert set(map(tuple, graph.edge_index.T.tolist())) == edges
        assert graph.num_edges == len(edges)
