"""Týr: search for how many channels and heads each sub-layer keeps, among sub-layers that make up for what they lost.

"Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization" (arXiv 2503.09657).

1. A supernet has every sub-layer at several levels around the present distribution (uniform at first): the worst units go one
   by one, the rest makes up for them (`elimination`, the paper's section 3.1), and later blocks see the expectation over an
   earlier one's levels (section 3.2, `supernet`).
2. An evolutionary search looks for the distribution whose predictions are closest to the dense model's (section 3.3,
   `evolution`, `candidates`). What a type of sub-layer loses in all is conserved; with `--type-coupling joint` heads trade with
   channels at equal parameters.
3. The next iteration starts from what was found, with levels half as far apart.
4. With the distribution settled, every sub-layer is pruned once more, now on the inputs it really gets.

Where this parts from the paper: step 4 (the paper takes the last supernet's weights, made for expected inputs); the search's
find goes on only if it is closer to the dense model than the centre on held-out samples; a query head goes with its KV group,
or with one of every other group (`--heads`), so that the model is really smaller; budgets are met in whole units. The
published code's accumulation is off by a bug: it always propagates the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from .. import allocation, evolution, reconstruction
from ..anatomy import Anatomy, Kept
from ..anatomy import anatomy as anatomy_of
from ..errors import LLMPruneError
from ..evolution import Space, State
from ..models import Linear
from ..options import SearchOptions
from ..output import STATE
from ..recipe import Recipe
from ..statistics import CrossHessian, SplitHessian
from ..stream import Stream
from ..structure import Surgeon, finished_cuts, fit, share_to_remove
from ..supernet import READER, Position, Shrunk, Supernet

STATISTIC = SplitHessian


def prune(stream: Stream, recipe: Recipe) -> None:
    anatomy = anatomy_of(stream.skeleton.config)
    positions = stream.ranks.together(lambda: sub_layers(anatomy, recipe))
    found = settled(stream, recipe, anatomy, positions)
    write(stream, recipe, anatomy, positions, found.kept)


def sub_layers(anatomy: Anatomy, recipe: Recipe) -> list[Position]:
    """What may lose units, in the order it runs.

    Raises:
        LLMPruneError: a block has fewer channels than the multiple that is to be kept.
    """
    widths = [sizes.channels for sizes in anatomy.blocks if sizes.channels]
    multiple = recipe.multiple_of or allocation.width_multiple(min(widths, default=1))
    if widths and min(widths) < multiple:
        raise LLMPruneError(f"--multiple-of {multiple} is more than the {min(widths)} channels of a block: give a smaller one.")
    positions = []
    for block, sizes in enumerate(anatomy.blocks):
        for sublayer in ("attention", "mlp"):
            if sublayer not in sizes.absent:
                positions.append(Position.of(anatomy, block, sublayer, heads=recipe.heads, multiple=multiple))
    return positions


def uniform(recipe: Recipe, stream: Stream, positions: Sequence[Position]) -> list[int]:
    """Units every sub-layer keeps where all lose the same share, as evenly as whole units can be.

    Raises:
        LLMPruneError: no sub-layer of a type keeps any.
    """
    kept = [0] * len(positions)
    stays = 1 - share_to_remove(recipe, stream.skeleton)
    for sublayer in READER:
        numbers = [number for number, position in enumerate(positions) if position.sublayer == sublayer]
        if numbers:
            units = [positions[number].units for number in numbers]
            exact = sum(units[i] + positions[number].rest / positions[number].inputs for i, number in enumerate(numbers))
            total = min(int(stays * exact + 0.5), sum(units))
            if not total:
                what = "KV groups" if recipe.heads == "kv_group" else "query heads of each KV group"
                what = what if sublayer == "attention" else f"{positions[numbers[0]].inputs} channels"
                hint = ", or --heads q_balanced" if sublayer == "attention" and recipe.heads == "kv_group" else ""
                raise LLMPruneError(
                    f"To remove {1 - stays:.2%} would leave none of the model's {sum(units)} {what}: ask for less{hint}."
                )
            evenly = allocation.evenly(total, len(numbers)) if len(set(units)) == 1 else None
            shared = evenly or allocation.apportion([stays] * len(units), units, total, low=0)
            for number, share in zip(numbers, shared, strict=True):
                kept[number] = min(share, positions[number].units)
    return kept


@dataclass
class Found:
    """The search so far: the iteration that goes on, units every sub-layer keeps at its centre, and what came before."""

    iteration: int
    kept: list[int]
    state: State | None = None
    history: list[dict[str, object]] = field(default_factory=list)


def settled(stream: Stream, recipe: Recipe, anatomy: Anatomy, positions: Sequence[Position]) -> Found:
    """The distribution that the search ends with, going on where an earlier run was."""
    options = recipe.search
    assert options
    iterations = options.iterations if recipe.allocation == "searched" else 0
    # Together, so that no rank reads what the main one is about to replace.
    found = stream.ranks.together(lambda: restored(stream) or Found(0, uniform(recipe, stream, positions)))
    if found.iteration < iterations:
        # Levels take long to make: with progress on the disk an interrupted run leaves them there.
        keep(stream, found)
    while found.iteration < iterations:
        supernet = supernet_of(stream, recipe, anatomy, positions, found)
        found = searched(stream, recipe, anatomy, supernet, found)
    return found


def supernet_of(stream: Stream, recipe: Recipe, anatomy: Anatomy, positions: Sequence[Position], found: Found) -> Supernet:
    """Make the levels of every sub-layer, or find those that are made."""
    options = recipe.search
    assert options
    assert stream.output
    interval = options.interval / 2**found.iteration
    steps = [evolution.step_units(position.units, interval) for position in positions]
    folder = stream.output.directory / STATE
    supernet = Supernet(folder, found.iteration, positions, found.kept, steps, options.levels)
    if stream.ranks.is_main:
        supernet.remove_others()
    numbers = {(position.block, READER[position.sublayer]): number for number, position in enumerate(positions)}
    finished = all(supernet.file(number).is_file() for number in range(len(positions)))
    if not stream.ranks.from_main(int(finished)):
        survey = stream.survey(propagate="dense" if options.accumulate == "none" else "pruned")
        for block in survey.blocks():
            readers = [linear for linear in block.linears if (block.index, linear.role) in numbers]
            made = all(supernet.file(numbers[block.index, linear.role]).is_file() for linear in readers)
            made = bool(stream.ranks.from_main(int(made)))
            if made:
                for linear in readers:
                    accumulate(supernet, numbers[block.index, linear.role], linear, anatomy, options)
                continue
            for linear, inputs in block.observe(SplitHessian, {linear.role for linear in readers}):
                number = numbers[block.index, linear.role]
                make_levels(supernet, number, linear, inputs, recipe, stream)
                accumulate(supernet, number, linear, anatomy, options)
    return supernet


def make_levels(supernet: Supernet, number: int, linear: Linear, inputs: SplitHessian, recipe: Recipe, stream: Stream) -> None:
    """Eliminate units from the densest to the sparsest level of a sub-layer, and keep them all."""
    options = recipe.search
    assert options
    assert recipe.damping
    assert linear.stored is not None
    if stream.ranks.is_main:
        kept_units = [supernet.kept_units(number, level) for level in supernet.levels(number)]
        hessian_II = reconstruction.damped(inputs.mean_II, recipe.damping)
        position = supernet.positions[number]
        levels = list(
            position.eliminate(linear.weight_OI, hessian_II, kept_units, first_order=options.first_order, step=options.step)
        )
        assert stream.output
        with stream.output.writing("the supernet"):
            supernet.write(number, levels, linear.stored.dtype)
    stream.ranks.from_main(0)  # the others read what this one has written


def accumulate(supernet: Supernet, number: int, linear: Linear, anatomy: Anatomy, options: SearchOptions) -> None:
    """Let later blocks see what the paper's equation 5 says of this one."""
    if options.accumulate != "none":
        linear.replace(supernet.expected(number, linear, anatomy.head_dim, options.accumulate).to(linear.parameter.device))


