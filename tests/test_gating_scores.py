"""What gates compare: histograms that merge exactly, thresholds that hit their targets, norms, masks and orthogonal bases."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VARIANTS, build

from llmprune.gating_scores import (
    EDGES,
    LENGTH,
    Curve,
    ScoreHistogram,
    channel_thresholds,
    column_norms,
    drop,
    feeding_norm,
    gate_norms,
    histogram,
    orthogonal_basis,
    rotated,
)
from llmprune.models import Skeleton

CPU = torch.device("cpu")


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def counted(scores):
    return Curve(histogram(torch.as_tensor(scores, dtype=torch.float32)))


def kept(inputs, threshold, norm_I):
    return drop(inputs, channel_thresholds(threshold, norm_I)) != 0


def top(scores, count):
    """Keep masks of the highest scores of every row, of equal ones the first: what a threshold is an approximation of."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, scores.argsort(dim=-1, descending=True, stable=True)[..., :count], True)


def lost(inputs, keep, weight_OI):
    return ((inputs * ~keep) @ weight_OI.T).square().sum(dim=-1)


def orthogonal_columns(outputs, inputs, seed=0):
    """A matrix with orthogonal columns of all sizes, float64."""
    basis_OI = torch.linalg.qr(noise(outputs, inputs, seed=seed, dtype=torch.float64)).Q
    return basis_OI * noise(inputs, seed=seed + 1, dtype=torch.float64).exp()


@given(st.lists(st.floats(0, 2.0**127, width=32, allow_subnormal=False), min_size=1, max_size=40))
def test_every_score_is_counted_in_the_bin_whose_edges_hold_it(scores):
    found = histogram(torch.tensor(scores, dtype=torch.float32))
    expected = np.zeros(LENGTH, dtype=np.int64)
    for score in np.array(scores, dtype=np.float32):
        expected[0 if score == 0 else np.searchsorted(EDGES[2:-1], score, side="right") + 1] += 1
    assert found.tolist() == expected.tolist()
    assert (np.diff(EDGES[1:]) > 0).all()


@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(1, 3), min_size=3, max_size=3), rotate=st.booleans())
@settings(max_examples=20, deadline=None)
def test_histograms_of_any_split_add_up_to_that_of_the_whole(seed, cuts, rotate):
    inputs = noise(sum(cuts), 7, 5, seed=seed)
    basis_II = noise(5, 5, seed=1) if rotate else None

    def seen(part):
        statistic = ScoreHistogram(5, CPU, noise(5, seed=2).abs(), basis_II)
        statistic.update(part)
        return statistic

    whole, merged = seen(inputs), seen(inputs[:0])
    for part in reversed(inputs.split(cuts)):
        merged.merge(seen(part))
    for one, other in zip(whole.sums(), merged.sums(), strict=True):
        assert torch.equal(one, other)
    assert int(whole.counts.sum()) == inputs.numel()


def test_parts_of_a_large_sample_are_all_counted(monkeypatch):
    inputs = noise(2, 33, 5)
    whole = ScoreHistogram(5, CPU)
    whole.update(inputs)
    monkeypatch.setattr("llmprune.gating_scores.PART", 20)
    parts = ScoreHistogram(5, CPU)
    parts.update(inputs)
    assert torch.equal(whole.counts, parts.counts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_noticed(value):
    inputs = noise(1, 3, 4)
    statistic = ScoreHistogram(4, CPU, torch.ones(4))
    statistic.update(inputs)
    assert statistic.is_finite()
    inputs[0, 1, 2] = value
    statistic.update(inputs)
    assert not statistic.is_finite()


@pytest.mark.parametrize("draw", ["normal", "exponential", "heavy", "bimodal"])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.65, 0.9, 0.99])
def test_a_threshold_drops_the_share_that_it_is_asked_for(draw, share):
    numbers = noise(40_000, seed=3)
    scores = {
        "normal": numbers.abs(),
        "exponential": numbers.abs().square(),
        "heavy": numbers.mul(3).exp(),
        "bimodal": torch.where(numbers > 0, 1 + numbers, 1e-3 * (1 - numbers)),
    }[draw]
    curve = counted(scores)
    threshold = curve.threshold(share)
    # What is not known is how scores are spread inside a bin of 64 an octave.
    assert abs(float((scores <= threshold).double().mean()) - share) < 0.003
    assert curve.share(threshold) == pytest.approx(share, abs=1e-12)


