"""Is a pruned directory what its record says? Every file's hash, every linear's sparsity and pattern, every block's widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import activation_plan, expert_surgery, output, structure, surgery
from .activation_plan import Plan as ActivationPlan
from .anatomy import Anatomy, Format, Sizes
from .anatomy import anatomy as anatomy_of
from .checkpoint import INDEX, Checkpoint, hash_file
from .errors import LLMPruneError
from .methods.sparsegpt import COLUMNS
from .models import Skeleton
from .output import RECIPE, RECORD, STATE
from .patterns import NM, removed_count
from .recipe import STRUCTURED, parse_nm
from .statistics import all_finite
from .surgery import Plan


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
    written = {INDEX: record["index_sha256"]}
    if "recipe_sha256" in record:
        written[RECIPE] = record["recipe_sha256"]
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
    if "recipe" not in record:
        return []  # nothing of llmprune's making but how it is stored
    plan, problems = _plan_of(directory, record)
    for name, fact in record["linears"].items():
        weight = checkpoint.read(fact["tensor"])
        weight_OI = weight.T if fact["transposed"] else weight
        problems += [f"{name}: {problem}" for problem in _check_linear(weight_OI, fact, _recipe_of(name, record))]
        if plan and name in plan.gates:
            problems += _check_gate(plan, name, weight_OI)
        advance_progress(name)
    if is_structured(record):
        try:
            problems += _check_structure(directory, record)
        except LLMPruneError as error:
            problems.append(str(error))
    return problems


def _plan_of(directory: Path, record: dict) -> tuple[ActivationPlan | None, list[str]]:  # type: ignore[type-arg]
    """The gates that lie beside the weights, where the method makes some, and what is wrong with them."""
    if record["recipe"]["method"] != "wina":
        return None, []
    try:
        plan = ActivationPlan.load(directory)
    except LLMPruneError as error:
        return None, [str(error)]
    return plan, [] if plan else [f"{activation_plan.FILE} is missing."]


def _check_gate(plan: ActivationPlan, name: str, weight_OI: Tensor) -> list[str]:
    """Whether a gate was made for this weight."""
    try:
        plan.check_weight(name, weight_OI)
    except LLMPruneError as error:
        return [str(error)]
    return []


def is_structured(record: dict) -> bool:  # type: ignore[type-arg]
    """Whether whole channels or heads were removed."""
    return record["recipe"]["method"] in STRUCTURED


def block_of(name: str) -> int:
    """Which block a linear is in: the first number in its name, as in `model.layers.7.mlp.up_proj`."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _recipe_of(name: str, record: dict) -> dict:  # type: ignore[type-arg]
    """The recipe with the sparsity that the linear's block was given, where they are not all alike."""
    blocks = record.get("blocks", [])
    own = blocks[block_of(name)].get("sparsity") if blocks else None
    return record["recipe"] if own is None else {**record["recipe"], "sparsity": own}


def steps(record: dict) -> int:  # type: ignore[type-arg]
    """How often `verify` advances: once for every file, the index and the recipe among them, and every linear."""
    return sum(len(record.get(key, ())) for key in ("shards", "copied", "linears")) + 1 + ("recipe_sha256" in record)


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


def pruned_record(directory: Path) -> dict:  # type: ignore[type-arg]
    """`read_record`, of a pruned model.

    Raises:
        LLMPruneError: see `read_record`; or llmprune has packed the model and not pruned it.
    """
    record = read_record(directory)
    if "recipe" not in record:
        raise LLMPruneError(
            f"{directory} is a model that llmprune has packed and not pruned, so there is nothing to say of its pruning: give "
            "what `llmprune prune` wrote, or an export of that."
        )
    return record


