"""What structured methods share: how much goes, how a block loses it, and what is written of it.

A method decides what every block keeps (`anatomy.Kept`). While samples go through, a cut block has zeros in place of what is
gone (`Surgeon.cut`); on its way to the disk the zeros are left out, padded or left in, as the recipe's format says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from . import mixture, surgery
from .anatomy import Anatomy, Kept, Sizes, kv_heads_of, positions
from .anatomy import anatomy as anatomy_of
from .checkpoint import reading
from .errors import LLMPruneError
from .models import Linear, Skeleton
from .packing import config_as_stored
from .recipe import Recipe
from .stream import Block
from .surgery import Plan

PLAN = "llmprune_plan.json"
# Beyond this share of what can be removed nothing is left that one could call the model.
LARGEST = 0.95


def has_experts(skeleton: Skeleton) -> bool:
    """Whether blocks of this family may have experts."""
    return skeleton.family.experts is not None


def dense_config(skeleton: Skeleton) -> dict[str, object]:
    """The content of a model's config.json, but for how its weights are stored."""
    stored = (skeleton.checkpoint.directory / "config.json").read_bytes()
    return cast(dict[str, object], json.loads(config_as_stored(stored, None)))


def prunable_parameters(recipe: Recipe, skeleton: Skeleton) -> int:
    """Parameters of all units that the recipe's method may remove."""
    if has_experts(skeleton):
        return mixture.prunable_parameters(recipe.method, skeleton)
    anatomy = anatomy_of(skeleton.config)
    channels = sum(sizes.channels for sizes in anatomy.blocks) * anatomy.channel_cost
    if recipe.method != "tyr":
        return channels
    mode = recipe.heads
    blocks = range(len(anatomy.blocks))
    return channels + sum(anatomy.head_units(index, mode) * anatomy.head_cost(index, mode) for index in blocks)


def share_to_remove(recipe: Recipe, skeleton: Skeleton) -> float:
    """The fraction of the prunable parameters that the recipe asks to remove.

    Raises:
        LLMPruneError: it is more than there is.
    """
    target, prunable = recipe.target, prunable_parameters(recipe, skeleton)
    if recipe.of == "prunable":
        return target
    share = target * skeleton.parameters() / prunable
    if share > LARGEST:
        raise LLMPruneError(
            f"{target:.1%} of the model are {target * skeleton.parameters() / 1e6:.1f} M parameters, and --method "
            f"{recipe.method} can remove {LARGEST:.0%} of {prunable / 1e6:.1f} M: ask for less."
        )
    return share


def parameters_asked_for(text: str) -> int:
    """`"100M"` as 100,000,000. Raises `LLMPruneError` if it is no such number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMbB]?)", text.strip())
    if not match:
        raise LLMPruneError(f"--target-params {text!r} is no number of parameters: write it as 100M or 6.5B.")
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()])


def check(recipe: Recipe, skeleton: Skeleton) -> None:
    """Raise `LLMPruneError` if the architecture cannot be pruned or stored as the recipe says."""
    if has_experts(skeleton) or recipe.method == "reap":
        mixture.check(recipe, skeleton)
        return
    anatomy = anatomy_of(skeleton.config)
    if recipe.method == "tyr" and not anatomy.physical:
        raise LLMPruneError(
            f"--method tyr searches among smaller models, which architecture {anatomy.family!r} cannot be: use --method cfsp "
            "--format masked."
        )
    anatomy.check_format(recipe.format)
    if recipe.compensate == "bias" and recipe.format == "padded" and not anatomy.linears[down_name(anatomy)].bias:
        raise LLMPruneError(
            f"The stock classes of {anatomy.family!r} have no bias in the FFN to compensate with: leave out --format padded, "
            "or give another --compensate."
        )


def plan_of(recipe: Recipe, skeleton: Skeleton) -> Plan | None:
    """The plan that the recipe names, if it names one.

    Raises:
        LLMPruneError: it cannot be read, is damaged, or is for another model.
    """
    if recipe.plan is None:
        return None
    if not recipe.plan.is_file():
        raise LLMPruneError(f"--plan {recipe.plan} does not exist: give a {PLAN} that llmprune wrote.")
    with reading(recipe.plan):
        plan = Plan.from_json(recipe.plan.read_text(encoding="utf-8"))
    plan.check(anatomy_of(skeleton.config), skeleton.checkpoint.fingerprint()[:16])
    return plan


def down_name(anatomy: Anatomy) -> str:
    """The linear, by its name in a block, that reads the FFN's channels."""
    return next(name for name, cut in anatomy.linears.items() if cut.into == "channel")


