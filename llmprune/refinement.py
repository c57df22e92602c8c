"""What happens to a linear once a method has scored its weights: a mask, a better mask, and weights that make up for it.

    keep = pattern.keep(score)          the method's own choice
    keep = refined(keep, ...)           `refine`: DSnoT's or iCBS's swaps
    weight = reconstructed(keep, ...)   `reconstruct`: what is kept is fitted anew

The parts compose: any method's mask can be refined, any mask's weights reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from . import layerwise, reconstruction
from .models import Linear
from .patterns import Pattern
from .recipe import Group, Recipe
from .statistics import CrossHessian, Hessian, Moments, SplitHessian, Statistic
from .stream import Block, Stream

Score = Callable[[Linear, Statistic | None], Tensor]

# With fewer tokens for each input of an expert's linear, SparseGPT's updates raise the error on other tokens above that of
# magnitude's mask, where Wanda's is lower (evals/bench/results/expert_tokens.csv).
FITTED_TOKENS = 2


def observed(own: type[Statistic] | None, recipe: Recipe) -> type[Statistic] | None:
    """What a run gathers at every linear's input: the least that has what its method, refinement and reconstruction look at."""
    if recipe.match == "dense":
        return CrossHessian
    if recipe.refine == "icbs" or recipe.reconstruct == "lstsq":
        return SplitHessian
    if recipe.reconstruct == "sparsegpt" and (own is not Hessian or recipe.refine == "dsnot"):
        return SplitHessian
    if recipe.refine == "dsnot":
        return Moments if own is not Hessian else SplitHessian
    return own


def prune_linears(stream: Stream, recipe: Recipe, own: type[Statistic] | None, *, group: Group, score: Score) -> None:
    """Score, mask, refine and reconstruct every linear.

    Args:
        own: the statistic that `score` needs.
        group: which weights compete, where the recipe does not say.
        score: of a linear with its inputs' statistic, float32 [O, I]; the lowest go.
    """
    for block in stream.blocks():
        pattern = recipe.competition(default=group, sparsity=block.sparsity)
        for linear, inputs in _pairs(block, observed(own, recipe)):
            if fell_back(linear, inputs, pattern, recipe):
                continue
            score_OI = score(linear, inputs)
            finish(linear, pattern.keep(score_OI), score_OI, inputs, pattern, recipe)
            del score_OI  # before the next matrix's scores are made


def fell_back(linear: Linear, inputs: Statistic | None, pattern: Pattern, recipe: Recipe) -> bool:
    """Prune an expert's linear by a simpler rule, if the expert saw too few tokens for the method.

    By magnitude where they say nothing of the inputs' norms, by Wanda's scores where SparseGPT's updates would be fitted to
    them. What is kept stays as it is. Returns whether it was so.
    """
    if is_starved(linear, inputs, recipe):
        linear.facts["fallback"] = "magnitude"
        linear.keep(pattern.keep(linear.weight_OI.abs()))
        return True
    if linear.expert is None or recipe.reconstruct != "sparsegpt":
        return False
    assert isinstance(inputs, Hessian)
    if inputs.seen >= FITTED_TOKENS * linear.shape[1]:
        return False
    linear.facts["fallback"] = "wanda"
    linear.keep(pattern.keep(linear.weight_OI.abs() * inputs.rms_I))
    return True


def is_starved(linear: Linear, inputs: Statistic | None, recipe: Recipe) -> bool:
    """Whether a linear is of an expert that saw fewer tokens than the recipe asks for."""
    return linear.expert is not None and inputs is not None and inputs.seen < recipe.min_expert_tokens


def _pairs(block: Block, kind: type[Statistic] | None) -> Iterator[tuple[Linear, Statistic | None]]:
    return block.observe(kind) if kind else ((linear, None) for linear in block.linears)


