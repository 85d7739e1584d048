"""The benchmarks of embeddings: their commands on tiny data, their tables, and the pages that show these."""

from __future__ import annotations

import csv
import inspect
import io
import json
import operator
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from lightly.loss import NTXentLoss
from matplotlib import pyplot as plt
from PIL import Image
from scipy import stats
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import tests.quiet_imports  # noqa: F401
from benchmarks.embeddings import graphs, tables, text, toolkits, vision
from benchmarks.embeddings.command_line import main
from benchmarks.embeddings.files import atomic_path, write_atomically
from benchmarks.embeddings.geometry import geometry
from benchmarks.embeddings.protocol import (
    CURVES,
    EXPLORATORY_SEEDS,
    FLATNESS_TEMPERATURES,
    GRIDS,
    HCL,
    HCLS,
    METHODS,
    PLAIN,
    SCHEDULE,
    SEEDS,
    STAGES,
    TEMPERATURES,
    TESTED_FIRST,
    TUNING_SEED,
    UNDIMIX,
    Benchmark,
)
from benchmarks.embeddings.results import append, aside_of, file_of, load, metrics_of, read, set_aside
from benchmarks.embeddings.sweep import missing, result_of, sweep
from benchmarks.embeddings.trials import RULES, UNTRAINED, Trial
from tests.releases import is_older
from undimix_plugins import UnDiMix, info_nce, two_views, unit_rows
from undimix_transformers import SimCSELoss

# pip refuses to install the benchmarks beside older ones.
OLDER = [name for name, since in (("lightly", "1.6"), ("transformers", "5.0")) if is_older(name, since)]
pytestmark = pytest.mark.skipif(bool(OLDER), reason=f"the extra `benchmarks` asks for a newer {' and '.join(OLDER)}")

ROOT = Path(__file__).parent.parent
WORDS = ("card", "bank", "money", "lost", "transfer", "rate", "account", "top", "limit", "pin", "fee", "cash")


def images(path: Path, count: int) -> None:
    """JPEGs of noise about a colour that is the class's."""
    draw, files, labels = np.random.default_rng(count), [], []
    for number in range(count):
        labels.append(number % 10)
        pixels = draw.normal(25 * labels[-1], 20, (32, 32, 3)).clip(0, 255).astype("uint8")
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg")
        files.append(file.getvalue())
    offsets = np.array([0, *accumulate(map(len, files))])
    np.savez(path, jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=np.array(labels))


def texts(folder: Path) -> None:
    draw = random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(8))

    def write(name: str, rows: list[list[Any]], **options: Any) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, **options).writerows(rows)

    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    for part, count in (("train", 400), ("test", 40)):
        questions = [[f"{sentence()} {number % 4}", f"intent {number % 4}"] for number in range(count)]
        write(f"banking77/{part}.csv", [["text", "category"], *questions])
    rows = [["snli", sentence(), sentence(), sentence()] for _ in range(300)]
    write("triplets/train.tsv", [["source", "anchor", "positive", "hard_negative"], *rows], **tabs)
    write("wiki_sents/all_wiki_sents.txt", [[sentence()] for _ in range(100)])
    (folder / "sentcls").mkdir()
    for name, count in (("TREC.train", 400), ("TREC.test", 40), ("subj", 300)):
        lines = [f"{number % 4} {sentence()} {number % 4}\n" for number in range(count)]
        (folder / "sentcls" / f"{name}.all").write_text("".join(lines), encoding="latin-1")
    for part in ("dev", "test"):
        write(f"stsb/stsb-en-{part}.csv", [[sentence(), sentence(), number % 6] for number in range(30)])
    for year in range(12, 17):
        scored = [[number % 6, sentence(), sentence()] for number in range(20)]
        write(f"sts12-16/20{year}/one.test.tsv", [*scored, ["", sentence(), sentence()]], **tabs)


