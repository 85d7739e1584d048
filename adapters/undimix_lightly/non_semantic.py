"""Negatives made of the image itself, without its semantics (Ge et al. 2021): a transform and a weighting."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from undimix_plugins.toolkit import (
    Contrast,
    Scoped,
    check_choice,
    check_number,
    check_strength,
    constant,
    unit_rows,
)
from undimix_plugins.weightings import EqualWeights

CITATION = """
@inproceedings{ge2021robust,
    title={Robust Contrastive Learning Using Negative Samples with Diminished Semantics},
    author={Songwei Ge and Shlok Mishra and Chun-Liang Li and Haohan Wang and David Jacobs},
    booktitle={Advances in Neural Information Processing Systems},
    year={2021},
    url={https://arxiv.org/abs/2110.14189},
}
"""

SIDE = 224  # of the images that sizes are given for
SOURCE = 96  # the side of the two pieces that a texture is made of
CANDIDATES = 2  # of which the one that fits best is laid: the more there are, the more of the image's layout comes back
COLUMNS = Scoped[Tensor]("non_semantic_columns")  # embeddings of the batch's non-semantic images


class NonSemanticTransform(nn.Module):
    """Makes a negative of an image: the same local features, without the layout.

    - "patch" tiles the image with square patches of itself, each from a random place. The size of the patches is drawn
      for each image.
    - "texture" synthesises a texture from two pieces of the image, its centre and a random one, of 96 pixels in 224.
      The algorithm is image quilting: it lays blocks of a third of a piece row by row, with a quarter of overlap. Of
      two random blocks it takes the one that fits better, and cuts the overlap where the blocks differ least. The
      paper's textures come from an external program with another algorithm, so these are not the same images.

    Every pixel comes from the image. Random numbers come from torch's generator. A batch takes as long as one image, so
    pass whole batches, on their device, in the training step.

    Args:
        kind: "patch" or "texture".
        patch_size: The smallest and the largest side of a patch, in pixels of an image whose shorter side is 224 (whole
            numbers from 1 to 224). They are scaled to the image. The paper has 16 to 72.

    Raises:
        ValueError: If `kind` is another, or the sizes are out of these ranges.

    References:
        Ge, Mishra, Li, Wang, Jacobs: Robust Contrastive Learning Using Negative Samples with Diminished Semantics,
        NeurIPS 2021, arXiv 2110.14189, section 3. Quilting: Efros, Freeman, SIGGRAPH 2001.

    Examples:
        >>> transform = NonSemanticTransform("patch")
        >>> transform(torch.rand(3, 32, 32)).shape, transform(torch.rand(8, 3, 32, 32)).shape
        (torch.Size([3, 32, 32]), torch.Size([8, 3, 32, 32]))
        >>> transform
        NonSemanticTransform(kind='patch', patch_size=(16, 72))
    """

    citation: ClassVar[str] = CITATION

    def __init__(self, kind: str = "patch", patch_size: tuple[int, int] = (16, 72)) -> None:
        super().__init__()
        check_choice("kind", kind, ("patch", "texture"))
        least, most = patch_size
        for size in (least, most):
            if check_number("patch_size", size, at_least=1) != int(size):
                raise ValueError(f"patch_size: expected whole numbers, got {size!r}")
        if not least <= most <= SIDE:
            raise ValueError(f"patch_size: expected the least side and the largest, up to {SIDE}, got {patch_size}")
        self.kind = kind
        self.patch_size = (int(least), int(most))

    def extra_repr(self) -> str:
        """The settings that are used."""
        patch_size = f", patch_size={self.patch_size}" if self.kind == "patch" else ""
        return f"kind={self.kind!r}{patch_size}"

    def forward(self, images: Tensor) -> Tensor:
        """Makes one non-semantic image of each image.

        Args:
            images: [channels, height, width] or [batch, channels, height, width], of any dtype, of at least 4 pixels
                a side.

        Returns:
            A tensor of the same shape, dtype and device.

        Raises:
            ValueError: If `images` is not such a tensor.
        """
        if not isinstance(images, Tensor) or images.dim() not in (3, 4):
            came = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images: expected a tensor [channels, height, width], or a batch of these, got {came}")
        if images.numel() == 0 or min(images.shape[-2:]) < 4:
            raise ValueError(f"images: expected at least one, of at least 4 pixels a side, got {list(images.shape)}")
        batch = images if images.dim() == 4 else images[None]
        made = self._patches(batch) if self.kind == "patch" else _quilted(batch)
        return made if images.dim() == 4 else made[0]

    def _patches(self, images: Tensor) -> Tensor:
        n, device = len(images), images.device
        least, most = (_scaled(size, images) for size in self.patch_size)
        size = torch.randint(least, most + 1, (n, 1), device=device)
        height, width = images.shape[2:]
        y, x = torch.arange(height, device=device), torch.arange(width, device=device)
        # Places are drawn for as many tiles as there are of the least size.
        down, across = math.ceil(height / least), math.ceil(width / least)
        tile = (y // size)[:, :, None] * across + (x // size)[:, None]  # of each pixel [n, height, width]

        def of_tile(most: Tensor) -> Tensor:
            start = _drawn(most, (n, down * across))
            return start.gather(1, tile.flatten(1)).view_as(tile)

        rows = of_tile(height - size) + (y % size)[:, :, None]
        columns = of_tile(width - size) + (x % size)[:, None]
        return _pixels(images, rows * width + columns)


def _quilted(images: Tensor) -> Tensor:
    """Textures of two pieces of each image, by quilting."""
    n, channels, height, width = images.shape
    device, side = images.device, max(3, _scaled(SOURCE, images))
    block = max(2, side // 3)
    overlap = max(1, block // 4)
    step = block - overlap
    # The pieces' corners, of the one in the centre and of a random one [n, 2].
    corners = [
        torch.stack([torch.full((n,), (length - side) // 2, device=device), _drawn(length - side, (n,), device)], dim=1)
        for length in (height, width)
    ]
    inside = torch.arange(block, device=device)
    inside = inside[:, None] * width + inside
    down, across = (math.ceil((length - overlap) / step) for length in (height, width))
    canvas = images.new_zeros(n, channels, down * step + overlap, across * step + overlap)
    for row in range(down):
        for column in range(across):
            piece = torch.randint(2, (n, CANDIDATES), device=device)
            top, left = (of.gather(1, piece) + _drawn(side - block, (n, CANDIDATES), device) for of in corners)
            candidates = _pixels(images, (top * width + left)[:, :, None, None] + inside)
            rows, columns = (slice(place * step, place * step + block) for place in (row, column))
            laid = canvas[:, :, rows, columns]
            errors = (candidates.float() - laid[:, :, None].float()).square().sum(dim=1)
            above, before = (overlap if place else 0 for place in (row, column))
            fit = errors[:, :, :above].sum(dim=(2, 3)) + errors[:, :, above:, :before].sum(dim=(2, 3))
            best = fit.argmin(dim=1)
            chosen = candidates[torch.arange(n, device=device), :, best]
            errors = errors[torch.arange(n, device=device), best]
            stays = torch.zeros_like(errors, dtype=torch.bool)
            if before:
                stays[:, :, :before] |= _before_cut(errors[:, :, :before])
            if above:
                stays[:, :above] |= _before_cut(errors[:, :above].mT).mT
            canvas[:, :, rows, columns] = torch.where(stays[:, None], laid, chosen)
    return canvas[:, :, :height, :width]


def _before_cut(errors: Tensor) -> Tensor:
    """Which pixels of an overlap lie before the cut from its first row to its last along which errors are least.

    Args:
        errors: [n, length, overlap]; the cut moves by at most one column from row to row.

    Returns:
        bool [n, length, overlap].
    """
    sums = [errors[:, 0]]  # of the least errors of a cut that comes to a pixel from the first row
    for row in errors[:, 1:].unbind(dim=1):
        nearby = pad(sums[-1], (1, 1), value=math.inf).unfold(1, 3, 1)
        sums.append(row + nearby.amin(dim=2))
    columns = torch.arange(errors.shape[2], device=errors.device)
    cut = [sums[-1].argmin(dim=1, keepdim=True)]
    for total in sums[-2::-1]:
        cut.append(total.masked_fill((columns - cut[-1]).abs() > 1, math.inf).argmin(dim=1, keepdim=True))
    return columns < torch.stack(cut[::-1], dim=1)


def _scaled(size: int, images: Tensor) -> int:
    """A size in pixels of images of 224, in those of these images."""
    return max(1, round(size * min(images.shape[-2:]) / SIDE))


def _drawn(most: Tensor | int, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Whole numbers from 0 to `most`, all as likely."""
    most = most if isinstance(most, Tensor) else torch.full((), most, device=device)
    # A product with a number below 1 may be rounded up.
    return torch.minimum((torch.rand(shape, device=most.device) * (most + 1)).long(), most)


def _pixels(images: Tensor, places: Tensor) -> Tensor:
    """Pixels [n, channels, ...] of images [n, channels, height, width] at places [n, ...] of their flattened sides."""
    channels = images.shape[1]
    index = places.flatten(1)[:, None].expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view(len(images), channels, *places.shape[1:])


@contextmanager
def non_semantic_columns(*embeddings: Tensor) -> Iterator[None]:
    """Adds embeddings of non-semantic images to the negatives of their own anchors, in the losses called inside.

    This holds in the current thread or task only. On a GPU, activation checkpointing runs a forward again in another
    thread, which does not see them: checkpoint the encoder, not the loss.

    Args:
        embeddings: One batch or several, each [samples, width], floating point, from the same projection head as the
            views. They are normalised here. For a loss that compares regions (DetCon), the regions are the samples. A
            gradient flows through them if they carry one; the authors use the momentum encoder, without gradient.

    Raises:
        ValueError: If there are no embeddings, they are not finite matrices of one width, or the batches differ in
            length.

    Examples:
        >>> z0, z1, of_patches = torch.randn(3, 8, 16)
        >>> contrast = two_views(z0, z1, temperature=0.5)
        >>> with non_semantic_columns(of_patches):
        ...     loss = info_nce(contrast, compose(UnDiMix(), NonSemanticNegatives(alpha=2.0)))
    """
    if not embeddings:
        raise ValueError("embeddings: expected at least one batch, got none")
    rows = unit_rows(**{f"embeddings[{place}]": batch for place, batch in enumerate(embeddings)})
    with COLUMNS.holding(torch.stack(rows, dim=1)):
        yield


@constant
@dataclass(frozen=True)
class NonSemanticNegatives(EqualWeights):
    """Non-semantic negatives: the anchor's denominator gets the image's own texture or patches.

        loss_i = -log( exp(s_i+ / t) / (exp(s_i+ / t) + sum_j exp(s_ij / t) + sum_k exp(alpha * <a_i, n_ik> / t)) )

    n_ik are embeddings of images that a `NonSemanticTransform` made of the anchor's sample. The loss takes them from
    `non_semantic_columns`. As in the authors' code, alpha scales their similarity, not their weight. To weight the
    other negatives, compose: `compose(UnDiMix(), NonSemanticNegatives())`. An anchor without negatives j gets no
    non-semantic ones either.

    Attributes:
        alpha: The similarity of non-semantic negatives is multiplied by it. Above 0 and at most 1e30; the paper also
            has 2 and 3.

    Raises:
        ValueError: If `alpha` is out of this range. In a loss: outside of `non_semantic_columns`, or if the columns
            have another width or number of samples than the batch.

    References:
        Ge, Mishra, Li, Wang, Jacobs: Robust Contrastive Learning Using Negative Samples with Diminished Semantics,
        NeurIPS 2021, arXiv 2110.14189, section 3, as the authors' code has it.

    Examples:
        >>> z0, z1, of_patches = torch.randn(3, 8, 16)
        >>> with non_semantic_columns(of_patches):
        ...     loss = info_nce(two_views(z0, z1, 0.5), NonSemanticNegatives(alpha=2.0))
    """

    alpha: float = 1.0

    citation: ClassVar[str] = CITATION

    adds_negatives: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_strength("alpha", self.alpha, above=0)

    def combine(self, contrast: Contrast, positives: Tensor, negatives: Tensor, count: Tensor) -> Tensor:
        """The negatives with the non-semantic ones [n]."""
        columns = COLUMNS.values()
        if not columns:
            raise ValueError("non_semantic_columns: expected the loss to be called inside of it, got no columns")
        rows, anchors = columns[-1], contrast.anchors
        samples, width = len(rows), anchors.shape[1]
        if len(anchors) not in (samples, 2 * samples) or rows.shape[2] != width:
            raise ValueError(
                f"non_semantic_columns: expected embeddings of the batch's samples [samples, {width}], of which the "
                f"loss has {len(anchors)} anchors, one or two for each, got {[samples, rows.shape[2]]}"
            )
        by_sample = anchors.view(-1, samples, width)
        logits = torch.einsum("vsd,skd->vsk", by_sample, rows.to(anchors)).flatten(0, 1)
        if anchors is contrast.pool:  # which then carries half of a learned temperature's gradient
            logits = logits * (contrast.held_temperature / contrast.temperature) ** 0.5
        further = (self.alpha * logits / contrast.held_temperature).logsumexp(dim=1)
        return torch.logaddexp(negatives, further)
