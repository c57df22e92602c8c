"""Perplexity of each method on tiny models of several architectures that have learnt to write children's stories.

    LLMPRUNE_DATA=... python evals/bench/bench_trained_families.py [FAMILY ...] [--models DIR]

Models and text: `train_tiny.py`, which trains what is not in its cache (or DIR), and the writer of that text, a Llama that was
trained for much longer. Calibration: 128 samples of 128 tokens; evaluation: 256 others of 128; no model was trained on either.
Every method runs with its defaults through `llmprune.prune`, so magnitude compares the weights of a layer and Wanda those of a
row; two rows have it the other way round. Families given by name are measured, all without; the others' results are kept.

Columns: `over_dense` is the perplexity over the dense model's; `gain` how many nats per token the row's loss is below that of
the method it should beat at the same level (`beats`), with `gain_error`, that difference's standard error over the samples. A
dense row also has how well the model has learnt: perplexity of `unigram`s counted in the training text, of the text's `writer`,
which nothing can beat, and the loss of the first and the last twentieth of the training; and, as mean over linears, `spread`,
the standard deviation of the inputs' norms over their mean: where it is 0, Wanda is magnitude within rows.
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
from llmprune.statistics import InputNorm
from llmprune.stream import Stream

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
    "magnitude-row-50": {"method": "magnitude", "group": "row", "sparsity": 0.5},
    "wanda-layer-50": {"method": "wanda", "group": "layer", "sparsity": 0.5},
    "wanda+dsnot-50": {"method": "wanda", "refine": "dsnot", "sparsity": 0.5},
    "best-50": {"method": "best", "sparsity": 0.5},
}
BEATS = {
    "wanda": "magnitude",
    "sparsegpt": "wanda",
    "wanda-layer": "magnitude",
    "wanda+dsnot": "wanda",
    "best": "sparsegpt",
}
FAMILIES = ("llama", *SHAPES)  # the writer first

losses_of = partial(window_losses, micro_batch=32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the methods on tiny trained models.")
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []])
    parser.add_argument("--models", type=Path, default=cache())
    args = parser.parse_args()
    for family in args.families or FAMILIES:
        rows = {family: measure(family, Protocol(), args.models, ROWS)}
        for row in _saved():
            if row["family"] != family:
                rows.setdefault(row["family"], []).append(dict(row))
        save(NAME, [dict.fromkeys(rows[family][0]) | row for name in FAMILIES for row in rows.get(name, [])])


def _saved() -> list[dict[str, str]]:
    file = RESULTS / f"{NAME}.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def measure(family: str, protocol: Protocol, root: Path, names: Iterable[str]) -> list[dict[str, object]]:
    """The rows of one family, the dense one first."""
    text = stories(protocol, root)
    model = data_dir() / WRITER if family == "llama" else trained(family, protocol, root)
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
        **dict.fromkeys(("parameters", "unigram", "writer", "first_loss", "last_loss", "spread")),
    }
    if rival in losses:
        gains = [before - after for before, after in zip(losses[rival], losses[name], strict=True)]
        row |= {"beats": rival, "gain": round(fmean(gains), 4), "gain_error": round(stdev(gains) / math.sqrt(len(gains)), 4)}
    return row


def learnt(model: Path, text: Stories) -> dict[str, object]:
    """How much a model has learnt, beside what one without context and one without fault can know."""
    facts = model / "training.json"
    curve = json.loads(facts.read_text())["curve"] if facts.exists() else [None]
    writer = Skeleton(data_dir() / WRITER)
    return {
        "parameters": Skeleton(model).parameters(),
        "unigram": round(unigram(text.train_NT, text.test_NT), 3),
        "writer": round(math.exp(fmean(losses_of(writer, text.test_NT))), 3),
        "first_loss": curve[0],
        "last_loss": curve[-1],
        "spread": round(spread(model, text.calibration_NT), 3),
    }


def spread(model: Path, ids_NT: Tensor) -> float:
    """How much the norms of a linear's inputs differ, standard deviation over mean; the mean over linears."""
    spreads = []
    for block in Stream(Skeleton(model), ids_NT, micro_batch=32).survey().blocks():
        for _, inputs in block.observe(InputNorm):
            if inputs.rms_I.any():  # an expert that no token reached has none
                spreads.append(float(inputs.rms_I.std() / inputs.rms_I.mean()))
    return fmean(spreads)


def unigram(train_NT: Tensor, test_NT: Tensor) -> float:
    """Perplexity of predicting every token but the first by how often it was seen, once more than it was."""
    counts_V = torch.bincount(train_NT[:, 1:].flatten(), minlength=VOCABULARY).double() + 1
    return math.exp(-(counts_V / counts_V.sum()).log()[test_NT[:, 1:]].mean().item())


if __name__ == "__main__":
    main()