def citations(folder: Path) -> None:
    """A graph of 900 nodes in Planetoid's raw form: words and links tell the class."""
    draw = np.random.default_rng(0)
    labels = np.arange(900) % 7
    words = scipy.sparse.csr_matrix(
        (draw.random((900, 70)) < 0.05 + 0.5 * (np.arange(70) % 7 == labels[:, None])) * 1.0
    )
    classes = np.eye(7)[labels]
    linked: dict[int, list[int]] = defaultdict(list)
    for node in range(900):
        for other in draw.choice(900 // 7, 3) * 7 + labels[node]:
            linked[node].append(int(other))
            linked[int(other)].append(node)
    parts = {"x": slice(0, 140), "tx": slice(800, 900), "allx": slice(0, 800)}
    raw = folder / "Cora" / "raw"
    raw.mkdir(parents=True)
    for name, rows in parts.items():
        (raw / f"ind.cora.{name}").write_bytes(pickle.dumps(words[rows]))
        (raw / f"ind.cora.{name.replace('x', 'y')}").write_bytes(pickle.dumps(classes[rows]))
    (raw / "ind.cora.graph").write_bytes(pickle.dumps(dict(linked)))
    (raw / "ind.cora.test.index").write_text("\n".join(map(str, range(800, 900))))


def proteins(folder: Path) -> None:
    """Rings of five nodes in TUDataset's raw form: attributes tell the class, more or less."""
    draw, count = np.random.default_rng(0), 60
    places = [(5 * ring, node, step) for ring in range(count) for node in range(5) for step in (1, 4)]
    edges = [(first + node, first + (node + step) % 5) for first, node, step in places]
    attributes = draw.normal(size=(5 * count, 3)) + np.repeat(np.arange(count) % 2, 5)[:, None]
    parts = {
        "A": [f"{one + 1}, {other + 1}" for one, other in edges],
        "graph_indicator": [node // 5 + 1 for node in range(5 * count)],
        "graph_labels": [ring % 2 + 1 for ring in range(count)],
        "node_labels": [node % 3 + 1 for node in range(5 * count)],
        "node_attributes": [", ".join(f"{value:.4f}" for value in row) for row in attributes],
    }
    raw = folder / "ENZYMES" / "raw"
    raw.mkdir(parents=True)
    for name, rows in parts.items():
        (raw / f"ENZYMES_{name}.txt").write_text("\n".join(map(str, rows)) + "\n")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "cifar10").mkdir()
    images(folder / "cifar10" / "cifar10_train_jpeg.npz", 1024)
    images(folder / "cifar10" / "cifar10_test_jpeg.npz", 512)
    texts(folder / "text")
    citations(folder / "Planetoid")
    proteins(folder / "TUDataset")
    return folder


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision, which the commands below have, many CPUs take five times as long."""
    monkeypatch.setattr(text, "HALF", {**text.HALF, "bf16": False})


def command(module: str, *arguments: object, data_dir: Path, folder: Path) -> subprocess.Popen[str]:
    """The benchmark, as its user calls it, in another folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    told = [*arguments, "--scale", "tiny", "--data-dir", data_dir, "--results", folder / "results"]
    return subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.embeddings.{module}", *map(str, told)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(module: str, *arguments: object, data_dir: Path, folder: Path) -> str:
    process = command(module, *arguments, data_dir=data_dir, folder=folder)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize(
    ("module", "recipes"),
    [
        ("vision", {("CIFAR-10", "SimCLR"), ("CIFAR-10", "MoCo"), ("CIFAR-10-LT", "SimCLR")}),
        (
            "text",
            {(data, recipe) for data in ("banking77", "all-nli") for recipe in ("Static", "MiniLM")}
            | {("wiki", "SimCSE"), ("TREC", "Static"), ("SUBJ", "Static")},
        ),
    ],
)
def test_trains_one_weighting(module: str, recipes: set[tuple[str, str]], data_dir: Path, tmp_path: Path) -> None:
    arguments = ("--weighting", "UnDiMix(hardness=0.5)", "--temperature", 0.3, "--seed", 5)
    said = run(module, *arguments, data_dir=data_dir, folder=tmp_path)
    results = list(load(tmp_path / "results").values())
    told = [result["configuration"] for result in results]
    assert {(one["data"], one["recipe"]) for one in told} == recipes
    for result, configuration in zip(results, told, strict=True):
        assert result["modality"] == module
        assert result["seed"] == configuration["seed"] == 5
        assert configuration["weighting"] == "UnDiMix(hardness=0.5)"
        assert result["weighting"].startswith(repr(UnDiMix(hardness=0.5)))
        assert configuration["temperature"] == 0.3
        assert are_scores(result["metrics"])
        assert {"alignment", "uniformity"} <= result["metrics"].keys()
        assert {"torch", "undimix-plugins"} <= set(result["versions"])
        for value in result["metrics"].values():
            assert f"{value:.4f}" in said


def are_scores(metrics: dict[str, float]) -> bool:
    """Whether each metric is in its range."""
    ranges = {"alignment": (0, 4), "uniformity": (-8, 0)}
    limits = {name: ranges.get(name, (-1, 1)) for name in metrics}
    return all(low <= metrics[name] <= high for name, (low, high) in limits.items())


def benchmark_of(module: Any, data: str, recipe: str) -> Benchmark:
    return next(each for each in module.BENCHMARKS if (each.base.data, each.base.recipe) == (data, recipe))


@pytest.mark.parametrize(
    ("module", "data", "recipe"),
    [
        (vision, "CIFAR-10", "SimCLR"),
        (vision, "CIFAR-10", "MoCo"),
        (vision, "CIFAR-10-LT", "SimCLR"),
        (text, "TREC", "Static"),
        (text, "SUBJ", "Static"),
        (text, "all-nli", "Static"),
        (text, "all-nli", "MiniLM"),
        (text, "wiki", "SimCSE"),
        (graphs, "ENZYMES", "GraphCL"),
    ],
)
def test_what_was_trained_is_evaluated_by_all_that_is_reported(
    module: Any, data: str, recipe: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    benchmark = benchmark_of(module, data, recipe)
    one = replace(benchmark.base, scale="tiny", batch_size=16, split="test")
    untrained, trained = (
        module.train(replace(one, weighting=name), data_dir)["metrics"] for name in (UNTRAINED, "Uniform()")
    )
    assert {benchmark.metric, *benchmark.further} <= trained.keys() == untrained.keys()
    assert trained != untrained


@pytest.mark.parametrize(
    ("module", "data", "recipe"),
    [
        (vision, "CIFAR-10", "SimCLR"),
        (text, "banking77", "Static"),
        (text, "wiki", "SimCSE"),
        (graphs, "Cora", "GRACE"),
        (graphs, "ENZYMES", "GraphCL"),
    ],
)
def test_every_setting_of_a_trial_matters_and_a_seed_is_one_training(
    module: Any, data: str, recipe: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "STEPS_BETWEEN_STATISTICS", 1, raising=False)
    if module is text:  # whose evaluation takes longer than training, and is another test's
        monkeypatch.setattr(module, "evaluate", lambda model, trial, folder: {})
    base = benchmark_of(module, data, recipe).base
    most = 16 if recipe == "SimCSE" else 128  # a transformer takes long
    one = replace(base, scale="tiny", temperature=0.3, batch_size=min(base.batch_size, most))
    seen = module.train(one, data_dir)["statistics"]
    assert module.train(one, data_dir)["statistics"] == seen
    changes = {"temperature": 0.1, "weighting": "UnDiMix(hardness=2.0)", "warmup": 0.9, "seed": 1, "highest": 1.0}
    if recipe == "SimCSE":  # two steps: the first has learning rate 0, and in the second a schedule is at its lowest
        del changes["highest"]
    for name, value in changes.items():
        assert module.train(replace(one, **{name: value}), data_dir)["statistics"] != seen, name
    assert module.train(replace(one, brief=True), data_dir)["statistics"] == {}
    # Whatever the weighting, the same encoder sees the same views of the same samples in the first step.
    other = module.train(replace(one, weighting="Uniform()", split="test"), data_dir)["statistics"]
    for name in ("count", "similarity_diversity", "similarity_influence"):
        assert other["first_quarter"][name] == pytest.approx(seen["first_quarter"][name], rel=1e-5)


@pytest.mark.parametrize(("module", "data", "recipe"), [(vision, "CIFAR-10", "MoCo"), (graphs, "ENZYMES", "GraphCL")])
def test_an_untrained_encoder_has_the_datas_batch_statistics(
    module: Any, data: str, recipe: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, update = [], module.update_bn

    def seen(loader: Any, model: torch.nn.Module, *device: torch.device) -> None:
        update(loader, model, *device)
        found.append(model)

    monkeypatch.setattr(module, "update_bn", seen)
    one = replace(benchmark_of(module, data, recipe).base, scale="tiny")
    module.train(one, data_dir)
    assert not found
    module.train(replace(one, weighting=UNTRAINED), data_dir)
    (model,) = found
    norms = [part for part in model.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 1
    assert all(part.running_mean.abs().max() > 0 for part in norms)


def test_what_is_told_was_not_learned_from(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train, validation, test = (text.banking77(split, data_dir) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (360, 40, 40)
    assert set(train).isdisjoint(validation)
    parts = [text.trec(split, data_dir) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [360, 40, 40]
    parts = [text.halves(split, data_dir) for split in ("train", "validation", "test")]
    assert len(set().union(*parts)) == sum(map(len, parts)) == 300
    assert len(parts[1]) == len(parts[2]) == 30
    for scale in vision.SCALES.values():
        assert scale.images <= scale.validation[0]
        roles = (scale.pool, scale.known, scale.chosen_on, scale.reported_on)
        assert all(one[1] <= other[0] for one, other in pairwise(roles))
    for of_small in (vision.LONG_TAILED["pool"], vision.LONG_TAILED["reported_on"]):
        assert vision.SCALES["small"].images <= of_small[0]
        assert of_small[1] <= vision.SCALES["small"].validation[0]
    graph, trial = graphs.nodes("Cora", data_dir), graphs.BENCHMARKS[0].base
    choosing = graphs.node_splits(graph, trial)
    splits = [graphs.node_splits(graph, replace(trial, split="test", seed=seed)) for seed in (0, 0, 1)]
    for known, told in (choosing, *splits):
        assert set(known).isdisjoint(told)
    for part in (part for split in splits for part in split):
        assert set(part).isdisjoint(choosing[1])
    assert list(splits[0][1]) == list(splits[1][1]) != list(splits[2][1])


@pytest.mark.parametrize("module", [vision, text, graphs])
def test_labels_take_false_negatives_out(
    module: Any, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "STEPS_BETWEEN_STATISTICS", 1, raising=False)
    one = replace(module.BENCHMARKS[0].base, scale="tiny", batch_size=64)
    shares = [
        module.train(replace(one, class_known=known), data_dir)["statistics"]["first_quarter"]["false_negatives"]
        for known in (False, True)
    ]
    assert shares[0] > 0.05
    assert shares[1] == 0


def test_goes_on_after_a_kill(data_dir: Path, tmp_path: Path) -> None:
    """All that was there stays as it was, and nothing is there by half."""
    arguments = ("tuning", "--data", "Cora", "--jobs", 2)
    process = command("graphs", *arguments, data_dir=data_dir, folder=tmp_path)
    end = time.monotonic() + 240
    path = file_of(graphs.BENCHMARKS[0].base, tmp_path / "results")
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = read(path)
    assert 3 <= len(before) < 37
    *whole, _ = path.read_bytes().split(b"\n")

    said = run("graphs", *arguments, data_dir=data_dir, folder=tmp_path)
    assert f"tuning: 37 trials, {len(before)} of them with a result" in said
    after = metrics_of(load(tmp_path / "results"))
    assert len(after) == 37
    assert path.read_bytes().split(b"\n")[: len(whole)] == whole
    assert path.read_bytes().count(b"\n") == 37
    grace = replace(graphs.BENCHMARKS[0], base=replace(graphs.BENCHMARKS[0].base, scale="tiny"))
    assert set(after) == set(grace.tuning(after))
    # On a graph whose links and words tell the class, an encoder is better than chance, which is 1 in 7.
    assert all(metrics["accuracy"] > 0.3 for metrics in after.values())


def test_trainings_that_start_at_once_share_a_data_set(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None takes for complete what another is still copying or processing."""
    monkeypatch.chdir(tmp_path)

    def slowly(source: str, target: str) -> str:
        time.sleep(0.05)
        return str(shutil.copy2(source, target))

    monkeypatch.setattr(shutil, "copytree", partial(shutil.copytree, copy_function=slowly))
    load_nodes = graphs.nodes.__wrapped__  # without the cache, as in processes of their own
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda _: load_nodes("Cora", data_dir), range(8)))
    assert all(torch.equal(one.x, read[0].x) for one in read)
    assert {path.name for path in (tmp_path / "datasets" / "Planetoid" / "Cora").iterdir()} == {"raw", "processed"}


def test_a_trial_that_fails_is_told_and_leaves_no_result(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trial = graphs.BENCHMARKS[0].at("Uniform()", 0.4, 0)
    assert sweep(operator.truediv, [trial], folder=tmp_path) == [trial]
    assert "TypeError: unsupported operand type(s) for /: 'Trial' and 'NoneType'" in capfd.readouterr().err
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weighting", "UnDiMix(hardness=-1)"], "--weighting: hardness: expected a finite number at least 0, got -1"),
        (["--weighting", "UnDiMix"], "error: --weighting: expected an expression for a Weighting, got 'UnDiMix'"),
        (["--weighting", "Undimix()"], "--weighting: name 'Undimix' is not defined"),
        (["tunings"], "expected some of host, host_test, tuning, test, exploratory, flatness, got tunings"),
        (["--recipe", "GRACE", "--data", "MUTAG"], "expected a recipe and data set that go together"),
        (["--weighting", "HCL()", "--temperature", "0"], "--temperature: expected a number above 0, got 0"),
        (["--weighting", "HCL()", "--temperature", "nan"], "--temperature: expected a number above 0, got nan"),
        (["tuning", "--weighting", "HCL()"], "expected stages or --weighting, got both: tuning and HCL()"),
        (["--seed", "1"], "--temperature, --seed: expected --weighting beside them, got none"),
        (["--data-dir", "nowhere"], "--data-dir: expected a folder, got nowhere"),
    ],
)
def test_bad_arguments_are_told_at_once(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["graphs", *arguments, "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main(str(graphs.__doc__), graphs.train, graphs.BENCHMARKS)
    told = capsys.readouterr().err
    assert told.startswith("usage: python -m benchmarks.embeddings.graphs ")
    assert said in told


def test_every_benchmark_asks_for_what_it_reports() -> None:
    for benchmark in tables.BENCHMARKS:
        for method, settings in GRIDS.items():
            assert len(settings) == len(set(settings)) == 12, method
        assert set(FLATNESS_TEMPERATURES) <= set(TEMPERATURES)
        assert benchmark.base.weighting == "UnDiMix()"
        if benchmark.stages != STAGES:
            assert {trial for stage in STAGES for trial in benchmark.trials(stage, {})} == {*benchmark.host_test({})}
            continue
        tuned = {trial: {benchmark.metric: 0.0} for trial in benchmark.tuning({})}
        assert (benchmark.untrained in tuned) == (not benchmark.tuned_on)
        assert {trial.split for trial in tuned} == {"validation"}
        assert {trial.split for trial in benchmark.test(tuned)} == {"test"}
        for stage, split in ((benchmark.host, "validation"), (benchmark.host_test, "test")):
            assert {trial.split for trial in stage({})} == {split}
            trials = (6 + 2 * benchmark.raised) * 12 * (len(benchmark.tuned_on) or 1) ** (split != "test")
            assert len(stage({})) == len(set(stage({}))) == trials
            assert all(trial.brief for trial in stage({}))
        assert {trial.seed for trial in benchmark.host({})}.isdisjoint(SEEDS)
        assert len(set(benchmark.test(tuned))) == 4 * len(SEEDS)
        if not benchmark.batch_sizes:  # then nothing has to be chosen first
            assert benchmark.flatness({}) == benchmark.flatness(tuned)
        for trials in (benchmark.exploratory(tuned), benchmark.flatness(tuned)):
            assert {trial.split for trial in trials} <= {"validation"}
        assert sum(trial.class_known for trial in benchmark.exploratory(tuned)) in (0, 3 * len(EXPLORATORY_SEEDS))
        # No seed chooses that also reports.
        assert {trial.seed for trial in tuned}.isdisjoint(SEEDS)


def test_contenders_have_the_hosts_own_temperature() -> None:
    hosts = {"SimCLR": NTXentLoss().temperature, "MoCo": NTXentLoss().temperature, "SimCSE": SimCSELoss().temperature}
    static = SentenceTransformer(modules=[StaticEmbedding(Tokenizer(WordLevel()), embedding_dim=2)])
    hosts |= dict.fromkeys(("Static", "MiniLM"), 1 / MultipleNegativesRankingLoss(static).scale)
    hosts |= {"GRACE": 0.4, "GraphCL": 0.2}  # of the authors' code, for Cora and for TUDatasets
    for benchmark in tables.BENCHMARKS:
        contenders = benchmark.at_host("test")
        for name in ("plain", HCLS[0], "ADNCE()", UNDIMIX):
            temperatures = {trial.temperature for (trial,) in contenders[name]}
            assert temperatures == {hosts[benchmark.base.recipe]}, name
        ((low, high),) = {(trial.temperature, trial.highest) for (trial,) in contenders[SCHEDULE]}
        assert (low, high) == (0.1, 1.0)


def test_the_long_tail_is_exponential() -> None:
    images = [(number, number % 10) for number in range(5000)]
    kept = Counter(label for _, label in vision.long_tailed(images))
    assert [kept[label] for label in range(10)] == [500, 300, 180, 108, 65, 39, 23, 14, 8, 5]


def test_geometry_equals_the_textbook() -> None:
    torch.manual_seed(0)
    one, other, rows = torch.randn(5, 3), torch.randn(5, 3), torch.randn(7, 3)

    def distance(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x / x.norm() - y / y.norm()).norm())

    alignment = np.mean([distance(x, y) ** 2 for x, y in zip(one, other, strict=True)])
    kernel = [np.exp(-2 * distance(x, y) ** 2) for x, y in combinations(rows, 2)]
    found = geometry(one, other, rows)
    assert found == pytest.approx({"alignment": alignment, "uniformity": np.log(np.mean(kernel))}, rel=1e-5)


# What results would be, were they these.


def made_up(folder: Path, benchmark: Benchmark, lifts: dict[str, float]) -> dict[str, np.ndarray]:
    """Results of a benchmark in which t = .2 is best, and the methods' scores on test data are `lifts`, with noise."""
    best = {name: next(setting for setting in GRIDS[name] if setting[1] == 0.2) for name in GRIDS}
    if TESTED_FIRST in lifts:
        best[TESTED_FIRST] = TESTED_FIRST, 0.2
    draw, scores = np.random.default_rng(3), {}
    metrics: dict[Trial, float] = {
        trial: 0.5 - abs(trial.temperature - 0.2) - 0.01 * ("beta=0.5" in trial.weighting)
        for trial in (*benchmark.tuning({}), *(trial for setting in benchmark.grid(TESTED_FIRST) for trial in setting))
    }
    for name, setting in {UNTRAINED: (UNTRAINED, 0.0), **best}.items():
        scores[name] = lifts[name] + draw.normal(0, 0.01, len(SEEDS))
        for seed in SEEDS:
            metrics[benchmark.at(*setting, seed, "test")] = float(scores[name][seed])
    names = (benchmark.metric, *benchmark.further)
    write_results(folder, {one: dict.fromkeys(names, value) for one, value in metrics.items()})
    return scores


def spread(scores: np.ndarray) -> str:
    return f"{100 * scores.mean():.2f} ± {100 * scores.std(ddof=1):.2f}"


def write_results(folder: Path, metrics: dict[Trial, dict[str, float]]) -> None:
    """Writes results, in place of those of the same trials."""
    files: dict[Path, dict[Trial, dict[str, Any]]] = {}
    for trial, of_trial in metrics.items():
        path = file_of(trial, folder)
        result = {"configuration": asdict(trial), "metrics": of_trial, "statistics": {}, "seconds": 1800.0}
        files.setdefault(path, read(path))[trial] = result
    for path, results in files.items():
        write_atomically(path, "".join(f"{json.dumps(result)}\n" for result in results.values()))


def written(folder: Path, trial: Trial, **metrics: float) -> None:
    write_results(folder, {trial: metrics})


LIFTS = {UNTRAINED: 0.3, PLAIN: 0.5, HCL: 0.51, UNDIMIX: 0.52}


def test_claims_equal_the_textbook(tmp_path: Path) -> None:
    """One data set: the paired t-test; two: their mean difference, each with its own mean; Holm over six."""
    cora, citeseer = graphs.BENCHMARKS[:2]
    scores = [
        made_up(tmp_path, cora, LIFTS),
        made_up(tmp_path, citeseer, {**LIFTS, UNDIMIX: 0.53}),
        made_up(tmp_path, vision.BENCHMARKS[0], LIFTS),
    ]
    table = tables.models(tables.Results.read(tmp_path)).set_index(["modality", "baseline"])
    ps = []
    for baseline in (PLAIN, HCL):
        (one, other, alone) = (100 * (score[UNDIMIX] - score[baseline]) for score in scores)
        row = table.loc["vision", baseline]
        assert row["p"] == pytest.approx(stats.ttest_1samp(alone, 0).pvalue)
        assert row["effect"] == pytest.approx(alone.mean() / alone.std(ddof=1))
        row = table.loc["graph", baseline]
        squares = ((one - one.mean()) ** 2).sum() + ((other - other.mean()) ** 2).sum()
        degrees = 2 * len(SEEDS) - 2
        error = np.sqrt(squares / degrees / (2 * len(SEEDS)))
        difference = (one.mean() + other.mean()) / 2
        assert row["difference"] == pytest.approx(difference)
        assert row["p"] == pytest.approx(2 * stats.t.sf(abs(difference) / error, degrees))
        reach = stats.t.ppf(0.975, degrees) * error
        assert (row["low"], row["high"]) == pytest.approx((difference - reach, difference + reach))
    ps = table["p"].sort_values()
    largest = 0.0
    for place, (name, p) in enumerate(ps.items()):
        largest = max(largest, min(1.0, (6 - place) * p))
        assert table.loc[name, "holm"] == pytest.approx(largest)


def at_host(folder: Path, benchmark: Benchmark, split: str, lifts: dict[str, float]) -> dict[str, np.ndarray]:
    """Results at the host's own temperature: the lifts of the untrained encoder and the contenders, with noise."""
    draw, scores, metrics = np.random.default_rng(4), {}, {}
    for name, of_one in benchmark.at_host(split).items():
        if name in lifts:
            scores[name] = lifts[name] + draw.normal(0, 0.01, len(of_one))
            for value, of_seed in zip(scores[name], of_one, strict=True):
                for trial in of_seed:
                    metrics[trial] = {benchmark.metric: float(value), "alignment": 0.5, "uniformity": -2.5}
    write_results(folder, metrics)
    return scores


HOST_LIFTS = {UNTRAINED: 0.3, "plain": 0.5, HCLS[0]: 0.51, UNDIMIX: 0.53}


def test_what_a_user_gets_without_a_sweep(tmp_path: Path) -> None:
    """The table, the paired test against the plain loss, and Holm over twelve. A contender without results is blank."""
    assert "Not measured yet" in tables.host_test(tables.Results.read(tmp_path))
    cora, enzymes = graphs.BENCHMARKS[0], benchmark_of(graphs, "ENZYMES", "GraphCL")
    scores = at_host(tmp_path, cora, "test", HOST_LIFTS)
    results = tables.Results.read(tmp_path)
    head, _, row = tables.host_test(results).splitlines()
    assert head == (
        "| data, recipe | t | score, % | untrained | plain | `HCL(beta=1.0, tau_plus=0.1)` | `ADNCE()` | "
        "temperature schedule | `UnDiMix()` | plain at 0.2 | `UnDiMix()` at 0.2 |"
    )
    told = row.strip("| ").split(" | ")
    assert told[:5] == ["Cora, GRACE", "0.4", "linear probe", spread(scores[UNTRAINED]), spread(scores["plain"])]
    over = 100 * (scores[UNDIMIX] - scores["plain"])
    assert told[8] == f"{spread(scores[UNDIMIX])}, {over.mean():+.2f} (p < .001)"
    assert told[6:8] == ["", ""]
    table = tables.host_models(results, "test").set_index("baseline")
    assert list(table.index) == ["plain", HCLS[0]]
    assert table.loc["plain", "p"] == pytest.approx(stats.ttest_1samp(over, 0).pvalue)
    assert table.loc["plain", "holm"] == pytest.approx(min(1, 12 * table["p"].min()))
    *_, row = tables.in_short(results).splitlines()
    cells = [f"{100 * scores[name].mean():.2f}" for name in ("plain", UNDIMIX)]
    assert row == f"| Cora, GRACE | 0.4 | linear probe | {' | '.join(cells)} | {over.mean():+.2f} (p < .001) |"
    *_, row = tables.host_geometry(results).splitlines()
    assert row == f"| Cora, GRACE |{3 * ' 0.500 / -2.500 |'}  |  | 0.500 / -2.500 |  |  |"
    # At the higher temperature, beside the plain loss at the host's own.
    static = benchmark_of(text, "SUBJ", "Static")
    lifts = {**HOST_LIFTS, "UnDiMix() at 0.2": 0.6}
    scores = at_host(tmp_path, static, "test", lifts)
    rows = tables.host_test(tables.Results.read(tmp_path)).splitlines()
    (row,) = (row for row in rows if row.startswith("| SUBJ, Static | 0.05 | MRR | "))
    over = 100 * (scores["UnDiMix() at 0.2"] - scores["plain"])
    assert f" | {spread(scores['UnDiMix() at 0.2'])}, {over.mean():+.2f} (p < .001) |" in row
    # On validation data, whole graphs have the mean of the data sets that tune.
    scores = at_host(tmp_path, enzymes, "validation", HOST_LIFTS)
    *_, row = tables.host_validation(tables.Results.read(tmp_path)).splitlines()
    assert row.startswith(f"| MUTAG and PTC_MR, GraphCL | 0.2 | 5-NN accuracy | {spread(scores[UNTRAINED])} | ")


def test_results_of_another_rule_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not read as today's, and are not lost: tables of the default before still show them."""
    folder = tmp_path / "results"
    one, plain = (graphs.BENCHMARKS[0].at(weighting, 0.4, 0) for weighting in ("UnDiMix()", "Uniform()"))
    for trial in (one, plain):
        result_of(half, trial, None, folder)
    before = file_of(one, folder).read_bytes().splitlines(keepends=True)
    assert set_aside(folder) == 0
    monkeypatch.setitem(RULES, "mixing='geometric'", "another")
    with pytest.raises(ValueError, match=r"got one of UnDiMix\(.*; set such results aside: python -m "):
        missing([one], folder)
    assert set_aside(folder) == 1
    assert file_of(one, folder).read_bytes() == before[1]
    assert file_of(one, aside_of(folder)).read_bytes() == before[0]
    assert missing([one, plain], folder) == [one]
    results = tables.Results.read(folder)
    assert list(results.found) == [plain]
    assert set(results.before.found) == {one, plain}
    made = result_of(lambda trial, data_dir: {"metrics": {"accuracy": 0.7}}, one, None, folder)
    assert made["weighting"].endswith("; another")
    results = tables.Results.read(folder)
    assert results.metrics[one] == {"accuracy": 0.7}
    assert results.before.metrics[one] == {"accuracy": 0.5}
    page = "<!-- results: took before -->\n<!-- /results --><!-- results: took -->\n<!-- /results -->"
    assert tables.filled(page, results).startswith("<!-- results: took before -->\n| modality")
    monkeypatch.setitem(RULES, "mixing='geometric'", "a third")
    with pytest.raises(ValueError, match="expected no results of 1 trials that"):
        set_aside(folder)


def test_a_new_rule_of_the_default_has_a_name() -> None:
    """If this fails, the rule has changed. Name it in `trials.RULES`, set the results aside, and change both here."""
    places = torch.arange(48.0, dtype=torch.float64).reshape(2, 6, 4)
    first, second = torch.sin(places**2 + 1).requires_grad_().unbind()
    found = []
    for temperature in (0.05, 0.25, 0.5):
        loss = info_nce(two_views(*unit_rows(first=first, second=second), temperature), UnDiMix())
        (gradient,) = torch.autograd.grad(loss, first, retain_graph=True)
        found += [float(loss.detach()), float(gradient.norm())]
    assert RULES["mixing='geometric'"] == "fades where less than half of the negatives are effective"
    assert found == pytest.approx([17.8405453, 5.6385516, 4.0955696, 1.0260429, 3.2831845, 0.5018363], rel=1e-6)


def test_effects_are_differences_over_their_deviation(tmp_path: Path) -> None:
    scores = made_up(tmp_path, graphs.BENCHMARKS[0], LIFTS)
    *_, row, _ = tables.effects(tables.Results.read(tmp_path)).splitlines()
    over = 100 * (scores[UNDIMIX] - scores[PLAIN])
    for cell, told in zip(row.split(" | ")[3:5], (over.mean(), over.mean() / over.std(ddof=1)), strict=True):
        found, low, high = map(float, re.findall(r"[+-][0-9.]+", cell))
        assert found == pytest.approx(told, abs=0.005)
        assert low < found < high
    deviations = over.std(ddof=1) / np.sqrt(len(over)) * np.array(stats.norm.interval(0.95))
    # Twelve values have a bootstrap whose deviation is that of the population, and which is a little skew.
    low, high = (over.mean() + deviations * np.sqrt(1 - 1 / len(over))).tolist()
    assert tables.interval(over, np.mean) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_plots_show_what_the_tables_tell(tmp_path: Path) -> None:
    plt.switch_backend("agg")
    assert tables.plot_differences(tables.Results.read(tmp_path)) is None
    assert tables.plot_flatness(tables.Results.read(tmp_path)) is None
    cora = graphs.BENCHMARKS[0]
    scores = made_up(tmp_path, cora, LIFTS)
    shown = tables.plot_differences(tables.Results.read(tmp_path))
    assert shown is not None
    *drawn, _ = shown.axes[0].lines  # the last is at zero
    for baseline, bar, dot in zip((PLAIN, HCL), drawn[::2], drawn[1::2], strict=True):
        over = 100 * (scores[UNDIMIX] - scores[baseline])
        assert dot.get_label() == f"UnDiMix() - {baseline}"
        assert dot.get_xdata() == pytest.approx([over.mean()])
        assert bar.get_xdata() == pytest.approx(tables.interval(over, np.mean))
    for place, weighting in enumerate(CURVES):
        for temperature, (trial, _) in cora.over_temperatures(weighting).items():
            written(tmp_path, trial, accuracy=0.5 + 0.01 * place - 0.1 * temperature)
    shown = tables.plot_flatness(tables.Results.read(tmp_path))
    assert shown is not None
    curves = {line.get_label(): line.get_xydata() for line in shown.axes[0].lines}
    assert list(curves) == [f"{CURVES[0]}, plain", *CURVES[1:]]
    for place, points in enumerate(curves.values()):
        np.testing.assert_allclose(
            points, [(temperature, 50 + place - 10 * temperature) for temperature in FLATNESS_TEMPERATURES]
        )
    plt.close("all")


def test_a_measure_that_training_does_not_move_makes_no_claim(tmp_path: Path) -> None:
    made_up(tmp_path, graphs.BENCHMARKS[0], {**LIFTS, UNTRAINED: 0.49})
    results = tables.Results.read(tmp_path)
    assert tables.models(results).empty
    assert "linear probe (does not count)" in tables.confirmatory(results)


def test_what_was_tested_first_stands_beside_the_baselines(tmp_path: Path) -> None:
    made_up(tmp_path, graphs.BENCHMARKS[0], LIFTS)
    assert "Not measured yet" in tables.tested_first(tables.Results.read(tmp_path))
    scores = made_up(tmp_path, graphs.BENCHMARKS[1], {**LIFTS, TESTED_FIRST: 0.4})
    *_, row = tables.tested_first(tables.Results.read(tmp_path)).splitlines()
    over_plain = 100 * (scores[TESTED_FIRST] - scores[PLAIN])
    untrained, first = (spread(scores[name]) for name in (UNTRAINED, TESTED_FIRST))
    assert row.startswith(f"| CiteSeer, GRACE | linear probe | {untrained} | {first} | ")
    assert f" | {over_plain.mean():+.2f} (p < .001) | " in row
    assert row.endswith(" | 0.2 |")


def test_whole_graphs_stand_beside_what_their_authors_report(tmp_path: Path) -> None:
    assert "Not measured yet" in tables.published(tables.Results.read(tmp_path))
    proteins = next(benchmark for benchmark in graphs.BENCHMARKS if benchmark.base.data == "PROTEINS")
    scores = made_up(tmp_path, proteins, {UNTRAINED: 0.72, PLAIN: 0.73, HCL: 0.74, UNDIMIX: 0.75})
    *_, row = tables.published(tables.Results.read(tmp_path)).splitlines()
    shown = [spread(one) for one in scores.values()]
    assert row == f"| PROTEINS | {' | '.join(shown)} | {graphs.PUBLISHED['PROTEINS']} |"


def test_batch_sizes_are_of_the_seeds_that_have_all(tmp_path: Path) -> None:
    banking77 = text.BENCHMARKS[0]
    made_up(tmp_path, banking77, LIFTS)
    assert "Not measured yet" in tables.batch_sizes(tables.Results.read(tmp_path))
    asked = banking77.over_batch_sizes("UnDiMix()", metrics_of(load(tmp_path)))
    assert {trial.temperature for trials in asked.values() for trial in trials} == {0.2}
    for place, (size, trials) in enumerate(asked.items()):
        for trial in trials[: 1 if size == 256 else None]:
            assert trial.batch_size == size
            written(tmp_path, trial, mrr=0.8 + 0.01 * place + 0.1 * (trial.seed != TUNING_SEED))
    head, _, row = tables.batch_sizes(tables.Results.read(tmp_path)).splitlines()
    assert head == "| data, recipe | weighting | t | untrained | 32 | 64 | 128 | 256 | mean |"
    assert row == "| banking77, Static | `UnDiMix()` | 0.2 | 30.00 | 80.00 | 81.00 | 82.00 | 83.00 | 81.50 |"


def test_what_is_explored_is_compared_seed_by_seed(tmp_path: Path) -> None:
    """A seed that is missing for one is left out for both."""
    cora = graphs.BENCHMARKS[0]
    made_up(tmp_path, cora, LIFTS)
    for weighting, scores in {
        "Uniform()": {101: 0.6, 102: 0.7},
        "Ring()": {101: 0.63, 102: 0.71},
        "UnDiMix(influence=0)": {102: 0.75},
    }.items():
        for seed, score in scores.items():
            written(tmp_path, cora.at(weighting, 0.2, seed), accuracy=score)
    head, _, plain, untrained, *rows = tables.exploratory(tables.Results.read(tmp_path)).splitlines()
    assert head == "| tried | Cora, GRACE | worst | mean |"
    assert plain == "| plain, tuned: its score | 60.00 |  |  |"  # (50 + 60 + 70) / 3
    assert untrained == "| untrained | -20.00 (1) | -20.00 | -20.00 |"
    assert rows[:2] == [
        "| `UnDiMix(influence=0)` | +5.00 (1) | +5.00 | +5.00 |",
        "| `Ring()` | +2.00 (2) | +2.00 | +2.00 |",
    ]
    assert "| `UnDiMix()` | +0.00 (1) | +0.00 | +0.00 |" in rows


def test_flat_curves_tell_their_seeds(tmp_path: Path) -> None:
    cora = graphs.BENCHMARKS[0]
    made_up(tmp_path, cora, LIFTS)
    for weighting in ("Uniform()", "UnDiMix()"):
        for trials in cora.over_temperatures(weighting).values():
            written(tmp_path, trials[1], accuracy=0.9)
    head, _, row = tables.flatness(tables.Results.read(tmp_path)).splitlines()
    assert head.startswith("| data, recipe | seeds | untrained | `Uniform()` | ")
    # Seed 100 has 50 points less 100 times the distance from .2: 35, 40, 50, 40, 20, -30; the other 90 everywhere.
    both, one, lower = "57.92 (30.00 to 70.00)", "25.83 (-30.00 to 50.00)", "24.83 (-31.00 to 49.00)"
    assert row == f"| Cora, GRACE | 1/2 | 30.00 | {both} | {one} | {lower} | {both} | {one} |"


def test_false_negatives_are_taken_out_seed_by_seed(tmp_path: Path) -> None:
    cora = graphs.BENCHMARKS[0]
    made_up(tmp_path, cora, LIFTS)
    for known, scores in {False: {101: 0.6}, True: {100: 0.52, 101: 0.64, 102: 0.9}}.items():
        for seed, score in scores.items():
            written(tmp_path, cora.at("UnDiMix()", 0.2, seed, class_known=known), accuracy=score)
    *_, row = tables.without_false_negatives(tables.Results.read(tmp_path)).splitlines()
    assert row == "| Cora, GRACE | `UnDiMix()` | 0.2 | 55.00 | 58.00 | +3.00 | 2 |"


def test_a_choice_at_the_end_of_what_was_tried_says_so(tmp_path: Path) -> None:
    cora = graphs.BENCHMARKS[0]
    made_up(tmp_path, cora, LIFTS)
    *_, row = tables.confirmatory(tables.Results.read(tmp_path)).splitlines()
    assert row.endswith("| 0.2; 0.2; 0.2 |")
    written(tmp_path, cora.at("Uniform()", 1.0, TUNING_SEED), accuracy=0.8)
    written(tmp_path, cora.at(HCLS[1], 0.05, TUNING_SEED), accuracy=0.8)
    for seed in SEEDS:
        written(tmp_path, cora.at("Uniform()", 1.0, seed, "test"), accuracy=0.5 + 0.001 * seed)
        written(tmp_path, cora.at(HCLS[1], 0.05, seed, "test"), accuracy=0.5 - 0.001 * seed)
    *_, row = tables.confirmatory(tables.Results.read(tmp_path)).splitlines()
    assert row.endswith("| 1 (end); `HCL(beta=0.5, tau_plus=0.0)` at 0.05 (end); 0.2 |")


def test_only_what_is_reported_is_counted(tmp_path: Path) -> None:
    cora = graphs.BENCHMARKS[0]
    for seed in (0, 1, 2):
        written(tmp_path, cora.at("UnDiMix()", 0.2, seed, "test"), accuracy=0.5)
    written(tmp_path, cora.at("UnDiMix()", 0.2, 0, scale="tiny"), accuracy=0.5)
    *_, row = tables.took(tables.Results.read(tmp_path)).splitlines()
    assert row == "| graph | Cora, GRACE | test | 3 | 1.5 |"


def test_what_is_chosen_is_best_on_validation_data(tmp_path: Path) -> None:
    made_up(tmp_path, text.BENCHMARKS[0], LIFTS)
    metrics = metrics_of(load(tmp_path))
    chosen = {name: text.BENCHMARKS[0].chosen(name, metrics) for name in GRIDS}
    assert chosen == {name: (weighting, 0.2) for name, weighting in METHODS.items()}
    with pytest.raises(ValueError, match="run the stage 'tuning'"):
        text.BENCHMARKS[1].chosen(PLAIN, metrics)


def test_the_pages_show_the_results_that_are_there() -> None:
    """No number was typed: what `make tables` would write is what the page has."""
    results = tables.Results.read()
    assert len(results.found) > 100
    shown = []
    for page in (tables.PAGE, tables.README):
        content = page.read_text(encoding="utf-8")
        shown += re.findall(r"<!-- results: (\w+)(?: before|) -->", content)
        assert tables.filled(content, results) == content, f"{page.name} is not what `make tables` makes"
    assert {*shown} == {*tables.TABLES}


def test_results_are_whole_and_where_they_belong() -> None:
    files = [path for path in tables.RESULTS.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {path.suffix for path in files} == {".jsonl"}
    for path in files:
        content = path.read_bytes()
        assert content.endswith(b"\n")
        results = read(path)
        assert [json.loads(line) for line in content.splitlines()] == list(results.values())
        for trial, result in results.items():
            assert file_of(trial) == path
            assert result["weighting"] == trial.settings(), f"{trial} was made with other defaults"
            assert result["modality"] == trial.modality
            assert result["seed"] == trial.seed
            assert result["seconds"] > 0
            assert are_scores(result["metrics"])


def test_the_table_of_four_more_toolkits(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    one = toolkits.BY_TOOLKIT["open_clip"]
    scores = {name: 0.2 * place + 0.01 * draw.random(12) for place, name in enumerate(toolkits.CONTENDERS)}
    for name, values in scores.items():
        for trial, value in zip(one.trials(name), values.tolist(), strict=True):
            result_of(lambda trial, data_dir, value=value: {"metrics": {"score": value}}, trial, None, tmp_path)
    *_, row = tables.further_toolkits(tables.Results.read(tmp_path)).splitlines()
    began, plain, weighted = (100 * values for values in scores.values())
    p = stats.ttest_rel(weighted, plain).pvalue
    assert p < 0.001
    told = [f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" for values in (began, plain, weighted)]
    found = f"{(weighted - plain).mean():+.2f} (p < .001)"
    assert row == f"| open_clip, CLIP | 0.07 | accuracy among a hundred texts | {' | '.join([*told, found])} |"


def test_the_examples_of_four_more_toolkits_have_the_temperatures_of_these() -> None:
    from open_clip import CLIP
    from pytorch_metric_learning.losses import SupConLoss
    from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
    from stable_pretraining.losses import NTXEntLoss

    def default(of: Any, name: str) -> float:
        return float(inspect.signature(of).parameters[name].default)

    wanted = {
        "pytorch-metric-learning": default(SupConLoss, "temperature"),
        "open_clip": float(np.exp(-default(CLIP, "init_logit_scale"))),
        "sentence-transformers": 1 / default(MultiVectorMultipleNegativesRankingLoss, "scale"),
        "stable-pretraining": default(NTXEntLoss, "temperature"),
    }
    assert {name: one.base.temperature for name, one in toolkits.BY_TOOLKIT.items()} == pytest.approx(wanted)
    for one in toolkits.BY_TOOLKIT.values():
        assert (toolkits.EXAMPLES / f"{one.script}.py").is_file()


def never(trial: Trial, data_dir: Path | None) -> dict[str, Any]:
    raise AssertionError


def half(trial: Trial, data_dir: Path | None) -> dict[str, Any]:
    return {"metrics": {"accuracy": 0.5}, "statistics": {}}


def test_a_result_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    one = graphs.BENCHMARKS[0].at("Uniform()", 0.4, 0)
    written(tmp_path, one, accuracy=0.5)
    assert result_of(never, one, None, tmp_path)["metrics"] == {"accuracy": 0.5}
    assert sweep(never, [one, one], folder=tmp_path) == []


@pytest.mark.parametrize(
    ("content", "came"),
    [
        ("", "Expecting value: line 1 column 1"),
        ('{"metrics": {"accuracy": 0.', "Expecting"),
        ("[0.5]", r"metrics: expected a number for each name, got \[0.5\]"),
        ("{}", "metrics: expected a number for each name, got None"),
        ('{"metrics": {}}', "metrics: expected a number for each name, got {}"),
        ('{"metrics": {"accuracy": null}}', "metrics: expected a number for each name, got {'accuracy': None}"),
        ("<<<<<<< HEAD", "Expecting value: line 1 column 1"),
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_a_line_that_is_no_result_is_named(content: str, came: str, number: int, tmp_path: Path) -> None:
    """It is neither counted as a result nor removed: it may be worth something."""
    one, other = (graphs.BENCHMARKS[0].at("Uniform()", 0.4, seed) for seed in (0, 1))
    path = file_of(one, tmp_path)
    written(tmp_path, other, accuracy=0.5)
    whole = path.read_text()
    whole = f"{content}\n{whole}" if number == 1 else f"{whole}{content}\n"
    path.write_text(whole)
    for use in (
        lambda: sweep(graphs.train, [one], folder=tmp_path),
        lambda: result_of(graphs.train, one, None, tmp_path),
        lambda: append(one, half(one, None), tmp_path),
        lambda: tables.Results.read(tmp_path),
    ):
        with pytest.raises(
            ValueError,
            match=rf"^{path}, line {number}: expected a whole result, got none \(.*{came}.*; delete the line",
        ):
            use()
    assert path.read_text() == whole


@pytest.mark.parametrize("configuration", [{}, *({"configuration": told} for told in ({"hardness": 1}, None, "Cora"))])
def test_a_result_of_nothing_is_named(configuration: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"metrics": {"accuracy": 0.5}, **configuration}) + "\n")
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/other.jsonl, line 1: expected a trial's configuration, got .*; delete the line"
    ):
        load(tmp_path)


def test_a_configuration_that_is_no_trial_is_named(tmp_path: Path) -> None:
    one = graphs.BENCHMARKS[0].at("Uniform()", 0.4, 0)
    written(tmp_path, one, accuracy=0.5)
    path = file_of(one, tmp_path)
    result = {"metrics": {"accuracy": 0.5}, "configuration": {**asdict(one), "weighting": ["Uniform()"]}}
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=rf"^{path}, line 1: expected a trial's configuration, got TypeError"):
        load(tmp_path)


def test_a_result_in_the_file_of_another_data_set_is_named(tmp_path: Path) -> None:
    cora, citeseer = (benchmark.at("Uniform()", 0.4, 0) for benchmark in graphs.BENCHMARKS[:2])
    written(tmp_path, cora, accuracy=0.5)
    path = file_of(cora, tmp_path).replace(file_of(citeseer, tmp_path))
    with pytest.raises(
        ValueError,
        match=rf"^{path}, line 1: expected results of one recipe and data set, got one of graph/Cora-GRACE.jsonl; move",
    ):
        load(tmp_path)


def test_two_results_of_one_trial_are_named(tmp_path: Path) -> None:
    """As a merge of two branches can leave them."""
    one = graphs.BENCHMARKS[0].at("Uniform()", 0.4, 0)
    written(tmp_path, one, accuracy=0.5)
    path = file_of(one, tmp_path)
    path.write_text(path.read_text() + path.read_text().replace("0.5", "0.6"))
    with pytest.raises(
        ValueError,
        match=rf"^{path}, line 2: expected one result for each trial, got a second one after line 1; delete one",
    ):
        sweep(never, [one], folder=tmp_path)


def test_a_training_without_scores_has_no_result(tmp_path: Path) -> None:
    one = graphs.BENCHMARKS[0].at("Uniform()", 0.4, 0)
    with pytest.raises(ValueError, match=r"^metrics: expected a number for each name, got {}$"):
        result_of(lambda trial, data_dir: {"metrics": {}}, one, None, tmp_path)
    assert not file_of(one, tmp_path).exists()


def test_a_last_line_without_its_end_costs_its_own_result_alone(tmp_path: Path) -> None:
    """A killed append can end at any byte. The next sweep runs that trial again, and no other."""
    trials = [graphs.BENCHMARKS[0].at("Uniform()", 0.4, seed) for seed in range(3)]
    for trial in trials:
        assert result_of(half, trial, None, tmp_path)["metrics"] == {"accuracy": 0.5}
    path = file_of(trials[0], tmp_path)
    content = path.read_bytes()
    first, second, last = content.splitlines(keepends=True)
    for end in [*range(0, len(last), 16), len(last) - 2, len(last) - 1]:
        path.write_bytes(first + second + last[:end])
        whole = end == len(last) - 1  # only the line break is missing
        found = load(tmp_path)
        assert list(found) == trials[: 2 + whole], end
        assert sweep(never, trials[:2], folder=tmp_path) == []
        assert path.read_bytes() == first + second + last[:end]  # readers write nothing
        made = append(trials[2], json.loads(last), tmp_path)
        assert made == json.loads(last)
        assert [json.loads(line) for line in path.read_bytes().splitlines()] == [
            *map(json.loads, (first, second, last))
        ]
        assert list(load(tmp_path)) == trials
        # Whatever comes next stands on a line of its own.
        append(replace(trials[2], seed=3), {**made, "configuration": asdict(replace(trials[2], seed=3))}, tmp_path)
        assert len(load(tmp_path)) == 4


APPENDS = """
import sys
from dataclasses import asdict
from pathlib import Path
from benchmarks.embeddings.results import append
from benchmarks.embeddings.trials import Trial

folder, first, last = Path(sys.argv[1]), *map(int, sys.argv[2:])
print("ready", flush=True)
sys.stdin.readline()
for seed in range(first, last):
    trial = Trial("graph", "GRACE", "Cora", "Uniform()", 0.4, 0, seed)
    metrics = {f"metric {number}": first + number / 1000 for number in range(400)}
    append(trial, {"configuration": asdict(trial), "metrics": metrics}, folder)
"""


def appending(folder: Path, first: int, last: int) -> subprocess.Popen[str]:
    """A process that appends a result for each seed, as soon as it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", APPENDS, *map(str, (folder, first, last))],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_append_to_one_file_at_once(tmp_path: Path) -> None:
    """Each result is there once and whole, those that both make as well; readers see whole ones at all times."""
    processes = [appending(tmp_path, 0, 20), appending(tmp_path, 10, 30)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    seen = 0
    while any(process.poll() is None for process in processes):
        found = len(load(tmp_path))
        assert found >= seen
        seen = found
    assert [process.wait() for process in processes] == [0, 0]
    for process in processes:
        process.communicate()
    assert sorted(trial.seed for trial in load(tmp_path)) == list(range(30))
    (path,) = tmp_path.rglob("*.jsonl")
    assert len(path.read_bytes().splitlines()) == 30


KILLED = """
import os, signal
from pathlib import Path

class Killed:
    \"\"\"A file that takes half of what is written, and with it the process.\"\"\"

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

opened = Path.open
Path.open = lambda path, mode, **options: (Killed if mode == "ab" else lambda file: file)(opened(path, mode, **options))
"""


def test_a_sweep_goes_on_after_a_kill_in_the_middle_of_an_append(tmp_path: Path) -> None:
    trials = [graphs.BENCHMARKS[0].at("Uniform()", 0.4, seed) for seed in range(3)]
    for trial in trials[:2]:
        result_of(half, trial, None, tmp_path)
    path = file_of(trials[0], tmp_path)
    before = path.read_bytes()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED + APPENDS, str(tmp_path), "2", "3"], cwd=ROOT, input="\n", text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    content = path.read_bytes()
    assert content.startswith(before)
    assert len(content) > len(before)
    assert not content.endswith(b"\n")
    assert list(load(tmp_path)) == trials[:2]
    # The lock went with its process.
    assert missing(trials, tmp_path) == trials[2:]
    result_of(half, trials[2], None, tmp_path)
    assert list(load(tmp_path)) == trials
    assert path.read_bytes().startswith(before)
    assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("before", ["a file", "a folder", "nothing"])
def test_what_fails_halfway_leaves_nothing(before: str, tmp_path: Path) -> None:
    path = tmp_path / "written"
    if before == "a file":
        path.write_text("as it was")

    def write(part: Path) -> None:
        if before == "a folder":
            part.mkdir()
            part /= "inner"
        part.write_text("by half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic_path(path) as part:
        write(part)
    assert [file.read_text() for file in tmp_path.iterdir()] == (["as it was"] if before == "a file" else [])


def test_kept_views_that_are_not_whole_are_named(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = replace(vision.BENCHMARKS[0].base, scale="tiny")
    scale = vision.SCALES[one.scale]
    path = vision.KEPT_VIEWS / f"CIFAR-10-local-{scale.images}-{scale.epochs}-{one.seed}.npy"
    path.parent.mkdir(parents=True)
    np.save(path, np.zeros((2, 3)))
    assert vision.KeptViews(one, data_dir).views.shape == (2, 3)
    for content in (b"", path.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"^{path}: expected kept views, got .*; delete the file to make them again"
        ):
            vision.KeptViews(one, data_dir)
