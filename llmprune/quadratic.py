"""Which weights of a block to prune: a quadratic in binary variables under a cardinality constraint.

iCBS (arXiv 2411.17796) takes n weights w of a matrix, some of them pruned, and models what toggling a part of them costs. With
z_i = 1 where weight i is toggled and a_i = +w_i to revive a pruned weight, -w_i to prune a kept one, the weights move by a z;
with the gradient g and the curvature H at the current, pruned weights (`flip`)

    E(z) = gamma g.(a z) + (a z)' H (a z) / 2 + ridge |a z|^2  =  h.z + z'C z / 2,
    h_i = gamma g_i a_i + a_i^2 H_ii / 2 + ridge a_i^2,      C_ij = a_i H_ij a_j,  C_ii = 0.

`solve` minimises E over all z that toggle as many pruned as kept weights in every group (block, row or N:M cell); E(0) = 0.
The field F = h + C z and the signs s = 1 - 2z make a move cheap to judge and to apply:

    E changes by s_i F_i when i is toggled, and by s_i F_i + s_j F_j + s_i s_j C_ij when i and j are;
    after toggling i, F becomes F + s_i C_i and s_i becomes -s_i.

The moves are swaps: i and j of one group, i pruned and j kept at the time. They reach every allowed z from every other.

Where we part from the published solver, one Metropolis chain that computes every change from scratch: best-swap descent comes
first, close to as good on these blocks and far cheaper, then a heat bath over replicas, which weighs all partners of a weight
at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import LLMPruneError
from .patterns import lowest

Method = Literal["auto", "descent", "anneal", "exhaustive"]

# All subsets of this many weights are enumerated (65,536 of them).
EXHAUSTIVE = 16
# A step of the descent looks at this many squared pairs of the cheapest toggles.
SHORTLIST = 128
# Annealing: every weight is picked this often on average by each replica, and small blocks as if they had 512 weights.
REPLICAS, SWEEPS, SMALL = 8, 2, 512
# Temperatures as fractions of what a toggle costs: where most replicas start, where the one from the descent's solution
# starts (warm enough to leave it, too cool to forget it), where all end.
HOT, WARM, COLD = 0.3, 0.01, 3e-4


@dataclass(frozen=True)
class Solution:
    """Which weights to toggle (bool [N]) and what the quadratic says of it, never above zero."""

    toggle_N: Tensor
    energy: float


@dataclass(frozen=True)
class _Problem:
    h_N: Tensor
    C_NN: Tensor
    pruned_N: Tensor
    group_N: Tensor  # 0, 1, ...
    # The members of each group that has both pruned and kept weights, in ascending order; rows are padded with 0, not `real`.
    member_GS: Tensor
    real_GS: Tensor
    # What a toggle costs, in size, when others are toggled at random.
    scale_N: Tensor


def fisher(gradient_BN: Tensor) -> Tensor:
    """The empirical Fisher matrix G'G / B of one gradient per sample, [N, N]."""
    return gradient_BN.T @ gradient_BN / len(gradient_BN)


def flip(
    weight_N: Tensor, pruned_N: Tensor, gradient_N: Tensor, hessian_NN: Tensor, gamma: float, ridge: float
) -> tuple[Tensor, Tensor]:
    """The quadratic of a block of weights.

    Args:
        weight_N: the original weights, also of those that are pruned.
        pruned_N: bool, True where a weight is zero at present.
        gradient_N: of the loss, at the current weights.
        hessian_NN: its curvature there, symmetric; see `fisher`.
        gamma: multiplies the gradient; below 1 it damps the step.
        ridge: cost of a unit of squared distance from the current weights.

    Returns:
        h [N] and C [N, N].
    """
    a_N = torch.where(pruned_N, weight_N, -weight_N)
    C_NN = (a_N[:, None] * hessian_NN).mul_(a_N)
    h_N = gamma * gradient_N * a_N + C_NN.diagonal() / 2 + ridge * a_N.square()
    return h_N, C_NN.fill_diagonal_(0)


def energy(h_N: Tensor, C_NN: Tensor, toggle_N: Tensor) -> float:
    """h.z + z'C z / 2 of a bool or 0/1 vector z."""
    z_N = toggle_N.to(h_N)
    return (z_N @ (h_N + C_NN @ z_N / 2)).item()