def test_a_signed_quantile_misses_what_the_histogram_of_scores_hits():
    """TEAL's right tail: it takes activations for symmetric, and their mean for zero."""
    inputs = noise(40_000, seed=3).square() - 0.3
    tail = float(inputs.quantile(0.5 + 0.5 / 2))
    assert abs(float((inputs.abs() <= tail).double().mean()) - 0.5) > 0.1
    own = counted(inputs.abs()).threshold(0.5)
    assert abs(float((inputs.abs() <= own).double().mean()) - 0.5) < 0.003


def test_zeros_go_for_free_and_more_than_asked_for():
    scores = torch.cat([torch.zeros(70), torch.linspace(1, 2, 30)])
    curve = counted(scores)
    assert curve.zeros == 0.7
    for share in (0.0, 0.25, 0.7):
        assert curve.threshold(share) == 0.0
        assert curve.share(0.0) == 0.7
        assert curve.energy(share) == 0.0
    assert 1 < curve.threshold(0.8) < 2


@given(
    st.lists(st.floats(2.0**-39, 2.0**20, width=32) | st.just(0.0), min_size=1, max_size=30), st.floats(0, 1), st.floats(0, 1)
)
def test_share_and_threshold_undo_each_other_and_rise_together(scores, one, other):
    curve = counted(scores)
    low, high = sorted((one, other))
    assert curve.threshold(low) <= curve.threshold(high)
    assert curve.energy(low) <= curve.energy(high) * (1 + 1e-12)
    assert curve.share(curve.threshold(high)) == pytest.approx(max(high, curve.zeros), abs=1e-9)
    assert curve.share(-1.0) == 0
    # All of them go at share 1, and nothing is left of the largest.
    assert curve.threshold(1.0) >= max(scores)
    assert curve.share(max(scores) * 1.02) == pytest.approx(1.0)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
def test_the_energy_of_a_share_is_that_of_the_smallest_scores(share):
    scores = noise(20_000, seed=5).abs()
    smallest = scores.double().sort().values[: round(share * len(scores))]
    assert counted(scores).energy(share) == pytest.approx(float(smallest.square().sum()) / len(scores), rel=0.01)


@given(st.floats(0.05, 0.95))
def test_the_energy_rises_by_the_squared_threshold(share):
    curve = counted(noise(20_000, seed=5).abs())
    slope = (curve.energy(share + 1e-7) - curve.energy(share - 1e-7)) / 2e-7
    assert slope == pytest.approx(curve.threshold(share) ** 2, rel=0.03)


def test_histograms_of_nothing_drop_nothing():
    curve = counted([])
    assert (curve.zeros, curve.share(1.0), curve.threshold(0.5), curve.energy(0.5)) == (0, 0, 0, 0)


def test_column_norms_are_the_root_of_the_grams_diagonal():
    weight_OI = noise(11, 7) * noise(7, seed=1).exp()
    gram_II = weight_OI.double().T @ weight_OI.double()
    torch.testing.assert_close(column_norms(weight_OI).double(), gram_II.diagonal().sqrt(), rtol=1e-6, atol=0)


def test_masks_follow_columns_and_ignore_the_order_of_rows():
    weight_OI, inputs = noise(11, 7), noise(50, 7, seed=1)
    norm_I, order = column_norms(weight_OI), torch.randperm(7, generator=torch.Generator().manual_seed(2))
    keep = kept(inputs, 2.0, norm_I)
    assert torch.equal(kept(inputs, 2.0, column_norms(weight_OI.flip(0))), keep)
    assert torch.equal(kept(inputs[:, order], 2.0, column_norms(weight_OI[:, order])), keep[:, order])


