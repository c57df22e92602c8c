"""Kill real pruning processes with SIGKILL and check that what they resume to has the same bytes.

    python tests/helpers/crash_harness.py MODEL WORKDIR --kills 50 --recipe '{"calibration": "random", "samples": 4}'
    python tests/helpers/crash_harness.py MODEL WORKDIR --races 5 --recipe '{"calibration": "random", "samples": 400}'

Imports once, forks a child per attempt. Half of the kills hit a chosen file operation in the output directory (the n-th open,
rename or removal, seen through an audit hook), the other half a random moment. A child that finishes is compared with an
uninterrupted run, then the directory is removed and killing goes on. `--races` has two runs lock one directory at the same
moment instead: one wins, the other is refused.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TextIO

import torch

from llmprune import output
from llmprune.errors import LLMPruneError
from llmprune.pruning import run
from llmprune.recipe import Recipe

OWN = ("llmprune.json", "README.md")  # one holds timings, the other the directory's name


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in OWN
    }


def die_at_operation(folder: Path, count: int) -> None:
    """SIGKILL this process at its n-th file operation below `folder`."""
    remaining = [count]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.truncate") and str(folder) in str(args[0]):
            remaining[0] -= 1
            if remaining[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_after(seconds: float) -> None:
    """SIGKILL this process after a while, whatever it is doing."""

    def kill() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def start(recipe: Recipe, folder: Path, death: tuple[str, float] | None = None, gate: Barrier | None = None) -> int:
    """Run in a forked child, which takes the directory's lock when all have come to `gate`. Returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        if gate:
            lock = output._lock

            def lock_at_once(directory: Path) -> TextIO:
                gate.wait(60)
                return lock(directory)

            output._lock = lock_at_once
        torch.set_num_threads(1)
        if death:
            kind, when = death
            die_at_operation(folder, int(when)) if kind == "operation" else die_after(when)
        run(recipe, say=lambda line: None, quiet=True)
        os._exit(0)
    except LLMPruneError as error:
        print(f"refused: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    except BaseException as error:
        print(f"failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def attempt(recipe: Recipe, folder: Path, death: tuple[str, float] | None) -> int:
    """Run in a forked child; returns its wait status."""
    return os.waitpid(start(recipe, folder, death), 0)[1]


def race(recipe: Recipe, folder: Path) -> list[int]:
    """Two runs that lock the directory at the same moment; returns their exit codes in order."""
    gate = multiprocessing.Barrier(2)
    children = [start(recipe, folder, gate=gate) for _ in range(2)]
    return sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--races", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", type=json.loads, default={})
    options = parser.parse_args()
    draw = random.Random(options.seed)
    folder = options.workdir / "killed"
    whole = Recipe(model=options.model, output=options.workdir / "whole", **options.recipe)
    recipe = Recipe(model=options.model, output=folder, **options.recipe)
    started = time.perf_counter()
    if attempt(whole, folder, None) != 0:
        return 1
    duration = time.perf_counter() - started
    expected = digests(options.workdir / "whole")

    for _ in range(options.races):
        codes = race(recipe, folder)
        if codes != [0, 2] or digests(folder) != expected:
            print(f"a race ended with the exit codes {codes}", file=sys.stderr)
            return 1
        shutil.rmtree(folder)
    if options.races:
        print(json.dumps({"races": options.races}))
        return 0

    kills = runs = 0
    while kills < options.kills or folder.exists():
        if kills >= options.kills:
            death = None
        elif kills % 2:
            death = ("operation", float(draw.randint(1, 60)))
        else:
            death = ("time", draw.uniform(0, duration))
        status = attempt(recipe, folder, death)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            kills += 1
            continue
        if os.waitstatus_to_exitcode(status) != 0:
            print(f"a resumed run failed after {kills} kills", file=sys.stderr)
            return 1
        found = digests(folder)
        if found != expected:
            changed = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
            print(f"after {kills} kills these differ: {changed}", file=sys.stderr)
            return 1
        runs += 1
        shutil.rmtree(folder)
    print(json.dumps({"kills": kills, "finished_runs": runs, "files_compared": len(expected)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
