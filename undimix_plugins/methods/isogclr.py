"""Learns a temperature for each sample, and weights negatives by the softmax at that temperature (Qiu et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from undimix_plugins.checks import (
    INTEGERS,
    check_number,
    check_strength,
    check_temperature,
    check_whole,
    values_are_free,
)
from undimix_plugins.distributed import check_equal_batches, gather_constants, processes
from undimix_plugins.rows import full_precision, unit_rows


class ISogCLR(nn.Module):
    """iSogCLR: a contrastive loss of two views with a learned temperature for each sample of the data set.

    Each of a sample's two views is an anchor. s_+ is its cosine to the other view, and s_j are its cosines to the
    2n - 2 views of the other samples, its negatives. Encoder and temperatures minimise, for each anchor of sample i,

        tau_i * log( mean over j of exp((s_j - s_+) / tau_i) )  +  rho * tau_i,    tau_min <= tau_i <= tau_max

    The mean is over the whole data set. A moving average S_i of the batches' means g_i estimates it. A step is

        g_i    = mean over j of exp(s_j / tau_i)
        S_i'   = (1 - gamma) * S_i + gamma * g_i          (g_i when the sample is seen for the first time)
        w_j    = exp(s_j / tau_i) / S_i'                  (no gradient)
        loss_i = mean over j of w_j s_j  -  s_+
        d_i    = log S_i' + rho - mean over j of w_j s_j / tau_i,  clipped to [-grad_clip, grad_clip]
        u_i   <- (1 - beta_u) * u_i + beta_u * d_i,    tau_i <- clip(tau_i - eta * u_i, tau_min, tau_max)

    The loss is the mean over samples of the sum for both views. S_i and d_i are means over the two views. While S_i' is
    g_i, tau_i stops where the softmax over the negatives has divergence rho (KL) from uniform weights. It falls where
    the softmax is more even, and rises where it is more concentrated. If rho is above the logarithm of the number of
    negatives, all temperatures fall to `tau_min`.

    As in the authors' code for images, s_+ is left out of the exponentials, and has weight 1 in `loss_i`. Their form
    for two modalities, with a temperature for each text and each image, is not included. Samples with the same index
    are no negatives of each other, and get the mean of their updates.

    With several processes, each compares the views of all processes, as in the authors' code for two modalities. So all
    processes have the same temperatures. Gradients that are averaged over the processes, as by DistributedDataParallel,
    are those of one process with the whole batch.

    The state (tau, log S and u) is in buffers. It is saved in the `state_dict`, so that a resumed training continues
    exactly, and it moves with the module. It stays in full precision if the module is converted to half precision. A
    call changes it in training mode if the embeddings have a gradient. An evaluation does not change it, and a batch
    with non-finite embeddings does not either.

    Args:
        size: The number of samples of the data set, at least 1. Indices go from 0 to `size - 1`.
        rho: The strength of the pull to low temperatures, from 0 to 1e30.
        gamma: The weight of the new batch in the moving average of S_i, above 0 and at most 1.
        tau_init: The temperature of all samples at the start, from `tau_min` to `tau_max`.
        tau_min: The lowest temperature, at least 1e-10.
        tau_max: The highest temperature, at least `tau_min`.
        eta: The step size of the temperatures, from 0 to 1e30. You can change the attribute during training.
        beta_u: The weight of the new gradient in the moving average of u_i, above 0 and at most 1.
        grad_clip: The bound of the temperatures' gradients, above 0 and at most 1e30.

    Attributes:
        tau: The temperature of each sample [size].
        log_s: The logarithm of S of each sample [size], minus infinity for a sample that was not seen yet.
        u: The moving average of the gradients of each sample's temperature [size].

    Raises:
        ValueError: If a setting is out of its range.

    Warns:
        UserWarning: If a temperature is above 2.

    References:
        Qiu, Hu, Yuan, Zhou, Zhang, Yang: Not All Semantics are Created Equal: Contrastive Self-supervised Learning with
        Automatic Temperature Individualization, ICML 2023, arXiv 2305.11965. The defaults are those of the authors'
        command for CIFAR-100, with 254 negatives for an anchor. The defaults of their class are `rho=6.0,
        tau_init=0.07, eta=0.001, beta_u=0.9`.

    Examples:
        >>> criterion = ISogCLR(size=1000)
        >>> z0, z1 = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
        >>> index = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5])  # the place of each sample in the data set
        >>> criterion(z0, z1, index).backward()
        >>> int((criterion.tau != 0.1).sum())
        8
    """

    tau: Tensor
    log_s: Tensor
    u: Tensor

    citation: ClassVar[str] = """
