"""What may be zero: which weights of a matrix compete with each other for removal.

A *keep* mask is True where a weight stays. Every pattern removes an exact count per comparison group;
equal scores are resolved by index, the lowest index going first, which is what a stable ascending sort
does and what makes a mask a pure function of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from .recipe import Group

# Scores ranked at a time: few enough that the copies a ranking needs are small beside the matrix, and stay in the cache.
CHUNK = 1 << 20


def removed_count(size: int, sparsity: float) -> int:
    """How many of `size` weights a sparsity removes: floor(size * sparsity), free of binary rounding.

    `int(100 * 0.29)` is 28 in floating point; reading the sparsity as the decimal the user wrote gives 29.
    """
    return int(size * Fraction(str(sparsity)))


def lowest(score_GN: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest scores of every row.

    Args:
        score_GN: float [groups, N], no NaN.
        count: how many to mark in each row, 0 <= count <= N.

    Returns:
        bool [groups, N] with exactly `count` True per row; among equal scores the lowest index is marked.
    """
    groups, size = score_GN.shape
    if count <= 0 or groups == 0:
        return torch.zeros_like(score_GN, dtype=torch.bool)
    if count >= size:
        return torch.ones_like(score_GN, dtype=torch.bool)
    marked_GN = torch.empty_like(score_GN, dtype=torch.bool)
    step = max(CHUNK // size, 1)
    for start in range(0, groups, step):
        marked_GN[start : start + step] = _lowest(score_GN[start : start + step], count)
    return marked_GN


def _lowest(score_GN: Tensor, count: int) -> Tensor:
    threshold_G1 = _kth_smallest(score_GN, count)
    marked_GN = score_GN <= threshold_G1
    # Only rows where several scores equal the threshold can hold too many: give back the highest indices.
    surplus_G = marked_GN.sum(dim=1) - count
    rows = surplus_G.nonzero().squeeze(1)
    if rows.numel():
        tied_RN = score_GN[rows] == threshold_G1[rows]
        wanted_R1 = tied_RN.sum(dim=1, keepdim=True) - surplus_G[rows, None]
        marked_GN[rows] &= ~(tied_RN & (tied_RN.cumsum(dim=1) > wanted_R1))
    return marked_GN


def _kth_smallest(score_GN: Tensor, k: int) -> Tensor:
    """The k-th smallest score (k from 1) of every row, [groups, 1]."""
    if score_GN.device.type == "cpu" and score_GN.dtype in (torch.float32, torch.float64):
        # numpy's introselect is about five times faster than torch.kthvalue or topk on CPU.
        import numpy as np

        return torch.from_numpy(np.partition(score_GN.numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return score_GN.kthvalue(k, dim=1, keepdim=True).values


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go; those of one row (or of the whole matrix) compete."""

    sparsity: float
    group: Group = "row"

    def keep(self, score_OI: Tensor) -> Tensor:
        """Keep mask: bool [O, I], exactly floor(size * sparsity) removed per row (or in the matrix)."""
        score_GN = score_OI if self.group == "row" else score_OI.reshape(1, -1)
        return ~lowest(score_GN, removed_count(score_GN.shape[1], self.sparsity)).view(score_OI.shape)

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """N:M: of every M weights that are neighbours along the input dimension, N are kept."""

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def keep(self, score_OI: Tensor) -> Tensor:
        """Keep mask: bool [O, I] with exactly N True in every aligned group of M. I must divide by M."""
        rows, columns = score_OI.shape
        assert columns % self.m == 0, f"{columns} columns do not divide into groups of {self.m}"
        return self.keep_lanes(score_OI.reshape(-1, self.m).T).T.reshape(rows, columns)

    def keep_lanes(self, score_MG: Tensor) -> Tensor:
        """Keep mask of groups laid out as columns: bool [M, groups]."""
        if self.m > 8:
            return ~lowest(score_MG.T.contiguous(), self.m - self.n).T
        return self._rank_lanes(score_MG) >= self.m - self.n

    def _rank_lanes(self, score_MG: Tensor) -> Tensor:
        """How many weights of its group go before each weight: int8 [M, groups].

        Comparing all pairs is branch-free and several times faster than sorting millions of tiny groups.
        """
        lanes = score_MG.unbind(0)
        rank_MG = torch.zeros_like(score_MG, dtype=torch.int8)
        for j in range(self.m):
            for i in range(j):
                later_first_G = lanes[j] < lanes[i]
                rank_MG[i] += later_first_G
                rank_MG[j] += ~later_first_G
        return rank_MG

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM
