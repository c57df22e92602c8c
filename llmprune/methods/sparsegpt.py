"""SparseGPT: remove weights by their effect on the layer's output and let the others make up for it.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot" (arXiv 2301.00774),
section 3 and algorithm 1. With H = X^T X (damped) and U the upper Cholesky factor of H^-1 (U^T U = H^-1), columns are visited
from left to right; removing weight w of column i costs w^2 / U_ii^2 and is made up for by the later columns of its row:

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
from ..refinement import fell_back, finish, observed
from ..statistics import Hessian, Statistic
from ..stream import Stream

STATISTIC = Hessian

DAMPING = 0.01
# Masks are chosen for this many columns at a time (the paper's B_s), and updates within them are applied to the rest of this
# many columns at once: one rank-1 update per column is bound by memory, products are not.
COLUMNS, STRIP = 128, 16


def prune(stream: Stream, recipe: Recipe) -> None:
    plain = recipe.refine == "none" and recipe.reconstruct == "sparsegpt"
    kind = observed(Hessian, recipe)
    assert kind
    for block in stream.blocks():
        pattern = recipe.competition(default="layer", sparsity=block.sparsity)
        seen: Statistic | None = None
        for linear, hessian in block.observe(kind):
            assert isinstance(hessian, Hessian)
            if fell_back(linear, hessian, pattern, recipe):
                continue
            if hessian is not seen:
                factor_II, seen = inverse_factor(hessian.mean_II), hessian
            weight_OI = solve(linear.weight_OI, factor_II, pattern)
            if plain:
                linear.replace(weight_OI)
            else:  # only the mask is SparseGPT's
                finish(linear, weight_OI != 0, weight_OI.abs() * hessian.rms_I, hessian, pattern, recipe)


def inverse_factor(hessian_II: Tensor) -> Tensor:
    """Upper Cholesky factor U of the damped inverse, U^T U = (H + 0.01 mean(diag H) I)^-1, float32 [I, I].

    Computed in float64: with outlier inputs the condition number passes 1e5, and float32 would lose all but two digits.

    Raises:
        LLMPruneError: H is not positive definite even so.
    """
    damped_II = hessian_II.double()
    diagonal_I = damped_II.diagonal()
    mean = diagonal_I.mean()
    scale = torch.where(mean > 0, mean, 1.0)
    # An input that was zero throughout has a zero row: whatever its weights are, the output is the same.
    dead_I = diagonal_I == 0
    diagonal_I += torch.where(dead_I, 1e-6, DAMPING) * scale
    # U^T U = H^-1 with U upper is the factorisation of H in reversed order: if P H P = L L^T, then U = (P L P)^-1. One
    # factorisation and one triangular inverse, instead of two factorisations and an inverse.
    lower_II, failed = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
    if failed.any():
        raise LLMPruneError(
            "The Hessian of a linear's inputs is not positive definite: calibrate on more samples or another text."
        )
    identity_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=lower_II.device)
    return torch.linalg.solve_triangular(lower_II, identity_II, upper=False).flip(0, 1).float()


def solve(weight_OI: Tensor, factor_II: Tensor, pattern: Pattern | Tensor) -> Tensor:
    """Prune one matrix and update what stays: algorithm 1.

    Args:
        weight_OI: float32.
        factor_II: `inverse_factor`.
        pattern: what the mask obeys, or the keep mask itself, bool [O, I].

    Returns:
        New weights, float32 [O, I].
    """
    # Columns are visited one by one, so they are laid out as rows.
    weight_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    error_IO = torch.empty_like(weight_IO)
    nm = pattern if isinstance(pattern, NM) else None
    strip = max(STRIP // nm.m, 1) * nm.m if nm else STRIP
    columns = max(COLUMNS // strip, 1) * strip
    diagonal_I1 = factor_II.diagonal()[:, None]
    for start in range(0, len(weight_IO), columns):
        stop = min(start + columns, len(weight_IO))
        if isinstance(pattern, Tensor):
            drop_CO = ~pattern.T[start:stop]
        elif not isinstance(pattern, NM):
            drop_CO = ~pattern.keep((weight_IO[start:stop] / diagonal_I1[start:stop]).square().T).T.contiguous()
        for left in range(start, stop, strip):
            right = min(left + strip, stop)
            for i in range(left, right):
                if nm and (i - start) % nm.m == 0:
                    group = slice(i, i + nm.m)
                    drop_MO = ~nm.keep_lanes((weight_IO[group] / diagonal_I1[group]).square())
                drop_O = drop_MO[(i - start) % nm.m] if nm else drop_CO[i - start]
                torch.mul(weight_IO[i], drop_O / factor_II[i, i], out=error_IO[i])
                weight_IO[i + 1 : right].addr_(factor_II[i, i + 1 : right], error_IO[i], alpha=-1)
                weight_IO[i].masked_fill_(drop_O, 0.0)
            weight_IO[right:stop].addmm_(factor_II[left:right, right:stop].T, error_IO[left:right], alpha=-1)
        weight_IO[stop:].addmm_(factor_II[start:stop, stop:].T, error_IO[start:stop], alpha=-1)
    return weight_IO.T
