"""Where FFN channels and attention heads lie in a model's blocks, and what each of them costs in parameters.

A unit is a channel or a head. Channel i is row i of gate and up (and of their biases) with column i of down. Query head h is
`head_dim` rows of q with as many columns of o; a KV head goes when all its query heads have gone. Biases of o and down belong
to no unit and stay. A model that has been cut before has blocks of different widths, so sizes are per block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .errors import LLMPruneError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HeadsMode = Literal["kv_group", "q_balanced"]
Format = Literal["auto", "padded", "masked"]
SubLayer = Literal["attention", "mlp"]
# How an axis of a linear is laid out in units: FFN channels once or twice over (gate, then up), query heads, KV heads,
# all q heads then all k then all v, or q, k, v of one head after the other (GPT-NeoX).
Layout = Literal["channel", "channel twice", "head", "kv", "q k v", "q k v by head"]

PREFIX = "llmprune_"
DOWN_BIAS = "down_proj_bias"
# Families whose blocks may be stored smaller, by the names of their classes: modeling_llmprune.py has one for each.
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# Layouts whose units belong to a sub-layer.
_OF: dict[SubLayer, frozenset[Layout | None]] = {
    "attention": frozenset({"head", "kv", "q k v", "q k v by head"}),
    "mlp": frozenset({"channel", "channel twice"}),
}


@dataclass(frozen=True)
class Kept:
    """What stays of a block: FFN channels and query heads, ascending. Nothing kept: that sub-layer is removed."""

    channels: tuple[int, ...]
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """How many FFN channels, query heads and KV heads a block has; zeros for a sub-layer that it lacks."""

    channels: int
    heads: int
    kv_heads: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def absent(self) -> tuple[SubLayer, ...]:
        """Sub-layers that the block lacks."""
        units: tuple[tuple[SubLayer, int], ...] = (("attention", self.heads), ("mlp", self.channels))
        return tuple(name for name, size in units if not size)

    def everything(self) -> Kept:
        """Nothing pruned."""
        return Kept(tuple(range(self.channels)), tuple(range(self.heads)))


@dataclass(frozen=True)
class Cut:
    """A linear of a block: the layouts of its outputs and of its inputs, None where that is the hidden size."""

    out: Layout | None
    into: Layout | None = None
    bias: bool = False


@dataclass(frozen=True)
class Anatomy:
    """Where channels and heads lie in a model's blocks.

    Args:
        family: the model type, without our prefix.
        hidden, head_dim: sizes that no surgery changes.
        blocks: every block's sizes.
        linears: by name in the block.
        norms: norms that go with a removed sub-layer: name to sub-layer and size.
        transposed: weights are stored [I, O] (GPT-2).
    """

    family: str
    hidden: int
    head_dim: int
    blocks: tuple[Sizes, ...]
    linears: Mapping[str, Cut]
    norms: Mapping[str, tuple[SubLayer, int]] = field(default_factory=dict)
    transposed: bool = False

    @property
    def physical(self) -> bool:
        """Whether models of this family can be stored smaller, not only with zeros."""
        return self.family in CLASSES

    def check_format(self, format: Format) -> None:
        """Raise `LLMPruneError` if this family cannot be stored so."""
        if format != "masked" and not self.physical:
            raise LLMPruneError(
                f"Architecture {self.family!r} cannot be stored with fewer channels or heads (only {', '.join(CLASSES)} can): "
                "pass --format masked, which zeroes them."
            )

    def with_down_bias(self) -> Anatomy:
        """The same blocks with a bias on down, for methods that make up there for the channels that go.

        The tensors are then to hold a "mlp.down_proj.bias"; only our own model classes have one alone.
        """
        assert self.physical
        down = replace(self.linears["mlp.down_proj"], bias=True)
        return replace(self, linears={**self.linears, "mlp.down_proj": down})

    def keeps_bias(self, sublayer: SubLayer) -> bool:
        """Whether the sub-layer adds a bias that belongs to none of its units."""
        return any(cut.bias for cut in self.linears.values() if cut.into in _OF[sublayer])

    def removed(self, kept: Kept) -> frozenset[SubLayer]:
        """Sub-layers of which no tensor is stored in the shrunk block."""
        gone: list[tuple[SubLayer, tuple[int, ...]]] = [("attention", kept.heads), ("mlp", kept.channels)]
        return frozenset(name for name, units in gone if not units and self.physical and not self.keeps_bias(name))

    def stored(self, kept: Kept, block: int) -> Kept:
        """What the shrunk block stores: what is kept; one zeroed unit if of a sub-layer only an output bias is left."""
        sizes = self.blocks[block]
        channels, heads = kept.channels, kept.heads
        if not channels and sizes.channels and self.keeps_bias("mlp"):
            channels = (0,)
        if not heads and sizes.heads and self.keeps_bias("attention"):
            heads = tuple(range(sizes.group))
        return Kept(channels, heads)

    def stored_sizes(self, kept: Kept, block: int) -> Sizes:
        """Widths of the shrunk block."""
        stored = self.stored(kept, block)
        return Sizes(len(stored.channels), len(stored.heads), len(kv_heads_of(stored, self.blocks[block])))

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that surgery touches, by name in a block of these sizes; none for an absent sub-layer."""
        found: dict[str, tuple[int, ...]] = {}
        absent = sizes.absent
        for name, cut in self.linears.items():
            if any({cut.out, cut.into} & _OF[sublayer] for sublayer in absent):
                continue
            out = length(cut.out, sizes, self.head_dim) if cut.out else self.hidden
            into = length(cut.into, sizes, self.head_dim) if cut.into else self.hidden
            found[f"{name}.weight"] = (into, out) if self.transposed else (out, into)
            if cut.bias:
                found[f"{name}.bias"] = (out,)
        found |= {name: (size,) for name, (sublayer, size) in self.norms.items() if sublayer not in absent}
        return found

    def parameters(self, sizes: Sizes) -> int:
        """Parameters of the tensors that surgery touches, in a block of these sizes."""
        return sum(map(math.prod, self.shapes(sizes).values()))

    @property
    def channel_cost(self) -> int:
        """Parameters that go with one FFN channel."""
        return self.parameters(Sizes(2, 0, 0)) - self.parameters(Sizes(1, 0, 0))

    def head_cost(self, block: int, mode: HeadsMode) -> int:
        """Parameters that go with one unit of heads: a whole KV group, or one query head of every group."""
        sizes = self.blocks[block]
        if mode == "kv_group":
            one, two = Sizes(0, sizes.group, 1), Sizes(0, 2 * sizes.group, 2)
        else:
            one, two = Sizes(0, sizes.kv_heads, sizes.kv_heads), Sizes(0, 2 * sizes.kv_heads, sizes.kv_heads)
        return self.parameters(two) - self.parameters(one)

    def head_units(self, block: int, mode: HeadsMode) -> int:
        """How many units of heads a block has."""
        return self.blocks[block].kv_heads if mode == "kv_group" else self.blocks[block].group


