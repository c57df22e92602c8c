"""Layer-wise swaps: against a slow reference in float64, and by their laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune import layerwise
from llmprune.layerwise import LEAST_GAIN, swap
from llmprune.patterns import NM, Unstructured
from llmprune.reconstruction import damped

PATTERNS = [Unstructured(0.5), Unstructured(0.75), NM(2, 4), NM(1, 4), NM(4, 8)]


def layer(rows, columns, *, tokens=300, seed=0):
    """A weight, and the damped Hessian of correlated inputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ (torch.eye(columns) + mixing)
    inputs *= torch.exp(torch.randn(columns, generator=generator, dtype=torch.float64))
    return weight, damped(inputs.T @ inputs / tokens, 0.1)


def wanda(weight, hessian, pattern):
    return pattern.keep(weight.abs() * hessian.diagonal().sqrt())


def elsewhere(weight, *, seed=0):
    """A target that shares most of itself with the weight."""
    generator = torch.Generator().manual_seed(seed + 1000)
    return weight + 0.5 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)


def errors(weight, keep, hessian, target=None):
    lost = ((weight if target is None else target) - weight * keep).double()
    return (lost @ hessian.double() * lost).sum(dim=1)


def reference(weight, keep, hessian, pattern, target=None):
    """One row, one swap at a time, every error computed from nothing.

    Returns:
        The mask and how many swaps it took.
    """

    def after(*columns):
        changed = keep.clone()
        changed[list(columns)] = ~changed[list(columns)]
        return float(errors(weight[None], changed[None], hessian, None if target is None else target[None]))

    keep, least = keep.clone(), LEAST_GAIN * float((weight.square() * hessian.diagonal()).sum())
    for swaps in range(1000):
        removed = [i for i in range(len(keep)) if not keep[i]]
        if not isinstance(pattern, NM):  # the weight to put back is chosen first
            removed = [min(removed, key=after)]
        pairs = [
            (i, j)
            for i in removed
            for j in range(len(keep))
            if keep[j] and (not isinstance(pattern, NM) or i // pattern.m == j // pattern.m)
        ]
        best = min(pairs, key=lambda pair: after(*pair))
        if after(*best) >= after() - least:
            return keep, swaps
        keep = keep.clone()
        keep[list(best)] = ~keep[list(best)]
    raise AssertionError("swaps do not end")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(6, 8), (5, 24), (3, 40)], ids=str)
def test_masks_equal_those_of_the_slow_reference(shape, pattern):
    swaps = 0
    for seed in range(3):
        weight, hessian = layer(*shape, seed=seed)
        keep = wanda(weight, hessian, pattern)
        rows = [reference(weight[row], keep[row], hessian, pattern) for row in range(len(weight))]
        assert torch.equal(swap(weight, keep, hessian, pattern), torch.stack([row for row, _ in rows]))
        swaps += sum(count for _, count in rows)
    assert swaps > 0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(6, 8), (4, 24)], ids=str)
def test_with_a_target_masks_equal_those_of_the_slow_reference(shape, pattern):
    other = 0
    for seed in range(2):
        weight, hessian = layer(*shape, seed=seed)
        keep, target = wanda(weight, hessian, pattern), elsewhere(weight, seed=seed)
        rows = [reference(weight[row], keep[row], hessian, pattern, target[row])[0] for row in range(len(weight))]
        better = swap(weight, keep, hessian, pattern, target)
        assert torch.equal(better, torch.stack(rows))
        other += int((better != swap(weight, keep, hessian, pattern)).sum())
    assert other > 0


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_a_target_that_is_the_weight_itself_changes_nothing(pattern):
    weight, hessian = layer(9, 32)
    keep = wanda(weight, hessian, pattern)
    assert torch.equal(swap(weight, keep, hessian, pattern, weight.clone()), swap(weight, keep, hessian, pattern))


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("chunk", [1, 100])
def test_the_rows_worked_on_at_a_time_do_not_change_the_mask(pattern, chunk, monkeypatch):
    weight, hessian = layer(11, 24)
    keep, target = wanda(weight, hessian, pattern), elsewhere(weight)
    whole = swap(weight, keep, hessian, pattern, target)
    monkeypatch.setattr(layerwise, "CHUNK", chunk)
    assert torch.equal(whole, swap(weight, keep, hessian, pattern, target))


