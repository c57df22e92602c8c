"""Best: the best quality this toolkit finds without training; least squares that choose the mask, matched to the dense model.

`--method best` stands for `--method wanda --group layer --allocation block-influence --sequential sublayer --match dense
--reconstruct lstsq --rounds 15` (with N:M, every block loses the same):

1. Blocks that change the hidden states most are pruned least (`allocation`), and Wanda's scores start the masks.
2. Each linear is fitted to what the dense model has in its place, on the pruned model's inputs, with what the residual stream
   has lost before it added where its output enters the stream (`reconstruction.dense_target`), so that it makes up for the
   linears before it.
3. Mask and weights of that fit are chosen together (`reconstruction.alternate`).
4. The kept weights solve their least squares (`reconstruction.least_squares`).

Each of these is an option of its own; what they are worth, one by one, is in `evals/LOG.md`.
"""

from __future__ import annotations

from ..recipe import Recipe
from ..refinement import prune_linears
from ..statistics import InputNorm
from ..stream import Stream
from .wanda import score

STATISTIC = InputNorm


def prune(stream: Stream, recipe: Recipe) -> None:
    prune_linears(stream, recipe, STATISTIC, group="layer", score=score)
