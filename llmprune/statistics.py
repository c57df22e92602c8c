"""What can be observed at a linear's input: sums over calibration tokens that merge exactly.

A statistic is created per distinct input of a block (q, k and v read one tensor and share one statistic),
is fed one calibration sample at a time and can be merged with what other ranks saw. Because the unit is
the sample and not the micro-batch, results do not depend on how samples were batched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, Self, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

# Some samples' inputs: any float dtype [samples, tokens, features], or one [tokens, features] for each sample where they have
# different numbers of tokens, as an expert's do.
Samples = Tensor | Sequence[Tensor]


def by_sample(args: tuple[Tensor, ...], samples: int) -> Samples:
    """What a linear is called with, cut into samples; an expert's linear is told how many tokens each has."""
    states = args[0]
    if len(args) > 1:
        return states.split(cast(list[int], args[1]))
    return states.reshape(samples, -1, states.shape[-1])


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


def angular(input_BTI: Tensor, output_BTI: Tensor) -> tuple[float, int]:
    """How far a block turns the hidden states: the angle between its input and output, in half turns (CFSP, arXiv 2409.13199).

    0 for the same direction, 0.5 for orthogonal ones, 1 for opposite ones; 0.5 where one of the two vectors is zero, 0 where
    both are.

    Args:
        input_BTI, output_BTI: finite, any float dtype [samples, tokens, features].

    Returns:
        The sum over tokens, and their number. Sums and numbers of micro-batches add up.
    """
    input_BTI, output_BTI = _directions(input_BTI), _directions(output_BTI)
    # The arc cosine of a rounded cosine is NaN just above 1, and 3e-4 off just below it; this form of the angle is neither.
    apart_BT, together_BT = (input_BTI - output_BTI).norm(dim=-1), (input_BTI + output_BTI).norm(dim=-1)
    half_BT = torch.atan2(apart_BT.double(), together_BT.double())
    return float((half_BT / (math.pi / 2)).sum()), half_BT.numel()


def _directions(states_BTI: Tensor) -> Tensor:
    """Vectors of length 1, or 0 where they are zero; float32 [samples, tokens, features]."""
    states_BTI = states_BTI.float()
    # Squares of the largest and the smallest numbers leave float32.
    states_BTI = states_BTI / states_BTI.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return states_BTI / states_BTI.norm(dim=-1, keepdim=True).clamp_min(1.0)


class Ends:
    """How a block's output differs from its input: sums over tokens that ranks can add."""

    def __init__(self) -> None:
        # Of the cosine similarity, of the angle over pi, and the number of tokens.
        self.totals = torch.zeros(3, dtype=torch.float64)

    def update(self, input_BTI: Tensor, output_BTI: Tensor) -> None:
        """Add samples: any float dtype [samples, tokens, features]."""
        cosine_BT = cosine_similarity(input_BTI.float(), output_BTI.float(), dim=-1)
        angle, tokens = angular(input_BTI, output_BTI)
        self.totals += torch.tensor([float(cosine_BT.double().sum()), angle, tokens], dtype=torch.float64)

    def sums(self) -> list[Tensor]:
        return [self.totals]

    @property
    def influence(self) -> float | None:
        """1 - the mean cosine similarity (ShortGPT, arXiv 2403.03853, equation 1); None before the first token."""
        cosines, _, tokens = self.totals.tolist()
        return 1 - cosines / tokens if tokens else None

    @property
    def angle(self) -> float:
        """The mean angle over pi, in [0, 1] (CFSP, arXiv 2409.13199, section 3.1)."""
        _, angles, tokens = self.totals.tolist()
        return angles / tokens


class Statistic(Protocol):
    """A sum over calibration tokens of something computed from a linear's input."""

    def __init__(self, features: int, device: torch.device) -> None: ...

    def update(self, inputs_BTI: Samples, first: int = 0) -> None:
        """Add samples, the calibration set's from number `first` on."""

    def merge(self, other: Self) -> None:
        """Add what `other` has seen."""

    def sums(self) -> list[Tensor]:
        """The tensors that ranks add up in place."""

    def is_finite(self) -> bool:
        """False when an infinite or NaN activation was seen."""

    @property
    def seen(self) -> int:
        """Tokens of all samples."""

    @staticmethod
    def size(features: int) -> int:
        """Bytes one statistic takes."""


