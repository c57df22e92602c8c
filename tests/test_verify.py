"""`llmprune verify`: what a finished directory says of itself holds, whatever the method and the format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from in_process import llmprune
from records import amend
from safetensors.torch import load_file, save_file
from tiny import build

from llmprune.checkpoint import hash_file
from llmprune.structure import PLAN
from llmprune.verify import read_record, verify

OPTIONS = ("--calibration", "random", "--samples", "8", "--seqlen", "24", "--device", "cpu", "-q")
CASES = {
    "auto": ("--compensate", "lstsq"),
    "uniform": ("--allocation", "uniform"),
    "padded": ("--format", "padded"),
    "masked": ("--format", "masked"),
    "bias": ("--compensate", "bias"),
    "masked bias": ("--compensate", "bias", "--format", "masked"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and a structured result for every case."""
    folder = tmp_path_factory.mktemp("verify")
    build("llama", folder / "dense")
    for case, flags in CASES.items():
        prune(folder / "dense", folder / case, "--method", "cfsp", *flags)
    return folder


@pytest.fixture
def copied(models: Path, tmp_path: Path):
    return lambda case: shutil.copytree(models / case, tmp_path / case)


def prune(model: Path, output: Path, *flags: str) -> None:
    outcome = llmprune("prune", "--model", model, "--output", output, *flags, *OPTIONS)
    assert outcome.code == 0, outcome


def change(directory: Path, name: str, edit) -> None:
    """Change a tensor (`edit` gets it and returns what is to be in its place, or None), and the record's hash of its shard."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    file = directory / index[name]
    tensors = load_file(file)
    tensors[name] = edit(tensors[name])
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    sign(directory, "shards", file.name)


def sign(directory: Path, where: str, file: str) -> None:
    amend(directory, **{where: {**read_record(directory)[where], file: hash_file(directory / file)}})


@pytest.mark.parametrize("case", CASES)
def test_a_structured_result_is_whole_and_its_budget_is_said(models: Path, case: str) -> None:
    outcome = llmprune("verify", models / case)
    assert (outcome.code, outcome.err) == (0, "")
    assert "as planned (FFN channels 156 → 78)" in outcome.out


@pytest.mark.parametrize("case", ["auto", "padded", "masked"])
def test_a_tensor_of_another_shape_is_named(copied, case: str) -> None:
    directory = copied(case)
    change(directory, "model.layers.1.mlp.up_proj.weight", lambda tensor: torch.cat([tensor, tensor[:1]]))
    (problem,) = verify(directory)
    assert "layers.1.mlp.up_proj.weight" in problem
    assert "shape" in problem


@pytest.mark.parametrize("case", ["padded", "masked"])
def test_a_weight_where_a_unit_was_removed_is_found(copied, case: str) -> None:
    directory = copied(case)
    name = "model.layers.2.mlp.down_proj"

    def fill_last_empty(weight_OI):
        weight_OI[:, int((weight_OI == 0).all(dim=0).nonzero()[-1])] = 1.0
        return weight_OI

    change(directory, f"{name}.weight", fill_last_empty)
    record = read_record(directory)
    record["linears"][name]["zeros"] -= record["linears"][name]["shape"][0]
    amend(directory, linears=record["linears"])
    assert verify(directory) == ["block 2: mlp.down_proj.weight is not zero where units were removed."]


def test_a_kept_weight_may_be_zero_only_if_the_record_counts_it(copied) -> None:
    directory = copied("auto")
    change(directory, "model.layers.0.mlp.gate_proj.weight", lambda tensor: tensor.index_fill(0, torch.tensor([0]), 0.0))
    assert verify(directory) == ["model.layers.0.mlp.gate_proj: holds 36 zeros, its record says 0."]


def test_another_plan_or_configuration_is_found(copied) -> None:
    directory = copied("auto")
    plan = json.loads((directory / PLAN).read_text())
    plan["blocks"][1]["channels"].pop()
    (directory / PLAN).write_text(json.dumps(plan))
    assert verify(directory) == [f"{PLAN} is not what was written: its SHA-256 differs."]
    sign(directory, "copied", PLAN)
    first, second = verify(directory)
    assert first.startswith(f"{PLAN} keeps [")
    assert second.startswith(f"config.json does not agree with {PLAN}: block 1 is ")
    (directory / PLAN).write_text("{}")
    sign(directory, "copied", PLAN)
    (only,) = verify(directory)
    assert only.startswith("The plan is damaged")


def test_masked_models_of_other_families_are_checked_like_any_other(tmp_path: Path) -> None:
    for family in ("gpt2", "opt", "phi3"):
        build(family, tmp_path / family)
        prune(tmp_path / family, tmp_path / f"{family}-cut", "--method", "cfsp", "--format", "masked")
        assert verify(tmp_path / f"{family}-cut") == []


@pytest.mark.parametrize(
    "flags", [("--method", "best", "--rounds", "1"), ("--method", "wanda", "--allocation", "block-influence")]
)
def test_blocks_that_were_allotted_less_than_the_recipes_sparsity_are_no_problem(models: Path, tmp_path: Path, flags) -> None:
    prune(models / "dense", tmp_path / "out", "--sparsity", "0.5", *flags)
    assert {block["sparsity"] for block in read_record(tmp_path / "out")["blocks"]} != {0.5}
    assert verify(tmp_path / "out") == []


def test_a_mask_pruned_from_a_smaller_model_is_whole(models: Path, tmp_path: Path) -> None:
    prune(models / "auto", tmp_path / "out", "--method", "wanda", "--sparsity", "0.5")
    assert verify(tmp_path / "out") == []
