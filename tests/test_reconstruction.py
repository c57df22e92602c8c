"""Least squares on one layer: against float64 solves row by row, against SparseGPT's sweep, and by its laws."""

import pytest
import torch

from llmprune.errors import LLMPruneError
from llmprune.methods.sparsegpt import inverse_factor, solve
from llmprune.patterns import NM, Unstructured
from llmprune.reconstruction import alternate, damped, dense_target, least_squares, relative_error

PATTERNS = [Unstructured(0.5), Unstructured(0.7, "layer"), NM(2, 4), NM(4, 8)]


def layer(rows, columns, *, tokens=400, seed=0):
    """A weight and correlated inputs, every feature with a scale of its own, as [T, I]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = (torch.randn(tokens, columns, generator=generator) + 0.5) @ mixing
    return weight, inputs * torch.exp(torch.randn(columns, generator=generator))


def hessian_of(inputs):
    return inputs.T @ inputs / len(inputs)


def exact(target, keep, hessian):
    """Row by row in float64: H_kk w_k = (H t)_k on the kept columns, zero elsewhere."""
    hessian, weight = hessian.double(), torch.zeros_like(target, dtype=torch.float64)
    for row, kept in enumerate(keep):
        if kept.any():
            right = hessian[kept] @ target[row].double()
            weight[row, kept] = torch.linalg.solve(hessian[kept][:, kept], right)
    return weight


def error(weight, target, hessian):
    """What (1) of the module's docstring minimises, of every row, in float64."""
    lost = weight.double() - target.double()
    return (lost @ hessian.double() * lost).sum(dim=1)


def wanda(weight, hessian, pattern):
    return pattern.keep(weight.abs() * hessian.diagonal().sqrt())


def random_mask(rows, columns, kind):
    if isinstance(kind, NM):
        return kind.keep(torch.rand(rows, columns))
    keep = torch.rand(rows, columns) < 0.5
    if kind == "uneven":  # rows that keep none, one, and all
        keep[0], keep[1], keep[2] = False, False, True
        keep[1, columns // 2] = True
    return keep


def assert_same(found, expected, hessian):
    """Equal but for what the tolerance leaves open: features in units of their deviation, rows in units of their largest."""
    found, expected = ((weight.double() * hessian.diagonal().double().sqrt()) for weight in (found, expected))
    assert ((found - expected).abs() <= 0.01 * expected.abs().amax(dim=1, keepdim=True)).all()


@pytest.mark.parametrize("damping", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["random", "uneven", NM(2, 4), NM(4, 8)], ids=str)
@pytest.mark.parametrize("shape", [(5, 8), (17, 64), (9, 200)], ids=str)
def test_least_squares_equal_an_exact_solve_of_every_row(shape, kind, damping):
    weight, inputs = layer(*shape)
    keep, hessian = random_mask(*shape, kind), damped(hessian_of(inputs), damping)
    found, expected = least_squares(weight, keep, hessian), exact(weight, keep, hessian)
    assert not found[~keep].any()
    # The tolerance is one of the residual: the error's distance from its minimum is of the second order in it.
    excess = error(found, weight, hessian) - error(expected, weight, hessian)
    assert (excess <= 1e-5 * error(torch.zeros_like(weight), weight, hessian)).all()
    assert_same(found, expected, hessian)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("rows", [1, 6])
def test_one_input_is_kept_as_it_is_or_removed(rows, kept):
    weight = torch.randn(rows, 1)
    found = least_squares(weight, torch.full((rows, 1), kept), torch.tensor([[3.0]]))
    torch.testing.assert_close(found, weight * kept)


def test_rows_that_keep_all_are_the_target_and_rows_that_keep_none_are_zero():
    weight, inputs = layer(4, 30)
    keep = torch.tensor([True, False, True, False])[:, None].expand(4, 30)
    torch.testing.assert_close(least_squares(weight, keep, damped(hessian_of(inputs), 0.1)), weight * keep)


def test_a_row_does_not_depend_on_the_rows_it_is_solved_with():
    weight, inputs = layer(12, 40)
    keep, hessian = random_mask(12, 40, "random"), damped(hessian_of(inputs), 0.1)
    together = least_squares(weight, keep, hessian)
    alone = torch.cat([least_squares(weight[i : i + 1], keep[i : i + 1], hessian) for i in range(12)])
    assert_same(together, alone, hessian)


@pytest.mark.parametrize("dead", [[3], [0, 5, 6, 7], list(range(30))], ids=["one", "some", "all"])
def test_inputs_that_were_always_zero_change_nothing_for_the_others(dead):
    weight, inputs = layer(6, 30)
    inputs[:, dead] = 0
    keep, alive = random_mask(6, 30, "random"), [i for i in range(30) if i not in dead]
    found = least_squares(weight, keep, damped(hessian_of(inputs), 0.1))
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, dead], (weight * keep)[:, dead])
    if alive:
        hessian = damped(hessian_of(inputs[:, alive]), 0.1)
        assert_same(found[:, alive], least_squares(weight[:, alive], keep[:, alive], hessian), hessian)


