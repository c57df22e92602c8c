"""Wanda: in every output row, remove the weights with the smallest |W| * ||x||.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695), section 3:

    S_ij = |W_ij| * ||X_j||_2                                                             (equation 1)

with X_j the j-th input feature over all calibration tokens. Scores are compared within each output row, each row loses the
same share, and nothing is updated. Dividing ||X_j|| by the square root of the number of tokens changes no comparison and
keeps the score in the weight's own units.
"""

from __future__ import annotations

from torch import Tensor

from ..models import Linear
from ..recipe import Recipe
from ..refinement import prune_linears
from ..statistics import Hessian, InputNorm, Statistic, outlier_ratio
from ..stream import Stream

STATISTIC = InputNorm


def prune(stream: Stream, recipe: Recipe) -> None:
    prune_linears(stream, recipe, STATISTIC, group="row", score=score)


def score(linear: Linear, inputs: Statistic | None) -> Tensor:
    """|W_ij| ||X_j||, float32 [O, I], per square root of a token."""
    assert isinstance(inputs, InputNorm | Hessian)
    score_OI = linear.weight_OI.abs() * inputs.rms_I
    linear.facts["outlier_ratio"] = outlier_ratio(score_OI)
    return score_OI
