"""Bad input is refused with the argument's name, what came and what was expected; and what a Contrast makes of good."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.contrasts import make_every_look_cost, random_rows
from undimix_plugins import Contrast, two_views
from undimix_plugins.toolkit import LastLayerInputs, as_full_precision, check_embeddings


def good() -> dict[str, object]:
    """Three anchors, their positives and a pool of five."""
    return {
        "anchors": random_rows(3, 4, seed=0),
        "positives": random_rows(3, 4, seed=1),
        "pool": random_rows(5, 4, seed=2),
        "excluded": torch.tensor([[0], [1], [-1]]),
        "temperature": 0.5,
    }


def with_value(rows: int, row: int, value: float) -> Tensor:
    tensor = random_rows(rows, 4, seed=0)
    tensor[row, 2] = value
    return tensor


BAD = {
    "anchors-rank": ("anchors", torch.zeros(4), r"expected a tensor of shape \[rows, width\], got shape \[4\]"),
    "pool-rank": ("pool", torch.zeros(5, 4, 1), r"expected a tensor .* got shape \[5, 4, 1\]"),
    "anchors-list": ("anchors", [[0.0, 1.0]], r"expected a tensor .* got list"),
    "positives-none": ("positives", None, r"expected a tensor .* got NoneType"),
    "positives-width": ("positives", torch.zeros(3, 6).double(), r"expected width 4, as anchors has, .* \[3, 6\]"),
    "pool-width": ("pool", torch.zeros(5, 3).double(), r"expected width 4, as anchors has, got shape \[5, 3\]"),
    "positives-rows": ("positives", torch.zeros(2, 4).double(), r"expected 3 rows, as anchors has, got 2"),
    "anchors-integers": ("anchors", torch.zeros(3, 4).long(), r"expected floating-point .* got torch\.int64"),
    "pool-bool": ("pool", torch.zeros(5, 4).bool(), r"expected floating-point embeddings, got torch\.bool"),
    "pool-complex": ("pool", torch.zeros(5, 4).cdouble(), r"expected floating-point .* got torch\.complex128"),
    "pool-dtype": ("pool", torch.zeros(5, 4), r"expected torch\.float64, as anchors has, got torch\.float32"),
    "positives-half": ("positives", torch.zeros(3, 4).half(), r"expected torch\.float64, .* got torch\.float16"),
    "pool-device": ("pool", torch.zeros(5, 4, device="meta").double(), r"expected device cpu, .* got meta"),
    "anchors-empty": ("anchors", torch.zeros(0, 4).double(), r"expected at least one row .* got shape \[0, 4\]"),
    "pool-empty": ("pool", torch.zeros(0, 4).double(), r"expected at least one row .* got shape \[0, 4\]"),
    "anchors-no-width": ("anchors", torch.zeros(3, 0).double(), r"expected at least one .* got shape \[3, 0\]"),
    "anchors-nan": ("anchors", with_value(3, 1, math.nan), r"expected finite embeddings, .* in row 1$"),
    "positives-inf": ("positives", with_value(3, 2, math.inf), r"expected finite embeddings, .* in row 2$"),
    "pool-minus-inf": ("pool", with_value(5, 4, -math.inf), r"expected finite embeddings, .* in row 4$"),
    "temperature-0": ("temperature", 0, r"expected a finite number above 0, got 0"),
    "temperature-minus-1": ("temperature", -1.0, r"expected a finite number above 0, got -1\.0"),
    "temperature-nan": ("temperature", math.nan, r"expected a finite number above 0, got nan"),
    "temperature-inf": ("temperature", math.inf, r"expected a finite number above 0, got inf"),
    "temperature-true": ("temperature", True, r"expected a finite number above 0, got True"),
    "temperature-text": ("temperature", "0.5", r"expected a finite number above 0, got '0\.5'"),
    "temperature-none": ("temperature", None, r"expected a finite number above 0, got None"),
    "temperature-tensor": ("temperature", torch.tensor([0.5, 1]), r"expected one floating-point number, got .* \[2\]"),
    "excluded-rank": ("excluded", torch.tensor([0, 1, 2]), r"expected shape \[3, k\], got \[3\]"),
    "excluded-rows": ("excluded", torch.tensor([[0], [1]]), r"expected shape \[3, k\], got \[2, 1\]"),
    "excluded-float": ("excluded", torch.zeros(3, 1), r"expected integer columns of the pool, got torch\.float32"),
    "excluded-bool": ("excluded", torch.zeros(3, 5).bool(), r"expected integer columns .* got torch\.bool"),
    "excluded-above": ("excluded", torch.tensor([[0], [5], [2]]), r"expected columns from -1 .* to 4, got 0 to 5"),
    "excluded-below": ("excluded", torch.tensor([[0], [-2], [2]]), r"expected columns from -1 .* to 4, got -2 to 2"),
    "excluded-device": ("excluded", torch.zeros(3, 1, device="meta").long(), r"expected device cpu, .* got meta"),
    "excluded-list": ("excluded", [[0], [1], [2]], r".*got list"),
    "own_columns-rank": ("own_columns", torch.tensor([[0], [1], [2]]), r"expected shape \[3\], got \[3, 1\]"),
    "own_columns-rows": ("own_columns", torch.tensor([0, 1]), r"expected shape \[3\], got \[2\]"),
    "own_columns-float": ("own_columns", torch.zeros(3), r"expected integer columns of the pool, got torch\.float32"),
    "own_columns-above": ("own_columns", torch.tensor([0, 1, 7]), r"expected columns from -1 .* to 4, got 0 to 7"),
    "own_columns-list": ("own_columns", [0, 1, 2], r".*got list"),
}


@pytest.mark.parametrize(("name", "value", "message"), BAD.values(), ids=BAD)
def test_contrast_refuses(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        Contrast.of(**{**good(), name: value})  # type: ignore[arg-type]


BAD_INPUTS = {
    "anchor_inputs-alone": (random_rows(3, 2, 0), None, r"pool_inputs: expected .* both, got None"),
    "pool_inputs-alone": (None, random_rows(5, 2, 0), r"anchor_inputs: expected .* both, got None"),
    "anchor_inputs-rows": (random_rows(2, 2, 0), random_rows(5, 2, 0), r"anchor_inputs: expected 3 rows, .* got 2"),
    "pool_inputs-rows": (random_rows(3, 2, 0), random_rows(4, 2, 0), r"pool_inputs: expected 5 rows, .* got 4"),
    "width": (random_rows(3, 2, 0), random_rows(5, 3, 0), r"pool_inputs: expected width 2, .* got shape \[5, 3\]"),
    "nan": (random_rows(3, 4, 0), with_value(5, 3, math.nan), r"pool_inputs: expected finite .* in row 3$"),
}


@pytest.mark.parametrize(("anchor_inputs", "pool_inputs", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_contrast_refuses_inputs(anchor_inputs: Tensor | None, pool_inputs: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Contrast.of(**good(), last_layer=LastLayerInputs(anchor_inputs, pool_inputs))  # type: ignore[arg-type]


VIEWS = random_rows(6, 4, seed=0)
BAD_VIEWS = {
    "width": (VIEWS[:3], VIEWS[3:, :2], {}, r"second: expected width 4, as first has, got shape \[3, 2\]"),
    "rows": (VIEWS[:3], VIEWS[3:5], {}, r"second: expected 3 rows, as first has, got 2"),
    "rank": (VIEWS[0], VIEWS[1], {}, r"first: expected a tensor .* got shape \[4\]"),
    "empty": (VIEWS[:0], VIEWS[:0], {}, r"first: expected at least one row .* got shape \[0, 4\]"),
    "temperature": (VIEWS[:3], VIEWS[3:], {"temperature": 0}, r"temperature: .* above 0, got 0"),
    "nan": (VIEWS[:3], with_value(3, 2, math.nan), {}, r"second: expected finite embeddings, .* in row 2$"),
    "offset-above": (VIEWS[:3], VIEWS[3:], {"gathered": (VIEWS, VIEWS), "offset": 4}, r"offset: .*0 to 3 .*got 4"),
    # An offset of -1 would read as "no column" for the first row.
    "offset-below": (VIEWS[:3], VIEWS[3:], {"gathered": (VIEWS, VIEWS), "offset": -1}, r"offset: .*got -1"),
    "gathered-rows": (VIEWS[:3], VIEWS[3:], {"gathered": (VIEWS, VIEWS[:4])}, r"gathered.*: expected 6 rows, .*got 4"),
}


@pytest.mark.parametrize(("first", "second", "options", "message"), BAD_VIEWS.values(), ids=BAD_VIEWS)
def test_two_views_refuses(first: Tensor, second: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        two_views(first, second, **{"temperature": 0.5, **options})  # type: ignore[arg-type]


def test_names_are_the_callers() -> None:
    with pytest.raises(ValueError, match=r"^out1: expected width 8, as out0 has, got shape \[4, 9\]"):
        check_embeddings(out0=torch.zeros(4, 8), out1=torch.zeros(4, 9))


def test_values_are_not_read_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading them would wait for the device, only what is known without is checked."""
    make_every_look_cost(monkeypatch)
    check_embeddings(z=torch.full((4, 8), torch.nan))
    with pytest.raises(ValueError, match=r"^z: .*got shape \[4\]"):
        check_embeddings(z=torch.full((4,), torch.nan))


