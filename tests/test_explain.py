"""Why negatives weigh what they weigh: the parts against slow loops, the order, the table, the plot."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from statistics import pstdev
from textwrap import dedent

import matplotlib as mpl
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import references
from tests.contrasts import Case, bank, in_batch, random_rows, rectangular
from undimix_plugins import (
    BCL,
    HCL,
    Contrast,
    Debiased,
    FalseNegativeElimination,
    Ring,
    UnDiMix,
    Uniform,
    Weighting,
    compose,
    explain,
    importance_weights,
    two_views,
)
from undimix_plugins.monitoring.explain import Explained, Explanation
from undimix_plugins.toolkit import GatheredPool, gather_constants, gather_parts

mpl.use("Agg")

CASES = {
    "in-batch-10": in_batch(5),
    "bank-3x7": bank(3, 7, temperature=0.2),
    "rectangular-4x9": rectangular(4, 9, offset=3, unit=False),
}
METHODS = {
    "geometric": UnDiMix(0.3, -0.7, 1.1, hardness=1.5),
    "linear": UnDiMix(0.3, 0.7, 1.1, hardness=1.5, mixing="linear"),
    "weight-euclidean": UnDiMix(gradient="weight", distance="euclidean"),
    "one": UnDiMix(0.0, 1.0, 0.0),
    "HCL": HCL(),
    "Uniform": Uniform(),
}


def parts(case: Case, method: UnDiMix, i: int) -> dict[int, dict[str, float]]:
    """By column and component, one negative at a time."""
    negatives = case.negatives(i)
    components = {
        "similarity": references.similarity(case.anchors, case.pool),
        "influence": references.influence(case, at_weight=method.gradient == "weight"),
        "diversity": references.diversity(case, method.distance),
    }
    strengths = {name: getattr(method, name) for name in components if getattr(method, name)}
    spread = pstdev([components["similarity"][i, j].item() / case.temperature for j in negatives])
    found: dict[int, dict[str, float]] = {j: {} for j in negatives}
    for name, strength in strengths.items():
        scores = references.standardised([components[name][i, j].item() for j in negatives])
        exponentials = [math.exp(method.hardness * score) for score in scores]
        for j, score, exponential in zip(negatives, scores, exponentials, strict=True):
            if method.mixing == "geometric":
                found[j][name] = method.hardness * references.share(spread) * strength * score
            else:
                share = strength / sum(strengths.values())
                found[j][name] = len(negatives) * share * exponential / sum(exponentials)
    return found


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weights_and_parts(case: Case, method: Weighting) -> None:
    anchor, k = 1, 2
    got = explain(case.contrast(), method, anchor, k=k)
    negatives = case.negatives(anchor)
    weights = importance_weights(case.contrast(), method)[anchor]
    order = sorted(negatives, key=lambda j: -weights[j].item())  # stable, as ties are to be
    assert (got.anchor, got.weighting, got.negatives) == (anchor, method, len(negatives))
    assert [negative.column for negative in got.most] == order[:k]
    assert [negative.column for negative in got.least] == order[-k:]
    expected = parts(case, method, anchor) if isinstance(method, UnDiMix) else {}
    for negative in (*got.most, *got.least):
        assert negative.weight == pytest.approx(weights[negative.column].item(), rel=1e-12)
        assert negative.parts == pytest.approx(expected.get(negative.column, {}), abs=1e-10)
        if got.rest is not None:
            assert math.log(negative.weight) == pytest.approx(sum(negative.parts.values()) + got.rest, abs=1e-10)
        elif negative.parts:
            assert negative.weight == pytest.approx(sum(negative.parts.values()), abs=1e-10)
    assert (got.rest is not None) == (isinstance(method, UnDiMix) and method.mixing == "geometric")


@given(seed=st.integers(0, 1000), k=st.integers(1, 12), mixing=st.sampled_from(["geometric", "linear"]))
def test_each_negative_once(seed: int, k: int, mixing: str) -> None:
    got = explain(in_batch(4, seed=seed).contrast(), UnDiMix(mixing=mixing), anchor=3, k=k)
    shown = [negative.column for negative in (*got.most, *got.least)]
    assert len(set(shown)) == len(shown) == min(2 * k, 6)
    assert len(got.most) == min(k, 6)
    weights = [negative.weight for negative in (*got.most, *got.least)]
    assert weights == sorted(weights, reverse=True)


def test_of_equal_weights_the_first_columns() -> None:
    got = explain(in_batch(4).contrast(), Uniform(), anchor=0, k=2)
    assert [negative.column for negative in got.most] == [1, 2]
    assert [negative.column for negative in got.least] == [6, 7]


class Mine(UnDiMix):
    """One's own, whose log-weights are not those of the parts."""

    def log_weights(self, prepared: object, rows: slice) -> torch.Tensor:
        return 2 * super().log_weights(prepared, rows)  # type: ignore[arg-type]


