"""What a task measured on one model, document by document: kept on disk, and compared in pairs.

The difference between two models on the same documents has an interval by the paired bootstrap: documents are drawn with
replacement, both models are scored on the draw, and the percentiles of the differences are reported. A document that is
hard for both then cancels out, which a difference of two separate standard errors does not know.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from .checkpoint import write_text
from .errors import LLMPruneError

CACHE = "~/.cache/llmprune"
CONFIDENCE, RESAMPLES = 0.95, 10_000
# Rows drawn at a time: 8 MB of document numbers.
DRAWS = 1 << 20
# The harness's aggregations that are a function of a weighted mean over documents. Perplexities average log-likelihoods.
LOWER = {"perplexity", "weighted_perplexity"}
AGGREGATIONS = {"mean", "bits_per_byte", *LOWER}


@dataclass(frozen=True)
class Documents:
    """One metric's value on every document, and how the harness makes one number of them."""

    aggregation: str
    values: list[float]
    weights: list[float] | None = None


@dataclass(frozen=True)
class Scores:
    """A finished task.

    Attributes:
        metrics: by the harness's names, with `_stderr` where it gives one.
        documents: of the metrics whose aggregation is one of `AGGREGATIONS`.
        documents_sha256: of the documents and prompts in order; scores can be paired where it is equal.
    """

    samples: int
    fewshot: int
    version: str | int | float | None
    metrics: dict[str, float | None]
    higher_is_better: dict[str, bool]
    documents: dict[str, Documents]
    documents_sha256: str

    def main_metric(self, wanted: str | None = None) -> str:
        """The metric asked for if the task has it, else normalised accuracy, accuracy, or the task's first."""
        return next(name for name in (wanted, "acc_norm", "acc", *self.higher_is_better) if name in self.higher_is_better)

    def stderr(self, metric: str) -> float | None:
        return self.metrics.get(f"{metric}_stderr")


@dataclass(frozen=True)
class Difference:
    """Model minus baseline."""

    value: float
    low: float
    high: float
    confidence: float
    resamples: int
    seed: int


def difference(
    model: Documents, baseline: Documents, *, seed: int = 0, confidence: float = CONFIDENCE, resamples: int = RESAMPLES
) -> Difference:
    """The paired percentile bootstrap over documents."""
    weights = np.ones(len(model.values)) if model.weights is None else np.array(model.weights)
    sums_D3 = np.stack([np.array(model.values), np.array(baseline.values), weights], axis=1)
    count = len(sums_D3)
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, max(DRAWS // count, 1)):
        rows = min(max(DRAWS // count, 1), resamples - start)
        totals_R3 = sums_D3[generator.integers(count, size=(rows, count))].sum(axis=1)
        drawn.append(_statistic(totals_R3, model.aggregation))
    low, high = np.quantile(np.concatenate(drawn), [(1 - confidence) / 2, (1 + confidence) / 2])
    value = _statistic(sums_D3.sum(axis=0, keepdims=True), model.aggregation)[0]
    return Difference(float(value), float(low), float(high), confidence, resamples, seed)


def _statistic(totals_R3: NDArray[np.float64], aggregation: str) -> NDArray[np.float64]:
    """Model minus baseline, from sums over documents of (model's value, baseline's value, weight)."""
    means_R2 = totals_R3[:, :2] / totals_R3[:, 2:]
    if aggregation in LOWER:
        means_R2 = np.exp(-means_R2)
    elif aggregation == "bits_per_byte":
        means_R2 = -means_R2 / np.log(2)
    return means_R2[:, 0] - means_R2[:, 1]


# Finished tasks on disk.


def _file(key: Mapping[str, object]) -> Path:
    folder = Path(os.environ.get("LLMPRUNE_CACHE") or CACHE).expanduser() / "scores"
    return folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"


def kept(key: Mapping[str, object]) -> Scores | None:
    """The scores that were kept under a key, None where there are none."""
    file = _file(key)
    if not file.is_file():
        return None
    try:
        return TypeAdapter(Scores).validate_python(json.loads(file.read_text(encoding="utf-8"))["scores"])
    except (ValueError, KeyError, TypeError, ValidationError):
        return None


def keep(key: Mapping[str, object], scores: Scores) -> None:
    """Keep scores in `$LLMPRUNE_CACHE/scores` (by default ~/.cache/llmprune/scores) for the next evaluation.

    Raises:
        LLMPruneError: the folder cannot be written.
    """
    file = _file(key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"key": key, "scores": asdict(scores)}, indent=1) + "\n")
    except OSError as error:
        raise LLMPruneError(f"{file.parent} cannot be written ({error}): set LLMPRUNE_CACHE to a folder that can.") from error
