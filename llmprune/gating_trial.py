"""Gates tried on a block: what its output loses, on a few calibration samples, when some of its inputs are dropped.

The samples run through the dense model like all others (`Stream`), in one batch. The first 1 % of their positions stay dense,
and the error is taken over the last quarter, as in the published code of TEAL (arXiv 2408.14690) and WINA (arXiv 2505.19427).
Every trial costs a forward of the block, so few samples have to do: 2048 tokens on a CPU, 8192 on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .gating_scores import channel_thresholds, drop, scored
from .models import Linear
from .stream import Stream

TOKENS, GPU_TOKENS = 2048, 8192
# Called with the linear's name before it runs; what it returns are the arguments instead.
Hook = Callable[[str, nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]
# Positions that stay dense, at least one; and those that errors are taken over.
DENSE_PART, JUDGED_PART = 0.01, 0.25


def trial_stream(stream: Stream) -> Stream:
    """A stream of the first calibration samples, in one batch, the same on every rank and whatever the micro-batch is."""
    ids_NT = stream.calibration_NT
    assert ids_NT is not None
    tokens = GPU_TOKENS if stream.skeleton.device.type == "cuda" else TOKENS
    samples = min(len(ids_NT), max(1, tokens // ids_NT.shape[1]))
    return Stream(stream.skeleton, ids_NT[:samples], micro_batch=samples, propagate="dense")


class Trial:
    """A block that is in memory, and what it does without gates.

    Args:
        stream: of the samples (`trial_stream`), whose hidden states are the block's input.
        linears: the block's.
        bases: T and T^-1 by the name of the linear that reads x T.
    """

    def __init__(self, stream: Stream, linears: Sequence[Linear], bases: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.stream, self.linears, self.bases = stream, list(linears), bases
        self.index = linears[0].block
        self.inputs: dict[str, Tensor] = {}
        hidden_NTI = stream.hidden(0)
        self.samples, tokens = hidden_NTI.shape[:2]
        self.dense_positions = max(1, math.ceil(DENSE_PART * tokens))
        self.judged = slice(tokens - max(1, round(JUDGED_PART * tokens)), tokens)
        self.forwards = 0
        self.output_NTI = self._run({linear.name: self._keep for linear in linears})
        added_NTI = (self.output_NTI - hidden_NTI)[:, self.judged]
        self._scale = float(added_NTI.double().square().sum())

    def finish(self) -> None:
        """The samples go on to the next block, by the dense one."""
        self.stream.finish_forward(self.index, 0, self.output_NTI)

    def error(self, taus: Mapping[str, Tensor]) -> float:
        """||block with gates - block||^2 / ||block - its input||^2.

        Args:
            taus: per-channel thresholds, float32 [I], by linear; the others run dense.
        """
        output_NTI = self._run({name: partial(self._gate, tau_I=tau_I) for name, tau_I in taus.items()})
        lost = float((output_NTI - self.output_NTI)[:, self.judged].double().square().sum())
        return lost / self._scale if self._scale else 0.0

    def _run(self, hooks: Mapping[str, Hook]) -> Tensor:
        handles = [
            linear.module.register_forward_pre_hook(partial(hooks[linear.name], linear.name))
            for linear in self.linears
            if linear.name in hooks
        ]
        self.forwards += 1
        try:
            return self.stream.forward(self.index, 0)
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.inputs[name] = args[0].reshape(self.samples, -1, args[0].shape[-1])

    def _gate(self, name: str, module: nn.Module, args: tuple[Tensor, ...], *, tau_I: Tensor) -> tuple[Tensor, ...]:
        inputs_NTI = args[0].reshape(self.samples, -1, args[0].shape[-1])
        return (self.gated(name, inputs_NTI, tau_I).reshape(args[0].shape), *args[1:])

    def gated(self, name: str, inputs_NTI: Tensor, tau_I: Tensor) -> Tensor:
        """What a linear reads behind its gate, the first positions as they are."""
        if name in self.bases:
            basis_II, inverse_II = (matrix_II.to(inputs_NTI.dtype) for matrix_II in self.bases[name])
            gated_NTI = drop(inputs_NTI @ basis_II, tau_I) @ inverse_II
        else:
            gated_NTI = drop(inputs_NTI, tau_I)
        return torch.cat([inputs_NTI[:, : self.dense_positions], gated_NTI[:, self.dense_positions :]], dim=1)

    def linear_errors(self, linear: Linear, taus: Sequence[Tensor]) -> list[float]:
        """||W x - W gate(x)||^2 / ||W x||^2 on what a linear reads in the dense block, for every set of thresholds."""
        inputs_NTI = self.inputs[linear.name]
        seen_NTI, weight_OI = inputs_NTI[:, self.dense_positions :], linear.weight_OI
        whole = float((seen_NTI.float() @ weight_OI.T).square().sum(dim=-1).double().sum())
        errors = []
        for tau_I in taus:
            lost_NTI = (inputs_NTI - self.gated(linear.name, inputs_NTI, tau_I))[:, self.dense_positions :].float()
            errors.append(float((lost_NTI @ weight_OI.T).square().sum(dim=-1).double().sum()) / whole if whole else 0.0)
        return errors

    def dropped(self, linear: Linear, tau_I: Tensor) -> float:
        """The share of a linear's inputs that its gate drops here."""
        return float((self._seen(linear).abs() <= tau_I).double().mean())

    def thresholds_at(self, linear: Linear, norm_I: Tensor, share: float) -> Tensor:
        """Per-channel thresholds that drop exactly this share of what a linear reads here (more where scores are equal)."""
        scores = scored(self._seen(linear), norm_I).flatten()
        number = round(share * len(scores))
        threshold = float(scores.kthvalue(number).values) if number else 0.0
        return channel_thresholds(threshold, norm_I)

    def _seen(self, linear: Linear) -> Tensor:
        """What a gate compares, float32 [N, T, I], of the positions that it gates."""
        inputs_NTI = self.inputs[linear.name][:, self.dense_positions :]
        if linear.name in self.bases:
            inputs_NTI = inputs_NTI @ self.bases[linear.name][0].to(inputs_NTI.dtype)
        return inputs_NTI.float()