def test_defaults_of_one_batch() -> None:
    """The same tensor object as anchors and pool: everybody is left out of their own negatives."""
    z = random_rows(3, 4, seed=0)
    one = Contrast.of(z, z.roll(1, 0), z, None, 0.5)
    assert one.positives_in_pool is True
    assert one.is_negative(slice(0, 3)).tolist() == [[False, True, True], [True, False, True], [True, True, False]]
    other = Contrast.of(z, z.roll(1, 0), z.clone(), None, 0.5)
    assert other.own_columns is None
    assert other.positives_in_pool is False
    assert other.is_negative(slice(0, 3)).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8], ids=str)
def test_columns_named_twice_or_by_padding(dtype: torch.dtype) -> None:
    excluded = torch.tensor([[1, 1, 0], [-1, -1, -1], [4, -1, 2]], dtype=dtype)
    contrast = Contrast.of(**{**good(), "excluded": excluded}, own_columns=torch.tensor([1, 3, -1]))  # type: ignore[arg-type]
    assert contrast.count.tolist() == [3.0, 4.0, 3.0]
    marks = [[j for j in range(5) if row[j]] for row in contrast.is_negative(slice(0, 3)).tolist()]
    assert marks == [[2, 3, 4], [0, 1, 2, 4], [0, 1, 3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rows_become_float32(dtype: torch.dtype) -> None:
    z = random_rows(3, 4, seed=0).to(dtype)
    inputs = random_rows(3, 2, seed=1).to(dtype)
    contrast = Contrast.of(z, z.roll(1, 0), z, None, 0.5, last_layer=LastLayerInputs(inputs, inputs))
    layer = contrast.last_layer
    for rows in (contrast.anchors, contrast.positives, contrast.pool, layer.anchor_inputs, layer.pool_inputs):
        assert rows.dtype == torch.float32
    assert contrast.anchors is contrast.pool  # still one batch
    assert contrast.count.tolist() == [2.0, 2.0, 2.0]


def test_full_precision_is_left_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        rows = random_rows(3, 4, seed=0, dtype=dtype)
        assert as_full_precision(rows) is rows


def test_frozen() -> None:
    contrast = Contrast.of(**good())  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        contrast.temperature = 1.0  # type: ignore[misc]


def test_explicit_hard_negatives() -> None:
    """Listed for each anchor, also after some negatives have been left out; what is excluded stays excluded."""
    rows = random_rows(3, 4, 0), random_rows(3, 4, 1), random_rows(5, 4, 2)
    hard = torch.tensor([[4, 3], [-1, 2], [-1, -1]], dtype=torch.int32)
    contrast = Contrast.of(*rows, torch.tensor([[3], [0], [1]]), 0.5, hard_negative_columns=hard)
    assert contrast.hard_negative_columns is not None
    assert contrast.hard_negative_columns.dtype == torch.long
    for made in (contrast, contrast.without(torch.tensor([[0], [1], [2]])), contrast.with_positives(hard[:, :1])):
        marks = made.is_hard_negative(slice(0, 3)).tolist()
        assert marks == [[j in row for j in range(5)] for row in hard.tolist()]
        assert made.is_hard_negative(slice(1, 2)).tolist() == marks[1:2]
        assert not made.is_negative(slice(0, 1))[0, 3]
    none = Contrast.of(*rows, None, 0.5)
    assert none.hard_negative_columns is None
    assert not none.is_hard_negative(slice(0, 3)).any()
    for bad, message in (
        (torch.tensor([[5], [0], [0]]), r"expected columns from -1 \(none\) to 4, got 0 to 5"),
        (torch.tensor([0, 0, 0]), r"expected shape \[3, k\], got \[3\]"),
        (torch.ones(3, 1), r"expected integer columns of the pool, got torch\.float32"),
    ):
        with pytest.raises(ValueError, match=rf"^hard_negative_columns: {message}"):
            Contrast.of(*rows, None, 0.5, hard_negative_columns=bad)
