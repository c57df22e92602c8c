"""Perplexity of each method on SmolLM2 under the published protocol, beside the reference codes' figures.

    LLMPRUNE_DATA=... python evals/bench/bench_gold.py

Calibration: 32 samples x 512 tokens of wikitext-2 validation (recorded ids). Evaluation: wikitext-2 test, first 32 disjoint
windows of 512. Reference figures: the published codes, run unmodified but for loading, on the same ids.
"""

import tempfile

from common import data_dir, save, smollm2

import llmprune
from llmprune.calibration import evaluation_set
from llmprune.models import Skeleton, load_tokenizer
from llmprune.perplexity import perplexity

REFERENCE = {  # (method, pattern, sequential, propagate): the published code's perplexity
    ("sparsegpt", "unstructured", "block", "pruned"): 50.124,
    ("sparsegpt", "2:4", "block", "pruned"): 81.95,
    ("wanda", "unstructured", "block", "pruned"): 59.705,
    ("wanda", "2:4", "block", "pruned"): 181.30,
    ("wanda", "unstructured", "sublayer", "pruned"): None,
    ("wanda", "unstructured", "block", "dense"): None,
    ("magnitude", "unstructured", "block", "pruned"): 464.6,
}


def main() -> None:
    data, model = data_dir(), smollm2()
    text = str(data / "wikitext-2-raw-v1" / "test.parquet")
    windows = evaluation_set(text, load_tokenizer(model), seqlen=512, windows=32)
    rows: list[dict[str, object]] = [{"method": "dense", "perplexity": round(perplexity(Skeleton(model), windows.ids_NT), 3)}]
    print(rows[0], flush=True)
    for (method, pattern, sequential, propagate), reference in REFERENCE.items():
        with tempfile.TemporaryDirectory() as folder:
            result = llmprune.prune(
                str(model),
                method=method,
                pattern=pattern,
                sequential=sequential,
                propagate=propagate,
                calibration=str(data / "golden" / "calibration_ids.parquet"),
                samples=32,
                seqlen=512,
                output=f"{folder}/out",
            )
            value = perplexity(Skeleton(result.directory), windows.ids_NT)
        rows.append(
            {
                "method": method,
                "pattern": pattern,
                "sequential": sequential,
                "propagate": propagate,
                "perplexity": round(value, 3),
                "reference": reference,
                "difference": f"{value / reference - 1:+.2%}" if reference else None,
            }
        )
        print(rows[-1], flush=True)
    save("gold", [dict.fromkeys(rows[-1]) | row for row in rows])


if __name__ == "__main__":
    main()
