"""Slow, obvious versions of the methods, written from the papers' equations for comparison."""

import torch
from torch import Tensor


def wanda_removed(weight_OI: Tensor, inputs_TI: Tensor, sparsity: float) -> Tensor:
    """Row by row: the floor(I * s) smallest |W_ij| * ||X_j||, ties to the lowest column. True = removed."""
    norm_I = inputs_TI.double().square().sum(0).sqrt()
    removed = torch.zeros_like(weight_OI, dtype=torch.bool)
    for row in range(len(weight_OI)):
        score_I = weight_OI[row].abs().double() * norm_I
        order = torch.sort(score_I, stable=True).indices
        removed[row, order[: int(weight_OI.shape[1] * sparsity + 1e-9)]] = True
    return removed


def wanda_removed_nm(weight_OI: Tensor, inputs_TI: Tensor, n: int, m: int) -> Tensor:
    """Group by group: all but the n highest scores of each m neighbours. True = removed."""
    score_OI = weight_OI.abs().double() * inputs_TI.double().square().sum(0).sqrt()
    removed = torch.zeros_like(weight_OI, dtype=torch.bool)
    for row in range(score_OI.shape[0]):
        for start in range(0, score_OI.shape[1], m):
            order = torch.sort(score_OI[row, start : start + m], stable=True).indices
            removed[row, start + order[: m - n]] = True
    return removed


def sparsegpt(
    weight_OI: Tensor,
    inputs_TI: Tensor,
    *,
    sparsity: float = 0.5,
    nm: tuple[int, int] | None = None,
    extra: int = 0,
    columns: int = 128,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1, one column and one block at a time, in float64 through an explicit inverse.

    `extra` weights go per block beyond the exact count; the published code's inclusive threshold has extra=1.

    Returns:
        New weights float64 [O, I] and the removed mask.
    """
    weight_OI = weight_OI.double().clone()
    inputs = weight_OI.shape[1]
    hessian_II = 2 * inputs_TI.double().T @ inputs_TI.double()
    hessian_II += damping * hessian_II.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    upper_II = torch.linalg.cholesky(torch.linalg.inv(hessian_II), upper=True)
    removed = torch.zeros_like(weight_OI, dtype=torch.bool)
    for start in range(0, inputs, columns):
        stop = min(start + columns, inputs)
        if nm is None:
            score = (weight_OI[:, start:stop] / upper_II.diagonal()[start:stop]) ** 2
            count = int(score.numel() * sparsity + 1e-9) + extra
            flat = torch.sort(score.flatten(), stable=True).indices[:count]
            block = torch.zeros(score.numel(), dtype=torch.bool)
            block[flat] = True
            removed[:, start:stop] = block.view(score.shape)
        for i in range(start, stop):
            if nm is not None and (i - start) % nm[1] == 0:
                score = (weight_OI[:, i : i + nm[1]] / upper_II.diagonal()[i : i + nm[1]]) ** 2
                order = torch.sort(score, dim=1, stable=True).indices[:, : nm[1] - nm[0]]
                removed[:, i : i + nm[1]].scatter_(1, order, True)
            error_O = torch.where(removed[:, i], weight_OI[:, i], 0.0) / upper_II[i, i]
            weight_OI[:, i:] -= error_O[:, None] * upper_II[i, i:]
        weight_OI[removed] = 0.0
    return weight_OI, removed
