"""CLIP with open_clip, with and without UnDiMix: one line apart.

The model is a small one of open_clip's own class, and `train_one_epoch` is its training loop. An image shows two digits
side by side, and its text names them: "three seven". So there are a hundred texts, and a text's hardest negatives have
one digit in common with it. A batch has each text once. The score is the accuracy of choosing the text of a held-out
image among the hundred. The data need no download.

    python examples/open_clip_digits.py
    python examples/open_clip_digits.py --epochs 20
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import open_clip
import torch
from open_clip_train.params import parse_args
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from _shared.compare import compare
from _shared.images import Digits
from undimix_plugins import undimix

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXTS = [f"{left} {right}" for left in NAMES for right in NAMES]
BATCH = 50  # of the hundred texts, each once


@cache
def pairs(train: bool, of_each: int) -> Tensor:
    """Returns images of two digits [of_each, 100, 3, 28, 56], for each text as many."""
    digits = Digits(train)
    pixels, labels = torch.from_numpy(digits.data).float() / 255, torch.from_numpy(digits.targets).long()
    draw = torch.Generator().manual_seed(0)
    of_label = [(labels == label).nonzero()[:, 0] for label in range(10)]

    def drawn(label: int) -> Tensor:
        rows = of_label[label]
        return pixels[rows[torch.randint(len(rows), (of_each,), generator=draw)]]

    images = [torch.cat([drawn(left), drawn(right)], dim=2) for left in range(10) for right in range(10)]
    return torch.stack(images, dim=1)[:, :, None].expand(-1, -1, 3, -1, -1)


class Data:
    """What `train_one_epoch` asks of its data: batches in which no text comes twice."""

    def __init__(self, tokens: Tensor, max_steps: int) -> None:
        images = pairs(train=True, of_each=40)
        order = torch.stack([torch.randperm(100) for _ in images])  # a row after the other: each text once in a batch
        chosen = torch.stack([of_text[places] for of_text, places in zip(images, order, strict=True)])
        data = TensorDataset(chosen.flatten(0, 1), tokens[order.flatten()])
        if max_steps >= 0:
            data = TensorDataset(*data[: max_steps * BATCH])
        self.dataloader: Any = DataLoader(data, batch_size=BATCH)
        self.dataloader.num_batches, self.dataloader.num_samples = len(self.dataloader), len(data)

    def set_epoch(self, epoch: int) -> None:
        pass


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor) -> float:
    """Returns how often the text of a held-out image is the most similar of the hundred."""
    model.eval()
    images = pairs(train=False, of_each=10)
    texts = model.encode_text(tokens, normalize=True)
    right = [model.encode_image(of_text, normalize=True) @ texts.T for of_text in images]
    return float((torch.stack(right).argmax(dim=2) == torch.arange(100)).float().mean())


def train(
    weighted: bool,
    *,
    seed: int = 0,
    data: str = "MNIST",
    epochs: int = 8,
    max_steps: int = -1,
    progress: bool = True,
) -> tuple[nn.Module, float, float]:
    """Trains a CLIP; returns it, its accuracy and the seconds of training."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(
        embed_dim=64,
        vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=7, image_size=(28, 56)),
        text_cfg=open_clip.CLIPTextCfg(context_length=6, width=64, heads=4, layers=2),
        output_dict=True,
    )
    tokens = open_clip.SimpleTokenizer(context_length=6)(TEXTS)
    args = parse_args(["--model", "small", "--device", "cpu", "--precision", "fp32", "--skip-scheduler"])
    args.rank, args.world_size, args.distill, args.wandb = 0, 1, False, False
    args.batch_size, args.log_every_n_steps = BATCH, 10**6
    loss = open_clip.create_loss(args)
    if weighted:
        loss = undimix(loss)  # the one line
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)

    start = time.perf_counter()
    for epoch in range(epochs):
        batches = {"train": Data(tokens, max_steps)}
        train_one_epoch(model, batches, loss, epoch, optimizer, None, None, None, args)
        if max_steps >= 0:
            break
    seconds = time.perf_counter() - start
    return model, accuracy(model, tokens), seconds


def main() -> None:
    compare(
        str(__doc__),
        train,
        score="accuracy among a hundred texts",
        plain="ClipLoss",
        method="undimix(ClipLoss)",
        data=("MNIST",),
    )


if __name__ == "__main__":
    main()
