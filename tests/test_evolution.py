"""The evolutionary search: budgets and bounds for all inputs, planted optima, determinism, and that it always ends."""

import collections
import itertools
import json
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune import evolution
from llmprune.errors import LLMPruneError
from llmprune.evolution import Space, Stage, State, breed, choose, levels, mutate, search, step_units

STAGES = [Stage(6, 100), Stage(2, 200), Stage(1, 400)]


def plain_space(layers, *, low=-4, high=4):
    """Heads and channels of some layers, a label and a cost for each type."""
    return Space(("attention", "mlp") * layers, (low,) * (2 * layers), (high,) * (2 * layers), (50, 7) * layers)


def run(space, start, evaluate, **changed):
    wanted = {"generations": 12, "offspring": 16, "stages": STAGES, "pool_tokens": 1600, "window": 100, "seed": 0}
    return search(space, start, evaluate, **(wanted | changed))


def noisy(candidates, windows):
    """Any loss at all, but the same for the same question."""
    return [random.Random(f"{each} {list(windows)}").random() for each in candidates]


@st.composite
def spaces(draw):
    count = draw(st.integers(1, 8))
    each = st.lists(st.integers(-4, 0), min_size=count, max_size=count)
    low, high = draw(each), [-value for value in draw(each)]
    labels = draw(st.lists(st.sampled_from("ab"), min_size=count, max_size=count))
    costs = draw(st.one_of(st.just([3] * count), st.lists(st.integers(1, 12), min_size=count, max_size=count)))
    slack = draw(st.sampled_from([0, min(costs) - 1]))
    return Space(tuple(labels), tuple(low), tuple(high), tuple(costs), slack)


@settings(max_examples=200, deadline=None)
@given(spaces(), st.integers(0, 2**32))
def test_every_mutation_keeps_levels_within_bounds_and_every_budget(space, seed):
    start = candidate = (0,) * len(space.costs)
    source = random.Random(seed)
    for _ in range(20):
        candidate = mutate(space, candidate, start, source)
        assert space.holds(candidate, start)


def test_two_thousand_mutations_in_a_row_keep_heads_channels_and_parameters():
    space, start = plain_space(8), (0,) * 16
    candidate, source = start, random.Random(0)
    seen = set()
    for _ in range(2000):
        candidate = mutate(space, candidate, start, source)
        assert sum(candidate[0::2]) == sum(candidate[1::2]) == 0
        assert min(candidate) >= -4
        assert max(candidate) <= 4
        seen.add(candidate)
    assert len(seen) > 1900


def test_a_mutation_is_one_to_four_transfers_of_one_level_each():
    space, start = plain_space(20), (0,) * 40
    source = random.Random(0)
    sizes = collections.Counter(sum(map(abs, mutate(space, start, start, source))) for _ in range(4000))
    # Two transfers may undo each other in part, which is rare among 40 positions: the law is min(U{1..4}, U{1..4}).
    for transfers, probability in ((1, 7 / 16), (2, 5 / 16), (3, 3 / 16), (4, 1 / 16)):
        assert sizes[2 * transfers] / 4000 == pytest.approx(probability, abs=0.05)


def test_at_equal_costs_positions_of_a_label_trade_equally_often():
    space = Space(("a",) * 4 + ("b",) * 2, (-4,) * 6, (4,) * 6, (3,) * 6)
    source = random.Random(0)
    trades = collections.Counter()
    for _ in range(4000):
        child = evolution._transfer(space, (0,) * 6, (0,) * 6, source)
        trades[child.index(-1), child.index(1)] += 1
    assert set(trades) == {*itertools.permutations(range(4), 2), (4, 5), (5, 4)}
    # A position is chosen to become denser, then one of the others of its label.
    for (i, _), count in trades.items():
        assert count / 4000 == pytest.approx(1 / 18 if i < 4 else 1 / 6, abs=0.02)


