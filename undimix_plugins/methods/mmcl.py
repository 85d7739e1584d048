"""Weights negatives by the dual variables of an SVM for each anchor (Shah et al. 2022)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from undimix_plugins.checks import check_choice, check_number, check_strength, check_whole
from undimix_plugins.rows import full_precision, unit_rows

STEPS_BETWEEN_LOOKS = 10  # between checks whether all anchors have stopped, for which the host waits for a device


class MMCL(nn.Module):
    """Max-margin contrastive learning (MMCL): a loss without a softmax. An SVM for each anchor weights the negatives.

    x_i and x'_i are the views of sample i, normalised to length 1, and `k(x, y) = exp(-|x - y|^2 / sigma)` is the
    kernel. An SVM separates x_i from the other n - 1 views x_j. The multiplier of x_i is the sum of the others. The
    dual problem is then

        a_i = argmin over 0 <= a <= C of  a' D_i a / 2 - 2 * 1'a,
        D_i = [1 + k(x_j, x_l) - k(x_i, x_j) - k(x_i, x_l) + reg * (j = l)]  for j, l other than i

    The loss is minus the mean margin by which each SVM classifies the second view of its own sample:

        loss = mean over i of ( sum over j of a_ij k(x_j, x'_i)  -  (sum over j of a_ij) k(x_i, x'_i) )

    As in the authors' code, the dual variables have no gradient and depend on the first views only. For a symmetric
    loss, swap the arguments and average. Each process compares its own batch.

    `solver="pgd"` is projected gradient descent with Nesterov momentum, which converges to the optimum. An anchor stops
    when the mean relative change of its dual variables is below `stop_condition` twice in a row. The authors start from
    random dual variables and momentum, and stop all anchors at the same step, the first time the condition holds. Here
    the dual variables start from 0 and the momentum from 1, so that results are reproducible, and each anchor stops on
    its own. `solver="inverse"` solves `D_i a = 2` and clips the solution to [0, C]. This is the optimum if nothing is
    clipped, otherwise an approximation.

    Each D_i differs from the kernel matrix by a row, a column and a term of rank 2, and is never formed. So the loss
    takes memory for n * n numbers instead of n * n * n, and a product of n x n matrices for each step, or a single
    inverse.

    Args:
        sigma: The width of the kernel, above 0 and at most 1e30.
        C: The upper bound of the dual variables, above 0 and at most 1e30. `math.inf` for no bound (the authors' -1).
        reg: The number that is added to the diagonal, above 0 and at most 1e30.
        solver: "pgd" or "inverse".
        num_iters: The maximum number of steps of "pgd", at least 1.
        eta: The step size of "pgd". None for `1 / |D_i|` (Frobenius norm), the authors' `use_norm`, which is never too
            large. Otherwise a number above 0 and below 2 divided by the largest eigenvalue of D_i, which grows with n.
            With the authors' 1e-3, the changes are so small that `stop_condition` holds far from the optimum.
        stop_condition: The relative change below which "pgd" stops, a finite number of at least 0.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Shah, Sra, Chellappa, Cherian: Max-Margin Contrastive Learning, AAAI 2022, arXiv 2112.11450. The defaults are
        those of the authors' losses. On ImageNet, the authors train with `sigma=10` and no upper bound.

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
        """Returns the settings, as a printed module shows them."""
        names = ("sigma", "C", "reg", "solver", "num_iters", "eta", "stop_condition")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            z1: Embeddings of the first views [n, d], floating point. They are normalised to length 1.
            z2: Embeddings of the second views of the same samples [n, d], same dtype. They are normalised to length 1.

        Returns:
            A scalar, in the embeddings' dtype (float32 for half precision). 0 for a single sample, which has no
            negatives.

        Raises:
            ValueError: If shapes, dtypes or devices do not match, or (on the CPU) if a row is not finite.

        Examples:
            >>> criterion, z1, z2 = MMCL(sigma=1.0), torch.randn(8, 4), torch.randn(8, 4)
            >>> loss = (criterion(z1, z2) + criterion(z2, z1)) / 2  # symmetric
        """
        first, second = unit_rows(z1=z1, z2=z2)
        duals = self.duals(z1)
        with full_precision(first):
            across = self._kernel(first @ second.T)  # [j, i]: of x_j and x'_i
        return ((duals.T * across).sum() - (duals.sum(dim=1) * across.diagonal()).sum()) / len(first)

    @torch.no_grad()
    def duals(self, z: Tensor) -> Tensor:
        """Computes the dual variables of all SVMs: row i has the weights of the negatives of anchor i.

        Args:
            z: Embeddings of the first views [n, d], floating point. They are normalised to length 1.

        Returns:
            Dual variables [n, n], from 0 to C, 0 on the diagonal, without gradient.

        Raises:
            ValueError: As `forward` does.

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
            # Twice in a row: momentum can keep all dual variables of an anchor at their bounds for one step.
            before, still = still, changes < self.stop_condition
            stopped = stopped | (still & before)
            if step % STEPS_BETWEEN_LOOKS == 0 and bool(stopped.all()):
                break
        return duals

    def _gradient(self, duals: Tensor, kernel: Tensor) -> Tensor:
        """Returns `D_i a_i - 2` in row i. Ignore the diagonal."""
        products = duals @ kernel
        total = duals.sum(dim=1, keepdim=True)
        return products + total * (1 - kernel) - products.diagonal()[:, None] + self.reg * duals - 2

    def _norms(self, kernel: Tensor) -> Tensor:
        """Returns the Frobenius norms of all D_i [n, 1]: a common B, plus w_j + w_l, without row and column i."""
        b = kernel + self.reg * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
        w = (0.5 - kernel).fill_diagonal_(0)
        others = len(kernel) - 1
        of_b = b.square().sum() - 2 * b.square().sum(dim=1) + b.diagonal().square()
        of_both = (w * (b.sum(dim=1) - b)).sum(dim=1)
        square = of_b + 2 * others * w.square().sum(dim=1) + 2 * w.sum(dim=1).square() + 4 * of_both
        return square.clamp(min=self.reg**2).sqrt()[:, None]

    def _clipped_inverse(self, kernel: Tensor) -> Tensor:
        """Solves `D_i a = 2` for all i and clips the solutions.

        With P the inverse of the kernel plus reg, the inverse without row and column i is `P - P_i P_i' / P_ii`.
        """
        n = len(kernel)
        eye = torch.eye(n, dtype=kernel.dtype, device=kernel.device)
        factor = torch.linalg.cholesky_ex(kernel + self.reg * eye).L
        inverse = torch.cholesky_inverse(factor)
        sums = torch.cholesky_solve(kernel.new_ones(n, 1), factor)[:, 0]  # of the inverse's rows
        own = inverse.diagonal()[:, None]
        # Without row and column i: the inverse times a column of ones, and times column i of the kernel.
        ones = sums - inverse * (sums[:, None] / own)
        column = -inverse / own
        total = (sums.sum() - sums.square() / own[:, 0])[:, None]
        ratio = sums[:, None] / own
        scale = 2 / (ratio.square() + total * (1 / own - self.reg))
        return self._project(scale * (ratio * ones + total * column))
