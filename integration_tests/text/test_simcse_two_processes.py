"""SimCSE in the Trainer on two processes: gradients are those of the mean over all ranks' micro-batches."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import DataCollatorWithPadding

from integration_tests.text import test_simcse_trainer as single
from undimix_transformers import SimCSELoss

COLLATOR = DataCollatorWithPadding(single.TOKENIZER)
RANKS = 2


def on_a_rank(rank: int, port: int, sentences: list[dict[str, Any]], root: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    results = {}
    for labels in (False, True):
        for form in (single.direct, single.in_a_function):
            data = [{**sentence, "labels": row // 2} if labels else sentence for row, sentence in enumerate(sentences)]
            model, loss = single.make_model(0.0).double(), form(SimCSELoss())
            trainer = single.make_trainer(model, data, Path(root), loss, COLLATOR, gradient_accumulation_steps=2)
            recorder = single.Recorder()
            trainer.add_callback(recorder)
            trainer.train()
            (gradients,) = recorder.gradients
            results[labels, form.__name__] = {name.removeprefix("module."): g for name, g in gradients.items()}
    torch.save(results, f"{root}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sentences() -> list[dict[str, Any]]:
    texts = [f"number {row} of {row**2} sentences about {word}" for row, word in enumerate("abcdefghijklmnop")]
    return [{"input_ids": ids} for ids in single.TOKENIZER(texts)["input_ids"]]


def test_gradients_are_those_of_the_mean(sentences: list[dict[str, Any]], tmp_path: Path) -> None:
    """Each rank has one step of two micro-batches, with labels (which the Trainer counts over all ranks) or without."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(on_a_rank, (port, sentences, str(tmp_path)), nprocs=RANKS)

    reference = single.make_model(0.0).double().train()
    batches = [COLLATOR(sentences[start : start + 4]) for start in range(0, 16, 4)]
    torch.stack([SimCSELoss()(reference(**batch)) for batch in batches]).mean().backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    for rank in range(RANKS):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert len(results) == 4
        for gradients in results.values():
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient.view_as(wanted[name]), wanted[name], rtol=0, atol=1e-10)
