"""What it costs to watch the negatives while a model trains: `python -m benchmarks.cost.monitoring`.

Whole steps of training on real data, encoder, loss, backward and optimiser, with `UnDiMix()`; against them the time of
`negative_statistics` on what the step's loss compares, and its share of the training when it is worked out every 50
steps, as the callbacks do. Each is the median of as many runs as fit the time, the two taking turns.
"""

from __future__ import annotations

import argparse
import copy
from statistics import median

import torch
from examples._shared.images import Digits
from lightly.loss import NTXentLoss
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.models import resnet18

from benchmarks.cost.speed import Step, seconds, training
from undimix_plugins import Contrast, UnDiMix, Weighting, negative_statistics, undimix, watch
from undimix_plugins.loss import OBSERVERS
from undimix_plugins.plug import WeightedLoss
from undimix_plugins.schedule import hardness_share, set_hardness

EVERY = 50


def moco(device: str) -> Step:
    """A step of MoCo: a memory bank of 65,536, and two passes through encoders."""
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
    """What a step's losses compare."""
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
    """What is paid at every step, watched or not."""
    loss = WeightedLoss()
    loss.weigh(UnDiMix())
    for_nobody = seconds(lambda: [observer() for observer in tuple(OBSERVERS)], least)  # type: ignore[call-arg]
    warmup = seconds(lambda: set_hardness(loss, hardness_share(5, 100, steps=10)), least)
    return f"{1e6 * for_nobody:.1f} µs a loss while nobody watches, {1e6 * warmup:.1f} µs a step of a warm-up"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="least time of each timing")
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
