"""Each method on one layer: against a slow reference, against the published codes' masks, and by its laws."""

import pytest
import torch
from reference import sparsegpt, wanda_removed, wanda_removed_nm
from safetensors.torch import load_file

from llmprune.methods.sparsegpt import inverse_factor, solve
from llmprune.patterns import NM, Pattern, Unstructured
from llmprune.statistics import Hessian, InputNorm

CPU = torch.device("cpu")
GOLDEN = ["tiny_64x48", "smollm2_l5_k_proj_192x576"]
AMOUNTS = ["0.5", "0.6", "0.7", "2:4", "4:8"]


def observed(kind, inputs_NTI):
    statistic = kind(inputs_NTI.shape[-1], CPU)
    statistic.update(inputs_NTI)
    return statistic


def pattern_of(amount: str, group: str = "row") -> Pattern:
    return NM(*map(int, amount.split(":"))) if ":" in amount else Unstructured(float(amount), group)


def our_wanda(weight_OI, inputs_NTI, pattern):
    return ~pattern.keep(weight_OI.abs() * observed(InputNorm, inputs_NTI).rms_I)


def our_sparsegpt(weight_OI, inputs_NTI, pattern):
    return solve(weight_OI, inverse_factor(observed(Hessian, inputs_NTI).mean_II), pattern)


def layer(rows, columns, tokens=200, seed=0, outliers=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(2, tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    if outliers:
        inputs *= torch.exp(torch.randn(columns, generator=generator))
    return weight, inputs


@pytest.fixture(scope="module", params=GOLDEN)
def golden(request, data_dir):
    return load_file(data_dir / "golden" / f"{request.param}.safetensors")


@pytest.mark.parametrize("amount", AMOUNTS)
def test_wanda_masks_equal_the_published_codes(golden, amount):
    removed = our_wanda(golden["W"], golden["X"], pattern_of(amount))
    # The recorded masks mark every zero, and dequantised weights hold zeros of their own.
    natural = golden["W"] == 0
    assert torch.equal(removed | natural, golden[f"mask.wanda_{amount}"].bool() | natural)


@pytest.mark.parametrize("amount", ["0.5", "0.6", "0.7"])
def test_magnitude_masks_equal_the_published_codes_but_for_their_extra_weights(golden, amount):
    removed = ~pattern_of(amount, "layer").keep(golden["W"].abs())
    theirs = golden[f"mask.magnitude_{amount}"].bool()
    assert not (removed & ~theirs).any()
    # Their threshold is inclusive: what they remove beyond our count has the threshold's own magnitude.
    assert golden["W"].abs()[theirs & ~removed].unique().numel() == 1


@pytest.mark.parametrize("amount", ["2:4", "4:8"])
def test_magnitude_nm_keeps_as_much_as_the_published_codes(golden, amount):
    keep = pattern_of(amount).keep(golden["W"].abs())
    theirs = ~golden[f"mask.magnitude_{amount}"].bool()
    # Ties are resolved differently, so compare what is kept and not which.
    torch.testing.assert_close(golden["W"].abs()[keep].sum(), golden["W"].abs()[theirs].sum())


@pytest.mark.parametrize("amount", AMOUNTS)
def test_the_sparsegpt_reference_equals_the_published_code(golden, amount):
    if ":" in amount:
        weight, removed = sparsegpt(golden["W"], golden["X"].flatten(0, 1), nm=tuple(map(int, amount.split(":"))))
    else:
        weight, removed = sparsegpt(golden["W"], golden["X"].flatten(0, 1), sparsity=float(amount), extra=1)
    theirs = golden[f"mask.sparsegpt_{amount}"].bool()
    # Rounding decides 1 to 9 of 110,592 near-ties on the real layer, and each changes a few weights after it.
    assert (removed ^ theirs).sum() <= 2e-4 * theirs.numel()
    close = (weight - golden[f"Wout.sparsegpt_{amount}"]).abs() < 1e-3 * golden["W"].abs().max()
    assert close.float().mean() > 0.999


@pytest.mark.parametrize("amount", AMOUNTS)
def test_sparsegpt_equals_its_reference(golden, amount):
    ours = our_sparsegpt(golden["W"], golden["X"], pattern_of(amount, "layer"))
    options = {"nm": tuple(map(int, amount.split(":")))} if ":" in amount else {"sparsity": float(amount)}
    weight, removed = sparsegpt(golden["W"], golden["X"].flatten(0, 1), **options)
    assert ((ours == 0) ^ removed).sum() <= 2e-4 * removed.numel()
    close = (ours - weight).abs() < 1e-3 * golden["W"].abs().max()
    assert close.float().mean() > 0.999


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 123), (64, 300)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_methods_equal_their_references_on_odd_shapes(shape, sparsity):
    weight, inputs = layer(*shape)
    assert torch.equal(our_wanda(weight, inputs, Unstructured(sparsity)), wanda_removed(weight, inputs.flatten(0, 1), sparsity))
    expected, removed = sparsegpt(weight, inputs.flatten(0, 1), sparsity=sparsity)
    ours = our_sparsegpt(weight, inputs, Unstructured(sparsity, "layer"))
    assert torch.equal(ours == 0, removed)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (3, 4), (4, 8), (5, 12)])