class _Sums:
    """Statistics are sums, and so is the number of tokens they were taken over."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    def sums(self) -> list[Tensor]:
        return [self.tokens]

    def merge(self, other: Self) -> None:
        for own, theirs in zip(self.sums(), other.sums(), strict=True):
            own += theirs

    def is_finite(self) -> bool:
        return all(all_finite(total) for total in self.sums())

    @property
    def seen(self) -> int:
        return int(self.tokens)

    def _count(self, inputs_BTI: Samples) -> None:
        self.tokens += sum(len(inputs_TI) for inputs_TI in inputs_BTI)


class InputNorm(_Sums):
    """Sum of squares of every input feature over all tokens (Wanda's ||X_j||, section 3).

    Exactness: a sample's partial sum is rounded to 24 bits. Sums of such numbers
    in float64 are exact unless one sample has 2^20 times the energy of another, so the result does not
    depend on the order or the grouping in which samples are added: micro-batches, ranks and shuffles give
    the same bits.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self.squares_I = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, inputs_BTI: Samples, first: int = 0) -> None:
        # Sample by sample, because the order in which a sum is taken depends on the shape it is part of. float16 squares
        # overflow beyond 255, so square in float32. A few tokens at a time stay in the cache, and are few enough to be added
        # in float32, several times faster than everything in float64.
        for inputs_TI in inputs_BTI:
            sample_I = torch.zeros_like(self.squares_I)
            for part_PI in inputs_TI.split(128):
                sample_I += part_PI.float().square().sum(dim=0)
            self.squares_I += sample_I.float()
        self._count(inputs_BTI)

    def sums(self) -> list[Tensor]:
        return [*super().sums(), self.squares_I]

    @property
    def rms_I(self) -> Tensor:
        """Root mean square of every feature, float32 [I]: ||X_j||_2 / sqrt(tokens)."""
        return (self.squares_I / self.tokens.clamp_min(1)).sqrt().float()

    @staticmethod
    def size(features: int) -> int:
        return 8 * features