def solve(
    h_N: Tensor, C_NN: Tensor, pruned_N: Tensor, *, group_N: Tensor | None = None, method: Method = "auto", seed: int = 0
) -> Solution:
    """Minimise h.z + z'C z / 2 over the z that toggle as many pruned as kept weights in every group.

    Args:
        h_N: float32 or float64.
        C_NN: of the same dtype, symmetric, its diagonal zero.
        pruned_N: bool, True where a weight is pruned at present.
        group_N: integers, equal for the weights of one group; one group if None.
        method: `descent` stops where no swap improves (deterministic, ties to the lowest index); `anneal` goes on from there
            at several temperatures and is never worse; `exhaustive` is exact; `auto` is `exhaustive` up to 16 weights, else
            `anneal`.
        seed: of `anneal`; one seed gives one solution.

    Raises:
        LLMPruneError: `exhaustive` with more than 16 weights.
    """
    if method == "exhaustive" and len(h_N) > EXHAUSTIVE:
        raise LLMPruneError(f"The exhaustive solver takes at most {EXHAUSTIVE} weights, not {len(h_N)}: use auto.")
    problem = _problem(h_N, C_NN, pruned_N, group_N)
    nothing_N = torch.zeros_like(pruned_N)
    if not len(problem.member_GS) or not problem.scale_N.any():
        return Solution(nothing_N, 0.0)
    if method == "exhaustive" or (method == "auto" and len(h_N) <= EXHAUSTIVE):
        candidates = [_exhaust(problem)]
    else:
        candidates = [_descend(problem, nothing_N)]
        if method != "descent":
            candidates += [_descend(problem, toggle_N) for toggle_N in _anneal(problem, candidates[0], seed)]
    # The first of equals: nothing before something, the descent before the replicas.
    solutions = [Solution(toggle_N, energy(h_N, C_NN, toggle_N)) for toggle_N in (nothing_N, *candidates)]
    return min(solutions, key=lambda solution: solution.energy)


def _problem(h_N: Tensor, C_NN: Tensor, pruned_N: Tensor, group_N: Tensor | None) -> _Problem:
    if group_N is None:
        group_N = torch.zeros_like(pruned_N, dtype=torch.int64)
    _, group_N, size_G = group_N.unique(return_inverse=True, return_counts=True)
    order_N = group_N.argsort(stable=True)
    rank_N = torch.arange(len(order_N), device=order_N.device) - (size_G.cumsum(0) - size_G)[group_N[order_N]]
    real_GS = torch.arange(int(size_G.max()), device=order_N.device) < size_G[:, None]
    member_GS = torch.zeros_like(real_GS, dtype=torch.int64)
    member_GS[group_N[order_N], rank_N] = order_N
    swappable_G = (real_GS & pruned_N[member_GS]).any(1) & (real_GS & ~pruned_N[member_GS]).any(1)
    scale_N = h_N.abs() + torch.linalg.vector_norm(C_NN, dim=1)
    return _Problem(h_N, C_NN, pruned_N, group_N, member_GS[swappable_G], real_GS[swappable_G], scale_N)


def _exhaust(problem: _Problem) -> Tensor:
    """The best of all balanced z."""
    size = len(problem.h_N)
    bit_N = torch.arange(size, device=problem.h_N.device)
    z_MN = (torch.arange(2**size, device=bit_N.device)[:, None] >> bit_N & 1).to(problem.h_N)
    member_NG = torch.nn.functional.one_hot(problem.group_N).to(z_MN)
    surplus_MG = torch.where(problem.pruned_N, z_MN, -z_MN) @ member_NG
    z_MN = z_MN[(surplus_MG == 0).all(1)]
    energy_M = (z_MN * (problem.h_N + z_MN @ problem.C_NN / 2)).sum(1)
    return z_MN[energy_M.argmin()] > 0


def _descend(problem: _Problem, toggle_N: Tensor) -> Tensor:
    """Take the best swap until none improves: the best of a shortlist, and of all swaps where the shortlist holds none."""
    sign_N = torch.where(toggle_N, -1, 1).to(problem.h_N)
    field_N = problem.h_N + problem.C_NN @ toggle_N.to(problem.h_N)
    # A gain must exceed what rounding does to the fields in one step, or swaps could go round in circles.
    least_gain = 8 * torch.finfo(field_N.dtype).eps * problem.scale_N.max().item()
    # The groups share the pairs of one shortlist.
    shortlist = max(int(SHORTLIST / len(problem.member_GS) ** 0.5), 1)
    everything = problem.member_GS.shape[1]
    count = shortlist
    while True:
        change, pair = _best_swap(problem, sign_N, field_N, count)
        if change < -least_gain:
            for i in pair:
                field_N.add_(problem.C_NN[i], alpha=sign_N[i].item())
                sign_N[i] *= -1
            count = shortlist
        elif count < everything:
            count = everything
        else:
            return sign_N < 0