def test_under_one_label_heads_trade_for_channels_within_less_than_the_smallest_level():
    # Heads and channels of SmolLM2-135M: whole KV groups against steps of 32 channels.
    head, channel = 8 * 576 * 64, 3 * 576 * 32
    space = Space(("all",) * 20, (-3,) * 20, (3,) * 20, (head, channel) * 10, channel - 1)
    start = candidate = (0,) * 20
    source = random.Random(0)
    heads = set()
    for _ in range(300):
        candidate = mutate(space, candidate, start, source)
        assert 0 <= space.excess(candidate, start)["all"] < channel
        heads.add(sum(candidate[0::2]))
    assert min(heads) < 0 < max(heads)


def test_without_slack_unequal_costs_trade_exactly():
    space = Space(("a",) * 6, (-4,) * 6, (4,) * 6, (2, 3, 2, 3, 4, 6))
    children = breed(space, (0,) * 6, (0,) * 6, 40, random.Random(0))
    assert len(children) == 40
    assert all(space.excess(child, (0,) * 6) == {"a": 0} for child in children)
    assert any(
        space.costs[i] != space.costs[j] for child in children for i in range(6) for j in range(i) if child[i] and child[j]
    )


def test_children_differ_from_their_parent_and_each_other():
    space = plain_space(6)
    parent = (1, 0, -1, 2) + (0,) * 6 + (0, -2)
    children = breed(space, parent, (0,) * 12, 64, random.Random(3))
    assert len(set(children)) == len(children) == 64
    assert parent not in children


@pytest.mark.parametrize(
    ("space", "children"),
    [
        (plain_space(1), 0),  # one layer: nobody to trade with
        (plain_space(3, low=0), 0),  # nothing can get denser
        (plain_space(3, high=0), 0),
        (plain_space(3, low=0, high=0), 0),
        (Space(("a", "a"), (-1, 0), (0, 1), (5, 5)), 1),  # a single move
        (Space(("a", "a"), (-4, -4), (4, 4), (5, 7)), 0),  # no multiple within the levels
        (Space(("a", "a", "b"), (-1, -1, -4), (1, 1, 4), (5, 5, 5)), 2),
    ],
)
def test_where_few_moves_are_possible_there_are_fewer_children_and_the_search_ends(space, children):
    start = (0,) * len(space.costs)
    assert len(breed(space, start, start, 16, random.Random(0))) == children
    state = run(space, start, noisy)
    assert space.holds(state.parent, start)
    assert bool(state.history) == bool(children)


def separable(weights, best):
    """A loss with its optimum at known levels, plus what depends on the windows alone."""

    def evaluate(candidates, windows):
        common = sum(windows) % 7
        return [common + sum(w * (z - b) ** 2 for w, z, b in zip(weights, each, best, strict=True)) for each in candidates]

    return evaluate


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_optimum_is_found(seed):
    space, source = plain_space(6), random.Random(seed)
    start = (0,) * 12
    best = start
    for _ in range(10):
        best = mutate(space, best, start, source)
    weights = [source.uniform(0.5, 2) for _ in start]
    state = run(space, start, separable(weights, best), generations=40, offspring=48, seed=seed)
    assert state.parent == best != start


