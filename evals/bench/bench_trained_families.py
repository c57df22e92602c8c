"""Perplexity of each method on tiny models of several architectures that have learnt to write children's stories.

    LLMPRUNE_DATA=... python evals/bench/bench_trained_families.py [FAMILY ...] [--models DIR]

Models and text: `train_tiny.py`, which trains what is not in its cache (or DIR). Calibration: 128 samples of 128 tokens;
evaluation: 256 others of 128; all are text that no model was trained on. Every method runs with its defaults through
`llmprune.prune`. Families given by name are measured, all without; results of the others are kept.

Columns: `over_dense` is the perplexity over the dense model's; `gain` how many nats per token the row's loss is below that of
the method it should beat at the same level (`beats`), with `gain_error`, that difference's standard error over the samples. A
dense row also has how well the model has learnt: perplexity of `unigram`s counted in its training text, of the text's `writer`,
which nothing can beat, and the loss of the first and the last twentieth of the training.
"""

import argparse
import csv
import json
import math
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
from common import RESULTS, data_dir, save
from torch import Tensor
from train_tiny import SHAPES, VOCABULARY, WRITER, Protocol, Stories, cache, stories, trained

import llmprune
from llmprune.models import Skeleton
from llmprune.perplexity import window_losses

NAME = "trained-families"
LEVELS: dict[str, dict[str, object]] = {
    "30": {"sparsity": 0.3},
    "50": {"sparsity": 0.5},
    "70": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}
METHODS = ("magnitude", "wanda", "sparsegpt")
ROWS: dict[str, dict[str, object]] = {
    **{f"{method}-{level}": {"method": method, **options} for level, options in LEVELS.items() for method in METHODS},
    "wanda+dsnot-50": {"method": "wanda", "refine": "dsnot", "sparsity": 0.5},
    "best-50": {"method": "best", "sparsity": 0.5},
}
BEATS = {"wanda": "magnitude", "sparsegpt": "wanda", "wanda+dsnot": "wanda", "best": "sparsegpt"}

losses_of = partial(window_losses, micro_batch=32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the methods on tiny trained models.")
    parser.add_argument("families", nargs="*", choices=[*SHAPES, []])
    parser.add_argument("--models", type=Path, default=cache())
    args = parser.parse_args()
    file = RESULTS / f"{NAME}.csv"
    kept = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
    table: dict[str, list[dict[str, object]]] = {}
    for row in kept:
        table.setdefault(row["family"], []).append(dict(row))
    for family in args.families or list(SHAPES):
        table[family] = measure(family, Protocol(), args.models, ROWS)
        save(NAME, [row for name in SHAPES for row in table.get(name, [])])


def measure(family: str, protocol: Protocol, root: Path, names: Iterable[str]) -> list[dict[str, object]]:
    """The rows of one family, the dense one first."""
    text = stories(protocol, root)
    model = trained(family, protocol, root)
    losses = {"dense": losses_of(Skeleton(model), text.test_NT)}
    rows = [row_of(family, "dense", losses) | learnt(model, text)]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "calibration.jsonl"
        source.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in text.calibration_NT.tolist()))
        amount = {"samples": protocol.calibration, "seqlen": protocol.seqlen, "micro_batch": min(32, protocol.calibration)}
        for name in names:
            output = f"{folder}/{name}"
            start = time.perf_counter()
            result = llmprune.prune(str(model), calibration=str(source), output=output, **amount, **ROWS[name])
            seconds = round(time.perf_counter() - start, 1)
            losses[name] = losses_of(Skeleton(result.directory), text.test_NT)
            sparsity = round(float(str(result.record["sparsity"])), 4)
            rows.append(row_of(family, name, losses) | {"sparsity": sparsity, "seconds": seconds})
            print({key: value for key, value in rows[-1].items() if value is not None}, flush=True)
    return rows


def row_of(family: str, name: str, losses: dict[str, list[float]]) -> dict[str, object]:
    """What one model's losses say beside the dense model's and those of the method it should beat."""
    method, _, level = name.rpartition("-")
    rival = f"{BEATS.get(method)}-{level}"
    row: dict[str, object] = {
        "family": family,
        "row": name,
        "perplexity": round(math.exp(fmean(losses[name])), 3),
        "over_dense": round(math.exp(fmean(losses[name]) - fmean(losses["dense"])), 4),
        **dict.fromkeys(("beats", "gain", "gain_error", "sparsity", "seconds")),
        **dict.fromkeys(("parameters", "unigram", "writer", "first_loss", "last_loss")),
    }
    if rival in losses:
        gains = [before - after for before, after in zip(losses[rival], losses[name], strict=True)]
        row |= {"beats": rival, "gain": round(fmean(gains), 4), "gain_error": round(stdev(gains) / math.sqrt(len(gains)), 4)}
    return row


def learnt(model: Path, text: Stories) -> dict[str, object]:
    """How much a model has learnt, beside what one without context and one without fault can know."""
    facts = json.loads((model / "training.json").read_text())
    writer = Skeleton(data_dir() / WRITER)
    return {
        "parameters": facts["parameters"],
        "unigram": round(unigram(text.train_NT, text.test_NT), 3),
        "writer": round(math.exp(fmean(losses_of(writer, text.test_NT))), 3),
        "first_loss": facts["curve"][0],
        "last_loss": facts["curve"][-1],
    }


def unigram(train_NT: Tensor, test_NT: Tensor) -> float:
    """Perplexity of predicting every token but the first by how often it was seen, once more than it was."""
    counts_V = torch.bincount(train_NT[:, 1:].flatten(), minlength=VOCABULARY).double() + 1
    return math.exp(-(counts_V / counts_V.sum()).log()[test_NT[:, 1:]].mean().item())


if __name__ == "__main__":
    main()
