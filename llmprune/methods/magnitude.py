"""Magnitude: remove the weights with the smallest absolute value; needs no data.

The oldest baseline (Han et al. 2015, "Learning both Weights and Connections", section 3). As in the Wanda paper's table 2, the
weights of one matrix compete with each other unless `--group row` is given. The published codes remove one weight too
many (an inclusive threshold at index k); here exactly floor(size * sparsity) go.
"""

from __future__ import annotations

from ..recipe import Recipe
from ..stream import Stream

STATISTIC = None


def prune(stream: Stream, recipe: Recipe) -> None:
    pattern = recipe.competition(default="layer")
    for block in stream.blocks():
        for linear in block.linears:
            linear.keep(pattern.keep(linear.weight_OI.abs()))