def _check_linear(weight_OI: Tensor, fact: dict, recipe: dict) -> list[str]:  # type: ignore[type-arg]
    problems = []
    if not all_finite(weight_OI):
        problems.append("holds NaN or infinite weights.")
    zero_OI = weight_OI == 0
    if bool((zero_OI & weight_OI.signbit()).any()):
        problems.append("holds -0.0.")
    zeros = int(zero_OI.sum())
    if zeros != fact["zeros"]:
        problems.append(f"holds {zeros} zeros, its record says {fact['zeros']}.")
    if recipe["method"] in (*STRUCTURED, "wina"):  # no zeros were promised
        return problems
    if nm := parse_nm(recipe["pattern"]):
        problems += _check_groups(zero_OI, NM(*nm))
    elif zeros < _least_zeros(weight_OI, recipe):
        problems.append(f"is {zeros / weight_OI.numel():.2%} sparse, less than the recipe's {recipe['sparsity']:.2%}.")
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


# Structured pruning: the plan, the configuration and the tensors are to say the same.


def _check_structure(directory: Path, record: dict) -> list[str]:  # type: ignore[type-arg]
    """What of a model without some channels or heads is not as its plan has it.

    Raises:
        LLMPruneError: the plan or the configuration cannot be read.
    """
    # Its shapes are those of config.json, or this is an error.
    skeleton = Skeleton(directory)
    if structure.has_experts(skeleton):
        return list(expert_surgery.problems(directory, skeleton, record))
    plan = Plan.from_json((directory / structure.PLAN).read_text(encoding="utf-8"))
    stored = anatomy_of(skeleton.config)
    # Where units lie follows from the architecture, how many there were from the plan.
    source = replace(stored, blocks=plan.sizes)
    format: Format = record["recipe"].get("format", "auto")
    wanted = _wanted_sizes(plan, source, format)
    problems = []
    for what, counts in record["kept"].items():
        planned = [len(kept.channels if what == "ffn" else kept.heads) for kept in plan.blocks]
        if counts != planned:
            problems.append(f"{structure.PLAN} keeps {planned} {what} units of the blocks, the record says {counts}.")
    if stored.blocks != wanted:
        different = [index for index, sizes in enumerate(stored.blocks) if wanted[index : index + 1] != (sizes,)]
        where = f"block {different[0]} is {_said(stored.blocks[different[0]])}" if different else "blocks are missing"
        return [*problems, f"config.json does not agree with {structure.PLAN}: {where}."]
    for index, sizes in enumerate(wanted if format != "auto" else ()):
        problems += [f"block {index}: {problem}" for problem in _check_zeros(skeleton, plan, source, index, sizes, format)]
    parameters = sum(entry.numel for entry in skeleton.checkpoint.entries.values())
    if parameters != record["parameters"]["stored"]:
        problems.append(f"{parameters} parameters are stored, the record says {record['parameters']['stored']}.")
    return problems


def _wanted_sizes(plan: Plan, source: Anatomy, format: Format) -> tuple[Sizes, ...]:
    """What every block is to have on the disk."""
    if format == "masked":
        return plan.sizes
    if format == "padded":
        return (plan.padded(source),) * len(plan.blocks)
    return plan.stored_sizes(source)


def _said(sizes: Sizes) -> str:
    return f"{sizes.channels} channels, {sizes.heads} heads and {sizes.kv_heads} key-value heads wide"


def _check_zeros(skeleton: Skeleton, plan: Plan, source: Anatomy, index: int, sizes: Sizes, format: Format) -> Iterator[str]:
    """Whether the places of removed units are zero, where they are on the disk."""
    prefix = f"{skeleton.blocks_path}.{index}."
    kept, within = plan.blocks[index], source
    if format == "padded":
        within = replace(source, blocks=(sizes,) * len(plan.blocks))
        kept = structure.places(kept, plan.sizes[index], sizes)
    for name in source.shapes(sizes):
        tensor = skeleton.checkpoint.read(skeleton.stored_names[prefix + name])
        (masked,) = surgery.mask({name: tensor}, kept, within, index).values()
        if not torch.equal(masked, tensor):
            yield f"{name} is not zero where units were removed."