def _best_swap(problem: _Problem, sign_N: Tensor, field_N: Tensor, count: int) -> tuple[float, tuple[int, int]]:
    """The swap that changes E least, of the `count` cheapest toggles on each side of every group."""
    cost_GS = (sign_N * field_N)[problem.member_GS]
    pruned_GS = (problem.pruned_N ^ (sign_N < 0))[problem.member_GS]
    i_GP, cost_GP = _cheapest(problem, cost_GS.masked_fill(~(pruned_GS & problem.real_GS), torch.inf), count)
    j_GK, cost_GK = _cheapest(problem, cost_GS.masked_fill(~(~pruned_GS & problem.real_GS), torch.inf), count)
    change_GPK = problem.C_NN[i_GP[:, :, None], j_GK[:, None, :]]
    change_GPK.mul_(sign_N[i_GP][:, :, None]).mul_(sign_N[j_GK][:, None, :])
    change_GPK.add_(cost_GP[:, :, None]).add_(cost_GK[:, None, :])
    best = int(change_GPK.argmin())
    ip, k = divmod(best, j_GK.shape[1])
    return change_GPK.view(-1)[best].item(), (int(i_GP.view(-1)[ip]), int(j_GK[ip // i_GP.shape[1], k]))


def _cheapest(problem: _Problem, cost_GS: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The members of least finite cost in each group, in ascending order, and their costs; at least one, at most `count`."""
    count = min(count, int(cost_GS.isfinite().sum(1).max()))
    column_GC = lowest(cost_GS, count).nonzero()[:, 1].view(len(cost_GS), count)
    return problem.member_GS.gather(1, column_GC), cost_GS.gather(1, column_GC)


def _anneal(problem: _Problem, descended_N: Tensor, seed: int) -> Tensor:
    """Replicas cooled geometrically, the first from a solution, the others from z = 0: bool [R, N].

    A step toggles a random weight, then one of those of its group that are on the side it came to (itself too: the step is
    undone), drawn by the Boltzmann weights of the outcomes. Every outcome could have drawn from the same set, and picks do not
    depend on the state, so detailed balance holds.
    """
    h_N, size, device = problem.h_N, len(problem.h_N), problem.h_N.device
    sign_RN = torch.ones(REPLICAS, size, dtype=h_N.dtype, device=device)
    sign_RN[0, descended_N] = -1
    field_RN = h_N + (1 - sign_RN) / 2 @ problem.C_NN
    side_N = torch.where(problem.pruned_N, 1, -1).to(h_N)
    replica_R = torch.arange(REPLICAS, device=device)

    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    steps = SWEEPS * max(size, SMALL)
    pick_TR = torch.randint(size, (steps, REPLICAS), generator=generator).to(device)
    uniform_TR = (1 - torch.rand(steps, REPLICAS, generator=generator, dtype=torch.float64)).to(h_N)  # in (0, 1]
    start_R = torch.tensor([WARM] + [HOT] * (REPLICAS - 1), dtype=torch.float64)
    progress_T1 = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    heat_TR = (start_R ** (1 - progress_T1) * COLD**progress_T1).to(h_N) * problem.scale_N.mean()

    def toggle(i_R: Tensor) -> None:
        sign_R1 = sign_RN[replica_R, i_R][:, None]
        field_RN.addcmul_(problem.C_NN[i_R], sign_R1)
        sign_RN[replica_R, i_R] = -sign_R1[:, 0]

    for i_R, uniform_R, heat_R in zip(pick_TR, uniform_TR, heat_TR, strict=True):
        toggle(i_R)
        side_RN = sign_RN * side_N
        other_RN = (side_RN != side_RN[replica_R, i_R][:, None]) | (problem.group_N != problem.group_N[i_R][:, None])
        weight_RN = (sign_RN * field_RN).div_(-heat_R[:, None]).masked_fill_(other_RN, -torch.inf)
        # Drawn by inverting the cumulative sum: Gumbel noise, one number per weight, would nearly double the time of a step.
        cumulative_RN = weight_RN.sub_(weight_RN.amax(1, keepdim=True)).exp_().cumsum(1)
        drawn_R = torch.searchsorted(cumulative_RN, (cumulative_RN[:, -1] * uniform_R)[:, None])[:, 0]
        # A parallel sum (CUDA) may rise by rounding at a weight of zero probability: undo the step then.
        toggle(torch.where(other_RN[replica_R, drawn_R], i_R, drawn_R))
    return sign_RN < 0
