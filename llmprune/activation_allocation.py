"""How a block's activation sparsity is shared among its gates, whose inputs do not all matter alike.

A unit is a gate: one linear, or those that share a mask. It has a share s_p in [0, 1] of its inputs dropped, and

    sum_p size_p s_p = sparsity * sum_p size_p,    size_p the number of its weights.                                       (1)

- `uniform`: all units the same share.
- `greedy` (TEAL, arXiv 2408.14690, algorithm 1, which WINA takes over): one step at a time goes where the block's output loses
  least per weight that is not read. Sizes are those of the weights, a share stops at 1, and where the way that was taken is
  worse than uniform, uniform it is. A table says a block's shares on a grid of sparsities, so a plan can change its sparsity.
- `closed-form`: of E_p(s), the energy of the scores that go with a share (`gating_scores.Curve`), the block's output loses
  about lambda_p E_p(s_p), with lambda_p known from one trial per unit. The sum is least under (1) if, with t_p the threshold of
  unit p and O_p its outputs,

      lambda_p t_p^2 / O_p = mu    wherever 0 < s_p < 1,                                                                   (2)

  since dE_p / ds_p is inputs times t_p^2: one bisection for mu.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gating_scores import Curve

# A greedy step drops so many more of a unit's inputs (TEAL's base step).
STEP = 0.05
# Tables say a block's shares at these sparsities. Between them, and beyond to everything, shares go in straight lines.
GRID = tuple(round(0.05 * number, 2) for number in range(1, 19))
# Greedy estimates are made anew at least every so many steps.
RENEWED = 12
# What a unit alone is tried at for its lambda, as a share of its inputs that are not zero.
PROBE = 0.5
# Halvings of a range of 2^-400 to 2^400, to more than float64 has.
HALVINGS = 120


@dataclass(frozen=True)
class Unit:
    """One gate of a block.

    Args:
        outputs: of all linears that it gates.
        inputs: of each.
        curve: of its scores.
        sensitivity: lambda, for `closed_form`.
    """

    outputs: int
    inputs: int
    curve: Curve
    sensitivity: float | None = None

    @property
    def size(self) -> int:
        return self.outputs * self.inputs

    @property
    def probe(self) -> float:
        """The share that it is tried at."""
        zeros = self.curve.zeros
        return zeros + PROBE * (1 - zeros)

    def energy(self, share: float) -> float:
        """E(share): per token, the sum of the smallest squared scores."""
        return self.inputs * self.curve.energy(share)


def closed_form(units: Sequence[Unit], sparsity: float) -> list[float]:
    """The shares that solve (2) under (1).

    Args:
        units: with their sensitivities. One of zero stands for outputs that nothing reads: all its inputs go first.
        sparsity: in [0, 1].
    """
    total = sum(unit.size for unit in units)
    wanted = sparsity * total
    free = [unit.curve.zeros if unit.sensitivity else 1.0 for unit in units]
    spent = sum(unit.size * share for unit, share in zip(units, free, strict=True))
    if spent >= wanted:  # what costs nothing is enough
        return [share * wanted / spent if spent else 0.0 for share in free]

    def shares(log_mu: float) -> list[float]:
        found = []
        for unit in units:
            price = (unit.sensitivity or 0.0) / unit.outputs
            found.append(unit.curve.share(math.sqrt(2.0**log_mu / price)) if price > 0 else 1.0)
        return found

    low, high = -400.0, 400.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        dropped = sum(unit.size * share for unit, share in zip(units, shares(middle), strict=True))
        low, high = (middle, high) if dropped < wanted else (low, middle)
    return between(shares(low), shares(high), units, wanted)


def between(low: Sequence[float], high: Sequence[float], units: Sequence[Unit], wanted: float) -> list[float]:
    """Shares on the line between two, that drop exactly `wanted` weights. `low` drops no more, `high` no less."""
    few, many = (sum(unit.size * share for unit, share in zip(units, ends, strict=True)) for ends in (low, high))
    part = min(max((wanted - few) / (many - few), 0.0), 1.0) if many > few else 1.0
    return [(1 - part) * one + part * other for one, other in zip(low, high, strict=True)]


def greedy(sizes: Sequence[int], error: Callable[[Sequence[float]], float]) -> Tensor:
    """A block's table: its shares at every sparsity of `GRID`, float64 [len(GRID), units].

    The next step should go where `error` rises least per weight. What a step costs changes slowly while others are taken, so
    only the one that was cheapest when last looked at is tried again, until one that was just tried is the cheapest; after
    `RENEWED` steps all are.

    Args:
        sizes: weights of every unit.
        error: of the block's output, squared, with these shares dropped; not negative.
    """
    path = greedy_path(sizes, error)
    rows = []
    for sparsity in GRID:
        taken = on_path(path, sizes, sparsity)
        even = [sparsity] * len(sizes)
        rows.append(even if error(even) < error(taken) else taken)
    return torch.tensor(rows, dtype=torch.float64)


def greedy_path(
    sizes: Sequence[int], error: Callable[[Sequence[float]], float], renewed: int = RENEWED
) -> list[tuple[float, ...]]:
    """The shares after every step, from none to the last of `GRID`.

    Args:
        sizes, error: as for `greedy`.
        renewed: steps after which all estimates are made anew; 1 for a search that looks at every unit before every step.
    """
    count, total = len(sizes), sum(sizes)
    shares, path, now = (0.0,) * count, [(0.0,) * count], 0.0
    # What a step would cost per weight, the error after it, and how many steps ago that was found.
    cost, after, age = [-math.inf] * count, [0.0] * count, [renewed] * count
    while sum(size * share for size, share in zip(sizes, shares, strict=True)) < GRID[-1] * total - 1e-9 * total:
        open_units = [unit for unit in range(count) if shares[unit] < 1]
        while True:
            stale = [unit for unit in open_units if age[unit] >= renewed]
            best = stale[0] if stale else min(open_units, key=lambda unit: (cost[unit], unit))
            if not stale and age[best] == 0:
                break
            step = _stepped(shares, best)
            after[best] = error(step)
            cost[best] = (after[best] - now) / (sizes[best] * (step[best] - shares[best]))
            age[best] = 0
        shares, now = _stepped(shares, best), after[best]
        path.append(shares)
        age = [each + 1 for each in age]
    return path


def _stepped(shares: tuple[float, ...], unit: int) -> tuple[float, ...]:
    raised = min(round(shares[unit] + STEP, 9), 1.0)
    return (*shares[:unit], raised, *shares[unit + 1 :])


def on_path(path: Sequence[Sequence[float]], sizes: Sequence[int], sparsity: float) -> list[float]:
    """The shares at which a path of rising shares meets (1), or its end."""
    total = sum(sizes)
    before = path[0]
    for shares in path:
        dropped = sum(size * share for size, share in zip(sizes, shares, strict=True))
        if dropped >= sparsity * total:
            few = sum(size * share for size, share in zip(sizes, before, strict=True))
            part = (sparsity * total - few) / (dropped - few) if dropped > few else 0.0
            return [(1 - part) * one + part * other for one, other in zip(before, shares, strict=True)]
        before = shares
    return list(before)


def from_table(table_SG: Tensor, sizes: Sequence[int], sparsity: float) -> list[float]:
    """The shares that a table says for a sparsity in [0, 1]."""
    count = len(sizes)
    path = [[0.0] * count, *table_SG.tolist(), [1.0] * count]
    grid = (0.0, *GRID, 1.0)
    above = next(number for number, each in enumerate(grid) if each >= sparsity)
    if above == 0:
        return path[0]
    low, high = grid[above - 1], grid[above]
    part = (sparsity - low) / (high - low)
    return [(1 - part) * one + part * other for one, other in zip(path[above - 1], path[above], strict=True)]


def shares_of(allocation: str, units: Sequence[Unit], table_SG: Tensor | None, sparsity: float) -> list[float]:
    """The share of every unit of a block that an allocation drops.

    Args:
        allocation: `uniform`, `greedy` (which needs the block's table) or `closed-form` (which needs sensitivities).
        sparsity: of the block, in [0, 1].
    """
    if allocation == "greedy":
        assert table_SG is not None
        return from_table(table_SG, [unit.size for unit in units], sparsity)
    if allocation == "closed-form":
        return closed_form(units, sparsity)
    return [sparsity] * len(units)