def test_equal_norms_give_teals_mask():
    inputs = noise(50, 7)
    norm_I = torch.full((7,), 3.0)
    assert torch.equal(kept(inputs, 3 * 0.6, norm_I), kept(inputs, 0.6, torch.ones(7)))


def test_rescaled_channels_change_teals_mask_and_not_winas():
    weight_OI, inputs = noise(11, 7), noise(200, 7, seed=1)
    # Powers of two leave every bit of a mantissa as it is.
    scale_I = 2.0 ** torch.tensor([-3, -1, 0, 0, 1, 2, 4])
    keep = kept(inputs, 2.0, column_norms(weight_OI))
    assert torch.equal(kept(inputs * scale_I, 2.0, column_norms(weight_OI / scale_I)), keep)
    assert not torch.equal(kept(inputs * scale_I, 0.6, torch.ones(7)), kept(inputs, 0.6, torch.ones(7)))


def test_shared_norms_are_those_of_the_stacked_matrix():
    one_OI, other_OI = noise(11, 7), noise(4, 7, seed=1)
    stacked_I = column_norms(torch.cat([one_OI, other_OI]))
    torch.testing.assert_close(gate_norms([("q", one_OI), ("k", other_OI)], "wina"), stacked_I, rtol=1e-6, atol=0)


def test_only_k_and_gate_have_norms_where_the_published_code_is_followed():
    weight_OI = noise(11, 7)
    for role in ("q", "v", "o", "up", "down"):
        assert torch.equal(gate_norms([(role, weight_OI)], "wina-released"), torch.ones(7))
    for role in ("k", "gate", "qkv", "gate_up"):
        assert torch.equal(gate_norms([(role, weight_OI)], "wina-released"), column_norms(weight_OI))
        assert torch.equal(gate_norms([(role, weight_OI)], "teal"), torch.ones(7))


def test_what_is_dropped_is_at_or_below_the_threshold_and_nothing_else():
    inputs = torch.tensor([[0.5, -0.5, 0.6, 0.0, float("inf"), float("nan")]])
    dropped = drop(inputs, channel_thresholds(1.0, torch.full((6,), 2.0)))
    assert dropped.tolist()[0][:5] == [0.0, 0.0, pytest.approx(0.6), 0.0, float("inf")]
    assert dropped[0, 5].isnan()
    unchanged = drop(inputs[:, :4], channel_thresholds(0.0, torch.ones(4)))
    assert torch.equal(unchanged, inputs[:, :4])


def test_a_column_of_zeros_is_never_read_unless_everything_is():
    norm_I = torch.tensor([1.0, 0.0, 1e-45])
    assert channel_thresholds(0.0, norm_I).tolist() == [0.0, float("inf"), 0.0]
    assert channel_thresholds(2.0, norm_I).tolist()[1] == float("inf")
    assert channel_thresholds(-1.0, norm_I).tolist() == [-1.0] * 3


def test_channel_thresholds_agree_with_products_but_within_rounding_of_the_threshold():
    inputs, norm_I = noise(1000, 100), noise(100, seed=1).abs()
    scores = inputs.abs().double() * norm_I.double()
    keep = kept(inputs, 0.3, norm_I)
    sure = (scores / 0.3 - 1).abs() > 1e-6
    assert torch.equal(keep[sure], (scores > 0.3)[sure])
    assert sure.double().mean() > 0.999


def test_with_orthogonal_columns_winas_error_is_the_least_of_all_masks_and_at_most_teals():
    weight_OI = orthogonal_columns(12, 8)
    inputs = noise(1000, 8, dtype=torch.float64)
    scores = inputs.abs() * weight_OI.norm(dim=0)
    for count in (2, 4, 7):
        keep = top(scores, count)
        error = lost(inputs, keep, weight_OI)
        assert (error <= lost(inputs, top(inputs.abs(), count), weight_OI) * (1 + 1e-9)).all()
        torch.testing.assert_close(error, (scores * ~keep).square().sum(dim=-1), rtol=1e-10, atol=1e-12)
        masks = torch.zeros(0, 8, dtype=torch.bool)
        for chosen in itertools.combinations(range(8), count):
            masks = torch.cat([masks, torch.zeros(1, 8, dtype=torch.bool).index_fill(1, torch.tensor(chosen), True)])
        least = torch.stack([lost(inputs[:50], mask, weight_OI) for mask in masks]).amin(dim=0)
        torch.testing.assert_close(error[:50], least, rtol=1e-9, atol=1e-12)


