"""open_clip's losses: with Uniform() they are its own, on one process and on several; and its own loop trains ours."""

from __future__ import annotations

import argparse
import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from open_clip import loss as host
from open_clip_train.params import parse_args
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

import undimix_open_clip
from integration_tests.matrix.cells import apart, vector_of
from integration_tests.multimodal.tiny_clip import clip, digits
from integration_tests.ranks import on_ranks
from tests.releases import needs
from undimix_plugins import HCL, UnDiMix, Uniform, info_nce, undimix
from undimix_plugins.toolkit import in_batch_negatives

BATCH, WIDTH, TOKENS, WORDS = 6, 8, 5, 11
Make = Callable[..., nn.Module]
LOSSES: dict[str, Make] = {
    "ClipLoss": host.ClipLoss,
    "CoCaLoss": lambda **kind: host.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.7, **kind),
}


def features(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, count, WIDTH, dtype=torch.float64, generator=draw)
    return normalize(images, dim=1), normalize(texts, dim=1)


def value(loss: nn.Module, images: Tensor, texts: Tensor, scale: Tensor, **named: Any) -> Tensor:
    if isinstance(loss, host.CoCaLoss):
        draw = torch.Generator().manual_seed(1)
        words = torch.randn(len(images), TOKENS, WORDS, dtype=torch.float64, generator=draw)
        return sum(loss(images, texts, words, torch.randint(WORDS, words.shape[:2], generator=draw), scale, **named))
    return loss(images, texts, scale, **named)


def outcome(loss: nn.Module, count: int = BATCH, **named: Any) -> list[Tensor]:
    """The value, and the gradients at the features, the learned scale and the bias, if there is one."""
    inputs = [*features(count), torch.tensor(1.5, dtype=torch.float64), *named.values()]
    inputs = [part.clone().requires_grad_() for part in inputs]
    images, texts, log_scale, *others = inputs
    result = value(loss, images, texts, log_scale.exp(), **dict(zip(named, others, strict=True)))
    return [result.detach(), *torch.autograd.grad(result, inputs)]