def anatomy(config: PretrainedConfig) -> Anatomy:
    """Where channels and heads lie in a model, which may have blocks of different widths already.

    Raises:
        LLMPruneError: nothing is known about that architecture.
    """
    family = str(config.model_type).removeprefix(PREFIX)
    linears = _linears(family, config)
    layers: Sequence[PretrainedConfig] = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    blocks = tuple(_sizes(layers[index]) for index in range(config.num_hidden_layers))
    hidden = int(config.hidden_size)
    head_dim = getattr(config, "head_dim", None) or hidden // int(layers[0].num_attention_heads)
    norms: dict[str, tuple[SubLayer, int]] = {}
    if family in CLASSES:
        norms = {"input_layernorm.weight": ("attention", hidden), "post_attention_layernorm.weight": ("mlp", hidden)}
    if family == "qwen3":
        norms |= {f"self_attn.{name}.weight": ("attention", head_dim) for name in ("q_norm", "k_norm")}
    return Anatomy(family, hidden, head_dim, blocks, linears, norms, transposed=family == "gpt2")


def _linears(family: str, config: PretrainedConfig) -> dict[str, Cut]:
    if family in {*CLASSES, "gemma2", "gemma3_text", "olmo2", "smollm3"}:
        attention = bool(getattr(config, "attention_bias", False)) and family != "mistral"
        into = attention or family == "qwen2"
        mlp = family in ("llama", "smollm3") and bool(getattr(config, "mlp_bias", False))
        # A key of ours: see `Anatomy.with_down_bias`.
        down = mlp or bool(getattr(config, DOWN_BIAS, False))
        return {
            "self_attn.q_proj": Cut("head", bias=into),
            "self_attn.k_proj": Cut("kv", bias=into),
            "self_attn.v_proj": Cut("kv", bias=into),
            "self_attn.o_proj": Cut(None, "head", bias=attention and family != "qwen2"),
            "mlp.gate_proj": Cut("channel", bias=mlp),
            "mlp.up_proj": Cut("channel", bias=mlp),
            "mlp.down_proj": Cut(None, "channel", bias=down),
        }
    if family == "phi3":
        return {
            "self_attn.qkv_proj": Cut("q k v"),
            "self_attn.o_proj": Cut(None, "head"),
            "mlp.gate_up_proj": Cut("channel twice"),
            "mlp.down_proj": Cut(None, "channel"),
        }
    if family == "opt":
        bias = bool(getattr(config, "enable_bias", True))
        names: dict[str, tuple[Layout | None, Layout | None]] = {
            "self_attn.q_proj": ("head", None),
            "self_attn.k_proj": ("kv", None),
            "self_attn.v_proj": ("kv", None),
            "self_attn.out_proj": (None, "head"),
            "fc1": ("channel", None),
            "fc2": (None, "channel"),
        }
        return {name: Cut(out, into, bias=bias) for name, (out, into) in names.items()}
    if family == "gpt_neox":
        bias = bool(getattr(config, "attention_bias", True))
        return {
            "attention.query_key_value": Cut("q k v by head", bias=bias),
            "attention.dense": Cut(None, "head", bias=bias),
            "mlp.dense_h_to_4h": Cut("channel", bias=True),
            "mlp.dense_4h_to_h": Cut(None, "channel", bias=True),
        }
    if family == "gpt2":
        return {
            "attn.c_attn": Cut("q k v", bias=True),
            "attn.c_proj": Cut(None, "head", bias=True),
            "mlp.c_fc": Cut("channel", bias=True),
            "mlp.c_proj": Cut(None, "channel", bias=True),
        }
    raise LLMPruneError(
        f"Channels and heads of architecture {family!r} are not known: give a model of another family, or a mask method "
        "(see `llmprune methods`) and --format masked."
    )


