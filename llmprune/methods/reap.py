"""REAP: drop the experts that add least to their layer, by router weight times output norm, in one forward of the dense model.

"REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression" (Lasby et al. 2025, arXiv 2510.13999). Over the tokens X_j
that a layer's router sends to its expert j, with the weight g_j(x) by which the layer multiplies the expert's output f_j(x),

    S_j = 1 / |X_j|  sum over x in X_j of  g_j(x) ||f_j(x)||_2

Of every layer the experts of the lowest S_j go, the same number everywhere; of equal ones the first. The router loses their
rows and so chooses among those that stay. Where it chooses among groups of experts first (DeepSeek), every group loses as many.

An expert that no token was sent to has S_j = 0. Baselines are `--metric frequency`, |X_j|, and `--metric random`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..expert_surgery import ExpertSurgeon, KeptExperts
from ..experts import Experts
from ..mixture import mixture_of
from ..patterns import lowest
from ..recipe import Recipe
from ..statistics import InputNorm
from ..stream import Block, Stream
from ..structure import share_to_remove

# Nothing of a linear's input: `Routed` is about whole experts.
STATISTIC = InputNorm


class Routed:
    """Of every expert of a layer how many tokens it got, and the sum of S_j over them.

    A sample's part is rounded to float32 and added in float64, so that the order of samples does not matter.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        self.tokens_E = torch.zeros(experts, dtype=torch.int64, device=device)
        self.sums_E = torch.zeros(experts, dtype=torch.float64, device=device)

    def update(self, expert: int, output_RI: Tensor, weight_R: Tensor, sizes: list[int]) -> None:
        """Add an expert's outputs for its tokens, the router's weights for them, and how many of them are each sample's."""
        product_R = weight_R.float() * output_RI.float().norm(dim=-1)
        for product_S in product_R.split(sizes):
            self.sums_E[expert] += product_S.double().sum().float()
        self.tokens_E[expert] += len(output_RI)

    @property
    def saliency_E(self) -> Tensor:
        """S_j, float64 [experts]."""
        return self.sums_E / self.tokens_E.clamp_min(1)


def prune(stream: Stream, recipe: Recipe) -> None:
    skeleton = stream.skeleton
    whole = mixture_of(skeleton)
    # A share is met from below, a number of parameters to end with too.
    left = whole.without_experts(share_to_remove(recipe, skeleton), at_least=recipe.of == "model")
    surgeon = stream.operate(ExpertSurgeon(skeleton, recipe, finished(stream)))
    stream.keep_last = True  # The last layer's experts are looked at as well.
    for block in stream.blocks():
        if block.index not in whole.blocks:
            continue
        with watched(block) as routed:
            block.advance()
        for tensor in (routed.tokens_E, routed.sums_E):
            stream.ranks.sum(tensor)
        score_GE = score(routed, block, recipe).view(whole.groups, -1)
        gone_E = lowest(score_GE, (whole.experts - left.experts) // whole.groups).flatten()
        kept = tuple((~gone_E).nonzero().flatten().tolist())
        surgeon.cut(block, KeptExperts(kept))
        block.notes["experts"] = {
            "kept": list(kept),
            "tokens": routed.tokens_E.tolist(),
            "saliency": routed.saliency_E.tolist(),
        }


def score(routed: Routed, block: Block, recipe: Recipe) -> Tensor:
    """What decides which experts stay, float64 [experts]."""
    if recipe.metric == "frequency":
        return routed.tokens_E.double()
    if recipe.metric == "random":
        seed = hashlib.sha256(f"{recipe.seed}:experts:{block.index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little", signed=True))
        return torch.rand(len(routed.tokens_E), generator=generator, dtype=torch.float64)
    return routed.saliency_E


@contextmanager
def watched(block: Block) -> Iterator[Routed]:
    """Inside, what the block's experts give for the samples that run through it is summed up."""
    (experts,) = (module for module in block.stream.skeleton.blocks[block.index].modules() if isinstance(module, Experts))
    routed = Routed(len(experts), block.stream.skeleton.device)
    chosen_NK = weights_NK = torch.empty(0)

    def note_weights(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal chosen_NK, weights_NK
        _, chosen_NK, weights_NK = args

    def see(number: int, module: nn.Module, args: tuple[Tensor, list[int]], output_RI: Tensor) -> None:
        routed.update(number, output_RI, weights_NK[chosen_NK == number], args[1])

    handles = [experts.register_forward_pre_hook(note_weights)]
    handles += [expert.register_forward_hook(partial(see, number)) for number, expert in enumerate(experts)]
    try:
        yield routed
    finally:
        for handle in handles:
            handle.remove()


def finished(stream: Stream) -> list[KeptExperts]:
    """What an earlier run has kept of the blocks that it finished."""
    facts_B = stream.output.block_facts(stream.output.finished_blocks) if stream.output else []
    notes = [cast(dict[str, list[int]], facts["experts"]) for facts in facts_B if "experts" in facts]
    return [KeptExperts(tuple(note["kept"])) for note in notes]