def test_orthonormal_columns_make_wina_and_teal_one():
    weight_OI = torch.linalg.qr(noise(12, 8, dtype=torch.float64)).Q
    inputs = noise(300, 8, seed=4)
    keep = kept(inputs, 0.7, column_norms(weight_OI))
    sure = (inputs.abs() - 0.7).abs() > 1e-6
    assert torch.equal(keep[sure], kept(inputs, 0.7, torch.ones(8))[sure])


def test_norms_pay_on_average_where_columns_differ_and_are_a_coin_toss_where_they_do_not():
    inputs = noise(1000, 64)
    heavy_OI = noise(96, 64, seed=1) * noise(64, seed=2).exp()
    plain_OI = noise(96, 64, seed=3)

    def ratio(weight_OI):
        wina = lost(inputs, top(inputs.abs() * column_norms(weight_OI), 32), weight_OI).mean()
        return float(wina / lost(inputs, top(inputs.abs(), 32), weight_OI).mean())

    assert ratio(heavy_OI) < 0.9
    assert ratio(plain_OI) == pytest.approx(1, abs=0.02)


def test_masks_of_rising_thresholds_are_nested_and_errors_rise_with_them():
    weight_OI = orthogonal_columns(12, 8)
    inputs = noise(300, 8)
    norm_I = column_norms(weight_OI)
    curve = counted(inputs.abs() * norm_I)
    before, error = torch.ones(300, 8, dtype=torch.bool), torch.zeros(300, dtype=torch.float64)
    for share in (0.1, 0.3, 0.5, 0.9):
        keep = kept(inputs, curve.threshold(share), norm_I)
        assert not (keep & ~before).any()
        more = lost(inputs.double(), keep, weight_OI)
        assert (more >= error * (1 - 1e-9)).all()
        before, error = keep, more


@pytest.mark.parametrize("gain", ["none", "random", "with zeros"])
def test_a_basis_makes_the_columns_of_a_stack_orthogonal_and_changes_no_output(gain):
    weights = [noise(9, 12), noise(5, 12, seed=1)]
    gain_I = None if gain == "none" else noise(12, seed=2).exp()
    if gain == "with zeros":
        gain_I[3] = 0
    basis_II = orthogonal_basis(weights, gain_I)
    turned = [rotated(weight_OI, basis_II) for weight_OI in weights]
    gram_II = sum(turned_OI.double().T @ turned_OI.double() for turned_OI in turned)
    off_II = gram_II - gram_II.diagonal().diag()
    assert off_II.norm() < 1e-5 * gram_II.norm()
    assert (gram_II.diagonal().diff() <= 1e-5 * gram_II.max()).all()
    normed = noise(20, 12, seed=3)
    inputs = normed if gain_I is None else normed * gain_I
    for weight_OI, turned_OI in zip(weights, turned, strict=True):
        torch.testing.assert_close(inputs @ basis_II @ turned_OI.T, inputs @ weight_OI.T, rtol=1e-3, atol=1e-4)
    if gain != "with zeros":
        # A rotation: what is gated is as long as what the norm made.
        torch.testing.assert_close((inputs @ basis_II).norm(dim=1), normed.norm(dim=1), rtol=1e-4, atol=0)


def test_norms_in_a_basis_are_singular_values_and_as_many_as_the_rank():
    weight_OI = noise(5, 12)
    turned_OI = rotated(weight_OI, orthogonal_basis([weight_OI], None))
    norm_I = column_norms(turned_OI)
    torch.testing.assert_close(norm_I[:5], torch.linalg.svdvals(weight_OI), rtol=1e-5, atol=0)
    assert norm_I[5:].tolist() == [0.0] * 7


