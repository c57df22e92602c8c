"""How a budget is shared among blocks: a sparsity, channels of the feed-forward network, attention heads.

- `by_influence`: blocks that change the hidden states most lose least.
- `by_owl`: blocks with more outliers among their scores lose less (OWL, arXiv 2310.05175).
- `keep_ratios`, `widths`: CFSP's coarse stage (arXiv 2409.13199), from how far every block turns the hidden states to whole
  multiples of channels that meet the budget.
- `apportion`, `evenly`: whole units, by wish or as evenly as can be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import LLMPruneError
from .models import Linear, Skeleton
from .statistics import InputNorm
from .stream import Stream

# Samples that influence and outliers are measured on: these are means over thousands of tokens, and little depends on more.
SAMPLES = 8
# The loss from pruning one block alone to sparsity s grows like influence^(1/2) s^5 around a half (measured on SmolLM2 with
# text of C4: evals/LOG.md). Equal marginal loss everywhere then asks for s ~ influence^(-1/8).
EXPONENT = -1 / 8
LARGEST = 0.95
# OWL's M: a score this many times the mean is an outlier (arXiv 2310.05175, section 3.2).
OUTLIER = 5.0
# CFSP's code divides angles that are summed over its 128 x 1024 calibration tokens by 10^4 before the sigmoid. On means over
# tokens that is this factor, whatever the number of tokens.
TEMPERATURE = 128 * 1024 / 1e4
# How far CFSP stays from keeping a whole block, where importances ask for more than all of it.
SLACK = 1.05


def by_influence(influence_B: Sequence[float], sizes_B: Sequence[int], target: float) -> list[float]:
    """Sparsity of every block.

    Args:
        influence_B: of every block, at least 0 (`measure_influence`).
        sizes_B: prunable weights of every block.
        target: their mean, weighted by size.

    Returns:
        Sparsities in [0, `LARGEST`], proportional to influence^(-1/8) below that; `target` throughout where that is larger.
    """
    if target >= LARGEST:
        return [target] * len(sizes_B)
    # Rounded, so that the last bits of a forward move no weight. Sparsities are not: their mean is the target.
    weights = [round(max(influence, 1e-6) ** EXPONENT, 4) for influence in influence_B]
    low, high = 0.0, LARGEST / min(weights)
    for _ in range(60):
        scale = (low + high) / 2
        removed = sum(min(scale * weight, LARGEST) * size for weight, size in zip(weights, sizes_B, strict=True))
        low, high = (scale, high) if removed < target * sum(sizes_B) else (low, scale)
    return [min(high * weight, LARGEST) for weight in weights]


def measure_influence(
    skeleton: Skeleton, ids_NT: Tensor, *, micro_batch: int, offload: Path | None, advance_progress: Callable[[str], None]
) -> list[float]:
    """1 - the mean cosine similarity of each dense block's input and output (ShortGPT, arXiv 2403.03853, equation 1).

    Args:
        ids_NT: calibration token ids [samples, tokens]; the first `SAMPLES` are used.
        micro_batch, offload, advance_progress: as for `Stream`.
    """
    survey = Stream(
        skeleton,
        ids_NT[:SAMPLES],
        micro_batch=min(micro_batch, SAMPLES),
        offload=offload,
        advance_progress=advance_progress,
        keep_last=True,
        compare_ends=True,
    )
    influence_B: list[float] = []
    for block in survey.blocks():
        block.advance()
        influence = block.influence
        assert influence is not None
        influence_B.append(influence)
    return influence_B


def by_owl(outlier_B: Sequence[float], sizes_B: Sequence[int], target: float, *, spread: float = 0.08) -> list[float]:
    """Sparsity of every block, the lower the more outliers it has (OWL, arXiv 2310.05175, section 3.2: S_l ~ 1 - D_l).

    The published code stretches the outlier shares over a range of exactly 2 `spread` and then shifts them to the target, which
    leaves the paper's bounds whenever the mean share is not in the middle of the range. Here the range shrinks until both
    bounds hold, and the mean counts a block by its size.

    Args:
        outlier_B: share of outliers D_l of every block (`measure_outliers`).
        sizes_B: prunable weights of every block.
        target: the mean sparsity S, weighted by size.
        spread: the paper's lambda. The bounds are S - spread and S + spread; less, where that would leave [0, `LARGEST`].

    Returns:
        Sparsities; `target` throughout where all blocks have the same share.
    """
    spread = min(spread, target, max(LARGEST - target, 0.0))
    # From the lowest share, because differences of nearly equal shares are exact and their mean is not.
    above_B = [share - min(outlier_B) for share in outlier_B]
    mean = math.fsum(above * size for above, size in zip(above_B, sizes_B, strict=True)) / sum(sizes_B)
    reach = max(abs(above - mean) for above in above_B)
    if reach == 0:
        return [target] * len(above_B)
    return [target - spread * ((above - mean) / reach) for above in above_B]


def measure_outliers(
    skeleton: Skeleton,
    ids_NT: Tensor,
    *,
    micro_batch: int,
    offload: Path | None,
    advance_progress: Callable[[str], None],
    multiple: float = OUTLIER,
) -> list[float]:
    """Share of each dense block's scores above `multiple` times their mean (OWL, arXiv 2310.05175, section 3.2: D_l).

    The scores are Wanda's, |W| * ||x||. As in the published code, a block's mean and its outliers are those of all its linears
    pooled, and no block sees another one pruned.

    Args:
        ids_NT: calibration token ids [samples, tokens]; the first `SAMPLES` are used, where the published code takes all.
        micro_batch, offload, advance_progress: as for `Stream`.
    """
    survey = Stream(
        skeleton,
        ids_NT[:SAMPLES],
        micro_batch=min(micro_batch, SAMPLES),
        propagate="dense",
        offload=offload,
        advance_progress=advance_progress,
    )
    return [_outliers(list(block.observe(InputNorm)), multiple) for block in survey.blocks()]


def _outliers(pairs: Sequence[tuple[Linear, InputNorm]], multiple: float) -> float:
    """Share of the pooled scores above `multiple` times their mean; one linear's scores are in memory at a time."""

    def score_OI(linear: Linear, inputs: InputNorm) -> Tensor:
        return linear.weight_OI.abs() * inputs.rms_I

    count = sum(linear.numel for linear, _ in pairs)
    mean = sum(float(score_OI(*pair).sum(dtype=torch.float64)) for pair in pairs) / count
    return sum(int(torch.count_nonzero(score_OI(*pair) > multiple * mean)) for pair in pairs) / count


