"""Allocations: budgets are met exactly, the closed form satisfies its equation, greedy is never worse than uniform."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.activation_allocation import (
    GRID,
    Unit,
    closed_form,
    from_table,
    greedy,
    greedy_path,
    on_path,
    shares_of,
)
from llmprune.gating_scores import Curve, histogram


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def curve(seed, zeros=0.0, scale=1.0):
    scores = noise(4000, seed=seed).abs() * scale
    return Curve(histogram(scores * (torch.rand(4000, generator=torch.Generator().manual_seed(seed + 1)) >= zeros)))


def unit(outputs, inputs, seed, sensitivity, **options):
    return Unit(outputs, inputs, curve(seed, **options), sensitivity)


def dropped(units, shares):
    return sum(each.size * share for each, share in zip(units, shares, strict=True)) / sum(each.size for each in units)


def predicted(units, shares):
    return sum(each.sensitivity * each.energy(share) for each, share in zip(units, shares, strict=True))


UNITS = st.lists(
    st.builds(
        unit,
        st.integers(1, 40),
        st.integers(1, 40),
        st.integers(0, 5),
        st.floats(1e-6, 1e6),
        zeros=st.sampled_from([0.0, 0.3]),
        scale=st.sampled_from([1e-3, 1.0, 50.0]),
    ),
    min_size=1,
    max_size=6,
)


@given(units=UNITS, sparsity=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_the_closed_form_meets_its_budget_with_shares_in_range(units, sparsity):
    shares = closed_form(units, sparsity)
    assert all(0 <= share <= 1 for share in shares)
    assert dropped(units, shares) == pytest.approx(sparsity, abs=1e-9)


@given(units=UNITS, sparsity=st.floats(0.35, 0.95))
@settings(max_examples=40, deadline=None)
def test_in_the_closed_form_the_last_weight_dropped_costs_the_same_everywhere(units, sparsity):
    low, high = 0.0, math.inf
    for each, share in zip(units, closed_form(units, sparsity), strict=True):
        # Between two scores every threshold drops the same, so the price of a weight is a range.
        fewer, more = (
            each.sensitivity * each.curve.threshold(min(share + change, 1.0)) ** 2 / each.outputs for change in (-1e-7, 1e-7)
        )
        low = max(low, fewer if share > each.curve.zeros else 0.0)
        high = min(high, more if share < 1 - 1e-7 else math.inf)
    assert low <= high * (1 + 1e-3)


def test_the_closed_form_is_the_best_of_all_splits_of_two_units():
    units = [unit(10, 30, 0, 1.0), unit(40, 10, 3, 2.0, scale=0.5)]
    shares = closed_form(units, 0.5)
    least = predicted(units, shares)
    for first in [number / 100 for number in range(101)]:
        second = (0.5 * 700 - 300 * first) / 400
        if 0 <= second <= 1:
            assert predicted(units, [first, second]) >= least * (1 - 1e-3)


@given(st.floats(0, 0.99), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_units_that_are_alike_get_the_same_share(sparsity, count):
    units = [unit(8, 8, 1, 3.0)] * count
    assert closed_form(units, sparsity) == pytest.approx([sparsity] * count, abs=1e-9)


def test_inputs_that_are_zero_anyway_are_what_goes_first():
    units = [unit(8, 8, 1, 1.0, zeros=0.6), unit(8, 8, 3, 1.0)]
    zeros = units[0].curve.zeros
    few = closed_form(units, zeros / 4)
    assert few == pytest.approx([zeros / 2, 0.0])
    assert [each.curve.threshold(share) for each, share in zip(units, few, strict=True)] == [0.0, 0.0]
    assert closed_form(units, 0.5)[0] > zeros


def test_a_unit_that_nothing_depends_on_goes_first():
    units = [unit(8, 8, 1, 0.0), unit(8, 8, 3, 1.0)]
    assert closed_form(units, 0.25) == pytest.approx([0.5, 0.0], abs=1e-3)
    assert closed_form(units, 0.75) == pytest.approx([1.0, 0.5], abs=1e-6)


def test_units_are_tried_at_half_of_what_is_not_zero():
    assert unit(8, 8, 1, 1.0).probe == 0.5
    assert unit(8, 8, 1, 1.0, zeros=0.6).probe == pytest.approx(0.5 + 0.3, abs=0.02)


def separable(weights, power=3.0):
    """An error that is a sum of convex costs, for which greedy is optimal but for its steps."""
    calls = []

    def error(shares):
        calls.append(tuple(shares))
        return sum(weight * share**power for weight, share in zip(weights, shares, strict=True))

    return error, calls


SIZES = [9, 3, 3, 9, 24, 24, 24]


def test_greedy_comes_within_a_step_of_the_best_split_of_a_separable_error():
    weights = [9.0, 0.2, 12.0, 2.0, 30.0, 60.0, 10.0]
    error, _ = separable(weights)
    table_SG = greedy(SIZES, error)
    for row, sparsity in zip(table_SG.tolist(), GRID, strict=True):
        # Where all shares are inside, w_p s_p^2 / size_p is one number.
        low, high = 0.0, 1e6
        for _ in range(200):
            price = (low + high) / 2
            best = [min((price * size / weight) ** 0.5, 1.0) for size, weight in zip(SIZES, weights, strict=True)]
            short = sum(size * share for size, share in zip(SIZES, best, strict=True)) < sparsity * sum(SIZES)
            low, high = (price, high) if short else (low, price)
        # A step is coarse where shares are small.
        assert error(row) <= error(best) * (1.06 if sparsity >= 0.2 else 1.5)


def test_looking_only_at_the_cheapest_step_finds_what_looking_at_all_does():
    error, calls = separable([9.0, 0.2, 12.0, 2.0, 30.0, 60.0, 10.0])
    lazy = greedy_path(SIZES, error)
    looked = len(calls)
    full = greedy_path(SIZES, error, renewed=1)
    assert lazy == full
    assert looked < 0.4 * (len(calls) - looked)


@given(seed=st.integers(0, 2**20), units=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_no_row_of_a_table_is_worse_than_uniform_or_off_its_budget(seed, units):
    """Whatever the error is like: here it jumps, falls and couples units."""
    sizes = [1 + (seed >> shift) % 7 for shift in range(units)]
    pairs = noise(units, units, seed=seed)

    def error(shares):
        vector = torch.tensor(shares, dtype=torch.float32)
        return float((vector @ pairs @ vector).abs() + (13 * vector.sum()).sin().abs())

    table_SG = greedy(sizes, error)
    assert table_SG.shape == (len(GRID), units)
    assert torch.equal(table_SG, greedy(sizes, error))
    for row, sparsity in zip(table_SG.tolist(), GRID, strict=True):
        assert all(0 <= share <= 1 for share in row)
        total = sum(size * share for size, share in zip(sizes, row, strict=True))
        assert total / sum(sizes) == pytest.approx(sparsity, abs=1e-9)
        assert error(row) <= error([sparsity] * units)


def test_a_free_unit_is_taken_whole_and_no_further():
    error, _ = separable([0.0, 1.0])
    path = greedy_path([5, 5], error)
    assert max(max(shares) for shares in path) == 1.0
    assert path[20] == (1.0, 0.0)
    assert on_path(path, [5, 5], 0.5) == pytest.approx([1.0, 0.0])


def test_of_steps_that_cost_the_same_the_first_units_are_taken():
    error, _ = separable([1.0, 1.0, 1.0], power=1.0)
    path = greedy_path([4, 4, 4], error)
    assert path[1] == (0.05, 0.0, 0.0)


@given(st.floats(0, 1))
def test_a_table_gives_any_sparsity_its_budget_and_its_own_rows_on_the_grid(sparsity):
    error, _ = separable([9.0, 0.2, 12.0, 2.0])
    sizes = [9, 3, 3, 9]
    table_SG = greedy(sizes, error)
    shares = from_table(table_SG, sizes, sparsity)
    assert sum(size * share for size, share in zip(sizes, shares, strict=True)) / 24 == pytest.approx(sparsity, abs=1e-9)
    for row, grid in zip(table_SG.tolist(), GRID, strict=True):
        assert from_table(table_SG, sizes, grid) == pytest.approx(row, abs=1e-12)
    assert from_table(table_SG, sizes, 0.0) == [0.0] * 4


def test_the_allocations_are_what_their_names_say():
    units = [unit(10, 30, 0, 1.0), unit(40, 10, 3, 2.0, scale=0.5)]
    table_SG = torch.tensor([[sparsity, sparsity] for sparsity in GRID], dtype=torch.float64)
    assert shares_of("uniform", units, None, 0.3) == [0.3, 0.3]
    assert shares_of("greedy", units, table_SG, 0.3) == pytest.approx([0.3, 0.3])
    assert shares_of("closed-form", units, None, 0.3) == closed_form(units, 0.3)
    assert not math.isclose(closed_form(units, 0.3)[0], 0.3, abs_tol=0.02)
