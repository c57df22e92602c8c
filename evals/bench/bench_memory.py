"""Peak resident memory of a Wanda run: independent of depth, and small for a 7B-shaped model.

    python evals/bench/bench_memory.py           # 4 against 32 blocks of one width
    python evals/bench/bench_memory.py 7b        # 32 blocks, hidden 4096, FFN 11008, bf16: 13 GB on disk, twice
    python evals/bench/bench_memory.py 70b       # a 2-block cut of the 70B shape against what `plan` predicts for it

Each run is a process of its own. `anonymous` is what the process itself allocated (the peak of RssAnon, sampled); `peak` is the
kernel's own VmHWM. Neither counts the file cache, since checkpoints are read and not mapped.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import save
from random_llama import write

SHAPES = {
    "4 blocks": {"blocks": 4, "hidden": 1024, "ffn": 2816, "heads": 16, "kv_heads": 16},
    "32 blocks": {"blocks": 32, "hidden": 1024, "ffn": 2816, "heads": 16, "kv_heads": 16},
    "7b": {"blocks": 32, "hidden": 4096, "ffn": 11008, "heads": 32, "kv_heads": 32},
    "70b": {"blocks": 2, "hidden": 8192, "ffn": 28672, "heads": 64, "kv_heads": 8},
}


def status(pid: int) -> dict[str, int]:
    """RssAnon and VmHWM of a process in bytes; empty once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}


def measure(name: str, folder: Path) -> dict[str, object]:
    model = folder / "model"
    write(model, **SHAPES[name])
    block_bytes = sum((model / f"model-00002-of-{SHAPES[name]['blocks'] + 1:05}.safetensors").stat().st_size for _ in [0])
    options = ["--model", str(model), "--method", "wanda", "--calibration", "random", "--samples", "4"]
    options += ["--seqlen", "512", "--output", str(folder / "out"), "--overwrite"]
    command = [sys.executable, "-m", "llmprune"]
    plan = json.loads(subprocess.run([*command, "plan", *options, "--json"], check=True, capture_output=True).stdout)
    start = time.perf_counter()
    process = subprocess.Popen([*command, "prune", *options, "--json"], stdout=subprocess.PIPE)
    peak = {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
        for key, value in status(process.pid).items():
            peak[key] = max(peak[key], value)
        time.sleep(0.05)
    assert process.stdout is not None
    record = json.loads(process.stdout.read())
    clock = record["clock_seconds"]
    return {
        "run": name,
        "block_MB": round(block_bytes / 1e6),
        "anonymous_MB": round(peak["RssAnon"] / 1e6),
        "peak_MB": round(peak["VmHWM"] / 1e6),
        "planned_MB": round(plan["peak_memory_bytes"] / 1e6),
        "seconds": round(time.perf_counter() - start),
        "waited_reading_s": clock["read_wait"],
        "waited_writing_s": clock["write_wait"],
        "computing_s": round(clock["observe"] + clock["decide"] + clock["advance"], 1),
    }


def main(names: list[str]) -> None:
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, Path(folder)))
            print(rows[-1], flush=True)
    save("memory-" + "-".join(names).replace(" ", ""), rows)


if __name__ == "__main__":
    main(sys.argv[1:] or ["4 blocks", "32 blocks"])
