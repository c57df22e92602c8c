"""Magnitude: remove the weights with the smallest absolute value; needs no data.

The oldest baseline (Han et al. 2015, "Learning both Weights and Connections", section 3). As in the Wanda paper's table 2, the
weights of one matrix compete with each other unless `--group row` is given. The published codes remove one weight too
many (an inclusive threshold at index k); here exactly floor(size * sparsity) go.
"""

from __future__ import annotations

from torch import Tensor

from ..models import Linear
from ..recipe import Recipe
from ..refinement import prune_linears
from ..statistics import Statistic
from ..stream import Stream

STATISTIC = None


def prune(stream: Stream, recipe: Recipe) -> None:
    prune_linears(stream, recipe, STATISTIC, group="layer", score=score)


def score(linear: Linear, inputs: Statistic | None) -> Tensor:
    """|W_ij|, float32 [O, I]."""
    return linear.weight_OI.abs()
