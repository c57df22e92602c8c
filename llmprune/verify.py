"""Is a pruned directory what its record says? Every file's hash, every linear's sparsity and pattern."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import output
from .checkpoint import INDEX, Checkpoint, hash_file
from .errors import LLMPruneError
from .methods.sparsegpt import COLUMNS
from .output import RECIPE, RECORD, STATE
from .patterns import NM, removed_count
from .recipe import parse_nm
from .statistics import all_finite


def verify(directory: Path, *, advance_progress: Callable[[str], None] = lambda name: None) -> list[str]:
    """What is wrong with a finished output directory, one sentence each; an empty list if nothing is.

    Raises:
        LLMPruneError: the directory is not a finished result of llmprune, its record is damaged, or a file cannot be read.
    """
    record = read_record(directory)
    problems = []
    # from_pretrained would read weights that are not ours beside or instead of these.
    for file in sorted(path.name for path in directory.glob("model*.safetensors")):
        if file not in record["shards"]:
            problems.append(f"{file} does not belong to this model.")
    written = {RECIPE: record["recipe_sha256"], INDEX: record["index_sha256"]}
    for file, digest in {**record["shards"], **record["copied"], **written}.items():
        path = directory / file
        if not path.is_file():
            problems.append(f"{file} is missing.")
        elif hash_file(path) != digest:
            problems.append(f"{file} is not what was written: its SHA-256 differs.")
        advance_progress(file)
    if problems:
        return problems
    checkpoint = Checkpoint.open(directory)
    for name, fact in record["linears"].items():
        problems += [f"{name}: {problem}" for problem in _check_linear(checkpoint, fact, record["recipe"])]
        advance_progress(name)
    return problems


def steps(record: dict) -> int:  # type: ignore[type-arg]
    """How often `verify` advances: once for every file, the index and the recipe among them, and every linear."""
    return sum(len(record[key]) for key in ("shards", "copied", "linears")) + 2


def read_record(directory: Path) -> dict:  # type: ignore[type-arg]
    """The content of llmprune.json.

    Raises:
        LLMPruneError: it is missing, damaged, or the run is not finished.
    """
    if not (directory / RECORD).is_file():
        if (directory / STATE).is_dir():
            raise LLMPruneError(f"{directory} holds an unfinished run: give its prune command again to finish it.")
        raise LLMPruneError(f"{directory} holds no {RECORD}: give a directory that llmprune wrote.")
    return output.read_record(directory)


def _check_linear(checkpoint: Checkpoint, fact: dict, recipe: dict) -> list[str]:  # type: ignore[type-arg]
    weight = checkpoint.read(fact["tensor"])
    weight_OI = weight.T if fact["transposed"] else weight
    problems = []
    if not all_finite(weight):
        problems.append("holds NaN or infinite weights.")
    zero_OI = weight_OI == 0
    if bool((zero_OI & weight_OI.signbit()).any()):
        problems.append("holds -0.0.")
    zeros = int(zero_OI.sum())
    if zeros != fact["zeros"]:
        problems.append(f"holds {zeros} zeros, its record says {fact['zeros']}.")
    if nm := parse_nm(recipe["pattern"]):
        problems += _check_groups(zero_OI, NM(*nm))
    elif zeros < _least_zeros(weight_OI, recipe):
        problems.append(f"is {zeros / weight.numel():.2%} sparse, less than the recipe's {recipe['sparsity']:.2%}.")
    return problems


def _check_groups(zero_OI: Tensor, pattern: NM) -> list[str]:
    short = zero_OI.reshape(-1, pattern.m).sum(dim=1) < pattern.m - pattern.n
    if not short.any():
        return []
    first = int(torch.nonzero(short)[0])
    row, column = divmod(first * pattern.m, zero_OI.shape[1])
    return [f"row {row}, columns {column} to {column + pattern.m - 1} are not {pattern}."]


def _least_zeros(weight_OI: Tensor, recipe: dict) -> int:  # type: ignore[type-arg]
    """The zeros an unstructured recipe promises: its share, rounded down in each group of competing weights."""
    rows, columns = weight_OI.shape
    groups = 1 if recipe.get("group") == "layer" else rows
    if recipe["method"] == "sparsegpt":  # competes within blocks of columns
        groups = (rows if recipe.get("group") == "row" else 1) * -(-columns // COLUMNS)
    return removed_count(weight_OI.numel(), recipe["sparsity"]) - groups
