"""Random: remove weights drawn uniformly; the floor any method has to beat. Needs no data.

Each linear's draw is seeded by the recipe's seed and the linear's name, so that it does not depend on the order in which
linears are visited or on where a run was resumed.
"""

from __future__ import annotations

import hashlib

import torch

from ..recipe import Recipe
from ..stream import Stream

STATISTIC = None


def prune(stream: Stream, recipe: Recipe) -> None:
    pattern = recipe.competition(default="row")
    for block in stream.blocks():
        for linear in block.linears:
            digest = hashlib.sha256(f"{recipe.seed}:{linear.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            score_OI = torch.rand(linear.shape, generator=generator)
            linear.keep(pattern.keep(score_OI).to(linear.parameter.device))