@inproceedings{qiu2023not,
    title={Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic Temperature
        Individualization},
    author={Zi-Hao Qiu and Quanqi Hu and Zhuoning Yuan and Denny Zhou and Lijun Zhang and Tianbao Yang},
    booktitle={International Conference on Machine Learning},
    year={2023},
    url={https://arxiv.org/abs/2305.11965},
}
"""

    def __init__(
        self,
        size: int,
        rho: float = 0.4,
        gamma: float = 0.8,
        tau_init: float = 0.1,
        tau_min: float = 0.05,
        tau_max: float = 1.0,
        eta: float = 0.03,
        beta_u: float = 0.5,
        grad_clip: float = 3.0,
    ) -> None:
        super().__init__()
        check_whole("size", size, at_least=1)
        self.rho = check_strength("rho", rho)
        self.gamma, self.beta_u = _share("gamma", gamma), _share("beta_u", beta_u)
        self.tau_min, self.tau_max = check_temperature("tau_min", tau_min), check_temperature("tau_max", tau_max)
        if not self.tau_min <= check_temperature("tau_init", tau_init) <= self.tau_max:
            raise ValueError(
                f"tau_init: expected a temperature from tau_min to tau_max, got tau_init={tau_init!r}, "
                f"tau_min={tau_min!r}, tau_max={tau_max!r}"
            )
        self.eta = check_strength("eta", eta)
        self.grad_clip = check_strength("grad_clip", grad_clip, above=0)
        self.register_buffer("tau", torch.full((int(size),), float(tau_init)))
        self.register_buffer("log_s", torch.full((int(size),), -math.inf))
        self.register_buffer("u", torch.zeros(int(size)))

    def extra_repr(self) -> str:
        """Returns the settings, as a printed module shows them."""
        names = ("rho", "gamma", "tau_min", "tau_max", "eta", "beta_u", "grad_clip")
        return ", ".join([f"size={len(self.tau)}", *(f"{name}={getattr(self, name)!r}" for name in names)])

    def forward(self, z0: Tensor, z1: Tensor, index: Tensor | None = None) -> Tensor:
        """Computes the loss, and in training makes a step of the samples' temperatures.

        Args:
            z0: Embeddings of the first views [n, d], floating point. They are normalised to length 1.
            z1: Embeddings of the second views of the same samples [n, d], same dtype. They are normalised to length 1.
            index: The place of each sample in the data set [n], integers from 0 to `size - 1`, on the same device.

        Returns:
            A scalar, in the embeddings' dtype (float32 for half precision). 0 for a sample without negatives.

        Raises:
            ValueError: If there is no index, if shapes, dtypes or devices do not match, if batches differ in length
                between processes, or (on the CPU) if a row is not finite or an index is out of range.

        Examples:
            >>> ISogCLR(size=10)(torch.randn(8, 4), torch.randn(8, 4), torch.arange(8)).dim()
            0
        """

        def checked() -> tuple[list[Tensor], Tensor]:
            return unit_rows(z0=z0, z1=z1), self._checked(index, z0)

        (first, second), own = check_equal_batches("z0", checked, lambda of: of[0][0])
        learns = self.training and torch.is_grad_enabled() and (first.requires_grad or second.requires_grad)
        first, second, own = _of_all(first), _of_all(second), gather_constants(own)
        with full_precision(first):
            loss, state = self._step(torch.cat([first, second]), own)
        if learns:
            with torch.no_grad():
                for buffer, new in zip((self.tau, self.log_s, self.u), state, strict=True):
                    buffer[own] = new.to(buffer.dtype)
        # Each process has the gradient of its own rows, which DistributedDataParallel divides by their number.
        return loss if processes() == 1 else loss.detach() + processes() * (loss - loss.detach())

    def _step(self, views: Tensor, index: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Returns the loss of the views [2n, d], and the new tau, log S and u of the samples, each [n]."""
        n, dtype = len(index), views.dtype
        tau, old, u = (buffer[index].to(dtype) for buffer in (self.tau, self.log_s, self.u))
        same = index[:, None] == index[None]
        negative = ~same.repeat(2, 2)
        count = negative.sum(dim=1)
        some, count = count > 0, count.clamp(min=1).to(dtype)
        cosines = views @ views.T
        with torch.no_grad():
            logits = cosines / tau.repeat(2)[:, None]
            log_g = logits.masked_fill(~negative, -math.inf).logsumexp(dim=1) - count.log()
            log_s = torch.logaddexp(old.repeat(2) + _log(1 - self.gamma), log_g + math.log(self.gamma))
            log_s = torch.where(old.repeat(2) == -math.inf, log_g, log_s)
            log_s = torch.where(some, log_s, 0)
            weights = torch.where(negative, (logits - log_s[:, None]).exp(), 0) / count[:, None]
            slopes = log_s + self.rho - (weights * logits).sum(dim=1)
            slope = slopes.view(2, n).mean(dim=0).clamp(-self.grad_clip, self.grad_clip)
            u_new = (1 - self.beta_u) * u + self.beta_u * slope
            tau_new = (tau - self.eta * u_new).clamp(self.tau_min, self.tau_max)
            log_s_new = torch.logaddexp(*log_s.view(2, n)) - math.log(2)
            shares = same / same.sum(dim=1, keepdim=True)  # of samples that are in the batch more than once
            news = [(shares * new).sum(dim=1) for new in (tau_new, log_s_new, u_new)]
            kept = some[:n] & (news[0] + news[1] + news[2]).isfinite()
            state = [torch.where(kept, new, before) for new, before in zip(news, (tau, old, u), strict=True)]
        positive = (views[:n] * views[n:]).sum(dim=1).repeat(2)
        losses = torch.where(some, (weights * cosines).sum(dim=1) - positive, 0)
        return losses.sum() / n, (state[0], state[1], state[2])

    def _checked(self, index: Tensor | None, rows: Tensor) -> Tensor:
        """Returns the index as int64."""
        expected = f"index: expected the place of each sample in the data set, integers of shape [{len(rows)}], got"
        if index is None:
            raise ValueError(
                f"{expected} None; ISogCLR learns a temperature for each sample, so the data set has to give its index "
                "with each sample, such as in the place of the label"
            )
        if not isinstance(index, Tensor) or index.shape != rows.shape[:1] or index.dtype not in INTEGERS:
            came = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise ValueError(f"{expected} {came}")
        if not index.device == rows.device == self.tau.device:
            raise ValueError(
                f"index: expected index, embeddings and loss on one device, got {index.device}, {rows.device} and "
                f"{self.tau.device}"
            )
        if values_are_free(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self.tau):
            raise ValueError(
                f"index: expected numbers from 0 to {len(self.tau) - 1}, for size={len(self.tau)}, got "
                f"{int(index.min())} to {int(index.max())}"
            )
        return index.long()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the state like any other buffer, but keeps it out of half precision, which would lose small steps."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            kept = before[name]
            if buffer is not None and kept is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = kept.to(buffer.device)
        return self


def _share(name: str, value: float) -> float:
    if check_number(name, value, above=0) > 1:
        raise ValueError(f"{name}: expected a number above 0 and at most 1, got {value!r}")
    return float(value)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _of_all(rows: Tensor) -> Tensor:
    """Returns the rows of all processes [processes * n, d]. This process's own rows have their gradient."""
    if processes() == 1:
        return rows
    parts = list(gather_constants(rows).chunk(processes()))
    parts[dist.get_rank()] = rows
    return torch.cat(parts)