def test_the_start_does_not_change_the_solution():
    weight, inputs = layer(8, 40)
    keep, hessian = random_mask(8, 40, "random"), damped(hessian_of(inputs), 0.1)
    assert_same(least_squares(weight, keep, hessian, torch.randn(8, 40) * keep), least_squares(weight, keep, hessian), hessian)


@pytest.mark.parametrize("scale", [1e-18, 1e-16, 1e-12, 1e12])
def test_rows_of_any_size_are_solved_alike(scale):
    # Training leaves rows that are dead but for weights of 1e-16: they must not stop a run.
    weight, inputs = layer(4, 40)
    keep, hessian = random_mask(4, 40, "random"), damped(hessian_of(inputs), 0.1)
    sizes = torch.tensor([1.0, 1.0, scale, scale], dtype=torch.float64)[:, None]
    found = least_squares((weight * sizes).float(), keep, hessian)
    assert_same(found / sizes, least_squares(weight, keep, hessian), hessian)


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e12])
def test_inputs_of_any_size_give_the_same_weights(scale):
    weight, inputs = layer(4, 40)
    keep, hessian = random_mask(4, 40, "random"), damped(hessian_of(inputs), 0.1)
    found = least_squares(weight, keep, damped(hessian_of(inputs) * scale, 0.1))
    assert_same(found, least_squares(weight, keep, hessian), hessian)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_least_squares_beat_sparsegpts_sweep_which_beats_no_update_on_one_mask(pattern):
    weight, inputs = layer(24, 64)
    hessian = hessian_of(inputs)
    # Both minimise the same: what SparseGPT adds to the diagonal is a hundredth of its mean.
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(64)
    keep = wanda(weight, hessian, pattern)
    fitted, swept = least_squares(weight, keep, hessian), solve(weight, inverse_factor(hessian_of(inputs)), keep)
    errors = [error(new, weight, hessian) for new in (fitted, swept, weight * keep)]
    assert (errors[0] <= errors[1] * (1 + 1e-4)).all()
    assert errors[0].sum() < 0.99 * errors[1].sum() < 0.99 * errors[2].sum()


def test_least_squares_of_a_hessian_that_is_none_are_refused_in_one_sentence():
    inputs = torch.randn(20, 60)
    hessian = hessian_of(inputs) - 0.2 * torch.eye(60)
    with pytest.raises(LLMPruneError, match=r"Hessian .*--damping.*more samples") as caught:
        least_squares(torch.randn(3, 60), torch.rand(3, 60) < 0.5, hessian)
    assert "\n" not in str(caught.value)


def test_the_dense_target_of_a_hessian_that_is_none_is_refused_in_one_sentence():
    inputs = torch.randn(20, 60)
    hessian = hessian_of(inputs) - 0.5 * torch.eye(60)
    with pytest.raises(LLMPruneError, match=r"not positive definite with --damping 0\.01.*more samples") as caught:
        dense_target(torch.randn(3, 60), torch.randn(3, 60), hessian, 0.01)
    assert "\n" not in str(caught.value)


def test_fewer_tokens_than_inputs_are_solved_with_and_without_damping():
    weight, inputs = layer(4, 80, tokens=20)
    keep = random_mask(4, 80, "random")
    for hessian in (hessian_of(inputs), damped(hessian_of(inputs), 0.1)):
        found = least_squares(weight, keep, hessian)
        assert (error(found, weight, hessian) <= error(weight * keep, weight, hessian)).all()


def test_damping_moves_the_hessian_towards_its_diagonal():
    _, inputs = layer(1, 20)
    hessian = hessian_of(inputs)
    torch.testing.assert_close(damped(hessian, 0.3), 0.7 * hessian + 0.3 * hessian.diagonal().diag())


@pytest.mark.parametrize("dead", [[2, 5], list(range(8))], ids=["some", "all"])
def test_a_damped_hessian_of_dead_inputs_is_positive_definite(dead):
    _, inputs = layer(1, 8, tokens=3)
    inputs[:, dead] = 0
    assert torch.linalg.eigvalsh(damped(hessian_of(inputs), 0.1).double()).min() > 0


