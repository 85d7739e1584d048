"""The time of a weighted loss relative to the toolkit's plain loss: `python -m benchmarks.cost.speed`.

Times are of forward and backward together. The losses take turns in one process, and a ratio is of two consecutive
timings. The tables show the smallest of three medians of the ratios, since a single median is noisy where losses are
this close, and the quartiles of all ratios. A ratio below 1 means faster than the plain loss.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from lightly.loss import NTXentLoss
from open_clip.loss import ClipLoss
from pytorch_metric_learning import losses as metric_losses
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import BoW
from sentence_transformers.util import euclidean_sim
from stable_pretraining.losses import CLIPLoss, NTXEntLoss
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.benchmark import Timer
from torch_geometric.data import Batch
from torch_geometric.nn import GIN, global_add_pool
from torchvision.models import resnet18
from tqdm import tqdm

from examples._shared.graphs import mutag
from examples._shared.images import Digits
from examples._shared.texts import MINILM, halves, lee_articles
from undimix_plugins import HCL, UnDiMix, Uniform, Weighting, undimix
from undimix_pyg import GraphCLLoss

WEIGHTINGS: dict[str, Weighting] = {
    "Uniform()": Uniform(),
    "UnDiMix()": UnDiMix(),
    'UnDiMix(mixing="linear")': UnDiMix(mixing="linear"),
    "HCL()": HCL(),
}
Step = Callable[[], object]
PARTS = ("losses", "training", "products")


class Case(NamedTuple):
    """A step with the toolkit's plain loss, and a function that makes a step with a weighting."""

    name: str
    plain: Step
    weighted: Callable[[Weighting], Step]


def published_graphcl(z1: Tensor, z2: Tensor, temperature: float = 0.2) -> Tensor:
    """GraphCL's loss as its authors wrote it. PyG has no such loss."""
    similarity = torch.einsum("ik,jk->ij", z1, z2) / torch.einsum("i,j->ij", z1.norm(dim=1), z2.norm(dim=1))
    similarity = (similarity / temperature).exp()
    positive = similarity.diagonal()
    return -(positive / (similarity.sum(dim=1) - positive)).log().mean()


def of_loss(loss: nn.Module, *inputs: Tensor) -> Tensor:
    value: Tensor = loss(*inputs)
    return value


def of_ranking(loss: MultipleNegativesRankingLoss, *columns: Tensor) -> Tensor:
    return loss.compute_loss_from_embeddings(list(columns), None)


