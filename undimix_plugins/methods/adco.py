"""A pool of negatives that is trained against the encoder (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from undimix_plugins.checks import check_embeddings, check_number, check_strength, check_temperature, check_whole
from undimix_plugins.contrast import Contrast
from undimix_plugins.distributed import check_equal_batches, gather_constants, processes
from undimix_plugins.loss import info_nce
from undimix_plugins.rows import full_precision, unit_rows
from undimix_plugins.weightings.weighting import Uniform, Weighting, check_weighting


class AdCo(nn.Module):
    """Adversarial contrast (AdCo): InfoNCE with a pool of negatives that learns to make the loss large.

    The queries q_i, the keys k_i and the negatives n_j have length 1. The negatives are the rows r_j of the pool,
    normalised. The encoder minimises the loss at temperature t. The pool maximises it at a lower temperature t_m, by
    SGD with momentum on its rows:

        loss(t)   = mean over i of -log( exp(q_i k_i / t) / (sum_l exp(q_i k_l / t) + sum_j exp(q_i n_j / t)) )
        gradient  = d loss(t_m) / d r_j = (I - n_j n_j') mean_i p_ij q_i / (t_m |r_j|),  p_ij the softmax at t_m
        v_j  <-  momentum * v_j - gradient + weight_decay * r_j,   r_j  <-  r_j - lr * v_j

    As in the authors' code, the other keys of the batch (of all processes) are negatives, too, and keys have no
    gradient. The formula of the paper has no in-batch negatives. The weighting applies to both kinds of negatives in
    the encoder's loss. The pool maximises the loss without weights.

    The pool and its momentum are buffers. They are saved in the `state_dict`, so that a resumed training continues
    exactly, and they move with the module. They are not parameters, since the encoder's optimiser would then minimise
    the loss with them. All processes have the same pool if they call `step` together: gradients are averaged over the
    processes.

    Args:
        width: The width d of the embeddings, at least 1.
        size: The number of rows K of the pool, at least 1.
        temperature: The temperature t of the encoder's loss, a finite number of at least 1e-10.
        weighting: How much each negative counts in the encoder's loss. None means `Uniform()`.
        memory_temperature: The temperature t_m of the pool's loss, a finite number of at least 1e-10.
        lr: The learning rate of the pool, from 0 to 1e30. You can change the attribute during training.
        momentum: The momentum of the pool, in [0, 1).
        weight_decay: The weight decay of the pool, from 0 to 1e30.

    Attributes:
        pool: The rows r_j [K, d], of any length. They are random, from the normal distribution, until you call `fill`.
        velocity: The momentum v_j of the rows [K, d].

    Raises:
        ValueError: If a setting is out of its range.
        TypeError: If `weighting` is not a `Weighting`.

    References:
        Hu, Wang, Hu, Qi: AdCo: Adversarial Contrast for Efficient Learning of Unsupervised Representations from
        Self-Trained Negative Adversaries, CVPR 2021, arXiv 2011.08435, section 3. The defaults are those of the
        authors' code. For a pool of 8,192 rows the authors use temperatures of .14 and .03.

    Examples:
        >>> adversary = AdCo(width=4, size=16)
        >>> query, key = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
        >>> adversary(query, key).backward()  # the encoder's step goes here
        >>> adversary.step(query, key)
    """

    pool: Tensor
    velocity: Tensor

    citation: ClassVar[str] = """
@inproceedings{hu2021adco,
    title={AdCo: Adversarial Contrast for Efficient Learning of Unsupervised Representations from Self-Trained Negative
        Adversaries},
    author={Qianjiang Hu and Xiao Wang and Wei Hu and Guo-Jun Qi},
    booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
    year={2021},
    url={https://arxiv.org/abs/2011.08435},
}
"""

    def __init__(
        self,
        width: int,
        size: int = 65536,
        temperature: float = 0.12,
        weighting: Weighting | None = None,
        *,
        memory_temperature: float = 0.02,
        lr: float = 3.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("size", size)):
            check_whole(name, value, at_least=1)
        self.temperature = check_temperature("temperature", temperature)
        self.weighting = Uniform() if weighting is None else weighting
        check_weighting(self.weighting)
        self.memory_temperature = check_temperature("memory_temperature", memory_temperature)
        self.lr = check_strength("lr", lr)
        self.momentum = check_number("momentum", momentum, at_least=0, below=1)
        self.weight_decay = check_strength("weight_decay", weight_decay)
        self.register_buffer("pool", torch.randn(int(size), int(width)))
        self.register_buffer("velocity", torch.zeros(int(size), int(width)))

    def extra_repr(self) -> str:
        """Returns the settings, as a printed module shows them."""
        names = ("temperature", "weighting", "memory_temperature", "lr", "momentum", "weight_decay")
        size, width = self.pool.shape
        return ", ".join([f"width={width}, size={size}", *(f"{name}={getattr(self, name)!r}" for name in names)])

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Computes the encoder's loss.

        Args:
            query: Embeddings [n, d], floating point, in the dtype of the pool (or half precision, if that is float32).
                They are normalised to length 1.
            key: Embeddings of the other views of the same samples, from a momentum encoder [n, d], same dtype. They are
                normalised to length 1 and get no gradient.

        Returns:
            A scalar, in the embeddings' dtype (float32 for half precision).

        Raises:
            ValueError: If shapes, dtypes or devices do not match each other or the pool, if batches differ in length
                between processes, or (on the CPU) if a row is not finite.

        Examples:
            >>> adversary = AdCo(width=4, size=16, weighting=UnDiMix())
            >>> adversary(torch.randn(8, 4), torch.randn(8, 4)).dim()
            0
        """
        queries, keys, own = self._compared(query, key)
        pool = torch.cat([keys, normalize(self.pool, dim=1)])
        contrast = Contrast.of(queries, keys[own], pool, own[:, None], self.temperature, positives_in_pool=True)
        return info_nce(contrast, self.weighting)

    def step(self, query: Tensor, key: Tensor) -> None:
        """Makes the pool harder by a step of gradient ascent.

        It only reads the embeddings, so you can call it before or after the optimiser's step of the encoder.

        Args:
            query: The embeddings passed to the loss [n, d]. Their autograd graph is neither used nor freed.
            key: The keys passed to the loss [n, d].

        Raises:
            ValueError: As `forward` does.

        Examples:
            >>> adversary = AdCo(width=4, size=16)
            >>> before = adversary.pool.clone()
            >>> adversary.step(torch.randn(8, 4), torch.randn(8, 4))
            >>> torch.equal(adversary.pool, before)
            False
        """
        queries, keys, own = self._compared(query.detach(), key)
        with torch.enable_grad(), full_precision(queries):
            rows = self.pool.detach().requires_grad_()
            logits = queries @ torch.cat([keys, normalize(rows, dim=1)]).T / self.memory_temperature
            (gradient,) = torch.autograd.grad(cross_entropy(logits, own), rows)
        with torch.no_grad():
            if processes() > 1:
                dist.all_reduce(gradient)
                gradient /= processes()
            velocity = (self.velocity * self.momentum).sub_(gradient).add_(self.pool, alpha=self.weight_decay)
            pool = self.pool.sub(velocity, alpha=self.lr)
            self.velocity.copy_(velocity)  # after both are computed: a step that raises an error changes neither
            self.pool.copy_(pool)

    @torch.no_grad()
    def fill(self, batches: Iterable[Tensor]) -> None:
        """Fills the pool with encoded keys before training, and sets its momentum to 0.

        Args:
            batches: Batches of keys [n, d], of any size n, floating point. The keys are normalised to length 1. No more
                batches are read than needed.

        Raises:
            ValueError: If the batches have fewer rows than the pool, or do not match its width, dtype or device.

        Examples:
            >>> adversary = AdCo(width=4, size=16)
            >>> adversary.fill(torch.randn(8, 4) for _ in range(2))
        """
        size, filled = len(self.pool), 0
        rows = torch.empty_like(self.pool)
        for batch in batches:
            (keys,) = unit_rows(batches=batch)
            check_embeddings(pool=self.pool, batches=keys)
            rows[filled : filled + len(keys)] = keys[: size - filled]
            filled = min(filled + len(keys), size)
            if filled == size:
                self.pool.copy_(rows)
                self.velocity.zero_()
                return
        raise ValueError(f"batches: expected at least {size} rows, as the pool has, got {filled}")

    def _compared(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries and the keys of all processes, normalised, and the index of each query's key [n]."""

        def checked() -> list[Tensor]:
            rows = unit_rows(query=query, key=key)
            check_embeddings(pool=self.pool, query=rows[0])
            return rows

        queries, keys = check_equal_batches("query", checked, itemgetter(0))
        keys = keys.detach()
        first = dist.get_rank() * len(queries) if processes() > 1 else 0
        own = torch.arange(len(queries), device=queries.device) + first
        return queries, gather_constants(keys), own
