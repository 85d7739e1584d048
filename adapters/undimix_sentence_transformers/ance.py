"""Hard negatives from a nearest-neighbour index of the corpus, mined again in the background during training (ANCE)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets.arrow_dataset import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from undimix_plugins.toolkit import check_choice
from undimix_sentence_transformers.host import DEFAULT_LABEL_COLUMNS
from undimix_transformers.trainer import trainers_above

# What may go on to mine_hard_negatives; the rest would change what comes back, or does not reach another process.
OPTIONS = (
    *("range_min", "max_score", "min_score", "absolute_margin", "relative_margin", "batch_size", "faiss_batch_size"),
    *("query_prompt_name", "query_prompt", "corpus_prompt_name", "corpus_prompt", "use_multi_process"),
)
# Modules come from where the parent has them, and from the current directory only where the parent's do.
SERVE = """
import sys
sys.path[:] = sys.argv[2:]
from undimix_sentence_transformers.ance import serve
serve(sys.argv[1])
"""


class ANCE(TrainerCallback):
    """Hard negatives from the whole corpus, mined by the model of a few steps ago.

    f_k is the model of step k. The negatives of an anchor q are `num_negatives` texts out of

        top(range_max; f_k(q), corpus) without q's positives,

    `mine_hard_negatives` finds them with faiss's exact index of inner products, as the authors' code does; the
    similarity is the cosine. A refresh runs in its own process while training goes on. It begins every `every` steps:
    it loads the weights of that step and encodes corpus and anchors. Its result replaces the negatives between two
    steps. If it takes longer than `every` steps, the next refresh begins when it ends. Training waits for the first
    refresh, of the untrained model, as the authors do. If a later refresh crashes, or cannot begin because the disk is
    full, the negatives stay, a warning gives the error, and the next refresh is tried. The process ends with the
    training, also when that fails or is killed.

    Give `dataset` to the Trainer. It has the pairs and columns negative_1, ..., whose texts are looked up at each
    access. A batch that a data loader has read ahead (one, and `dataloader_prefetch_factor` for each worker) keeps the
    negatives of the time when it was read. All rows of a batch have negatives of one refresh, except with workers *and*
    several datasets, where the Trainer reads rows one by one. All batch samplers work. NO_DUPLICATES looks at the
    current negatives (with workers, a swap can come between), NO_DUPLICATES_HASHED at those of the beginning of
    training. The Trainer's prompts are by column; mining has its own prompts. Each checkpoint gets its negatives as a
    file, and a resumed training continues with them. A refresh that was running begins again. If the file cannot be
    written, training ends with an error, as for the weights. Not supported: an IterableDataset, several processes
    (`torchrun`), sparse encoders, and systems other than POSIX.

    Pass the callback in the Trainer's `callbacks`, not to `add_callback`: it has to see `train` begin and end.

    Attributes:
        dataset: The pairs with their negatives: a Dataset with a transform.
        mined_at: The step whose weights mined the current negatives; -1 while these are random.

    Args:
        pairs: A Dataset without a format: anchors, positives, and labels if there are any. An anchor in several rows
            has several positives.
        corpus: The texts that negatives are taken from, with all positives; None for the positives alone. An anchor
            whose text is in the corpus can be its own negative.
        every: A refresh begins every so many steps of the Trainer, at least 1; 10,000 in the paper.
        num_negatives: How many negatives each pair has, at least 1. A pair for which fewer are found keeps the
            negatives that it has, at first random ones. A warning says how many pairs do.
        range_max: Negatives come from this many nearest texts, at least `num_negatives` (after a `range_min`).
        sampling_strategy: "random" takes any of these texts, "top" the nearest.
        device: The device on which the refresh encodes. With "cpu" it sees no GPU.
        use_faiss: Whether to search with faiss. False searches with the model's own similarity.
        seed: The seed of what is random. A refresh of step k uses `random.seed(seed + k)`.
        options: Further arguments of `mine_hard_negatives`: margins, scores, prompts, batch sizes, `range_min`,
            `use_multi_process`.

    Raises:
        TypeError: If `pairs` is not a Dataset, `corpus` is not a sequence or is a single text, or an option is none of
            those above. In training: if the model is not a SentenceTransformer.
        ValueError: If columns or texts are others than those above, a number is out of its range, or the corpus is too
            small. In training: if `train_dataset` is another, there are several processes, or a checkpoint's negatives
            are damaged.
        RuntimeError: In training: if the first refresh fails, a checkpoint's negatives cannot be written, or the
            callback was added after the Trainer was made.

    Warns:
        UserWarning: If a later refresh fails, or pairs keep their negatives.

    References:
        Xiong et al.: Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval, ICLR 2021,
        arXiv 2007.00808; top 200: the authors' `run_train.sh`.

    Examples:
        >>> pairs = Dataset.from_dict({"anchor": ["2 + 2", "3 + 3"], "positive": ["four", "six"]})
        >>> ance = ANCE(pairs, corpus=["seven"], every=100, relative_margin=0.05)
        >>> ance.dataset.column_names, ance.dataset[0]["negative_1"] in ("six", "seven")
        (['anchor', 'positive', 'negative_1'], True)
        >>> # SentenceTransformerTrainer(..., train_dataset=ance.dataset, callbacks=[ance])
    """

    citation: ClassVar[str] = """
