"""Which groups of a linear's inputs go, and what the weights of the others become: Optimal Brain Surgeon, block by block.

The local pruner of Týr-the-Pruner (arXiv 2503.09657, section 3.1 and Algorithm 1). With W the matrix as [I, O], X its inputs,
H = X^T X + lambda and G = H W (lambda: a share of the mean of the diagonal), removing the inputs R and making up for them as
well as the rest can costs 1/2 tr(W_R^T (Hinv_RR)^-1 W_R). Of all units (an FFN channel is one input of down_proj, a head
`head_dim` inputs of o_proj) those with the least score go,

    S_R = 1/2 tr(W_R^T (Hinv_RR)^-1 W_R) + sum |G_R o W_R|                                                              (1)

and the others are brought up to date:

    W    <- W    - Hinv_:R (Hinv_RR)^-1 W_R
    Hinv <- Hinv - Hinv_:R (Hinv_RR)^-1 Hinv_R:                                                                         (2)

The weights on the kept inputs K are then the minimiser of the damped error tr((W - V)^T H (W - V)) over all V supported on K,

    V_K = (H_KK)^-1 G_K = W_K + (H_KK)^-1 H_KR W_R                                                                      (3)

which `restricted` solves directly, with one Cholesky factor for all rows since all share one support (where every row has a
mask of its own, `reconstruction.least_squares` is for that). So rounding on the path can change a choice, never the weights.

Where this parts from the paper and its code (github.com/AMD-AGI/Tyr-the-Pruner): greedy elimination is sequential, so one path
from the least to the most sparse level yields all levels, nested; the first-order term of (1) is the paper's absolute value
(the code's is signed, `first_order="signed"`), and may be left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import LLMPruneError

FirstOrder = Literal["abs", "off", "signed"]

# Columns of downdates gathered before the inverse is touched: one product of rank 256 reads it once instead of sixteen times.
PENDING = 256


@dataclass(frozen=True)
class Level:
    """One stop of the path.

    `removed` is the target as it was given; `keep_U` the kept units, ascending, int64; `weight_OK` the weights of their inputs
    in the same order, float32.
    """

    removed: int
    keep_U: Tensor
    weight_OK: Tensor


def path(
    weight_OI: Tensor,
    hessian_II: Tensor,
    targets: Sequence[int],
    *,
    group: int = 1,
    balance: int = 1,
    step: int = 1,
    first_order: FirstOrder = "abs",
    damping: float = 0.01,
) -> Iterator[Level]:
    """Eliminate units greedily and stop at every target.

    Needs memory for about four Hessians and four matrices in float64: 8 GB for 14,336 channels and 4,096 outputs.

    Args:
        weight_OI: float32.
        hessian_II: X^T X of the inputs, times any positive number.
        targets: how many units are to be gone at each stop, ascending, within 0 and all.
        group: consecutive inputs that form a unit: 1 for channels, head_dim for heads, r * head_dim for whole KV groups.
        balance: units are cut into so many consecutive runs of equal length and each run loses as many, its own worst; targets
            and steps count units of one run. 1: all compete. With the number of KV groups here and heads as units, every KV
            group keeps equally many query heads.
        step: units (of each run) that go between two looks at the scores. The paper: 1 head, 16 channels.
        first_order: the second term of (1).
        damping: lambda as a share of the mean of the diagonal.

    Yields:
        A `Level` for every target. None removed: the matrix as it is. Units whose inputs were always zero, or that have no
        weights, go first (but with "signed", whose scores may be negative).

    Raises:
        LLMPruneError: the damped Hessian is not positive definite.
    """
    alive = weight_OI.shape[1] // group // balance
    assert list(targets) == sorted(targets), targets
    assert all(0 <= target <= alive for target in targets), targets
    ridge_II = ridge(hessian_II, damping)
    # What was always zero does nothing: without its weights such a unit scores 0.
    useful_OI = weight_OI.masked_fill(hessian_II.diagonal() == 0, 0.0)
    elimination: Elimination | None = None
    removed = 0
    for target in targets:
        keep_U = torch.arange(alive * balance, device=weight_OI.device)
        if target == alive:
            keep_U = keep_U[:0]
        elif target:
            # At either end there is nothing to choose, and no inverse to compute.
            elimination = elimination or Elimination(useful_OI, ridge_II, group, first_order, damping)
            for count in _strides(target - removed, step):
                elimination.remove(_worst(elimination.score_U(), balance, count))
            removed = target
            keep_U = keep_U[elimination.alive_U]
        yield Level(target, keep_U, _restricted(weight_OI, ridge_II, _inputs(keep_U, group), damping))


def restricted(weight_OI: Tensor, hessian_II: Tensor, keep_K: Tensor, damping: float) -> Tensor:
    """The weights on the inputs `keep_K` that make up best for the loss of all others, equation (3).

    Args:
        weight_OI: float32.
        hessian_II: X^T X of the inputs, times any positive number.
        keep_K: int64, distinct, in the order wanted.
        damping: lambda as a share of the mean of the diagonal: the larger, the closer the weights stay to what they were.

    Returns:
        Float32 [O, K].

    Raises:
        LLMPruneError: the damped Hessian is not positive definite.
    """
    return _restricted(weight_OI, ridge(hessian_II, damping), keep_K, damping)


def ridge(hessian_II: Tensor, damping: float) -> Tensor:
    """H + damping mean(diag H), float64 [I, I].

    An input that was zero throughout gets a positive diagonal whatever the damping: it is alone with it, so that its weight
    stays what it was as long as it is kept, and costs nothing to remove.
    """
    ridge_II = hessian_II.double().clone()
    diagonal_I = ridge_II.diagonal()
    mean = diagonal_I.mean()
    dead_I = diagonal_I == 0
    diagonal_I += damping * mean
    diagonal_I[dead_I] = torch.where(mean > 0, mean, 1.0)
    return ridge_II


class Elimination:
    """The state of a path in float64: the current weights and the inverse of H over what is left.

    The inverse is `inverse_JJ` less `pending_JP` times its transpose: a downdate is a few columns, and only now and then
    are they multiplied out and the inputs that are gone left behind.
    """

    def __init__(self, weight_OI: Tensor, ridge_II: Tensor, group: int, first_order: FirstOrder, damping: float) -> None:
        """Start with nothing gone.

        Args:
            weight_OI: of any floating type; zero where the input was zero throughout.
            ridge_II: of `ridge`.
            group, first_order: as for `path`.
            damping: that of `ridge_II`, which the error names.
        """
        self.group, self.first_order, self.damping = group, first_order, damping
        units = weight_OI.shape[1] // group
        self.inverse_JJ = torch.cholesky_inverse(_factor(ridge_II, damping))
        self.weight_JO = weight_OI.T.double().contiguous()
        self.gradient_JO = None if first_order == "off" else ridge_II @ self.weight_JO
        self.pending_JP = self.inverse_JJ[:, :0]
        # The inverse's diagonal blocks, one per unit, are always up to date.
        rows_UG = torch.arange(units * group, device=weight_OI.device).view(units, group)
        self.block_VGG = self.inverse_JJ[rows_UG[:, :, None], rows_UG[:, None, :]]
        self.alive_U = torch.ones(units, dtype=torch.bool, device=weight_OI.device)
        # The unit that each `group` rows of the state are, and the reverse.
        self.unit_V = torch.arange(units, device=weight_OI.device)
        self.place_U = self.unit_V.clone()

    def score_U(self) -> Tensor:
        """Equation (1), or its first half, of every unit; infinite for those gone."""
        weight_VGO = self.weight_JO.unflatten(0, (-1, self.group))
        if self.group == 1:
            energy_V = weight_VGO.square().sum(dim=(1, 2)) / self.block_VGG[:, 0, 0]
        else:
            factor_VGG = _factor(self.block_VGG, self.damping)
            energy_V = torch.linalg.solve_triangular(factor_VGG, weight_VGO, upper=False).square().sum(dim=(1, 2))
        score_V = energy_V / 2
        if self.gradient_JO is not None:
            first_VGO = (self.gradient_JO * self.weight_JO).unflatten(0, (-1, self.group))
            score_V += (first_VGO.abs_() if self.first_order == "abs" else first_VGO).sum(dim=(1, 2))
        score_U = torch.full_like(self.alive_U, torch.inf, dtype=torch.float64)
        score_U[self.unit_V] = score_V
        return score_U.masked_fill_(~self.alive_U, torch.inf)

    def remove(self, units_S: Tensor) -> None:
        """Take units out and make up for them with the others, equation (2)."""
        if self.pending_JP.shape[1] >= PENDING:
            self._settle()
        rows_R = _inputs(self.place_U[units_S], self.group)
        column_JR = self.inverse_JJ[:, rows_R].addmm_(self.pending_JP, self.pending_JP[rows_R].T, alpha=-1)
        factor_RR = _factor(column_JR[rows_R], self.damping)
        # With Hinv_RR = L L^T, both updates are products with Hinv_:R L^-T.
        update_JR = torch.linalg.solve_triangular(factor_RR, column_JR.T, upper=False).T
        lost_RO = torch.linalg.solve_triangular(factor_RR, self.weight_JO[rows_R], upper=False)
        self.weight_JO.addmm_(update_JR, lost_RO, alpha=-1)
        self.pending_JP = torch.cat((self.pending_JP, update_JR), dim=1)
        update_VGR = update_JR.unflatten(0, (-1, self.group))
        self.block_VGG -= update_VGR @ update_VGR.mT
        self.alive_U[units_S] = False
        # What is gone is zero but for rounding; its blocks are read no more but must have a factor.
        gone_V = ~self.alive_U[self.unit_V]
        self.weight_JO.unflatten(0, (-1, self.group))[gone_V] = 0
        self.block_VGG[gone_V] = torch.eye(self.group, dtype=torch.float64, device=gone_V.device)

    def _settle(self) -> None:
        """Multiply the pending downdates out; leave what is gone behind once it is half."""
        stays_V = self.alive_U[self.unit_V]
        if 2 * int(stays_V.sum()) <= len(stays_V):
            rows_R = _inputs(stays_V.nonzero().squeeze(1), self.group)
            self.inverse_JJ = self.inverse_JJ[rows_R][:, rows_R]
            self.pending_JP, self.weight_JO = self.pending_JP[rows_R], self.weight_JO[rows_R]
            self.gradient_JO = None if self.gradient_JO is None else self.gradient_JO[rows_R]
            self.block_VGG, self.unit_V = self.block_VGG[stays_V], self.unit_V[stays_V]
            self.place_U[self.unit_V] = torch.arange(len(self.unit_V), device=rows_R.device)
        self.inverse_JJ.addmm_(self.pending_JP, self.pending_JP.T, alpha=-1)
        self.pending_JP = self.pending_JP[:, :0]


def _restricted(weight_OI: Tensor, ridge_II: Tensor, keep_K: Tensor, damping: float) -> Tensor:
    """`restricted` with H of `ridge`."""
    kept_OK = weight_OI[:, keep_K].float()
    gone_I = torch.ones(weight_OI.shape[1], dtype=torch.bool, device=weight_OI.device)
    gone_I[keep_K] = False
    if not gone_I.any() or not len(keep_K):
        return kept_OK
    gone_R = gone_I.nonzero().squeeze(1)
    factor_KK = _factor(ridge_II[keep_K[:, None], keep_K], damping)
    pull_KO = ridge_II[keep_K[:, None], gone_R] @ weight_OI[:, gone_R].T.double()
    return kept_OK.double().add_(torch.cholesky_solve(pull_KO, factor_KK).T).float()


def _factor(hessian_II: Tensor, damping: float) -> Tensor:
    factor_II, failed = torch.linalg.cholesky_ex(hessian_II)
    if failed.any():
        raise LLMPruneError(
            f"The Hessian of a linear's inputs is not positive definite with --damping {damping:g}: give a larger one, or "
            "calibrate on more samples or another text."
        )
    return factor_II


def _inputs(unit_S: Tensor, group: int) -> Tensor:
    """The inputs of units, in the units' order."""
    return (unit_S[:, None] * group + torch.arange(group, device=unit_S.device)).flatten()


def _strides(distance: int, step: int) -> list[int]:
    """Steps that add up to `distance`, the last one shorter where it must be."""
    return [min(step, distance - start) for start in range(0, distance, step)]


def _worst(score_U: Tensor, balance: int, count: int) -> Tensor:
    """The `count` units with the least scores of every run; ties go to the lowest index."""
    score_BS = score_U.view(balance, -1)
    order_BC = score_BS.argsort(dim=1, stable=True)[:, :count]
    return (order_BC + torch.arange(balance, device=order_BC.device)[:, None] * score_BS.shape[1]).flatten()
