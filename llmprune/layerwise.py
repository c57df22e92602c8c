"""The layer-wise half of iCBS: swap kept and removed weights of a row while that lowers its reconstruction error.

Removing the weights R of a row w changes its output on the inputs X by X_R w_R, so the row loses E = d H d^T with H = X^T X and
d the removed weights; where the row is to come close to another one, its target t, d = t - w with the kept weights in w. It is
the quadratic that iCBS (arXiv 2411.17796) takes of the loss, here of a layer's own and exact; the rows of a matrix share H and
are independent. With c = d H, removing weight j (s_j = +1) or putting it back (s_j = -1) changes E by

    f_j = 2 s_j w_j c_j + w_j^2 H_jj,        and both by        f_i + f_j - 2 w_i w_j H_ij

for a removed i and a kept j. Each round makes in every row the swap of the removed i with the least f and the kept j that goes
with it best (with N:M the best of all swaps within groups), until no such swap lowers the row's error. (SparseSwaps,
arXiv 2512.10922, is built on the same swaps.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .patterns import NM, Pattern

# Weights worked on at a time: few enough that their working copies stay in the cache.
CHUNK = 1 << 16
# Of a row's energy w^2 diag(H): a gain below it is rounding.
LEAST_GAIN = 1e-6


def swap(weight_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor, pattern: Pattern, target_OI: Tensor | None = None) -> Tensor:
    """Improve a mask by swaps within rows, or within the groups of N:M.

    Args:
        weight_OI: what a kept weight is, float32.
        keep_OI: the mask to start from, left as it is. Rows may differ in how many weights they keep.
        hessian_II: of the inputs, damped (`reconstruction.damped`): on few tokens the undamped error misleads.
        pattern: what the mask obeys.
        target_OI: what the rows are to come close to, where it is not `weight_OI`.

    Returns:
        A keep mask, bool [O, I], with as many weights in every row, or in every group of N:M, as `keep_OI`.
    """
    refined_OI = keep_OI.clone()
    rows = max(CHUNK // keep_OI.shape[1], 1)
    target_OI = weight_OI if target_OI is None else target_OI
    parts = (each.split(rows) for each in (weight_OI, refined_OI, target_OI))
    for weight_RI, keep_RI, target_RI in zip(*parts, strict=True):
        _swap(weight_RI, keep_RI, target_RI, hessian_II, pattern)
    return refined_OI


def _swap(weight_RI: Tensor, keep_RI: Tensor, target_RI: Tensor, hessian_II: Tensor, pattern: Pattern) -> None:
    """Change `keep_RI` in place."""
    cost_RI = weight_RI.square() * hessian_II.diagonal()
    pull_RI = (target_RI - weight_RI * keep_RI) @ hessian_II
    # 2 s w, and w^2 H_jj where a weight is on the side in question, infinite where not.
    sign_RI = torch.where(keep_RI, 2.0, -2.0) * weight_RI
    back_RI, drop_RI = cost_RI.masked_fill(keep_RI, torch.inf), cost_RI.masked_fill(~keep_RI, torch.inf)
    least_R = -LEAST_GAIN * cost_RI.sum(dim=1)
    row_R = torch.arange(len(keep_RI), device=keep_RI.device)
    # Far more swaps than rows take; each lowers the error by a least gain, so they end by themselves.
    for _ in range(2 * keep_RI.shape[1]):
        force_RI = sign_RI * pull_RI
        back_f_RI, drop_f_RI = force_RI + back_RI, force_RI.add_(drop_RI)
        if isinstance(pattern, NM):
            change_R, i_R, j_R = _best_in_groups(back_f_RI, drop_f_RI, weight_RI, hessian_II, pattern.m)
        else:
            gain_R, i_R = back_f_RI.min(dim=1)
            drop_f_RI.addcmul_(weight_RI, hessian_II[i_R].mul_(weight_RI.gather(1, i_R[:, None])), value=-2)
            loss_R, j_R = drop_f_RI.min(dim=1)
            change_R = gain_R + loss_R
        better_R = change_R < least_R
        if not better_R.all():
            live_R = better_R.nonzero().squeeze(1)
            if not live_R.numel():
                return
            weight_RI, cost_RI, pull_RI, sign_RI, back_RI, drop_RI, least_R, row_R, i_R, j_R = (
                tensor[live_R] for tensor in (weight_RI, cost_RI, pull_RI, sign_RI, back_RI, drop_RI, least_R, row_R, i_R, j_R)
            )
        i_R1, j_R1 = i_R[:, None], j_R[:, None]
        pull_RI -= hessian_II[i_R].mul_(weight_RI.gather(1, i_R1))
        pull_RI += hessian_II[j_R].mul_(weight_RI.gather(1, j_R1))
        for at_R1, on_RI, off_RI, kept in ((i_R1, drop_RI, back_RI, True), (j_R1, back_RI, drop_RI, False)):
            on_RI.scatter_(1, at_R1, cost_RI.gather(1, at_R1))
            off_RI.scatter_(1, at_R1, torch.inf)
            sign_RI.scatter_(1, at_R1, -sign_RI.gather(1, at_R1))
            keep_RI[row_R, at_R1.squeeze(1)] = kept


def _best_in_groups(
    back_RI: Tensor, drop_RI: Tensor, weight_RI: Tensor, hessian_II: Tensor, m: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The swap within a group of m that changes each row's error least: by how much, what comes back, what goes, [R] each.

    Args:
        back_RI: f of what is removed, infinite for what is kept.
        drop_RI: f of what is kept, infinite for what is removed.
    """
    column_I = torch.arange(weight_RI.shape[1], device=weight_RI.device)
    changes, partners = [], []
    for shift in range(1, m):
        partner_I = column_I - column_I % m + (column_I + shift) % m
        change_RI = back_RI + drop_RI[:, partner_I]
        change_RI.addcmul_(weight_RI * weight_RI[:, partner_I], hessian_II[column_I, partner_I], value=-2)
        changes.append(change_RI)
        partners.append(partner_I)
    change_RI, shift_RI = torch.stack(changes).min(dim=0)
    change_R, i_R = change_RI.min(dim=1)
    return change_R, i_R, torch.stack(partners)[shift_RI.gather(1, i_R[:, None]).squeeze(1), i_R]
