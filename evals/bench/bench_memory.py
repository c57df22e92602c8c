"""Peak resident memory of a Wanda run, and whether reading and writing hide behind computing.

    python evals/bench/bench_memory.py           # 4 against 32 blocks of one width
    python evals/bench/bench_memory.py offload   # many activations, in memory and with --offload-activations
    python evals/bench/bench_memory.py 7b        # 32 blocks, hidden 4096, FFN 11008, bf16: 13 GB on disk, twice
    python evals/bench/bench_memory.py 70b       # a 2-block cut of the 70B shape against what `plan` says of all 80 blocks

Each run is a process of its own, and its checkpoint is pushed out of the file cache before it starts. `anonymous` is what the
process itself allocated (the peak of RssAnon, sampled); `peak` is the kernel's own VmHWM, which adds mapped libraries (and the
file of --offload-activations). `bound` is what the project promises: three times a block's weights, the activations and 1 GB.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import save
from random_llama import write

SMALL = {"hidden": 1024, "ffn": 2816, "heads": 16, "kv_heads": 16}
SHAPES = {
    "4 blocks": {"blocks": 4, **SMALL},
    "32 blocks": {"blocks": 32, **SMALL},
    "offload": {"blocks": 2, **SMALL, "ffn": 1024},
    "7b": {"blocks": 32, "hidden": 4096, "ffn": 11008, "heads": 32, "kv_heads": 32},
    "70b": {"blocks": 2, "hidden": 8192, "ffn": 28672, "heads": 64, "kv_heads": 8},
}
SAMPLES = {"offload": 192}
SEQLEN = 512
LLMPRUNE = [sys.executable, "-m", "llmprune"]


def status(pid: int) -> dict[str, int]:
    """RssAnon and VmHWM of a process in bytes; empty once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}


def forget(folder: Path) -> None:
    """Push a folder's files out of the file cache, so that they are read from the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(name: str, folder: Path, *flags: str) -> dict[str, object]:
    model, shape, samples = folder / "model", SHAPES[name], SAMPLES.get(name, 4)
    if not model.exists():
        write(model, **shape)
    block_bytes = (model / f"model-00002-of-{shape['blocks'] + 1:05}.safetensors").stat().st_size
    options = ["--model", str(model), "--method", "wanda", "--calibration", "random", "--samples", str(samples)]
    options += ["--seqlen", str(SEQLEN), "--output", str(folder / "out"), "--overwrite", *flags]
    planned = model
    if name == "70b":
        planned = folder / "all-80-blocks"
        write(planned, **{**shape, "blocks": 80}, hollow=True)
    plan_options = [str(planned) if option == str(model) else option for option in options]
    done = subprocess.run([*LLMPRUNE, "plan", *plan_options, "--json"], check=True, capture_output=True)
    plan = json.loads(done.stdout)["peak_memory_bytes"]
    forget(model)
    start = time.perf_counter()
    process = subprocess.Popen([*LLMPRUNE, "prune", *options, "--quiet"])
    peak = {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
        for key, value in status(process.pid).items():
            peak[key] = max(peak[key], value)
        time.sleep(0.05)
    clock = json.loads((folder / "out" / "llmprune.json").read_text())["clock_seconds"]
    activations = samples * SEQLEN * shape["hidden"] * 4
    return {
        "run": " ".join([name, *flags[:1]]),
        "block_MB": round(block_bytes / 1e6),
        "activations_MB": round(activations / 1e6),
        "anonymous_MB": round(peak["RssAnon"] / 1e6),
        "peak_MB": round(peak["VmHWM"] / 1e6),
        "planned_MB": round(plan / 1e6),
        "planned/peak": round(plan / peak["VmHWM"], 3),
        "bound_MB": round((3 * block_bytes + activations + 1e9) / 1e6),
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
            if name == "offload":
                rows.append(measure(name, Path(folder), "--offload-activations", folder))
                print(rows[-1], flush=True)
    save("memory-" + "-".join(names).replace(" ", ""), rows)


if __name__ == "__main__":
    main(sys.argv[1:] or ["4 blocks", "32 blocks"])
