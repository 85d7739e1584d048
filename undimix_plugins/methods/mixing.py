"""Mixed inputs with virtual labels: i-Mix (Lee et al. 2021) and Un-Mix (Shen et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from undimix_plugins.checks import check_choice, check_embeddings, check_number, check_same_length, check_strength
from undimix_plugins.contrast import Contrast
from undimix_plugins.loss import info_nce
from undimix_plugins.rows import unit_rows
from undimix_plugins.settings import constant
from undimix_plugins.weightings.weighting import Uniform, Weighting


class Mixed(NamedTuple):
    """A batch of mixed inputs.

    Attributes:
        inputs: Input i mixed with input `permutation[i]` [n, ...]. Encode these.
        permutation: For each input the index of the input that it is mixed with [n], int64.
        lam: The share of input i in mixed input i, from 0 to 1: a number for each input [n], or one for all [].

    Examples:
        >>> mixed = IMix(alpha=1.0)(torch.rand(8, 3, 32, 32))
        >>> mixed.inputs.shape, mixed.permutation.shape, mixed.lam.shape
        (torch.Size([8, 3, 32, 32]), torch.Size([8]), torch.Size([8]))
    """

    inputs: Tensor
    permutation: Tensor
    lam: Tensor


@constant
@dataclass(frozen=True)
class IMix:
    """i-Mix: mixes inputs, and the virtual labels that say which key is the positive.

    Each input of the first view is mixed with another one, given by a random permutation r:

        x_i' = lam_i x_i + (1 - lam_i) x_r(i),  lam_i = max(l, 1 - l),  l ~ Beta(alpha, alpha)

    The N-pair loss of the embeddings q_i of mixed inputs against the keys k_j of the second view is

        mean over i of  lam_i l(q_i, i) + (1 - lam_i) l(q_i, r(i)),
        l(q_i, j) = -log( exp(s(q_i, k_j) / t) / sum over all m of exp(s(q_i, k_m) / t) )

    lam_i is at least a half, as in the authors' code. So a mixed input contains more of input i than of the other one.

    Attributes:
        alpha: The parameter of the Beta distribution, above 0 and at most 1e30. The paper uses 1 for images.
        kind: "mixup", or "cutmix", which pastes a box of the other image. The box has the same size and place for the
            whole batch.
        shared: Whether all inputs of a batch have the same lam. `loss` needs this. "cutmix" always does it.

    Raises:
        ValueError: If `alpha` is out of its range or `kind` is unknown.

    References:
        Lee, Zhu, Sohn, Li, Shin, Lee: i-Mix: A Domain-Agnostic Strategy for Contrastive Representation Learning, ICLR
        2021, arXiv 2010.08887, section 3; the authors' code for lam of at least a half.

    Examples:
        >>> encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8))
        >>> x0, x1 = torch.rand(2, 16, 3, 4, 4)
        >>> mix = IMix(alpha=1.0)
        >>> mixed = mix(x0)
        >>> loss = mix.n_pair(encoder(mixed.inputs), encoder(x1), mixed, temperature=0.2, weighting=UnDiMix())
    """

    alpha: float = 1.0
    kind: str = "mixup"
    shared: bool = False

    citation: ClassVar[str] = """
