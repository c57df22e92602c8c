"""WINA's gates inside an ordinary checkpoint: the column norms folded into the weights, the function unchanged.

    tensors, gates = fold_block(tensors, gates, config)   # after calibration with the norms of `foldable_norms`

WINA leaves out input i of y = W x where |x_i| c_i <= t, with c_i the norm of column i of W (arXiv 2505.19427, equation 5).
With x' = c x and W' = W / c (column by column) y is the same and the rule reads |x'_i| <= t: TEAL's (arXiv 2408.14690, section
4.1), so that every kernel for TEAL, which knows one number t per linear, runs it. The scale c goes into what makes x:

    gate      x is made by                 c is folded into        c is                                            folding
    q k v     a norm                       its gain and bias       sqrt(sum of squares of the norms of q, k, v)    exact
    gate up   a norm                       its gain and bias       sqrt(sum of squares of the norms of both)       exact
    down      act(gate) * up, or relu(up)  rows of up, its bias    its own norm                                    exact
    down      another act(up)              nothing                 1, which is TEAL's score                        magnitude
    o         attention over values        rows of v, its bias     its own norm                                    exact
    o         ... with grouped queries     rows of v, its bias     sqrt(sum of squares over a group's heads)       group norm

With grouped queries several heads read one value channel, which takes one scale, so that their columns get one common norm: an
approximation of WINA's score. It changes scores, so thresholds must be found with these norms (`foldable_norms`).

An input whose column is all zeros (c = 0) becomes zero: its gate never opens, and it added nothing before. Folded weights are
rounded once, from float64. A norm's gain is rounded first and the columns are then divided by the scale that it really has, so
that rounding it costs the score its last bits (with Gemma, which stores gain - 1, the gain's) but not the function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .activation_plan import Gate, frobenius
from .anatomy import CLASSES, PREFIX, Anatomy, anatomy
from .errors import LLMPruneError
from .models import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Folding = Literal["exact", "group norm", "magnitude"]


@dataclass(frozen=True)
class Norms:
    """The norms of a block that feed nothing but the linears after them; y = normalised x * (offset + weight) + bias."""

    attention: str
    mlp: str
    offset: float = 0.0


_LLAMA = Norms("input_layernorm", "post_attention_layernorm")
_GEMMA = Norms("input_layernorm", "pre_feedforward_layernorm", offset=1.0)
NORMS = {
    **dict.fromkeys(CLASSES, _LLAMA),
    "smollm3": _LLAMA,
    "phi3": _LLAMA,
    "gpt_neox": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "opt": Norms("self_attn_layer_norm", "final_layer_norm"),
    "gpt2": Norms("ln_1", "ln_2"),
}
# Roles that read one tensor, hence share a scale.
_ATTENTION, _MLP = ("q", "k", "v", "qkv"), ("gate", "up", "gate_up")
# Weights that are widened to float64 at a time.
_PIECE = 1 << 22


def check_foldable(config: PretrainedConfig) -> None:
    """Raise `LLMPruneError` if a model has no place to fold norms into: a norm that feeds nothing but linears, with a gain."""
    family = str(config.model_type).removeprefix(PREFIX)
    reason = None
    if family not in NORMS:
        reason = "its norms are not known to feed nothing but the linears after them"
    elif family == "opt" and not config.do_layer_norm_before:
        reason = "its norms come after attention and MLP and feed the residual stream too"
    elif family == "opt" and not config.layer_norm_elementwise_affine:
        reason = "its norms have no gain"
    if reason:
        raise LLMPruneError(f"This {family} model cannot be stored folded ({reason}): leave out --form folded.")


def foldings(config: PretrainedConfig) -> dict[str, Folding]:
    """How the gates of every role are folded when the score is `wina`.

    Returns:
        By role: `exact` (WINA's score), `group norm` (one norm for the query heads that share a value channel: close to WINA's
        score) or `magnitude` (nothing to fold into: TEAL's score).

    Raises:
        LLMPruneError: see `check_foldable`.
    """
    check_foldable(config)
    found: dict[str, Folding] = dict.fromkeys(FAMILIES[config.model_type].roles.values(), "exact")
    if any(sizes.group > 1 for sizes in anatomy(config).blocks):
        found["o"] = "group norm"
    if not _down_is_foldable(config):
        found["down"] = "magnitude"
    return found


def foldable_norms(weights_OI: Mapping[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """The norms of a block's gates that can be folded; for the score `wina` with shared masks, in the native basis.

    Whoever calibrates a plan that is to be folded uses these norms in the scores |x_i| c_i, so that thresholds and histograms
    are those of the folded model, and gives them to `fold_block`. Of q, k, v and of gate, up they are what shared masks have
    anyway; down's is its own where a scale passes from up to down, otherwise ones; o's is the norm over all query heads that
    share a value channel.

    Args:
        weights_OI: the weights of one block's linears by module name ("model.layers.3.self_attn.q_proj"), [O, I] whatever the
            model stores, any float dtype.
        config: the model's.

    Returns:
        c by module name, float32 [I]; the linears that read one tensor have the same.

    Raises:
        LLMPruneError: see `check_foldable`.
    """
    check_foldable(config)
    if not weights_OI:
        return {}
    block = _Block.of(weights_OI, config)
    squares = {role: _squares(weights_OI[name]) for role, name in block.names.items()}
    for readers in (_ATTENTION, _MLP):
        if present := [role for role in readers if role in squares]:
            squares |= dict.fromkeys(present, torch.stack([squares[role] for role in present]).sum(dim=0))
    if "o" in squares:
        per_head = block.by_value_channel(squares["o"])
        squares["o"] = per_head.sum(dim=1, keepdim=True).expand_as(per_head).reshape(-1)
    if "down" in squares and not _down_is_foldable(config):
        squares["down"] = torch.ones_like(squares["down"])
    return {name: squares[role].sqrt().float() for role, name in block.names.items()}


def fold_block(
    tensors: Mapping[str, Tensor], gates: Mapping[str, Gate], config: PretrainedConfig
) -> tuple[dict[str, Tensor], dict[str, Gate]]:
    """Fold the norms of a block's gates into its weights.

    Args:
        tensors: all parameters of one block by their names in the model ("model.layers.3.self_attn.q_proj.weight"), as stored.
        gates: the block's gates by module name, with norms that `foldable_norms` gives, or ones. Of linears that read
            one tensor all have a gate, or none.
        config: the model's.

    Returns:
        The parameters, in the same dtypes: those that change as new tensors, the others as they are. The gates with norms of
        ones and the same thresholds, which now are about |x|; `weight_norm`, where it is known, is the folded weight's.

    Raises:
        LLMPruneError: see `check_foldable`; the gates' norms cannot be folded; or the folded weights leave their dtype's range.
    """
    check_foldable(config)
    if not gates:
        return dict(tensors), {}
    for gate in gates.values():
        if gate.basis is not None:
            raise LLMPruneError(
                f"The gate of {gate.name!r} works in a rotated basis, which cannot be folded: use --basis native, or leave out "
                "--form folded."
            )
    block = _Block.of((name.removesuffix(".weight") for name in tensors), config)
    folded = dict(tensors)
    # What a linear's outputs (rows of W) and inputs (columns of W) are multiplied by, float64.
    factor_O: dict[str, Tensor] = {}
    factor_I: dict[str, Tensor] = {}
    norms = NORMS[block.body.family]
    for norm, readers in ((norms.attention, _ATTENTION), (norms.mlp, _MLP)):
        names = [block.names[role] for role in readers if role in block.names]
        gated = [gates[name] for name in names if name in gates]
        assert len(gated) in (0, len(names)), f"only some of {names} have gates"
        scale_I = _common(gated)
        if scale_I is not None:
            _check_dead(names, scale_I, folded, block.body)
            real_I = _scale_norm(folded, block.prefix + norm, scale_I, norms.offset)
            factor_I |= dict.fromkeys(names, _inverse(real_I))
    for role, producers in (("o", ("v", "qkv")), ("down", ("up", "gate_up"))):
        reader = block.names.get(role, "")
        scale_I = _common([gates[reader]] if reader in gates else [])
        if scale_I is not None:
            _check_dead([reader], scale_I, folded, block.body)
            made_by = next(block.names[producer] for producer in producers if producer in block.names)
            factor_I[reader] = _inverse(scale_I)
            factor_O[made_by] = block.output_factors(role, made_by, scale_I, config)
    for name in block.names.values():
        by_O, by_I = factor_O.get(name), factor_I.get(name)
        rows, columns = (by_I, by_O) if block.body.transposed else (by_O, by_I)
        folded[f"{name}.weight"] = _scaled(f"{name}.weight", folded[f"{name}.weight"], rows, columns)
        if f"{name}.bias" in folded:
            folded[f"{name}.bias"] = _scaled(f"{name}.bias", folded[f"{name}.bias"], by_O)
    return folded, {name: _folded_gate(gate, folded[f"{name}.weight"], block.body) for name, gate in gates.items()}


@dataclass(frozen=True)
class _Block:
    """Where things are in one block.

    Args:
        prefix: of the names of its modules.
        index: of the block.
        names: of its linears by role.
        body: the model's anatomy.
    """

    prefix: str
    index: int
    names: dict[str, str]
    body: Anatomy

    @classmethod
    def of(cls, modules: Iterable[str], config: PretrainedConfig) -> _Block:
        """The block of which names of modules are given, other names may be among them."""
        family: Family = FAMILIES[config.model_type]
        given = set(modules)
        start = f"{family.blocks}."
        index = next(name for name in given if name.startswith(start)).removeprefix(start).split(".")[0]
        prefix = f"{start}{index}."
        names = {role: prefix + suffix for suffix, role in family.roles.items() if prefix + suffix in given}
        return cls(prefix, int(index), names, anatomy(config))

    def by_value_channel(self, of_o_I: Tensor) -> Tensor:
        """Something about the inputs of o, seen as [KV heads, query heads of each, head_dim]."""
        sizes = self.body.blocks[self.index]
        return of_o_I.view(sizes.kv_heads, sizes.group, self.body.head_dim)

    def output_factors(self, role: str, made_by: str, scale_I: Tensor, config: PretrainedConfig) -> Tensor:
        """Factors for the outputs of the linear that makes the inputs of o or down, float64 [O]: ones for those that do not.

        Raises:
            LLMPruneError: no factors on the outputs scale the inputs so.
        """
        if role == "down":
            if not _down_is_foldable(config):
                raise LLMPruneError(
                    f"The norm of {self.names[role]!r} cannot be folded through the activation function before it: make the "
                    "plan with --form folded, which scores that gate by magnitude."
                )
            return self._placed(made_by, scale_I)
        per_head = self.by_value_channel(scale_I)
        if not torch.equal(per_head, per_head[:, :1].expand_as(per_head)):
            raise LLMPruneError(
                f"The norms of {self.names[role]!r} differ among query heads that share a value channel, which takes one "
                "scale: make the plan with --form folded, which scores them by one norm."
            )
        return self._placed(made_by, per_head[:, 0].reshape(-1))

    def _placed(self, made_by: str, scale_C: Tensor) -> Tensor:
        """Scales of value or up channels at their places among the outputs of the linear that has them."""
        layout = self.body.linears[made_by.removeprefix(self.prefix)].out
        ones = torch.ones_like(scale_C)
        if layout == "channel twice":
            return torch.cat([ones, scale_C])
        if layout == "q k v":
            sizes = self.body.blocks[self.index]
            return torch.cat([scale_C.new_ones(sizes.heads * self.body.head_dim), ones, scale_C])
        if layout == "q k v by head":
            per_head = scale_C.view(-1, 1, self.body.head_dim)
            return torch.cat([torch.ones_like(per_head)] * 2 + [per_head], dim=1).reshape(-1)
        assert layout in ("kv", "channel"), layout
        return scale_C


def _down_is_foldable(config: PretrainedConfig) -> bool:
    """Whether a positive factor on an output of up is the same factor on an input of down."""
    if {"gate", "gate_up"} & set(FAMILIES[config.model_type].roles.values()):
        return True  # down reads act(gate) * up
    return (getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)) == "relu"


def _squares(weight_OI: Tensor) -> Tensor:
    """Sums of squares of the columns, float64 [I]."""
    return weight_OI.double().square().sum(dim=0)


def _common(gates: Sequence[Gate]) -> Tensor | None:
    """The one norm of gates that read one tensor, float64 [I]; None where there is nothing to fold.

    Raises:
        LLMPruneError: they have different norms.
    """
    if not gates:
        return None
    first = gates[0]
    for gate in gates[1:]:
        if not torch.equal(gate.norm_I, first.norm_I):
            raise LLMPruneError(
                f"The gates of {first.name!r} and {gate.name!r} read one tensor, which takes one scale, but have norms of "
                "their own: make the plan with --form folded, which shares their masks."
            )
    return None if (first.norm_I == 1).all() else first.norm_I.double()


def _check_dead(names: Sequence[str], scale_I: Tensor, tensors: Mapping[str, Tensor], body: Anatomy) -> None:
    """Raise `LLMPruneError` if a norm is 0 for an input that has weights, those of a linear that was not counted."""
    for name in names:
        weight = tensors[f"{name}.weight"]
        weight_OI = weight.T if body.transposed else weight
        if weight_OI[:, (scale_I == 0).to(weight.device)].any():
            raise LLMPruneError(
                f"The gate of {name!r} never opens for an input that has weights, which folding would lose: use --score wina, "
                "or leave out --form folded."
            )


def _inverse(scale_I: Tensor) -> Tensor:
    """1 / scale; 1 where that is 0, because the column is zero already."""
    return torch.where(scale_I == 0, 1.0, 1 / scale_I)


def _scale_norm(tensors: dict[str, Tensor], name: str, scale_I: Tensor, offset: float) -> Tensor:
    """Scale a norm's outputs, in place of its parameters in `tensors`.

    Returns:
        The scale that they have after rounding, float64 [I].
    """
    weight = tensors[f"{name}.weight"]
    scale_I = scale_I.to(weight.device)
    gain_I = weight.double() + offset
    stored = _rounded(f"{name}.weight", gain_I * scale_I - offset, weight.dtype)
    real_I = torch.where(gain_I == 0, scale_I, (stored.double() + offset) / gain_I)
    if ((real_I == 0) & (scale_I > 0)).any():
        _refuse_range(f"{name}.weight", weight.dtype)
    tensors[f"{name}.weight"] = stored
    if f"{name}.bias" in tensors:
        tensors[f"{name}.bias"] = _scaled(f"{name}.bias", tensors[f"{name}.bias"], real_I)
    return real_I


def _scaled(name: str, tensor: Tensor, rows: Tensor | None, columns: Tensor | None = None) -> Tensor:
    """A tensor with factors (float64; None: ones) on its rows and columns, in its dtype; itself where there are none."""
    if rows is None and columns is None:
        return tensor
    scaled = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    step = max(1, _PIECE // max(1, tensor[0].numel()))
    for start in range(0, len(tensor), step):
        wide = tensor[start : start + step].double()
        if rows is not None:
            factors = rows[start : start + step].to(tensor.device)
            wide = wide * (factors[:, None] if tensor.ndim > 1 else factors)
        if columns is not None:
            wide = wide * columns.to(tensor.device)
        scaled[start : start + step] = _rounded(name, wide, tensor.dtype)
    return scaled


def _rounded(name: str, wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 values in the stored dtype.

    Raises:
        LLMPruneError: some overflow, or of a matrix so many underflow that more is lost than by rounding. (Small biases lie
            among the subnormal numbers of float16 to begin with.)
    """
    rounded = wide.to(dtype)
    lost = torch.linalg.vector_norm(rounded.double() - wide)
    allowed = torch.finfo(dtype).eps * torch.linalg.vector_norm(wide)
    if not lost.isfinite() or (wide.ndim > 1 and lost > allowed):
        _refuse_range(name, dtype)
    return rounded


def _refuse_range(name: str, dtype: torch.dtype) -> None:
    first = {torch.float16: "save the model in bfloat16 or float32 first, or ", torch.bfloat16: "save it in float32 first, or "}
    raise LLMPruneError(
        f"Folded, {name!r} leaves the range of {str(dtype).removeprefix('torch.')}: {first.get(dtype, '')}leave out "
        "--form folded."
    )


def _folded_gate(gate: Gate, weight: Tensor, body: Anatomy) -> Gate:
    """The gate without its norm, for the folded weight as it is stored."""
    weight_norm = None if gate.weight_norm is None else frobenius(weight.T if body.transposed else weight)
    return replace(gate, norm_I=torch.ones_like(gate.norm_I), weight_norm=weight_norm)
