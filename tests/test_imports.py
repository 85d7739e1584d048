"""The core needs torch alone, and an adapter without its toolkit says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

TOOLKITS = (
    "lightly",
    "open_clip",
    "pytorch_metric_learning",
    "sentence_transformers",
    "stable_pretraining",
    "torch_geometric",
    "transformers",
    "sklearn",
    "pytorch_lightning",
)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_the_core_imports_no_toolkit() -> None:
    """Not even to try: a finder that refuses would be asked."""
    result = run(
        f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {TOOLKITS}:
            asked.append(name)
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

import torch
asked = []
sys.meta_path.insert(0, Refuse())
import undimix_plugins as up
contrast = up.two_views(torch.randn(4, 8), torch.randn(4, 8), 0.5)
assert up.info_nce(contrast, up.UnDiMix()).isfinite()
try:
    up.undimix(torch.nn.ReLU())
except TypeError:
    pass
loaded = [name for name in sys.modules if name.startswith("undimix_") and not name.startswith("undimix_plugins")]
print(asked, loaded)
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[] []"


@pytest.mark.parametrize(
    ("adapter", "toolkit", "extra"),
    [
        ("undimix_lightly", "lightly", "lightly"),
        ("undimix_sentence_transformers", "sentence_transformers", "sentence-transformers"),
        ("undimix_pyg", "torch_geometric", "pyg"),
        ("undimix_transformers", "transformers", "transformers"),
        ("undimix_open_clip", "open_clip", "open-clip"),
        ("undimix_stable_pretraining", "stable_pretraining", "stable-pretraining"),
        ("undimix_pytorch_metric_learning", "pytorch_metric_learning", "pytorch-metric-learning"),
    ],
)
def test_an_adapter_without_its_toolkit_names_the_extra(adapter: str, toolkit: str, extra: str) -> None:
    # None in sys.modules is Python's own way to say that a module is not there, to import and to find_spec alike.
    result = run(f"import sys\nsys.modules[{toolkit!r}] = None\nimport {adapter}")
    assert result.returncode == 1
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: ")
    assert f"needs {toolkit}" in error
    assert f"pip install 'undimix-plugins[{extra}]'" in error
