"""Wanda: in every output row, remove the weights with the smallest |W| * ||x||.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695), section 3:

    S_ij = |W_ij| * ||X_j||_2                                                             (equation 1)

with X_j the j-th input feature over all calibration tokens. Scores are compared within each output row, each row loses the
same share, and nothing is updated. Dividing ||X_j|| by the square root of the number of tokens changes no comparison and
keeps the score in the weight's own units.
"""

from __future__ import annotations

from ..recipe import Recipe
from ..statistics import InputNorm, outlier_ratio
from ..stream import Stream

STATISTIC = InputNorm


def prune(stream: Stream, recipe: Recipe) -> None:
    pattern = recipe.competition(default="row")
    for block in stream.blocks():
        for linear, norm in block.observe(InputNorm):
            score_OI = linear.weight_OI.abs() * norm.rms_I
            linear.keep(pattern.keep(score_OI))
            linear.facts["outlier_ratio"] = outlier_ratio(score_OI)
            del score_OI  # before the next matrix's scores are made
