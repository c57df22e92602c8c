"""What stays of a model when whole FFN channels and attention heads go, and how tensors and config.json follow.

    plan = Plan.of(anatomy(config), kept, parent=fingerprint, heads_mode="kv_group", method="cfsp")
    smaller = shrink(tensors, plan.blocks[3], anatomy(config), 3)

A plan (kept indices per block, JSON) is apart from its application, so that the masked model (`mask`: same shapes, zeros) and
the shrunk one (`shrink`) are two views of one object; `expand` leads back, `pad` to widths that stock classes load.

What stays must leave every remaining KV head the same number of query heads, because then transformers' own attention runs it:
whole KV groups (`kv_group`), or as many query heads in every group (`q_balanced`, of use where a group has several).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from .anatomy import (
    CLASSES,
    DOWN_BIAS,
    PREFIX,
    Anatomy,
    Format,
    HeadsMode,
    Kept,
    Sizes,
    SubLayer,
    anatomy,
    axes,
    kv_heads_of,
    length,
    positions,
    sublayer_of,
)
from .errors import LLMPruneError

__all__ = [
    "MODELING_FILE",
    "Anatomy",
    "Format",
    "HeadsMode",
    "Kept",
    "Plan",
    "Sizes",
    "anatomy",
    "config_json",
    "expand",
    "mask",
    "pad",
    "shrink",
]

MODELING_FILE = "modeling_llmprune.py"

P = TypeVar("P")


def mask(tensors: Mapping[str, Tensor], kept: Kept, anatomy: Anatomy, block: int) -> dict[str, Tensor]:
    """A block with +0.0 in place of all that goes, in its own shapes.

    Args:
        tensors: the block's tensors by name in the block.
        kept: what stays of it.
        anatomy, block: the model and the block's number.

    Returns:
        All tensors: those that change as copies, the others as they are.
    """
    sizes, removed = anatomy.blocks[block], anatomy.removed(kept)
    masked = {}
    for name, tensor in tensors.items():
        if sublayer_of(name, anatomy) in removed:
            masked[name] = torch.zeros_like(tensor)
            continue
        masked[name] = tensor
        for dim, layout in axes(name, anatomy):
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[positions(layout, kept, sizes, anatomy.head_dim)] = False
            # index_fill writes +0.0, where a product would leave -0.0 and NaN.
            masked[name] = masked[name].index_fill(dim, gone.nonzero().flatten().to(tensor.device), 0.0)
    return masked


def shrink(tensors: Mapping[str, Tensor], kept: Kept, anatomy: Anatomy, block: int) -> dict[str, Tensor]:
    """A block without what goes: contiguous copies of the rows and columns that stay, no tensor of a removed sub-layer.

    Args, of the original shapes: see `mask`.
    """
    return _select(mask(tensors, kept, anatomy, block), anatomy.stored(kept, block), anatomy, block, anatomy.removed(kept))


def _select(
    tensors: Mapping[str, Tensor], kept: Kept, anatomy: Anatomy, block: int, without: frozenset[SubLayer]
) -> dict[str, Tensor]:
    selected = {}
    for name, tensor in tensors.items():
        if sublayer_of(name, anatomy) in without:
            continue
        for dim, layout in axes(name, anatomy):
            index = positions(layout, kept, anatomy.blocks[block], anatomy.head_dim)
            tensor = tensor.index_select(dim, index.to(tensor.device))
        # Always memory of its own, so that the original's is freed.
        selected[name] = tensor.clone(memory_format=torch.contiguous_format)
    return selected


def expand(
    tensors: Mapping[str, Tensor], kept: Kept, anatomy: Anatomy, block: int, *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The masked block from the shrunk one: `expand(shrink(t)) == mask(t)`.

    Args:
        tensors: the shrunk block's tensors by name in the block.
        kept, anatomy, block: as for `shrink`.
        dtype: of the zeros, where a block is empty altogether.
    """
    sizes, stored = anatomy.blocks[block], anatomy.stored(kept, block)
    return _spread(tensors, stored, sizes, anatomy, dtype)


