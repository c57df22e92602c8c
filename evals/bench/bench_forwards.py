"""Wall time of pruning as a multiple of one plain dense forward of the same tokens through the same blocks.

    LLMPRUNE_DATA=... python evals/bench/bench_forwards.py [ROW ...]

The floor is the resident model's own forward without its head, one sample at a time, measured in the same process
right before and right after each run. Pruning includes reading every block, scoring, and writing the result. `wanda_ratio` is
the time as a multiple of that of the row `wanda` of the same call. Results of rows that are not measured are kept.
"""

import csv
import sys
import tempfile
from pathlib import Path

import torch
from common import RESULTS, Timer, data_dir, save, smollm2, timed
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.calibration import calibration_set

RUNS: dict[str, dict[str, object]] = {
    "wanda": {},
    "wanda-sublayer": {"sequential": "sublayer"},
    "wanda-dense": {"propagate": "dense"},
    "sparsegpt": {"method": "sparsegpt"},
    "dsnot": {"method": "dsnot"},
    "icbs-layerwise": {"refine": "icbs"},
    "lstsq": {"reconstruct": "lstsq"},
    "best": {"method": "best"},
    "cfsp": {"method": "cfsp", "sparsity": 0.3, "compensate": "none"},
    "cfsp-lstsq": {"method": "cfsp", "sparsity": 0.3, "compensate": "lstsq"},
}


def dense_forward(model: torch.nn.Module, ids_NT: torch.Tensor) -> Timer:
    with timed() as timer:
        for sample in ids_NT.split(1):
            model(input_ids=sample, use_cache=False)
    return timer


def main() -> None:
    names = sys.argv[1:] or list(RUNS)
    ids = str(data_dir() / "golden" / "calibration_ids.parquet")
    model_dir = smollm2()
    tokens = calibration_set(ids, None, samples=32, seqlen=512, seed=0, vocab_size=49152)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).model.eval().requires_grad_(False)
    file = RESULTS / "forwards.csv"
    lines = file.read_text().splitlines() if file.exists() else []
    rows: dict[str, dict[str, object]] = {str(row["row"]): dict(row) for row in csv.DictReader(lines)}
    after, wanda = dense_forward(model, tokens.ids_NT), None
    for name in names:
        before = after
        with tempfile.TemporaryDirectory() as folder:
            options = {"calibration": ids, "samples": 32, "seqlen": 512, "output": Path(folder) / "out", **RUNS[name]}
            with timed() as pruning:
                llmprune.prune(str(model_dir), **options)
        after = dense_forward(model, tokens.ids_NT)
        wall, cpu = (before.wall + after.wall) / 2, (before.cpu + after.cpu) / 2
        wanda = pruning.wall if name == "wanda" else wanda
        rows[name] = {
            "row": name,
            "wall_ratio": round(pruning.wall / wall, 3),
            "cpu_ratio": round(pruning.cpu / cpu, 3),
            "wanda_ratio": round(pruning.wall / wanda, 3) if wanda else None,
            "dense_s": round(wall, 1),
            "prune_s": round(pruning.wall, 1),
        }
        print(rows[name], flush=True)
        save("forwards", [dict.fromkeys(rows[name]) | row for row in rows.values()])


if __name__ == "__main__":
    main()
