"""Mixture-of-experts layers with one matrix for each expert and projection, as checkpoints store them.

transformers keeps a layer's experts as two 3-D parameters (gate and up one above the other, and down), where no linear is to be
found; on the disk each expert has its own three matrices. `unfuse` puts an `Experts` in the place of every such pair of
parameters: the same arithmetic, parameters named as checkpoints name them, and every matrix a linear that can be observed and
pruned like any other.

All experts run, in order of their index, an expert without tokens on none: so every micro-batch meets every linear, in one
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .checkpoint import Checkpoint

# What checkpoints call an expert's gate, up and down projections.
Names = tuple[str, str, str]
# An expert's parts in that order, as roles.
PARTS = ("gate", "up", "down")


class RoutedLinear(nn.Linear):
    """A linear over the tokens that were routed to its expert."""

    def forward(self, inputs_RI: Tensor, sizes: list[int]) -> Tensor:  # type: ignore[override]
        """y = x W^T, [routed tokens, O].

        Args:
            inputs_RI: sample after sample.
            sizes: how many of them are each sample's.
        """
        return _sample_by_sample(partial(linear, weight=self.weight), inputs_RI, sizes)


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int, names: Names, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.names, self.act = names, act
        for name, (inputs, outputs) in zip(names, [(hidden, intermediate)] * 2 + [(intermediate, hidden)], strict=True):
            self.add_module(name, RoutedLinear(inputs, outputs, bias=False))

    @property
    def gate(self) -> nn.Module:
        return self.get_submodule(self.names[0])

    @property
    def up(self) -> nn.Module:
        return self.get_submodule(self.names[1])

    @property
    def down(self) -> nn.Module:
        return self.get_submodule(self.names[2])

    def forward(self, inputs_RI: Tensor, sizes: list[int]) -> Tensor:
        """The expert's output for its tokens, before the router's weight; arguments as of `RoutedLinear`."""
        gate_RF = _sample_by_sample(self.act, self.gate(inputs_RI, sizes), sizes)
        return self.down(gate_RF * self.up(inputs_RI, sizes), sizes)


class Experts(nn.ModuleList):
    """The experts of a layer, called as the module that it stands for is.

    Attributes:
        length: tokens of a sample, which the layer around it notes before it calls.
    """

    def __init__(self, experts: int, hidden: int, intermediate: int, names: Names, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__(Expert(hidden, intermediate, names, act) for _ in range(experts))
        self.length = 0

    def __iter__(self) -> Iterator[Expert]:
        return cast(Iterator[Expert], super().__iter__())

    def forward(self, hidden_NI: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The sum of every token's experts by the router's weights.

        Args:
            hidden_NI: all samples' tokens, one sample after the other.
            chosen_NK: the experts of each token.
            weights_NK: the weight of each of those.
        """
        top, samples = chosen_NK.shape[1], len(hidden_NI) // self.length
        chosen_P = chosen_NK.flatten()
        # Stable: within an expert tokens stay in order.
        place_P = chosen_P.argsort(stable=True)
        sample_P = torch.arange(len(chosen_P), device=chosen_P.device) // (top * self.length)
        counts_ES = torch.bincount(chosen_P * samples + sample_P, minlength=len(self) * samples).view(len(self), samples)
        sizes = counts_ES.tolist()
        output_NI = torch.zeros_like(hidden_NI)
        for expert, place_R, parts in zip(self, place_P.split([sum(each) for each in sizes]), sizes, strict=True):
            token_R = place_R // top
            routed_RI = expert(hidden_NI[token_R], parts) * weights_NK.flatten()[place_R, None]
            output_NI.index_add_(0, token_R, routed_RI.to(output_NI.dtype))
        return output_NI


def unfuse(model: nn.Module, names: Names, routers: tuple[str, ...]) -> None:
    """Put `Experts` in the place of every module that holds experts as 3-D parameters; on the meta device, without weights.

    Args:
        names: see `Names`.
        routers: names, within the layer around the experts, of what chooses or weighs them: these run sample by sample.
    """
    for path, module in list(model.named_modules()):
        if not is_fused(module):
            continue
        count, hidden, intermediate = module.get_parameter("down_proj").shape
        with torch.device("meta"):
            experts = Experts(count, hidden, intermediate, names, module.get_submodule("act_fn")).eval().requires_grad_(False)
        owner, _, leaf = path.rpartition(".")
        layer = model.get_submodule(owner)
        layer.register_forward_pre_hook(partial(_note_length, experts))
        setattr(layer, leaf, experts)
        for name in routers:
            router = layer.get_submodule(name)
            router.forward = partial(_route, experts, router.forward)


def is_fused(module: nn.Module) -> bool:
    """Whether a module of transformers holds experts as 3-D parameters."""
    fused = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(parameter is not None and parameter.ndim == 3 for parameter in fused)


def _note_length(experts: Experts, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    experts.length = args[0].shape[-2]


def _route(
    experts: Experts, forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]], hidden: Tensor
) -> Tensor | tuple[Tensor, ...]:
    """A router's outputs, each [all tokens, ...]."""
    parts = [forward(each_TI) for each_TI in hidden.reshape(-1, experts.length, hidden.shape[-1])]
    if isinstance(parts[0], Tensor):
        return torch.cat(cast(list[Tensor], parts))
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def _sample_by_sample(function: Callable[[Tensor], Tensor], inputs_RI: Tensor, sizes: list[int]) -> Tensor:
    """A function of each sample's tokens.

    The bits of a product depend on how many rows it has, and those of an exponential on where in memory it stands: results must
    not depend on how samples are batched. On a GPU they do anyway, and small products cost most.
    """
    if len(sizes) == 1 or inputs_RI.device.type == "cuda":
        return function(inputs_RI)
    return torch.cat([function(inputs_SI) for inputs_SI in inputs_RI.split(sizes)])


def split_fused(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], names: Names) -> Checkpoint:
    """A checkpoint that stores experts as 3-D tensors, seen as if each expert had matrices of its own.

    Args:
        shapes: of the matrices, by the names that they are to have, as `layers.0.mlp.experts.3.w1.weight`.
        names: see `Names`.
    """
    entries = dict(checkpoint.entries)
    for name, shape in shapes.items():
        path, _, part = name.removesuffix(".weight").rpartition(".")
        path, _, number = path.rpartition(".")
        fused = checkpoint.entries.get(path + (".down_proj" if part == names[2] else ".gate_up_proj"))
        if fused is None:
            continue
        size = shape[0] * shape[1] * fused.dtype.itemsize
        # Gate lies above up.
        place = int(number) if part == names[2] else 2 * int(number) + names.index(part)
        entries[name] = replace(fused, offset=fused.offset + place * size, nbytes=size, shape=shape)
        entries.pop(path + ".down_proj", None)
        entries.pop(path + ".gate_up_proj", None)
    return Checkpoint(checkpoint.directory, entries)
