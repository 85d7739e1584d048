"""Benchmarks of node and graph embeddings, trained with PyG: GRACE on citation networks, GraphCL on TUDatasets.

    python -m benchmarks.embeddings.graphs --jobs 2
    python -m benchmarks.embeddings.graphs --data Cora --weighting "UnDiMix(hardness=2.0)"

A linear probe scores node embeddings: a logistic regression trains on a random tenth of the nodes, another tenth for
each seed, and predicts the classes of the others. Validation, for choosing settings, is on Planetoid's 500 validation
nodes; its probe trains on Planetoid's training nodes. The validation nodes are in no test split. A support vector
machine with ten-fold cross-validation and a leave-one-out 5-NN classifier score graph embeddings.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, LeaveOneOut, cross_val_score, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from torch.optim.swa_utils import update_bn
from torch_geometric import seed_everything
from torch_geometric.data import Data
from torch_geometric.datasets import Planetoid, TUDataset
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCN, GIN
from torch_geometric.transforms import NormalizeFeatures, OneHotDegree

from benchmarks.embeddings.command_line import main
from benchmarks.embeddings.files import atomic_path
from benchmarks.embeddings.geometry import geometry
from benchmarks.embeddings.protocol import EXPLORED, Benchmark
from benchmarks.embeddings.trials import Trial, quarters
from undimix_plugins import cosine_temperature, hardness_share, negative_statistics, undimix, watch
from undimix_pyg import GRACE, GRACELoss, GraphCL, GraphCLLoss, evaluate_embedding

Criterion = GRACELoss | GraphCLLoss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DATASETS = Path("datasets")
PERIODS = 5  # of a temperature schedule
PAIRED = 4  # batches of graphs whose two views are compared
FOLDS = 10  # of the SVM's cross-validation; each class needs a graph in each
LARGEST_FOR_SVM = 2000  # graphs; with more of them, the SVM takes longer than the training
# The SVM's accuracy on embeddings that GraphCL's authors trained (arXiv 2010.13902, unsupervised learning).
PUBLISHED = {"PROTEINS": "74.39 ± 0.45", "IMDB-BINARY": "71.14 ± 0.44"}


@dataclass(frozen=True)
class GRACESettings:
    """GRACE's settings as in the paper's appendix and the authors' code, without the temperature."""

    hidden: int
    learning_rate: float
    epochs: int
    activation: str
    drop_edges: tuple[float, float]
    drop_features: tuple[float, float]


PAPER = {
    "Cora": GRACESettings(128, 5e-4, 200, "relu", (0.2, 0.4), (0.3, 0.4)),
    "CiteSeer": GRACESettings(256, 1e-3, 200, "prelu", (0.2, 0.0), (0.3, 0.2)),
}
# Fewer epochs with a larger learning rate reach the same accuracy in a tenth of the time.
SMALL = {
    "Cora": GRACESettings(128, 5e-3, 40, "relu", (0.2, 0.4), (0.3, 0.4)),
    "CiteSeer": GRACESettings(128, 5e-3, 40, "prelu", (0.2, 0.0), (0.3, 0.2)),
}


@contextmanager
def root_of(kind: str, data: str, data_dir: Path | None) -> Iterator[str]:
    """The root folder of a PyG data set. Raw files of `data_dir` are copied there, since PyG writes beside them.

    One process at a time holds the folder's lock: PyG would take files that another one is writing for complete.
    """
    root = DATASETS / kind
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{data}.lock"):
        raw = root / data / "raw"
        given = None if data_dir is None else data_dir / kind / data / "raw"
        if given is not None and given.is_dir() and not raw.is_dir():
            with atomic_path(raw) as part:
                shutil.copytree(given, part, dirs_exist_ok=True)
        yield str(root)


@cache
def nodes(data: str, data_dir: Path | None) -> Data:
    with root_of("Planetoid", data, data_dir) as root:
        return Planetoid(root, data, transform=NormalizeFeatures())[0]


