"""Budgets: met exactly, within bounds, and shared by the papers' rules."""

import itertools
import math
from collections import Counter
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tiny import save_llama
from transformers import LlamaForCausalLM

from llmprune.allocation import (
    LARGEST,
    SAMPLES,
    apportion,
    by_influence,
    by_owl,
    evenly,
    keep_ratios,
    measure_outliers,
    width_multiple,
    widths,
)
from llmprune.errors import LLMPruneError
from llmprune.models import Skeleton
from llmprune.patterns import removed_count
from llmprune.statistics import angular, outlier_ratio
from llmprune.stream import Stream

SHARES = st.integers(0, 10**6).map(lambda millionths: millionths / 10**6)
# Of every block: a statistic in [0, 1], and its size.
BLOCKS = st.lists(st.tuples(SHARES, st.integers(1, 10**6)), min_size=1, max_size=12)
TARGETS = st.floats(0.0, 1.0)
IMPORTANCES = st.lists(SHARES, min_size=1, max_size=12)
GAINS = st.sampled_from([0.0, 0.1, 1.0, 10.0])


def mean(values, sizes):
    return math.fsum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


# Sparsities -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", [by_owl, by_influence])
@given(blocks=BLOCKS, target=TARGETS)
@example(blocks=[(0.3, 5), (0.7, 11)], target=1.0)
@example(blocks=[(0.3, 5), (0.7, 11)], target=0.0)
def test_sparsities_meet_the_target_within_bounds_and_fall_with_the_statistic(allocate, blocks, target):
    statistic, sizes = zip(*blocks, strict=True)
    sparsities = allocate(statistic, sizes, target)
    assert mean(sparsities, sizes) == pytest.approx(target, rel=0, abs=1e-12)
    assert all(0 <= sparsity <= max(LARGEST, target) for sparsity in sparsities)
    for (low, less), (high, more) in itertools.permutations(zip(statistic, sparsities, strict=True), 2):
        assert low > high or less >= more


@pytest.mark.parametrize("allocate", [by_owl, by_influence])
@given(share=SHARES, sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=12), target=TARGETS)
def test_equal_statistics_ask_for_the_target_everywhere(allocate, share, sizes, target):
    assert allocate([share] * len(sizes), sizes, target) == pytest.approx([target] * len(sizes), rel=0, abs=1e-15)


@given(blocks=BLOCKS, target=TARGETS, spread=st.floats(0.0, 0.3))
def test_owl_stays_within_its_spread_and_reaches_one_bound(blocks, target, spread):
    shares, sizes = zip(*blocks, strict=True)
    assume(len(set(shares)) > 1)
    away = [abs(sparsity - target) for sparsity in by_owl(shares, sizes, target, spread=spread)]
    room = min(spread, target, max(LARGEST - target, 0))
    assert max(away) == pytest.approx(room, rel=0, abs=1e-12)


@given(blocks=BLOCKS)
def test_owl_is_proportional_to_the_share_of_weights_that_are_no_outliers(blocks):
    shares, sizes = zip(*blocks, strict=True)
    assume(len(set(shares)) > 1)
    sparsities = by_owl(shares, sizes, 0.5)
    (first, share), *others = zip(sparsities, shares, strict=True)
    slopes = [(first - other) / (share - its) for other, its in others if abs(share - its) > 1e-3]
    assert all(slope < 0 for slope in slopes)
    assert slopes == pytest.approx(slopes[:1] * len(slopes), rel=1e-6)


def test_owl_is_the_published_codes_where_that_keeps_the_papers_bounds():
    shares, spread, target = [0.02, 0.05, 0.08, 0.05], 0.08, 0.7
    densities = [(share - 0.02) / (0.08 - 0.02) * 2 * spread for share in shares]
    densities = [density - sum(densities) / 4 + 1 - target for density in densities]
    assert by_owl(shares, [1] * 4, target, spread=spread) == pytest.approx([1 - density for density in densities])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = save_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)
    model = LlamaForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):  # more outliers in every block than in the one before it
            for weight in (layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight):
                weight[torch.rand(weight.shape, generator=generator) < 0.03 * index] *= 30
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ids_NT():
    return torch.randint(0, 61, (SAMPLES + 3, 20), generator=torch.Generator().manual_seed(1))


def outliers(model_dir, ids_NT, **options):
    options = {"micro_batch": 1, "offload": None, "advance_progress": lambda name: None} | options
    return measure_outliers(Skeleton(model_dir), ids_NT, **options)