def refined(
    linear: Linear,
    keep_OI: Tensor,
    score_OI: Tensor,
    inputs: Statistic | None,
    pattern: Pattern,
    recipe: Recipe,
    target_OI: Tensor | None = None,
) -> Tensor:
    """The method's mask, or what the recipe's refinement makes of it: bool [O, I].

    Args:
        keep_OI: the mask, left as it is.
        score_OI: what it was chosen by.
        inputs: an `observed` statistic.
        pattern: what the mask obeys.
        target_OI: what the linear is to come close to, where it is not its own weights.
    """
    from .methods import dsnot  # whose own `prune` comes through here

    weight_OI = linear.weight_OI
    if recipe.dsnot and linear.role not in recipe.dsnot.skip:
        assert isinstance(inputs, Moments | SplitHessian)
        moments = dsnot.Moments(inputs.mean_I, inputs.variance_I, inputs.rms_I)
        return dsnot.refine(weight_OI, keep_OI, score_OI, moments, pattern, recipe.dsnot)
    if recipe.refine == "icbs":
        assert isinstance(inputs, SplitHessian)
        assert recipe.damping
        target_OI = weight_OI if target_OI is None else target_OI
        if recipe.reconstruct != "none":  # what is kept will be fitted to the target
            weight_OI = target_OI
        damped_II = reconstruction.damped(inputs.mean_II, recipe.damping)
        better_OI = layerwise.swap(weight_OI, keep_OI, damped_II, pattern, target_OI)
        if inputs.fresh.tokens > 0:
            # A row that comes out worse on tokens that it was not fitted to stays as it was.
            fresh_II = inputs.fresh.mean_II
            after_O, before_O = (_row_errors(target_OI - weight_OI * each, fresh_II) for each in (better_OI, keep_OI))
            worse_O = after_O > before_O
            better_OI[worse_O] = keep_OI[worse_O]
            linear.facts["rows_refused"] = int(worse_O.sum())
        return better_OI
    return keep_OI


def finish(
    linear: Linear, start_OI: Tensor, score_OI: Tensor, inputs: Statistic | None, pattern: Pattern, recipe: Recipe
) -> None:
    """Take a linear from its method's mask to what is saved, and note the errors for the record.

    Args:
        start_OI: the mask, bool [O, I].
        score_OI, inputs, pattern: as for `refined`.
    """
    if not isinstance(inputs, SplitHessian):
        linear.keep(refined(linear, start_OI, score_OI, inputs, pattern, recipe))
        return
    dense_OI = target_OI = linear.weight_OI
    hessian_II, fresh_II = inputs.mean_II, inputs.fresh.mean_II
    if isinstance(inputs, CrossHessian):
        assert recipe.damping
        target_OI = reconstruction.dense_target(dense_OI, inputs.missing_OI(dense_OI), hessian_II, recipe.damping)
    keep_OI = refined(linear, start_OI, score_OI, inputs, pattern, recipe, target_OI)
    if recipe.reconstruct == "none":
        pruned_OI = dense_OI * keep_OI
    else:
        pruned_OI = _reconstructed(target_OI, keep_OI, hessian_II, pattern, recipe)
    linear.facts["error"] = reconstruction.relative_error(pruned_OI, target_OI, hessian_II)
    if inputs.fresh.tokens > 0:
        linear.facts["fresh_error"] = reconstruction.relative_error(pruned_OI, target_OI, fresh_II)
        start_OI = start_OI * (dense_OI if recipe.reconstruct == "none" else target_OI)
        linear.facts["start_fresh_error"] = reconstruction.relative_error(start_OI, target_OI, fresh_II)
    if recipe.reconstruct == "none":
        linear.keep(keep_OI)
    else:
        linear.replace(pruned_OI)


def _reconstructed(target_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor, pattern: Pattern, recipe: Recipe) -> Tensor:
    """What the kept weights become, float32 [O, I]."""
    from .methods import sparsegpt

    if recipe.reconstruct == "sparsegpt":
        return sparsegpt.solve(target_OI, sparsegpt.inverse_factor(hessian_II), keep_OI)
    assert recipe.damping
    damped_II = reconstruction.damped(hessian_II, recipe.damping)
    guess_OI = None
    if recipe.rounds:
        keep_OI, guess_OI = reconstruction.alternate(target_OI, keep_OI, damped_II, pattern, recipe.rounds)
    return reconstruction.least_squares(target_OI, keep_OI, damped_II, guess_OI)


def _row_errors(lost_OI: Tensor, hessian_II: Tensor) -> Tensor:
    return (lost_OI @ hessian_II).mul_(lost_OI).sum(dim=1)