def test_damping_leaves_its_argument_as_it_is():
    _, inputs = layer(1, 8)
    hessian = hessian_of(inputs)
    before = hessian.clone()
    damped(hessian, 0.1)
    assert torch.equal(hessian, before)


def test_relative_error_is_that_of_the_outputs():
    weight, inputs = layer(6, 20)
    other = weight + torch.randn(6, 20)
    expected = (inputs @ (other - weight).T).square().sum() / (inputs @ weight.T).square().sum()
    assert relative_error(other, weight, hessian_of(inputs)) == pytest.approx(float(expected), rel=1e-4)


def test_relative_error_is_one_for_nothing_kept_and_zero_for_everything_or_a_zero_output():
    weight, inputs = layer(6, 20)
    hessian = hessian_of(inputs)
    assert relative_error(weight * 0, weight, hessian) == pytest.approx(1)
    assert relative_error(weight, weight, hessian) == 0
    assert relative_error(weight, weight * 0, hessian * 0) == 0


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_the_dense_target_minimises_its_stated_objective(damping):
    weight, inputs = layer(5, 12, tokens=60)
    dense_output = inputs @ weight.T + torch.randn(60, 5)
    missing = (dense_output - inputs @ weight.T).T @ inputs / 60
    found = dense_target(weight, missing, hessian_of(inputs), damping)
    # The same objective as one least-squares problem: outputs, and under them what keeps t near the dense weights.
    scale, inputs, weight = hessian_of(inputs).diagonal().sqrt().double(), inputs.double(), weight.double()
    left = torch.cat([inputs * ((1 - damping) / 60) ** 0.5, (scale * damping**0.5).diag()])
    right = torch.cat([dense_output.double() * ((1 - damping) / 60) ** 0.5, (weight * scale * damping**0.5).T])
    torch.testing.assert_close(found.double(), torch.linalg.lstsq(left, right).solution.T, rtol=1e-4, atol=1e-4)


def test_the_dense_target_is_the_dense_weight_where_nothing_is_missing():
    weight, inputs = layer(5, 12)
    assert torch.equal(dense_target(weight, torch.zeros(5, 12), hessian_of(inputs), 0.1), weight)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rounds", [1, 15])
def test_alternating_obeys_the_pattern_exactly(pattern, rounds):
    weight, inputs = layer(12, 48)
    hessian = damped(hessian_of(inputs), 0.1)
    keep, guess = alternate(weight, wanda(weight, hessian, pattern), hessian, pattern, rounds)
    assert not guess[~keep].any()
    if isinstance(pattern, NM):
        assert (keep.view(-1, pattern.m).sum(dim=1) == pattern.n).all()
    elif pattern.group == "row":
        assert (keep.sum(dim=1) == 24).all()
    else:
        assert int((~keep).sum()) == int(12 * 48 * 0.7)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_alternating_chooses_better_masks_than_wanda_and_starts_where_few_steps_are_left(pattern):
    for seed in range(3):
        weight, inputs = layer(24, 64, seed=seed)
        hessian = damped(hessian_of(inputs), 0.1)
        start = wanda(weight, hessian, pattern)
        keep, guess = alternate(weight, start, hessian, pattern, 15)
        wandas = error(least_squares(weight, start, hessian), weight, hessian).mean()
        assert error(least_squares(weight, keep, hessian, guess), weight, hessian).mean() < wandas
        assert error(guess, weight, hessian).mean() < error(weight * keep, weight, hessian).mean()


def test_alternating_gives_the_same_bits_every_time_and_leaves_its_arguments():
    weight, inputs = layer(8, 32)
    hessian, pattern = damped(hessian_of(inputs), 0.1), Unstructured(0.5)
    start = wanda(weight, hessian, pattern)
    arguments = [tensor.clone() for tensor in (weight, start, hessian)]
    first, second = (alternate(weight, start, hessian, pattern, 5) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(*pair) for pair in zip(arguments, (weight, start, hessian), strict=True))


def test_one_round_of_alternating_is_its_stated_equation():
    weight, inputs = layer(4, 10)
    hessian, pattern = damped(hessian_of(inputs), 0.1), Unstructured(0.5)
    start = wanda(weight, hessian, pattern)
    scale = hessian.diagonal().sqrt().double()
    correlation, target = hessian.double() / scale / scale[:, None], weight.double() * scale
    free = (target @ correlation + target * start) @ torch.linalg.inv(correlation + torch.eye(10, dtype=torch.float64))
    keep, guess = alternate(weight, start, hessian, pattern, 1)
    assert torch.equal(keep, pattern.keep(free.abs()))
    torch.testing.assert_close(guess.double(), free * keep / scale, rtol=1e-4, atol=1e-5)
