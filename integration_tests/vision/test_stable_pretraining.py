"""stable-pretraining's losses: with Uniform() they are its own; its own module and callbacks train ours."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

import tests.quiet_imports  # noqa: F401
from integration_tests.matrix.cells import apart, vector_of
from integration_tests.ranks import on_ranks
from undimix_plugins import HCL, UnDiMix, Uniform, info_nce, two_views, undimix
from undimix_plugins.toolkit import Contrast, LastLayerInputs, info_nce_both_ways

spt = pytest.importorskip("stable_pretraining", reason="it is not installed beside old releases of the others")

import lightning as pl  # noqa: E402
import torchmetrics  # noqa: E402
from stable_pretraining import forward  # noqa: E402
from stable_pretraining.losses.joint_embedding import InfoNCELoss  # noqa: E402

import undimix_lightly  # noqa: E402
import undimix_stable_pretraining  # noqa: E402

BATCH, WIDTH = 6, 8
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "NTXEntLoss": spt.losses.NTXEntLoss,
    "CLIPLoss": spt.losses.CLIPLoss,
    "InfoNCELoss": InfoNCELoss,
}
METHODS: dict[str, Any] = {"uniform": Uniform(), "undimix": UnDiMix(), "linear": UnDiMix(mixing="linear"), "hcl": HCL()}


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outcome(loss: nn.Module, *embeddings: Tensor, **further: Any) -> list[Tensor]:
    """The value and the gradients."""
    inputs = [part.clone().requires_grad_() for part in embeddings]
    value = loss(*inputs, **further)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["NTXEntLoss", "CLIPLoss"])
def test_uniform_is_the_hosts(name: str, count: int) -> None:
    for host in (LOSSES[name](), LOSSES[name](temperature=0.2)):
        views = rows(count), 3 * rows(count, seed=1)
        assert_equal(outcome(undimix(host, Uniform()), *views), outcome(host, *views))


def test_uniform_is_the_hosts_for_any_candidates() -> None:
    host = InfoNCELoss()
    anchors, candidates = rows(5), rows(9, seed=1)
    draw = torch.Generator().manual_seed(0)
    targets, mask = torch.tensor([8, 0, 0, 3, 4]), torch.rand(5, 9, generator=draw) < 0.4
    mask[torch.arange(5), targets] = False
    for further in ({}, {"mask": mask}, {"mask": mask, "logit_scale": 0.3}, {"logit_scale": torch.tensor(0.4)}):
        given = {"targets": targets, **further}
        assert_equal(
            outcome(undimix(host, Uniform()), anchors, candidates, **given),
            outcome(host, anchors, candidates, **given),
        )
    pairs = {"targets": torch.arange(5)}  # anchors that are candidates, too, with nothing left out
    assert_equal(outcome(undimix(host, Uniform()), anchors, anchors, **pairs), outcome(host, anchors, anchors, **pairs))


def test_a_temperature_of_the_call() -> None:
    """It divides, whatever its name; a learned one has the host's gradient."""
    host, images, texts = spt.losses.CLIPLoss(), rows(BATCH), rows(BATCH, seed=1)
    ours = undimix(host, Uniform())
    for scale in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
        torch.testing.assert_close(ours(images, texts, scale), host(images, texts, scale), rtol=1e-12, atol=1e-12)
    learned = torch.tensor(0.5, dtype=torch.float64)
    of_ours, of_host = (
        outcome(lambda scale, loss=loss: loss(images, texts, logit_scale=scale), learned) for loss in (ours, host)
    )
    assert_equal(of_ours, of_host)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_weighted(method: str) -> None:
    first, second = rows(BATCH), rows(BATCH, seed=1)
    units, weighting = (normalize(first, dim=1), normalize(second, dim=1)), METHODS[method]
    wanted = {
        "NTXEntLoss": info_nce(two_views(*units, 0.2), weighting),
        "CLIPLoss": info_nce_both_ways(*units, 0.2, weighting),
        "InfoNCELoss": info_nce(Contrast.of(units[0], torch.arange(BATCH)[:, None], units[1], None, 0.2), weighting),
    }
    for name, value in wanted.items():
        further = {"targets": torch.arange(BATCH)} if name == "InfoNCELoss" else {}
        got = undimix(LOSSES[name](temperature=0.2), weighting)(first, second, **further)
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)
        plain = LOSSES[name](temperature=0.2)(first, second, **further)
        assert bool(torch.isclose(got, plain, rtol=1e-4)) is (method == "uniform")