@given(
    seed=st.integers(0, 10_000),
    pattern=st.sampled_from(PATTERNS),
    start=st.sampled_from(["wanda", "random"]),
    matched=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_the_error_falls_wherever_a_row_changes_and_every_row_keeps_as_many(seed, pattern, start, matched):
    weight, hessian = layer(7, 32, tokens=80, seed=seed)
    weight, hessian = weight.float(), hessian.float()
    target = elsewhere(weight, seed=seed) if matched else None
    keep = wanda(weight, hessian, pattern) if start == "wanda" else pattern.keep(torch.rand(7, 32))
    better = swap(weight, keep, hessian, pattern, target)
    changed = (better != keep).any(dim=1)
    before, after = errors(weight, keep, hessian, target), errors(weight, better, hessian, target)
    assert (after[changed] < before[changed]).all()
    assert torch.equal(better.sum(dim=1), keep.sum(dim=1))
    if isinstance(pattern, NM):
        assert (better.view(-1, pattern.m).sum(dim=1) == pattern.n).all()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_swapping_again_changes_nothing(pattern):
    weight, hessian = layer(9, 32)
    once = swap(weight, wanda(weight, hessian, pattern), hessian, pattern)
    assert torch.equal(once, swap(weight, once, hessian, pattern))


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), NM(4, 8)], ids=str)
def test_swaps_take_a_tenth_of_wandas_error_on_correlated_inputs(pattern):
    before = after = 0.0
    for seed in range(3):
        weight, hessian = layer(16, 64, seed=seed)
        keep = wanda(weight, hessian, pattern)
        before += float(errors(weight, keep, hessian).sum())
        after += float(errors(weight, swap(weight, keep, hessian, pattern), hessian).sum())
    assert after < 0.9 * before


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8)], ids=str)
def test_no_group_ends_with_a_swap_inside_it_that_would_lower_the_error(pattern):
    weight, hessian = layer(6, 24)
    keep = swap(weight, wanda(weight, hessian, pattern), hessian, pattern)
    least = LEAST_GAIN * (weight.square() * hessian.diagonal()).sum(dim=1)
    for i in range(24):
        for j in range(i // pattern.m * pattern.m, i // pattern.m * pattern.m + pattern.m):
            rows = (~keep[:, i] & keep[:, j]).nonzero().squeeze(1)
            other = keep[rows]
            other[:, i], other[:, j] = True, False
            gain = errors(weight[rows], keep[rows], hessian) - errors(weight[rows], other, hessian)
            assert (gain <= least[rows] * 1.001).all()


def test_with_uncorrelated_inputs_wandas_mask_is_left_as_it_is():
    weight, hessian = layer(8, 32)
    hessian = hessian.diagonal().diag()
    keep = wanda(weight, hessian, Unstructured(0.5))
    assert torch.equal(swap(weight, keep, hessian, Unstructured(0.5)), keep)


def test_the_mask_that_it_starts_from_and_the_weights_stay_as_they_are():
    weight, hessian = layer(8, 32)
    keep = wanda(weight, hessian, Unstructured(0.5))
    before = [tensor.clone() for tensor in (weight, keep, hessian)]
    swap(weight, keep, hessian, Unstructured(0.5))
    assert all(torch.equal(*pair) for pair in zip(before, (weight, keep, hessian), strict=True))


@pytest.mark.parametrize("kept", [False, True], ids=["all removed", "all kept"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_rows_with_nothing_to_swap_stay_beside_rows_that_change(pattern, kept):
    weight, hessian = layer(8, 32)
    keep = wanda(weight, hessian, pattern)
    keep[::2] = kept
    better = swap(weight, keep, hessian, pattern)
    assert torch.equal(better[::2], keep[::2])
    assert not torch.equal(better[1::2], keep[1::2])


def test_rows_may_differ_in_how_many_weights_they_keep():
    weight, hessian = layer(16, 32)
    keep = wanda(weight, hessian, Unstructured(0.5, "layer"))
    assert len(keep.sum(dim=1).unique()) > 1
    assert torch.equal(swap(weight, keep, hessian, Unstructured(0.5, "layer")).sum(dim=1), keep.sum(dim=1))


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_all_zero_weights_and_inputs_swap_nothing(pattern):
    weight, hessian = layer(4, 16)
    keep = pattern.keep(torch.rand(4, 16))
    assert torch.equal(swap(weight * 0, keep, hessian, pattern), keep)
    assert torch.equal(swap(weight, keep, hessian * 0, pattern), keep)


def test_permuting_rows_permutes_the_mask():
    weight, hessian = layer(9, 32)
    keep, order = wanda(weight, hessian, Unstructured(0.5)), torch.randperm(9)
    better = swap(weight, keep, hessian, Unstructured(0.5))
    assert torch.equal(better[order], swap(weight[order], keep[order], hessian, Unstructured(0.5)))


def test_a_transposed_view_is_swapped_as_its_copy_is():
    weight, hessian = layer(8, 32)
    keep = wanda(weight, hessian, Unstructured(0.5))
    stored = weight.T.contiguous()
    assert torch.equal(swap(stored.T, keep, hessian, Unstructured(0.5)), swap(weight, keep, hessian, Unstructured(0.5)))


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_the_scale_of_rows_does_not_matter(scale):
    weight, hessian = layer(8, 32)
    weight, hessian = weight.float(), hessian.float()
    keep = wanda(weight, hessian, Unstructured(0.5))
    assert torch.equal(swap(weight * scale, keep, hessian, Unstructured(0.5)), swap(weight, keep, hessian, Unstructured(0.5)))
