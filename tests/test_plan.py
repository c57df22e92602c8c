"""Predictions against what runs take."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from in_process import llmprune
from tiny import build

from llmprune.checkpoint import Checkpoint
from llmprune.verify import read_record

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


SMALL = ["--method=cfsp", "--calibration=random", "--samples=8", "--seqlen=24"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--compensate=none"],
        ["--compensate=bias", "--allocation=uniform"],
        ["--compensate=lstsq"],
        ["--compensate=lstsq", "--match=dense", "--format=padded"],
        ["--compensate=none", "--format=masked"],
        ["--of=model", "--sparsity=0.15"],
    ],
    ids=" ".join,
)
def test_a_smaller_models_forwards_and_bytes_are_those_that_were_planned(tmp_path, flags):
    build("llama", tmp_path / "model")
    options = ["--model", tmp_path / "model", "--output", tmp_path / "out", *SMALL, *flags]
    planned = json.loads(llmprune("plan", *options, "--json").out)
    assert llmprune("prune", *options, "-q").code == 0
    record = read_record(tmp_path / "out")
    assert planned["forwards"] == record["clock_seconds"]["forwards"] / 3
    stored = sum(entry.nbytes for entry in Checkpoint.open(tmp_path / "out").entries.values())
    if "--format=padded" in flags:
        assert planned["disk_bytes"] >= stored
    else:
        # Biases that make up for channels are 3 x 36 weights; whole channels round the budget.
        assert planned["disk_bytes"] == pytest.approx(stored, abs=4 * 3 * 36 * 2)
    whole = {"--format=padded", "--format=masked"} & set(flags)
    assert (planned["disk_bytes"] == Checkpoint.open(tmp_path / "model").nbytes) == bool(whole)


def test_the_plan_of_a_smaller_model_says_what_can_be_removed(tmp_path):
    build("llama", tmp_path / "model")
    out = llmprune("plan", "--model", tmp_path / "model", "--output", tmp_path / "out", *SMALL).out
    assert "prunable: FFN channels of 3 blocks, 0.0 M parameters = 36.3% of the model" in out


def test_a_search_holds_the_whole_model_and_reads_more(tmp_path):
    build("llama", tmp_path / "model")
    options = ["--model", tmp_path / "model", *SMALL[1:3], "--seqlen=64", "--method=tyr"]
    few, searched = "--search=stages: [[2, 128], [1, 256]], generations: 4, offspring: 8, iterations: 1", "--allocation=uniform"
    searching, uniform = plan_of(*options, few), plan_of(*options, few, searched)
    assert uniform["forwards"] == 1
    # 8 samples of 64; a generation reads 8 x 128 and then 3 x 256 tokens.
    assert searching["forwards"] == 1 + 1 + 4 * (8 * 128 + 3 * 256) / 512


def plan_of(*options):
    return json.loads(llmprune("plan", *options, "--json").out)
