"""Negatives weighted as the support vectors of an SVM, one for each anchor (Shah et al. 2022)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from undimix_plugins.checks import check_choice, check_number, check_strength, check_whole
from undimix_plugins.rows import full_precision, unit_rows

STEPS_BETWEEN_LOOKS = 10  # at whether all anchors have stopped, for which a device waits for the host


class MMCL(nn.Module):
    """Max-margin contrastive learning: a loss without a softmax, whose negatives are an SVM's support vectors.

    With x_i and x'_i the views of sample i at length 1 and `k(x, y) = exp(-|x - y|^2 / sigma)`, an SVM separates x_i
    from the n - 1 other x_j. The multiplier of x_i is the sum of the others', which leaves the dual

        a_i = argmin over 0 <= a <= C of  a' D_i a / 2 - 2 * 1'a,
        D_i = [1 + k(x_j, x_l) - k(x_i, x_j) - k(x_i, x_l) + reg * (j = l)]  for j, l other than i,

    and the loss is minus the mean margin by which each SVM has its sample's second view on the right side,

        loss = mean over i of ( sum over j of a_ij k(x_j, x'_i)  -  (sum over j of a_ij) k(x_i, x'_i) ).

    The duals are constants, and first views alone make them, as in the authors' code: swap the arguments and average
    for a symmetric loss. Each process compares its own batch.

    `solver="pgd"` is projected gradient descent with Nesterov's momentum, towards the optimum; an anchor stops where
    the mean relative change of its duals is below `stop_condition`, twice in a row. The authors draw what the duals
    and the momentum start from, and stop all anchors together, at once; here they start from 0 and 1, so that a result
    can be repeated, and an anchor stops by itself. `solver="inverse"` solves `D_i a = 2` and clips the solution to
    [0, C]: the optimum where nothing is clipped, else an approximation.

    All D_i differ from one kernel matrix by a row, a column and a term of rank 2. None is formed: it takes memory for
    n * n numbers, not n * n * n, and a product of n x n matrices for each step, or one inverse.

    Args:
        sigma: The kernel's width, a finite number above 0.
        C: The duals' upper bound, a number above 0; `math.inf` for none (the authors' -1).
        reg: What is added to the diagonal, a finite number above 0.
        solver: "pgd" or "inverse".
        num_iters: Most steps of "pgd", at least 1.
        eta: Length of its steps: None for `1 / |D_i|` (Frobenius), the authors' `use_norm`, which is never too long; or
            a finite number above 0, below 2 over the largest eigenvalue of D_i, which grows with n. The authors'
            1e-3 changes so little in a step that `stop_condition` is met before the optimum is near.
        stop_condition: Where it stops, a finite number of at least 0.

    Raises:
        ValueError: For settings out of their ranges.

    References:
        Shah, Sra, Chellappa, Cherian: Max-Margin Contrastive Learning, AAAI 2022, arXiv 2112.11450. The defaults are
        those of the authors' losses; they train on ImageNet with `sigma=10` and no upper bound.

    Examples:
        >>> criterion = MMCL(sigma=1.0, solver="inverse")
        >>> loss = criterion(torch.randn(8, 4), torch.randn(8, 4))
        >>> loss.dim()
        0
    """

    citation: ClassVar[str] = """