def test_a_matrix_of_low_rank_loses_nothing_in_its_basis_until_its_rank_is_cut():
    weight_OI, inputs = noise(5, 12), noise(200, 12, seed=1)
    basis_II = orthogonal_basis([weight_OI], None)
    turned_OI = rotated(weight_OI, basis_II)
    norm_I, turned = column_norms(turned_OI), inputs @ basis_II
    curve = counted(turned.abs() * norm_I)
    assert curve.zeros == pytest.approx(7 / 12)
    for share, lossless in ((0.5, True), (7 / 12, True), (0.7, False)):
        output = drop(turned, channel_thresholds(curve.threshold(share), norm_I)) @ turned_OI.T
        assert torch.allclose(output, inputs @ weight_OI.T, rtol=1e-4, atol=1e-4) == lossless


def test_a_basis_does_not_depend_on_the_sign_that_a_library_gives_an_eigenvector(monkeypatch):
    weight_OI = noise(9, 6)
    once_II = orthogonal_basis([weight_OI], None)
    eigh = torch.linalg.eigh

    class Flipped:
        def __init__(self, matrix):
            self.eigenvectors = eigh(matrix).eigenvectors * torch.tensor([1, -1, -1, 1, -1, 1])

    monkeypatch.setattr(torch.linalg, "eigh", Flipped)
    assert torch.equal(orthogonal_basis([weight_OI], None), once_II)
    assert (once_II.gather(0, once_II.abs().argmax(dim=0, keepdim=True)) > 0).all()


@pytest.fixture(
    scope="module", params=["llama", "gemma2", "gemma3_text", "olmo2", "phi3", "opt", "opt_norm_after", "gpt_neox", "gpt2"]
)
def loaded(request, tmp_path_factory):
    folder = build(request.param, tmp_path_factory.mktemp(request.param))
    skeleton = Skeleton(folder)
    names = skeleton.stored_names
    skeleton.fill_block(1, {name: skeleton.checkpoint.read(names[name]) for name in skeleton.block_parameters(1)})
    return request.param, skeleton


def test_the_gain_of_the_norm_that_feeds_a_linear_is_found_in_every_family(loaded):
    """Where the norm is replaced by one without a gain, what the linear reads is divided by the gain that was found."""
    variant, skeleton = loaded
    assert variant in VARIANTS
    for role, linear in {linear.role: linear for linear in skeleton.linears[1]}.items():
        gain_I = feeding_norm(skeleton.blocks[1], role)
        if role in ("o", "down") or variant in ("opt_norm_after", "olmo2"):
            assert gain_I is None
            continue
        norms = {
            name: module
            for name, module in skeleton.blocks[1].named_modules()
            if "norm" in type(module).__name__.lower() and module.weight.shape == (linear.shape[1],)
        }
        gains = [1 + norm.weight if variant.startswith("gemma") else norm.weight for norm in norms.values()]
        # Recorded from the block's own forward: the norm whose output object the linear reads.
        source = fed_by(skeleton, linear, norms)
        index = list(norms).index(source)
        assert torch.equal(gain_I, gains[index].float())


def fed_by(skeleton, linear, norms):
    """The name of the norm whose output a linear reads, as the block's forward shows."""
    block = skeleton.blocks[1]
    made, found = {}, []
    handles = [
        norm.register_forward_hook(lambda module, args, output, name=name: made.update({name: output.clone()}))
        for name, norm in norms.items()
    ]
    handles.append(linear.module.register_forward_pre_hook(lambda module, args: found.append(args[0].clone())))
    ids = torch.arange(6)[None] + 5
    caught = {}

    def record(*args, **kwargs):
        caught["call"] = args, kwargs
        raise StopIteration

    first = skeleton.blocks[0]
    first.forward = record
    skeleton.fill_outer(head=False)
    try:
        skeleton.model.base_model(input_ids=ids, use_cache=False)
    except StopIteration:
        pass
    finally:
        del first.forward
        skeleton.empty_outer()
    args, kwargs = caught["call"]
    with torch.no_grad():
        block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return next(name for name, output in made.items() if torch.equal(output.reshape(found[0].shape), found[0]))