@inproceedings{lee2021imix,
    title={i-Mix: A Domain-Agnostic Strategy for Contrastive Representation Learning},
    author={Kibok Lee and Yian Zhu and Kihyuk Sohn and Chun-Liang Li and Jinwoo Shin and Honglak Lee},
    booktitle={International Conference on Learning Representations},
    year={2021},
    url={https://arxiv.org/abs/2010.08887},
}
"""

    def __post_init__(self) -> None:
        check_strength("alpha", self.alpha, above=0)
        check_choice("kind", self.kind, ("mixup", "cutmix"))

    def __call__(self, inputs: Tensor) -> Mixed:
        """Mixes a batch with torch's global random numbers.

        Args:
            inputs: The inputs of the first view [n, ...], floating point. For "cutmix" images [n, ..., height, width].

        Returns:
            The mixed inputs, the permutation [n] and lam: [n], or [] if all inputs share it.

        Raises:
            ValueError: If `inputs` is not a floating-point tensor of this shape, or is empty.
        """
        cut = self.kind == "cutmix"
        _check_inputs(inputs, images=cut)
        lam = _drawn(self.alpha, () if cut or self.shared else (len(inputs),), inputs)
        lam = torch.maximum(lam, 1 - lam)
        permutation = torch.randperm(len(inputs), device=inputs.device)
        if cut:
            return Mixed(*_with_box(inputs, inputs[permutation], lam, permutation))
        return Mixed(_blended(inputs, inputs[permutation], lam), permutation, lam)

    def n_pair(
        self,
        queries: Tensor,
        keys: Tensor,
        mixed: Mixed,
        *,
        temperature: float | Tensor = 0.2,
        weighting: Weighting | None = None,
        bank: Tensor | None = None,
    ) -> Tensor:
        """Computes the N-pair loss of the paper, with weighted negatives.

        Args:
            queries: Embeddings of the mixed inputs [n, width], floating point. They are normalised to length 1.
            keys: Embeddings of the second view [n, width], same dtype. They are normalised to length 1.
            mixed: What the call of this object returned for the inputs.
            temperature: The temperature that cosine similarities are divided by, a finite number above 0 or a tensor
                with one element. The authors' code uses .2.
            weighting: How much each negative counts. Defaults to `Uniform()`, as in the paper.
            bank: Further negatives: the entries of a memory bank [m, width], same dtype, as in the authors' MoCo. They
                are normalised to length 1.

        Returns:
            A scalar, in the embeddings' dtype (float32 for half precision).

        Raises:
            ValueError: If the batch does not have the length of the mixed one, or as `Contrast.of` does.
            TypeError: If `weighting` is not a `Weighting`.

        Examples:
            >>> mix = IMix()
            >>> mixed = mix(torch.rand(16, 8))
            >>> bank = torch.randn(64, 8)
            >>> loss = mix.n_pair(mixed.inputs, torch.rand(16, 8), mixed, weighting=UnDiMix(), bank=bank)
        """
        queries, keys = unit_rows(queries=queries, keys=keys)
        check_same_length(queries=queries, mixed=mixed.permutation)
        pool = keys
        if bank is not None:
            (bank,) = unit_rows(bank=bank)
            check_embeddings(keys=keys, bank=bank)
            pool = torch.cat([keys, bank])
        own = torch.arange(len(keys), device=keys.device)
        lam = mixed.lam.expand(len(keys))

        def loss(positive: Tensor, share: Tensor) -> Tensor:
            contrast = Contrast.of(
                queries,
                keys[positive],
                pool,
                positive[:, None],
                temperature,
                positives_in_pool=True,
                anchor_weights=share,
            )
            return info_nce(contrast, Uniform() if weighting is None else weighting)

        return loss(own, lam) + loss(mixed.permutation, 1 - lam)

    def loss(self, criterion: Callable[..., Tensor], queries: Tensor, keys: Tensor, mixed: Mixed) -> Tensor:
        """Computes the mixed loss with any loss of two batches.

            lam * criterion(q, k) + (1 - lam) * criterion(q, k_r)

        Such a loss only returns the mean over a batch. So all inputs must have the same lam: use `shared=True`.

        Args:
            criterion: A loss of two batches of embeddings, such as lightly's `NTXentLoss`, weighted or not. Its buffers
                (a memory bank) are updated once, with the keys in their order.
            queries: Embeddings of the mixed inputs [n, width].
            keys: Embeddings of the second view [n, width].
            mixed: What the call of this object returned for the inputs, with a single lam.

        Returns:
            A scalar.

        Raises:
            ValueError: If each input has its own lam, or if the batch does not have the length of the mixed one.

        Examples:
            >>> mix = IMix(alpha=1.0, shared=True)
            >>> mixed = mix(torch.rand(16, 8))
            >>> criterion = lambda z0, z1: info_nce(two_views(z0, z1, temperature=0.5), UnDiMix())
            >>> loss = mix.loss(criterion, mixed.inputs, torch.rand(16, 8), mixed)
        """
        _check_shared(mixed, queries=queries, keys=keys)
        of_other, of_own = _of_one_step(criterion, (queries, keys[mixed.permutation]), (queries, keys))
        return mixed.lam * of_own + (1 - mixed.lam) * of_other


@constant
@dataclass(frozen=True)
class UnMix:
    """Un-Mix: mixes a batch with itself in reversed order, and adds two losses of the mixed batch to the plain loss.

        x_i' = lam x_i + (1 - lam) x_(n-1-i),  lam ~ Beta(beta, beta), one for the batch,
        loss = L(q, k) + lam * L(q', k) + (1 - lam) * L(q' reversed, k)

    q, q' and k are the embeddings of the first view, the mixed batch and the second view. With probability P, whole
    images are mixed as above. Otherwise a box of the other image is pasted, and lam is the share of the image outside
    the box.

    Attributes:
        beta: The parameter of the Beta distribution, above 0 and at most 1e30. The paper uses 1.
        P: The probability of mixing whole images, from 0 to 1. The authors' code uses .5.

    Raises:
        ValueError: If a number is out of its range.

    References:
        Shen, Liu, Liu, Savvides, Darrell, Xing: Un-Mix: Rethinking Image Mixtures for Unsupervised Visual
        Representation Learning, AAAI 2022, arXiv 2003.05438, section 3.

    Examples:
        >>> encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8))
        >>> x0, x1 = torch.rand(2, 16, 3, 4, 4)
        >>> criterion = lambda z0, z1: info_nce(two_views(z0, z1, temperature=0.5), UnDiMix())
        >>> mix = UnMix()
        >>> mixed = mix(x0)
        >>> loss = mix.loss(criterion, encoder(x0), encoder(mixed.inputs), encoder(x1), mixed)
    """

    beta: float = 1.0
    P: float = 0.5

    citation: ClassVar[str] = """
