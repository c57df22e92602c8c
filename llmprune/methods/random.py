"""Random: remove weights drawn uniformly; the floor any method has to beat. Needs no data.

Each linear's draw is seeded by the recipe's seed and the linear's name, so that it does not depend on the order in which
linears are visited or on where a run was resumed.
"""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from torch import Tensor

from ..models import Linear
from ..recipe import Recipe
from ..refinement import prune_linears
from ..statistics import Statistic
from ..stream import Stream

STATISTIC = None


def prune(stream: Stream, recipe: Recipe) -> None:
    prune_linears(stream, recipe, STATISTIC, group="row", score=partial(score, recipe.seed))


def score(seed: int, linear: Linear, inputs: Statistic | None) -> Tensor:
    """Uniform in [0, 1), float32 [O, I]."""
    digest = hashlib.sha256(f"{seed}:{linear.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(linear.shape, generator=generator).to(linear.parameter.device)