@torch.no_grad()
def outliers_of_the_resident_model(model_dir, ids_NT, multiple=5.0):
    model, squares = LlamaForCausalLM.from_pretrained(model_dir), {}
    linears = {name: module for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}

    def see(name, module, args):
        squares[name] = args[0].double().square().sum((0, 1))

    for name, module in linears.items():
        module.register_forward_pre_hook(partial(see, name))
    model(ids_NT)
    return [
        outlier_ratio(
            torch.cat(
                [
                    (module.weight.abs() * squares[name].sqrt()).flatten()
                    for name, module in linears.items()
                    if name.startswith(f"{block}.")
                ]
            ),
            multiple,
        )
        for block in range(3)
    ]


@pytest.mark.parametrize("multiple", [5.0, 3.0])
def test_outliers_are_those_of_a_blocks_pooled_wanda_scores_in_the_dense_model(model_dir, ids_NT, multiple):
    expected = outliers_of_the_resident_model(model_dir, ids_NT[:SAMPLES], multiple)
    assert len(set(expected)) == 3
    assert outliers(model_dir, ids_NT, multiple=multiple) == pytest.approx(expected, rel=0, abs=2e-4)


def test_outliers_do_not_depend_on_micro_batches_or_offloading(model_dir, ids_NT, tmp_path):
    one = outliers(model_dir, ids_NT)
    assert all(one == outliers(model_dir, ids_NT, micro_batch=size) for size in (3, 8, 11))
    assert one == outliers(model_dir, ids_NT, offload=tmp_path)


def test_measuring_outliers_runs_every_sample_through_every_block_once(model_dir, ids_NT, monkeypatch):
    forward, runs = Stream.forward, Counter()

    def count(stream, block, batch):
        runs[block, batch] += 1
        return forward(stream, block, batch)

    monkeypatch.setattr(Stream, "forward", count)
    outliers(model_dir, ids_NT)
    assert runs == Counter(itertools.product(range(3), range(SAMPLES)))


def test_measuring_outliers_leaves_the_weights_alone(model_dir, ids_NT, monkeypatch):
    empty_block, dense = Skeleton.empty_block, LlamaForCausalLM.from_pretrained(model_dir)

    def check(skeleton, index):
        for linear in skeleton.linears[index]:
            assert torch.equal(linear.weight_OI, dense.get_submodule(linear.name).weight)
        empty_block(skeleton, index)

    monkeypatch.setattr(Skeleton, "empty_block", check)
    outliers(model_dir, ids_NT)


# Whole weights ----------------------------------------------------------------------------------------------------------

GROUPS = st.lists(st.lists(st.tuples(st.integers(1, 4), st.integers(4, 40)), min_size=1, max_size=3), min_size=1, max_size=4)


def removed(sparsities, groups_B):
    pairs = zip(sparsities, groups_B, strict=True)
    return sum(number * removed_count(size, sparsity) for sparsity, groups in pairs for number, size in groups)


# Angles -----------------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def angle(inputs, outputs):
    total, count = angular(inputs, outputs)
    assert count == inputs.shape[0] * inputs.shape[1]
    return total / count


def states(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.125])
def test_no_turn_is_0_and_the_opposite_direction_is_1(dtype, scale):
    inputs = states(3, 5, 64, dtype=dtype)
    assert angle(inputs, scale * inputs) == 0
    assert angle(inputs, -scale * inputs) == pytest.approx(1, rel=0, abs=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_orthogonal_is_a_half(dtype):
    inputs, outputs = torch.zeros(2, 3, 8, dtype=dtype), torch.zeros(2, 3, 8, dtype=dtype)
    inputs[..., :4], outputs[..., 4:] = states(2, 3, 4, dtype=dtype), states(2, 3, 4, seed=1, dtype=dtype)
    assert angle(inputs, outputs) == pytest.approx(0.5, rel=0, abs=1e-7)


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES), features=st.integers(1, 50), near=st.sampled_from([0.0, 1.0]))
def test_the_angle_is_the_arc_cosines(seed, dtype, features, near):
    inputs = states(2, 7, features, seed=seed, dtype=dtype)
    outputs = (near * inputs + 0.1 * states(2, 7, features, seed=seed + 1)).to(dtype)
    left, right = inputs.double(), outputs.double()
    assume(float(torch.minimum(left.norm(dim=-1), right.norm(dim=-1)).min()) > 1e-6)
    cosine = (left * right).sum(-1) / left.norm(dim=-1) / right.norm(dim=-1)
    expected = cosine.clamp(-1, 1).acos().mean() / math.pi
    assert angle(inputs, outputs) == pytest.approx(float(expected), rel=0, abs=1e-6)


@given(scale=st.floats(-30, 30).map(lambda exponent: 10.0**exponent))
def test_the_angle_does_not_depend_on_the_outputs_scale(scale):
    inputs, outputs = states(1, 6, 16), states(1, 6, 16, seed=1)
    assert angle(inputs, outputs * scale) == pytest.approx(angle(inputs, outputs), rel=1e-5)


