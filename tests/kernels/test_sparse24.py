"""Packed 2:4 weights: no value is lost, every nibble is legal, and the layouts are those of the hardware and of torch."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.kernels.sparse24 import (
    DTYPES,
    Packed24,
    check24,
    from_compressed_tensors,
    from_cutlass,
    mask24,
    pack24,
    part_shapes,
    to_cutlass,
)

LEGAL = (4, 8, 9, 12, 13, 14)
LAYOUTS = ["simple", "fragment", "vector"]


def random24(outputs, inputs, dtype=torch.float32, seed=0):
    weight_OI = torch.randn((outputs, inputs), generator=torch.Generator().manual_seed(seed))
    return (weight_OI * mask24(weight_OI)).to(dtype)


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


def nibbles(packed):
    """In the simple layout, one by one."""
    words = packed.to_layout("simple").meta.long() & 0xFFFF
    return [int(word) >> shift & 15 for word in words.flatten() for shift in (0, 4, 8, 12)]


# Places of a group's values, the values, and the zero beside them.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.nan, 6e-8])
GROUPS = st.tuples(
    st.sampled_from([(), (0,), (3,), (0, 1), (0, 3), (1, 2), (2, 3)]), VALUES, VALUES, st.sampled_from([0.0, -0.0])
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(row=st.lists(GROUPS, min_size=12, max_size=12))
@settings(max_examples=25, deadline=None)
def test_what_is_packed_comes_back_bit_by_bit_but_for_the_sign_of_zero(dtype, row):
    weight_OI = torch.empty(1, 48, dtype=dtype)
    for group, (places, first, second, zero) in enumerate(row):
        weight_OI[0, 4 * group : 4 * group + 4] = zero
        for place, value in zip(places, (first, second), strict=False):
            weight_OI[0, 4 * group + place] = value
    packed = pack24(weight_OI)
    expected_OI = bits(weight_OI).masked_fill(weight_OI == 0, 0)
    for layout in ("simple", "vector"):
        assert torch.equal(bits(packed.to_layout(layout).to_dense()), expected_OI)
    assert set(nibbles(packed)) <= set(LEGAL)


def test_simple_words_and_meta_are_as_described():
    weight_OI = torch.zeros(1, 32, dtype=torch.float16)
    # Groups 0 (none), 1 (one, at 3), 2 (two, at 1 and 2), 5 (one, at 0).
    for place, value in ((7, 1.0), (9, 2.0), (10, -3.0), (20, 4.0)):
        weight_OI[0, place] = value
    packed = pack24(weight_OI)
    half = lambda value: int(torch.tensor(value, dtype=torch.float16).view(torch.int16)) & 0xFFFF  # noqa: E731
    words = [int(word) & 0xFFFFFFFF for word in packed.words[0]]
    assert words == [0, half(1.0) << 16, half(2.0) | half(-3.0) << 16, 0, 0, half(4.0), 0, 0]
    # The nonzeros' places and the lowest others; the first group in the low bits.
    assert nibbles(packed) == [0 | 1 << 2, 0 | 3 << 2, 1 | 2 << 2, 4, 4, 0 | 1 << 2, 4, 4]
    assert int(packed.meta[0, 0]) & 0xFFFF == 4 | 12 << 4 | 9 << 8 | 4 << 12


def test_fragment_words_and_meta_are_where_the_tensor_core_looks():
    packed = pack24(random24(32, 128, torch.bfloat16))
    fragment = packed.to_layout("fragment")
    values, codes = packed.words.view(torch.bfloat16), packed.meta.to(torch.int32) & 0xFFFF
    for tile in range(2):
        for step in range(4):
            for lane in range(32):
                g, t = lane >> 2, lane & 3
                held = fragment.words[tile, step, lane].contiguous().view(torch.bfloat16)
                for register in range(4):
                    row, column = 16 * tile + g + 8 * (register & 1), 16 * step + 2 * t + 8 * (register >> 1)
                    assert torch.equal(held[2 * register : 2 * register + 2], values[row, column : column + 2])
                h, p = step & 1, lane & 1
                if t >> 1 == h:
                    word = int(fragment.meta[tile, step // 2, lane]) & 0xFFFFFFFF
                    low, high = (int(codes[16 * tile + g + 8 * half, 2 * step + p]) for half in (0, 1))
                    assert word == low | high << 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_vector_words_and_meta_are_where_registers_look(dtype):
    weight_OI = random24(6, 48, dtype)
    packed = pack24(weight_OI, "vector")
    padded_OI = torch.zeros(8, 64, dtype=dtype)
    padded_OI[:6, :48] = weight_OI
    expected = pack24(padded_OI)
    values_OG2 = expected.words.view(dtype).reshape(8, 16, 2)
    found = packed.words.view(dtype).reshape(2, 2, 4, -1)
    for block in range(2):
        for step in range(2):
            for pair in range(4):
                for half in range(2):
                    for row in range(4):
                        kept = values_OG2[4 * block + row, 8 * step + pair + 4 * half]
                        lane = 4 * half + row
                        both = found[block, step, pair]
                        held = both[2 * lane : 2 * lane + 2] if dtype.itemsize == 2 else both[[lane, 8 + lane]]
                        assert torch.equal(held, kept)
    real = expected.meta.view(torch.int32).reshape(2, 4, 2).permute(0, 2, 1)[0, 0]
    assert torch.equal(packed.meta[0, 0], real)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_weight_and_the_bytes_it_says(layout, dtype):
    if layout == "fragment" and dtype == torch.float32:
        pytest.skip("it holds values of 16 bits")
    weight_OI = random24(32, 128, dtype)
    packed = pack24(weight_OI, layout)
    assert torch.equal(packed.to_dense(), weight_OI)
    assert packed.nbytes == weight_OI.nbytes // 2 + weight_OI.numel() // 8
    words, meta, meta_dtype = part_shapes((32, 128), dtype, layout)
    assert (tuple(packed.words.shape), tuple(packed.meta.shape), packed.meta.dtype) == (words, meta, meta_dtype)
    for other in LAYOUTS:
        if other != "fragment" or dtype != torch.float32:
            again = packed.to_layout(other).to_layout(layout)
            assert torch.equal(again.words, packed.words)
            assert torch.equal(again.meta, packed.meta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_cutlass_form_is_what_torch_makes_and_reads(dtype):
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    weight_OI = random24(64, 192, dtype)
    values, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight_OI)
    packed = pack24(weight_OI)
    our_values, our_meta = to_cutlass(packed)
    assert torch.equal(our_values, values)
    assert torch.equal(our_meta.flatten(), meta.flatten())
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(our_values, our_meta), weight_OI)
    back = from_cutlass(values, meta)
    assert torch.equal(back.words, packed.words)
    assert torch.equal(back.meta, packed.meta)


def test_the_cutlass_form_decodes_alike_where_groups_are_padded_in_another_way():
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    weight_OI = random24(32, 64, torch.float16)
    weight_OI[:, ::3] = 0
    weight_OI[3:9] = 0
    values, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight_OI)
    assert torch.equal(from_cutlass(values, meta).to_dense(), weight_OI)
    ours = to_cutlass(pack24(weight_OI, "fragment"))
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(*ours), weight_OI)


def test_what_compressed_tensors_wrote_is_read():
    weight_OI = random24(6, 32, torch.bfloat16)
    kept_OI = weight_OI != 0
    bitmask_OB = torch.zeros(6, 4, dtype=torch.uint8)
    for column in range(32):
        bitmask_OB[:, column // 8] |= kept_OI[:, column].to(torch.uint8) << column % 8
    assert torch.equal(from_compressed_tensors(weight_OI[kept_OI], bitmask_OB, (6, 32)).to_dense(), weight_OI)
    with pytest.raises(ValueError, match="does not belong to 95 values"):
        from_compressed_tensors(weight_OI[kept_OI][:-1], bitmask_OB, (6, 32))


def test_the_mask_keeps_the_two_best_of_four_and_ties_keep_the_lower_index():
    weight_OI = torch.tensor([[1.0, -3.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0, torch.nan, 5.0, 7.0]])
    assert mask24(weight_OI).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1]]
    score_OI = torch.tensor([[4.0, 3.0, 2.0, 1.0] * 3])
    assert mask24(weight_OI, score_OI).int().tolist() == [[1, 1, 0, 0] * 3]


@pytest.mark.parametrize("value", [1.0, -1.0, torch.nan, torch.inf, 6e-8])
def test_a_third_nonzero_in_a_group_is_refused_with_its_row_and_group(value):
    weight_OI = torch.zeros(5, 32, dtype=torch.float16)
    weight_OI[2, 12:15] = value
    weight_OI[3, 0:4] = 1
    with pytest.raises(ValueError, match=r"row 2, group 3 \(inputs 12 to 15\) has 3 nonzeros, and 2 of 40 groups"):
        check24(weight_OI)
    with pytest.raises(ValueError, match="row 2, group 3"):
        pack24(weight_OI)


def test_negative_zeros_do_not_count():
    weight_OI = torch.full((2, 16), -0.0)
    check24(weight_OI)
    assert bits(pack24(weight_OI).to_dense()).eq(0).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "said"),
    [
        ((3, 20), torch.float32, "simple", r"a multiple of 16 inputs, and this weight is \[3, 20\]"),
        ((3, 20), torch.float32, "vector", r"a multiple of 16 inputs, and this weight is \[3, 20\]"),
        ((8, 64), torch.float16, "fragment", "a multiple of 16 outputs and a multiple of 64 inputs"),
        ((16, 32), torch.float16, "fragment", "a multiple of 64 inputs"),
        ((16, 64), torch.float32, "fragment", "holds bfloat16 or float16, not float32"),
        ((16, 64), torch.float64, "simple", "holds float32, bfloat16 or float16, not float64"),
        ((16, 64), torch.float16, "spiral", "Unknown layout 'spiral': use one of simple, fragment, vector"),
        ((3, 18), torch.float32, "simple", "a multiple of 4 inputs"),
        ((64,), torch.float32, "simple", "a multiple of 4 inputs"),
    ],
)
def test_what_no_layout_takes_is_refused(shape, dtype, layout, said):
    with pytest.raises(ValueError, match=said):
        pack24(torch.zeros(shape, dtype=dtype), layout)


def test_parts_that_do_not_belong_together_are_refused():
    packed = pack24(random24(4, 32))
    with pytest.raises(
        ValueError, match=r"The words of a packed float32 weight \[4, 64\] in the simple layout are int32 \[4, 32\]"
    ):
        Packed24(packed.words, packed.meta, (4, 64), torch.float32)
    with pytest.raises(ValueError, match="The meta of a packed"):
        Packed24(packed.words, packed.meta.int(), (4, 32), torch.float32)
    with pytest.raises(ValueError, match="multiple of 32 outputs"):
        to_cutlass(pack24(random24(16, 64, torch.float16)))
    with pytest.raises(ValueError, match="positions of CUTLASS"):
        from_cutlass(torch.zeros(32, 32, dtype=torch.float16), torch.zeros(32, 5, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"The score is \[4, 16\]"):
        mask24(torch.zeros(4, 32), torch.zeros(4, 16))


def test_packing_says_nothing_of_overflow():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pack24(random24(2, 16), dtype=torch.bfloat16).dtype == torch.bfloat16