def _sizes(layer: PretrainedConfig) -> Sizes:
    heads = int(layer.num_attention_heads)
    kv_heads = int(getattr(layer, "num_key_value_heads", None) or heads)
    width = getattr(layer, "intermediate_size", None) or getattr(layer, "ffn_dim", None) or getattr(layer, "n_inner", None)
    skip = getattr(layer, "skip", ())
    channels = 0 if "mlp" in skip else int(width or 4 * layer.hidden_size)
    return Sizes(channels, 0, 0) if "attention" in skip else Sizes(channels, heads, kv_heads)


def kv_heads_of(kept: Kept, sizes: Sizes) -> list[int]:
    """KV heads that a kept query head reads."""
    return sorted({head // sizes.group for head in kept.heads})


def length(layout: Layout, sizes: Sizes, head_dim: int) -> int:
    return {
        "channel": sizes.channels,
        "channel twice": 2 * sizes.channels,
        "head": sizes.heads * head_dim,
        "kv": sizes.kv_heads * head_dim,
        "q k v": (sizes.heads + 2 * sizes.kv_heads) * head_dim,
        "q k v by head": 3 * sizes.heads * head_dim,
    }[layout]


def positions(layout: Layout, kept: Kept, sizes: Sizes, head_dim: int) -> Tensor:
    """Where on an axis the kept units lie: ascending int64 indices."""
    if layout in _OF["mlp"]:
        channels = torch.tensor(kept.channels, dtype=torch.int64)
        return channels if layout == "channel" else torch.cat([channels, channels + sizes.channels])
    # The axis as pieces of `width` rows, and the pieces that stay.
    width, pieces = head_dim, list(kept.heads)
    if layout == "kv":
        pieces = kv_heads_of(kept, sizes)
    elif layout == "q k v":
        kv_heads = kv_heads_of(kept, sizes)
        pieces += [sizes.heads + head for head in kv_heads] + [sizes.heads + sizes.kv_heads + head for head in kv_heads]
    elif layout == "q k v by head":
        width = 3 * head_dim
    starts = width * torch.tensor(pieces, dtype=torch.int64)
    return (starts[:, None] + torch.arange(width)).flatten()


def axes(name: str, anatomy: Anatomy) -> Iterator[tuple[int, Layout]]:
    """The axes of a tensor that are cut, and their layouts."""
    linear, _, leaf = name.rpartition(".")
    cut = anatomy.linears.get(linear)
    if cut is None:
        return
    if cut.out:
        yield (1 if anatomy.transposed and leaf == "weight" else 0), cut.out
    if cut.into and leaf == "weight":
        yield (0 if anatomy.transposed else 1), cut.into


def sublayer_of(name: str, anatomy: Anatomy) -> SubLayer | None:
    """The sub-layer with which a tensor goes, if it is removed."""
    if name in anatomy.norms:
        return anatomy.norms[name][0]
    cut = anatomy.linears.get(name.rpartition(".")[0])
    if cut is None:
        return None
    return "mlp" if {cut.out, cut.into} & _OF["mlp"] else "attention"
