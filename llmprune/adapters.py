"""Low-rank adapters (LoRA, arXiv 2106.09685) that leave pruned weights pruned, and their merge into the weights.

An adapter of rank r adds g B A to a linear's weight W [O, I], with A [r, I] and B [O, r]. B starts at zero, so that at first
nothing changes. In a linear with pruned weights what is added is g (B A) M instead, where M is 1 where W is not 0: training
then runs on the very weights that a merge leaves, and not on ones that the merge would cut again. That product of O x I numbers
is made anew for every forward and backward, since it takes r multiplications a number where a batch of T tokens takes T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import linear as product

from .models import Linear

# What B A is multiplied with: alpha / r, alpha being 2 r in every block, so that ranks differ and step sizes do not.
GAIN = 2.0


@dataclass(frozen=True)
class Place:
    """Where an adapter goes, its rank, and whether the linear's zeros are to stay."""

    linear: Linear
    rank: int
    keeps_zeros: bool

    @property
    def numel(self) -> int:
        """Numbers to train."""
        return self.rank * sum(self.linear.shape)


class Adapter:
    """One linear's adapter.

    Args:
        place: where.
        values_P, slopes_P: float32 memory for A, then B, and for their gradients.
    """

    def __init__(self, place: Place, values_P: Tensor, slopes_P: Tensor) -> None:
        self.place, self.linear = place, place.linear
        outputs, inputs = self.linear.shape
        shapes, sizes = ((place.rank, inputs), (outputs, place.rank)), (place.rank * inputs, outputs * place.rank)
        self.down_RI, self.up_OR = (
            nn.Parameter(values.view(shape)) for values, shape in zip(values_P.split(sizes), shapes, strict=True)
        )
        # Given beforehand, gradients are added up where they are.
        self.down_RI.grad, self.up_OR.grad = (
            slopes.view(shape) for slopes, shape in zip(slopes_P.split(sizes), shapes, strict=True)
        )

    def run(self, inputs: Tensor, *sizes: list[int]) -> Tensor:
        """The linear's forward with the adapter. `sizes`: see `experts.RoutedLinear`."""
        module = self.linear.module
        if self.place.keeps_zeros:
            weight_OI = self.linear.parameter.T if self.linear.transposed else self.linear.parameter
            output: Tensor = _Masked.apply(inputs, weight_OI, self.down_RI, self.up_OR, module.bias)
            return output
        down_RI, up_OR = (each.to(inputs.dtype) for each in (self.down_RI, self.up_OR))
        dense: Tensor = type(module).forward(module, inputs, *sizes)
        return dense + GAIN * product(product(inputs, down_RI), up_OR)

    def merged(self, stored: Tensor) -> Tensor:
        """The weight with the adapter's part added in float32, in the dtype and layout of the checkpoint's `stored`.

        Where zeros are to stay they are +0.0, and no other weight becomes zero: one that would round to zero stays as it was.
        """
        weight_OI = (stored.T if self.linear.transposed else stored).float()
        down_RI, up_OR = (each.detach().cpu() for each in (self.down_RI, self.up_OR))
        if self.place.keeps_zeros:
            merged_OI = _effective(weight_OI, down_RI, up_OR)
        else:
            merged_OI = weight_OI.addmm(up_OR, down_RI, alpha=GAIN)
        merged = (merged_OI.T if self.linear.transposed else merged_OI).to(stored.dtype)
        if self.place.keeps_zeros:
            merged = torch.where(merged == 0, stored, merged)
        return merged.add_(0.0).contiguous()  # -0.0 becomes +0.0


class Adapters:
    """The adapters of a model, all their numbers in one vector.

    Args:
        places: where, in an order that is the vector's.
        seed: of what A starts as: uniform within 1 / sqrt(I), as a fresh `nn.Linear`.
        device: where they are trained.
    """

    def __init__(self, places: Sequence[Place], *, seed: int, device: torch.device) -> None:
        sizes = [place.numel for place in places]
        self.values_P = torch.zeros(sum(sizes), device=device)
        self.slopes_P = torch.zeros(sum(sizes), device=device)
        self.all = [
            Adapter(*parts) for parts in zip(places, self.values_P.split(sizes), self.slopes_P.split(sizes), strict=True)
        ]
        generator = torch.Generator().manual_seed(seed)
        for adapter in self.all:
            start_RI = torch.rand(adapter.down_RI.shape, generator=generator)
            adapter.down_RI.data.copy_((2 * start_RI - 1) / math.sqrt(start_RI.shape[1]))

    def install(self) -> None:
        """Let the linears run with their adapters."""
        for adapter in self.all:
            adapter.linear.module.forward = adapter.run

    def remove(self) -> None:
        """Let the linears run without."""
        for adapter in self.all:
            adapter.linear.module.__dict__.pop("forward", None)


def _effective(weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor) -> Tensor:
    """W + g (B A) M in W's dtype, the sum in float32."""
    # A product with the mask is several times faster than masked_fill_.
    return (up_OR @ down_RI).mul_(GAIN).mul_(weight_OI != 0).add_(weight_OI).to(weight_OI.dtype)


class _Masked(torch.autograd.Function):
    """x (W + g (B A) M)^T + bias, with gradients of x, A and B. Keeps x and the factors for the backward, no O x I matrix."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, inputs: Tensor, weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight_OI, down_RI, up_OR)
        return product(inputs, _effective(weight_OI, down_RI, up_OR), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, slopes: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        inputs, weight_OI, down_RI, up_OR = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient = slopes @ _effective(weight_OI, down_RI, up_OR) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        slopes_TO, inputs_TI = slopes.flatten(0, -2), inputs.flatten(0, -2)
        change_OI = (slopes_TO.T @ inputs_TI).float().mul_(weight_OI != 0).mul_(GAIN)
        return gradient, None, up_OR.T @ change_OI, change_OI @ down_RI.T, None