@pytest.mark.parametrize("name", LOSSES)
def test_the_line_keeps_the_class_and_its_settings(name: str) -> None:
    weighted = undimix(LOSSES[name](temperature=0.3), hardness=2.0)
    assert type(weighted) is getattr(undimix_stable_pretraining, name)
    assert (weighted.weighting, weighted.temperature) == (UnDiMix(hardness=2.0), 0.3)
    assert undimix(weighted) is weighted
    further = {"targets": torch.arange(BATCH)} if name == "InfoNCELoss" else {}
    given = rows(BATCH), rows(BATCH, seed=1)
    made = getattr(undimix_stable_pretraining, name)(temperature=0.3, weighting=UnDiMix(hardness=2.0))
    for same in (copy.deepcopy(weighted), pickle.loads(pickle.dumps(weighted)), made):
        for one, other in zip(outcome(same, *given, **further), outcome(weighted, *given, **further), strict=True):
            assert torch.equal(one, other)
    assert getattr(undimix_stable_pretraining, name)().temperature == LOSSES[name]().temperature
    assert getattr(undimix_stable_pretraining, name)().weighting == UnDiMix()


def test_the_weights_gradient_of_a_projector() -> None:
    projector, inputs = nn.Linear(WIDTH, WIDTH).double(), torch.cat([rows(BATCH), rows(BATCH, seed=1)])
    loss = undimix(spt.losses.NTXEntLoss(0.2), last_layer=projector)
    first, second = projector(inputs[:BATCH]), projector(inputs[BATCH:])
    lengths = torch.cat([first, second]).detach().norm(dim=1, keepdim=True)
    layer = LastLayerInputs(inputs / lengths, inputs / lengths, normalized=True)
    contrast = two_views(normalize(first, dim=1), normalize(second, dim=1), 0.2, last_layer=layer)
    wanted = info_nce(contrast, UnDiMix(gradient="weight"))
    torch.testing.assert_close(loss(first, second), wanted, rtol=1e-12, atol=1e-12)
    assert not torch.isclose(undimix(spt.losses.NTXEntLoss(0.2))(first, second), wanted, rtol=1e-6)


def simclr_model() -> Any:
    """A model of a built-in method, with a small encoder."""
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 8))
    return spt.methods.SimCLR(encoder, projector_dims=(8, 8, 8))


def test_a_built_in_method() -> None:
    torch.manual_seed(0)
    model, images = simclr_model(), torch.randn(2, 6, 3, 8, 8)
    plain = model(*images).loss
    model.simclr_loss = undimix(model.simclr_loss, Uniform())
    torch.testing.assert_close(model(*images).loss, plain, rtol=1e-5, atol=1e-6)
    model.simclr_loss = undimix(model.simclr_loss)
    loss = model(*images).loss
    loss.backward()
    assert not torch.isclose(loss, plain, rtol=1e-4)


class OwnCompute(spt.losses.NTXEntLoss):  # type: ignore[misc]
    def _compute(self, *arguments: Any, **named: Any) -> Tensor:
        return torch.zeros(())


class OwnLoss(InfoNCELoss):  # type: ignore[misc]
    """As the host's own are made: it calls `_compute`."""

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        value: Tensor = self._compute(queries, documents, torch.arange(len(queries)))
        return value