def searched(stream: Stream, recipe: Recipe, anatomy: Anatomy, supernet: Supernet, found: Found) -> Found:
    """Search one supernet, and settle on what is closest to the dense model on held-out samples."""
    options, positions = recipe.search, supernet.positions
    assert options
    assert stream.calibration_NT is not None
    costs = [step * position.cost for step, position in zip(supernet.steps, positions, strict=True)]
    joint = recipe.type_coupling == "joint"
    # What earlier iterations removed beyond the budget is this one's no more.
    even = uniform(recipe, stream, positions)
    excess = sum(position.cost * (was - now) for position, was, now in zip(positions, even, found.kept, strict=True))
    space = Space(
        labels=tuple("all" if joint else position.sublayer for position in positions),
        lowest=tuple(low for low, _ in supernet.bounds),
        highest=tuple(high for _, high in supernet.bounds),
        costs=tuple(costs),
        slack=max(min(costs) - 1 - excess, 0) if joint else 0,
    )
    centre = (0,) * len(positions)

    def save(state: State) -> None:
        found.state = state
        keep(stream, found)
        latest = state.history[-1]
        stream.advance_progress(f"iteration {found.iteration + 1}, generation {latest.generation + 1}, {latest.best_loss}")

    candidates = Shrunk(stream.skeleton, stream.calibration_NT, supernet, anatomy, top_k=options.top_k, ranks=stream.ranks)
    seed = recipe.seed + found.iteration
    best, account = candidates.search(space, centre, options, seed=seed, on_generation=save, resume=found.state)
    units = [supernet.kept_units(number, level) for number, level in enumerate(best)]
    summary = {"kept": {"before": found.kept, "after": units}, **account}
    after = Found(found.iteration + 1, units, None, [*found.history, summary])
    keep(stream, after)
    if stream.ranks.is_main:
        supernet.remove()
    return after


