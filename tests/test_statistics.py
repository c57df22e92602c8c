"""Statistics: exact merges, independence of batching and order, agreement with each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.statistics import CrossHessian, Hessian, InputNorm, Moments, SplitHessian

CPU = torch.device("cpu")


def filled(kind, samples, splits=None):
    statistic = kind(samples[0].shape[-1], CPU)
    for part in splits or [samples]:
        statistic.update(torch.stack(part))
    return statistic


@given(
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
@settings(max_examples=40)
def test_input_norms_have_the_same_bits_for_every_split_and_order(seed, cuts, scale):
    generator = torch.Generator().manual_seed(seed)
    count = sum(cuts)
    samples = [torch.randn(11, 5, generator=generator) * scale * 10 ** torch.rand(1, generator=generator) for _ in range(count)]
    whole = filled(InputNorm, samples)
    order = torch.randperm(count, generator=generator).tolist()
    parts, start = [], 0
    for size in cuts:
        parts.append([samples[i] for i in order[start : start + size]])
        start += size
    merged = InputNorm(5, CPU)
    for part in parts:
        merged.merge(filled(InputNorm, part))
    assert torch.equal(whole.squares_I, merged.squares_I)
    assert whole.tokens == merged.tokens == count * 11


def test_input_norm_is_the_root_mean_square():
    inputs = torch.randn(3, 17, 6)
    expected = inputs.double().flatten(0, 1).square().mean(0).sqrt()
    torch.testing.assert_close(filled(InputNorm, list(inputs)).rms_I.double(), expected, rtol=1e-6, atol=0)


def test_half_precision_activations_do_not_overflow():
    inputs = (torch.randn(2, 8, 4) * 1e4).half()
    assert filled(InputNorm, list(inputs)).is_finite()
    assert filled(Hessian, list(inputs)).is_finite()


@pytest.mark.parametrize("features", [1, 7, 512, 700, 1030])
def test_hessian_equals_the_full_product(features):
    inputs = torch.randn(2, 9, features)
    flat = inputs.flatten(0, 1).double()
    expected = flat.T @ flat / len(flat)
    mean = filled(Hessian, list(inputs)).mean_II
    torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(mean, mean.T)


def test_hessian_has_the_same_bits_for_every_split_in_order():
    samples = list(torch.randn(6, 8, 20))
    whole = filled(Hessian, samples)
    split = filled(Hessian, samples, [samples[:1], samples[1:4], samples[4:]])
    assert torch.equal(whole.upper_II, split.upper_II)


def test_hessian_diagonal_is_the_squared_input_norm():
    samples = list(torch.randn(4, 30, 12))
    torch.testing.assert_close(filled(Hessian, samples).mean_II.diagonal(), filled(InputNorm, samples).rms_I.square())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [InputNorm, Hessian, Moments, SplitHessian, CrossHessian])
def test_a_non_finite_activation_is_noticed(kind, bad):
    inputs = torch.randn(1, 4, 5)
    inputs[0, 2, 3] = bad
    assert not filled(kind, list(inputs)).is_finite()


@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(1, 3), min_size=2, max_size=4))
@settings(max_examples=20)
def test_moments_have_the_same_bits_for_every_split_and_order(seed, cuts):
    generator = torch.Generator().manual_seed(seed)
    samples = [torch.randn(11, 5, generator=generator) for _ in range(sum(cuts))]
    whole, merged = filled(Moments, samples), Moments(5, CPU)
    for part in torch.randperm(len(samples), generator=generator).split(cuts):
        merged.merge(filled(Moments, [samples[i] for i in part]))
    for name in ("mean_I", "variance_I", "rms_I"):
        assert torch.equal(getattr(whole, name), getattr(merged, name))


@pytest.mark.parametrize("kind", [Moments, SplitHessian])
def test_mean_variance_and_rms_equal_the_direct_ones(kind):
    inputs = torch.randn(5, 40, 9) * torch.arange(9) + torch.linspace(-3, 3, 9)
    statistic, flat = filled(kind, list(inputs)), inputs.double().flatten(0, 1)
    torch.testing.assert_close(statistic.mean_I.double(), flat.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistic.variance_I.double(), flat.var(0, correction=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistic.rms_I.double(), flat.square().mean(0).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [Moments, SplitHessian])
def test_no_variance_is_negative_whatever_rounding_does(kind):
    statistic = filled(kind, list(torch.full((3, 7, 4), 0.1) + torch.arange(4)))
    assert (statistic.variance_I >= 0).all()


def test_a_split_hessian_holds_out_every_eighth_sample_and_no_other():
    inputs = torch.randn(19, 6, 5)
    split = filled(SplitHessian, list(inputs))
    held_out = torch.arange(19) % 8 == 7
    assert torch.equal(split.upper_II, filled(Hessian, list(inputs[~held_out])).upper_II)
    assert torch.equal(split.fresh.upper_II, filled(Hessian, list(inputs[held_out])).upper_II)
    assert (int(split.tokens), int(split.fresh.tokens)) == (17 * 6, 2 * 6)
    torch.testing.assert_close(split.mean_I, inputs[~held_out].flatten(0, 1).mean(0))


@pytest.mark.parametrize("sizes", [[1] * 19, [4, 4, 4, 4, 3], [7, 1, 11], [8, 8, 3]], ids=str)
def test_which_samples_are_held_out_does_not_depend_on_micro_batches(sizes):
    inputs, first = torch.randn(19, 6, 5), 0
    whole, parts = filled(SplitHessian, list(inputs)), SplitHessian(5, CPU)
    for part in inputs.split(sizes):
        parts.update(part, first)
        first += len(part)
    assert all(torch.equal(*pair) for pair in zip(whole.sums(), parts.sums(), strict=True))


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 18])
def test_ranks_hold_out_the_samples_that_one_process_would(cut):
    inputs = torch.randn(19, 6, 5)
    whole, left, right = filled(SplitHessian, list(inputs)), SplitHessian(5, CPU), SplitHessian(5, CPU)
    left.update(inputs[:cut], 0)
    right.update(inputs[cut:], cut)
    left.merge(right)
    assert (left.tokens, left.fresh.tokens) == (whole.tokens, whole.fresh.tokens)
    torch.testing.assert_close(left.mean_II, whole.mean_II)
    torch.testing.assert_close(left.fresh.mean_II, whole.fresh.mean_II)


def test_the_fit_and_what_is_held_out_of_it_are_all_samples():
    inputs = torch.randn(17, 6, 5)
    split, whole = filled(SplitHessian, list(inputs)), filled(Hessian, list(inputs))
    assert split.tokens + split.fresh.tokens == whole.tokens
    torch.testing.assert_close(split.upper_II + split.fresh.upper_II, whole.upper_II)


def paired(inputs, dense, gaps, *, first=0, sizes=None):
    cross, sizes = CrossHessian(inputs.shape[-1], CPU), sizes or [len(inputs)]
    for part, dense_part, gap in zip(
        inputs.split(sizes), dense.split(sizes), gaps.split(sizes) if gaps is not None else [None] * len(sizes), strict=True
    ):
        cross.update_pair(part, dense_part, first, gap)
        first += len(part)
    return cross


@pytest.fixture(params=[False, True], ids=["no gap", "gap"])
def two_models(request):
    """Inputs of the pruned and of the dense model, what the residual stream has lost or None, and a weight."""
    inputs = torch.randn(11, 6, 5)
    dense = inputs + 0.3 * torch.randn(11, 6, 5)
    return inputs, dense, torch.randn(11, 6, 4) if request.param else None, torch.randn(4, 5)


def test_what_is_missing_equals_the_direct_product(two_models):
    inputs, dense, gaps, weight = two_models
    fitted = torch.arange(11) % 8 != 7
    flat = inputs[fitted].double().flatten(0, 1)
    lost = (dense[fitted] @ weight.T + (0 if gaps is None else gaps[fitted]) - inputs[fitted] @ weight.T).double().flatten(0, 1)
    missing = paired(inputs, dense, gaps).missing_OI(weight)
    torch.testing.assert_close(missing.double(), lost.T @ flat / len(flat), rtol=1e-4, atol=1e-5)


def test_nothing_is_missing_while_the_two_models_are_the_same():
    inputs = torch.randn(3, 6, 5)
    assert paired(inputs, inputs, torch.zeros(3, 6, 4)).missing_OI(torch.randn(4, 5)).abs().max() < 1e-5


def test_pairs_have_the_same_bits_for_every_split_in_order(two_models):
    inputs, dense, gaps, _ = two_models
    whole, parts = paired(inputs, dense, gaps), paired(inputs, dense, gaps, sizes=[1, 4, 6])
    assert all(torch.equal(*pair) for pair in zip(whole.sums(), parts.sums(), strict=True))


def test_pairs_of_two_ranks_merge_to_those_of_one(two_models):
    inputs, dense, gaps, weight = two_models
    left = paired(inputs[:7], dense[:7], None if gaps is None else gaps[:7])
    left.merge(paired(inputs[7:], dense[7:], None if gaps is None else gaps[7:], first=7))
    torch.testing.assert_close(left.missing_OI(weight), paired(inputs, dense, gaps).missing_OI(weight), rtol=1e-4, atol=1e-5)


def test_a_rank_whose_samples_are_all_held_out_has_the_same_sums_to_add(two_models):
    inputs, dense, gaps, _ = two_models
    only = paired(inputs[7:8], dense[7:8], None if gaps is None else gaps[7:8], first=7)
    assert [total.shape for total in only.sums()] == [total.shape for total in paired(inputs, dense, gaps).sums()]
    assert only.tokens == 0
