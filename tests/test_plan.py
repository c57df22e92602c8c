"""Predictions against what runs take."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from in_process import llmprune

sys.path.append(str(Path(__file__).parent.parent / "evals" / "bench"))
from random_llama import write

QUICK = ["--calibration=random", "--samples=4", "--seqlen=64"]


def plan(*options):
    return json.loads(llmprune("plan", *QUICK, *options, "--json").out)


def test_planned_memory_does_not_grow_with_depth(tmp_path):
    shape = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 4, "hollow": True}
    for blocks in (3, 80):
        write(tmp_path / str(blocks), blocks=blocks, **shape)
    shallow, deep = (plan("--model", tmp_path / blocks)["peak_memory_bytes"] for blocks in ("3", "80"))
    assert shallow == deep


def test_a_model_larger_than_the_disk_can_be_planned_and_the_plan_says_so(tmp_path):
    write(tmp_path / "model", blocks=80, hidden=8192, ffn=28672, heads=64, kv_heads=8, hollow=True)
    options = ["--model", tmp_path / "model", "--output", tmp_path / "out"]
    planned = plan(*options)
    assert planned["disk_bytes"] > 130e9
    assert ("TOO LITTLE" in llmprune("plan", *QUICK, *options).out) == (planned["free_disk_bytes"] < planned["disk_bytes"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_run_takes_the_memory_that_was_planned(tmp_path, dtype):
    write(tmp_path / "model", blocks=3, hidden=1536, ffn=4096, heads=12, kv_heads=12, vocab=2000, dtype=dtype)
    options = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *QUICK]
    planned = plan(*options)["peak_memory_bytes"]
    # A process of its own: this one's memory holds what other tests left.
    command = [sys.executable, "-m", "llmprune", "prune", *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert planned == pytest.approx(json.loads(done.stdout)["peak_rss_bytes"], rel=0.15)
