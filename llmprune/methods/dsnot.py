"""DSnoT: swap kept and removed weights of a row until what their removal does to its output cancels.

Zhang et al. 2023, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs" (arXiv 2310.08915), section 3.
With mu and var the mean and the variance of the input features, removing weights changes the expected output of a row by

    e = sum over removed j of W_j mu_j

and every cycle grows one removed weight and prunes one kept weight of the row so that e goes towards zero:

    grow    the largest |W_j mu_j| / var_j of the removed weights where W_j mu_j has the sign of e
    prune   the smallest Wanda score |W_j| ||x_j|| of the kept weights where W_j mu_j has the other sign

until |e| is below a threshold. That is `accept="always"`. It minimises the mean error alone: once |e| is small, its swaps add
more to the variance of the error than they take from e^2, and masks end worse than they started. The default,
`accept="error"`, looks at the squared error that these statistics let expect,

    f = e^2 + sum over removed j of W_j^2 var_j,

which is E[(dw . x)^2] where features are uncorrelated. It grows the weight that lowers f most, prunes the one that raises it
least once the other is back, and leaves the row when the two together do not lower f: after about four swaps from Wanda's
masks.

Where `accept="always"` parts from the published code: a row whose lists run out is left, where the code goes on with weights
that it must not touch, or fails; N:M groups stay whole; features without variance divide by a little instead of zero; the
threshold does not depend on the length of the calibration samples. As published, in N:M the pruned weight is the one of the
grown one's group that the starting mask's own scores rank lowest, and a swap that turns the sign of e is not made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import DsnotOptions
from ..patterns import NM, Pattern
from ..recipe import Recipe
from ..refinement import prune_linears
from ..statistics import InputNorm
from ..stream import Stream
from .wanda import score

STATISTIC = InputNorm

# Weights refined at a time: few enough that their working copies stay in the cache.
CHUNK = 1 << 18

# Columns to prune and to grow, and whether to: [R, 1] each.
Swap = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Moments:
    """Mean, variance and root mean square of a linear's inputs over the calibration tokens, each float32 [I]."""

    mean_I: Tensor
    variance_I: Tensor
    rms_I: Tensor


def prune(stream: Stream, recipe: Recipe) -> None:
    """Wanda's masks, refined: `--method wanda --refine dsnot`."""
    prune_linears(stream, recipe, STATISTIC, group="row", score=score)


