"""How a sparsity is shared among blocks: those that change the hidden states most lose least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from .models import Skeleton
from .stream import Stream

# Samples that influence is measured on: it is a mean over thousands of tokens, and only a root of it counts.
SAMPLES = 8
# The loss from pruning one block alone to sparsity s grows like influence^(1/2) s^5 around a half (measured on SmolLM2 with
# text of C4: evals/LOG.md). Equal marginal loss everywhere then asks for s ~ influence^(-1/8).
EXPONENT = -1 / 8
LARGEST = 0.95


def by_influence(influence_B: Sequence[float], sizes_B: Sequence[int], target: float) -> list[float]:
    """Sparsity of every block, to four digits.

    Args:
        influence_B: of every block, at least 0 (`measure_influence`).
        sizes_B: prunable weights of every block.
        target: their mean, weighted by size.

    Returns:
        Sparsities in [0, `LARGEST`], proportional to influence^(-1/8) below that; `target` throughout where that is larger.
    """
    if target >= LARGEST:
        return [target] * len(sizes_B)
    weights = [max(influence, 1e-6) ** EXPONENT for influence in influence_B]
    low, high = 0.0, LARGEST / min(weights)
    for _ in range(60):
        scale = (low + high) / 2
        removed = sum(min(scale * weight, LARGEST) * size for weight, size in zip(weights, sizes_B, strict=True))
        low, high = (scale, high) if removed < target * sum(sizes_B) else (low, scale)
    return [round(min(high * weight, LARGEST), 4) for weight in weights]


def measure_influence(
    skeleton: Skeleton, ids_NT: Tensor, *, micro_batch: int, offload: Path | None, advance_progress: Callable[[str], None]
) -> list[float]:
    """1 - the mean cosine similarity of each dense block's input and output (ShortGPT, arXiv 2403.03853, equation 1).

    Args:
        ids_NT: calibration token ids [samples, tokens]; the first `SAMPLES` are used.
        micro_batch, offload, advance_progress: as for `Stream`.
    """
    survey = Stream(
        skeleton,
        ids_NT[:SAMPLES],
        micro_batch=min(micro_batch, SAMPLES),
        offload=offload,
        advance_progress=advance_progress,
        keep_last=True,
        compare_ends=True,
    )
    influence_B: list[float] = []
    for block in survey.blocks():
        block.advance()
        influence = block.influence
        assert influence is not None
        influence_B.append(influence)
    return influence_B
