"""One matrix in iCBS: its mask, which of its weights a step looks at, and the swaps that are proposed for these.

Indices of weights are flat, into [O, I], however the matrix is stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from . import quadratic
from .curvature import Probe
from .models import Linear
from .options import IcbsOptions

# Candidates on each side of a row, where weights are swapped within rows.
ROW_CANDIDATES = 8


@dataclass(eq=False)
class Matrix:
    """A linear's mask and what the search remembers of it. Indices are flat, into [O, I].

    Args:
        cell: how many neighbours swap with each other: a row, M of N:M, or None for the whole matrix.
        stamp_OI: the step that last looked at a weight.
        free_OI: which weights may change; all if None.
        block_N: what the next step looks at, once that is chosen.
    """

    linear: Linear
    keep_OI: Tensor
    cell: int | None
    gamma: float
    free_OI: Tensor | None = None
    stamp_OI: Tensor = field(init=False)
    block_N: Tensor | None = None
    dense_OI: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.stamp_OI = torch.zeros(self.linear.shape, dtype=torch.int16, device=self.keep_OI.device)

    @property
    def fixed(self) -> bool:
        """Whether no weight may change."""
        return self.free_OI is not None and not bool(self.free_OI.any())

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Keep the dense weights and let the module run with the pruned ones."""
        linear = self.linear
        assert linear.stored is not None
        linear.module.__dict__.pop("forward", None)  # which widens weights while they run, and autograd needs them later
        dense = linear.stored.to(device)
        self.dense_OI = dense.T if linear.transposed else dense
        keep = self.keep_OI.T if linear.transposed else self.keep_OI
        linear.module._parameters["weight"] = nn.Parameter((dense * keep).to(dtype), requires_grad=False)

    def toggle(self, index_N: Tensor) -> None:
        """Prune what is kept and revive what is pruned."""
        weight = self.linear.parameter.data
        weight_OI = weight.T if self.linear.transposed else weight
        at = (index_N // weight_OI.shape[1], index_N % weight_OI.shape[1])
        self.keep_OI[at] ^= True
        weight_OI[at] = (self.dense_OI[at] * self.keep_OI[at]).to(weight.dtype)

    def choose(self, cost_OI: Tensor, size: int, tabu: float) -> Tensor:
        """About `size` of the weights whose change costs least, as many pruned as kept ones, in the same cells.

        Args:
            cost_OI: of changing a weight.
            size: how many.
            tabu: share of each side, the latest looked at, that is left alone.
        """
        groups = 1 if self.cell is None else cost_OI.numel() // self.cell
        count = min(size // 2 if groups == 1 else ROW_CANDIDATES, cost_OI.numel() // groups)
        if self.cell is not None and self.cell < self.linear.shape[1]:
            count = 1
        start_G1 = torch.arange(groups, device=cost_OI.device)[:, None] * (cost_OI.numel() // groups)
        costs, indices = [], []
        for side_OI in (~self.keep_OI, self.keep_OI):
            able_OI = side_OI if self.free_OI is None else side_OI & self.free_OI
            able_OI = able_OI & (self.stamp_OI < self._recent(able_OI, tabu))
            cost_GS = cost_OI.masked_fill(~able_OI, torch.inf).view(groups, -1)
            cost_GC, column_GC = cost_GS.topk(count, dim=1, largest=False)
            costs.append(cost_GC)
            indices.append(start_G1 + column_GC)
        best_G = (costs[0][:, 0] + costs[1][:, 0]).topk(min(max(size // (2 * count), 1), groups), largest=False).indices
        chosen = [index_GC[best_G][cost_GC[best_G].isfinite()] for cost_GC, index_GC in zip(costs, indices, strict=True)]
        return torch.cat(chosen)

    def _recent(self, able_OI: Tensor, tabu: float) -> int:
        """The first stamp of those that are left alone."""
        count_S = torch.bincount(self.stamp_OI[able_OI].int())
        later_S = count_S.flip(0).cumsum(0).flip(0)
        # Stamp 0 was never looked at.
        return max(int((later_S > tabu * later_S[:1]).sum()), 1)


@dataclass(frozen=True, eq=False)
class Swaps:
    """What a step proposes for a block of one linear, and the model it comes from. Pairs are positions in the block."""

    matrix: Matrix
    index_N: Tensor
    move_N: Tensor
    gradient_N: Tensor
    factor_BN: Tensor
    revive_P: Tensor
    drop_P: Tensor
    cost_P: Tensor

    def part(self, taken_P: Tensor) -> Tensor:
        """Positions in the block that some of the swaps toggle."""
        return torch.cat([self.revive_P[taken_P], self.drop_P[taken_P]])

    def change(self, taken_P: Tensor) -> float:
        """What those swaps change the loss by, to second order and undamped."""
        toggled = self.part(taken_P)
        move = self.move_N[toggled]
        return float(self.gradient_N[toggled] @ move + (self.factor_BN[:, toggled] @ move).square().mean() / 2)


def propose(matrix: Matrix, probe: Probe, options: IcbsOptions, seed: int) -> Swaps:
    """Solve a matrix's block."""
    index_N = probe.block_N
    assert index_N is not None
    at = (index_N // matrix.linear.shape[1], index_N % matrix.linear.shape[1])
    weight_N, pruned_N = matrix.dense_OI[at].float(), ~matrix.keep_OI[at]
    gradient_N, factor_BN = probe.gradient_OI[at] / probe.sequences, probe.factor_BN
    group_N = None if matrix.cell is None else index_N // matrix.cell
    hessian_NN = quadratic.fisher(factor_BN)
    h_N, c_NN = quadratic.flip(weight_N, pruned_N, gradient_N, hessian_NN, matrix.gamma, options.ridge)
    # A gradient's standard error. Thousands of candidates hold many whose noise alone looks like a gain.
    error_N = (hessian_NN.diagonal() / probe.samples).sqrt()
    h_N += options.margin * matrix.gamma * error_N * weight_N.abs()
    toggle_N = quadratic.solve(h_N, c_NN, pruned_N, group_N=group_N, method=options.solver, seed=seed).toggle_N

    def ordered(position_P: Tensor) -> Tensor:
        position_P = position_P[h_N[position_P].argsort(stable=True)]
        # As many are toggled on both sides of every cell, so equal places make a swap.
        return position_P if group_N is None else position_P[group_N[position_P].argsort(stable=True)]

    revive_P, drop_P = (ordered((toggle_N & side_N).nonzero()[:, 0]) for side_N in (pruned_N, ~pruned_N))
    move_N = torch.where(pruned_N, weight_N, -weight_N)
    return Swaps(matrix, index_N, move_N, gradient_N, factor_BN, revive_P, drop_P, h_N[revive_P] + h_N[drop_P])


def packed(keep_OI: Tensor) -> Tensor:
    """A bool tensor in eight times less memory."""
    return torch.from_numpy(np.packbits(keep_OI.cpu().numpy()))


def unpacked(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape[0] * shape[1])).bool().view(shape)
