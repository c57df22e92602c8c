"""Perplexity before and after recovery of SmolLM2 pruned by CFSP, under the gold protocol.

    LLMPRUNE_DATA=... python evals/bench/bench_recovery.py [--minutes 10]

Pruning: `--method cfsp --sparsity 0.3`, calibrated on 32 samples x 512 tokens of wikitext-2 validation (recorded ids).
Recovery: `llmprune recover` with its defaults on the text of wikitext-2 validation for so many minutes of training. Evaluation:
wikitext-2 test, first 32 disjoint windows of 512, and 16 windows of C4, text of another kind than the training's.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from common import data_dir, save, smollm2
from torch import Tensor

import llmprune
from llmprune.calibration import evaluation_set
from llmprune.models import Skeleton, load_tokenizer
from llmprune.perplexity import perplexity
from llmprune.pruning import Result
from llmprune.recovery import recover

C4 = "c4/c4_en_train00000_first1000.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure recovery after structured pruning.")
    parser.add_argument("--minutes", type=float, default=10.0)
    minutes = parser.parse_args().minutes
    data, model = data_dir(), smollm2()
    wikitext, tokenizer = data / "wikitext-2-raw-v1", load_tokenizer(model)
    windows = {
        "perplexity": evaluation_set(str(wikitext / "test.parquet"), tokenizer, seqlen=512, windows=32).ids_NT,
        "c4": evaluation_set(str(data / C4), tokenizer, seqlen=512, windows=16).ids_NT,
    }
    pruning = {"sparsity": 0.3, "calibration": data / "golden" / "calibration_ids.parquet", "samples": 32, "seqlen": 512}
    save("recovery", measure(model, pruning, {"minutes": minutes, "calibration": wikitext / "validation.parquet"}, windows))


def measure(
    model: Path, pruning: dict[str, object], recovery: dict[str, object], windows: dict[str, Tensor]
) -> list[dict[str, object]]:
    """The dense, the pruned and the recovered model's rows; options that are paths are given as text."""
    with tempfile.TemporaryDirectory() as folder:

        def row(name: str, directory: Path, **facts: object) -> dict[str, object]:
            skeleton = Skeleton(directory)
            values = {text: round(perplexity(skeleton, ids_NT), 3) for text, ids_NT in windows.items()}
            found = {"row": name, **values, "parameters": skeleton.parameters()}
            found |= dict.fromkeys(("seconds", "steps", "best_step", "trained")) | facts
            print(found, flush=True)
            return found

        rows = [row("dense", model)]
        pruned, seconds = _timed(llmprune.prune, str(model), method="cfsp", output=f"{folder}/pruned", **_as_text(pruning))
        rows.append(row("cfsp-30", pruned.directory, seconds=seconds))
        recovered, seconds = _timed(recover, pruned.directory, output=f"{folder}/recovered", **_as_text(recovery))
        did = cast("dict[str, dict[str, object]]", recovered.record)["recovery"]
        steps = cast("dict[str, object]", did["options"])["steps"]
        facts = {"seconds": seconds, "steps": steps, "best_step": did["best_step"], "trained": did["trained_parameters"]}
        return [*rows, row("cfsp-30, recovered", recovered.directory, **facts)]


def _as_text(options: dict[str, object]) -> dict[str, object]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}


def _timed(function: Callable[..., Result], *args: object, **options: object) -> tuple[Result, float]:
    start = time.perf_counter()
    result = function(*args, **options)
    return result, round(time.perf_counter() - start, 1)


if __name__ == "__main__":
    main()