@pytest.mark.parametrize("cached", [False, True], ids=["", "labels cached"])
@pytest.mark.parametrize("name", LOSSES)
def test_uniform_is_the_hosts(name: str, cached: bool) -> None:
    plain, uniform = LOSSES[name](cache_labels=cached), undimix(LOSSES[name](cache_labels=cached), Uniform())
    for count in (1, 2, 7, 7, 3):  # the host keeps labels from one batch to the next
        for one, other in zip(outcome(uniform, count), outcome(plain, count), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_bias_cancels_and_has_a_gradient() -> None:
    needs("open-clip-torch", "3.1", "its loss does not add the bias, which then has no gradient")
    bias = {"logit_bias": torch.tensor(-10.0, dtype=torch.float64)}
    for one, other in zip(
        outcome(undimix(host.ClipLoss(), Uniform()), **bias), outcome(host.ClipLoss(), **bias), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.equal(outcome(undimix(host.ClipLoss()), **bias)[0], outcome(undimix(host.ClipLoss()))[0])


def test_a_bias_that_is_a_number_or_several() -> None:
    images, texts = features(BATCH)
    loss, scale = undimix(host.ClipLoss(), Uniform()), torch.tensor(4.0, dtype=torch.float64)
    assert torch.equal(loss(images, texts, scale, -10.0), loss(images, texts, scale))
    with pytest.raises(ValueError, match=r"logit_bias: expected one number for all pairs, got shape \[6\]"):
        loss(images, texts, scale, torch.zeros(BATCH))


def test_texts_in_another_precision() -> None:
    images, texts = (rows.float() for rows in features(BATCH))
    mixed = undimix(host.ClipLoss(), Uniform())(images.to(torch.bfloat16), texts, torch.tensor(4.0))
    plain = host.ClipLoss()(images.to(torch.bfloat16).float(), texts, torch.tensor(4.0))
    torch.testing.assert_close(mixed, plain, rtol=1e-6, atol=1e-6)


def test_dictionaries() -> None:
    images, texts = features(BATCH)
    scale = torch.tensor(4.0)
    for name in LOSSES:
        plain, uniform = LOSSES[name](), undimix(LOSSES[name](), Uniform())
        words, labels = torch.randn(BATCH, TOKENS, WORDS, dtype=torch.float64), torch.randint(WORDS, (BATCH, TOKENS))
        further = (words, labels) if name == "CoCaLoss" else ()
        ours, theirs = (loss(images, texts, *further, scale, output_dict=True) for loss in (uniform, plain))
        assert list(ours) == list(theirs)
        for part in theirs:
            torch.testing.assert_close(ours[part], theirs[part], rtol=1e-6, atol=1e-6)  # the scale is in float32


def test_coca_without_its_contrastive_part() -> None:
    plain, ours = host.CoCaLoss(2.0, 0.0), undimix(host.CoCaLoss(2.0, 0.0))
    images, texts = features(BATCH)
    assert torch.equal(value(ours, images, texts, torch.tensor(4.0)), value(plain, images, texts, torch.tensor(4.0)))


@pytest.mark.parametrize("method", [UnDiMix(), UnDiMix(mixing="linear"), HCL()], ids=repr)
def test_a_contrast_each_way(method: Any) -> None:
    images, texts = features(BATCH)
    ways = [info_nce(in_batch_negatives(*way, 1 / 4.0), method) for way in ((images, texts), (texts, images))]
    got = undimix(host.ClipLoss(), method)(images, texts, torch.tensor(4.0, dtype=torch.float64))
    torch.testing.assert_close(got, (ways[0] + ways[1]) / 2, rtol=1e-12, atol=1e-12)
    assert not torch.isclose(got, host.ClipLoss()(images, texts, torch.tensor(4.0)), rtol=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_the_line_keeps_the_class_and_its_settings(name: str) -> None:
    loss = LOSSES[name](local_loss=True, gather_with_grad=True, cache_labels=True)
    weighted = undimix(loss, hardness=2.0)
    assert type(weighted) is getattr(undimix_open_clip, name)
    assert weighted.weighting == UnDiMix(hardness=2.0)
    assert weighted.local_loss is weighted.gather_with_grad is weighted.cache_labels is True
    assert undimix(weighted) is weighted
    for same in (copy.deepcopy(weighted), pickle.loads(pickle.dumps(weighted))):
        for one, other in zip(outcome(same), outcome(weighted), strict=True):
            assert torch.equal(one, other)
    further = (2.0, 0.7) if name == "CoCaLoss" else ()
    made = getattr(undimix_open_clip, name)(*further, weighting=UnDiMix(hardness=2.0))
    assert torch.equal(outcome(made)[0], outcome(weighted)[0])
    assert getattr(undimix_open_clip, name)(*further).weighting == UnDiMix()


def test_half_precision_is_computed_in_float32() -> None:
    images, texts = (rows.to(torch.bfloat16) for rows in features(BATCH))
    scale = torch.tensor(4.0, dtype=torch.bfloat16)
    ours = undimix(host.ClipLoss(), Uniform())(images, texts, scale)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(
        ours, host.ClipLoss()(images.float(), texts.float(), scale.float()), rtol=1e-6, atol=1e-6
    )


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "SigLIP": (lambda: undimix(host.SigLipLoss()), TypeError, "SigLipLoss can't be weighted: its loss is a sigmoid"),
    "a teacher": (
        lambda: undimix(host.DistillClipLoss()),
        TypeError,
        "DistillClipLoss can't be weighted: it also compares whole distributions with a teacher's",
    ),
    "Horovod": (lambda: undimix(host.ClipLoss(use_horovod=True)), ValueError, "use_horovod: expected False"),
    "a last layer": (
        lambda: undimix(host.ClipLoss(), last_layer=nn.Linear(2, 2)),
        ValueError,
        "last_layer: expected none with a loss of images and texts",
    ),
    "gradients at a weight": (
        lambda: undimix(host.ClipLoss(), gradient="weight"),
        ValueError,
        "gradient: expected 'embedding' with a loss of images and texts, which come from a layer each, got 'weight'",
    ),
    "a scale as an option": (
        lambda: undimix(host.ClipLoss(), logit_scale=5.0),
        TypeError,
        "logit_scale is no option of undimix(), got logit_scale=5.0: it goes into the loss's call",
    ),
    "a factory": (lambda: undimix(open_clip.create_loss), TypeError, "expected a contrastive loss"),
    "a scale that is no tensor": (
        lambda: undimix(host.ClipLoss())(*features(3), 0.0),
        ValueError,
        "logit_scale: expected",
    ),
    "a scale of 0": (
        lambda: undimix(host.ClipLoss())(*features(3), torch.tensor(0.0)),
        ValueError,
        "logit_scale: expected",
    ),
    "images alone": (
        lambda: undimix(host.ClipLoss())(features(3)[0], features(4)[1], torch.tensor(4.0)),
        ValueError,
        "text_features: expected 3 rows, as image_features has, got 4",
    ),
    "not finite": (
        lambda: undimix(host.ClipLoss())(features(3)[0] * torch.nan, features(3)[1], torch.tensor(4.0)),
        ValueError,
        "image_features: expected finite embeddings, got a non-finite value in row 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    make, error, words = REFUSED[name]
    with pytest.raises(error) as came:
        make()
    assert words in str(came.value)


# --- several processes

MODES = {
    f"{'local' if local else 'all pairs'}, {'with' if grad else 'without'} gradients": {
        "local_loss": local,
        "gather_with_grad": grad,
    }
    for local in (False, True)
    for grad in (False, True)
}
METHODS: dict[str, Any] = {"uniform": Uniform(), "undimix": UnDiMix(), "linear": UnDiMix(mixing="linear")}


def shard(rank: int, ranks: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(2, BATCH * ranks, WIDTH, dtype=torch.float64, generator=draw)
    return rows[:, BATCH * rank : BATCH * (rank + 1)]


def step(loss: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The value, and the gradients at two layers and a learned scale."""
    torch.manual_seed(2)
    layers = [nn.Linear(WIDTH, WIDTH).double() for _ in range(2)]
    log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    parts = [normalize(layer(rows), dim=1) for layer, rows in zip(layers, inputs, strict=True)]
    result = loss(*parts, log_scale.exp())
    parameters = [*layers[0].parameters(), *layers[1].parameters(), log_scale]
    return [result.detach(), *torch.autograd.grad(result, parameters)]


def on_a_rank(rank: int, ranks: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for mode, kind in MODES.items():
        settings = {**kind, "rank": rank, "world_size": ranks, "cache_labels": True}
        results[mode] = {
            "host": step(host.ClipLoss(**settings), shard(rank, ranks)),
            **{
                name: step(undimix(host.ClipLoss(**settings), method), shard(rank, ranks))
                for name, method in METHODS.items()
            },
        }
        short = shard(rank, ranks)[:, : BATCH - (rank == ranks - 1)]
        with pytest.raises(ValueError, match="expected as many rows on every process"):
            step(undimix(host.ClipLoss(**settings)), short)
    return results


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(on_a_rank, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("mode", MODES)
def test_uniform_is_the_host_on_every_rank(mode: str, ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        for one, other in zip(results[mode]["uniform"], results[mode]["host"], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_the_ranks_together_are_one_process(mode: str, method: str, ranks: list[dict[str, Any]]) -> None:
    """Values in every mode; gradients where they flow back to the other processes."""
    whole = torch.cat([shard(rank, len(ranks)) for rank in range(len(ranks))], dim=1)
    want = step(undimix(host.ClipLoss(), METHODS[method]), whole)
    means = [
        torch.stack(parts).mean(dim=0) for parts in zip(*(results[mode][method] for results in ranks), strict=True)
    ]
    compared = len(want) if MODES[mode]["gather_with_grad"] else 1
    for one, other in list(zip(means, want, strict=True))[:compared]:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    if method != "uniform":
        assert not torch.isclose(means[0], ranks[0][mode]["host"][0], rtol=1e-4)


# --- open_clip's own loop


def arguments(*given: str) -> argparse.Namespace:
    options = parse_args(["--model", "tiny", "--device", "cpu", "--precision", "fp32", "--skip-scheduler", *given])
    options.rank, options.world_size, options.local_rank, options.distill, options.wandb = 0, 1, 0, False, False
    return options


class Data:
    """What the loop asks of its data. open_clip's own class is in a module that needs webdataset."""

    def __init__(self, dataloader: DataLoader[tuple[Tensor, ...]]) -> None:
        self.dataloader: Any = dataloader
        self.dataloader.num_batches, self.dataloader.num_samples = len(dataloader), len(dataloader.dataset)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        pass


def trained(kind: str, *given: str, bias: float | None = None) -> Tensor:
    """How far all parameters come in an epoch of `train_one_epoch`, whose loss comes from `create_loss`."""
    options = arguments("--batch-size", "16", *given)
    torch.manual_seed(0)
    model = clip(bias)
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    images, texts = digits(64)
    start = vector_of(model)
    loader = DataLoader(TensorDataset(images.float(), texts), batch_size=16)
    loss = open_clip.create_loss(options)
    if kind != "plain":
        loss = undimix(loss, Uniform() if kind == "uniform" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_one_epoch(model, {"train": Data(loader)}, loss, 0, optimizer, None, None, None, options)
    return vector_of(model) - start


# Options, and how far Uniform may be from plain, relative.
LOOPS: dict[str, tuple[tuple[str, ...], float]] = {
    "fp32": ((), 1e-4),
    "bf16": (("--precision", "amp_bf16"), 0.02),
    "accumulation": (("--accum-freq", "2"), 1e-4),
    "checkpointing": (("--grad-checkpointing",), 1e-4),
    "clipping": (("--grad-clip-norm", "1.0"), 1e-4),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_open_clips_own_loop(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    given, tolerance = LOOPS[loop]
    with caplog.at_level(logging.INFO):
        plain, uniform, weighted = (trained(kind, *given) for kind in ("plain", "uniform", "undimix"))
    assert "Contrastive_loss: " in caplog.text
    assert apart(uniform, plain) < tolerance
    assert apart(weighted, plain) > 2 * tolerance
    assert weighted.isfinite().all()


def test_a_model_with_a_bias_trains_in_it() -> None:
    plain, uniform = (trained(kind, bias=-10.0) for kind in ("plain", "uniform"))
    assert apart(uniform, plain) < 1e-4