def test_a_subclass_has_weights_alone() -> None:
    got = explain(in_batch(4).contrast(), Mine(), anchor=0)
    assert (got.most[0].parts, got.rest) == ({}, None)


def test_without_negatives() -> None:
    for method in (UnDiMix(), UnDiMix(mixing="linear"), Uniform()):
        got = explain(two_views(*random_rows(2, 4, seed=0).split(1), 0.5), method, anchor=0)
        assert got == Explanation(0, method, 0, [], [], None)
        assert str(got) == f"anchor 0, 0 negatives, {method}\ncolumn  weight"
        assert len(got.plot().patches) == 0


def test_gradients_stay_out_of_it() -> None:
    views = random_rows(8, 4, seed=0).requires_grad_()
    contrast = two_views(*views.split(4), torch.tensor(0.5, requires_grad=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = explain(contrast, HCL(), anchor=0)
    detached = two_views(*views.detach().split(4), 0.5)
    assert got.most[0].weight == pytest.approx(explain(detached, HCL(), anchor=0).most[0].weight, rel=1e-6)


BAD = {
    "anchor-8": ({"anchor": 8}, ValueError, "anchor: expected one from 0 to 7, got 8"),
    "anchor-last": ({"anchor": -1}, ValueError, "anchor: expected a finite number at least 0, got -1"),
    "anchor-half": ({"anchor": 0.5}, ValueError, r"anchor: expected one from 0 to 7, got 0\.5"),
    "k": ({"k": 0}, ValueError, "k: expected a finite number at least 1, got 0"),
    "weighting": ({"weighting": UnDiMix}, TypeError, "weighting: expected an instance of Weighting"),
    "contrast": ({"contrast": torch.eye(3)}, TypeError, "contrast: expected a Contrast, got Tensor"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_refuses(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"contrast": in_batch(4).contrast(), "weighting": UnDiMix(), "anchor": 0}
    with pytest.raises(error, match=f"^{message}"):
        explain(**{**good, **arguments})  # type: ignore[arg-type]


GEOMETRIC = Explanation(
    anchor=3,
    weighting=UnDiMix(),
    negatives=126,
    most=[Explained(78, 7.8372, {"similarity": 1.149, "influence": 1.2764, "diversity": 0.0127})],
    least=[Explained(36, 0.05111, {"similarity": -0.9214, "influence": -1.1916, "diversity": -0.4941})],
    rest=-0.3787,
)
LINEAR = Explanation(
    anchor=0,
    weighting=UnDiMix(0.5, 0.0, 0.5, mixing="linear"),
    negatives=2,
    most=[Explained(2, 1.25, {"similarity": 0.5, "diversity": 0.75})],
    least=[Explained(1, 0.75, {"similarity": 0.5, "diversity": 0.25})],
    rest=None,
)


def test_table() -> None:
    assert str(GEOMETRIC) == dedent(
        """\
        anchor 3, 126 negatives, UnDiMix(similarity=0.5, influence=0.25, diversity=0.25, hardness=1.0, \
mixing='geometric', gradient='embedding', distance='cosine', detached=False)
        column  weight  similarity  influence  diversity
            78   7.837      +1.149     +1.276     +0.013
           ...
            36   0.051      -0.921     -1.192     -0.494
        log(weight) = similarity + influence + diversity - 0.379"""
    )
    assert str(LINEAR).splitlines()[1:] == [
        "column  weight  similarity  diversity",
        "     2   1.250      +0.500     +0.750",
        "     1   0.750      +0.500     +0.250",
        "weight = similarity + diversity",
    ]


def test_plot() -> None:
    """Bars of the parts, side by side from 0 to either side; their sum marked, the weight beside."""
    axes = GEOMETRIC.plot()
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axes.patches]
    expected = [
        (0, 0, 1.149),
        (0, 1.149, 1.2764),
        (0, 1.149 + 1.2764, 0.0127),
        (2, 0, -0.9214),
        (2, -0.9214, -1.1916),
        (2, -0.9214 - 1.1916, -0.4941),
    ]
    torch.testing.assert_close(torch.tensor(bars), torch.tensor(expected, dtype=torch.double))
    sums = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "D"]
    expected_sums = [(1.149 + 1.2764 + 0.0127, 0), (-0.9214 - 1.1916 - 0.4941, 2)]
    torch.testing.assert_close(torch.tensor(sums), torch.tensor(expected_sums, dtype=torch.double))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["column 78", "124 between", "column 36"]
    assert [text.get_text() for text in axes.texts] == ["7.84", "0.05", "weight"]
    legend = axes.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {"similarity", "influence", "diversity", "sum"}
    axes.figure.canvas.draw()


def test_plot_where_it_is_told_to() -> None:
    from matplotlib import pyplot as plt

    _, (axes, _) = plt.subplots(1, 2)
    assert LINEAR.plot(axes, labels=["first", "second", "a third one with a long text that goes on and on"]) is axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["a third one with a long text that goes …", "second"]
    with pytest.raises(ValueError, match=r"^labels: expected one for each column of the pool, 3 or more, got 2$"):
        LINEAR.plot(labels=["first", "second"])
    plain = explain(in_batch(4).contrast(), Uniform(), anchor=0, k=2).plot()
    assert [bar.get_width() for bar in plain.patches] == [1.0] * 4
    assert plain.get_legend() is None


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (
            compose(UnDiMix(), Debiased(), FalseNegativeElimination(k=8)),
            "UnDiMix + Debiased + FalseNegativeElimination",
        ),
        (compose(BCL(), Ring()).softened(0.25), "0.25 of BCL + Ring"),
        (HCL().softened(0.5), "HCL"),
        (Mine(), "Mine"),
        (compose(Mine(), Debiased()), "Mine + Debiased"),
    ],
)
def test_plots_title_names_the_methods(method: Weighting, named: str) -> None:
    title = explain(in_batch(4).contrast(), method, anchor=2, k=2).plot().get_title(loc="left")
    assert title.replace("\n", " ") == f"anchor 2 under {named}"
    assert max(map(len, title.split("\n"))) <= 64


