"""Evolutionary search over integer levels: how much each sub-layer gives up, with what all give up together held fixed.

The search of Týr-the-Pruner (arXiv 2503.09657, section 3.3), which is EvoPress's (arXiv 2410.14649, Algorithm 1). A candidate
is one level per position (a sub-layer of the model); level +1 removes one step of units more than the centre, -1 keeps one
more. Every generation mutates its parent, ranks the children on few tokens, the better ones on more, the best ones and the
parent on most, and the best of those is the next parent.

Where this parts from the released code:
- Moves are drawn from lists of those that are possible, a position never trades with itself, and a child is neither its parent
  nor another child. Where no move is left there are fewer children, or none, and the search ends.
- Positions share a budget of parameters by label: one label per type of sub-layer holds heads and channels fixed separately, as
  the paper does; one label for all lets them trade.
- Nothing here knows of ranks: everything but the losses follows from the seed, so ranks that share the evaluation among them
  within `evaluate` make the same search.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction

from .errors import LLMPruneError

Candidate = tuple[int, ...]
# The losses of candidates on some windows of the pool, mean over the windows' tokens, in the candidates' order.
Evaluate = Callable[[Sequence[Candidate], Sequence[int]], Sequence[float]]

# Attempts at a mutation, and moves within a transfer, before there is held to be none.
ATTEMPTS, MOVES = 50, 200


def step_units(units: int, interval: Fraction | float, *, least: int = 1, multiple: int = 1) -> int:
    """Units between two levels: an interval (a share of all units) rounded to the nearest multiple, and at least so many.

    Args:
        units: of the dense sub-layer.
        interval: 1/8 at first in the paper, halved with every iteration.
        least: fewest units of a step.
        multiple: steps are multiples of this.
    """
    nearest = math.floor(Fraction(interval) * units / multiple + Fraction(1, 2)) * multiple
    return max(nearest, -(-max(least, 1) // multiple) * multiple)


def levels(units: int, centre: int, step: int, count: int = 9) -> tuple[int, int]:
    """The lowest and the highest level of a position: half of `count` either way, as far as there are units.

    Args:
        units: of the dense sub-layer.
        centre: units removed at level 0.
        step: units between two levels.
        count: of levels where nothing is cut off, odd.
    """
    assert count % 2 == 1, count
    assert 0 <= centre <= units, (centre, units)
    return -min(count // 2, centre // step), min(count // 2, (units - centre) // step)


@dataclass(frozen=True)
class Space:
    """What may be searched, position by position.

    Attributes:
        labels: positions with the same label share a budget.
        lowest, highest: levels.
        costs: parameters that go with one level more.
        slack: a candidate removes at least the start's parameters under every label, and at most so many more. 0 conserves them
            exactly. Where costs under one label differ and have no small common multiple (heads against channels), give one
            less than the least cost: no budget is then exceeded by a whole level, and equal costs still trade exactly.
    """

    labels: tuple[str, ...]
    lowest: Candidate
    highest: Candidate
    costs: tuple[int, ...]
    slack: int = 0

    def excess(self, candidate: Candidate, start: Candidate) -> dict[str, int]:
        """Parameters that a candidate removes beyond the start, by label."""
        excess = dict.fromkeys(self.labels, 0)
        for label, cost, level, centre in zip(self.labels, self.costs, candidate, start, strict=True):
            excess[label] += cost * (level - centre)
        return excess

    def holds(self, candidate: Candidate, start: Candidate) -> bool:
        """Whether a candidate keeps within its levels and the start's budgets."""
        return (
            len(candidate) == len(self.costs)
            and all(low <= level <= high for low, level, high in zip(self.lowest, candidate, self.highest, strict=True))
            and all(0 <= excess <= self.slack for excess in self.excess(candidate, start).values())
        )


@dataclass(frozen=True)
class Stage:
    """A round of selection within a generation: how many candidates go on, judged on how many tokens."""

    survivors: int
    tokens: int


@dataclass(frozen=True)
class Generation:
    """What a generation came to. Losses are on its own windows and compare with each other only; None: not finite."""

    generation: int
    children: int
    evaluated_tokens: int
    parent_loss: float | None
    best_loss: float | None
    best: Candidate