def test_a_zero_vector_is_orthogonal_to_all_but_another_zero():
    zero, some = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    assert [angle(zero, some), angle(some, zero), angle(zero, zero)] == [0.5, 0.5, 0]


@pytest.mark.parametrize("values", [[3e38, -3e38], [1e-45, 0.0], [1e-45, 1e38], [-0.0, 0.0]])
def test_no_finite_states_give_nan(values):
    assert 0 <= angle(torch.tensor([[values]]), torch.tensor([[values[::-1]]])) <= 1


def test_angles_of_parts_add_up_and_repeating_the_tokens_changes_nothing():
    inputs, outputs = states(6, 9, 16), states(6, 9, 16, seed=1)
    whole, _ = angular(inputs, outputs)
    assert sum(angular(inputs[i : i + 2], outputs[i : i + 2])[0] for i in (0, 2, 4)) == pytest.approx(whole, rel=1e-14)
    once, again = angle(inputs, outputs), angle(inputs.repeat(8, 1, 1), outputs.repeat(8, 1, 1))
    assert once == pytest.approx(again, rel=1e-14)
    assert keep_ratios([once, 0.2, 0.3], 0.5) == pytest.approx(keep_ratios([again, 0.2, 0.3], 0.5), rel=1e-12)


# CFSP's ratios ----------------------------------------------------------------------------------------------------------


@given(importance=IMPORTANCES, p=st.floats(0, 0.99), gain=GAINS, data=st.data())
def test_ratios_have_their_mean_stay_in_bounds_rise_with_importance_and_follow_a_permutation(importance, p, gain, data):
    ratios = keep_ratios(importance, p, gain=gain)
    assert math.fsum(ratios) / len(ratios) == pytest.approx(1 - p, rel=0, abs=1e-12)
    assert all(0 < ratio <= 1 for ratio in ratios)
    for (low, less), (high, more) in itertools.permutations(zip(importance, ratios, strict=True), 2):
        assert low > high or less <= more
    order = data.draw(st.permutations(range(len(ratios))))
    assert keep_ratios([importance[i] for i in order], p, gain=gain) == [ratios[i] for i in order]


@given(importance=IMPORTANCES, p=st.floats(0, 0.99))
def test_without_gain_every_block_keeps_the_same(importance, p):
    assert keep_ratios(importance, p, gain=0.0) == pytest.approx([1 - p] * len(importance), rel=1e-15)


def test_nothing_removed_keeps_everything():
    assert keep_ratios([0.1, 0.4, 0.2], 0.0) == [1.0, 1.0, 1.0]


def test_ratios_are_those_of_sums_over_the_papers_number_of_tokens():
    importance, tokens = torch.tensor([0.05, 0.11, 0.08, 0.1], dtype=torch.float64), 128 * 1024
    sums = importance * tokens
    scores = torch.sigmoid((sums - sums.mean()) / 1e4)
    assert keep_ratios(importance.tolist(), 0.6) == pytest.approx((0.4 * scores / scores.mean()).tolist(), rel=1e-12)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.3, 0.5])
def test_a_block_that_asks_for_more_than_all_shrinks_the_scores_to_the_published_cap(p):
    importance = [0.05] * 7 + [0.5]
    ratios = keep_ratios(importance, p)
    assert max(ratios) == pytest.approx(1 - p * (1 - 1 / 1.05), rel=0, abs=1e-12)
    uncapped = keep_ratios(importance, 0.9)  # the shape stays: all distances from the mean shrink alike
    shrunk = [(ratio - (1 - p)) / (other - 0.1) for ratio, other in zip(ratios, uncapped, strict=True)]
    assert shrunk == pytest.approx(shrunk[:1] * 8)


@given(importance=IMPORTANCES, p=st.floats(0.01, 0.99))
def test_scores_do_not_shrink_where_all_fit(importance, p):
    logits = [128 * 1024 / 1e4 * (value - math.fsum(importance) / len(importance)) for value in importance]
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    plain = [(1 - p) * score * len(scores) / math.fsum(scores) for score in scores]
    assume(max(plain) < 1 - 1e-9)
    assert keep_ratios(importance, p) == pytest.approx(plain, rel=1e-9)


def test_a_very_large_gain_does_not_overflow():
    assert sum(keep_ratios([0.0, 0.5, 1.0], 0.7, gain=1e6)) == pytest.approx(0.9)


# Whole units ------------------------------------------------------------------------------------------------------------

WISHES = st.lists(st.tuples(st.floats(0, 1.2), st.integers(1, 5)), min_size=1, max_size=4)