def keep(stream: Stream, found: Found) -> None:
    """Save where the search is."""
    if stream.output and stream.ranks.is_main:
        state = found.state.as_json() if found.state else None
        facts = {"iteration": found.iteration, "kept": found.kept, "state": state, "history": found.history}
        stream.output.write_progress({}, facts)


def restored(stream: Stream) -> Found | None:
    """Where an earlier run's search was."""
    saved = stream.output.read_progress() if stream.output else None
    if saved is None:
        return None
    facts = saved[1]
    state = State.from_json(cast("dict[str, object]", facts["state"])) if facts["state"] else None
    history = cast("list[dict[str, object]]", facts["history"])
    return Found(cast(int, facts["iteration"]), cast("list[int]", facts["kept"]), state, history)


def write(stream: Stream, recipe: Recipe, anatomy: Anatomy, positions: Sequence[Position], kept: Sequence[int]) -> None:
    """Prune every sub-layer to its number of units, on the inputs that it gets from those before it."""
    options = recipe.search
    assert options
    assert recipe.damping
    numbers = {(position.block, READER[position.sublayer]): number for number, position in enumerate(positions)}
    surgeon = stream.operate(Surgeon(stream.skeleton, recipe, provisional(anatomy, positions, kept), finished(stream)))
    kind = CrossHessian if recipe.match == "dense" else SplitHessian
    for block in stream.blocks():
        stays = anatomy.blocks[block.index].everything()
        for linear, inputs in block.observe(kind, READER.values()):
            number = numbers[block.index, linear.role]
            position = positions[number]
            target_OI, hessian_II = linear.weight_OI, inputs.mean_II
            if isinstance(inputs, CrossHessian):
                missing_OI = inputs.missing_OI(target_OI)
                target_OI = reconstruction.dense_target(target_OI, missing_OI, hessian_II, recipe.damping)
            damped_II = reconstruction.damped(hessian_II, recipe.damping)
            levels = position.eliminate(
                target_OI, damped_II, [kept[number]], first_order=options.first_order, step=options.step
            )
            ((units, weight_OK),) = levels
            stays = Kept(stays.channels, units) if position.group else Kept(units, stays.heads)
            surgeon.cut(block, stays)
            fit(linear, weight_OK, position.columns(units, anatomy.head_dim))
            for name, hessian in (("error", hessian_II), ("fresh_error", inputs.fresh.mean_II)):
                linear.facts[name] = reconstruction.relative_error(linear.weight_OI, target_OI, hessian)


def finished(stream: Stream) -> list[Kept]:
    """What an earlier run has written."""
    if not stream.output or not stream.output.finished_blocks:
        return []
    return finished_cuts(stream.output.block_facts(stream.output.finished_blocks))


def provisional(anatomy: Anatomy, positions: Sequence[Position], kept: Sequence[int]) -> list[Kept]:
    """So many units of every block, the first ones: their number is settled, which they are is not."""
    kept_B = [sizes.everything() for sizes in anatomy.blocks]
    for position, units in zip(positions, kept, strict=True):
        own, sizes = kept_B[position.block], anatomy.blocks[position.block]
        if position.sublayer == "mlp":
            whole = units == position.units and not position.rest
            channels = own.channels if whole else own.channels[: units * position.inputs]
            kept_B[position.block] = Kept(channels, own.heads)
        elif position.balance == 1:
            kept_B[position.block] = Kept(own.channels, own.heads[: units * sizes.group])
        else:
            heads = tuple(group * sizes.group + i for group in range(sizes.kv_heads) for i in range(units))
            kept_B[position.block] = Kept(own.channels, heads)
    return kept_B
