"""Statistics: exact merges, independence of batching and order, agreement with each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.statistics import Hessian, InputNorm

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
@pytest.mark.parametrize("kind", [InputNorm, Hessian])
def test_a_non_finite_activation_is_noticed(kind, bad):
    inputs = torch.randn(1, 4, 5)
    inputs[0, 2, 3] = bad
    assert not filled(kind, list(inputs)).is_finite()
