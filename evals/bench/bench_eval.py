"""`llmprune eval` against the harness's own command line: the same scores, and what it adds to the time.

    LLMPRUNE_DATA=... python evals/bench/bench_eval.py [MODEL] [ROUNDS]

Both run as processes of their own on the suite `quick`, dense and Wanda-50 % (32 x 512 tokens of wikitext-2 validation),
over the same files with the same batch size, llmprune with an empty cache. The harness reads tasks that include its own
definitions and replace nothing but the data set. It scores all tasks at once: batches that mix tasks round other last digits,
which shows in perplexities and not in accuracies.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from common import data_dir, save, smollm2, timed
from lm_eval.tasks import TaskManager

import llmprune
from llmprune.evaluation import BATCH_SIZE
from llmprune.harness import HARNESS_TASKS, load_suite, local_tasks

SUITE = "quick"


def harness_task(name: str, folder: Path) -> Path:
    """A task file for the harness: its own definition over the local files."""
    local = local_tasks()[name]
    manager = TaskManager(include_defaults=False, include_path=HARNESS_TASKS / local.defined_in)
    files = {split: str(file.resolve()) for split, file in local.files().items()}
    task = {
        "include": str(manager.task_index[name].yaml_path),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": None,
        **{f"{split}_split": split if split in files else None for split in ("validation", "test")},
    }
    (file := folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return file


def by_harness(model: Path) -> tuple[dict[str, dict[str, float]], float]:
    """(metrics by task, seconds) of `lm-eval run`."""
    suite = load_suite(SUITE)
    with tempfile.TemporaryDirectory() as scratch:
        tasks = ",".join(str(harness_task(name, Path(scratch))) for name in suite.tasks)
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
        command += ["--tasks", tasks, "--limit", str(suite.limit), "--batch_size", str(BATCH_SIZE), "--device", "cpu"]
        with timed() as timer:
            subprocess.run([*command, "--output_path", f"{scratch}/out"], check=True, capture_output=True)
        (file,) = Path(scratch, "out").rglob("results*.json")
        results = json.loads(file.read_text())["results"]
    return {
        name: {key.removesuffix(",none"): value for key, value in found.items() if key.endswith(",none")}
        for name, found in results.items()
    }, timer.wall


def by_llmprune(model: Path) -> tuple[dict[str, dict[str, float]], float]:
    """(metrics by task, seconds) of `llmprune eval`."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "LLMPRUNE_CACHE": scratch}
        command = [sys.executable, "-m", "llmprune", "eval", str(model), "--suite", SUITE, "--device", "cpu", "--json"]
        with timed() as timer:
            printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    tasks = json.loads(printed)["evaluation"]["tasks"]
    return {name: task["metrics"] for name, task in tasks.items()}, timer.wall


def main(dense: Path, rounds: int) -> None:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        text = str(data_dir() / "wikitext-2-raw-v1" / "validation.parquet")
        llmprune.prune(str(dense), output=f"{folder}/out", calibration=text, samples=32, seqlen=512)
        for label, model in (("dense", dense), ("wanda 50%", Path(folder) / "out")):
            ours, theirs = [], []
            for _ in range(rounds):
                found, seconds = by_llmprune(model)
                ours.append(seconds)
                expected, seconds = by_harness(model)
                theirs.append(seconds)
                print(f"{label}: llmprune {ours[-1]:.1f} s, harness {theirs[-1]:.1f} s", flush=True)
            times = {"llmprune_s": round(statistics.median(ours), 1), "harness_s": round(statistics.median(theirs), 1)}
            times["added"] = f"{times['llmprune_s'] / times['harness_s'] - 1:+.1%}"
            for task, metrics in found.items():
                for metric, value in metrics.items():
                    other = expected[task][metric]
                    rows.append(
                        {"model": label, "task": task, "metric": metric, "llmprune": value, "harness": other}
                        | {"relative_difference": f"{abs(value - other) / (abs(other) or 1):.0e}", **times, "rounds": rounds}
                    )
    save("eval", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else smollm2(), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
