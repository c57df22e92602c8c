"""What a gate compares: scores |x_i| c_i of a linear's inputs, their histogram, and the bases in which columns are orthogonal.

A histogram of scores answers every question about a threshold: which share of the inputs it drops (`Curve.share`), which
threshold drops a share (`Curve.threshold`), and the energy that goes with it (`Curve.energy`). Its bins are intervals of
float32 that agree in exponent and the first 6 bits of the mantissa, so they are about 1 % wide wherever they are, and sorting a
score into them is a shift of its bits: exact, and the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .statistics import Samples

# 64 bins an octave over [2^-40, 2^24); what is below goes into the first.
SHIFT, LOWEST, BINS = 17, (127 - 40) << 6, 64 * 64
# One more for exact zeros, before the others, and one for what is above, after them.
LENGTH = BINS + 2
# Scores that are counted at once.
PART = 1 << 18
_INFINITE = 0x7F800000

# Linears of a block that read one tensor, by role.
TOGETHER = (("q", "k", "v"), ("gate", "up"))
# Whose column norms the published code of WINA takes, and what its rotation makes orthogonal.
RELEASED = ("k", "gate", "qkv", "gate_up")
# Linears whose inputs are not worth rotating: the rotation is as large as the linear.
NEVER_ROTATED = ("o", "down")
# The norm that feeds a linear, whatever its family calls it; the first of these names that a block has.
ATTENTION_NORMS = ("input_layernorm", "self_attn_layer_norm", "ln_1")
MLP_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "final_layer_norm", "ln_2")
# A column of a rotated weight below this share of the largest is rounding.
ROUNDING = 1e-6


def _edges() -> NDArray[np.float64]:
    """Edges of all bins in float64, [LENGTH + 1]: of zeros [0, 0], then from 0 on."""
    inner = (np.arange(1, BINS + 1, dtype=np.int32) + LOWEST) << SHIFT
    return np.concatenate([[0.0, 0.0], inner.astype(np.int32).view(np.float32).astype(np.float64), [np.finfo(np.float32).max]])


EDGES = _edges()


def histogram(scores: Tensor) -> Tensor:
    """Scores counted by bin, int64 [LENGTH]: exact zeros, 64 bins an octave, and what is beyond.

    Args:
        scores: float32, not negative, any shape.
    """
    bits = scores.reshape(-1).view(torch.int32)
    bins = (bits >> SHIFT).sub_(LOWEST - 1).clamp_(1, BINS + 1)
    # A product is faster than a mask.
    return torch.bincount(bins.mul_(bits != 0), minlength=LENGTH)


class ScoreHistogram:
    """Histogram of a linear's scores |x_i| c_i over all tokens; integers, so that all merges are exact.

    Args:
        features: of the input, I.
        device: where it is.
        norm_I: c, float32; ones if left out.
        basis_II: T, if x T is gated instead of x.
    """

    def __init__(
        self, features: int, device: torch.device, norm_I: Tensor | None = None, basis_II: Tensor | None = None
    ) -> None:
        self.norm_I = norm_I
        self.basis_II = basis_II
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.broken = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(LENGTH, dtype=torch.int64, device=device)

    def update(self, inputs_BTI: Samples, first: int = 0) -> None:
        for inputs_TI in inputs_BTI:
            # A few tokens at a time stay in the cache.
            rows = max(PART // inputs_TI.shape[-1], 1)
            self.tokens += len(inputs_TI)
            if self.basis_II is not None:
                inputs_TI = inputs_TI @ self.basis_II.to(inputs_TI.dtype)
            for part_PI in inputs_TI.split(rows):
                scores_PI = scored(part_PI, self.norm_I)
                self.counts += histogram(scores_PI)
                self.broken += scores_PI.view(torch.int32).amax() >= _INFINITE

    def merge(self, other: ScoreHistogram) -> None:
        for own, theirs in zip(self.sums(), other.sums(), strict=True):
            own += theirs

    def sums(self) -> list[Tensor]:
        return [self.tokens, self.broken, self.counts]

    def is_finite(self) -> bool:
        return not self.broken

    @property
    def seen(self) -> int:
        return int(self.tokens)

    @staticmethod
    def size(features: int) -> int:
        return 8 * LENGTH


def scored(inputs_TI: Tensor, norm_I: Tensor | None) -> Tensor:
    """|x_i| c_i in float32."""
    scores_TI = inputs_TI.float().abs()
    # -0.0 and NaN lose their sign by abs, so that bits compare as values do.
    return scores_TI if norm_I is None else scores_TI * norm_I


class Curve:
    """What thresholds on a histogram of scores do. Inside a bin scores are taken to be spread evenly.

    Args:
        counts: int64 [LENGTH].
    """

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts.cpu().numpy()
        self.until = np.concatenate([[0], np.cumsum(self.counts)])
        self.total = int(self.until[-1])

    @property
    def zeros(self) -> float:
        """Share of scores that are exactly zero, whose inputs every threshold drops."""
        return float(self.counts[0] / self.total) if self.total else 0.0

    def share(self, threshold: float) -> float:
        """The share of scores <= `threshold`, in [0, 1]; 0 for a negative one."""
        if threshold < 0 or not self.total:
            return 0.0
        if threshold >= EDGES[-1]:
            return 1.0
        number = max(int(np.searchsorted(EDGES, threshold, side="right")) - 1, 1)
        inside = self.counts[number] * self._within(number, threshold)
        return float((self.until[number] + inside) / self.total)

    def threshold(self, share: float) -> float:
        """The threshold that drops a share in [0, 1] of the scores; 0 where zeros alone are as many."""
        wanted = share * self.total
        if share <= 0 or wanted <= self.counts[0]:
            return 0.0
        number = min(int(np.searchsorted(self.until, wanted, side="left")) - 1, LENGTH - 1)
        low, high = EDGES[number], EDGES[number + 1]
        return float(low + (high - low) * ((wanted - self.until[number]) / self.counts[number]))

    def energy(self, share: float) -> float:
        """The mean over all scores of the square of those that go with a share: the smallest ones."""
        threshold = self.threshold(share)
        if threshold <= 0:
            return 0.0
        number = max(int(np.searchsorted(EDGES, threshold, side="left")) - 1, 1)
        low, high = EDGES[number], EDGES[number + 1]
        inside = self.counts[number] * (threshold**3 - low**3) / (3 * (high - low))
        return float((self._energies[number] + inside) / self.total)

    @staticmethod
    def _within(number: int, threshold: float) -> float:
        low, high = EDGES[number], EDGES[number + 1]
        return float((threshold - low) / (high - low))

    @cached_property
    def _energies(self) -> NDArray[np.float64]:
        """Sum of squares before each bin."""
        low, high = EDGES[:-1], EDGES[1:]
        squares = self.counts * (low * low + low * high + high * high) / 3
        return np.concatenate([[0.0], np.cumsum(squares)])


def column_norms(weight_OI: Tensor) -> Tensor:
    """||W_:,i||_2, float32 [I], summed in float64."""
    return weight_OI.double().square().sum(dim=0).sqrt().float()


def gate_norms(weights: Sequence[tuple[str, Tensor]], score: str) -> Tensor:
    """c of a gate whose linears share one mask, or of one linear: float32 [I].

    With W stacked from all of them, c_i is the norm of its column i. For `wina-released` only k and gate (or what they are
    fused into) count, and for `teal` none: ones.

    Args:
        weights: role and weight [O, I] of each.
        score: as in the recipe.
    """
    counted = [weight_OI for role, weight_OI in weights if score == "wina" or (score == "wina-released" and role in RELEASED)]
    if not counted:
        return torch.ones(weights[0][1].shape[1], device=weights[0][1].device)
    squares_I = torch.stack([weight_OI.double().square().sum(dim=0) for weight_OI in counted]).sum(dim=0)
    norm_I = squares_I.sqrt()
    return norm_I.float()


def feeding_norm(block: nn.Module, role: str) -> Tensor | None:
    """The gain g of the norm whose output a linear reads, float32 [I]; None where it reads no norm's output."""
    names = ATTENTION_NORMS if role in ("q", "k", "v", "qkv") else MLP_NORMS if role in ("gate", "up", "gate_up") else ()
    # OPT-350m and OLMo 2 normalise after their sub-layers.
    after = hasattr(block, "post_feedforward_layernorm") and not hasattr(block, "pre_feedforward_layernorm")
    if not names or after or getattr(block, "do_layer_norm_before", True) is False:
        return None
    for name in names:
        norm = getattr(block, name, None)
        if norm is not None:
            gain_I = norm.get_parameter("weight").detach().float()
            return 1 + gain_I if type(norm).__name__.startswith("Gemma") else gain_I
    return None