def test_nm_methods_equal_their_references(nm):
    weight, inputs = layer(6, 240)
    assert torch.equal(our_wanda(weight, inputs, NM(*nm)), wanda_removed_nm(weight, inputs.flatten(0, 1), *nm))
    # A block holds whole groups: 120 columns for groups of 12.
    columns = 128 // nm[1] * nm[1]
    expected, removed = sparsegpt(weight, inputs.flatten(0, 1), nm=nm, columns=columns)
    ours = our_sparsegpt(weight, inputs, NM(*nm))
    assert torch.equal(ours == 0, removed)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=2e-3)


def test_wanda_ignores_the_scale_of_rows_and_moves_with_the_scale_of_columns():
    weight, inputs = layer(8, 40)
    pattern = Unstructured(0.5)
    masks = our_wanda(weight, inputs, pattern)
    rows, columns = 2.0 ** torch.randint(-3, 4, (8, 1)), 2.0 ** torch.randint(-3, 4, (40,))
    assert torch.equal(masks, our_wanda(weight * rows, inputs, pattern))
    assert torch.equal(masks, our_wanda(weight * columns, inputs / columns, pattern))


def test_with_equal_input_norms_wanda_is_magnitude_per_row():
    weight, _ = layer(8, 32)
    inputs = torch.eye(32)[None] * 3
    assert torch.equal(our_wanda(weight, inputs, Unstructured(0.5)), ~Unstructured(0.5).keep(weight.abs()))


def test_permuting_rows_permutes_the_result():
    weight, inputs = layer(9, 64)
    order = torch.randperm(9)
    assert torch.equal(our_wanda(weight, inputs, Unstructured(0.5))[order], our_wanda(weight[order], inputs, Unstructured(0.5)))
    torch.testing.assert_close(our_sparsegpt(weight, inputs, NM(2, 4))[order], our_sparsegpt(weight[order], inputs, NM(2, 4)))


def test_pruning_again_with_the_same_statistics_changes_nothing():
    weight, inputs = layer(8, 40)
    removed = our_wanda(weight, inputs, Unstructured(0.5))
    assert torch.equal(removed, our_wanda(weight.masked_fill(removed, 0), inputs, Unstructured(0.5)))


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "layer"), NM(2, 4)], ids=str)
def test_reconstruction_order_is_sparsegpt_wanda_magnitude(golden, pattern):
    weight, inputs = golden["W"], golden["X"].flatten(0, 1)
    wanda = weight.masked_fill(our_wanda(weight, golden["X"], pattern), 0)
    magnitude = weight * pattern.keep(weight.abs())
    errors = [
        (inputs @ (new - weight).T).square().sum() for new in (our_sparsegpt(weight, golden["X"], pattern), wanda, magnitude)
    ]
    assert errors[0] < errors[1] < errors[2]


def test_updating_kept_weights_beats_the_same_mask_without_update():
    weight, inputs = layer(16, 60)
    updated = our_sparsegpt(weight, inputs, Unstructured(0.5, "layer"))
    masked = weight * (updated != 0)
    flat = inputs.flatten(0, 1)
    assert (flat @ (updated - weight).T).square().sum() < (flat @ (masked - weight).T).square().sum()


def test_inverse_factor_is_upper_and_inverts_the_damped_hessian():
    _, inputs = layer(1, 50)
    mean_II = observed(Hessian, inputs).mean_II
    factor = inverse_factor(mean_II)
    assert torch.equal(factor, factor.triu())
    damped = mean_II + 0.01 * mean_II.diagonal().mean() * torch.eye(50)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(50), rtol=0, atol=2e-3)


def test_sparsegpt_leaves_its_argument_alone_even_if_it_is_a_transposed_view():
    weight, inputs = layer(6, 40)
    stored_IO = weight.T.contiguous()
    our_sparsegpt(stored_IO.T, inputs, Unstructured(0.5, "layer"))
    assert torch.equal(stored_IO.T, weight)


def test_fewer_tokens_than_inputs_give_finite_weights():
    weight, inputs = layer(4, 80, tokens=5)
    assert our_sparsegpt(weight, inputs, Unstructured(0.5, "layer")).isfinite().all()


def test_inputs_that_were_always_zero_lose_their_weights_first():
    weight, inputs = layer(4, 40)
    inputs[..., [3, 20]] = 0
    pruned = our_sparsegpt(weight, inputs, Unstructured(0.5, "layer"))
    assert (pruned[:, [3, 20]] == 0).all()
    assert (pruned == 0).sum() == 80


def test_all_zero_inputs_prune_by_magnitude_and_update_nothing():
    weight, inputs = layer(4, 16)
    pruned = our_sparsegpt(weight, inputs * 0, Unstructured(0.5, "layer"))
    keep = Unstructured(0.5, "layer").keep(weight.abs())
    torch.testing.assert_close(pruned, weight * keep)