def test_one_text_is_no_labels() -> None:
    with pytest.raises(TypeError, match=r"^labels: expected one for each column of the pool, got one text: 'a name'$"):
        LINEAR.plot(labels="a name")


PROCESSES, SAMPLES = 2, 4


def all_views() -> list[Tensor]:
    return list(random_rows(2 * PROCESSES * SAMPLES, 4, seed=5).double().split(PROCESSES * SAMPLES))


def of_process(rank: int) -> dict[str, Contrast]:
    """Two views of half the samples; queries against all documents; and what has to ask for the others' anchors."""
    own = torch.arange(SAMPLES) + rank * SAMPLES
    first, second = all_views()
    queries, documents = first[own], torch.cat([first, second])
    gathered = partial(gather_constants, queries)
    of_all = {
        "own_columns": None,
        "own_rows": torch.cat([own, own + len(first)]),
        "gather": partial(gather_parts, parts=2),
    }
    contrasts = {
        "views": two_views(first[own], second[own], 0.2, gathered=(first, second), offset=int(own[0])),
        "queries": GatheredPool(first, **of_all),
        "same-branch": GatheredPool(gathered, **{**of_all, "own_columns": torch.arange(len(first))}),
        "bank": GatheredPool(gathered, **of_all),
    }
    return {
        name: given
        if isinstance(given, Contrast)
        else Contrast.of(
            *(queries, second[own], documents, own[:, None] + len(first), 0.2),
            own_columns=own if given.own_columns is not None else None,
            positives_in_pool=True,
            gathered=given,
        )
        for name, given in contrasts.items()
    }


def on_a_process(rank: int, root: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/init", rank=rank, world_size=PROCESSES)
    contrasts, told = of_process(rank), {}
    weights = {name: importance_weights(contrast, UnDiMix()) for name, contrast in contrasts.items()}
    if rank == 0:  # alone
        told = {name: explain(contrasts[name], UnDiMix(), anchor=1) for name in ("views", "queries", "same-branch")}
        told["bank"] = explain(contrasts["bank"], UnDiMix(influence=0.0), anchor=1)
        with pytest.raises(ValueError, match=r"^contrast: expected all processes' anchors in it, which the influence "):
            explain(contrasts["bank"], UnDiMix(), anchor=1)
    assert gather_constants(torch.tensor([rank])).tolist() == [0, 1]  # none has asked for more than another
    torch.save((weights, told), f"{root}/{rank}.pt")
    dist.destroy_process_group()


def test_one_process_alone_explains(tmp_path: Path) -> None:
    """With a pool gathered from several, as all of them weigh; or refuses before it asks another."""
    torch.multiprocessing.spawn(on_a_process, (str(tmp_path),), nprocs=PROCESSES)
    weights, told = torch.load(tmp_path / "0.pt", weights_only=False)
    for name in ("views", "queries", "same-branch"):
        for negative in (*told[name].most, *told[name].least):
            assert negative.weight == pytest.approx(weights[name][1, negative.column].item(), rel=1e-10)
    joined = explain(two_views(*all_views(), 0.2), UnDiMix(), anchor=1)
    assert [negative.column for negative in told["views"].most] == [negative.column for negative in joined.most]
    for one, other in zip(told["views"].most, joined.most, strict=True):
        assert one.parts == pytest.approx(other.parts, rel=1e-10)
    assert told["bank"].negatives == 2 * PROCESSES * SAMPLES - 1


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^plot needs matplotlib, which is not installed: pip install matplotlib$"):
        GEOMETRIC.plot()
