"""Perplexity of each method on SmolLM2 under the published protocol, beside the reference codes' figures.

    LLMPRUNE_DATA=... python evals/bench/bench_gold.py [ROW ...]

Calibration: 32 samples x 512 tokens of wikitext-2 validation (recorded ids), or of C4 where the row says so. Evaluation:
wikitext-2 test, first 32 disjoint windows of 512. Reference figures: the published codes, run unmodified but for loading, on
the same ids. Rows given by name are measured, all without; results of rows that are not measured are kept. `seconds` is pruning
alone, in the same process; compare it with Wanda's of the same call only.
"""

import csv
import sys
import tempfile
import time

from common import RESULTS, data_dir, save, smollm2

import llmprune
from llmprune.calibration import evaluation_set
from llmprune.models import Skeleton, load_tokenizer
from llmprune.perplexity import perplexity

REFERENCE = {  # the published code's perplexity
    "wanda": 59.705,
    "wanda-2:4": 181.30,
    "sparsegpt": 50.124,
    "sparsegpt-2:4": 81.95,
    "magnitude": 464.6,
    "dsnot-paper-60": 166.49,
}
NM = {"2:4": {"pattern": "2:4"}, "4:8": {"pattern": "4:8"}}
LEVELS: dict[str, dict[str, object]] = {"50": {"sparsity": 0.5}, "60": {"sparsity": 0.6}, "70": {"sparsity": 0.7}, **NM}
C4 = "c4/c4_en_train00000_first1000.jsonl"

ROWS: dict[str, dict[str, object]] = {
    "wanda": {},
    "sparsegpt": {"method": "sparsegpt"},
    "wanda-2:4": {"pattern": "2:4"},
    "sparsegpt-2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "wanda-sublayer": {"sequential": "sublayer"},
    "wanda-dense": {"propagate": "dense"},
    "magnitude": {"method": "magnitude"},
    **{f"wanda-{name}": level for name, level in LEVELS.items() if name not in ("50", "2:4")},
    **{f"dsnot-{name}": {"method": "dsnot", **level} for name, level in LEVELS.items()},
    "dsnot-paper-60": {"method": "dsnot", "preset": "paper", "sparsity": 0.6, "dsnot": {"threshold_tokens": 512}},
    "icbs-layerwise": {"refine": "icbs"},
    "icbs-dense": {"refine": "icbs", "sequential": "sublayer", "match": "dense"},
    "icbs-layerwise-2:4": {"refine": "icbs", "pattern": "2:4"},
    "wanda-sweep": {"reconstruct": "sparsegpt"},
    "wanda-lstsq": {"reconstruct": "lstsq"},
    "wanda-lstsq-dense": {"reconstruct": "lstsq", "sequential": "sublayer", "match": "dense"},
    "wanda-lstsq-sublayer": {"reconstruct": "lstsq", "sequential": "sublayer"},
    "icbs-lstsq-sublayer": {"refine": "icbs", "reconstruct": "lstsq", "sequential": "sublayer"},
    "icbs-6": {"method": "icbs", "icbs": {"steps": 6, "batch_size": 4}},
    "best-block": {"method": "best", "match": "block"},
    "best-row": {"method": "best", "group": "row"},
    "best-mask": {"method": "best", "rounds": 0},
    "best": {"method": "best"},
    "best-2:4": {"method": "best", "pattern": "2:4"},
    "best-c4-32": {"method": "best", "calibration": C4},
    "best-c4-128": {"method": "best", "calibration": C4, "samples": 128},
    "best-2:4-c4-128": {"method": "best", "pattern": "2:4", "calibration": C4, "samples": 128},
}


def main() -> None:
    names = sys.argv[1:] or list(ROWS)
    data, model = data_dir(), smollm2()
    text = str(data / "wikitext-2-raw-v1" / "test.parquet")
    windows = evaluation_set(text, load_tokenizer(model), seqlen=512, windows=32)
    file = RESULTS / "gold.csv"
    lines = file.read_text().splitlines() if file.exists() else []
    rows: dict[str, dict[str, object]] = {str(row["row"]): dict(row) for row in csv.DictReader(lines)}
    if "dense" not in rows:
        rows["dense"] = {"row": "dense", "perplexity": round(perplexity(Skeleton(model), windows.ids_NT), 3)}
    for name in names:
        options = {"samples": 32, "seqlen": 512, **ROWS[name]}
        source = str(data / str(options.pop("calibration", "golden/calibration_ids.parquet")))
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            result = llmprune.prune(str(model), calibration=source, output=f"{folder}/out", **options)
            seconds = time.perf_counter() - start
            value = perplexity(Skeleton(result.directory), windows.ids_NT)
        reference = REFERENCE.get(name)
        rows[name] = {
            "row": name,
            "perplexity": round(value, 3),
            "reference": reference,
            "difference": f"{value / reference - 1:+.2%}" if reference else None,
            "sparsity": round(float(str(result.record["sparsity"])), 4),
            "seconds": round(seconds, 1),
            "forwards": result.record["clock_seconds"]["forwards"],  # type: ignore[index]
            **_errors(result.record["linears"]),  # type: ignore[arg-type]
        }
        print({key: value for key, value in rows[name].items() if value is not None}, flush=True)
        save("gold", [dict.fromkeys(rows[name]) | row for row in rows.values()])


def _errors(linears: dict[str, dict[str, float]]) -> dict[str, object]:
    """Means over linears of the relative output errors, where the run recorded them."""
    means: dict[str, object] = {}
    for key in ("error", "fresh_error", "start_fresh_error"):
        values = [facts[key] for facts in linears.values() if key in facts]
        means[key] = round(sum(values) / len(values), 5) if values else None
    return means


if __name__ == "__main__":
    main()