def keep_ratios(importance_B: Sequence[float], p: float, *, gain: float = 1.0) -> list[float]:
    """Share of its channels that every block keeps, by a sigmoid of its importance (CFSP, arXiv 2409.13199).

    z_l = `TEMPERATURE` (B_l - mean B), s_l = sigmoid(gain z_l), ratio_l = (1 - p) s_l / mean s. Where a block would have to
    keep more than it has, the s_l shrink towards their mean until the largest ratio is 1 - p + p / `SLACK`, as in the
    published code.

    Args:
        importance_B: of every block, as a mean over tokens (`statistics.Ends`).
        p: share of all channels to remove, in [0, 1).
        gain: of the sigmoid; 0 keeps the same share everywhere.

    Returns:
        Ratios in [0, 1] whose mean is 1 - p.
    """
    count = len(importance_B)
    # math.fsum does not depend on the order of the blocks.
    mean = math.fsum(importance_B) / count
    sigmoid_B = [_sigmoid(gain * TEMPERATURE * (importance - mean)) for importance in importance_B]
    mean, highest = math.fsum(sigmoid_B) / count, max(sigmoid_B)
    if highest > mean and (1 - p) * highest >= mean:
        contraction = mean * p / (1 - p) / (highest - mean) / SLACK
        sigmoid_B = [mean + contraction * (value - mean) for value in sigmoid_B]
    return [min((1 - p) * (value / mean), 1.0) for value in sigmoid_B]