class Surgeon:
    """Takes a plan's units out of blocks.

    Args:
        skeleton: the model, whole.
        recipe: says how it is to lie on the disk.
        kept_B: what every block keeps. Where only the numbers are known so far, any units; `cut` names them.
        finished: what was kept of the blocks that an earlier run has finished.
    """

    def __init__(self, skeleton: Skeleton, recipe: Recipe, kept_B: Sequence[Kept], finished: Sequence[Kept] = ()) -> None:
        self.skeleton, self.recipe = skeleton, recipe
        self.anatomy = anatomy_of(skeleton.config)
        self.source = self.anatomy
        if recipe.compensate == "bias" and not self.anatomy.linears[down_name(self.anatomy)].bias:
            self.anatomy = self.anatomy.with_down_bias()
        self.kept_B = [*finished, *kept_B[len(finished) :]]
        self.biases: dict[int, Tensor] = {}
        # All blocks have these sizes on the disk, where they are padded.
        self.padded: Sizes | None = self.plan().padded(self.anatomy) if recipe.format == "padded" else None

    def plan(self) -> Plan:
        """What stays of the whole model."""
        return Plan.of(
            self.source,
            self.kept_B,
            parent=self.skeleton.checkpoint.fingerprint()[:16],
            heads_mode=self.recipe.heads,
            method=self.recipe.method,
        )

    def cut(self, block: Block, kept: Kept) -> None:
        """From now on the block runs without what is not kept; the weights that read it are lost."""
        self.kept_B[block.index] = kept
        sizes = self.anatomy.blocks[block.index]
        for linear in block.linears:
            layout = self.anatomy.linears[self._inner(linear.name, block.index)].into
            if layout is None:
                continue
            at = positions(layout, kept, sizes, self.anatomy.head_dim)
            if len(at) < linear.shape[1]:
                keep_I = torch.zeros(linear.shape[1], dtype=torch.bool)
                keep_I[at] = True
                linear.keep(keep_I.expand(linear.shape).to(linear.parameter.device))
        block.notes["kept"] = {"channels": list(kept.channels), "heads": list(kept.heads)}

    def make_up(self, block: Block, bias_O: Tensor) -> None:
        """Add this to the FFN's output, by a bias that the block may not have had, float32 [O]."""
        self.biases[block.index] = bias_O.cpu()

    def store(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A block's tensors as they are written."""
        inner = {self._inner(name, index): tensor for name, tensor in tensors.items()}
        if index in self.biases:
            name = f"{down_name(self.anatomy)}.bias"
            weight = inner[f"{down_name(self.anatomy)}.weight"]
            there = inner[name].float() if name in inner else 0.0
            inner[name] = (there + self.biases.pop(index)).to(weight.dtype)
        kept, anatomy = self.kept_B[index], self.anatomy
        if self.recipe.format == "masked":
            written = surgery.mask(inner, kept, anatomy, index)
        elif self.padded:
            written = surgery.pad(inner, kept, anatomy, index, self.padded)
        else:
            written = surgery.shrink(inner, kept, anatomy, index)
        return {self._outer(name, index): tensor for name, tensor in written.items()}

    def restore(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A block's tensors as they ran, from those that were written."""
        if self.recipe.format == "masked":
            return tensors
        kept, anatomy = self.kept_B[index], self.anatomy
        inner = {self._inner(name, index): tensor for name, tensor in tensors.items()}
        if self.padded:
            sizes = replace(anatomy, blocks=(self.padded,) * len(anatomy.blocks))
            inner = surgery.shrink(inner, places(kept, anatomy.blocks[index], self.padded), sizes, index)
        dtype = next(iter(self.skeleton.block_entries(index).values())).dtype
        restored = surgery.expand(inner, kept, anatomy, index, dtype=dtype)
        return {self._outer(name, index): tensor for name, tensor in restored.items()}

    def counts(self) -> tuple[int, int]:
        """Parameters that could be removed, and that were."""
        before = sum(self.source.parameters(sizes) for sizes in self.source.blocks)
        return prunable_parameters(self.recipe, self.skeleton), before - self.plan().parameters(self.source)

    def files(self) -> dict[str, bytes]:
        """What lies beside the weights because of the surgery: config.json, the plan, code where stock classes do not do."""
        plan = self.plan()
        changed, needs_code = surgery.config_json(dense_config(self.skeleton), plan, self.anatomy, self.recipe.format)
        files = {PLAN: plan.to_json().encode(), "config.json": (json.dumps(changed, indent=2) + "\n").encode()}
        if needs_code:
            files[surgery.MODELING_FILE] = (Path(__file__).parent / surgery.MODELING_FILE).read_bytes()
        return files

    def widths(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """How many channels and query heads every block keeps, and has in the dense model."""
        kept = {"ffn": [len(kept.channels) for kept in self.kept_B], "heads": [len(kept.heads) for kept in self.kept_B]}
        dense = {
            "ffn": [sizes.channels for sizes in self.source.blocks],
            "heads": [sizes.heads for sizes in self.source.blocks],
        }
        changed = [key for key in kept if kept[key] != dense[key]]
        return {key: kept[key] for key in changed}, {key: dense[key] for key in changed}

    def _prefix(self, index: int) -> str:
        return f"{self.skeleton.blocks_path}.{index}."

    def _inner(self, name: str, index: int) -> str:
        """A name in the model as a name in the block."""
        return name.removeprefix(self._prefix(index))

    def _outer(self, name: str, index: int) -> str:
        return self._prefix(index) + name


def places(kept: Kept, sizes: Sizes, padded: Sizes) -> Kept:
    """Where `surgery.pad` puts what is kept."""
    groups = len(kv_heads_of(kept, sizes))
    heads = [group * padded.group + i for group in range(groups) for i in range(len(kept.heads) // groups)]
    return Kept(tuple(range(len(kept.channels))), tuple(heads))


def finished_cuts(facts_B: Sequence[Mapping[str, object]]) -> list[Kept]:
    """What was kept of finished blocks, from what the journal says of them."""
    notes = [cast(Mapping[str, list[int]], facts["kept"]) for facts in facts_B]
    return [Kept(tuple(note["channels"]), tuple(note["heads"])) for note in notes]


def fit(linear: Linear, weight_OK: Tensor, keep_K: Tensor) -> None:
    """Put new weights on the kept inputs of a linear, zeros on the others."""
    weight_OI = torch.zeros(linear.shape, device=weight_OK.device)
    weight_OI[:, keep_K] = weight_OK
    linear.replace(weight_OI)