@inproceedings{xiong2021approximate,
    title={Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval},
    author={Lee Xiong and Chenyan Xiong and Ye Li and Kwok-Fung Tang and Jialin Liu and Paul N. Bennett and
            Junaid Ahmed and Arnold Overwijk},
    booktitle={International Conference on Learning Representations},
    year={2021},
    url={https://arxiv.org/abs/2007.00808},
}
"""

    def __init__(
        self,
        pairs: Dataset,
        corpus: Sequence[str] | None = None,
        *,
        every: int,
        num_negatives: int = 1,
        range_max: int = 200,
        sampling_strategy: str = "random",
        device: str = "cpu",
        use_faiss: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.every, self.seed = _count("every", every), _count("seed", seed, 0)
        try:
            self.device = str(torch.device(device))
        except RuntimeError as error:
            raise ValueError(f"device: expected a device of torch's, got {device!r}") from error
        check_choice("sampling_strategy", sampling_strategy, ("random", "top"))
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise TypeError(f"options: expected some of {', '.join(OPTIONS)}, got {', '.join(unknown)}")
        least = _count("num_negatives", num_negatives) + _count("range_min", options.get("range_min", 0), 0)
        _count("range_max", range_max, least)
        if use_faiss and importlib.util.find_spec("faiss") is None:
            raise ImportError("use_faiss: faiss is not installed: pip install faiss-cpu")
        self.mining = {"num_negatives": num_negatives, "range_max": range_max, "use_faiss": use_faiss, **options}
        self.mining["sampling_strategy"] = sampling_strategy

        pairs, anchors, positives = _checked(pairs)
        if corpus is not None and (isinstance(corpus, (str, bytes)) or not isinstance(corpus, Sequence)):
            raise TypeError(f"corpus: expected a sequence of texts, got {type(corpus).__name__}; pass a list of them")
        texts = list(dict.fromkeys([*(positives if corpus is None else corpus), *positives]))
        digest = hashlib.sha256(str(num_negatives).encode())
        for text in (*texts, "", *anchors, "", *positives):
            if not isinstance(text, str):
                raise ValueError(f"pairs and corpus: expected texts, got {text!r}")
            digest.update(len(text).to_bytes(8, "little") + text.encode())
        self._name = f"ance-{digest.hexdigest()[:16]}.npz"  # in checkpoints: of these texts and no others
        table = _at_random(anchors, positives, texts, num_negatives, seed)

        self._shape, self._texts = table.shape, len(texts)
        self._held = Held(Path(tempfile.mkdtemp(prefix="ance-")))
        self._folder = self._held.folder
        self._table, self._log = self._folder / "negatives.npz", self._folder / "log"
        self._job, self._mined = self._folder / "job", self._folder / "job" / "mined.npz"
        pairs.select_columns(pairs.column_names[:2]).save_to_disk(str(self._folder / "pairs"))
        Dataset.from_dict({"text": texts}).save_to_disk(str(self._folder / "corpus"))
        _write(self._table, table=table, mined_at=-1)
        self.dataset = pairs
        for number in range(1, num_negatives + 1):
            self.dataset = self.dataset.add_column(f"negative_{number}", list(range(len(pairs))))
        self.dataset.set_transform(Lookup(self._folder, self._held))
        self._child: subprocess.Popen[bytes] | None = None
        self._busy = False  # whether the child has a refresh to do
        self._trainer: Trainer | None = None  # while it trains
        self._resumed_from: Path | None = None
        self._due = 0

    @property
    def mined_at(self) -> int:
        """The step of the weights that mined the negatives in use; -1 while these are random."""
        with np.load(self._table) as saved:
            return int(saved["mined_at"])

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Comes between the Trainer and its `train`, whose end no callback is told when it fails."""
        trainer, _ = next(trainers_above())
        vars(trainer)["train"] = partial(self._train, trainer, trainer.train)

    def _train(
        self, trainer: Trainer, train: Callable[..., Any], resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        found = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(str(trainer.args.output_dir))  # type: ignore[no-untyped-call]
        self._trainer, self._resumed_from = trainer, Path(found) if found else None
        try:
            return train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._stop()
            self._trainer = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mines the first negatives, or finds those of the checkpoint again."""
        self._stop()
        if self._trainer is None:
            raise RuntimeError("ANCE: expected in the Trainer's callbacks=[...] from the start, got added later")
        if args.world_size > 1:
            raise ValueError(f"ANCE: expected one process that trains, got {args.world_size}")
        if not isinstance(kwargs["model"], SentenceTransformer):
            raise TypeError(f"model: expected a SentenceTransformer, got {type(kwargs['model']).__name__}")
        data: Any = self._trainer.train_dataset
        if not any("negative_1" in part.column_names for part in (data.values() if isinstance(data, dict) else [data])):
            raise ValueError("train_dataset: expected the callback's own `dataset`, got one without its negatives")
        saved = self._resumed_from / self._name if self._resumed_from else None
        if saved is not None and saved.exists():
            table, mined_at, self._due = _read(saved, self._shape, self._texts)
            _write(self._table, table=table, mined_at=mined_at)
            return
        error = self._start(kwargs["model"], state.global_step)
        while not error and not self._ended():
            time.sleep(0.05)
        if error := error or self._swap():
            raise RuntimeError(f"ANCE: the first refresh failed, {error}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts negatives that have been mined into use, and begins a refresh that is due."""
        errors = [self._swap()] if self._ended() else []
        if not self._busy and self._due <= state.global_step < state.max_steps:
            errors.append(self._start(kwargs["model"], state.global_step))
        for error in filter(None, errors):
            warnings.warn(f"ANCE: a refresh failed and negatives stay as they are, {error}", stacklevel=2)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the negatives in use beside the checkpoint."""
        file = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / self._name
        if file.parent.is_dir():
            due = state.global_step if self._busy else self._due
            try:
                with np.load(self._table) as saved:
                    _write(file, table=saved["table"], mined_at=saved["mined_at"], due=due)
            except OSError as error:
                raise RuntimeError(
                    f"ANCE: the checkpoint's negatives could not be written to {file}, {error}"
                ) from error

    def _start(self, model: SentenceTransformer, step: int) -> str:
        """Begins a refresh by the model as it is; where it cannot, returns what went wrong."""
        self._due = step + self.every
        try:
            self._begin(model, step)
        except Exception as error:  # what saves a model has errors of its own for a full disk
            shutil.rmtree(self._job, ignore_errors=True)
            return f"{type(error).__name__}: {error}"
        self._busy = True
        return ""

    def _begin(self, model: SentenceTransformer, step: int) -> None:
        if self._child is not None and self._child.poll() is not None:
            self._stop()
        shutil.rmtree(self._job, ignore_errors=True)
        self._job.mkdir()
        model.save_pretrained(str(self._job / "model"), create_model_card=False)
        loading = {"device": self.device, "trust_remote_code": model.trust_remote_code}
        job = {"step": step, "seed": self.seed + step, "loading": loading, "mining": self.mining}
        (self._job / "job.json").write_text(json.dumps(job), encoding="utf-8")
        if self._child is None:
            environment = dict(os.environ)
            if self.device == "cpu":  # faiss would else take all GPUs
                environment["CUDA_VISIBLE_DEVICES"] = ""
            command = [sys.executable, "-c", SERVE, str(self._folder), *sys.path]
            with open(self._log, "wb") as log:
                # In a group of its own, so that what it starts can be ended with it.
                self._child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
                )
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # that it has ended is seen at the next step
            self._child.stdin.write(b"\n")
            self._child.stdin.flush()

    def _ended(self) -> bool:
        """Whether a refresh has, well or not."""
        return self._busy and self._child is not None and (self._mined.exists() or self._child.poll() is not None)

    def _swap(self) -> str:
        """Replaces the negatives by those mined; where there are none, returns what went wrong."""
        self._busy = False
        if not self._mined.exists():
            assert self._child is not None
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            error = "\n".join([f"exit code {self._child.returncode}:", *lines[-20:]])
            self._stop()
            return error
        with np.load(self._mined) as found:
            kept, rows = int(found["kept"]), len(found["table"])
        os.replace(self._mined, self._table)
        if kept:
            few = f"mine_hard_negatives found fewer than {self.mining['num_negatives']}"
            warnings.warn(f"ANCE: {kept} of {rows} pairs keep earlier negatives: {few}", stacklevel=3)
        return ""

    def _stop(self) -> None:
        """Ends the child and all that it has started."""
        if self._child is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.communicate()
        self._child, self._busy = None, False
        shutil.rmtree(self._job, ignore_errors=True)


class Held:
    """A folder that goes when nothing holds it any more in the process that made it, or that process ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        weakref.finalize(self, _remove, folder, os.getpid())


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # and not a process forked from it, which may end or let go earlier
        shutil.rmtree(folder, ignore_errors=True)


class Lookup:
    """A Dataset's transform: turns the number of a row, in a column negative_k, into its k-th negative of now."""

    def __init__(self, folder: Path, held: Held | None = None) -> None:
        self.folder, self._held = folder, held
        self._corpus: Dataset | None = None
        self._seen: tuple[int, ...] = ()
        self._table: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in a worker, reads the files itself."""
        return Lookup, (self.folder,)

    def __deepcopy__(self, memo: Any) -> Lookup:
        """A copy in this process, as most methods of a Dataset make one, holds the folder, too."""
        return Lookup(self.folder, self._held)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with texts; all its rows are of one table, whole, since a file is replaced and never changed."""
        with open(self.folder / "negatives.npz", "rb") as file:
            stat = os.fstat(file.fileno())
            if (seen := (stat.st_ino, stat.st_mtime_ns)) != self._seen:
                self._seen, self._table = seen, np.load(file)["table"]
        if self._corpus is None:
            self._corpus = _load(self.folder / "corpus")
        columns = {f"negative_{k + 1}": k for k in range(self._table.shape[1])}
        return {
            name: self._corpus[self._table[cells, columns[name]].tolist()]["text"] if name in columns else cells
            for name, cells in batch.items()
        }


def serve(folder: str) -> None:
    """What the child does: a refresh for each byte that it is sent."""
    jobs = queue.SimpleQueue[bytes]()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while jobs.get():
        refresh(Path(folder))


def _listen(jobs: queue.SimpleQueue[bytes]) -> None:
    while sent := os.read(0, 1):
        jobs.put(sent)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # the process that trains is no more


def refresh(root: Path) -> None:
    """Mines with the weights of the job, and writes the result whole."""
    work = root / "job"
    job = json.loads((work / "job.json").read_text(encoding="utf-8"))
    model = SentenceTransformer(str(work / "model"), **job["loading"])
    pairs, texts = _load(root / "pairs"), list(_load(root / "corpus")["text"])
    random.seed(job["seed"])
    mined = mine_hard_negatives(pairs, model, corpus=texts, output_format="n-tuple", verbose=False, **job["mining"])
    number = {text: place for place, text in enumerate(texts)}
    found = {
        (anchor, positive): [number[text] for text in negatives]
        for anchor, positive, *negatives in zip(*(list(mined[name]) for name in mined.column_names), strict=True)
    }
    with np.load(root / "negatives.npz") as saved:
        table = saved["table"]
    rows = list(zip(*(list(pairs[name]) for name in pairs.column_names), strict=True))
    for row, pair in enumerate(rows):
        table[row] = found.get(pair, table[row])
    _write(work / "mined.npz", table=table, mined_at=job["step"], kept=sum(pair not in found for pair in rows))


def _load(path: Path) -> Dataset:
    return Dataset.load_from_disk(str(path))


def _write(path: Path, **arrays: Any) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            np.savez(file, **arrays)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _read(path: Path, shape: tuple[int, int], texts: int) -> tuple[Any, int, int]:
    """A checkpoint's negatives, numbers of texts of that shape, when they were mined and when the next are due."""
    try:
        with np.load(path) as found:
            table, *steps = (found[name] for name in ("table", "mined_at", "due"))
    except Exception as error:  # zipfile's, numpy's and others
        came = f"{type(error).__name__}: {error}"
    else:
        arrays = (table, *steps)
        if any(array.dtype.kind not in "iu" for array in arrays) or [a.shape for a in arrays] != [shape, (), ()]:
            came = ", ".join(f"{array.dtype} {list(array.shape)}" for array in arrays)
        elif not 0 <= table.min() <= table.max() < texts or steps[0] < -1 or steps[1] < 0:
            came = f"{table.min()} to {table.max()}, mined at step {steps[0]}, due at step {steps[1]}"
        else:
            return table.astype(np.int64), int(steps[0]), int(steps[1])
    raise ValueError(
        f"resume_from_checkpoint: expected ANCE's negatives in {path}, integers {list(shape)} from 0 to {texts - 1}, "
        f"and two steps, got {came}; delete the file to have them mined anew, or resume from another checkpoint"
    )


def _count(name: str, value: Any, at_least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}: expected an integer of at least {at_least}, got {value!r}")
    return value


def _checked(pairs: Any) -> tuple[Dataset, list[str], list[str]]:
    """The pairs, anchors and positives first."""
    if not isinstance(pairs, Dataset):
        raise TypeError(f"pairs: expected a datasets.Dataset, got {type(pairs).__name__}")
    if pairs.format["type"] is not None:
        raise ValueError(f"pairs: expected no format or transform, got {pairs.format['type']!r}")
    columns = [name for name in pairs.column_names if name not in DEFAULT_LABEL_COLUMNS]
    if len(columns) != 2 or not len(pairs):
        raise ValueError(
            f"pairs: expected rows of anchor and positive (and {', '.join(DEFAULT_LABEL_COLUMNS)}), "
            f"got {len(pairs)} of {', '.join(pairs.column_names)}"
        )
    labels = [name for name in pairs.column_names if name not in columns]
    return pairs.select_columns([*columns, *labels]), list(pairs[columns[0]]), list(pairs[columns[1]])


def _at_random(anchors: list[str], positives: list[str], texts: list[str], count: int, seed: int) -> Any:
    """The numbers of texts that are no positives of the row's anchor [pairs, count]."""
    number, own = {text: place for place, text in enumerate(texts)}, dict[str, set[int]]()
    for anchor, positive in zip(anchors, positives, strict=True):
        own.setdefault(anchor, set()).add(number[positive])
    most = max(map(len, own.values()))
    if len(texts) < most + count:
        raise ValueError(
            f"corpus: expected at least {most + count} different texts, positives included, for {count} "
            f"negatives of an anchor with {most} positives, got {len(texts)}"
        )
    draw, table = random.Random(seed), np.zeros((len(anchors), count), dtype=np.int64)
    for row, anchor in enumerate(anchors):
        drawn = draw.sample(range(len(texts)), count + len(own[anchor]))
        table[row] = [place for place in drawn if place not in own[anchor]][:count]
    return table
