"""How a sparsity of single weights is shared among blocks, found by search: `--allocation searched`.

The search is Týr's (`evolution`; before it EvoPress's, arXiv 2410.14649), a position is a block, and a level is so much more or
less of its weights removed by Wanda's scores on the dense model's activations. Masks of one ranking are nested, so one byte per
weight, how many levels keep it, is a block at all its levels. Whatever method then prunes uses the shares alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from .candidates import Candidates
from .evolution import Candidate, Space, State
from .models import Skeleton
from .options import SearchOptions
from .output import Output
from .ranks import Ranks
from .recipe import Recipe
from .refinement import is_starved
from .statistics import InputNorm
from .stream import Stream

# Of the options' interval: single weights are many, and blocks differ less in how many of them they can lose.
FINER = 4
LARGEST = 0.95


class Masked(Candidates):
    """The dense model with every block masked at a level of its own."""

    def __init__(self, skeleton: Skeleton, ids_NT: Tensor, rms: dict[str, Tensor], *, top_k: int, ranks: Ranks) -> None:
        """`rms`: of every linear's inputs, by the linear's name, float32 [I]."""
        super().__init__(skeleton, ids_NT, len(skeleton.blocks), top_k=top_k, ranks=ranks)
        self.rms = rms
        self.kept_by: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}
        self.lowest: list[int] = []

    def rank(self, sparsities: list[list[float]], lowest: list[int], recipe: Recipe) -> None:
        """Count for every weight the levels that keep it.

        Args:
            sparsities: of every block, at its levels, ascending.
            lowest: the number of every block's first level.
            recipe: says which weights compete.
        """
        self.lowest = lowest
        for block, linears in enumerate(self.skeleton.linears):
            for linear in linears:
                weight = self.skeleton.checkpoint.read(self.skeleton.stored_names[f"{linear.name}.weight"])
                score_OI = (weight.T if linear.transposed else weight).float().abs() * self.rms[linear.name].cpu()
                count_OI = torch.zeros(score_OI.shape, dtype=torch.uint8 if len(sparsities[block]) < 256 else torch.int16)
                for sparsity in sparsities[block]:
                    count_OI += recipe.competition(default="row", sparsity=sparsity).keep(score_OI)
                count = count_OI.T.contiguous() if linear.transposed else count_OI
                self.kept_by[linear.name] = count.to(self.skeleton.device)

    def apply(self, position: int, level: int | None) -> None:
        for linear in self.skeleton.linears[position]:
            name = f"{linear.name}.weight"
            dense = self.dense.setdefault(name, linear.parameter.data)
            if level is None:
                self.assign(name, dense)
            else:
                self.assign(name, dense * (self.kept_by[linear.name] > level - self.lowest[position]))


def search_sparsities(
    skeleton: Skeleton,
    ids_NT: Tensor,
    recipe: Recipe,
    *,
    output: Output | None,
    stream: Stream,
    advance_progress: Callable[[str], None],
) -> tuple[list[float], list[dict[str, object]]]:
    """Sparsity of every block, and how the search went.

    Args:
        ids_NT: the calibration set, of all ranks.
        recipe: the target and `search`.
        output: keeps where the search is, so that it goes on there.
        stream: gives every linear's inputs, on this rank's samples.
        advance_progress: called once per block that is looked at and per generation.

    Raises:
        LLMPruneError: no sample is left to judge by, or the model does not fit in memory.
    """
    options = recipe.search
    assert options
    saved = output.read_progress() if output else None
    facts: dict[str, object] = saved[1] if saved else {}
    centre = cast("list[float]", facts.get("sparsities") or [recipe.target] * len(skeleton.blocks))
    history = cast("list[dict[str, object]]", facts.get("history") or [])
    state = State.from_json(cast("dict[str, object]", facts["state"])) if facts.get("state") else None
    if len(history) == options.iterations:
        return centre, history
    rms = {}
    for block in stream.survey().blocks():
        for linear, inputs in block.observe(InputNorm):
            rms[linear.name] = torch.ones_like(inputs.rms_I) if is_starved(linear, inputs, recipe) else inputs.rms_I
    candidates = Masked(skeleton, ids_NT, rms, top_k=options.top_k, ranks=stream.ranks)

    def keep(latest: State | None) -> None:
        if output and stream.ranks.is_main:
            written = latest.as_json() if latest else None
            output.write_progress({}, {"sparsities": centre, "history": history, "state": written})

    def save(latest: State) -> None:
        keep(latest)
        advance_progress(f"iteration {len(history) + 1}, generation {len(latest.history)}")

    for iteration in range(len(history), options.iterations):
        interval = options.interval / FINER / 2**iteration
        space, sparsities = spread(skeleton, centre, interval, options)
        candidates.rank(sparsities, list(space.lowest), recipe)
        start: Candidate = (0,) * len(centre)
        seed = recipe.seed + iteration
        best, account = candidates.search(space, start, options, seed=seed, on_generation=save, resume=state)
        after = [levels[level - low] for levels, level, low in zip(sparsities, best, space.lowest, strict=True)]
        summary: dict[str, object] = {"sparsities": {"before": centre, "after": after}, **account}
        centre, history, state = after, [*history, summary], None
        keep(None)
    return centre, history


def spread(skeleton: Skeleton, centre: list[float], interval: float, options: SearchOptions) -> tuple[Space, list[list[float]]]:
    """Levels around the present sparsities, and the sparsity of each."""
    reach = options.levels // 2
    sparsities, lowest = [], []
    for sparsity in centre:
        # Where more than the largest is asked for already, no block loses more than that.
        largest = max(LARGEST, sparsity)
        levels = [z for z in range(-reach, reach + 1) if 0 <= sparsity + z * interval <= largest]
        lowest.append(levels[0])
        # Decimals that a recipe could say, so that nothing hangs on the last bits of a sum.
        sparsities.append([round(sparsity + z * interval, 6) for z in levels])
    sizes = tuple(sum(linear.numel for linear in linears) for linears in skeleton.linears)
    highest = tuple(low + len(levels) - 1 for low, levels in zip(lowest, sparsities, strict=True))
    slack = 0 if len(set(sizes)) == 1 else min(sizes) - 1
    return Space(("block",) * len(centre), tuple(lowest), highest, sizes, slack), sparsities