def info(anchors: Any = None, candidates: Any = None, targets: Any = None, **further: Any) -> Callable[[], Tensor]:
    anchors, candidates = rows(3) if anchors is None else anchors, rows(5) if candidates is None else candidates
    targets = torch.arange(3) if targets is None else targets
    return lambda: undimix(InfoNCELoss())(anchors, candidates, targets, **further)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no negatives": (lambda: undimix(spt.losses.BYOLLoss()), TypeError, "BYOLLoss has no negatives to weight"),
    "a model": (
        lambda: undimix(simclr_model()),
        TypeError,
        "weight the loss that trains it, model.simclr_loss = undimix(model.simclr_loss); supported: stable_pretraining",
    ),
    "a model with several": (
        lambda: undimix(spt.Module(crits=nn.ModuleList([InfoNCELoss(), nn.Linear(2, 2), InfoNCELoss()]))),
        TypeError,
        "it, model.crits[0] = undimix(model.crits[0]), model.crits[2] = undimix(model.crits[2]); supported",
    ),
    "own compute": (lambda: undimix(OwnCompute()), TypeError, "OwnCompute replaces NTXEntLoss._compute by its own"),
    "temperature": (lambda: undimix(spt.losses.NTXEntLoss(0.0)), ValueError, "temperature: expected"),
    "a last layer": (
        lambda: undimix(spt.losses.CLIPLoss(), last_layer=nn.Linear(2, 2)),
        ValueError,
        "last_layer: expected none with a loss of two kinds of features",
    ),
    "a scale of 0": (
        lambda: undimix(spt.losses.CLIPLoss())(rows(3), rows(3), torch.tensor(0.0)),
        ValueError,
        "logit_scale: expected",
    ),
    "a scale below 0": (lambda: info(logit_scale=-1.0)(), ValueError, "logit_scale: expected"),
    "lengths": (
        lambda: undimix(spt.losses.NTXEntLoss())(rows(3), rows(4)),
        ValueError,
        "z_j: expected 3 rows, as z_i has, got 4",
    ),
    "not finite": (
        lambda: undimix(spt.losses.CLIPLoss())(rows(3) * torch.nan, rows(3)),
        ValueError,
        "feats_i: expected finite embeddings",
    ),
    "a scale of two numbers": (
        lambda: undimix(spt.losses.CLIPLoss())(rows(3), rows(3), torch.ones(2)),
        ValueError,
        "logit_scale: expected one number, got shape [2]",
    ),
    "a tiny scale": (info(logit_scale=1e-16), ValueError, "logit_scale: expected at least 1e-10"),
    "targets of another shape": (info(targets=torch.arange(2)), ValueError, "targets: expected shape [3], got [2]"),
    "targets of probabilities": (info(targets=torch.ones(3)), ValueError, "targets: expected integer columns"),
    "a target that is ignored": (
        info(targets=torch.tensor([0, -100, 2])),
        ValueError,
        "targets: expected the index of a candidate for each anchor, 0 to 4, got -100 to 2",
    ),
    "a target too far": (info(targets=torch.tensor([0, 5, 2])), ValueError, "0 to 4, got 0 to 5"),
    "a mask of numbers": (
        info(mask=torch.zeros(3, 5)),
        ValueError,
        "mask: expected bool [3, 5] (anchors, candidates), got torch.float32 [3, 5]",
    ),
    "a mask of the target": (
        info(mask=torch.eye(3, 5, dtype=torch.bool)),
        ValueError,
        "mask: expected each anchor's target left in, got one that is excluded",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    make, error, words = REFUSED[name]
    with pytest.raises(error) as came:
        make()
    assert words in str(came.value)


@pytest.mark.parametrize("scale", [14.3, torch.tensor(14.3)], ids=["number", "tensor"])
def test_a_scale_that_multiplies_elsewhere_is_warned_of(scale: Any) -> None:
    with pytest.warns(UserWarning, match="logit_scale=14.3.*: at such a temperature all candidates count nearly"):
        undimix(spt.losses.CLIPLoss())(rows(3), rows(3, seed=1), scale)


def test_dtypes_that_mixed_precision_mixes() -> None:
    first, second = rows(BATCH).to(torch.bfloat16), rows(BATCH, seed=1).float()
    for name in LOSSES:
        further = {"targets": torch.arange(BATCH)} if name == "InfoNCELoss" else {}
        got = undimix(LOSSES[name](0.2), Uniform())(first, second, **further)
        torch.testing.assert_close(got, LOSSES[name](0.2)(first.float(), second, **further), rtol=1e-5, atol=1e-6)


def test_what_a_mask_leaves_out_has_no_weight() -> None:
    """As weights of the similarity show, which each negative has by itself."""
    anchors, candidates, draw = rows(5), rows(9, seed=1), torch.Generator().manual_seed(0)
    targets, mask = torch.tensor([8, 0, 0, 3, 4]), torch.rand(5, 9, generator=draw) < 0.4
    mask[torch.arange(5), targets] = False
    similarity = UnDiMix(similarity=1, influence=0, diversity=0)
    got = undimix(InfoNCELoss(0.2), similarity)(anchors, candidates, targets, mask)
    each = []
    for i in range(5):
        kept = [int(targets[i]), *(j for j in range(9) if not mask[i, j] and j != targets[i])]
        of_one = undimix(InfoNCELoss(0.2), similarity)
        each.append(of_one(anchors[i : i + 1], candidates[kept], torch.tensor([0])))
    torch.testing.assert_close(got, torch.stack(each).mean(), rtol=1e-10, atol=1e-10)


HOSTS_OWN = {
    "test_clip_loss": ("TestCLIPLoss", "CLIPLoss"),
    "test_collectives": ("TestCollectivesSingleProcess", "NTXEntLoss"),
}


@pytest.mark.parametrize("name", HOSTS_OWN)
def test_the_hosts_own_tests(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come with it. One of them asks for the last bit of a float32."""
    theirs = importlib.import_module(f"stable_pretraining.tests.unit.{name}")
    group, loss = HOSTS_OWN[name]
    monkeypatch.setattr(theirs, loss, partial(getattr(undimix_stable_pretraining, loss), weighting=Uniform()))
    tests = [test for test in vars(getattr(theirs, group)) if test.startswith("test_")]
    assert len(tests) >= 4
    for test in tests:
        if test != "test_loss_is_high_for_mismatch":
            getattr(getattr(theirs, group)(), test)()


def test_a_users_loss_of_the_hosts_compute() -> None:
    queries, documents = rows(BATCH), rows(BATCH, seed=1)
    ours = undimix(OwnLoss(0.2))
    assert isinstance(ours, OwnLoss)
    wanted = undimix(InfoNCELoss(0.2))(queries, documents, torch.arange(BATCH))
    assert torch.equal(ours(queries, documents), wanted)
    assert_equal(
        outcome(undimix(OwnLoss(0.2), Uniform()), queries, documents), outcome(OwnLoss(0.2), queries, documents)
    )


# --- several processes


def shard(rank: int, ranks: int) -> list[Tensor]:
    return [rows(BATCH * ranks, seed)[BATCH * rank : BATCH * (rank + 1)] for seed in (0, 1)]


def step(loss: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """The value, and the gradients at two layers."""
    torch.manual_seed(2)
    layers = [nn.Linear(WIDTH, WIDTH).double() for _ in range(2)]
    value = loss(*(layer(part) for layer, part in zip(layers, inputs, strict=True)))
    return [value.detach(), *torch.autograd.grad(value, [*layers[0].parameters(), *layers[1].parameters()])]


def on_a_rank(rank: int, ranks: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in ("NTXEntLoss", "CLIPLoss"):
        host = LOSSES[name](0.2)
        results[name] = {"host": step(host, shard(rank, ranks))}
        for method, weighting in METHODS.items():
            results[name][method] = step(undimix(host, weighting), shard(rank, ranks))
        short = [part[: BATCH - (rank == ranks - 1)] for part in shard(rank, ranks)]
        with pytest.raises(ValueError, match="expected as many rows on every process"):
            step(undimix(host), short)
    return results


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(on_a_rank, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["NTXEntLoss", "CLIPLoss"])
def test_uniform_is_the_host_on_every_rank(name: str, ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert_equal(results[name]["uniform"], results[name]["host"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["NTXEntLoss", "CLIPLoss"])
def test_the_ranks_together_are_one_process(name: str, method: str, ranks: list[dict[str, Any]]) -> None:
    whole = [torch.cat(parts) for parts in zip(*(shard(rank, len(ranks)) for rank in range(len(ranks))), strict=True)]
    want = step(undimix(LOSSES[name](0.2), METHODS[method]), whole)
    of_ranks = zip(*(results[name][method] for results in ranks), strict=True)
    for parts, other in zip(of_ranks, want, strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(dim=0), other, rtol=0, atol=1e-10)


# --- its own module, Trainer and callbacks


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where it writes what it says of a training."""
    spt.set(cache_dir=str(tmp_path_factory.getbasetemp()))


class Views(Dataset[dict[str, Any]]):
    """Two views of each digit, or the digit alone."""

    def __init__(self, two: bool) -> None:
        data = load_digits()
        self.images, self.labels, self.two = torch.tensor(data.images / 16).float()[:, None], data.target, two

    def __len__(self) -> int:
        return 128

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.images[index], int(self.labels[index])
        if not self.two:
            return {"image": image, "label": label}
        return {"views": [{"image": image.roll(by, dims=2), "label": label} for by in (0, 1)]}


def loader(two: bool) -> DataLoader[dict[str, Any]]:
    return DataLoader(Views(two), batch_size=32)


def module(kind: str, method: str = "simclr") -> Any:
    torch.manual_seed(0)
    loss = spt.losses.NTXEntLoss(0.2)
    if kind != "plain":
        loss = undimix(loss, Uniform() if kind == "uniform" else None)
    further: dict[str, Any] = {f"{method}_loss": loss}
    if method == "nnclr":
        further |= {"predictor": nn.Linear(16, 16), "hparams": {"support_set_size": 64, "projection_dim": 16}}
    return spt.Module(
        forward=getattr(forward, method),
        backbone=nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU()),
        projector=nn.Linear(32, 16),
        optim={"optimizer": {"type": "SGD", "lr": 0.1}, "scheduler": {"type": "ConstantLR"}, "interval": "epoch"},
        **further,
    )


def fit(
    one: Any,
    root: Path,
    epochs: int = 2,
    callbacks: Any = (),
    ckpt: Path | None = None,
    managed: bool = False,
    **settings: Any,
) -> Any:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=root,
        callbacks=list(callbacks),
        **{"enable_checkpointing": False, **settings},
    )
    data = spt.data.DataModule(train=loader(True), val=loader(False))
    if managed:
        spt.Manager(trainer=trainer, module=one, data=data, seed=0)()
    else:
        trainer.fit(one, data, ckpt_path=ckpt)
    return trainer