def test_coarse_to_fine_is_no_worse_than_fine_at_once_for_as_many_evaluations():
    units, layers = 128, 10
    source = random.Random(5)
    curves = [(source.uniform(0.2, 3), source.uniform(1.5, 3)) for _ in range(layers)]

    def loss(removed):
        return sum(weight * (units_gone / units) ** power for (weight, power), units_gone in zip(curves, removed, strict=True))

    def searched(centre, step, generations, reach):
        bounds = [levels(units, each, step, reach) for each in centre]
        low, high = zip(*bounds, strict=True)
        space = Space(("mlp",) * layers, low, high, (step,) * layers)

        def evaluate(candidates, windows):
            return [loss([c + z * step for c, z in zip(centre, each, strict=True)]) for each in candidates]

        state = run(space, (0,) * layers, evaluate, generations=generations, offspring=12, stages=[Stage(1, 100)])
        return [c + z * step for c, z in zip(centre, state.parent, strict=True)]

    centre = [units // 2] * layers
    for interval in (Fraction(1, 8), Fraction(1, 16), Fraction(1, 32)):
        centre = searched(centre, step_units(units, interval), 10, 9)
    at_once = searched([units // 2] * layers, step_units(units, Fraction(1, 32)), 30, 33)
    assert sum(centre) == sum(at_once) == layers * units // 2
    assert loss(centre) <= loss(at_once) < loss([units // 2] * layers)


def test_no_generation_is_worse_than_its_parent_on_the_same_windows():
    asked = {}

    def evaluate(candidates, windows):
        losses = noisy(candidates, windows)
        asked.update({(each, tuple(windows)): loss for each, loss in zip(candidates, losses, strict=True)})
        return losses

    space, start = plain_space(5), (0,) * 10
    state = run(space, start, evaluate)
    parent = start
    assert len(state.history) == 12
    for each in state.history:
        assert each.best_loss <= each.parent_loss
        last = [windows for (candidate, windows), loss in asked.items() if candidate == parent and loss == each.parent_loss]
        assert min(loss for (_, windows), loss in asked.items() if windows == last[-1]) == each.best_loss
        parent = each.best
    assert state.parent == parent


def test_stages_rank_survivors_only_on_windows_that_are_the_same_for_all():
    calls = []

    def evaluate(candidates, windows):
        calls.append((len(candidates), tuple(windows)))
        return noisy(candidates, windows)

    run(plain_space(5), (0,) * 10, evaluate, generations=3, pool_tokens=10**6)
    assert [count for count, _ in calls] == [16, 6, 3] * 3
    assert [len(windows) for _, windows in calls] == [1, 2, 4] * 3
    for _, windows in calls:
        assert sorted(set(windows)) == list(windows)
        assert set(windows) <= set(range(10**4))
    assert len({windows for _, windows in calls}) == 9


def test_nothing_is_evaluated_twice_on_the_same_windows():
    asked = collections.Counter()

    def evaluate(candidates, windows):
        asked.update((each, tuple(windows)) for each in candidates)
        return noisy(candidates, windows)

    # A pool of one window: every stage of every generation asks the same.
    one = run(plain_space(4), (0,) * 8, evaluate, pool_tokens=199, window=100, stages=[Stage(4, 100), Stage(1, 100)])
    assert set(asked.values()) == {1}
    assert sum(each.evaluated_tokens for each in one.history) == 100 * len(asked)
    losses = [each.best_loss for each in one.history]
    assert losses == sorted(losses, reverse=True)


def test_one_stage_used_twice_adds_the_parent_once():
    stage = Stage(4, 100)
    sizes = []

    def evaluate(candidates, windows):
        sizes.append(len(candidates))
        return noisy(candidates, windows)

    run(plain_space(4), (0,) * 8, evaluate, generations=1, stages=[stage, stage])
    assert sizes == [16, 5]


def test_a_seed_gives_one_history_and_another_seed_another():
    space, start = plain_space(5), (0,) * 10
    assert run(space, start, noisy) == run(space, start, noisy)
    assert run(space, start, noisy) != run(space, start, noisy, seed=1)


def test_splitting_the_candidates_among_ranks_changes_nothing():
    def split(candidates, windows):
        losses = [math.nan] * len(candidates)
        for rank in range(3):
            losses[rank::3] = noisy(candidates[rank::3], windows)
        return losses

    space, start = plain_space(5), (0,) * 10
    assert run(space, start, split) == run(space, start, noisy)


@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_a_search_resumed_from_a_file_has_the_history_it_would_have_had(stop):
    space, start = plain_space(5), (0,) * 10
    saved = [json.dumps(State(0, start).as_json())]

    def save(state):
        saved.append(json.dumps(state.as_json(), allow_nan=False))

    whole = run(space, start, noisy, on_generation=save)
    assert len(saved) == 13
    resumed = run(space, start, noisy, resume=State.from_json(json.loads(saved[stop])))
    assert resumed == whole


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_the_worst(broken):
    space, start = plain_space(4), (0,) * 8

    def evaluate(candidates, windows):
        return [broken if each[0] else 1.0 + each[2] for each in candidates]

    state = run(space, start, evaluate, generations=30)
    assert state.parent[0] == 0
    assert state.parent[2] == -4
    nothing = run(space, start, lambda candidates, windows: [broken] * len(candidates))
    assert nothing.parent == start
    assert {each.best_loss for each in nothing.history} == {None}


def test_ties_go_to_the_parent():
    space, start = plain_space(4), (0,) * 8
    assert run(space, start, lambda candidates, windows: [1.0] * len(candidates)).parent == start


def test_one_sentence_for_a_pool_that_is_too_small():
    with pytest.raises(LLMPruneError, match="on 400 tokens but its pool has 300 in whole windows of 100: give a larger pool"):
        run(plain_space(2), (0,) * 4, noisy, pool_tokens=399)


@pytest.mark.parametrize(
    "state", [State(1, (0,) * 4), State(0, (0,) * 5), State(0, (1, 0, 0, 0)), State(0, (5, 0, -5, 0))], ids=str
)
def test_one_sentence_for_a_state_of_another_search(state):
    with pytest.raises(LLMPruneError, match="is of another search"):
        run(plain_space(2), (0,) * 4, noisy, resume=state)


@pytest.mark.parametrize(
    "value", [{}, {"seed": 0}, {"seed": 0, "parent": 3, "history": []}, {"seed": 0, "parent": [1], "history": [{"best": [0]}]}]
)
def test_one_sentence_for_a_damaged_state(value):
    with pytest.raises(LLMPruneError, match="damaged"):
        State.from_json(value)


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=5))
def test_the_chosen_candidate_is_never_worse_than_any_other(losses):
    candidates = [(i,) for i in range(len(losses))]
    (chosen,) = choose(candidates, losses)
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert chosen == (losses.index(min(finite)) if finite else 0)


def test_a_search_misled_by_noise_is_not_chosen():
    space, start = plain_space(5), (0,) * 10
    state = run(space, start, noisy)
    assert state.parent != start
    truth = separable([1.0] * 10, start)
    assert choose([start, state.parent], truth([start, state.parent], [0])) == start


@settings(deadline=None)
@given(st.integers(1, 20000), st.data())
def test_levels_stay_within_the_units_include_the_centre_and_are_cut_only_where_units_end(units, data):
    centre, step = data.draw(st.integers(0, units)), data.draw(st.integers(1, units))
    low, high = levels(units, centre, step)
    assert low <= 0 <= high
    assert centre + low * step >= 0
    assert centre + high * step <= units
    assert low == -4 or centre + (low - 1) * step < 0
    assert high == 4 or centre + (high + 1) * step > units


def test_a_sparsity_that_is_no_power_of_two_reaches_zero():
    # 0.3 // 0.1 is 2.0: counted in floats the dense level would be missing.
    assert levels(10, 3, 1) == (-3, 4)
    assert levels(11008, 5504, 1376) == (-4, 4)
    assert levels(8, 1, 1, count=5) == (-1, 2)
    assert levels(8, 8, 3) == (-2, 0)


def test_steps_are_the_papers_and_whole_units():
    assert [step_units(32, Fraction(1, 8 << t)) for t in range(4)] == [4, 2, 1, 1]
    assert [step_units(11008, Fraction(1, 8 << t), least=32) for t in range(4)] == [1376, 688, 344, 172]
    assert [step_units(14336, 0.125 / 2**t, multiple=128) for t in range(4)] == [1792, 896, 512, 256]
    # Few heads, odd ones, and less than one multiple.
    assert [step_units(9, 0.125 / 2**t) for t in range(4)] == [1, 1, 1, 1]
    assert step_units(20, Fraction(1, 8)) == 3
    assert step_units(1536, 1 / 64, least=30, multiple=32) == 32
    assert step_units(1536, 1 / 64, least=33, multiple=32) == 64
