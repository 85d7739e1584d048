"""SimCSE in the Trainer on two processes: gradients are those of the mean over all ranks' micro-batches."""

from __future__ import annotations

import os
import re
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.data_loader import DataLoaderDispatcher
from datasets import Dataset
from transformers import DataCollatorWithPadding

from integration_tests.text import test_simcse_trainer as single
from undimix_plugins import undimix
from undimix_transformers import SentenceTuples, SimCSELoss, TwoViews

COLLATOR = DataCollatorWithPadding(single.TOKENIZER)
PADDED = DataCollatorWithPadding(single.TOKENIZER, padding="max_length", max_length=12)  # as cut batches have to be
RANKS = 2


def on_a_rank(rank: int, port: int, sentences: list[dict[str, Any]], root: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    results = {}
    for labels in (False, True):
        for form in (single.direct, single.in_a_function):
            data = [{**sentence, "labels": row // 2} if labels else sentence for row, sentence in enumerate(sentences)]
            model, loss = form(single.make_model(0.0).double(), SimCSELoss())
            trainer = single.make_trainer(model, data, Path(root), loss, COLLATOR, gradient_accumulation_steps=2)
            recorder = single.Recorder()
            trainer.add_callback(recorder)
            trainer.train()
            (gradients,) = recorder.gradients
            results[labels, form.__name__] = {name.removeprefix("module."): g for name, g in gradients.items()}
    torch.save(results, f"{root}/{rank}.pt")
    torch.save(streamed(sentences, Path(root)), f"{root}/{rank}-streamed.pt")
    dist.destroy_process_group()


def streamed(sentences: list[dict[str, Any]], root: Path) -> dict[str, Any]:
    """The losses of 13 examples, or the error, where accelerate cuts batches by row and where it does not."""
    outcomes: dict[str, Any] = {}
    views = Dataset.from_list(sentences[:13])
    triplets = Dataset.from_list([{"input_ids": [row["input_ids"]] * 3, "labels": 0} for row in sentences[:13]])
    by_class = undimix(SimCSELoss(rows_per_example=3), exclude_same_class=True)
    for name, data, loss, collator, dispatch in (
        ("cut", views, SimCSELoss(), TwoViews(PADDED), None),
        ("whole", views, SimCSELoss(), TwoViews(PADDED), False),
        ("even", views.select(range(12)), SimCSELoss(), TwoViews(PADDED), None),
        ("triplets", triplets.select(range(12)), SimCSELoss(rows_per_example=3), SentenceTuples(PADDED), None),
        ("labels", triplets, by_class, SentenceTuples(PADDED), None),
    ):
        settings = {"accelerator_config": {"dispatch_batches": dispatch}, "max_steps": 2, "learning_rate": 0.0}
        trainer = single.make_trainer(
            single.make_model(0.0), data.to_iterable_dataset(), root, loss, collator, **settings
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trainer.train()
                outcomes[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            except ValueError as error:
                outcomes[name] = str(error)
        outcomes[f"{name} warned"] = any("dispatch_batches" in str(warning.message) for warning in caught)
    outcomes["evaluated"] = evaluated_on_a_stream(triplets.select(range(8)), root)
    return outcomes


def evaluated_on_a_stream(triplets: Dataset, root: Path) -> list[str]:
    """What is warned of, or raised, in a training whose evaluations alone are on streamed data."""
    loss = undimix(SimCSELoss(rows_per_example=3), exclude_same_class=True)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "prediction_loss_only": True}
    trainer = single.make_trainer(single.make_model(0.0), triplets, root, loss, SentenceTuples(PADDED), **settings)
    trainer.eval_dataset = triplets.remove_columns("labels").to_iterable_dataset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.train()
        except ValueError as error:
            return [str(error)]
    assert isinstance(trainer.callback_handler.eval_dataloader, DataLoaderDispatcher)
    return [str(warning.message) for warning in caught if "dispatch_batches" in str(warning.message)]


@pytest.fixture(scope="module")
def sentences() -> list[dict[str, Any]]:
    texts = [f"number {row} of {row**2} sentences about {word}" for row, word in enumerate("abcdefghijklmnop")]
    return [{"input_ids": ids} for ids in single.TOKENIZER(texts)["input_ids"]]


@pytest.fixture(scope="module")
def results(sentences: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what both ranks came to."""
    root = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(on_a_rank, (port, sentences, str(root)), nprocs=RANKS)
    return root


def test_examples_of_a_stream_stay_whole_or_are_refused(results: Path, sentences: list[dict[str, Any]]) -> None:
    """On both ranks, none waiting for the other. Of 12 examples, 2 times 4 make the first step, 2 times 2 the last."""
    model, shares = single.make_model(0.0).eval(), ([slice(0, 4), slice(4, 8)], [slice(8, 10), slice(10, 12)])
    with torch.no_grad():
        parts = [[SimCSELoss()(model(**TwoViews(PADDED)(sentences[part]))) for part in step] for step in shares]
    wanted = [float(sum(step)) / 2 for step in parts]
    cut = r"expected 2 adjacent rows .* got 5 rows; accelerate's dispatch_batches .*\{\"dispatch_batches\": False\}"
    for rank in range(RANKS):
        outcome = torch.load(results / f"{rank}-streamed.pt")
        assert re.search(cut, outcome["cut"])
        assert "by accelerate's dispatch_batches: TrainingArguments(accelerator_config=" in outcome["labels"]
        assert outcome["even"] == pytest.approx(wanted, abs=1e-3)
        assert len(outcome["whole"]) == len(outcome["triplets"]) == 2
        warned = {name: outcome[f"{name} warned"] for name in ("cut", "whole", "even")}
        assert warned == {"cut": True, "whole": False, "even": True}
        assert outcome["evaluated"] == []  # evaluations without a label take no loss


def test_gradients_are_those_of_the_mean(results: Path, sentences: list[dict[str, Any]]) -> None:
    """Each rank has one step of two micro-batches, with labels (which the Trainer counts over all ranks) or without."""
    reference = single.make_model(0.0).double().train()
    batches = [COLLATOR(sentences[start : start + 4]) for start in range(0, 16, 4)]
    torch.stack([SimCSELoss()(reference(**batch)) for batch in batches]).mean().backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    for rank in range(RANKS):
        found = torch.load(results / f"{rank}.pt")
        assert len(found) == 4
        for gradients in found.values():
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient.view_as(wanted[name]), wanted[name], rtol=0, atol=1e-10)
