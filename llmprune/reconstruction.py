"""What the weights of a linear become once some must be zero: least squares on the calibration tokens.

With inputs X (tokens x I), H = X^T X / tokens and a keep mask, every row w of the matrix solves on its own

    minimise (w - t) H_d (w - t)^T   over w that are zero outside the mask,                                   (1)

where t is the row's target and H_d = (1 - damping) H + damping diag(H) keeps a fit to few tokens from fitting their accidents.
The target is the dense row, or, where the dense model is known in this place, the t that comes closest to its output, with what
the residual stream has lost so far added (`dense_target`), so that a linear makes up for those before it.

`least_squares` solves (1) for a given mask by conjugate gradients, all rows at once: a step is one product with H, so rows with
different masks share all work, where a Cholesky factorisation would be each row's own. `alternate` chooses the mask as well, by
the alternating direction method of multipliers (for pruning: Boza 2024, arXiv 2401.02938; ALPS, Meng et al. 2024, arXiv
2406.07831).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import LLMPruneError
from .patterns import Pattern

# Conjugate gradients stop at this residual relative to that of no weights, in the preconditioner's norm; or give up.
TOLERANCE, STEPS = 1e-3, 200
# Weight of the penalty for leaving the pattern, with features scaled to unit variance. Errors on fresh tokens of SmolLM2's
# layers are a quarter higher with 0.3, a tenth with 3.
PENALTY = 1.0


def damped(hessian_II: Tensor, damping: float) -> Tensor:
    """(1 - damping) H + damping diag(H), with a positive diagonal: float32 [I, I].

    An input that was zero throughout costs nothing whatever its weights are, and would leave its column of (1) undetermined.
    """
    diagonal_I = hessian_II.diagonal()
    damped_II = (1 - damping) * hessian_II
    mean = diagonal_I.mean()
    floor = torch.where(mean > 0, 1e-6 * mean, 1.0)
    damped_II.diagonal().copy_(diagonal_I.maximum(floor))
    return damped_II


def relative_error(weight_OI: Tensor, dense_OI: Tensor, hessian_II: Tensor) -> float:
    """||X (W - W_dense)^T||^2 / ||X W_dense^T||^2 on the Hessian's tokens; 0 where the dense output is zero."""
    lost_OI = weight_OI - dense_OI
    lost, total = ((matrix_OI @ hessian_II).mul_(matrix_OI).sum().double() for matrix_OI in (lost_OI, dense_OI))
    return float(lost / total) if total > 0 else 0.0


def dense_target(weight_OI: Tensor, missing_OI: Tensor, hessian_II: Tensor, damping: float) -> Tensor:
    """The weights whose output on the pruned model's inputs X is closest to what the dense model has in this place.

    Minimises (1 - damping) ||Y - X t^T||^2 / tokens + damping (t - w) diag(H) (t - w)^T over t.

    Args:
        weight_OI: W, float32.
        missing_OI: (Y - X W^T)^T X / tokens (`CrossHessian.missing_OI`).
        hessian_II: X^T X / tokens.
        damping: in (0, 1).

    Raises:
        LLMPruneError: the damped Hessian is not positive definite.
    """
    factor_II, failed = torch.linalg.cholesky_ex(damped(hessian_II, damping).double())
    if failed.any():
        raise LLMPruneError(
            f"The Hessian of a linear's inputs is not positive definite with --damping {damping:g}: give a larger one, or "
            "calibrate on more samples or another text."
        )
    return weight_OI + (1 - damping) * torch.cholesky_solve(missing_OI.T.double(), factor_II).T.float()


def least_squares(target_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor, start_OI: Tensor | None = None) -> Tensor:
    """Solve (1) for a given mask to a relative residual of `TOLERANCE`.

    Args:
        target_OI: float32.
        keep_OI: bool, any pattern; rows may keep different numbers, also none.
        hessian_II: H_d, positive definite.
        start_OI: weights to start from; the target's kept ones otherwise.

    Returns:
        Float32 [O, I], zero outside the mask.

    Raises:
        LLMPruneError: it does not converge, which a well-damped Hessian does not do.
    """
    # Features scaled to unit variance, which is Jacobi's preconditioner, and rows to unit size, whose squares do not underflow.
    scale_I = hessian_II.diagonal().rsqrt()
    correlation_II = hessian_II * scale_I * scale_I[:, None]
    target_OI = target_OI / scale_I
    size_O1 = target_OI.abs().amax(dim=1, keepdim=True)
    size_O1 = torch.where(size_O1 > 0, size_O1, 1.0)
    target_OI /= size_O1
    weight_OI = torch.where(keep_OI, target_OI if start_OI is None else start_OI / scale_I / size_O1, 0.0)
    residual_OI = ((target_OI - weight_OI) @ correlation_II).mul_(keep_OI)
    direction_OI = residual_OI.clone()
    energy_O1 = residual_OI.square().sum(dim=1, keepdim=True)
    goal_O1 = TOLERANCE**2 * (target_OI @ correlation_II).mul_(keep_OI).square_().sum(dim=1, keepdim=True)
    for _ in range(STEPS):
        if (energy_O1 <= goal_O1).all():
            return weight_OI.mul_(scale_I).mul_(size_O1)
        image_OI = (direction_OI @ correlation_II).mul_(keep_OI)
        # A row that has converged has nothing left to divide.
        length_O1 = energy_O1 / (direction_OI * image_OI).sum(dim=1, keepdim=True).clamp_min(1e-30)
        weight_OI.addcmul_(direction_OI, length_O1)
        residual_OI.addcmul_(image_OI, length_O1, value=-1)
        before_O1, energy_O1 = energy_O1, residual_OI.square().sum(dim=1, keepdim=True)
        direction_OI.mul_(energy_O1 / before_O1.clamp_min(1e-30)).add_(residual_OI)
    raise LLMPruneError(
        f"Least squares did not converge in {STEPS} steps: the Hessian of a linear's inputs is close to singular; give a "
        "larger --damping, or calibrate on more samples."
    )


def alternate(target_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor, pattern: Pattern, rounds: int) -> tuple[Tensor, Tensor]:
    """Choose the mask of (1) together with the weights.

    With features scaled to unit variance (T and R the scaled target and Hessian), rounds alternate between weights that
    need not obey the pattern and weights that do,

        Z = (T R + rho (D - U)) (R + rho)^-1,      D = the pattern's largest of Z + U,      U = Z + U - D.

    Args:
        target_OI, hessian_II: as for `least_squares`.
        keep_OI: the mask to start from.
        pattern: what the mask obeys.
        rounds: how often.

    Returns:
        The mask and the weights D of the last round, a good start for `least_squares`.
    """
    scale_I = hessian_II.diagonal().rsqrt()
    correlation_II = hessian_II * scale_I * scale_I[:, None]
    identity_II = torch.eye(len(scale_I), dtype=torch.float64, device=scale_I.device)
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(correlation_II.double() + PENALTY * identity_II)).float()
    target_OI = target_OI / scale_I
    goal_OI = target_OI @ correlation_II
    sparse_OI = target_OI * keep_OI
    excess_OI = torch.zeros_like(target_OI)
    for _ in range(rounds):
        free_OI = (goal_OI + PENALTY * (sparse_OI - excess_OI)) @ inverse_II
        free_OI += excess_OI
        keep_OI = pattern.keep(free_OI.abs())
        sparse_OI = free_OI * keep_OI
        excess_OI = free_OI - sparse_OI
    return keep_OI, sparse_OI * scale_I