class Moments(InputNorm):
    """Mean and variance of every input feature over all tokens (DSnoT, arXiv 2310.08915, section 3), exact likewise.

    The published code averages the variances within samples and so forgets what differs between them.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self.totals_I = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, inputs_BTI: Samples, first: int = 0) -> None:
        super().update(inputs_BTI)
        for inputs_TI in inputs_BTI:
            self.totals_I += inputs_TI.double().sum(dim=0).float()

    def sums(self) -> list[Tensor]:
        return [*super().sums(), self.totals_I]

    @property
    def mean_I(self) -> Tensor:
        """Float32 [I]."""
        return (self.totals_I / self.tokens.clamp_min(1)).float()

    @property
    def variance_I(self) -> Tensor:
        """Float32 [I], biased."""
        tokens = self.tokens.clamp_min(1)
        return (self.squares_I / tokens - (self.totals_I / tokens).square()).clamp_min(0).float()

    @staticmethod
    def size(features: int) -> int:
        return 16 * features


class Hessian(_Sums):
    """Sum of outer products X^T X, float32 [I, I] (SparseGPT section 3.1: H = X X^T up to a factor).

    Only the blocks on and above the diagonal are accumulated: H is symmetric, and these products cost as
    much as the forward pass itself.
    """

    PANEL = 256

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self.upper_II = torch.zeros(features, features, device=device)

    def update(self, inputs_BTI: Samples, first: int = 0) -> None:
        for inputs_TI in inputs_BTI:
            inputs_TI = inputs_TI.float()
            for start in range(0, inputs_TI.shape[1], self.PANEL):
                stop = start + self.PANEL
                self.upper_II[start:stop, start:].addmm_(inputs_TI[:, start:stop].T, inputs_TI[:, start:])
        self._count(inputs_BTI)

    def sums(self) -> list[Tensor]:
        return [*super().sums(), self.upper_II]

    @property
    def mean_II(self) -> Tensor:
        """X^T X / tokens, symmetric float32 [I, I]."""
        upper_II = self.upper_II.triu()
        return (upper_II + upper_II.triu(1).T) / self.tokens.clamp_min(1)

    @property
    def rms_I(self) -> Tensor:
        """Root mean square of every feature, float32 [I]."""
        return (self.upper_II.diagonal() / self.tokens.clamp_min(1)).sqrt()

    @staticmethod
    def size(features: int) -> int:
        return 4 * features * features


class SplitHessian(Hessian):
    """The Hessian and the mean of what fits are made on, and the Hessian of the samples that are held out of them.

    A mask that is fitted to few tokens looks better on them than it is (on two tokens per feature, it can be worse on others
    than the mask it started from), so the error that counts is taken from `fresh`.
    """

    # One of so many samples is held out, the last of each such number.
    EVERY = 8

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self.totals_I = torch.zeros(features, dtype=torch.float64, device=device)
        self.fresh = Hessian(features, device)

    def update(self, inputs_BTI: Samples, first: int = 0) -> None:
        for sample, inputs_TI in enumerate(inputs_BTI, start=first):
            if self.holds_out(sample):
                self.fresh.update(inputs_TI[None])
            else:
                super().update(inputs_TI[None])
                self.totals_I += inputs_TI.sum(dim=0, dtype=torch.float64)

    @classmethod
    def holds_out(cls, sample: int) -> bool:
        """Whether a calibration sample is kept from the fit."""
        return sample % cls.EVERY == cls.EVERY - 1

    def sums(self) -> list[Tensor]:
        return [*super().sums(), self.totals_I, *self.fresh.sums()]

    @property
    def seen(self) -> int:
        return super().seen + self.fresh.seen

    @property
    def mean_I(self) -> Tensor:
        """Float32 [I]."""
        return (self.totals_I / self.tokens.clamp_min(1)).float()

    @property
    def variance_I(self) -> Tensor:
        """Float32 [I], biased."""
        return (self.rms_I.square() - self.mean_I.square()).clamp_min(0)

    @staticmethod
    def size(features: int) -> int:
        return 2 * Hessian.size(features)


class CrossHessian(SplitHessian):
    """Also what the dense model's inputs X' have in common with the pruned model's X, on the samples of the fit: X'^T X.

    For a linear whose output is added to the residual stream, also G^T X, with G [tokens, O] what the stream has lost so far.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self.products_II = torch.zeros(features, features, device=device)
        self.gaps_OI: Tensor | None = None

    def update_pair(self, inputs_BTI: Samples, dense_BTI: Samples, first: int, gap_BTO: Tensor | None) -> None:
        """Like `update`, with the dense model's inputs, and what the residual stream has lost where that matters."""
        self.update(inputs_BTI, first)
        if gap_BTO is not None and self.gaps_OI is None:
            self.gaps_OI = torch.zeros(gap_BTO.shape[-1], inputs_BTI[0].shape[-1], device=gap_BTO.device)
        for i, inputs_TI in enumerate(inputs_BTI):
            if not self.holds_out(first + i):
                self.products_II.addmm_(dense_BTI[i].float().T, inputs_TI.float())
                if gap_BTO is not None and self.gaps_OI is not None:
                    self.gaps_OI.addmm_(gap_BTO[i].float().T, inputs_TI.float())

    def sums(self) -> list[Tensor]:
        return [*super().sums(), self.products_II, *([] if self.gaps_OI is None else [self.gaps_OI])]

    def missing_OI(self, weight_OI: Tensor) -> Tensor:
        """(Y - X W^T)^T X / tokens, float32 [O, I].

        Y is what the dense model has in this place, with what the stream has lost added.
        """
        products_OI = weight_OI @ (self.products_II / self.tokens.clamp_min(1) - self.mean_II)
        if self.gaps_OI is not None:
            products_OI += self.gaps_OI / self.tokens.clamp_min(1)
        return products_OI

    @staticmethod
    def size(features: int) -> int:
        return 3 * Hessian.size(features)
