"""Records of runs that never were, for those who show records."""

from __future__ import annotations

import copy
from pathlib import Path

from llmprune.output import RECORD, sealed
from llmprune.verify import read_record

SHAPES = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8), "gate": (20, 8), "up": (20, 8), "down": (8, 20)}


def facts(depth: int = 3, zeros: float = 0.5, **more: object) -> dict[str, object]:
    """The content of llmprune.json, as far as it is shown, with `more` keys."""
    linears = {
        f"model.layers.{block}.mlp.{role}_proj": {"role": role, "shape": list(shape), "zeros": int(zeros * shape[0] * shape[1])}
        for block in range(depth)
        for role, shape in SHAPES.items()
    }
    prunable = sum(out * into for out, into in SHAPES.values()) * depth
    zero = sum(int(linear["zeros"]) for linear in linears.values())
    return {
        "model": {"given": "tiny", "name": "tiny", "base_model": None},
        "recipe": {"model": "tiny", "method": "wanda", "sparsity": zeros, "pattern": "unstructured", "output": "/somewhere"},
        "reasons": {},
        "warnings": [],
        "versions": {"llmprune": "0.1.0", "torch": "2.6.0"},
        "identity": {"model weights": "0123456789abcdef"},
        "calibration": {"source": "c4", "sha256": "c0ffee", "note": "4 samples"},
        "sparsity": zero / prunable,
        "coverage": 1.0,
        "parameters": {"total": prunable + 1000, "decoder": prunable, "prunable": prunable, "zero": zero},
        "linears": linears,
        "clock_seconds": {"capture": 0.25, "observe": 3.5, "decide": 1.25, "advance": 2.0, "forwards": 6.0},
        "seconds": 9.0,
        "peak_rss_bytes": 1_500_000_000,
        **copy.deepcopy(more),
    }


PERPLEXITY = {
    "dense": 20.125,
    "pruned": 31.0625,
    "text": "wikitext2",
    "protocol": "token perplexity, 8 disjoint windows of 64 tokens",
    "tokens_sha256": "ab" * 32,
}


def task(value: float, dense: float | None = None, **changes: object) -> dict[str, object]:
    """One entry of an evaluation's tasks."""
    entry: dict[str, object] = {
        "metric": "acc_norm",
        "value": value,
        "stderr": 0.011,
        "samples": 200,
        "fewshot": 0,
        "version": 1.0,
        "data": {"sha256": "feed"},
        "higher_is_better": True,
        "dense": None,
        "difference": None,
    }
    if dense is not None:
        gap = value - dense
        entry["dense"] = {"value": dense, "stderr": 0.012}
        entry["difference"] = {"value": gap, "low": gap - 0.02, "high": gap + 0.03, "confidence": 0.95}
    return entry | changes


def evaluation(tasks: dict[str, dict[str, object]], **protocol: object) -> dict[str, object]:
    """What `llmprune eval` adds to a record."""
    return {
        "tasks": tasks,
        "protocol": {"lm_eval": "0.4.13", "limit": 200, "dtype": "float32", "baseline": "dense", **protocol},
    }


def amend(directory: Path, **changes: object) -> None:
    """Change a real record."""
    (directory / RECORD).write_bytes(sealed({**read_record(directory), **changes}, indent=2))


def structured(depth: int = 3, *, format: str = "auto", **more: object) -> dict[str, object]:
    """The content of llmprune.json of a run that removed 20 - 4 i of 20 FFN channels from block i."""
    record = facts(depth, 0.0)
    kept = [max(4, 20 - 4 * block) for block in range(depth)]
    on_disk = kept if format == "auto" else [20] * depth
    for name, linear in record["linears"].items():
        width = on_disk[int(name.split(".")[2])]
        linear["shape"] = [width if size == 20 else size for size in linear["shape"]]
    cost = 3 * 8
    prunable, zero = cost * 20 * depth, cost * sum(20 - width for width in kept)
    total = record["parameters"]["total"]
    record["recipe"] |= {"method": "cfsp", "format": format}
    record["sparsity"] = zero / prunable
    record["parameters"] |= {
        "prunable": prunable,
        "zero": zero,
        "stored": total - cost * sum(20 - width for width in on_disk),
    }
    record["kept"], record["dense_widths"] = {"ffn": kept}, {"ffn": [20] * depth}
    record["copied"] = {"modeling_llmprune.py": "00"} if format == "auto" else {}
    record["blocks"] = [{"influence": None, "importance": 0.1 * (block + 1)} for block in range(depth)]
    return record | copy.deepcopy(more)
