"""WINA: leave weights alone and drop, token by token, the inputs that matter least to a linear's output.

"WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference" (arXiv 2505.19427), with TEAL
(arXiv 2408.14690) as `--score teal`. What is dropped for a token need not be read: of W x only the columns of what is kept.

1. The calibration set goes through the dense model, and every linear counts its scores |x_i| c_i, c_i the norm of column i of W
   (`gating_scores.ScoreHistogram`).
2. An allocation shares a block's sparsity among its linears (`activation_allocation`).
3. The histogram says which threshold drops that share (`gating_scores.Curve`). That is all there is in a plan.

Where this parts from the paper and its code: every linear has its norms (the code: k and gate only, `--score wina-released`);
inputs are dropped as they are, since a rotation (`--basis`) costs a dense product for every token, which the paper does not
count; thresholds instead of the largest k, because sorting takes longer than what is saved.

With `--form folded` norms go into the weights (`folding`), and weights are written that compute the same.

A finished block's part of the plan lies with the run's state, so an interrupted run loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ..activation_allocation import Unit, greedy
from ..activation_plan import DENSE, FILE, TENSORS, Basis, Form, Gate, Plan, Score, frobenius
from ..checkpoint import reading, write_file
from ..errors import LLMPruneError
from ..folding import fold_block, foldable_norms
from ..gating_scores import (
    NEVER_ROTATED,
    RELEASED,
    TOGETHER,
    Curve,
    ScoreHistogram,
    channel_thresholds,
    feeding_norm,
    gate_norms,
    orthogonal_basis,
    rotated,
)
from ..gating_trial import Trial, trial_stream
from ..models import Linear
from ..output import STATE, Output
from ..recipe import Recipe
from ..stream import Block, Stream

STATISTIC = ScoreHistogram
BASES: tuple[Basis, ...] = ("native", "stacked", "kgate")


def prune(stream: Stream, recipe: Recipe) -> None:
    stream.plan = calibrate(stream, recipe)


def calibrate(stream: Stream, recipe: Recipe) -> Plan:
    """The plan of a whole model. Its weights are written as they are, if the stream writes."""
    finished = stream.output.finished_blocks if stream.output else 0
    parts = [restored(stream.output, index) for index in range(finished) if stream.output]
    if finished < len(stream.skeleton.blocks):
        samples = trial_stream(stream)
        if parts:
            basis, compared = parts[0].basis, parts[0].compared
        else:
            basis, compared = settled_basis(samples, recipe)
        samples.capture()
        samples.skip(finished)
        folded = stream.operate(Folded()) if recipe.form == "folded" else None
        for block in stream.blocks():
            part = replace(block_plan(block, samples, recipe, basis), compared=compared)
            if folded:
                part = replace(part, gates=folded.fold(block, part.gates))
            keep(stream, block.index, part)
            parts.append(part)
    return Plan(
        {name: gate for part in parts for name, gate in part.gates.items()},
        parts[0].score,
        parts[0].share,
        parts[0].allocation,
        parts[0].basis,
        parts[0].sparsity,
        recipe.form,
        f"{recipe.samples} samples of {recipe.seqlen} tokens, {recipe.calibration}",
        stream.skeleton.checkpoint.fingerprint()[:16],
        {name: basis_II for part in parts for name, basis_II in part.bases.items()},
        {block: table_SG for part in parts for block, table_SG in part.tables.items()},
        parts[0].compared,
    )


class Folded:
    """Blocks whose norms have gone into their weights, until they are written: a `stream.Cutter` that cuts nothing."""

    def __init__(self) -> None:
        self.blocks: dict[int, dict[str, Tensor]] = {}

    def fold(self, block: Block, gates: Mapping[str, Gate]) -> dict[str, Gate]:
        """Take a block's weights as they are stored; returns the gates of the folded ones."""
        skeleton = block.stream.skeleton
        stored = {
            name: skeleton.checkpoint.read(skeleton.stored_names[name]) for name in skeleton.block_parameters(block.index)
        }
        self.blocks[block.index], folded = fold_block(stored, gates, skeleton.config)
        return folded

    def store(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.blocks.pop(index)

    def restore(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors


@dataclass(frozen=True)
class Group:
    """Linears that share a mask, or one that has its own: what scores them, and the basis in which they are gated."""

    linears: list[Linear]
    norm_I: Tensor
    basis: str | None

    @property
    def name(self) -> str:
        return self.linears[0].name


def together(linears: Sequence[Linear]) -> list[list[Linear]]:
    """The linears of a block, those that read one tensor side by side, in the order they run."""
    found: dict[tuple[str, ...], list[Linear]] = {}
    for linear in linears:
        roles = next((roles for roles in TOGETHER if linear.role in roles), (linear.role,))
        found.setdefault(roles, []).append(linear)
    return list(found.values())


def bases_of(block: Block, basis: Basis) -> dict[str, Tensor]:
    """T of every tensor that is rotated, float32 [I, I], by the name of the first linear that reads it."""
    if basis == "native":
        return {}
    module = block.stream.skeleton.blocks[block.index]
    found = {}
    for readers in together(block.linears):
        made_from = [linear for linear in readers if basis == "stacked" or linear.role in RELEASED]
        if made_from and readers[0].role not in NEVER_ROTATED:
            gain_I = feeding_norm(module, readers[0].role)
            found[readers[0].name] = orthogonal_basis([linear.weight_OI for linear in made_from], gain_I)
    return found


def groups_of(block: Block, bases: Mapping[str, Tensor], *, score: Score, share: bool, form: Form = "sidecar") -> list[Group]:
    """What is gated with one mask each."""
    found = []
    if form == "folded" and score == "wina":
        weights_OI = {linear.name: linear.weight_OI for linear in block.linears}
        norms = foldable_norms(weights_OI, block.stream.skeleton.config)
        return [Group(readers, norms[readers[0].name], None) for readers in together(block.linears)]
    for readers in together(block.linears):
        basis = readers[0].name if readers[0].name in bases else None
        for linears in [readers] if share else [[linear] for linear in readers]:
            weights = [(each.role, read_weight(each, bases[basis] if basis else None)) for each in linears]
            found.append(Group(linears, gate_norms(weights, score), basis))
    return found


def read_weight(linear: Linear, basis_II: Tensor | None) -> Tensor:
    """The weight that a gate's output meets: W, or W~ of a basis; float32 [O, I]."""
    return linear.weight_OI if basis_II is None else rotated(linear.weight_OI, basis_II)


def block_plan(block: Block, samples: Stream, recipe: Recipe, basis: Basis) -> Plan:
    """Calibrate one block, and take the trial's samples through it."""
    bases = bases_of(block, basis)
    groups = groups_of(block, bases, score=recipe.score, share=recipe.share, form=recipe.form)
    of = {group.name: group for group in groups}

    def own(linear: Linear) -> ScoreHistogram:
        group = of[linear.name]
        features, device = linear.shape[1], linear.parameter.device
        return ScoreHistogram(features, device, group.norm_I, bases[group.basis] if group.basis else None)

    # Of linears with one mask, the first stands for all.
    roles = {group.linears[0].role for group in groups}
    counts = {linear.name: seen.counts.cpu() for linear, seen in block.observe_each(own, roles)}
    with block.stream.clock.measure("decide"):
        # The samples of the trial went through all blocks before this one: they are its input, while it is in memory.
        trial = Trial(samples, block.linears, inverted(groups, bases))
        units = [
            Unit(sum(each.shape[0] for each in group.linears), len(group.norm_I), Curve(counts[group.name])) for group in groups
        ]
        gates = ungated(groups, counts)
        tables = {}
        if recipe.allocation == "closed-form":
            for group, sensitivity in zip(groups, sensitivities(trial, groups, units), strict=True):
                gates |= {each.name: replace(gates[each.name], sensitivity=sensitivity) for each in group.linears}
        elif recipe.allocation == "greedy":
            tables[block.index] = greedy([unit.size for unit in units], block_error(trial, groups, units))
        plan = Plan(
            gates, recipe.score, recipe.share, recipe.allocation, basis, recipe.target, bases=on_cpu(bases), tables=tables
        ).at(recipe.target)
        plan = replace(plan, gates=with_errors(trial, block.linears, plan.gates))
        trial.finish()
    return plan


def inverted(groups: Sequence[Group], bases: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """T and T^-1 for every linear that is gated behind T."""
    inverse = {name: torch.linalg.inv(basis_II.double()).float() for name, basis_II in bases.items()}
    return {
        linear.name: (bases[group.basis], inverse[group.basis]) for group in groups if group.basis for linear in group.linears
    }


def ungated(groups: Sequence[Group], counts: Mapping[str, Tensor]) -> dict[str, Gate]:
    """Gates without a threshold."""
    gates = {}
    for group in groups:
        for linear in group.linears:
            gates[linear.name] = Gate(
                linear.name,
                linear.role,
                linear.block,
                linear.shape,
                group.name,
                sparsity=0.0,
                measured=0.0,
                threshold=DENSE,
                norm_I=group.norm_I.cpu(),
                counts=counts[group.name],
                basis=group.basis,
                weight_norm=frobenius(linear.weight_OI),
            )
    return gates


def block_error(trial: Trial, groups: Sequence[Group], units: Sequence[Unit]) -> Callable[[Sequence[float | None]], float]:
    """The squared error of the block's output, as a function of the shares that the groups drop; None for a dense group."""

    def error(shares: Sequence[float | None]) -> float:
        taus: dict[str, Tensor] = {}
        for group, unit, share in zip(groups, units, shares, strict=True):
            if share is not None:
                tau_I = channel_thresholds(unit.curve.threshold(share), group.norm_I)
                taus |= {linear.name: tau_I for linear in group.linears}
        return trial.error(taus)

    return error


def sensitivities(trial: Trial, groups: Sequence[Group], units: Sequence[Unit]) -> list[float]:
    """Of every unit, what the block's output loses when it alone drops some inputs, over the energy that it drops."""
    error = block_error(trial, groups, units)
    found = []
    for number, unit in enumerate(units):
        lost = error([unit.probe if other == number else None for other in range(len(units))])
        energy = unit.energy(unit.probe)
        found.append(lost / energy if energy else 0.0)
    return found


def with_errors(trial: Trial, linears: Sequence[Linear], gates: Mapping[str, Gate]) -> dict[str, Gate]:
    """Gates with their errors, which also go into the record, beside what TEAL's rule loses with as many inputs dropped."""
    found = dict(gates)
    for linear in linears:
        gate = gates[linear.name]
        tau_I = gate.tau_I.to(linear.parameter.device)
        teal_I = trial.thresholds_at(linear, torch.ones_like(tau_I), trial.dropped(linear, tau_I))
        error, teal_error = trial.linear_errors(linear, [tau_I, teal_I])
        found[linear.name] = replace(gate, error=error)
        linear.facts |= {
            "gate_sparsity": gate.sparsity,
            "gate_measured": gate.measured,
            "gate_threshold": gate.threshold,
            "gate_error": error,
            "teal_error": teal_error,
        }
    return found


def settled_basis(samples: Stream, recipe: Recipe) -> tuple[Basis, dict[str, float]]:
    """The recipe's basis; for `auto` the one with the least error at equal bytes, and the errors of all."""
    if recipe.basis != "auto":
        return recipe.basis, {}
    errors: dict[Basis, list[float]] = {basis: [] for basis in BASES}
    assert samples.ids_NT is not None
    survey = Stream(samples.skeleton, samples.ids_NT, micro_batch=len(samples.ids_NT), propagate="dense")
    for block in survey.blocks():
        size = sum(linear.numel for linear in block.linears)
        for basis in list(errors):
            bases = bases_of(block, basis)
            # What a rotation reads is to be saved by dropping more.
            share = recipe.target + sum(basis_II.numel() for basis_II in bases.values()) / size
            if share < 1:
                errors[basis] += basis_errors(survey, block, bases, share, recipe)
            else:
                del errors[basis]
    compared = {basis: fmean(found) for basis, found in errors.items()}
    return min(compared, key=compared.__getitem__), {str(basis): error for basis, error in compared.items()}


def basis_errors(survey: Stream, block: Block, bases: Mapping[str, Tensor], share: float, recipe: Recipe) -> list[float]:
    """The relative error of every linear of a block where all drop the same share."""
    groups = groups_of(block, bases, score=recipe.score, share=recipe.share)
    trial = Trial(survey, block.linears, inverted(groups, bases))
    errors = []
    for group in groups:
        tau_I = trial.thresholds_at(group.linears[0], group.norm_I, share)
        errors += [trial.linear_errors(linear, [tau_I])[0] for linear in group.linears]
    return errors


def keep(stream: Stream, index: int, part: Plan) -> None:
    """Put a block's part of the plan with the run's state, before the block itself is finished."""
    if stream.output and stream.ranks.is_main:
        with stream.output.writing("the plan so far"):
            for file, name in state_files(stream.output, index).items():
                write_file(file, part.files()[name])


def restored(output: Output, index: int) -> Plan:
    """A finished block's part of the plan.

    Raises:
        LLMPruneError: it is damaged or gone.
    """
    text, content = state_files(output, index)
    try:
        with reading(text), reading(content):
            return Plan.from_files(text.read_bytes(), content.read_bytes(), text)
    except LLMPruneError as error:
        raise LLMPruneError(
            f"{text} or the tensors beside it are not what the interrupted run had written (missing or changed): pass "
            "--overwrite to start afresh."
        ) from error


def state_files(output: Output, index: int) -> dict[Path, str]:
    """Where a block's part of the plan is kept, and what its files are called in a plan."""
    stem = output.directory / STATE / f"progress-gates-{index:04}"
    return {stem.with_suffix(".json"): FILE, stem.with_suffix(".safetensors"): TENSORS}


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
