"""The gradient of the loss at linears' weights, and its second moment over a block of them, from one forward and backward.

For a linear y = x W^T with inputs X [B, T, I] and slopes S [B, T, O], the gradients of each sequence's loss at its output,

    dL_b / dW = S_b^T X_b,      entry (r, c) of it:  sum_t S_btr X_btc,      position t's part of that:  S_btr X_btc.

So the gradients of single sequences or positions at N chosen weights are products of N gathered columns, whatever W's size.
Weights ask for no gradient: each linear's output does, so no graph exists below the first of the linears that are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import isfinite
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from .errors import LLMPruneError
from .models import Linear, Skeleton
from .statistics import Samples, by_sample

Fisher = Literal["token", "sequence"]
Target = Literal["text", "dense"]


class Probe:
    """What a batch says of one linear.

    Args:
        linear: which.
        block_N: flat indices into its [O, I] weights, or None where they are chosen when the gradient is known.
        fisher: whose gradients make the factor: single positions or whole sequences.
        stride: of the positions, every so many-th is taken.
    """

    def __init__(self, linear: Linear, block_N: Tensor | None, *, fisher: Fisher, stride: int) -> None:
        self.linear, self.block_N, self.fisher, self.stride = linear, block_N, fisher, stride
        # The sum over the sequences of the gradients of their losses, float32.
        self.gradient_OI = torch.zeros(linear.shape, device=linear.parameter.device)
        self.sequences = self.positions = self.length = 0
        self._rows: list[Tensor] = []
        # Inputs and slopes of each sequence, while the block is unknown.
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def update(self, inputs_BTI: Samples, slopes_BTO: Samples, length: int) -> None:
        """Add sequences of `length` positions, of which an expert sees some. One at a time, so that the sums do not depend on
        how they were batched."""
        self.length = length
        for inputs_TI, slopes_TO in zip(inputs_BTI, slopes_BTO, strict=True):
            self.gradient_OI.addmm_(slopes_TO.float().T, inputs_TI.float())
            if self.block_N is None:
                self._waiting.append((inputs_TI, slopes_TO))
            else:
                self._rows.append(self._gradients(inputs_TI, slopes_TO))
            self.sequences += 1
            self.positions += length

    def _gradients(self, inputs_TI: Tensor, slopes_TO: Tensor) -> Tensor:
        """The block's gradients at each position taken, times the number of positions, or of the sequence: [rows, N]."""
        assert self.block_N is not None
        row_N, column_N = self.block_N // self.linear.shape[1], self.block_N % self.linear.shape[1]
        taken = slice(len(self._rows) % self.stride, None, self.stride) if self.fisher == "token" else slice(None)
        part_TN = slopes_TO[taken].float()[:, row_N] * inputs_TI[taken].float()[:, column_N]
        if self.fisher == "sequence":
            return part_TN.sum(dim=0, keepdim=True)
        # The gradients at positions that were not routed to the linear's expert are zero.
        others = len(range(self.length)[taken]) - len(part_TN)
        return pad(part_TN * self.length, (0, 0, 0, others))

    def look_at(self, block_N: Tensor) -> None:
        """Say which weights, where that was left open."""
        self.block_N = block_N
        for inputs_TI, slopes_TO in self._waiting:
            self._rows.append(self._gradients(inputs_TI, slopes_TO))
        self._waiting = []

    @property
    def samples(self) -> int:
        """How many gradients, of the kind in `factor_BN`, the mean is taken over."""
        return self.positions if self.fisher == "token" else self.sequences

    @property
    def factor_BN(self) -> Tensor:
        """Gradients by position or sequence, [B, N]: the block's curvature is G^T G / B."""
        self._rows = [torch.cat(self._rows)]
        return self._rows[0]


def differentiate(
    skeleton: Skeleton, ids_BT: Tensor, probes: Sequence[Probe], *, micro_batch: int, target: Target = "text"
) -> float:
    """Show a batch to the probes. Returns its mean loss.

    Raises:
        LLMPruneError: the loss is not finite.
    """
    total = 0.0

    def see(probe: Probe, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs, sizes = args[0].detach(), args[1:]
        if not output.requires_grad:
            output.requires_grad_()

        def take(slopes: Tensor) -> None:
            inputs_BTI, slopes_BTO = (by_sample((each, *sizes), len(part_BT)) for each in (inputs, slopes))
            probe.update(inputs_BTI, slopes_BTO, part_BT.shape[1])

        output.register_hook(take)

    handles = [probe.linear.module.register_forward_hook(partial(see, probe)) for probe in probes]
    try:
        for part_BT in ids_BT.split(micro_batch):
            with torch.enable_grad():
                loss_B = sequence_losses(skeleton, part_BT, target)
                loss_B.sum().backward()
            total += float(loss_B.detach().double().sum())
    finally:
        for handle in handles:
            handle.remove()
    if not isfinite(total):
        raise LLMPruneError(
            f"The loss on the calibration samples is not finite in {skeleton.dtype}: check the weights, or compute in a wider "
            "type with --dtype float32."
        )
    return total / len(ids_BT)


def mean_loss(skeleton: Skeleton, ids_BT: Tensor, *, micro_batch: int, target: Target = "text") -> float:
    """The mean loss of sequences. NaN or infinite if the model overflows, which is no reason to prefer it."""
    with torch.no_grad():
        parts = [float(sequence_losses(skeleton, part, target).double().sum()) for part in ids_BT.split(micro_batch)]
    return sum(parts) / len(ids_BT)


def sequence_losses(skeleton: Skeleton, ids_BT: Tensor, target: Target) -> Tensor:
    """The cross-entropy of each sequence with the text or with the dense model's predictions, mean over predicted tokens."""
    ids_BT = ids_BT.to(skeleton.device)
    wanted = ids_BT[:, 1:].flatten()
    if target == "dense":
        with torch.no_grad(), _dense(skeleton):
            wanted = _logits(skeleton, ids_BT).softmax(dim=1)
    return cross_entropy(_logits(skeleton, ids_BT), wanted, reduction="none").view(len(ids_BT), -1).mean(dim=1)


def _logits(skeleton: Skeleton, ids_BT: Tensor) -> Tensor:
    """For every predicted token of every sequence, float32 [B * (T - 1), vocabulary]."""
    logits_BTV = skeleton.model(input_ids=ids_BT, use_cache=False).logits
    return logits_BTV[:, :-1].float().flatten(0, 1)


@contextmanager
def _dense(skeleton: Skeleton) -> Iterator[None]:
    """Inside, linears run with the weights that are stored."""
    pruned = {linear: linear.parameter for linear in skeleton.all_linears()}
    for linear in pruned:
        assert linear.stored is not None
        dense = linear.stored.to(skeleton.device, skeleton.dtype)
        linear.module._parameters["weight"] = nn.Parameter(dense, requires_grad=False)
    try:
        yield
    finally:
        for linear, parameter in pruned.items():
            linear.module._parameters["weight"] = parameter
