"""A learnable pool of negatives that plays against the encoder (Hu et al. 2021)."""

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
    """Adversarial contrast: InfoNCE against a pool of negatives that themselves learn to make it large.

    With queries q_i, keys k_i and the pool's n_j at length 1, the encoder descends the loss at temperature t, the pool
    ascends it at a lower one, t_m, by SGD with momentum on its rows r_j before they are brought to length 1:

        loss(t)   = mean over i of -log( exp(q_i k_i / t) / (sum_l exp(q_i k_l / t) + sum_j exp(q_i n_j / t)) )
        gradient  = d loss(t_m) / d r_j = (I - n_j n_j') mean_i p_ij q_i / (t_m |r_j|),  p_ij the softmax at t_m
        v_j  <-  momentum * v_j - gradient + weight_decay * r_j,   r_j  <-  r_j - lr * v_j.

    As in the authors' code the other keys of the batch (of all processes) are negatives too, which the paper's formula
    leaves out, and keys are constants. A weighting weighs both kinds of negatives in the encoder's loss; the pool
    ascends the plain one.

    The pool and its momentum are buffers: they are saved with the state, so that training goes on bit for bit, move
    with the module and are no parameters, which the encoder's optimiser would lower the loss with. Each process holds
    the same pool, as long as all call `step` together: gradients are averaged over them.

    Args:
        width: That of the embeddings, d.
        size: How many rows the pool has, K.
        temperature: The encoder's, a finite number above 0.
        weighting: How much each negative counts in the encoder's loss.
        memory_temperature: The pool's, a finite number above 0.
        lr: The pool's learning rate, a finite number of at least 0; the attribute may change in training.
        momentum: The pool's, in [0, 1).
        weight_decay: The pool's, a finite number of at least 0.

    Attributes:
        pool: The rows [K, d], of any length; drawn from the normal distribution until `fill`.
        velocity: Their momentum [K, d].

    Raises:
        ValueError: For settings out of their ranges.
        TypeError: For a weighting that is none.

    References:
        Hu, Wang, Hu, Qi: AdCo: Adversarial Contrast for Efficient Learning of Unsupervised Representations from
        Self-Trained Negative Adversaries, CVPR 2021, arXiv 2011.08435, section 3. The defaults are those of the
        authors' code; for a pool of 8,192 they give temperatures of .14 and .03.

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
        """The settings."""
        names = ("temperature", "weighting", "memory_temperature", "lr", "momentum", "weight_decay")
        size, width = self.pool.shape
        return ", ".join([f"width={width}, size={size}", *(f"{name}={getattr(self, name)!r}" for name in names)])

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """The encoder's loss.

        Args:
            query: Embeddings [n, d], floating point, of any length.
            key: Those of the same samples' other views, of a momentum encoder [n, d]; no gradient reaches them.

        Returns:
            A scalar, in the embeddings' dtype (float32 for half precision).

        Raises:
            ValueError: For shapes, dtypes or devices that do not fit each other or the pool, (on the CPU) non-finite
                rows, or batches that differ between processes.
        """
        queries, keys, own = self._compared(query, key)
        pool = torch.cat([keys, normalize(self.pool, dim=1)])
        contrast = Contrast.of(queries, keys[own], pool, own[:, None], self.temperature, positives_in_pool=True)
        return info_nce(contrast, self.weighting)

    def step(self, query: Tensor, key: Tensor) -> None:
        """Makes the pool harder: a step of gradient ascent.

        It reads the embeddings alone, so that before or after the encoder's own step is the same.

        Args:
            query: As for the loss [n, d]; its graph is neither used nor freed.
            key: Likewise [n, d].

        Raises:
            ValueError: As calling it does.
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
            self.velocity.copy_(velocity)  # once both are there: a step that raises leaves both as they were
            self.pool.copy_(pool)

    @torch.no_grad()
    def fill(self, batches: Iterable[Tensor]) -> None:
        """Makes the pool of encoded keys, before training; its momentum becomes 0.

        Args:
            batches: Keys [n, d] in batches of any size, of any length; no more are taken than needed.

        Raises:
            ValueError: For too few of them, or those that do not fit the pool.

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
        """Queries at length 1, all processes' keys at length 1, and the queries' own among these [n]."""

        def checked() -> list[Tensor]:
            rows = unit_rows(query=query, key=key)
            check_embeddings(pool=self.pool, query=rows[0])
            return rows

        queries, keys = check_equal_batches("query", checked, itemgetter(0))
        keys = keys.detach()
        first = dist.get_rank() * len(queries) if processes() > 1 else 0
        own = torch.arange(len(queries), device=queries.device) + first
        return queries, gather_constants(keys), own