def refine(
    weight_OI: Tensor, keep_OI: Tensor, importance_OI: Tensor, moments: Moments, pattern: Pattern, options: DsnotOptions
) -> Tensor:
    """Improve a keep mask by swaps within rows, or within the groups of N:M.

    Args:
        weight_OI: the dense weights, float32.
        keep_OI: the mask to start from, left as it is. Rows may differ in how many weights they keep.
        importance_OI: the scores that made that mask; with N:M and `accept="always"` they choose what to prune.
        moments: of the linear's inputs.
        pattern: what the mask obeys.
        options: all but `skip`, which is for the caller to heed.

    Returns:
        A keep mask, bool [O, I], with as many weights in every row, or in every group of N:M, as `keep_OI`.
    """
    refined_OI = keep_OI.clone()
    rows = max(CHUNK // keep_OI.shape[1], 1)
    for weight_RI, keep_RI, importance_RI in zip(
        weight_OI.split(rows), refined_OI.split(rows), importance_OI.split(rows), strict=True
    ):
        mean_RI = weight_RI * moments.mean_I
        if options.accept == "error":
            prune_RI = weight_RI.square() * moments.variance_I
            grow_RI = -prune_RI
        else:
            prune_RI = importance_RI if isinstance(pattern, NM) else weight_RI.abs() * moments.rms_I
            grow_RI = -mean_RI.abs() / _positive(moments.variance_I) ** options.variance_power
        _swap(keep_RI, mean_RI, prune_RI, grow_RI, pattern, options)
    return refined_OI


def _positive(variance_I: Tensor) -> Tensor:
    mean = variance_I.mean()
    return variance_I.clamp_min(1e-6 * torch.where(mean > 0, mean, 1.0))


def _swap(keep_RI: Tensor, mean_RI: Tensor, prune_RI: Tensor, grow_RI: Tensor, pattern: Pattern, options: DsnotOptions) -> None:
    """Swap once per cycle, all rows at a time.

    Args:
        keep_RI: changed in place.
        mean_RI: W mu.
        prune_RI: what is chosen by among kept weights, the lowest first.
        grow_RI: what is chosen by among removed weights, the lowest first.
        pattern: what `keep_RI` obeys.
        options: how to choose and when to stop.
    """
    choose = _least_error if options.accept == "error" else _published
    prune_RI = prune_RI.masked_fill(~keep_RI, torch.inf)
    grow_RI = grow_RI.masked_fill(keep_RI, torch.inf)
    error_R1 = (mean_RI * ~keep_RI).sum(dim=1, keepdim=True)
    row_R1 = torch.arange(len(keep_RI), device=keep_RI.device)[:, None]
    for _ in range(options.cycles):
        pruned_R1, grown_R1, accepted_R1 = choose(mean_RI, prune_RI, grow_RI, error_R1, pattern, options)
        if not accepted_R1.all():
            # What is chosen depends on the row's state alone: one that declines once would decline for ever.
            live_R = accepted_R1.squeeze(1).nonzero().squeeze(1)
            if not live_R.numel():
                return
            mean_RI, prune_RI, grow_RI, error_R1, row_R1, pruned_R1, grown_R1 = (
                tensor[live_R] for tensor in (mean_RI, prune_RI, grow_RI, error_R1, row_R1, pruned_R1, grown_R1)
            )
        keep_RI[row_R1, pruned_R1] = False
        keep_RI[row_R1, grown_R1] = True
        error_R1 = error_R1 + mean_RI.gather(1, pruned_R1) - mean_RI.gather(1, grown_R1)
        if options.accept == "error":  # a weight may move back: the one key is the other's negative
            grow_RI.scatter_(1, pruned_R1, -prune_RI.gather(1, pruned_R1))
            prune_RI.scatter_(1, grown_R1, -grow_RI.gather(1, grown_R1))
        prune_RI.scatter_(1, pruned_R1, torch.inf)
        grow_RI.scatter_(1, grown_R1, torch.inf)


def _least_error(
    mean_RI: Tensor, prune_RI: Tensor, grow_RI: Tensor, error_R1: Tensor, pattern: Pattern, options: DsnotOptions
) -> Swap:
    """The swap that lowers f: the weight to grow is chosen first, the one to prune given it."""
    if isinstance(pattern, NM):
        # The group whose best two weights promise most, each moved alone.
        grown_RG = _change(grow_RI, mean_RI, -error_R1).unflatten(1, (-1, pattern.m)).amin(dim=2)
        pruned_RG = _change(prune_RI, mean_RI, error_R1).unflatten(1, (-1, pattern.m)).amin(dim=2)
        column_RI = _group((grown_RG + pruned_RG).argmin(dim=1, keepdim=True), pattern)
        mean_RI, prune_RI, grow_RI = (tensor.gather(1, column_RI) for tensor in (mean_RI, prune_RI, grow_RI))
    grown_R1 = _change(grow_RI, mean_RI, -error_R1).argmin(dim=1, keepdim=True)
    back_R1 = mean_RI.gather(1, grown_R1)
    pruned_R1 = _change(prune_RI, mean_RI, error_R1 - back_R1).argmin(dim=1, keepdim=True)
    step_R1 = mean_RI.gather(1, pruned_R1) - back_R1
    change_R1 = prune_RI.gather(1, pruned_R1) + grow_RI.gather(1, grown_R1) + step_R1 * (2 * error_R1 + step_R1)
    if isinstance(pattern, NM):
        pruned_R1, grown_R1 = column_RI.gather(1, pruned_R1), column_RI.gather(1, grown_R1)
    return pruned_R1, grown_R1, change_R1 < 0


def _change(key_RI: Tensor, mean_RI: Tensor, error_R1: Tensor) -> Tensor:
    """How f changes when a single weight is removed from a row whose error is e: W^2 var + (e + W mu)^2 - e^2."""
    return torch.addcmul(key_RI, mean_RI, mean_RI + 2 * error_R1)


def _published(
    mean_RI: Tensor, prune_RI: Tensor, grow_RI: Tensor, error_R1: Tensor, pattern: Pattern, options: DsnotOptions
) -> Swap:
    """The paper's swap: the first in the order of growing and the first in the order of pruning."""
    sign_R1 = error_R1.sign()
    side_RI = mean_RI * sign_R1
    grow_R1, grown_R1 = grow_RI.masked_fill(side_RI <= 0, torch.inf).min(dim=1, keepdim=True)
    if isinstance(pattern, NM):
        column_RM = _group(grown_R1 // pattern.m, pattern)
        prune_R1, member_R1 = prune_RI.gather(1, column_RM).min(dim=1, keepdim=True)
        pruned_R1 = column_RM.gather(1, member_R1)
    else:
        prune_R1, pruned_R1 = prune_RI.masked_fill(side_RI >= 0, torch.inf).min(dim=1, keepdim=True)
    accepted_R1 = (error_R1.abs() * options.threshold_tokens > options.threshold) & (grow_R1 + prune_R1 < torch.inf)
    if options.same_sign or isinstance(pattern, NM):
        after_R1 = error_R1 + mean_RI.gather(1, pruned_R1) - mean_RI.gather(1, grown_R1)
        accepted_R1 &= after_R1.sign() == sign_R1
    return pruned_R1, grown_R1, accepted_R1


def _group(group_R1: Tensor, pattern: NM) -> Tensor:
    """The columns of one group per row, [R, M]."""
    return group_R1 * pattern.m + torch.arange(pattern.m, device=group_R1.device)