@inproceedings{shah2022max,
    title={Max-Margin Contrastive Learning},
    author={Anshul Shah and Suvrit Sra and Rama Chellappa and Anoop Cherian},
    booktitle={AAAI Conference on Artificial Intelligence},
    year={2022},
    url={https://arxiv.org/abs/2112.11450},
}
"""

    def __init__(
        self,
        sigma: float = 0.07,
        C: float = 1.0,
        reg: float = 0.1,
        solver: str = "pgd",
        num_iters: int = 1000,
        eta: float | None = None,
        stop_condition: float = 1e-2,
    ) -> None:
        super().__init__()
        self.sigma = check_strength("sigma", sigma, above=0)
        unbounded = isinstance(C, float) and math.isinf(C) and C > 0
        self.C = C if unbounded else check_strength("C", C, above=0)
        self.reg = check_strength("reg", reg, above=0)
        check_choice("solver", solver, ("pgd", "inverse"))
        self.solver = solver
        self.num_iters = check_whole("num_iters", num_iters, at_least=1)
        self.eta = None if eta is None else check_strength("eta", eta, above=0)
        self.stop_condition = check_number("stop_condition", stop_condition, at_least=0)

    def extra_repr(self) -> str:
        """The settings."""
        names = ("sigma", "C", "reg", "solver", "num_iters", "eta", "stop_condition")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss.

        Args:
            z1: First views [n, d], floating point, of any length.
            z2: Second views of the same samples [n, d], same dtype.

        Returns:
            A scalar, in the embeddings' dtype (float32 for half precision); 0 for one sample, which has no negatives.

        Raises:
            ValueError: For shapes, dtypes or devices that do not fit, or (on the CPU) non-finite rows.
        """
        first, second = unit_rows(z1=z1, z2=z2)
        duals = self.duals(z1)
        with full_precision(first):
            across = self._kernel(first @ second.T)  # [j, i]: of x_j and x'_i
        return ((duals.T * across).sum() - (duals.sum(dim=1) * across.diagonal()).sum()) / len(first)

    @torch.no_grad()
    def duals(self, z: Tensor) -> Tensor:
        """Every anchor's weights of the others: an SVM in each row.

        Args:
            z: Embeddings [n, d], floating point, of any length.

        Returns:
            [n, n], from 0 to C, constants; 0 on the diagonal.

        Raises:
            ValueError: As calling it does.

        Examples:
            >>> MMCL(sigma=1.0).duals(torch.eye(3)).count_nonzero(dim=1)
            tensor([2, 2, 2])
        """
        (rows,) = unit_rows(z=z)
        with full_precision(rows):
            kernel = self._kernel(rows @ rows.T).fill_diagonal_(1)
            return self._clipped_inverse(kernel) if self.solver == "inverse" else self._descent(kernel)

    def _kernel(self, cosines: Tensor) -> Tensor:
        return ((2 * cosines - 2) / self.sigma).exp()

    def _project(self, duals: Tensor) -> Tensor:
        return duals.clamp(min=0, max=self.C).fill_diagonal_(0)

    def _descent(self, kernel: Tensor) -> Tensor:
        eta: float | Tensor = 1 / self._norms(kernel) if self.eta is None else self.eta
        duals = torch.zeros_like(kernel)
        ahead, momentum = duals, 1.0
        still = stopped = torch.zeros_like(kernel[:, :1], dtype=torch.bool)
        for step in range(1, self.num_iters + 1):
            new = self._project(ahead - eta * self._gradient(ahead, kernel))
            following = (math.sqrt(momentum**4 + 4 * momentum**2) - momentum**2) / 2
            beta = momentum * (1 - momentum) / (momentum**2 + following)
            momentum = following
            ahead = new + beta * (new - duals)
            changes = ((new - duals) / (duals + 1e-7)).abs().sum(dim=1, keepdim=True) / max(1, len(kernel) - 1)
            duals = torch.where(stopped, duals, new)
            # Twice in a row: momentum alone can hold all of an anchor's duals at their bounds for a step.
            before, still = still, changes < self.stop_condition
            stopped = stopped | (still & before)
            if step % STEPS_BETWEEN_LOOKS == 0 and bool(stopped.all()):
                break
        return duals

    def _gradient(self, duals: Tensor, kernel: Tensor) -> Tensor:
        """`D_i a_i - 2` in row i, but for its diagonal, which means nothing."""
        products = duals @ kernel
        total = duals.sum(dim=1, keepdim=True)
        return products + total * (1 - kernel) - products.diagonal()[:, None] + self.reg * duals - 2

    def _norms(self, kernel: Tensor) -> Tensor:
        """The Frobenius norms of all D_i [n, 1]: D_i is B, which all share, plus w_j + w_l, without what is i's."""
        b = kernel + self.reg * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
        w = (0.5 - kernel).fill_diagonal_(0)
        others = len(kernel) - 1
        of_b = b.square().sum() - 2 * b.square().sum(dim=1) + b.diagonal().square()
        of_both = (w * (b.sum(dim=1) - b)).sum(dim=1)
        square = of_b + 2 * others * w.square().sum(dim=1) + 2 * w.sum(dim=1).square() + 4 * of_both
        return square.clamp(min=self.reg**2).sqrt()[:, None]

    def _clipped_inverse(self, kernel: Tensor) -> Tensor:
        """With P the inverse of the kernel plus reg, that of its part without i is `P - P_i P_i' / P_ii`, and so on."""
        n = len(kernel)
        eye = torch.eye(n, dtype=kernel.dtype, device=kernel.device)
        factor = torch.linalg.cholesky_ex(kernel + self.reg * eye).L
        inverse = torch.cholesky_inverse(factor)
        sums = torch.cholesky_solve(kernel.new_ones(n, 1), factor)[:, 0]  # of the inverse's rows
        own = inverse.diagonal()[:, None]
        # Without i: the inverse times a column of ones, and times i's own column of the kernel.
        ones = sums - inverse * (sums[:, None] / own)
        column = -inverse / own
        total = (sums.sum() - sums.square() / own[:, 0])[:, None]
        ratio = sums[:, None] / own
        scale = 2 / (ratio.square() + total * (1 / own - self.reg))
        return self._project(scale * (ratio * ones + total * column))
