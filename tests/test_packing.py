"""Packed matrices: every bit comes back, the bytes are as documented, damage is an error."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmprune import packing
from llmprune.checkpoint import Checkpoint, read_header
from llmprune.errors import LLMPruneError
from llmprune.kernels.sparse24 import Packed24, mask24, pack24
from llmprune.packing import PLACES, config_as_stored, described, fit, pack, parts, unpack

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# +0.0 most often; -0.0, infinities and NaN of several kinds among the rest.
BITS_16 = [0, 0, 0, 0x8000, 1, 0x3F80, 0xBF81, 0x7F80, 0x7FC1, 0xFFFF]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.dtype.itemsize])


def matrix(rows: list[list[int]], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """From bits of 16-bit floats."""
    return torch.tensor([[b - (1 << 16) if b >> 15 else b for b in row] for row in rows], dtype=torch.int16).view(dtype)


def reference(weight: torch.Tensor, format: str) -> tuple[list[int], list[int]]:
    """The bits of the kept values, and the numbers that say where they are, one after the other."""
    flat = bits(weight).flatten().tolist()
    if format == "bitmask":
        places = [0] * -(-len(flat) // 8)
        for index, value in enumerate(flat):
            places[index // 8] |= bool(value) << index % 8
        return [value for value in flat if value], places
    values, nibbles = [], []
    for start in range(0, len(flat), 4):
        kept = [place for place in range(4) if flat[start + place]]
        free = [place for place in range(4) if place not in kept]
        first, second = sorted((kept + free)[:2])
        values += [flat[start + first], flat[start + second]]
        nibbles.append(first | second << 2)
    words = [sum(nibble << 4 * place for place, nibble in enumerate(nibbles[i : i + 4])) for i in range(0, len(nibbles), 4)]
    return values, [word - (1 << 16) if word >> 15 else word for word in words]


# Drawn as bytes, which is several times faster than as lists of numbers.


def from_bytes(drawn: bytes, columns: int) -> torch.Tensor:
    """A matrix of 16-bit floats, at least one row of it: every byte is a weight."""
    weights = [BITS_16[byte % len(BITS_16)] for byte in drawn]
    return matrix([weights[start : start + columns] for start in range(0, len(weights) - columns + 1, columns)])


def sparse24(drawn: bytes, columns: int) -> torch.Tensor:
    """The same with no more than two nonzeros in every four."""
    weight = from_bytes(drawn, columns)
    groups = bits(weight).view(-1, 4)
    groups[(groups != 0).cumsum(dim=1) > 2] = 0
    return weight


any_matrix = st.integers(1, 40).flatmap(lambda i: st.builds(from_bytes, st.binary(min_size=i, max_size=5 * i), st.just(i)))
sparse_matrix = st.sampled_from([16, 32, 48]).flatmap(
    lambda i: st.builds(sparse24, st.binary(min_size=i, max_size=3 * i), st.just(i))
)


@settings(max_examples=60)
@given(weight=any_matrix)
def test_a_bitmask_gives_every_bit_back_and_is_as_documented(weight):
    values, places = pack(weight, "bitmask")
    assert (bits(values).flatten().tolist(), places.tolist()) == reference(weight, "bitmask")
    assert torch.equal(bits(unpack(values, places, "bitmask", weight.shape)), bits(weight))


@settings(max_examples=60)
@given(weight=sparse_matrix)
def test_packed24_gives_every_bit_back_and_is_as_documented(weight):
    assert fit(weight, "packed24").parts
    values, places = pack(weight, "packed24")
    assert (bits(values).flatten().tolist(), places.flatten().tolist()) == reference(weight, "packed24")
    back = unpack(values, places, "packed24", weight.shape)
    assert back.dtype == weight.dtype
    assert torch.equal(bits(back), bits(weight))


@pytest.mark.parametrize("format", PLACES)
def test_a_matrix_of_many_chunks_comes_back(format, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 64)
    dense = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    weight = torch.where(mask24(dense), dense, 0.0)
    weight[2:5] = 0.0  # chunks in which nothing is kept
    assert torch.equal(unpack(*pack(weight, format), format, weight.shape), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed24_is_the_simple_layout_of_the_kernels(dtype):
    dense = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.where(mask24(dense), dense, 0.0)
    values, meta = pack(weight, "packed24")
    theirs = pack24(weight)
    assert torch.equal(values.view(torch.int32), theirs.words)
    assert torch.equal(meta, theirs.meta)
    assert torch.equal(Packed24(values.view(torch.int32), meta, (5, 32), dtype).to_dense(), weight)


@pytest.mark.parametrize("format", PLACES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.float8_e4m3fn])
def test_fit_foretells_what_is_stored(format, dtype):
    weight = torch.zeros(4, 32).to(dtype)
    weight[:, 1::4] = torch.ones(()).to(dtype)
    foretold = fit(weight, format).parts
    if format == "packed24" and dtype not in DTYPES:
        assert foretold is None
        return
    assert foretold == tuple(packing.Part(part.dtype, tuple(part.shape)) for part in pack(weight, format))
    assert [part.nbytes for part in foretold] == [part.nbytes for part in pack(weight, format)]
    assert torch.equal(bits(unpack(*pack(weight, format), format, weight.shape)), bits(weight))


def test_at_half_the_weights_16_bits_take_9():
    half = torch.tensor([1.0, 0.0]).repeat(64, 64).bfloat16()
    for format in PLACES:
        assert sum(part.nbytes for part in fit(half, format).parts) * 16 == half.nbytes * 9


@pytest.mark.parametrize(("row", "group"), [(0, 0), (0, 1), (1, 6), (2, 7)])
def test_the_first_group_that_is_too_full_is_named(row, group):
    weight = torch.zeros(3, 32)
    weight[row, 4 * group + 1 : 4 * group + 4] = torch.tensor([1.0, -0.0, 2.0])  # -0.0 has to be kept
    weight[2, 28:] = 1.0
    found = fit(weight, "packed24")
    count = 4 if (row, group) == (2, 7) else 3
    inputs = f"{4 * group} to {4 * group + 3}"
    assert found.reason == f"has {count} nonzeros in row {row}, group {group} (inputs {inputs})"
    assert found.excess == (1 if count == 4 else 2) / 24


def test_a_matrix_that_a_format_does_not_take_stays_dense():
    for weight, format, reason in (
        (torch.zeros(2, 20), "packed24", "has 20 inputs"),
        (torch.zeros(2, 16, dtype=torch.float64), "packed24", "is float64"),
        (torch.ones(2, 16), "bitmask", "too few zeros"),
        (torch.zeros(0, 16), "packed24", ""),
        (torch.zeros(0, 16), "bitmask", "too few zeros"),
    ):
        found = fit(weight, format)
        assert found.parts is None
        assert reason in found.reason


def test_places_of_more_or_fewer_values_are_an_error():
    values, places = pack(torch.tensor([[1.0, 0.0, 2.0, 0.0]]), "bitmask")
    for wrong in (0b1, 0b111):
        with pytest.raises(ValueError, match="and 2 are stored"):
            unpack(values, torch.full_like(places, wrong), "bitmask", (1, 4))


def test_metadata_that_name_no_two_places_are_an_error():
    values, meta = pack(torch.zeros(1, 16), "packed24")
    for nibble in (0, 5, 6, 15):
        with pytest.raises(ValueError, match="no two of four"):
            unpack(values, meta & ~0xF | nibble, "packed24", (1, 16))


# In a file.


@pytest.fixture
def directory(tmp_path):
    """A checkpoint of a packed and a plain matrix, and the two."""
    weight = torch.tensor([[1.0, 0.0, -2.0, 0.0] * 8] * 3).bfloat16()
    values, places = pack(weight, "bitmask")
    tensors = {"a.weight": values, "a.weight.bits": places, "b.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata=described("bitmask", {"a.weight": [3, 32]}))
    return tmp_path, weight


def rewrite(directory, metadata=None, **tensors):
    file = directory / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata=metadata or described("bitmask", {"a.weight": [3, 32]}))


def test_a_checkpoint_shows_and_reads_what_was_packed(directory):
    folder, weight = directory
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.entries.keys() == {"a.weight", "b.weight"}
    entry = checkpoint.entries["a.weight"]
    assert (entry.shape, entry.dtype, entry.nbytes, entry.numel) == ((3, 32), torch.bfloat16, 192, 96)
    assert torch.equal(checkpoint.read("a.weight"), weight)
    assert torch.equal(checkpoint.read("b.weight"), torch.ones(2, 2))
    assert (checkpoint.format, checkpoint.nbytes, checkpoint.stored_bytes) == ("bitmask", 192 + 16, 96 + 12 + 16)
    assert read_header(folder / "model.safetensors").keys() == {"a.weight", "a.weight.bits", "b.weight"}


def test_the_fingerprint_changes_with_the_places_of_weights(directory):
    folder, weight = directory
    before = Checkpoint.open(folder).fingerprint()
    rewrite(folder, **{"a.weight.bits": pack(weight.roll(1, dims=1), "bitmask")[1]})
    assert Checkpoint.open(folder).fingerprint() != before


def test_a_damaged_packed_matrix_is_named(directory):
    folder, _ = directory
    rewrite(folder, **{"a.weight.bits": torch.zeros(12, dtype=torch.uint8)})
    with pytest.raises(LLMPruneError, match=r"model\.safetensors is corrupt \('a\.weight': its places"):
        Checkpoint.open(folder).read("a.weight")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llmprune": json.dumps({"format": "packed99", "shapes": {}})}, "'packed99', which this version"),
        ({"llmprune": "{"}, "corrupt"),
        ({"llmprune": json.dumps({"format": "bitmask"})}, "corrupt"),
        (described("bitmask", {"a.weight": [3, 33]}), "does not fill its shape"),
        (described("bitmask", {"b.weight": [2, 2]}), "corrupt"),
    ],
)
def test_metadata_that_do_not_fit_the_file_are_one_sentence(directory, metadata, words):
    folder, _ = directory
    rewrite(folder, metadata)
    with pytest.raises(LLMPruneError, match=words):
        Checkpoint.open(folder)


def test_the_configuration_says_how_weights_are_stored_and_forgets_it():
    plain = json.dumps({"model_type": "llama", "eos_token_id": None}, indent=2).encode() + b"\n"
    packed = config_as_stored(plain, "packed24")
    assert json.loads(packed)["quantization_config"] == {"quant_method": "llmprune", "format": "packed24"}
    assert config_as_stored(packed, None) == plain
    assert config_as_stored(plain, None) == plain
    assert config_as_stored(b'{"a":1}', None) == b'{"a":1}'


def test_parts_of_packed24_do_not_depend_on_what_is_kept():
    assert parts("packed24", (4, 32), torch.float16, 3) == parts("packed24", (4, 32), torch.float16, 64)
