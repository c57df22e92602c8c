"""CFSP: remove FFN channels, first deciding how many of every block, then which, from one forward of the dense model.

"CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information" (arXiv 2409.13199).
Channel i of an FFN is row i of gate and up with column i of down; u_i is what down reads there.

1. Coarse: a block matters as much as it turns the hidden states, B_l = mean over tokens of arccos(cos(x, y)) / pi between its
   input x and output y. A sigmoid of B_l makes it the share of channels that the block keeps (`allocation.keep_ratios`);
   widths are multiples of `--multiple-of` that meet the budget (`allocation.widths`).
2. Fine: in every block the channels of the highest score stay, a_i being the root mean square of u_i:

   wanda_sp      a_i mean_j |W_d,ji|
   act           a_i: what the published code's score comes to, whatever its options (its normalised weights sum to one)
   rel           a_i times the mean over hidden coordinates j of the channel's share in |W_d,ji| a_i, |W_u,ij| and |W_g,ij|: the
                 relative importances of the paper's equation 8, taken across channels
   out_energy    a_i^2 sum_j W_d,ji^2: what the output loses with channel i, were channels uncorrelated
   wifv          Var(u_i) sum_j W_d,ji^2 (FLAP, arXiv 2312.11983), to go with `--compensate bias`
   magnitude, random      baselines

3. `--compensate bias` adds what the removed channels give on average to down's bias; `lstsq` fits the kept columns of down to
   what the FFN gave before (equation 3 of `elimination`), on the inputs that come from pruned blocks, which takes one more
   forward.

Experts have one width in stock classes, so of a mixture of experts every one keeps as many channels, its own by the tokens that
were routed to it: step 2 alone, and by magnitude where they are fewer than `--min-expert-tokens`. The expert that all tokens go
through is cut likewise (see `mixture`), dense blocks are not.

The published code keeps one channel too many, leaves a block dense that should keep less than 64 channels, and its importances
depend on the number of calibration tokens; here budgets are met exactly and importances are means.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .. import allocation, reconstruction
from ..anatomy import Kept
from ..anatomy import anatomy as anatomy_of
from ..elimination import restricted
from ..expert_surgery import ExpertSurgeon, KeptExperts
from ..mixture import mixture_of
from ..models import Linear, Skeleton
from ..recipe import Recipe
from ..refinement import is_starved
from ..statistics import CrossHessian, Hessian, Moments
from ..stream import Block, Stream
from ..structure import Surgeon, fit, has_experts, plan_of, share_to_remove

STATISTIC = Moments
# Metrics that need no token.
UNSEEING = ("magnitude", "random")


def prune(stream: Stream, recipe: Recipe) -> None:
    if has_experts(stream.skeleton):
        narrow_experts(stream, recipe)
        return
    importance_B, score_BD, mean_BD = looked_at(stream, recipe)
    given = plan_of(recipe, stream.skeleton)
    kept_B = list(given.blocks) if given else chosen(stream.skeleton, recipe, importance_B, score_BD)
    surgeon = stream.operate(Surgeon(stream.skeleton, recipe, kept_B))
    for block in stream.blocks(forward=recipe.compensate == "lstsq"):
        block.notes["importance"] = importance_B[block.index]
        kept = kept_B[block.index]
        if recipe.compensate == "lstsq":
            fit_down(block, surgeon, kept, recipe)
        else:
            if recipe.compensate == "bias" and len(mean_BD[block.index]):
                surgeon.make_up(block, lost_on_average(down_of(block), mean_BD[block.index], kept))
            surgeon.cut(block, kept)


def chosen(skeleton: Skeleton, recipe: Recipe, importance_B: Sequence[float], score_BD: Sequence[Tensor]) -> list[Kept]:
    """How many channels of every block stay, and which."""
    anatomy = anatomy_of(skeleton.config)
    kept_B = [sizes.everything() for sizes in anatomy.blocks]
    # A model that was pruned before may have blocks without an FFN.
    able = [block for block, sizes in enumerate(anatomy.blocks) if sizes.channels]
    dense = [anatomy.blocks[block].channels for block in able]
    removed = share_to_remove(recipe, skeleton)
    gain = 0.0 if recipe.allocation == "uniform" else 1.0
    ratios = allocation.keep_ratios([importance_B[block] for block in able], removed, gain=gain)
    multiple = recipe.multiple_of or allocation.width_multiple(min(dense))
    widths = allocation.widths(ratios, dense, (1 - removed) * sum(dense), multiple=multiple)
    for block, width in zip(able, widths, strict=True):
        kept_B[block] = Kept(highest(score_BD[block], width), kept_B[block].heads)
    return kept_B


def narrow_experts(stream: Stream, recipe: Recipe) -> None:
    """Every expert keeps as many channels, the shared one in proportion: those of the highest scores."""
    whole = mixture_of(stream.skeleton)
    left = whole.narrowed(share_to_remove(recipe, stream.skeleton), recipe.multiple_of)
    score, tokens = experts_looked_at(stream, recipe)
    kept_B = []
    for index in whole.blocks:
        downs = [linear for linear in stream.skeleton.linears[index] if linear.role == "down"]
        channels = tuple(highest(score[down.name], left.width) for down in downs if down.expert is not None)
        shared = [highest(score[down.name], left.shared) for down in downs if down.expert is None]
        kept_B.append(KeptExperts(tuple(range(whole.experts)), channels, shared[0] if shared else None))
    surgeon = stream.operate(ExpertSurgeon(stream.skeleton, recipe, kept_B))
    for block in stream.blocks(forward=False):
        if block.index in whole.blocks:
            surgeon.cut(block, surgeon.kept[block.index])
        for linear in block.linears:
            if linear.expert is not None:
                linear.facts["tokens"] = seen = tokens[block.index][linear.expert]
                if recipe.metric not in UNSEEING and seen < recipe.min_expert_tokens:
                    linear.facts["fallback"] = "magnitude"


def experts_looked_at(stream: Stream, recipe: Recipe) -> tuple[dict[str, Tensor], list[list[int]]]:
    """What one forward of the dense model shows, or showed before this run was interrupted.

    Returns:
        The scores of the channels of every expert, float32 [D], by the name of its down, and of every block the tokens of each
        expert, none where a block has no experts.
    """
    saved = stream.output.read_progress() if stream.output else None
    if saved is None:
        found: dict[str, Tensor] = {}
        tokens_B: list[list[int]] = []
        for block in stream.survey().blocks():
            tokens_B.append([])
            if all(linear.expert is None for linear in block.linears):
                continue
            for down, inputs in block.observe(Moments, {"down"}):
                starved = recipe.metric not in UNSEEING and is_starved(down, inputs, recipe)
                known = recipe.model_copy(update={"metric": "magnitude"}) if starved else recipe
                found[down.name] = score(block, down, inputs, known).cpu()
                if down.expert is not None:
                    tokens_B[-1].append(inputs.seen)
        saved = found, {"tokens": tokens_B}
        if stream.output and stream.ranks.is_main:
            stream.output.write_progress(*saved)
    scores, facts = saved
    return scores, cast(list[list[int]], facts["tokens"])


def looked_at(stream: Stream, recipe: Recipe) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """What one forward of the dense model shows, or showed before this run was interrupted.

    Returns:
        Of every block its importance, its channels' scores, float32 [D], and the means of what down reads, float32 [D].
    """
    saved = stream.output.read_progress() if stream.output else None
    if saved is None:
        tensors: dict[str, Tensor] = {}
        importance_B = []
        for block in stream.survey().blocks():
            tensors |= {f"{key}.{block.index}": torch.zeros(0) for key in ("score", "mean")}
            for down, inputs in block.observe(Moments, {"down"}):
                tensors[f"score.{block.index}"] = score(block, down, inputs, recipe).cpu()
                tensors[f"mean.{block.index}"] = inputs.mean_I.cpu()
            importance_B.append(block.measure_importance())
        saved = tensors, {"importance": importance_B}
        if stream.output and stream.ranks.is_main:
            stream.output.write_progress(*saved)
    tensors, facts = saved
    blocks = range(len(stream.skeleton.blocks))
    return list(facts["importance"]), [tensors[f"score.{i}"] for i in blocks], [tensors[f"mean.{i}"] for i in blocks]  # type: ignore[call-overload]


def score(block: Block, down: Linear, inputs: Moments, recipe: Recipe) -> Tensor:
    """How much every channel matters, float32 [D]: the list above."""
    weight_JD, rms_D = down.weight_OI, inputs.rms_I
    match recipe.metric:
        case "act":
            return rms_D
        case "wanda_sp":
            return rms_D * weight_JD.abs().mean(dim=0)
        case "out_energy":
            return rms_D.square() * weight_JD.square().sum(dim=0)
        case "wifv":
            return inputs.variance_I * weight_JD.square().sum(dim=0)
        case "magnitude":
            return weight_JD.norm(dim=0)
        case "random":
            seed = hashlib.sha256(f"{recipe.seed}:{down.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little", signed=True))
            return torch.rand(len(rms_D), generator=generator).to(rms_D.device)
        case "rel":
            shares_DJ = [shares(weight_JD.T.abs() * rms_D[:, None])]
            for linear in block.linears:
                if linear.role in ("gate", "up", "gate_up") and owner(linear) == owner(down):
                    shares_DJ += [shares(half.abs()) for half in linear.weight_OI.split(len(rms_D))]
            return rms_D * torch.stack([share_DJ.mean(dim=1) for share_DJ in shares_DJ]).sum(dim=0)
    raise AssertionError(f"{recipe.metric} scores experts")


def owner(linear: Linear) -> str:
    """The name of the FFN or expert that a linear is part of."""
    return linear.name.rpartition(".")[0]


def shares(size_DJ: Tensor) -> Tensor:
    """Of every hidden coordinate, how much of it each channel has; [D, J], columns that sum to one, or to zero."""
    return size_DJ / size_DJ.sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny)


def highest(score_D: Tensor, count: int) -> tuple[int, ...]:
    """The channels with the highest scores, ascending; of equal ones the first."""
    return tuple(sorted((-score_D).argsort(stable=True)[:count].tolist()))


def down_of(block: Block) -> Linear:
    return next(linear for linear in block.linears if linear.role == "down")


def lost_on_average(down: Linear, mean_D: Tensor, kept: Kept) -> Tensor:
    """What the removed channels add to down's output on average, float32 [O]."""
    gone_D = torch.ones(len(mean_D), dtype=torch.bool)
    gone_D[list(kept.channels)] = False
    return down.weight_OI.cpu()[:, gone_D] @ mean_D[gone_D]


def fit_down(block: Block, surgeon: Surgeon, kept: Kept, recipe: Recipe) -> None:
    """Cut the block, its kept columns of down fitted to what all of them gave."""
    surgeon.cut(block, Kept(surgeon.anatomy.blocks[block.index].everything().channels, kept.heads))
    kind = CrossHessian if recipe.match == "dense" else Hessian
    assert recipe.damping
    for down, inputs in block.observe(kind, {"down"}):
        hessian_II, target_OI = inputs.mean_II, down.weight_OI
        if isinstance(inputs, CrossHessian):
            target_OI = reconstruction.dense_target(target_OI, inputs.missing_OI(target_OI), hessian_II, recipe.damping)
        damped_II = reconstruction.damped(hessian_II, recipe.damping)
        keep_K = torch.tensor(kept.channels, dtype=torch.int64, device=target_OI.device)
        weight_OK = restricted(target_OI, damped_II, keep_K, 0.0)
        surgeon.cut(block, kept)
        fit(down, weight_OK, keep_K)
        down.facts["error"] = reconstruction.relative_error(down.weight_OI, target_OI, hessian_II)