@inproceedings{shen2022unmix,
    title={Un-Mix: Rethinking Image Mixtures for Unsupervised Visual Representation Learning},
    author={Zhiqiang Shen and Zechun Liu and Zhuang Liu and Marios Savvides and Trevor Darrell and Eric Xing},
    booktitle={AAAI Conference on Artificial Intelligence},
    year={2022},
    url={https://arxiv.org/abs/2003.05438},
}
"""

    def __post_init__(self) -> None:
        check_strength("beta", self.beta, above=0)
        check_number("P", self.P, at_least=0)
        if self.P > 1:
            raise ValueError(f"P: expected a number from 0 to 1, got {self.P!r}")

    def __call__(self, inputs: Tensor) -> Mixed:
        """Mixes a batch with torch's global random numbers.

        Args:
            inputs: Images of the first view [n, ..., height, width], floating point. With `P=1` any inputs [n, ...].

        Returns:
            The mixed inputs, the reversed order [n] and a single lam [].

        Raises:
            ValueError: If `inputs` is not a floating-point tensor of this shape, or is empty.
        """
        _check_inputs(inputs, images=self.P < 1)
        lam = _drawn(self.beta, (), inputs)
        reverse = torch.arange(len(inputs), device=inputs.device).flip(0)
        # Drawn on the CPU, so that the host does not wait for a device.
        if float(torch.rand((), device="cpu")) < self.P:
            return Mixed(_blended(inputs, inputs.flip(0), lam), reverse, lam)
        return Mixed(*_with_box(inputs, inputs.flip(0), lam, reverse))

    def loss(
        self, criterion: Callable[..., Tensor], queries: Tensor, mixed_queries: Tensor, keys: Tensor, mixed: Mixed
    ) -> Tensor:
        """Computes the sum of the plain loss and the two losses of the mixed batch.

        Args:
            criterion: A loss of two batches of embeddings, such as lightly's `NTXentLoss`, weighted or not. Its buffers
                (a memory bank) are updated once.
            queries: Embeddings of the first view [n, width].
            mixed_queries: Embeddings of the mixed inputs [n, width].
            keys: Embeddings of the second view, from the encoder or a momentum encoder [n, width].
            mixed: What the call of this object returned for the inputs.

        Returns:
            A scalar.

        Raises:
            ValueError: If a batch does not have the length of the mixed one, or if each input has its own lam.

        Examples:
            >>> x0, x1 = torch.rand(2, 16, 8)
            >>> criterion = lambda z0, z1: info_nce(two_views(z0, z1, temperature=0.5), UnDiMix())
            >>> mix = UnMix(P=1.0)
            >>> mixed = mix(x0)
            >>> loss = mix.loss(criterion, x0, mixed.inputs, x1, mixed)
        """
        _check_shared(mixed, queries=queries, mixed_queries=mixed_queries, keys=keys)
        of_reversed, of_mixed, plain = _of_one_step(
            criterion, (mixed_queries.flip(0), keys), (mixed_queries, keys), (queries, keys)
        )
        return plain + mixed.lam * of_mixed + (1 - mixed.lam) * of_reversed


def _drawn(concentration: float, shape: tuple[int, ...], inputs: Tensor) -> Tensor:
    """Draws numbers from a symmetric Beta distribution, on the inputs' device."""
    # The distribution does not exist in half precision, and lam weights a loss, which needs full precision.
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    both = torch.full((*shape, 2), concentration, dtype=dtype, device=inputs.device)
    # The first of two shares is Beta distributed. torch's Beta would read the values, and the host would wait.
    drawn: Tensor = torch.distributions.Dirichlet(both, validate_args=False).sample()[..., 0]
    return drawn


def _blended(inputs: Tensor, others: Tensor, lam: Tensor) -> Tensor:
    share = lam.to(inputs.dtype).reshape(-1, *[1] * (inputs.dim() - 1))
    return share * inputs + (1 - share) * others


def _with_box(inputs: Tensor, others: Tensor, lam: Tensor, permutation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns images with a box of the others pasted, the permutation, and the share outside the box []."""
    height, width = (_span(length, (1 - lam).sqrt()) for length in inputs.shape[-2:])
    box = height[:, None] & width
    return torch.where(box, others, inputs), permutation, 1 - box.to(lam.dtype).mean()


def _span(length: int, share: Tensor) -> Tensor:
    """Returns a share of a side's pixels around a random one, cut off at the ends, bool [length]."""
    half = (length * share).long() // 2
    centre = torch.randint(length, (), device=share.device)
    places = torch.arange(length, device=share.device)
    return (places >= centre - half) & (places < centre + half)


def _of_one_step(criterion: Callable[..., Tensor], *batches: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Returns the losses of several pairs of batches, each computed with the present buffers of the criterion.

    Only the last call changes the buffers. Otherwise a memory bank would contain the batch's keys as negatives from the
    second call on. If a call raises an error, the buffers are restored.
    """
    module = criterion if isinstance(criterion, nn.Module) else nn.Module()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def rewind() -> None:
        for name, buffer in module.named_buffers():
            buffer.copy_(before[name])

    losses: list[Tensor] = []
    try:
        for pair in batches:
            if losses:
                rewind()
            losses.append(criterion(*pair))
    except BaseException:
        rewind()
        raise
    return losses


def _check_inputs(inputs: Any, *, images: bool) -> None:
    least, shape = (3, "[n, ..., height, width]") if images else (1, "[n, ...]")
    if not isinstance(inputs, Tensor) or inputs.dim() < least or not inputs.is_floating_point():
        came = f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"inputs: expected floating point of shape {shape}, got {came}")
    if inputs.numel() == 0:
        raise ValueError(f"inputs: expected at least one, got shape {list(inputs.shape)}")


def _check_shared(mixed: Mixed, **embeddings: Tensor) -> None:
    for name, rows in embeddings.items():
        if len(rows) != len(mixed.permutation):
            raise ValueError(f"{name}: expected {len(mixed.permutation)} rows, as the mixed batch has, got {len(rows)}")
    if mixed.lam.dim():
        raise ValueError(
            "mixed: expected one lam for all, as IMix(shared=True) draws it, since a criterion gives one number for a "
            f"batch, got {len(mixed.lam)}; n_pair takes these"
        )
