"""Every method trains through the one line, `undimix(loss, weighting)`, in every toolkit's own loop on real data."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from integration_tests.matrix import (
    lightly_cells,
    open_clip_cells,
    pyg_cells,
    pytorch_metric_learning_cells,
    sentence_transformers_cells,
    transformers_cells,
)
from integration_tests.matrix.cells import Run, apart, vector_of
from integration_tests.matrix.plain_loop import Training
from integration_tests.matrix.trainer_cells import MIDDLE, Toolkit, run_of, train
from tests.releases import is_installed
from undimix_plugins import (
    ADNCE,
    BCL,
    HCL,
    Debiased,
    FalseNegativeAttraction,
    FalseNegativeElimination,
    MoCHi,
    PositiveAware,
    ProGCL,
    Ring,
    SimilarityPenalty,
    UnDiMix,
    Uniform,
    Weighting,
    compose,
    undimix,
)

pytestmark = pytest.mark.usefixtures("frozen")

MIXED = {"N": 8, "s": 4, "s_prime": 2}
FALSE = {"k": 2, "threshold": 0.0}
# Made anew for each training, as ProGCL remembers what it has seen.
METHODS: dict[str, Callable[[], Weighting]] = {
    "Debiased": Debiased,
    "HCL": HCL,
    "HN-NCE": lambda: HCL(beta=0.5, tau_plus=0.0, alpha=0.5),
    "ADNCE": lambda: ADNCE(mu=0.7, sigma=0.5),
    "Ring": Ring,
    "BCL": BCL,
    "ProGCL": lambda: ProGCL(start=1),
    "SimilarityPenalty": SimilarityPenalty,
    "PositiveAware": lambda: PositiveAware(margin=0.05, margin_strategy="relative"),
    "FalseNegativeElimination": lambda: FalseNegativeElimination(**FALSE),
    "FalseNegativeAttraction": lambda: FalseNegativeAttraction(**FALSE),
    "MoCHi": lambda: MoCHi(**MIXED),
    "UnDiMix, Debiased": lambda: compose(UnDiMix(), Debiased(tau_plus=0.1)),
    "UnDiMix, FalseNegativeElimination": lambda: compose(UnDiMix(), FalseNegativeElimination(**FALSE)),
    "UnDiMix, MoCHi": lambda: compose(UnDiMix(), MoCHi(**MIXED)),
}


def in_lightning(row: str) -> Callable[[Weighting, Path], Run]:
    def run(weighting: Weighting, root: Path) -> Run:
        module = lightly_cells.make(lightly_cells.ROWS[row], "plain")
        module.criterion = undimix(module.criterion, weighting)
        return lightly_cells.trained(module, root, epochs=1)

    return run


def in_a_trainer(toolkit: Toolkit, row: str, kind: str) -> Callable[[Weighting, Path], Run]:
    def run(weighting: Weighting, root: Path) -> Run:
        model, loss = toolkit.make(toolkit.rows[row], kind)
        start, loss = vector_of(model), undimix(loss, weighting)
        return run_of(train(toolkit, toolkit.rows[row], model, loss, root, max_steps=MIDDLE), model, start)

    return run


def in_a_plain_loop(cls: type[Training], row: str, kind: str) -> Callable[[Weighting, Path], Run]:
    def run(weighting: Weighting, root: Path) -> Run:
        training = cls(cls.rows[row], kind)
        training.loss = undimix(training.loss, weighting)
        training.train(range(1))
        return training.run()

    return run


HOSTS: dict[str, Callable[[Weighting, Path], Run]] = {
    "lightly - NTXentLoss": in_lightning("NTXentLoss"),
    "lightly - NTXentLoss, memory bank": in_lightning("NTXentLoss, memory bank"),
    "sentence_transformers - MultipleNegativesRankingLoss": in_a_trainer(
        sentence_transformers_cells.TOOLKIT, "MultipleNegativesRankingLoss", "plain"
    ),
    **{
        f"lightly - {row}": in_lightning(row)
        for row in ("DCLLoss", "DCLWLoss", "MACLLoss", "DetConSLoss", "DetConBLoss", "DirectCLRLoss")
    },
    "sentence_transformers - GISTEmbedLoss": in_a_trainer(
        sentence_transformers_cells.TOOLKIT, "GISTEmbedLoss", "plain"
    ),
    "pyg - InfoGraphLoss": in_a_plain_loop(pyg_cells.Training, "InfoGraphLoss", "uniform"),
    "transformers - ImageTextLoss": in_a_trainer(transformers_cells.TOOLKIT, "ImageTextLoss", "uniform"),
    "pyg - GraphCLLoss": in_a_plain_loop(pyg_cells.Training, "GraphCLLoss", "uniform"),
    "pyg - GRACELoss": in_a_plain_loop(pyg_cells.Training, "GRACELoss", "uniform"),
    "transformers - SimCSELoss": in_a_trainer(transformers_cells.TOOLKIT, "SimCSELoss", "uniform"),
    **{
        f"pytorch_metric_learning - {row}": in_a_plain_loop(pytorch_metric_learning_cells.Training, row, "plain")
        for row in ("NTXentLoss", "NTXentLoss, triplets", "SupConLoss", "CrossBatchMemory")
    },
    "open_clip - ClipLoss": in_a_plain_loop(open_clip_cells.Training, "ClipLoss", "plain"),
}
if is_installed("stable-pretraining"):  # not beside old releases of the others
    import tests.quiet_imports  # noqa: F401
    from integration_tests.matrix import stable_pretraining_cells

    for row in stable_pretraining_cells.ROWS:
        HOSTS[f"stable_pretraining - {row}"] = in_a_plain_loop(stable_pretraining_cells.Training, row, "plain")

# Their loss of an anchor has a single positive.
NO_ATTRACTION = (
    "lightly - DCLWLoss",
    "lightly - MACLLoss",
    "sentence_transformers - GISTEmbedLoss",
    *(host for host in HOSTS if host.startswith("pytorch_metric_learning")),
)
# The positive has no term in their denominator, or one that they also weight anchors by.
NO_FACTOR = ("lightly - DCLLoss", "lightly - DCLWLoss", "lightly - MACLLoss", "pyg - GraphCLLoss")


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The training of a host's plain loss, once."""
    return cache(lambda host: HOSTS[host](Uniform(), tmp_path_factory.mktemp("uniform")))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_trains(host: str, method: str, uniform: Callable[[str], Run], tmp_path: Path) -> None:
    if method == "FalseNegativeAttraction" and host in NO_ATTRACTION:
        with pytest.raises(ValueError, match="expected one that makes no positives, for which this loss has no place"):
            HOSTS[host](METHODS[method](), tmp_path)
        return
    if method == "HN-NCE" and host in NO_FACTOR:
        with pytest.raises(ValueError, match=r"expected a positive_factor of 1 \(alpha=1 for HCL\)"):
            HOSTS[host](METHODS[method](), tmp_path)
        return
    plain, weighted = uniform(host), HOSTS[host](METHODS[method](), tmp_path)
    assert len(weighted.losses) >= MIDDLE
    for run in (plain, weighted):
        assert run.losses.isfinite().all()
        assert run.moved.isfinite().all()
        assert run.moved.any()
    # The first is of the same embeddings: what is drawn for a method comes after them. Rounding is 1e-15.
    assert apart(weighted.losses[:1], plain.losses[:1]) > 1e-4
    assert apart(weighted.moved, plain.moved) > 1e-4


@pytest.mark.parametrize("host", HOSTS)
def test_the_same_start(host: str, uniform: Callable[[str], Run], tmp_path: Path) -> None:
    """What the comparison stands on: from the same seed, the plain loss trains the same."""
    again = HOSTS[host](Uniform(), tmp_path)
    assert apart(again.losses, uniform(host).losses) == 0
    assert apart(again.moved, uniform(host).moved) == 0