def of_clip(loss: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """At a scale of 14.3, with which open_clip's models begin."""
    return of_loss(loss, normalize(images, dim=1), normalize(texts, dim=1), torch.tensor(14.3))


def of_classes(each: int, loss: nn.Module, rows: Tensor) -> Tensor:
    """Of rows of which so many are of each class."""
    return of_loss(loss, rows, torch.arange(len(rows), device=rows.device) // each)


def both(
    host: nn.Module, call: Callable[..., Tensor] = of_loss
) -> tuple[Callable[..., Tensor], Callable[[Weighting], Callable[..., Tensor]]]:
    """A call of the plain loss, and a function from a weighting to the same call of the weighted one."""
    return functools.partial(call, host), lambda weighting: functools.partial(call, undimix(host, weighting))


def losses(device: str) -> list[Case]:
    """The losses alone, on random embeddings."""
    bank = NTXentLoss(memory_bank_size=(65536, 128)).to(device)
    model = SentenceTransformer(modules=[BoW(vocab=["a"])], device=device)
    ranking = both(MultipleNegativesRankingLoss(model), of_ranking)
    euclidean = both(MultipleNegativesRankingLoss(model, similarity_fct=euclidean_sim, scale=1.0), of_ranking)
    of_4, of_16 = (functools.partial(of_classes, each) for each in (4, 16))
    made = {
        "lightly NTXentLoss, batch 256, width 128": (*both(NTXentLoss()), (2, 256, 128)),
        "lightly NTXentLoss, batch 1024, width 128": (*both(NTXentLoss()), (2, 1024, 128)),
        "lightly NTXentLoss, batch 4096, width 128": (*both(NTXentLoss()), (2, 4096, 128)),
        "lightly NTXentLoss, batch 256, bank of 65,536": (*both(bank), (2, 256, 128)),
        "sentence-transformers MNRL, batch 64, width 384, a hard negative": (
            *ranking,
            (3, 64, 384),
        ),
        "sentence-transformers MNRL, batch 1024, width 384, a hard negative": (
            *ranking,
            (3, 1024, 384),
        ),
        "sentence-transformers MNRL, Euclidean similarity, batch 64, width 384, a hard negative": (
            *euclidean,
            (3, 64, 384),
        ),
        "open_clip ClipLoss, batch 1024, width 512": (*both(ClipLoss(), of_clip), (2, 1024, 512)),
        "stable-pretraining NTXEntLoss, batch 256, width 128": (*both(NTXEntLoss()), (2, 256, 128)),
        "stable-pretraining CLIPLoss, batch 1024, width 512": (*both(CLIPLoss()), (2, 1024, 512)),
        "pytorch-metric-learning NTXentLoss, 128 rows, 4 of a class, width 128": (
            *both(metric_losses.NTXentLoss(), of_4),
            (1, 128, 128),
        ),
        "pytorch-metric-learning SupConLoss, 128 rows, 4 of a class, width 128": (
            *both(metric_losses.SupConLoss(), of_4),
            (1, 128, 128),
        ),
        "pytorch-metric-learning SupConLoss, 1024 rows, 16 of a class, width 128": (
            *both(metric_losses.SupConLoss(), of_16),
            (1, 1024, 128),
        ),
        "GraphCL as published, batch 128, width 32": (
            published_graphcl,
            lambda weighting: GraphCLLoss(weighting=weighting),
            (2, 128, 32),
        ),
    }
    cases = []
    for name, (plain, weighted, (count, rows, width)) in made.items():
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(rows, width, generator=generator).to(device).requires_grad_() for _ in range(count)]
        cases.append(
            Case(
                name,
                functools.partial(backward, plain, inputs),
                lambda w, f=weighted, i=inputs: functools.partial(backward, f(w), i),
            )
        )
    return cases


def backward(loss: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    loss(*inputs).backward()


def training(device: str) -> list[Case]:
    """Whole training steps of real models on real data: encoder, loss, backward, optimizer."""
    torch.manual_seed(0)
    digits = Digits()
    images = torch.stack([torch.from_numpy(digits.data[index]) for index in range(128)])
    images = normalize(images.float().flatten(1), dim=1).view(128, 1, 28, 28).expand(-1, 3, -1, -1).to(device)
    resnet = resnet18(num_classes=128).to(device)

    begun = [[" ".join(half.split()[:24]) for half in halves(article)] for article in lee_articles()[:16]]
    sentences = SentenceTransformer(MINILM, device=device)
    tokens = [
        {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in sentences.preprocess(list(column)).items()
        }
        for column in zip(*begun, strict=True)
    ]
    ranking_host = MultipleNegativesRankingLoss(sentences)

    graphs = Batch.from_data_list(list(mutag()[:128])).to(device)
    gin = GIN(7, 32, num_layers=3).to(device)

    def embed(edges: Tensor) -> Tensor:
        return global_add_pool(gin(graphs.x, edges), graphs.batch)

    def vision(loss: nn.Module) -> Tensor:
        return loss(*resnet(images + 0.1 * torch.randn_like(images)).chunk(2))

    def text(loss: nn.Module) -> Tensor:
        return loss([dict(column) for column in tokens], None)

    def graph(loss: Callable[..., Tensor]) -> Tensor:
        kept = [torch.rand(graphs.num_edges, device=device) > 0.2 for _ in range(2)]
        return loss(*(embed(graphs.edge_index[:, mask]) for mask in kept))

    def case(
        name: str, model: nn.Module, run: Callable[[Any], Tensor], host: Any, ours: Callable[[Weighting], Any]
    ) -> Case:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step(loss: Any) -> None:
            optimizer.zero_grad()
            run(loss).backward()
            optimizer.step()

        return Case(name, functools.partial(step, host), lambda weighting: functools.partial(step, ours(weighting)))

    vision_host = NTXentLoss()
    return [
        case(
            "ResNet-18, 64 digits in two views, NTXentLoss",
            resnet,
            vision,
            vision_host,
            lambda w: undimix(vision_host, w),
        ),
        case("MiniLM, 16 pairs of 24 words, MNRL", sentences, text, ranking_host, lambda w: undimix(ranking_host, w)),
        case(
            "GIN of 3 layers, 128 of MUTAG in two views, GraphCL",
            gin,
            graph,
            published_graphcl,
            lambda w: GraphCLLoss(weighting=w),
        ),
    ]


def seconds(run: Step, least: float) -> float:
    """The median time of a step. The Timer waits for the device."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=least).median)


def compare(cases: list[Case], pairs: int, least: float) -> list[str]:
    """The lines of a table with the ratios of the weighted losses' times to the plain loss's, for each case."""
    names = list(WEIGHTINGS)
    lines = [
        f"| | plain, ms | {' | '.join(f'`{name}`' for name in names)} | UnDiMix over Uniform | linear over geometric |"
    ]
    lines.append("|---|---|" + "---|" * (len(names) + 2))
    for case in tqdm(cases, file=sys.stderr):
        steps = [case.plain, *(case.weighted(weighting) for weighting in WEIGHTINGS.values())]
        times = [[seconds(run, least) for run in steps] for _ in range(3 * pairs + 1)][1:]  # the first warms up
        numerators = [(column, 0) for column in range(1, len(steps))] + [(2, 1), (3, 2)]
        cells = [ratio([row[over] / row[under] for row in times]) for over, under in numerators]
        lines.append(f"| {case.name} | {1000 * median(row[0] for row in times):.1f} | {' | '.join(cells)} |")
    return lines


def ratio(values: list[float]) -> str:
    """The smallest of three medians, and the quartiles of all ratios."""
    third = len(values) // 3
    best = min(median(values[start : start + third]) for start in range(0, 3 * third, third))
    low, _, high = quantiles(values, n=4)
    return f"{best:.2f} ({low:.2f} to {high:.2f})"


def products(device: str, least: float) -> list[str]:
    """The time of a step as a multiple of one matrix product [views, 128] x [128, views] at the machine's best rate."""
    lines = [
        "| batch | product, ms | GFLOP/s | plain | Uniform() | UnDiMix() | linear |",
        "|---|---|---|---|---|---|---|",
    ]
    square = 2048
    left, out = torch.randn(square, square, device=device), torch.empty(square, square, device=device)
    rate = 2 * square**3 / seconds(lambda: torch.mm(left, left, out=out), least)
    for batch in (256, 1024, 4096):
        views = torch.randn(2 * batch, 128, device=device)
        product = 2 * len(views) ** 2 * 128 / rate
        halves = [rows.clone().requires_grad_() for rows in views.chunk(2)]
        host = NTXentLoss()
        three = (Uniform(), UnDiMix(), UnDiMix(mixing="linear"))
        cells = [
            f"{seconds(functools.partial(backward, loss, halves), least) / product:.1f}"
            for loss in (host, *(undimix(host, weighting) for weighting in three))
        ]
        lines.append(f"| {batch} | {1000 * product:.2f} | {rate / 1e9:.0f} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument("--pairs", type=int, default=5, help="ratios in each of the three medians; default: 5")
    parser.add_argument("--seconds", type=float, default=0.2, help="least duration of each timing; default: 0.2")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS, help="which tables to print; default: all")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    titles = {
        "losses": "Forward and backward, relative to the toolkit's plain loss",
        "training": "A whole training step, relative to a step with the plain loss",
        "products": "Forward and backward as a multiple of a matrix product [views, 128] x [128, views]",
    }
    makers: dict[str, Callable[[], list[str]]] = {
        "losses": lambda: compare(losses(options.device), options.pairs, options.seconds),
        "training": lambda: compare(training(options.device), min(options.pairs, 2), options.seconds),  # slow steps
        "products": lambda: products(options.device, options.seconds),
    }
    for part in options.only:
        print(f"\n{titles[part]}\n")
        print("\n".join(makers[part]()), flush=True)


if __name__ == "__main__":
    main()
