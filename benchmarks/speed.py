"""Cost of a loss, forward and backward, against the host's own plain loss: `python -m benchmarks.speed`.

Each row times the host's loss and ours in turn, in one process, and prints the median of the ratios of the pairs with
their quartiles. Ratios below 1 are faster than the host's plain loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median, quantiles

import torch
from lightly.loss import NTXentLoss
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import BoW
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

from undimix_plugins import HCL, UnDiMix, Uniform, undimix

Step = Callable[[], object]


def step(loss: Callable[..., Tensor], inputs: list[Tensor]) -> Step:
    def run() -> None:
        loss(*inputs).backward()

    return run


def embeddings(count: int, rows: int, width: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(count, rows, width, generator=generator).to(device)
    return [rows.clone().requires_grad_() for rows in made]


def seconds(run: Step, least: float) -> float:
    return float(
        Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        .blocked_autorange(min_run_time=least)
        .median
    )


def cases(device: str) -> list[tuple[str, Callable[..., Tensor], Callable[..., Callable[..., Tensor]], list[Tensor]]]:
    """(name, the host's plain loss, how it is weighted, its inputs)."""
    found: list[tuple[str, Callable[..., Tensor], Callable[..., Callable[..., Tensor]], list[Tensor]]] = []
    for batch in (256, 1024):
        host = NTXentLoss()
        found.append(
            (
                f"lightly NTXentLoss, batch {batch}, width 128",
                host,
                lambda w, h=host: undimix(h, w),
                embeddings(2, batch, 128, device),
            )
        )
    bank = NTXentLoss(memory_bank_size=(16384, 128)).to(device)
    found.append(
        (
            "lightly NTXentLoss, batch 256, bank 16384",
            bank,
            lambda w, h=bank: undimix(h, w),
            embeddings(2, 256, 128, device),
        )
    )
    model = SentenceTransformer(modules=[BoW(vocab=["a"])], device=device)
    for batch in (64, 512):
        ranking = MultipleNegativesRankingLoss(model)

        def plain(*columns: Tensor, loss: MultipleNegativesRankingLoss = ranking) -> Tensor:
            return loss.compute_loss_from_embeddings(list(columns), None)

        def weighted(w: object, loss: MultipleNegativesRankingLoss = ranking) -> Callable[..., Tensor]:
            ours = undimix(loss, w)
            return lambda *columns: ours.compute_loss_from_embeddings(list(columns), None)

        found.append(
            (
                f"sentence-transformers MNRL, batch {batch}, width 384, 3 columns",
                plain,
                weighted,
                embeddings(3, batch, 384, device),
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs a ratio")
    parser.add_argument("--seconds", type=float, default=0.3, help="least time of each timing")
    options = parser.parse_args()
    weightings = {"Uniform()": Uniform(), "HCL()": HCL(), "UnDiMix()": UnDiMix(), "linear": UnDiMix(mixing="linear")}
    lines = ["| loss | host, ms | " + " | ".join(weightings) + " |", "|---|---|" + "---|" * len(weightings)]
    table = cases(options.device)
    bar = tqdm(total=len(table) * len(weightings))
    for name, plain, weigh, inputs in table:
        host_times, cells = [], []
        for weighting in weightings.values():
            host, ours = step(plain, inputs), step(weigh(weighting), inputs)
            ratios = []
            for _ in range(options.pairs):
                one = seconds(host, options.seconds)
                ratios.append(seconds(ours, options.seconds) / one)
                host_times.append(one)
            low, _, high = quantiles(ratios, n=4)
            cells.append(f"{median(ratios):.2f} ({low:.2f} to {high:.2f})")
            bar.update()
        lines.append(f"| {name} | {1000 * median(host_times):.1f} | " + " | ".join(cells) + " |")
    bar.close()
    print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads;"
        " time over the host's, median (quartiles)\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