@dataclass(frozen=True)
class State:
    """A search after some generations: all that is needed to go on."""

    seed: int
    parent: Candidate
    history: tuple[Generation, ...] = field(default=())

    def as_json(self) -> dict[str, object]:
        """Of plain types that `json` writes."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, object]) -> State:
        """The reverse of `as_json`, after a trip through a file.

        Raises:
            LLMPruneError: it is no state of a search.
        """
        try:
            seed, parent, history = value["seed"], value["parent"], value["history"]
            assert isinstance(seed, int)
            assert isinstance(parent, Sequence)
            assert isinstance(history, Sequence)
            generations = tuple(Generation(**{**each, "best": tuple(each["best"])}) for each in history)
            return State(seed, tuple(parent), generations)
        except (AssertionError, KeyError, TypeError) as error:
            raise LLMPruneError("The saved state of the search is damaged: remove it to search from the start.") from error


def search(
    space: Space,
    start: Candidate,
    evaluate: Evaluate,
    *,
    generations: int,
    offspring: int,
    stages: Sequence[Stage],
    pool_tokens: int,
    window: int,
    seed: int,
    on_generation: Callable[[State], None] | None = None,
    resume: State | None = None,
) -> State:
    """Look for the candidate with the least loss.

    In every stage all candidates see the same windows, drawn afresh. What was evaluated on the same windows before is not
    evaluated again. Losses that are not finite are the worst of all; ties go to the parent, then to the child made first.

    Args:
        space: what to search.
        start: where from. Its parameters are the budget.
        evaluate: losses of candidates on windows; deterministic.
        generations: in all, those of `resume` included.
        offspring: children of a generation; fewer where there are fewer.
        stages: the first ranks all children, the last also the parent, and its best is the next parent.
        pool_tokens: in the pool; what is beyond its last whole window is not used.
        window: tokens of a window. A stage gets as many windows as its tokens fill, the last rounded up.
        seed: of all that is random.
        on_generation: is told the state after every generation, e.g. to save it.
        resume: a state to go on from, of a search with the same arguments: the rest is then what it would have been.

    Returns:
        The last state; its parent is the best.

    Raises:
        LLMPruneError: a stage needs more tokens than the pool has, or `resume` is of another search.
    """
    assert space.holds(start, start), start
    pool, counts = pool_tokens // window, [-(-stage.tokens // window) for stage in stages]
    if max(counts) > pool:
        raise LLMPruneError(
            f"A stage of the search compares candidates on {max(counts) * window} tokens but its pool has {pool * window} in "
            f"whole windows of {window}: give a larger pool or smaller stages."
        )
    state = resume or State(seed, start)
    if state.seed != seed or not space.holds(state.parent, start):
        raise LLMPruneError("The saved state of the search is of another search: remove it to search from the start.")
    known: dict[tuple[Candidate, tuple[int, ...]], float] = {}
    for generation in range(len(state.history), generations):
        # A source of its own for every generation, so that there is no state of it to save.
        source = random.Random(f"{seed} {generation}")
        children = alive = breed(space, state.parent, start, offspring, source)
        if not children:
            break
        tokens = 0
        for number, (stage, count) in enumerate(zip(stages, counts, strict=True), start=1):
            windows = tuple(sorted(source.sample(range(pool), count)))
            if number == len(stages):
                alive = [state.parent, *alive]
            fresh = [each for each in alive if (each, windows) not in known]
            if fresh:
                for each, loss in zip(fresh, evaluate(fresh, windows), strict=True):
                    known[each, windows] = loss if math.isfinite(loss) else math.inf
            tokens += len(fresh) * count * window
            losses = {each: known[each, windows] for each in alive}
            alive = sorted(alive, key=losses.__getitem__)[: stage.survivors]
        parent_loss, best_loss = (losses[each] if losses[each] < math.inf else None for each in (state.parent, alive[0]))
        summary = Generation(generation, len(children), tokens, parent_loss, best_loss, alive[0])
        state = State(seed, alive[0], (*state.history, summary))
        if on_generation is not None:
            on_generation(state)
    return state


def breed(space: Space, parent: Candidate, start: Candidate, count: int, source: random.Random) -> list[Candidate]:
    """Children that differ from their parent and each other, at most `count`; fewer where few are found."""
    children: dict[Candidate, None] = {}
    for _ in range(ATTEMPTS * count):
        if len(children) == count:
            break
        child = mutate(space, parent, start, source)
        if child != parent:
            children[child] = None
    return list(children)


def mutate(space: Space, parent: Candidate, start: Candidate, source: random.Random) -> Candidate:
    """One to four transfers, few more often than many; the parent where no transfer is possible.

    A transfer takes one level from a random position and gives one to a random other of the same label. Where their costs
    differ it goes on, giving while less than the budget is removed and taking while more than that and the slack is, but
    neither gives to a position it took from nor takes from one it gave to.
    """
    child = parent
    for _ in range(min(source.randint(1, 4), source.randint(1, 4))):
        child = _transfer(space, child, start, source) or child
    return child


def _transfer(space: Space, candidate: Candidate, start: Candidate, source: random.Random) -> Candidate | None:
    """The candidate after a transfer; None where none was found."""
    levels = list(candidate)
    lower = [i for i, level in enumerate(levels) if level > space.lowest[i]]
    upper = [i for i, level in enumerate(levels) if level < space.highest[i]]
    first = [i for i in lower if any(space.labels[j] == space.labels[i] and j != i for j in upper)]
    if not first:
        return None
    taken, given = {source.choice(first)}, set[int]()
    (position,) = taken
    label = space.labels[position]
    excess = space.excess(candidate, start)[label] - space.costs[position]
    levels[position] -= 1
    for _ in range(MOVES):
        if 0 <= excess <= space.slack:
            return tuple(levels)
        change, ours, theirs = (1, given, taken) if excess < 0 else (-1, taken, given)
        bound = space.highest if change > 0 else space.lowest
        open_ = [i for i, each in enumerate(space.labels) if each == label and i not in theirs and levels[i] != bound[i]]
        if not open_:
            return None
        position = source.choice(open_)
        levels[position] += change
        excess += change * space.costs[position]
        ours.add(position)
    return None


def choose(candidates: Sequence[Candidate], losses: Sequence[float]) -> Candidate:
    """The candidate with the least loss on held-out tokens; ties, and losses all broken, go to the first.

    With uniform first, then the centre, then the searched one, no search makes a model worse than these on that text.
    """
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return candidates[finite.index(min(finite))]
