"""How many experts a model's blocks have, how wide they are, and what may go of them.

Stock classes have one number of experts and one width for all layers: every layer keeps as many experts, and every expert as
many channels. Blocks without experts stay as they are.

Some families send every token through one more expert, which is shared. It is no choice of the router's and cannot be dropped;
of its channels goes the same share as of the others', because DeepSeek's configuration has one width for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .allocation import width_multiple, widths
from .errors import LLMPruneError
from .models import Skeleton
from .patterns import removed_count
from .recipe import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Where configurations say how many experts there are.
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
SHARED_WIDTH = "shared_expert_intermediate_size"
# transformers runs all experts in one grouped product, whose rows have to take multiples of 16 bytes: so many channels in the
# dtypes of 16 bits.
ALIGNED = 8


@dataclass(frozen=True)
class Mixture:
    """The experts of a model.

    Args:
        family: the model type.
        hidden: the hidden size.
        blocks: numbers of the blocks that have experts; all of them have the same.
        experts, width: how many, and FFN channels of each.
        shared: channels of the expert that all tokens go through; 0 without one.
        top: experts of a token.
        groups: the router first takes some of so many groups of experts that follow each other; 1 where it does not.
        fewest: experts that a group has to keep for the router to work.
    """

    family: str
    hidden: int
    blocks: tuple[int, ...]
    experts: int
    width: int
    shared: int
    top: int
    groups: int
    fewest: int

    def without_experts(self, share: float, *, at_least: bool = False) -> Mixture:
        """The mixture that is left when a share of every layer's experts goes, rounded down, or up with `at_least`.

        Raises:
            LLMPruneError: the groups of the router would become unequal, or too few experts would be left.
        """
        count, most = removed_count(self.experts, share), self.experts - self.fewest * self.groups
        if at_least and not math.isclose(count, self.experts * share, abs_tol=1e-6):
            count += 1
        # The sparsities below are shares of the experts.
        alone = " and without --of and --target-params" if at_least else ""
        if share and not count:
            raise LLMPruneError(
                f"A share of {share:g} is less than one of {self.experts} experts: give --sparsity {self._share(self.groups)}."
            )
        if count > most:
            raise LLMPruneError(
                f"{count} of {self.experts} experts are to go, and the router needs {self.fewest * self.groups} for the "
                f"{self.top} experts of a token: at most {most} can, --sparsity {self._share(most)}{alone}."
            )
        if count % self.groups:
            raise LLMPruneError(
                f"{count} of {self.experts} experts cannot go equally from the {self.groups} groups that the router chooses "
                f"among: remove a multiple of {self.groups}, for example with --sparsity "
                f"{self._share(-(-count // self.groups) * self.groups)}{alone}."
            )
        return replace(self, experts=self.experts - count)

    def _share(self, count: int) -> str:
        """A sparsity that is so many experts."""
        return f"{math.ceil(1e4 * count / self.experts - 1e-6) / 1e4:g}"

    def narrowed(self, share: float, multiple: int | None) -> Mixture:
        """The mixture that is left when a share of every expert's channels goes.

        Args:
            share: as near to it as whole multiples come.
            multiple: of what a width is one; None for what suits the hardware.

        Raises:
            LLMPruneError: no multiple is left, or stock code could not run it.
        """
        if multiple and multiple % ALIGNED:
            raise LLMPruneError(
                f"--multiple-of {multiple} would leave experts that transformers cannot run in 16 bits, whose rows take a "
                f"multiple of 16 bytes: give a multiple of {ALIGNED}."
            )
        left = self._narrowed(self.width, share, multiple)
        # DeepSeek's shared expert is as wide as several others.
        experts, rest = divmod(self.shared, self.width)
        return replace(self, width=left, shared=self._narrowed(self.shared, share, multiple) if rest else experts * left)

    @staticmethod
    def _narrowed(width: int, share: float, multiple: int | None) -> int:
        return widths([1 - share], [width], (1 - share) * width, multiple=multiple or max(width_multiple(width), ALIGNED))[0]

    def expert_parameters(self) -> int:
        """Of an expert and its row of the router."""
        return 3 * self.hidden * self.width + self.hidden

    def channels(self) -> int:
        """Of all experts of a block, the shared one included."""
        return self.experts * self.width + self.shared

    def parameters(self) -> int:
        """Of all blocks' experts and routers."""
        return len(self.blocks) * (3 * self.hidden * self.channels() + self.hidden * self.experts)


def mixture_of(skeleton: Skeleton) -> Mixture:
    """The experts of a model.

    Raises:
        LLMPruneError: it has none.
    """
    config = skeleton.config
    blocks = tuple(
        index for index, linears in enumerate(skeleton.linears) if any(linear.expert is not None for linear in linears)
    )
    if not blocks:
        raise LLMPruneError(
            f"No block of this {config.model_type} has experts: remove FFN channels with --method cfsp, or take a method that "
            "leaves zeros (see `llmprune methods`)."
        )
    downs = [linear for linear in skeleton.linears[blocks[0]] if linear.role == "down"]
    experts = [linear.shape[1] for linear in downs if linear.expert is not None]
    top = int(config.num_experts_per_tok)
    groups, taken = _groups(config)
    # DeepSeek-V3 ranks groups by their two best experts.
    fewest = max(-(-top // taken), 2 if config.model_type == "deepseek_v3" else 1)
    return Mixture(
        family=str(config.model_type),
        hidden=skeleton.hidden_size,
        blocks=blocks,
        experts=len(experts),
        width=experts[0],
        shared=sum(linear.shape[1] for linear in downs if linear.expert is None),
        top=top,
        groups=groups,
        fewest=fewest,
    )


def _groups(config: PretrainedConfig) -> tuple[int, int]:
    """Groups of experts that the router chooses among first, and how many it takes of them."""
    if getattr(config, "topk_method", None) == "greedy":
        return 1, 1
    groups = getattr(config, "n_group", None) or 1
    return groups, getattr(config, "topk_group", None) or groups


def prunable_parameters(method: str, skeleton: Skeleton) -> int:
    """Parameters of all experts, or of all their channels, that a method chooses among."""
    mixture = mixture_of(skeleton)
    if method == "reap":
        return len(mixture.blocks) * mixture.experts * mixture.expert_parameters()
    return len(mixture.blocks) * 3 * mixture.hidden * mixture.channels()


def check(recipe: Recipe, skeleton: Skeleton) -> None:
    """Raise `LLMPruneError` if a structured method cannot prune experts as the recipe says."""
    family = skeleton.config.model_type
    if recipe.method == "tyr":
        raise LLMPruneError(
            f"--method tyr searches among blocks of different widths, which {family!r} cannot have: use --method reap, which "
            "drops experts, or --method cfsp, which narrows them."
        )
    mixture_of(skeleton)
    if recipe.format != "auto":
        raise LLMPruneError(
            f"--format {recipe.format} is for blocks of different widths, and those of {family!r} stay alike: leave --format "
            "out."
        )
    if recipe.plan is not None:
        raise LLMPruneError(f"--plan {recipe.plan} is not for models with experts, such as {family!r}: leave --plan out.")
    if recipe.allocation != "uniform" or recipe.compensate != "none":
        raise LLMPruneError(
            f"--method {recipe.method} narrows all experts of {family!r} alike and fits nothing anew, which --allocation "
            f"{recipe.allocation} --compensate {recipe.compensate} asks for: give --allocation uniform --compensate none."
        )