def _spread(
    tensors: Mapping[str, Tensor], at: Kept, sizes: Sizes, anatomy: Anatomy, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Tensors in a block of larger sizes, their units at the given places, +0.0 elsewhere."""
    like = next(iter(tensors.values()), torch.empty(0, dtype=dtype))
    spread = {}
    for name, tensor in tensors.items():
        for dim, layout in axes(name, anatomy):
            shape = list(tensor.shape)
            shape[dim] = length(layout, sizes, anatomy.head_dim)
            index = positions(layout, at, sizes, anatomy.head_dim).to(tensor.device)
            tensor = tensor.new_zeros(shape).index_copy_(dim, index, tensor)
        spread[name] = tensor
    for name, shape_ in anatomy.shapes(sizes).items():
        if name not in spread:
            spread[name] = like.new_zeros(shape_)
    return spread


def pad(tensors: Mapping[str, Tensor], kept: Kept, anatomy: Anatomy, block: int, to: Sizes) -> dict[str, Tensor]:
    """A block in the widths of `Plan.padded`: what stays comes first, +0.0 after it.

    Args:
        tensors, kept, anatomy, block: as for `mask`, in the original shapes.
        to: the widths.
    """
    sizes = anatomy.blocks[block]
    selected = _select(mask(tensors, kept, anatomy, block), kept, anatomy, block, frozenset())
    group = len(kept.heads) // max(1, len(kv_heads_of(kept, sizes)))
    heads = [g * to.group + i for g in range(len(kv_heads_of(kept, sizes))) for i in range(group)]
    return _spread(selected, Kept(tuple(range(len(kept.channels))), tuple(heads)), to, anatomy)


@dataclass(frozen=True)
class Plan:
    """What stays of every block of one model.

    Args:
        parent: fingerprint of the model that the indices are about.
        model_type: its model type.
        heads_mode: how heads go: whole KV groups, or as many query heads of every group.
        hidden, head_dim, sizes: of that model; sizes per block.
        blocks: what stays of each block.
        method: which method chose.

    Raises:
        LLMPruneError: indices out of range or not ascending, or heads that leave KV groups unequal.
    """

    parent: str
    model_type: str
    heads_mode: HeadsMode
    hidden: int
    head_dim: int
    sizes: tuple[Sizes, ...]
    blocks: tuple[Kept, ...]
    method: str

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.blocks):
            raise LLMPruneError(f"The plan names {len(self.blocks)} blocks of {len(self.sizes)}: make it anew.")
        for index, (kept, sizes) in enumerate(zip(self.blocks, self.sizes, strict=True)):
            for what, units, size in (("channels", kept.channels, sizes.channels), ("heads", kept.heads, sizes.heads)):
                if any(a >= b for a, b in itertools.pairwise(units)):
                    raise LLMPruneError(f"The plan's {what} of block {index} are not in ascending order: make it anew.")
                if units and not 0 <= units[0] <= units[-1] < size:
                    raise LLMPruneError(
                        f"The plan keeps {what} {units[0]} to {units[-1]} of block {index}, which has {size}: make it anew."
                    )
            if kept.heads:
                self._check_groups(index, kept, sizes)

    def _check_groups(self, index: int, kept: Kept, sizes: Sizes) -> None:
        counts = [0] * sizes.kv_heads
        for head in kept.heads:
            counts[head // sizes.group] += 1
        if self.heads_mode == "kv_group" and not set(counts) <= {0, sizes.group}:
            raise LLMPruneError(
                f"The plan keeps part of a KV group of {sizes.group} query heads in block {index}: keep groups whole, or make "
                "it with --heads q_balanced."
            )
        if self.heads_mode == "q_balanced" and len(set(counts)) > 1:
            raise LLMPruneError(
                f"The plan keeps {min(counts)} query heads of one KV group and {max(counts)} of another in block {index}: keep "
                "as many of each."
            )

    @classmethod
    def of(
        cls, anatomy: Anatomy, blocks: Sequence[Kept], *, parent: str, heads_mode: HeadsMode = "kv_group", method: str
    ) -> Plan:
        """A plan for a model of that anatomy."""
        return cls(parent, anatomy.family, heads_mode, anatomy.hidden, anatomy.head_dim, anatomy.blocks, tuple(blocks), method)

    def to_json(self) -> str:
        return TypeAdapter(Plan).dump_json(self).decode() + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            LLMPruneError: it is damaged, or says what no plan may say.
        """
        return read_plan(Plan, text)

    def check(self, anatomy: Anatomy, parent: str) -> None:
        """Raise `LLMPruneError` if the plan was made for another model than the one of that anatomy and fingerprint."""
        ours = (self.model_type, self.hidden, self.head_dim, self.sizes)
        if ours != (anatomy.family, anatomy.hidden, anatomy.head_dim, anatomy.blocks):
            raise LLMPruneError(
                f"The plan is for a {self.model_type} of {len(self.sizes)} blocks and hidden size {self.hidden}, of other "
                f"widths than this {anatomy.family} of {len(anatomy.blocks)} blocks and hidden size {anatomy.hidden}: give the "
                "model that it was made for."
            )
        if self.parent != parent:
            raise LLMPruneError(
                f"The plan is for another model of the same sizes (fingerprint {self.parent}, not {parent}): give the model "
                "that it was made for."
            )

    @property
    def channels_left(self) -> float:
        """Share of all FFN channels that stay."""
        return sum(len(kept.channels) for kept in self.blocks) / max(1, sum(sizes.channels for sizes in self.sizes))

    def stored_sizes(self, anatomy: Anatomy) -> tuple[Sizes, ...]:
        """Widths of every shrunk block."""
        return tuple(anatomy.stored_sizes(kept, index) for index, kept in enumerate(self.blocks))

    def parameters(self, anatomy: Anatomy) -> int:
        """Parameters that are left, in all blocks, of the tensors that surgery touches."""
        return sum(anatomy.parameters(sizes) for sizes in self.stored_sizes(anatomy))

    def padded(self, anatomy: Anatomy) -> Sizes:
        """The smallest common widths that hold every block and that the family's stock class accepts.

        Raises:
            LLMPruneError: it accepts none.
        """
        stored = self.stored_sizes(anatomy)
        channels = max(1, *(sizes.channels for sizes in stored))
        kv_heads = max(1, *(sizes.kv_heads for sizes in stored))
        group = max(sizes.group for sizes in stored) or max(1, *(sizes.group for sizes in self.sizes))
        while not _stock_accepts(anatomy, kv_heads * group):
            if self.heads_mode == "kv_group":
                kv_heads += 1
            else:
                group += 1
            if kv_heads * group > anatomy.hidden:
                raise LLMPruneError(
                    f"No number of heads holds every block and divides the hidden size {anatomy.hidden}, as {anatomy.family} "
                    "needs: leave out --format padded."
                )
        return Sizes(channels, kv_heads * group, kv_heads)


def read_plan(kind: type[P], text: str) -> P:
    """A plan of that kind, from its JSON.

    Raises:
        LLMPruneError: it is damaged, or says what no plan may say.
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), LLMPruneError):
            raise cause from error
        where = ".".join(map(str, first["loc"])) or "the file"
        raise LLMPruneError(f"The plan is damaged or of another version ({where}: {first['msg']}): make it anew.") from error


def _stock_accepts(anatomy: Anatomy, heads: int) -> bool:
    # LlamaConfig insists on it, although with an explicit head_dim nothing depends on it.
    return anatomy.family != "llama" or anatomy.hidden % heads == 0


def config_json(
    config: Mapping[str, object], plan: Plan, anatomy: Anatomy, format: Format = "auto"
) -> tuple[dict[str, object], bool]:
    """The config.json of the pruned model.

    Args:
        config: the content of the original's config.json.
        plan, anatomy: what stays, and of what.
        format: `auto` (shrunk), `padded` or `masked`.

    Returns:
        The content, and whether `modeling_llmprune.py` has to lie beside it: stock classes load blocks that are all alike.

    Raises:
        LLMPruneError: the family cannot be stored in that format.
    """
    anatomy.check_format(format)
    content: dict[str, object] = copy.deepcopy(dict(config))
    down_bias = anatomy.physical and anatomy.linears["mlp.down_proj"].bias and not content.get("mlp_bias")
    if format == "masked" and not down_bias:
        return content, str(content.get("model_type")).startswith(PREFIX)
    if format == "padded" and down_bias:
        raise LLMPruneError(f"The stock {anatomy.family} class has no bias to compensate with: leave out --format padded.")
    if format == "padded":
        sizes: tuple[Sizes, ...] = (plan.padded(anatomy),)
    else:
        sizes = plan.sizes if format == "masked" else plan.stored_sizes(anatomy)
    widest = Sizes(*(max(1, *values) for values in zip(*((s.channels, s.heads, s.kv_heads) for s in sizes), strict=True)))
    content = {key: value for key, value in content.items() if key not in ("auto_map", "per_layer_config")}
    content |= _widths(widest) | {"head_dim": anatomy.head_dim}
    if set(sizes) == {widest} and _stock_accepts(anatomy, widest.heads) and not down_bias:
        content |= {"model_type": anatomy.family, "architectures": [f"{CLASSES[anatomy.family]}ForCausalLM"]}
        return content, False
    ours = f"LLMPrune{CLASSES[anatomy.family]}"
    module = MODELING_FILE.removesuffix(".py")
    digits = len(str(len(sizes) - 1))
    overrides = {str(index).zfill(digits): _overrides(each, widest) for index, each in enumerate(sizes)}
    content |= {
        "model_type": PREFIX + anatomy.family,
        "architectures": [f"{ours}ForCausalLM"],
        "auto_map": {"AutoConfig": f"{module}.{ours}Config", "AutoModelForCausalLM": f"{module}.{ours}ForCausalLM"},
        "per_layer_config": {index: override for index, override in overrides.items() if override},
    }
    return content | ({DOWN_BIAS: True} if down_bias else {}), True


def _widths(sizes: Sizes) -> dict[str, object]:
    return {
        "intermediate_size": sizes.channels,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
    }


def _overrides(sizes: Sizes, widest: Sizes) -> dict[str, object]:
    """A block's entry in `per_layer_config`: where it differs from what config.json says at its top."""
    skip = list(sizes.absent)
    common = _widths(widest)
    found = {key: value for key, value in _widths(sizes).items() if value not in (0, common[key])}
    return found | ({"skip": skip} if skip else {})
