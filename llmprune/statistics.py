"""What can be observed at a linear's input: sums over calibration tokens that merge exactly.

A statistic is created per distinct input of a block (q, k and v read one tensor and share one statistic),
is fed one calibration sample at a time and can be merged with what other ranks saw. Because the unit is
the sample and not the micro-batch, results do not depend on how samples were batched.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    A sum that is finite has finite terms, and costs a tenth of looking at each; large finite terms may overflow it, so only an
    infinite or NaN sum is looked into.
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def outlier_ratio(score_OI: Tensor, multiple: float = 5.0) -> float:
    """Share of a linear's scores above `multiple` times their mean (OWL, arXiv 2310.05175, section 3.2: the more, the less it
    should be pruned)."""
    # The sum of a bool tensor would be taken over a copy of eight bytes a weight.
    return int(torch.count_nonzero(score_OI > multiple * score_OI.mean())) / score_OI.numel()


class Statistic(Protocol):
    """A sum over calibration tokens of something computed from a linear's input."""

    tokens: int

    def __init__(self, features: int, device: torch.device) -> None: ...

    def update(self, inputs_BTI: Tensor) -> None:
        """Add samples: any float dtype [samples, tokens, features]."""

    def merge(self, other: Self) -> None:
        """Add what `other` has seen."""

    def sums(self) -> list[Tensor]:
        """The tensors that ranks add up in place."""

    def is_finite(self) -> bool:
        """False when an infinite or NaN activation was seen."""

    @staticmethod
    def size(features: int) -> int:
        """Bytes one statistic takes."""


class InputNorm:
    """Sum of squares of every input feature over all tokens (Wanda's ||X_j||, section 3).

    Exactness: a sample's partial sum is rounded to 24 bits. Sums of such numbers
    in float64 are exact unless one sample has 2^20 times the energy of another, so the result does not
    depend on the order or the grouping in which samples are added: micro-batches, ranks and shuffles give
    the same bits.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.squares_I = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, inputs_BTI: Tensor) -> None:
        # Sample by sample, because the order in which a sum is taken depends on the shape it is part of. float16 squares
        # overflow beyond 255, so square in float32. A few tokens at a time stay in the cache, and are few enough to be added
        # in float32, several times faster than everything in float64.
        for inputs_TI in inputs_BTI:
            sample_I = torch.zeros_like(self.squares_I)
            for part_PI in inputs_TI.split(128):
                sample_I += part_PI.float().square().sum(dim=0)
            self.squares_I += sample_I.float()
        self.tokens += inputs_BTI.shape[0] * inputs_BTI.shape[1]

    def merge(self, other: InputNorm) -> None:
        self.squares_I += other.squares_I
        self.tokens += other.tokens

    def sums(self) -> list[Tensor]:
        return [self.squares_I]

    def is_finite(self) -> bool:
        return all_finite(self.squares_I)

    @property
    def rms_I(self) -> Tensor:
        """Root mean square of every feature, float32 [I]: ||X_j||_2 / sqrt(tokens)."""
        return (self.squares_I / max(self.tokens, 1)).sqrt().float()

    @staticmethod
    def size(features: int) -> int:
        return 8 * features


class Hessian:
    """Sum of outer products X^T X, float32 [I, I] (SparseGPT section 3.1: H = X X^T up to a factor).

    Only the blocks on and above the diagonal are accumulated: H is symmetric, and these products cost as
    much as the forward pass itself.
    """

    PANEL = 256

    def __init__(self, features: int, device: torch.device) -> None:
        self.upper_II = torch.zeros(features, features, device=device)
        self.tokens = 0

    def update(self, inputs_BTI: Tensor) -> None:
        for inputs_TI in inputs_BTI.float():
            for start in range(0, inputs_TI.shape[1], self.PANEL):
                stop = start + self.PANEL
                self.upper_II[start:stop, start:].addmm_(inputs_TI[:, start:stop].T, inputs_TI[:, start:])
        self.tokens += inputs_BTI.shape[0] * inputs_BTI.shape[1]

    def merge(self, other: Hessian) -> None:
        self.upper_II += other.upper_II
        self.tokens += other.tokens

    def sums(self) -> list[Tensor]:
        return [self.upper_II]

    def is_finite(self) -> bool:
        return all_finite(self.upper_II)

    @property
    def mean_II(self) -> Tensor:
        """X^T X / tokens, symmetric float32 [I, I]."""
        upper_II = self.upper_II.triu()
        return (upper_II + upper_II.triu(1).T) / max(self.tokens, 1)

    @staticmethod
    def size(features: int) -> int:
        return 4 * features * features
