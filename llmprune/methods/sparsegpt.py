"""SparseGPT: remove weights by their effect on the layer's output and let the others make up for it.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot" (arXiv 2301.00774),
section 3 and algorithm 1. With H = X^T X (damped) and U the upper Cholesky factor of H^-1 (U^T U = H^-1), columns are visited from
left to right; removing weight w of column i costs w^2 / U_ii^2 and is made up for by the later columns of its row:

    e = w / U_ii,        W_{i:} <- W_{i:} - e U_{i,i:}                                       (equations 3 and 4)

Masks are chosen for 128 columns at a time (section 3.2, "adaptive mask selection"), from weights already updated by earlier
columns; with N:M, at the first column of each group. Updates beyond the 128 columns are applied as one product.

Where we part from the published code: exactly floor(rows * columns * sparsity) weights of each 128-column block go (it removes
one more); the weights of inputs that were always zero are given a negligible cost, so they go first, but within the sparsity
asked for, where the published code zeroes them all on top of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LLMPruneError
from ..patterns import NM, Pattern
from ..recipe import Recipe
from ..statistics import Hessian
from ..stream import Stream

STATISTIC = Hessian

DAMPING = 0.01
COLUMNS = 128


def prune(stream: Stream, recipe: Recipe) -> None:
    pattern = recipe.competition(default="layer")
    seen: Hessian | None = None
    for block in stream.blocks():
        for linear, hessian in block.observe(Hessian):
            if hessian is not seen:
                factor_II, seen = inverse_factor(hessian.mean_II), hessian
            linear.replace(solve(linear.weight_OI, factor_II, pattern))


def inverse_factor(hessian_II: Tensor) -> Tensor:
    """Upper Cholesky factor U of the damped inverse, U^T U = (H + 0.01 mean(diag H) I)^-1, float32 [I, I].

    Raises:
        LLMPruneError: H is not positive definite even so.
    """
    diagonal_I = hessian_II.diagonal()
    mean = diagonal_I.mean()
    scale = torch.where(mean > 0, mean, 1.0)
    # An input that was zero throughout has a zero row: whatever its weights are, the output is the same.
    dead_I = diagonal_I == 0
    damped_II = hessian_II + torch.diag(torch.where(dead_I, 1e-6, DAMPING) * scale)
    # H^-1 = U^T U with U upper is the Cholesky factorisation of H in reversed order: if P H P = L L^T, then
    # U = (P L P)^-1, upper. One factorisation and one triangular inverse, instead of two factorisations and an inverse.
    lower_II, failed = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
    if failed.any():
        raise LLMPruneError(
            "The Hessian of a linear's inputs is not positive definite: calibrate on more samples or another text."
        )
    identity_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=lower_II.device)
    return torch.linalg.solve_triangular(lower_II, identity_II, upper=False).flip(0, 1)


def solve(weight_OI: Tensor, factor_II: Tensor, pattern: Pattern) -> Tensor:
    """Prune one matrix and update what stays: algorithm 1. Returns new weights, float32 [O, I]."""
    # Columns are visited one by one, so they are laid out as rows.
    weight_IO = weight_OI.T.contiguous()
    inputs = len(weight_IO)
    columns = COLUMNS if not isinstance(pattern, NM) else max(COLUMNS // pattern.m, 1) * pattern.m
    for start in range(0, inputs, columns):
        stop = min(start + columns, inputs)
        part_CO = weight_IO[start:stop]
        part_CC = factor_II[start:stop, start:stop]
        scale_C1 = part_CC.diagonal()[:, None]
        if not isinstance(pattern, NM):
            drop_CO = ~pattern.keep((part_CO / scale_C1).square().T).T.contiguous()
        errors_CO = torch.empty_like(part_CO)
        for i in range(stop - start):
            if isinstance(pattern, NM) and i % pattern.m == 0:
                group = slice(i, i + pattern.m)
                drop_MO = ~pattern.keep((part_CO[group] / scale_C1[group]).square().T).T
            drop_O = drop_MO[i % pattern.m] if isinstance(pattern, NM) else drop_CO[i]
            torch.div(part_CO[i], part_CC[i, i], out=errors_CO[i])
            errors_CO[i] *= drop_O
            part_CO[i + 1 :].addr_(part_CC[i, i + 1 :], errors_CO[i], alpha=-1)
            part_CO[i].masked_fill_(drop_O, 0.0)
        weight_IO[stop:].addmm_(factor_II[start:stop, stop:].T, errors_CO, alpha=-1)
    return weight_IO.T
