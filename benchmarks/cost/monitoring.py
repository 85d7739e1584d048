"""The time that statistics of the negatives add to a training: `python -m benchmarks.cost.monitoring`.

The table has the time of a whole training step with `UnDiMix()` on real data (encoder, loss, backward, optimizer), the
time of `negative_statistics` for that step, and its share of the training if it is computed every 50 steps, as the
callbacks do. Times are medians; the two take turns.
"""

from __future__ import annotations

import argparse
import copy
from statistics import median

import torch
from lightly.loss import NTXentLoss
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.models import resnet18

from benchmarks.cost.speed import Step, seconds, training
from examples._shared.images import Digits
from undimix_plugins import Contrast, UnDiMix, Weighting, hardness_share, negative_statistics, undimix, watch
from undimix_plugins.plan import OBSERVERS
from undimix_plugins.toolkit import WeightedLoss, set_hardness

EVERY = 50


def moco(device: str) -> Step:
    """A training step of MoCo with a memory bank of 65,536 keys."""
    data = Digits().data
    digits = torch.stack([torch.from_numpy(data[index]) for index in range(64)]).float()
    digits = normalize(digits.flatten(1), dim=1).view(64, 1, 28, 28).expand(-1, 3, -1, -1).to(device)
    encoder = resnet18(num_classes=128).to(device)
    keys = copy.deepcopy(encoder)
    deactivate_requires_grad(keys)
    loss = undimix(NTXentLoss(memory_bank_size=(65536, 128))).to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5)

    def noisy() -> Tensor:
        return digits + 0.1 * torch.randn_like(digits)

    def step() -> None:
        optimizer.zero_grad()
        update_momentum(encoder, keys, m=0.99)
        with torch.no_grad():
            key = keys(noisy())
        loss(encoder(noisy()), key).backward()
        optimizer.step()

    return step


def compared(step: Step) -> list[tuple[Contrast, Weighting]]:
    """The contrasts of a step's losses, with their weightings."""
    seen: list[tuple[Contrast, Weighting]] = []
    with watch(lambda *both: seen.append(both)):
        step()
    return seen


def line(name: str, step: Step, least: float, turns: int) -> str:
    seen = compared(step)

    def statistics() -> None:
        for contrast, weighting in seen:
            negative_statistics(contrast, weighting)

    times = [(seconds(step, least), seconds(statistics, least)) for _ in range(turns + 1)][1:]  # the first warms up
    of_step, of_statistics = (median(column) for column in zip(*times, strict=True))
    share = of_statistics / EVERY / of_step
    return f"| {name} | {1000 * of_step:.1f} | {1000 * of_statistics:.1f} | {share:.2%} |"


def idle(least: float) -> str:
    """The time that every step takes, without statistics."""
    loss = WeightedLoss()
    loss.weigh(UnDiMix())
    unwatched = seconds(lambda: [observer() for observer in OBSERVERS.values()], least)  # type: ignore[call-arg]
    warmup = seconds(lambda: set_hardness(loss, hardness_share(5, 100, steps=10)), least)
    return f"{1e6 * unwatched:.1f} µs for a loss without statistics, {1e6 * warmup:.1f} µs for a step of a warm-up"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument("--turns", type=int, default=5, help="number of timings of each; default: 5")
    parser.add_argument("--seconds", type=float, default=0.5, help="least duration of each timing; default: 0.5")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    print(f"| step | ms | statistics, ms | every {EVERY} steps |\n|---|---|---|---|")
    cases = [(case.name, case.weighted(UnDiMix())) for case in training(options.device)]
    cases.append(("ResNet-18, 64 digits, MoCo with a bank of 65,536", moco(options.device)))
    for name, step in cases:
        print(line(name, step, options.seconds, options.turns), flush=True)
    print(idle(options.seconds))


if __name__ == "__main__":
    main()
