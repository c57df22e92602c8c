"""What `llmprune bench` found about one model, and the files that such results are pooled in.

write(results, Path("speeds.csv"))
"""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

from .checkpoint import reading, write_text
from .errors import LLMPruneError

Role = Literal["baseline", "model", "against"]


@dataclass(frozen=True)
class BenchResult:
    """One model's speed in one run. Field names stay; `_low` and `_high` are quartiles over rounds.

    Attributes:
        time: when the run started; the same for all models of a run.
        role: "baseline" is what speed-ups are over, "model" what was asked about, "against" is besides.
        method, pattern, sparsity: from the record of llmprune, where there is one.
        context: mean number of tokens whose keys and values a written token reads, its own among them.
        active: share of the gated weights that was read; None without gates.
        bytes_per_token: sum of the five that follow.
        bytes_linears: weights of linears, gated ones by the share that was read.
        bytes_head: the matrix that makes logits.
        bytes_other: norms, biases, and one row of every embedding.
        bytes_gates: thresholds and bases of gates.
        bytes_cache: keys and values of the context.
        gb_per_second: bytes per token times tokens per second.
        bandwidth_gb_per_second: of this device, see `bandwidth_probe`.
        floor_tokens_per_second: what that bandwidth allows for these bytes.
        share_of_floor: tokens per second, as a share of that.
        speedup: over the baseline, in tokens per second of decoding, paired within rounds.
        predicted_speedup: the same, by bytes alone.
        last_level_cache_bytes, in_cache: whether the weights fit there, so that it, and not the memory, was measured.
        prefill_seconds, decode_seconds: of every round, for the whole prompt and for one token.
    """

    time: str
    role: Role
    name: str
    model: str
    method: str | None
    pattern: str | None
    sparsity: float | None
    device: str
    device_name: str
    threads: int
    dtype: str
    torch: str
    transformers: str
    llmprune: str
    backend: str | None
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    context: float
    prefill_tokens_per_second: float | None
    prefill_tokens_per_second_low: float | None
    prefill_tokens_per_second_high: float | None
    decode_tokens_per_second: float
    decode_tokens_per_second_low: float
    decode_tokens_per_second_high: float
    active: float | None
    bytes_per_token: float
    bytes_linears: float
    bytes_head: float
    bytes_other: float
    bytes_gates: float
    bytes_cache: float
    gb_per_second: float
    bandwidth_gb_per_second: float
    bandwidth_gb_per_second_low: float
    bandwidth_gb_per_second_high: float
    bandwidth_probe: str
    floor_tokens_per_second: float
    share_of_floor: float
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    predicted_speedup: float | None
    prefill_speedup: float | None
    last_level_cache_bytes: int | None
    in_cache: bool | None
    prefill_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Spread(NamedTuple):
    """Quartiles."""

    low: float
    middle: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """The quartiles of some values, by interpolation between them; of a single one, itself."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


# Files of results.


def earlier(file: Path) -> list[dict[str, object]]:
    """The results that a file holds already.

    Raises:
        LLMPruneError: the file cannot be written, or holds something else.
    """
    if file.suffix not in (".csv", ".json"):
        raise LLMPruneError(f"--output {file} is of no known kind: give a file that ends in .csv or .json.")
    if file.is_dir() or not os.access(file.absolute().parent, os.W_OK | os.X_OK):
        raise LLMPruneError(f"--output {file} cannot be written: give a file in a folder that exists and where you may write.")
    if not file.exists():
        return []
    with reading(file):
        text = file.read_bytes().decode(errors="replace")
    names = [each.name for each in fields(BenchResult)]
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""))) if file.suffix == ".csv" else json.loads(text)
        alike = isinstance(rows, list) and all(list(row) == names for row in rows)
    except (ValueError, TypeError, csv.Error):
        alike = False
    if not alike:
        raise LLMPruneError(f"--output {file} holds something other than results of this llmprune: give another file.")
    return rows


def write(results: Sequence[BenchResult], file: Path) -> None:
    """Add results to a file of results, .json (a list of objects) or .csv (lists as numbers with spaces between).

    Raises:
        LLMPruneError: the file cannot be written, or holds something else.
    """
    rows = earlier(file)
    if file.suffix == ".json":
        text = json.dumps([*rows, *map(asdict, results)], indent=2) + "\n"
    else:
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, [each.name for each in fields(BenchResult)], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, *map(_flat, results)])
        text = stream.getvalue()
    try:
        write_text(file, text)
    except OSError as error:
        raise LLMPruneError(
            f"--output {file} could not be written ({error}): make room or mend the rights, and repeat."
        ) from error


def _flat(result: BenchResult) -> dict[str, object]:
    """A result as a row of text and numbers."""
    row: dict[str, object] = asdict(result)
    row |= {key: " ".join(map(str, row[key])) for key in ("prefill_seconds", "decode_seconds")}  # type: ignore[call-overload]
    return row | {"notes": "; ".join(result.notes)}