@given(blocks=WISHES, low=st.integers(0, 1), data=st.data())
def test_units_meet_the_total_as_near_to_the_wishes_as_any(blocks, low, data):
    ratios, dense = zip(*blocks, strict=True)
    total = data.draw(st.integers(low * len(dense), sum(dense)))

    def distance(units):
        return sum((kept - ratio * all_) ** 2 for kept, ratio, all_ in zip(units, ratios, dense, strict=True))

    units = apportion(ratios, dense, total, low=low)
    assert sum(units) == total
    every = itertools.product(*[range(low, all_ + 1) for all_ in dense])
    assert distance(units) <= min(distance(each) for each in every if sum(each) == total) + 1e-9
    assert all(low <= kept <= all_ for kept, all_ in zip(units, dense, strict=True))


@pytest.mark.parametrize("wish", [0.3, 0.8])  # below the total, and above it
@pytest.mark.parametrize(
    ("total", "expected"), [(4, [2, 1, 1]), (5, [2, 2, 1]), (6, [2, 2, 2]), (7, [3, 2, 2]), (8, [3, 3, 2])]
)
def test_of_equal_wishes_the_lower_index_gets_more(wish, total, expected):
    assert apportion([wish] * 3, [5, 5, 5], total) == expected


@pytest.mark.parametrize(("dense", "total", "low"), [([4, 4], 1, 1), ([4, 4], 9, 1), ([4, 0], 3, 1), ([4, 4], 5, 3)])
def test_a_total_outside_what_blocks_can_keep_is_refused(dense, total, low):
    with pytest.raises(LLMPruneError, match=f"^{total} units cannot be shared"):
        apportion([0.5, 0.5], dense, total, low=low)


@given(
    importance=IMPORTANCES,
    p=st.floats(0, 0.95),
    dense=st.integers(1, 3000),
    gain=GAINS,
    multiple=st.sampled_from([None, 1, 16, 32, 128]),
)
@example(importance=[0.1, 0.2, 0.3], p=0.05, dense=1000, gain=1.0, multiple=128)
def test_widths_are_multiples_or_dense_and_meet_the_budget_to_half_a_multiple(importance, p, dense, gain, multiple):
    multiple = multiple or width_multiple(dense)
    blocks = len(importance)
    target = (1 - p) * dense * blocks
    assume(multiple <= dense)
    assume(target >= multiple * blocks)
    kept = widths(keep_ratios(importance, p, gain=gain), [dense] * blocks, target, multiple=multiple)
    assert all(multiple <= width <= dense and (width % multiple == 0 or width == dense) for width in kept)
    assert abs(sum(kept) - target) <= multiple / 2 + 1e-6
    if dense % multiple and dense in kept:  # only where multiples alone fall short
        assert target > blocks * (dense // multiple) * multiple


def test_a_block_whose_share_is_less_than_half_a_multiple_keeps_one_and_not_all():
    kept = widths([0.02, 0.5, 0.98], [1024] * 3, 1536, multiple=128)
    assert kept == [128, 512, 896]


def test_nothing_removed_leaves_widths_that_are_no_multiples_alone():
    assert widths(keep_ratios([0.1, 0.3], 0.0), [1000, 1000], 2000, multiple=128) == [1000, 1000]


def test_the_blocks_that_want_most_are_left_dense_where_multiples_fall_short():
    assert widths([0.95, 0.99, 0.91], [1000] * 3, 0.95 * 3000, multiple=128) == [1000, 1000, 896]


def test_blocks_of_different_widths_share_one_budget():
    kept = widths([0.5, 0.5, 0.5], [1024, 2048, 512], 1792, multiple=128)
    assert kept == [512, 1024, 256]


def test_a_block_narrower_than_the_multiple_is_refused():
    with pytest.raises(LLMPruneError, match="smaller multiple"):
        widths([0.5, 0.5], [100, 256], 178, multiple=128)


@pytest.mark.parametrize(("width", "multiple"), [(14336, 128), (1024, 128), (1023, 32), (256, 32), (172, 16), (127, 1), (1, 1)])
def test_the_multiple_leaves_at_least_eight_steps(width, multiple):
    assert width_multiple(width) == multiple


@given(total=st.integers(0, 400), count=st.integers(1, 60))
@example(total=22, count=30)
def test_any_run_of_neighbours_has_its_share_to_within_one_unit(total, count):
    places = evenly(total, count)
    assert len(places) == count
    assert sum(places) == total
    assert set(places) <= {total // count, total // count + 1}
    for start, stop in itertools.combinations(range(count + 1), 2):
        assert abs(sum(places[start:stop]) - Fraction(total * (stop - start), count)) < 1


def test_a_single_unit_goes_to_the_middle():
    assert evenly(1, 5) == [0, 0, 1, 0, 0]