def trained(kind: str, root: Path, method: str = "simclr", **settings: Any) -> Tensor:
    one = module(kind, method)
    start = vector_of(one.backbone)
    fit(one, root, **settings)
    return vector_of(one.backbone) - start


# Settings of the Trainer, and how far Uniform may be from plain, relative.
LOOPS: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({}, 1e-4),
    "its Manager": ({"managed": True, "accumulate_grad_batches": 2}, 1e-4),
    "nnclr": ({"method": "nnclr"}, 1e-4),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_its_own_module(loop: str, tmp_path: Path) -> None:
    settings, tolerance = LOOPS[loop]
    plain, uniform, weighted = (trained(kind, tmp_path, **settings) for kind in ("plain", "uniform", "undimix"))
    assert apart(uniform, plain) < tolerance
    assert apart(weighted, plain) > 0.01


def test_half_precision(tmp_path: Path) -> None:
    """What is rounded in the model changes more than what the host's loss rounds."""
    kinds = ("plain", "uniform", "undimix")
    plain, uniform, weighted = (trained(kind, tmp_path, precision="bf16-mixed") for kind in kinds)
    assert apart(uniform, plain) < 2 * apart(trained("plain", tmp_path), plain)
    assert apart(weighted, plain) > 2 * apart(uniform, plain)