@cache
def graphs(data: str, data_dir: Path | None) -> TUDataset:
    with root_of("TUDataset", data, data_dir) as root:
        dataset = TUDataset(root, data, use_node_attr=True)
    if not dataset.num_features:  # social networks: the node degree, as in the literature
        degrees = [int(torch.bincount(graph.edge_index[0], minlength=1).max()) for graph in dataset]
        dataset.transform = OneHotDegree(max(degrees))
    return dataset


def node_splits(graph: Data, trial: Trial) -> tuple[np.ndarray, np.ndarray]:
    """The nodes that train the probe, and those that it is evaluated on."""
    if trial.split == "validation":
        return graph.train_mask.nonzero()[:, 0].numpy(), graph.val_mask.nonzero()[:, 0].numpy()
    free, labels = (~graph.val_mask).nonzero()[:, 0].numpy(), graph.y.numpy()
    return tuple(
        train_test_split(free, train_size=graph.num_nodes // 10, stratify=labels[free], random_state=trial.seed)
    )


def probe(rows: np.ndarray, labels: np.ndarray, train: np.ndarray, evaluation: np.ndarray) -> float:
    """The accuracy of a logistic regression on rows of length 1, its C cross-validated on the training nodes."""
    grid = {"logisticregression__C": [10.0**power for power in range(-1, 5)]}
    model = make_pipeline(Normalizer(), LogisticRegression(max_iter=2000))
    return float(
        GridSearchCV(model, grid, cv=5).fit(rows[train], labels[train]).score(rows[evaluation], labels[evaluation])
    )


def weighted(criterion: Criterion, trial: Trial, model: GRACE | GraphCL) -> Criterion:
    weighting = trial.loss_weighting()
    return undimix(criterion, weighting, last_layer=model.head[-1] if weighting.needs_last_layer else None)


def fit(
    model: GRACE | GraphCL,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Data],
    steps: int,
    trial: Trial,
) -> dict[str, Any]:
    """Trains one step for each batch; returns statistics of the negatives."""
    full, seen = criterion.weighting, list[dict[str, float]]()
    for step, batch in enumerate(batches):
        if trial.warmup:
            criterion.weighting = full.softened(hardness_share(step, steps, share=trial.warmup))
        if trial.highest:
            criterion.temperature = cosine_temperature(step, steps / PERIODS, trial.temperature, trial.highest)
        optimizer.zero_grad()
        batch = batch.to(DEVICE)
        views = model(batch)
        with ExitStack() as watching:
            if not trial.brief and step % max(1, steps // 20) == 0:
                observer = watch(lambda *compared, y=batch.y: seen.append(negative_statistics(*compared, labels=y)))
                watching.enter_context(observer)
            loss = criterion(*views, labels=batch.y if trial.class_known else None)
        loss.backward()
        optimizer.step()
    return quarters(seen)


def views_of(model: GRACE | GraphCL, data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of each node or graph, embedded without the head that only training has."""
    head, model.head = model.head, torch.nn.Identity()
    one, other = model(data)
    model.head = head
    return one.cpu(), other.cpu()


def train_nodes(trial: Trial, data_dir: Path | None) -> dict[str, Any]:
    graph = nodes(trial.data, data_dir).to(DEVICE)
    settings = (PAPER if trial.scale == "full" else SMALL)[trial.data]
    epochs = 2 if trial.scale == "tiny" else settings.epochs
    seed_everything(trial.seed)
    act = torch.nn.PReLU() if settings.activation == "prelu" else settings.activation
    encoder = GCN(graph.num_features, settings.hidden, num_layers=2, act=act)
    model = GRACE(encoder, settings.hidden, *settings.drop_edges, *settings.drop_features).to(DEVICE)
    statistics = {}
    if trial.trains:
        criterion = weighted(GRACELoss(temperature=trial.temperature), trial, model)
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, weight_decay=1e-5)
        statistics = fit(model, criterion, optimizer, repeat(graph, epochs), epochs, trial)
    with torch.no_grad():
        rows = model.eval().embed(graph).cpu()
        metrics = geometry(*views_of(model, graph), rows)
    graph = graph.cpu()
    metrics["accuracy"] = probe(rows.numpy(), graph.y.numpy(), *node_splits(graph, trial))
    return {"metrics": metrics, "statistics": statistics}


def train_graphs(trial: Trial, data_dir: Path | None) -> dict[str, Any]:
    dataset = graphs(trial.data, data_dir)
    seed_everything(trial.seed)
    encoder = GIN(dataset.num_features, 32, num_layers=3, norm="batch_norm", jk="cat")
    model = GraphCL(encoder, 32).to(DEVICE)
    loader, statistics = DataLoader(dataset, batch_size=trial.batch_size, shuffle=True), {}
    if trial.trains:
        criterion = weighted(GraphCLLoss(temperature=trial.temperature), trial, model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        epochs = 1 if trial.scale == "tiny" else 20
        batches = chain.from_iterable(repeat(loader, epochs))
        statistics = fit(model, criterion, optimizer, batches, epochs * len(loader), trial)
    else:  # so that it has the data's batch statistics, as a trained encoder has
        update_bn(loader, model, DEVICE)
    with torch.no_grad():
        model.eval()
        batches = DataLoader(dataset, batch_size=128)
        embedded = [(model.embed(batch.to(DEVICE)).cpu(), batch.y.cpu()) for batch in batches]
        rows, labels = map(torch.cat, zip(*embedded, strict=True))
        pairs = [views_of(model, batch.to(DEVICE)) for batch in islice(batches, PAIRED)]
        metrics = geometry(*map(torch.cat, zip(*pairs, strict=True)), rows)
    rows, labels = rows.numpy(), labels.numpy()
    nearest = make_pipeline(StandardScaler(), KNeighborsClassifier(5))
    metrics["nearest"] = float(cross_val_score(nearest, rows, labels, cv=LeaveOneOut()).mean())
    if len(rows) <= LARGEST_FOR_SVM and np.unique(labels, return_counts=True)[1].min() >= FOLDS:
        metrics["svm"] = evaluate_embedding(rows, labels, seed=trial.seed).accuracy
    return {"metrics": metrics, "statistics": statistics}


def train(trial: Trial, data_dir: Path | None) -> dict[str, Any]:
    return train_nodes(trial, data_dir) if trial.recipe == "GRACE" else train_graphs(trial, data_dir)


GRACE_TRIAL = Trial("graph", "GRACE", "Cora", "UnDiMix()", 0.4, 0, 0)
GRAPHCL_TRIAL = Trial("graph", "GraphCL", "ENZYMES", "UnDiMix()", 0.2, 128, 0)
# All nodes are anchors at once, so MoCHi's negatives for each would take longer than everything else together.
# GRACE's head ends in a linear layer, so gradient="weight" is possible here.
OF_NODES = (*(name for name in EXPLORED if name != "MoCHi()"), "UnDiMix(gradient='weight')")
BENCHMARKS = [
    Benchmark(GRACE_TRIAL, "accuracy", 0.4, explored_weightings=OF_NODES),
    Benchmark(replace(GRACE_TRIAL, data="CiteSeer"), "accuracy", 0.4, explores=False),
    *(
        Benchmark(replace(GRAPHCL_TRIAL, data=data), metric, 0.2, further, explores=False, tuned_on=("MUTAG", "PTC_MR"))
        for data, metric, further in (
            ("ENZYMES", "nearest", ("svm",)),
            ("NCI1", "nearest", ()),
            ("PROTEINS", "svm", ("nearest",)),
            ("IMDB-BINARY", "svm", ("nearest",)),
        )
    ),
]

if __name__ == "__main__":
    main(str(__doc__), train, BENCHMARKS)
