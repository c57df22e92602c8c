"""Perplexity of each method on SmolLM2 under the published protocol, beside the reference codes' figures.

    LLMPRUNE_DATA=... python evals/bench/bench_gold.py

Calibration: 32 samples x 512 tokens of wikitext-2 validation (recorded ids). Evaluation: wikitext-2 test, first 32 disjoint
windows of 512. Reference figures: the published codes, run unmodified but for loading, on the same ids.
"""

import tempfile

from common import data_dir, save, smollm2

import llmprune

REFERENCE = {
    ("magnitude", "unstructured", "block", "pruned"): 464.6,
    ("wanda", "unstructured", "block", "pruned"): 59.705,
    ("wanda", "2:4", "block", "pruned"): 181.30,
    ("sparsegpt", "unstructured", "block", "pruned"): 50.124,
    ("sparsegpt", "2:4", "block", "pruned"): 81.95,
    ("wanda", "unstructured", "sublayer", "pruned"): None,
    ("wanda", "unstructured", "block", "dense"): None,
}


def main() -> None:
    data, model = data_dir(), smollm2()
    rows: list[dict[str, object]] = []
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
                evaluate=str(data / "wikitext-2-raw-v1" / "test.parquet"),
                output=f"{folder}/out",
            )
        text = result.record["perplexity"]
        assert isinstance(text, dict)
        row: dict[str, object] = {
            "method": method,
            "pattern": pattern,
            "sequential": sequential,
            "propagate": propagate,
            "dense": round(text["dense"], 3),
            "perplexity": round(text["pruned"], 3),
            "reference": reference,
            "difference": f"{text['pruned'] / reference - 1:+.2%}" if reference else None,
        }
        rows.append(row)
        print(row, flush=True)
    save("gold", rows)


if __name__ == "__main__":
    main()