def _sigmoid(z: float) -> float:
    """1 / (1 + exp(-z)), without overflow."""
    return math.exp(min(z, 0.0)) / (1 + math.exp(-abs(z)))


def apportion(ratios: Sequence[float], dense_units_per_block: Sequence[int], total_units: int, *, low: int = 1) -> list[int]:
    """Whole units for every block, as near as can be to its ratio of what it has (the method of largest remainders).

    Args:
        ratios: of every block, what share of its units it should keep.
        dense_units_per_block: what it has.
        total_units: what all are to keep together.
        low: what no block falls below.

    Returns:
        Units in [`low`, dense] whose sum is `total_units`; of all such, the least sum of squared distances from ratio * dense,
        the lower index first where two blocks are as near.

    Raises:
        LLMPruneError: no such units exist.
    """
    least, most = low * len(ratios), sum(dense_units_per_block)
    if min(dense_units_per_block) < low or not least <= total_units <= most:
        raise LLMPruneError(
            f"{total_units} units cannot be shared among {len(ratios)} blocks that keep at least {low} each and have "
            f"{min(dense_units_per_block)} to {max(dense_units_per_block)}: take another sparsity, which leaves {least} to "
            f"{most} units."
        )
    wishes = [ratio * dense for ratio, dense in zip(ratios, dense_units_per_block, strict=True)]
    units = [min(max(math.floor(wish), low), dense) for wish, dense in zip(wishes, dense_units_per_block, strict=True)]
    missing = total_units - sum(units)
    step = 1 if missing > 0 else -1
    for _ in range(abs(missing)):
        able = [l for l, dense in enumerate(dense_units_per_block) if low <= units[l] + step <= dense]
        units[min(able, key=lambda l: (step * (units[l] - wishes[l]), step * l))] += step
    return units


def width_multiple(width: int) -> int:
    """Of how many channels a feed-forward network's kept width should be a multiple, for the hardware: 128 where that leaves at
    least 8 steps, else 32 or 16; 1 below 128 channels, where it makes no difference."""
    return next((multiple for multiple in (128, 32, 16) if width >= 8 * multiple), 1)


def widths(ratios_B: Sequence[float], dense_B: Sequence[int], target: float, *, multiple: int) -> list[int]:
    """Channels every block keeps: whole multiples, or all it has where the budget cannot be met without.

    Args:
        ratios_B: share of its channels that every block should keep (`keep_ratios`).
        dense_B: channels it has, of which only multiples can be kept in part.
        target: channels that all blocks are to keep together.
        multiple: the unit, at least one of which every block keeps.

    Returns:
        Widths, each a multiple or the dense width, whose sum is at most multiple / 2 from the target. Widths that are no
        multiples occur only where the multiples of all blocks together fall short of the target.

    Raises:
        LLMPruneError: a block has less than one unit, or the target is less than one unit for each.
    """
    if min(dense_B) < multiple:
        raise LLMPruneError(
            f"A block with {min(dense_B)} channels cannot keep a multiple of {multiple}: take a smaller multiple."
        )
    full_B = [dense // multiple for dense in dense_B]
    kept_B = [full * multiple for full in full_B]
    if target <= sum(kept_B):
        shares = [ratio * dense / kept for ratio, dense, kept in zip(ratios_B, dense_B, kept_B, strict=True)]
        return [multiple * units for units in apportion(shares, full_B, math.floor(target / multiple + 0.5))]
    for l in sorted(range(len(dense_B)), key=lambda l: -ratios_B[l]):
        short = target - sum(kept_B)
        if abs(short - (dense_B[l] - kept_B[l])) < abs(short):
            kept_B[l] = dense_B[l]
    return kept_B


def evenly(total: int, count: int) -> list[int]:
    """`total` units over `count` places, as evenly as whole numbers can be, the larger ones spread over the whole depth.

    Any run of neighbours has less than one unit more or less than its share.
    """
    ends = [(2 * i * total + count) // (2 * count) for i in range(count + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]
