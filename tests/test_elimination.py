"""The elimination path: against equation (3) solved in float64, against brute force, and by its laws."""

import itertools

import pytest
import torch

from llmprune.elimination import Elimination, path, restricted, ridge
from llmprune.errors import LLMPruneError
from llmprune.reconstruction import relative_error

ORDERS = ["abs", "off", "signed"]


def layer(outputs, inputs, *, tokens=400, seed=0):
    """A weight and the X^T X of correlated inputs, every feature with a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mixing = torch.eye(inputs) + 0.5 * torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    samples = (torch.randn(tokens, inputs, generator=generator) + 0.3) @ mixing
    samples *= torch.exp(0.5 * torch.randn(inputs, generator=generator))
    return weight, samples.T @ samples


def damped(hessian, damping=0.01):
    hessian = hessian.double()
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def closed_form(weight, hessian, keep, damping=0.01):
    """(H_KK)^-1 (H W)_K as it is written, in float64, as [O, K]."""
    hessian = damped(hessian, damping)
    return torch.linalg.solve(hessian[keep][:, keep], hessian[keep] @ weight.T.double()).T


def inputs_of(keep, group):
    return torch.cat([torch.arange(unit * group, (unit + 1) * group) for unit in keep.tolist()]) if len(keep) else keep


def expand(level, inputs, group=1):
    full = torch.zeros(level.weight_OK.shape[0], inputs)
    full[:, inputs_of(level.keep_U, group)] = level.weight_OK
    return full


def error(weight, dense, hessian):
    lost = weight.double() - dense.double()
    return float((lost @ hessian * lost).sum())


def slow_choice(weight, hessian, target, group, step, first_order):
    """Greedy elimination that inverts what is left of H anew before every look at the scores."""
    hessian = damped(hessian)
    weight = weight.T.double()
    gradient = hessian @ weight
    alive = list(range(len(weight) // group))
    gone = 0
    while gone < target:
        rows = inputs_of(torch.tensor(alive), group)
        inverse = torch.linalg.inv(hessian[rows][:, rows])
        current = inverse @ gradient[rows]
        scores = []
        for i in range(len(alive)):
            at = slice(i * group, (i + 1) * group)
            own = current[at]
            first = gradient[rows][at] * own
            score = 0.5 * (own * torch.linalg.solve(inverse[at, at], own)).sum()
            scores.append(float(score + {"abs": first.abs().sum(), "off": 0, "signed": first.sum()}[first_order]))
        count = min(step, target - gone)
        worst = sorted(range(len(alive)), key=scores.__getitem__)[:count]
        alive = [unit for i, unit in enumerate(alive) if i not in worst]
        gone += count
    return alive


@pytest.mark.parametrize(("group", "step"), [(1, 1), (1, 7), (4, 1), (4, 2), (12, 1)])
@pytest.mark.parametrize("first_order", ORDERS)
def test_units_and_weights_equal_a_slow_reference_at_every_stop(first_order, group, step):
    weight, hessian = layer(5, 48)
    units = 48 // group
    # Stops at multiples of the step: a stop between shortens a step.
    targets = sorted({step * (units // step * part // 4) for part in range(5)} | {units})
    for level in path(weight, hessian, targets, group=group, step=step, first_order=first_order):
        assert len(level.keep_U) == units - level.removed
        assert level.keep_U.tolist() == slow_choice(weight, hessian, level.removed, group, step, first_order)
        if 0 < level.removed < units:
            expected = closed_form(weight, hessian, inputs_of(level.keep_U, group))
            torch.testing.assert_close(level.weight_OK.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pending", [1, 6, 1000])
@pytest.mark.parametrize("group", [1, 3])
def test_the_path_itself_stays_on_the_closed_form(monkeypatch, group, pending):
    monkeypatch.setattr("llmprune.elimination.PENDING", pending)
    weight, hessian = layer(6, 60)
    elimination = Elimination(weight, ridge(hessian, 0.01), group, "abs", 0.01)
    order = torch.randperm(60 // group, generator=torch.Generator().manual_seed(1))
    for units in order[:-1].split(2):
        elimination.remove(units)
        keep = inputs_of(elimination.alive_U.nonzero().squeeze(1), group)
        there = inputs_of(elimination.place_U[elimination.alive_U], group)
        expected = closed_form(weight, hessian, keep)
        torch.testing.assert_close(elimination.weight_JO[there].T, expected, rtol=1e-10, atol=1e-10)
        # And what removing any other unit would cost is what it does cost.
        elimination.first_order, elimination.gradient_JO = "off", None
        scores = elimination.score_U()
        before = torch.zeros_like(weight).double().index_copy_(1, keep, expected)
        for unit in elimination.alive_U.nonzero().squeeze(1)[:3].tolist():
            rest = keep[(keep // group) != unit]
            after = torch.zeros_like(before).index_copy_(1, rest, closed_form(weight, hessian, rest))
            rise = error(after, weight, damped(hessian)) - error(before, weight, damped(hessian))
            assert float(scores[unit]) == pytest.approx(rise / 2, rel=1e-7)
        assert scores[~elimination.alive_U].isinf().all()


def test_nothing_removed_is_the_matrix_and_all_removed_is_empty():
    weight, hessian = layer(4, 24)
    none, everything = path(weight, hessian, [0, 6], group=4)
    assert torch.equal(none.weight_OK, weight)
    assert none.keep_U.tolist() == list(range(6))
    assert everything.weight_OK.shape == (4, 0)
    assert everything.keep_U.tolist() == []


@pytest.mark.parametrize("targets", [[], [0], [0, 0, 5, 5, 24, 24]])
def test_targets_may_repeat_and_be_missing(targets):
    weight, hessian = layer(4, 24)
    levels = list(path(weight, hessian, targets))
    assert [level.removed for level in levels] == targets
    assert [len(level.keep_U) for level in levels] == [24 - target for target in targets]
    for one, other in itertools.pairwise(levels):
        assert one.removed != other.removed or torch.equal(one.weight_OK, other.weight_OK)


def test_no_other_weights_on_the_kept_inputs_have_a_lower_damped_error():
    weight, hessian = layer(5, 32)
    (level,) = path(weight, hessian, [16], step=4)
    best = expand(level, 32)
    least = error(best, weight, damped(hessian))
    assert least < error(torch.where(best != 0, weight, 0.0), weight, damped(hessian))
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(25):
            nudge = torch.zeros_like(best)
            nudge[:, level.keep_U] = size * torch.randn(5, 16, generator=generator)
            assert error(best + nudge, weight, damped(hessian)) > least


@pytest.mark.parametrize("first_order", ORDERS)
def test_of_collinear_inputs_one_goes_first_and_the_output_stays(first_order):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(300, 20, generator=generator, dtype=torch.float64)
    samples[:, 13] = 0.7 * samples[:, 4]
    weight = torch.randn(6, 20, generator=generator)
    # Their first-order term is that of any other two inputs: it must not hide what is redundant.
    weight[:, [4, 13]] *= 0.05
    (level,) = path(weight, samples.T @ samples, [1], first_order=first_order, damping=1e-9)
    gone = set(range(20)) - set(level.keep_U.tolist())
    assert gone <= {4, 13}
    assert relative_error(expand(level, 20).double(), weight.double(), samples.T @ samples) < 1e-12


@pytest.mark.parametrize("first_order", ["abs", "off"])
@pytest.mark.parametrize("group", [1, 2])
def test_dead_inputs_and_units_without_weights_go_first_and_cost_nothing(first_order, group):
    weight, hessian = layer(5, 24)
    units = 24 // group
    dead, weightless = [3, 7], [units - 1]
    rows = inputs_of(torch.tensor(dead), group)
    hessian[rows] = 0
    hessian[:, rows] = 0
    weight[:, inputs_of(torch.tensor(weightless), group)] = 0
    *_, level = path(weight, hessian, range(4), group=group, first_order=first_order)
    assert set(range(units)) - set(level.keep_U.tolist()) == {*dead, *weightless}
    assert torch.equal(level.weight_OK, weight[:, inputs_of(level.keep_U, group)])


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_dead_input_that_is_kept_keeps_its_weights_and_does_not_touch_the_others(damping):
    weight, hessian = layer(5, 12)
    bigger = torch.zeros(13, 13)
    bigger[:12, :12] = hessian
    dead = torch.cat((weight, torch.ones(5, 1)), dim=1)
    keep = torch.tensor([0, 2, 3, 12])
    found = restricted(dead, bigger, keep, damping)
    assert torch.equal(found[:, 3], torch.ones(5))
    # The mean of the diagonal is over all inputs, dead ones included.
    torch.testing.assert_close(found[:, :3], restricted(weight, hessian, keep[:3], damping * 12 / 13))


def test_inputs_that_were_all_zero_lose_the_lowest_units_and_change_nothing():
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    (level,) = path(weight, torch.zeros(8, 8), [3])
    assert level.keep_U.tolist() == [3, 4, 5, 6, 7]
    assert torch.equal(level.weight_OK, weight[:, 3:])


def test_signed_scores_let_a_useful_unit_go_before_a_dead_one():
    """What the released code does, and why it is not the default."""
    weight = torch.tensor([[1.0, 3.0, 1.0]])
    hessian = torch.tensor([[1.0, -0.9, 0.0], [-0.9, 1.3, 0.0], [0.0, 0.0, 0.0]])
    kept = {order: next(path(weight, hessian, [1], first_order=order)).keep_U.tolist() for order in ORDERS}
    assert kept == {"abs": [0, 1], "off": [0, 1], "signed": [1, 2]}


def test_with_uncorrelated_inputs_the_smallest_energies_go():
    weight, hessian = layer(4, 40)
    diagonal = hessian.diagonal().diag()
    energy = damped(diagonal).diagonal() * weight.double().square().sum(dim=0)
    for level in path(weight, diagonal, [0, 10, 20, 39], step=3, first_order="off"):
        assert level.keep_U.tolist() == energy.argsort()[level.removed :].sort().values.tolist()
        torch.testing.assert_close(level.weight_OK, weight[:, level.keep_U])


def test_greedy_choice_is_close_to_the_best_of_all_subsets():
    ratios = []
    for seed in range(12):
        weight, hessian = layer(3, 10, seed=seed)
        (level,) = path(weight, hessian, [5], first_order="off")
        errors = []
        for keep in itertools.combinations(range(10), 5):
            full = torch.zeros(3, 10, dtype=torch.float64)
            full[:, list(keep)] = closed_form(weight, hessian, list(keep))
            errors.append(error(full, weight, damped(hessian)))
        ratios.append(error(expand(level, 10), weight, damped(hessian)) / min(errors))
    assert min(ratios) == pytest.approx(1, rel=1e-4)
    assert sum(ratios) / len(ratios) < 1.1
    assert max(ratios) < 1.5


@pytest.mark.parametrize("first_order", ORDERS)
def test_levels_are_nested_and_errors_rise(first_order):
    weight, hessian = layer(4, 36)
    levels = list(path(weight, hessian, range(0, 37, 4), step=3, first_order=first_order))
    errors = [error(expand(level, 36), weight, damped(hessian)) for level in levels]
    assert errors[0] == 0
    assert errors == sorted(errors)
    for more, fewer in itertools.pairwise(levels):
        assert set(fewer.keep_U.tolist()) < set(more.keep_U.tolist())


def test_a_permutation_of_the_units_permutes_the_result():
    weight, hessian = layer(4, 32)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    columns = inputs_of(order, 4)
    plain = list(path(weight, hessian, [2, 5], group=4))
    moved = list(path(weight[:, columns], hessian[columns][:, columns], [2, 5], group=4))
    for one, other in zip(plain, moved, strict=True):
        assert sorted(order[other.keep_U].tolist()) == one.keep_U.tolist()
        full = torch.zeros(4, 32)
        full[:, columns[inputs_of(other.keep_U, 4)]] = other.weight_OK
        torch.testing.assert_close(full, expand(one, 32, 4))


@pytest.mark.parametrize("scale", [1e-12, 1 / 3, 4.0, 1e12])
def test_the_hessians_scale_changes_nothing(scale):
    weight, hessian = layer(4, 32)
    for one, other in zip(path(weight, hessian, [5, 20]), path(weight, hessian * scale, [5, 20]), strict=True):
        assert torch.equal(one.keep_U, other.keep_U)
        torch.testing.assert_close(one.weight_OK, other.weight_OK)


def test_every_run_loses_as_many_units_its_own_worst():
    weight, hessian = layer(4, 48)
    weight[:, :16] *= 0.01
    assert next(path(weight, hessian, [4], group=4)).keep_U.tolist() == list(range(4, 12))
    for level in path(weight, hessian, range(5), group=4, balance=3):
        kept = level.keep_U // 4
        assert torch.bincount(kept, minlength=3).tolist() == [4 - level.removed] * 3
        assert torch.equal(level.keep_U, level.keep_U.sort().values)
    # The first slot: of every run the unit with the least score on the whole matrix.
    scores = Elimination(weight, ridge(hessian, 0.01), 4, "abs", 0.01).score_U().view(3, 4)
    (level,) = path(weight, hessian, [1], group=4, balance=3)
    gone = [unit for unit in range(12) if unit not in level.keep_U.tolist()]
    assert gone == (scores.argmin(dim=1) + torch.tensor([0, 4, 8])).tolist()


def test_ties_go_to_the_lowest_unit():
    level = next(path(torch.ones(2, 6), torch.eye(6), [2], step=2))
    assert level.keep_U.tolist() == [2, 3, 4, 5]


def test_restricted_is_the_closed_form_for_any_set_in_any_order():
    weight, hessian = layer(5, 20)
    keep = torch.tensor([13, 2, 7, 19, 0])
    torch.testing.assert_close(restricted(weight, hessian, keep, 0.1).double(), closed_form(weight, hessian, keep, 0.1))
    assert torch.equal(restricted(weight, hessian, torch.arange(20), 0.1), weight)
    assert restricted(weight, hessian, keep[:0], 0.1).shape == (5, 0)


def test_one_sentence_for_a_hessian_that_has_no_factor():
    weight, hessian = layer(5, 20, tokens=4)
    with pytest.raises(LLMPruneError, match="not positive definite with --damping 0: give a larger one"):
        list(path(weight, hessian, [3], damping=0.0))
    with pytest.raises(LLMPruneError, match="not positive definite"):
        restricted(weight, torch.full((20, 20), torch.nan), torch.arange(5), 0.1)


def test_inputs_are_left_as_they_are():
    weight, hessian = layer(4, 24)
    before = weight.clone(), hessian.clone()
    list(path(weight, hessian, [0, 5, 20], step=2))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