def orthogonal_basis(weights: Sequence[Tensor], gain_I: Tensor | None) -> Tensor:
    """T [I, I], float32, in which the columns of a stack of matrices are orthogonal: W~ = W T^-T has W~^T W~ diagonal.

    With Q the eigenvectors of the Gram of W diag(g), by falling eigenvalue, T = diag(1/g) Q takes a norm's output g * n to n Q:
    the rotation of WINA (arXiv 2505.19427, section 3.4) with the norm's gain folded in. Where g is zero, x is, too, and 1
    stands for 1/g.

    Args:
        weights: [O, I] each.
        gain_I: g; none, where no norm feeds them.
    """
    size = weights[0].shape[1]
    gain_I = torch.ones(size, device=weights[0].device) if gain_I is None else gain_I
    gain_I = torch.where(gain_I == 0, 1.0, gain_I).double()
    gram_II = torch.zeros(size, size, dtype=torch.float64, device=gain_I.device)
    for weight_OI in weights:
        folded_OI = weight_OI.double() * gain_I
        gram_II += folded_OI.T @ folded_OI
    vectors_II = torch.linalg.eigh(gram_II).eigenvectors.flip(1)
    # An eigenvector's sign is its library's choice: the largest entry, of equal ones the first, is positive here.
    largest_1I = vectors_II.abs().argmax(dim=0, keepdim=True)
    vectors_II = vectors_II * vectors_II.gather(0, largest_1I).sign()
    return (vectors_II / gain_I[:, None]).float()


def rotated(weight_OI: Tensor, basis_II: Tensor) -> Tensor:
    """W~ = W T^-T, which reads x T as W reads x: float32 [O, I]. Columns that are nothing but rounding are zero."""
    rotated_OI = torch.linalg.solve(basis_II.double(), weight_OI.double().T).T
    norm_I = rotated_OI.norm(dim=0)
    return (rotated_OI * (norm_I > ROUNDING * norm_I.max())).float().contiguous()


def drop(inputs: Tensor, tau_I: Tensor) -> Tensor:
    """The inputs with zeros where |x_i| <= tau_i: any float dtype [..., I], compared in float32. NaN stays."""
    return inputs.masked_fill(inputs.float().abs() <= tau_I, 0)


def channel_thresholds(threshold: float, norm_I: Tensor) -> Tensor:
    """tau = t / c, float32 [I]: +inf for a column of zeros; all -1 if t is negative, which keeps everything."""
    if threshold < 0:
        return torch.full_like(norm_I, -1.0)
    # 0 / 0 is NaN.
    return torch.where(norm_I > 0, (threshold / norm_I.double()).float(), torch.inf)
