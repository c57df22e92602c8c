"""Perplexity of structured pruning on SmolLM2 under the gold protocol: metrics, allocation, compensation, Týr.

    LLMPRUNE_DATA=... python evals/bench/bench_structured.py [--c4] [ROW ...]

Calibration: 32 samples x 512 tokens of wikitext-2 validation (recorded ids). Evaluation: wikitext-2 test, first 32 disjoint
windows of 512; with --c4, to choose defaults by, also 16 windows of other text, C4. Rows are METRIC[+influence][+bias|+lstsq]
and the percentage of FFN channels (every block alike without +influence; +dense for least squares matched to the dense model),
or tyr-NAME and the percentage of heads and channels. What CFSP sees of the dense model is computed once for all rows of a call,
so `seconds` of its rows leave it out. `throughput` of a search: tokens per second of its candidates, with all that comparing
them takes, in relation to the dense model's forwards and logits of the same windows, timed before and after.
"""

import csv
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from common import RESULTS, data_dir, save, smollm2

import llmprune
from llmprune.calibration import calibration_set, evaluation_set
from llmprune.candidates import Candidates
from llmprune.evolution import Candidate
from llmprune.methods import cfsp
from llmprune.models import Skeleton, load_tokenizer
from llmprune.perplexity import perplexity
from llmprune.recipe import Recipe, from_options
from llmprune.statistics import Moments
from llmprune.stream import Stream

C4 = "c4/c4_en_train00000_first1000.jsonl"
METRICS = ("random", "magnitude", "act", "wanda_sp", "rel", "out_energy", "wifv")
PERCENT = (10, 20, 30, 50)
LOSSES, RESIDENT = Candidates.losses, Candidates.resident
TYR: dict[str, dict[str, object]] = {
    "uniform": {"allocation": "uniform"},
    "uniform-dense": {"allocation": "uniform", "match": "dense"},
    "fast": {"preset": "fast"},
    "joint": {"preset": "fast", "type_coupling": "joint"},
}


def options_of(row: str) -> dict[str, object]:
    """A row's name as options of `llmprune.prune`."""
    name, _, percent = row.rpartition("-")
    sparsity = {"sparsity": int(percent) / 100}
    if name.startswith("tyr-"):
        return {"method": "tyr", **sparsity, **TYR[name.removeprefix("tyr-")]}
    metric, *extras = name.split("+")
    options: dict[str, object] = {"method": "cfsp", "metric": metric, "allocation": "uniform", "compensate": "none", **sparsity}
    for extra in extras:
        options |= {
            "influence": {"allocation": "block-influence"},
            "bias": {"compensate": "bias"},
            "lstsq": {"compensate": "lstsq"},
            "dense": {"compensate": "lstsq", "match": "dense"},
        }[extra]
    return options


def main() -> None:
    texts = ("perplexity", "c4") if "--c4" in sys.argv else ("perplexity",)
    rows_wanted = [arg for arg in sys.argv[1:] if arg != "--c4"] or [
        f"{metric}-{percent}" for metric in METRICS for percent in PERCENT
    ]
    data, model = data_dir(), smollm2()
    tokenizer = load_tokenizer(model)
    test = evaluation_set(str(data / "wikitext-2-raw-v1" / "test.parquet"), tokenizer, seqlen=512, windows=32).ids_NT
    windows = {"perplexity": test, "c4": evaluation_set(str(data / C4), tokenizer, seqlen=512, windows=16).ids_NT}
    source = data / "golden" / "calibration_ids.parquet"
    file = RESULTS / "structured.csv"
    lines = file.read_text().splitlines() if file.exists() else []
    rows: dict[str, dict[str, object]] = {str(row["row"]): dict(row) for row in csv.DictReader(lines)}
    if "dense" not in rows:
        dense = Skeleton(model)
        values = [round(perplexity(dense, windows[text]), 3) for text in texts]
        rows["dense"] = {"row": "dense", **dict(zip(texts, values, strict=True)), "parameters": dense.parameters()}
    if any(not row.startswith("tyr") for row in rows_wanted):
        look_once(model, source)
    for row in rows_wanted:
        searches = time_searches()
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            out = f"{folder}/out"
            result = llmprune.prune(str(model), calibration=str(source), samples=32, seqlen=512, output=out, **options_of(row))
            seconds = time.perf_counter() - start
            pruned = Skeleton(result.directory)
            values = [round(perplexity(pruned, windows[text]), 3) for text in texts]
        record = result.record
        rows[row] = {
            "row": row,
            **dict.fromkeys(("perplexity", "c4")),
            **dict(zip(texts, values, strict=True)),
            "parameters": record["parameters"]["stored"],  # type: ignore[index]
            "sparsity": round(float(str(record["sparsity"])), 4),
            "seconds": round(seconds, 1),
            "damping": record["recipe"].get("damping"),  # type: ignore[attr-defined]
            "throughput": round(fmean(searches), 3) if searches else None,
        }
        print(rows[row], flush=True)
        save("structured", [dict.fromkeys(rows[row]) | each for each in rows.values()])


def time_searches() -> list[float]:
    """A list that gets the throughput of every search from now on."""
    found: list[float] = []
    clock = {"tokens": 0.0, "seconds": 0.0}

    def losses(self: Candidates, candidates: Sequence[Candidate], windows: Sequence[int]) -> list[float]:
        self.teacher.look(windows)  # once per window, whatever the candidates
        start = time.perf_counter()
        result = LOSSES(self, candidates, windows)
        clock["seconds"] += time.perf_counter() - start
        clock["tokens"] += len(candidates) * len(windows) * self.ids_WT.shape[1]
        return result

    @contextmanager
    def resident(self: Candidates) -> Iterator[None]:
        def dense() -> float:
            start = time.perf_counter()
            for window in range(4):
                self._dense_logits(window)
            return time.perf_counter() - start

        with RESIDENT(self):
            clock.update(tokens=0.0, seconds=0.0)
            dense()
            before = dense()
            yield
            plain = (before + dense()) / 2
            found.append(clock["tokens"] / clock["seconds"] * plain / (4 * self.ids_WT.shape[1]))

    Candidates.losses, Candidates.resident = losses, resident  # type: ignore[method-assign]
    return found


def look_once(model: Path, source: Path) -> None:
    """Give all rows the same look at the dense model: scores by every metric, means and importances."""
    recipe = from_options({"model": str(model), "method": "cfsp"})
    skeleton = Skeleton(model)
    tokens = calibration_set(str(source), None, vocab_size=skeleton.vocab_size, samples=32, seqlen=512, seed=0)
    stream = Stream(skeleton, tokens.ids_NT)
    scores: dict[str, list[object]] = {metric: [] for metric in METRICS}
    means, importances = [], []
    for block in stream.survey().blocks():
        for down, inputs in block.observe(Moments, {"down"}):
            for metric in METRICS:
                scores[metric].append(cfsp.score(block, down, inputs, recipe.model_copy(update={"metric": metric})))
            means.append(inputs.mean_I)
        importances.append(block.measure_importance())

    def looked_at(stream: Stream, recipe: Recipe) -> tuple[list[float], list[object], list[object]]:
        return importances, scores[recipe.metric], means

    cfsp.looked_at = looked_at  # type: ignore[assignment]


if __name__ == "__main__":
    main()
