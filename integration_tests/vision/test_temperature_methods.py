"""A schedule of the temperature and learned temperatures in pytorch_lightning's Trainer, on real digits."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly import loss as lightly_losses
from lightly.loss import DCLLoss, DetConSLoss, MACLLoss, NTXentLoss
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from integration_tests.vision.test_callbacks import Digits, Model, digits, fit  # noqa: F401  # a fixture
from undimix_lightly import MemoryBankCheckpoint, TemperatureSchedule
from undimix_lightly.adapter import CLASSES
from undimix_plugins import AdCo, ISogCLR, UnDiMix, cosine_temperature, undimix
from undimix_plugins.monitoring.temperature import losses_with_temperature

pytestmark = pytest.mark.usefixtures("frozen")


class Seen(Model):
    """Records the temperature of each batch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.temperatures = [*getattr(self, "temperatures", []), self.temperature_now()]
        return super().training_step(batch, batch_idx)

    def temperature_now(self) -> float:
        return self.criterion.temperature


def make(criterion: nn.Module) -> Seen:
    torch.manual_seed(1)
    return Seen(criterion, momentum=bool(getattr(getattr(criterion, "memory_bank", None), "size", [0])[0]))


LOSSES: dict[str, Any] = {
    "plain": lambda: NTXentLoss(0.2),
    "weighted": lambda: undimix(NTXentLoss(0.2)),
    "bank": lambda: undimix(NTXentLoss(0.2, memory_bank_size=(50, 8))),
    "plain-bank": lambda: NTXentLoss(0.2, memory_bank_size=(50, 8)),
    "DCL": lambda: undimix(DCLLoss(0.2)),
    "MACL": lambda: MACLLoss(0.2),
    "DirectCLR": lambda: undimix(lightly_losses.DirectCLRLoss(loss_dim=4)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_schedule(loss: Any, digits: Digits, tmp_path: Path) -> None:  # noqa: F811
    """Each step has its temperature and the loss of it; the last one stays."""
    model, logger = make(loss()), CSVLogger(tmp_path)
    fit(model, digits, tmp_path, TemperatureSchedule(0.1, 0.9, share=0.5), logger=logger, log_every_n_steps=1)
    expected = [cosine_temperature(step, 5, 0.1, 0.9) for step in range(10)]
    assert model.temperatures == pytest.approx(expected)
    assert model.criterion.temperature == model.temperatures[-1]
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [float(row["temperature"]) for row in csv.DictReader(file) if row["temperature"]]
    assert logged == pytest.approx(expected, rel=1e-6)
    assert len(set(model.losses)) == 10


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_step_is_the_loss_at_its_temperature(weighted: bool, digits: Digits, tmp_path: Path) -> None:  # noqa: F811
    plug: Any = undimix if weighted else (lambda loss: loss)
    model = make(plug(NTXentLoss(0.2)))
    fit(model, digits, tmp_path, TemperatureSchedule(steps=7))
    for views, temperature, loss in zip(model.views, model.temperatures, model.losses, strict=True):
        assert plug(NTXentLoss(temperature))(*views).item() == pytest.approx(loss, rel=1e-5)


def test_schedule_of_epochs_is_constant_within_each(digits: Digits, tmp_path: Path) -> None:  # noqa: F811
    model = make(NTXentLoss(0.2))
    fit(model, digits, tmp_path, TemperatureSchedule(epochs=4), max_epochs=3)
    assert model.temperatures == pytest.approx([1.0] * 5 + [0.55] * 5 + [0.1] * 5)


def test_schedule_counts_the_optimisers_steps(digits: Digits, tmp_path: Path) -> None:  # noqa: F811
    model = make(NTXentLoss(0.2))
    fit(model, digits, tmp_path, TemperatureSchedule(steps=4), accumulate_grad_batches=2)
    assert model.temperatures == pytest.approx([cosine_temperature(s, 4) for s in (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)])


@pytest.mark.parametrize("bank", [0, (50, 8)], ids=["in-batch", "bank"])
def test_schedule_resumed_is_schedule_whole(bank: Any, digits: Digits, tmp_path: Path) -> None:  # noqa: F811
    """Also in a longer training: its share is of the training that began."""
    callbacks = [MemoryBankCheckpoint()] if bank else []
    begun, whole, resumed = (make(undimix(NTXentLoss(0.2, memory_bank_size=bank))) for _ in range(3))
    fit(begun, digits, tmp_path, TemperatureSchedule(share=0.8), *callbacks, max_epochs=1).save_checkpoint(
        tmp_path / "begun.ckpt"
    )
    fit(resumed, digits, tmp_path, TemperatureSchedule(share=0.8), *callbacks, ckpt=tmp_path / "begun.ckpt")
    assert begun.temperatures + resumed.temperatures == pytest.approx([cosine_temperature(s, 4) for s in range(10)])
    if not bank:
        fit(whole, digits, tmp_path, TemperatureSchedule(steps=4))
        torch.testing.assert_close(torch.tensor(begun.losses + resumed.losses), torch.tensor(whole.losses))


class Own(nn.Module):
    """A user's loss, which no toolkit knows."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 0.5

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return NTXentLoss(self.temperature)(first, second)


def test_a_loss_of_ones_own_is_passed(digits: Digits, tmp_path: Path) -> None:  # noqa: F811
    model = make(Own())
    with pytest.raises(ValueError, match=r"expected a module with a contrastive loss .* got Seen without one; for a"):
        fit(model, digits, tmp_path, TemperatureSchedule(steps=4))
    fit(model, digits, tmp_path, TemperatureSchedule(steps=4, of=model.criterion), max_epochs=1)
    assert model.temperatures == pytest.approx([1.0, 0.55, 0.1, 0.55, 1.0])


def test_where_lightlys_losses_have_it() -> None:
    for loss in (DetConSLoss(gather_distributed=False), undimix(DetConSLoss(gather_distributed=False))):
        (found,) = losses_with_temperature(nn.Sequential(loss), tuple(CLASSES))
        assert found is loss.detconbloss
    adversary = AdCo(8, 16)
    assert losses_with_temperature(nn.Sequential(adversary)) == [adversary]


def test_schedule_refuses(digits: Digits, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="low, high: expected low at most high"):
        TemperatureSchedule(1.0, 0.1)
    with pytest.raises(TypeError, match="of: expected a loss, or a module that contains it, got 5"):
        TemperatureSchedule(of=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share: expected a training whose number of steps is known, got inf"):
        fit(make(NTXentLoss()), digits, tmp_path, TemperatureSchedule(), max_epochs=-1)
    learned = Own()
    del learned.temperature
    learned.temperature = nn.Parameter(torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"expected a number as Own\.temperature, got a tensor; a temperature that is"):
        fit(make(learned), digits, tmp_path, TemperatureSchedule(of=learned))


class Indexed(Dataset[Any]):
    """Images with their place in the data set."""

    def __init__(self, loader: Any) -> None:
        self.images = torch.cat([images for images, _ in loader])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index


class Individual(Model):
    """SimCLR with a temperature for each image."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, index = batch
        torch.manual_seed(self.global_step)
        views = [self.encoder(images + 0.1 * torch.randn_like(images)) for _ in range(2)]
        loss: Tensor = self.criterion(*views, index)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, index = batch
        self.criterion(self.encoder(images), self.encoder(images.flip(dims=[1])), index)


def individual() -> Individual:
    torch.manual_seed(1)
    return Individual(ISogCLR(size=125))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_learned_temperatures(precision: Any, digits: Digits, tmp_path: Path) -> None:  # noqa: F811
    model, loader = individual(), DataLoader(Indexed(digits), batch_size=25, shuffle=True)
    before = model.encoder[0].weight.detach().clone()
    fit(model, loader, tmp_path, precision=precision)
    criterion = model.criterion
    assert criterion.tau.dtype == criterion.u.dtype == torch.float32
    assert (criterion.tau != 0.1).all()
    assert criterion.tau.unique().numel() > 60
    assert criterion.tau.min() >= 0.05 * (1 - 1e-6)
    assert criterion.log_s.isfinite().all()
    assert torch.tensor(model.losses).isfinite().all()
    assert not torch.equal(model.encoder[0].weight.float(), before)


def test_learned_temperatures_resumed_are_those_of_a_whole_run(digits: Digits, tmp_path: Path) -> None:  # noqa: F811
    loader = DataLoader(Indexed(digits), batch_size=25)
    whole, begun, resumed = individual(), individual(), individual()
    fit(whole, loader, tmp_path)
    fit(begun, loader, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "begun.ckpt")
    fit(resumed, loader, tmp_path, ckpt=tmp_path / "begun.ckpt")
    torch.testing.assert_close(torch.tensor(begun.losses + resumed.losses), torch.tensor(whole.losses))
    torch.testing.assert_close(resumed.criterion.state_dict(), whole.criterion.state_dict())


def test_validation_leaves_the_temperatures(digits: Digits, tmp_path: Path) -> None:  # noqa: F811
    loader = DataLoader(Indexed(digits), batch_size=25)
    model = individual()
    trainer = fit(model, loader, tmp_path, max_epochs=1)
    before = {name: buffer.clone() for name, buffer in model.criterion.state_dict().items()}
    trainer.validate(model, loader, verbose=False)
    torch.testing.assert_close(model.criterion.state_dict(), before, rtol=0, atol=0)


def test_without_an_index(digits: Digits, tmp_path: Path) -> None:  # noqa: F811
    model = Model(ISogCLR(size=125))
    with pytest.raises(ValueError, match=r"^index: expected the place of each sample .* got None; ISogCLR learns a"):
        fit(model, digits, tmp_path)


def test_both_beside_undimix(digits: Digits, tmp_path: Path) -> None:  # noqa: F811
    """A schedule does not touch learned temperatures, which are in the same module."""
    model = make(undimix(NTXentLoss(0.2), UnDiMix(hardness=2.0)))
    model.other = ISogCLR(size=125)
    fit(model, digits, tmp_path, TemperatureSchedule(steps=4), max_epochs=1)
    assert model.temperatures == pytest.approx([1.0, 0.55, 0.1, 0.55, 1.0])
    assert (model.other.tau == 0.1).all()