def test_half_precision_of_a_prediction_and_a_queue(tmp_path: Path) -> None:
    """NNCLR compares a prediction in bf16 with a queue in float32."""
    plain, uniform = (trained(kind, tmp_path, "nnclr", precision="bf16-mixed") for kind in ("plain", "uniform"))
    assert apart(uniform, plain) < 2 * apart(trained("plain", tmp_path, "nnclr"), plain)


def test_its_callbacks(tmp_path: Path) -> None:
    one = module("undimix")
    probe = spt.callbacks.OnlineProbe(
        one,
        name="probe",
        input="embedding",
        target="label",
        probe=nn.Linear(32, 10),
        loss=nn.CrossEntropyLoss(),
        metrics=torchmetrics.classification.MulticlassAccuracy(10),
    )
    knn = spt.callbacks.OnlineKNN(
        name="knn",
        input="embedding",
        target="label",
        queue_length=128,
        metrics={"accuracy": torchmetrics.classification.MulticlassAccuracy(10)},
        input_dim=32,
        k=5,
    )
    rank = spt.callbacks.RankMe(name="rank", target="embedding", queue_length=128, target_shape=32)
    metrics = fit(one, tmp_path, callbacks=[probe, knn, rank]).callback_metrics
    assert metrics["eval/knn_accuracy"] > 0.3
    assert metrics["fit/loss"].isfinite()
    assert {"eval/probe_MulticlassAccuracy", "rank"} <= metrics.keys()


def test_our_callbacks(tmp_path: Path) -> None:
    """Those for lightly's Trainer, which is Lightning's under another name."""
    callbacks = [undimix_lightly.HardnessWarmup(share=0.5), undimix_lightly.NegativeStatistics(every=1)]
    metrics = fit(module("undimix"), tmp_path, epochs=3, callbacks=callbacks).callback_metrics
    assert metrics["negatives/hardness"] == 1.0
    assert 1 < metrics["negatives/effective_number"] < 62


def test_a_resumed_training_is_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, first, again = (module("undimix") for _ in range(3))
    fit(whole, tmp_path)
    fit(first, tmp_path, epochs=1).save_checkpoint(tmp_path / "middle.ckpt")
    fit(again, tmp_path, ckpt=tmp_path / "middle.ckpt")
    assert torch.equal(vector_of(again), vector_of(whole))
    assert not torch.equal(vector_of(first), vector_of(whole))
