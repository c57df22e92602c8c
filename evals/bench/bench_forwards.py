"""Wall time of pruning as a multiple of one plain dense forward of the same tokens through the same blocks.

    LLMPRUNE_DATA=... python evals/bench/bench_forwards.py [ROUNDS]

The floor is the resident model's own forward without its head, one sample at a time, measured in the same process
right before and right after each run. Pruning includes reading every block, scoring, and writing the result.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import Timer, data_dir, save, smollm2, timed
from transformers import AutoModelForCausalLM

from llmprune.calibration import calibration_set
from llmprune.pruning import run
from llmprune.recipe import Recipe

RUNS = [
    ("wanda", "unstructured", "block", "pruned"),
    ("wanda", "unstructured", "sublayer", "pruned"),
    ("wanda", "unstructured", "block", "dense"),
    ("sparsegpt", "unstructured", "block", "pruned"),
]


def dense_forward(model: torch.nn.Module, ids_NT: torch.Tensor) -> Timer:
    with timed() as timer:
        for sample in ids_NT.split(1):
            model(input_ids=sample, use_cache=False)
    return timer


def main(rounds: int) -> None:
    ids = str(data_dir() / "golden" / "calibration_ids.parquet")
    model_dir = smollm2()
    tokens = calibration_set(ids, None, samples=32, seqlen=512, seed=0, vocab_size=49152)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).model.eval().requires_grad_(False)
    ratios: dict[tuple[str, ...], list[tuple[float, float, float, float]]] = {}
    after = dense_forward(model, tokens.ids_NT)
    for _ in range(rounds):
        for setting in RUNS:
            method, pattern, sequential, propagate = setting
            before = after
            with tempfile.TemporaryDirectory() as folder:
                recipe = Recipe(
                    model=str(model_dir),
                    method=method,
                    pattern=pattern,
                    sequential=sequential,
                    propagate=propagate,
                    calibration=ids,
                    samples=32,
                    seqlen=512,
                    output=Path(folder) / "out",
                )
                with timed() as pruning:
                    run(recipe, say=lambda line: None, quiet=True)
            after = dense_forward(model, tokens.ids_NT)
            wall, cpu = (before.wall + after.wall) / 2, (before.cpu + after.cpu) / 2
            figures = (pruning.wall / wall, pruning.cpu / cpu, wall, pruning.wall)
            ratios.setdefault(setting, []).append(figures)
            print(*setting, "x{:.2f} wall, x{:.2f} CPU (dense {:.1f} s, pruning {:.1f} s)".format(*figures), flush=True)
    rows: list[dict[str, object]] = []
    for setting, values in ratios.items():
        wall, cpu, dense_wall, prune_wall = (statistics.median(column) for column in zip(*values, strict=True))
        rows.append(
            dict(zip(("method", "pattern", "sequential", "propagate"), setting, strict=True))
            | {
                "wall_ratio": round(wall, 3),
                "cpu_ratio": round(cpu, 3),
                "dense_s": round(dense_wall, 1),
                "prune_s": round(prune_wall, 1),
                "rounds": rounds,
            }
        )
    save("forwards", rows)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
