"""Matrices with zeros in fewer bytes, without loss: how `llmprune export` stores them, and how they come back.

    python -c "import torch; from llmprune.packing import *; print(pack(torch.randn(2, 16).relu(), 'bitmask'))"

What is stored of a matrix W [O, I] in a safetensors file, for those who read it without llmprune:

    W          what is kept, in the matrix's own dtype and in row-major order: packed24 [O, I/2], bitmask [kept]
    W.meta     packed24: int16 [O, I/16]; as many nibbles as there are groups of four inputs, the first in the low bits.
               A nibble is i0 | i1 << 2, the places i0 < i1 of the group's two kept weights (the simple layout of
               `llmprune.kernels.sparse24`, whose words are the kept pairs seen as int32)
    W.bits     bitmask: uint8 [ceil(O I / 8)]; a bit for each weight, the first in the low bit, 1 where it is kept

What is kept in packed24 are two weights of every group of four; in bitmask, all but the zeros. A weight is zero if all its bits
are: -0.0 is kept like any other value, and everything comes back bit by bit. The metadata of the file have a key `llmprune`: a
JSON object of `format`, one of the two names, and `shapes`, the shape of every matrix that is packed; what is not named there
is stored as ever. What is stored under a packed matrix's name never has the matrix's shape, so that whoever reads the file and
does not know of this fails, and loads no nonsense.

Per weight of 16 bits, packed24 takes 9 (0.5625 of the bytes), bitmask 1 + 16 (1 - sparsity).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .kernels.sparse24 import DTYPES, NIBBLES

Format = Literal["packed24", "bitmask"]
Bytes = npt.NDArray[np.uint8]
# The bits of weights of any width.
Raw = npt.NDArray[np.signedinteger]
# Each format's second tensor: its name behind the matrix's.
PLACES: dict[Format, str] = {"packed24": ".meta", "bitmask": ".bits"}
KEY = "llmprune"
# Where config.json says how the weights are stored, and what it calls this way.
QUANTISATION, METHOD = "quantization_config", "llmprune"
# Weights unpacked at a time: few enough that what that takes stays in the cache.
CHUNK = 1 << 16

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _of_pairs(table: list[int], shift: int) -> Bytes:
    """From a table of one group's 16 cases, that of a byte's two groups: the second one's entry is shifted."""
    return np.array([table[byte & 15] | table[byte >> 4] << shift for byte in range(256)], dtype=np.uint8)


# By the nonzeros of two groups, a bit each: whether a group has too many; the nibbles, where none has.
_TOO_MANY = _of_pairs([int(nibble == 255) for nibble in NIBBLES], 1)
_TO_NIBBLES = _of_pairs([nibble & 15 for nibble in NIBBLES], 4)
# By two nibbles, the weights that they keep, a bit each; two in each group if the nibbles are legal.
_TO_BITS = _of_pairs([1 << (nibble & 3) | 1 << (nibble >> 2) for nibble in range(16)], 4)
_ILLEGAL = np.array([not {byte & 15, byte >> 4} <= set(NIBBLES) for byte in range(256)])


@dataclass(frozen=True)
class Part:
    """A tensor as a file describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Fit:
    """What packing a matrix comes to.

    Attributes:
        parts: what is stored, values and places; None if the matrix stays as it is.
        reason: why it does.
        excess: of what is no packed24 the share of groups with more than two nonzeros; infinite where groups are not what
            is wrong.
    """

    parts: tuple[Part, Part] | None
    reason: str = ""
    excess: float = math.inf


def parts(format: Format, shape: tuple[int, ...], dtype: torch.dtype, kept: int) -> tuple[Part, Part]:
    """What is stored of a matrix with `kept` nonzeros: values and places. packed24 takes multiples of 16 inputs."""
    outputs, inputs = shape
    if format == "packed24":
        return Part(dtype, (outputs, inputs // 2)), Part(torch.int16, (outputs, inputs // 16))
    return Part(dtype, (kept,)), Part(torch.uint8, (-(-outputs * inputs // 8),))


def fit(weight_OI: Tensor, format: Format) -> Fit:
    """Whether a format takes a floating point matrix, and in how many bytes."""
    shape, dtype = tuple(weight_OI.shape), weight_OI.dtype
    if format == "bitmask":
        found = parts(format, shape, dtype, int(np.count_nonzero(_raw(weight_OI))))
        saves = sum(part.nbytes for part in found) < weight_OI.nbytes
        return Fit(found) if saves else Fit(None, "has too few zeros")
    if dtype not in DTYPES:
        return Fit(None, f"is {str(dtype).removeprefix('torch.')}")
    if shape[1] % 16 or not weight_OI.numel():
        return Fit(None, f"has {shape[1]} inputs, no multiple of 16")
    too_many = _TOO_MANY[_nonzeros(_raw(weight_OI))]
    count = int(np.count_nonzero(too_many & 1) + np.count_nonzero(too_many & 2))
    if not count:
        return Fit(parts(format, shape, dtype, 0))
    byte = int(np.flatnonzero(too_many)[0])
    first = 2 * byte + (too_many[byte] == 2)
    row, group = divmod(int(first), shape[1] // 4)
    nonzeros = int(np.count_nonzero(_raw(weight_OI[row, 4 * group : 4 * group + 4])))
    reason = f"has {nonzeros} nonzeros in row {row}, group {group} (inputs {4 * group} to {4 * group + 3})"
    return Fit(None, reason, count / (weight_OI.numel() // 4))


def pack(weight_OI: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Values and places of a matrix that fits."""
    shape, dtype, raw = tuple(weight_OI.shape), weight_OI.dtype, _raw(weight_OI)
    places = _nonzeros(raw)
    if format == "packed24":
        places = _TO_NIBBLES[places]
    values = np.compress(_flags(format, places, raw.size), raw)
    value_part, place_part = parts(format, shape, dtype, values.size)
    return (
        torch.from_numpy(values).view(dtype).view(value_part.shape),
        torch.from_numpy(places).view(place_part.dtype).view(place_part.shape),
    )


def unpack(values: Tensor, places: Tensor, format: Format, shape: tuple[int, ...]) -> Tensor:
    """The matrix of that shape, bit by bit.

    Raises:
        ValueError: the places are none, or are not those of as many values.
    """
    kept, flags_from = _raw(values), places.contiguous().view(-1).numpy().view(np.uint8)
    if format == "packed24" and _ILLEGAL[flags_from].any():
        raise ValueError("its metadata name no two of four weights")
    size, done = int(np.prod(shape, dtype=np.int64)), 0
    dense = np.empty(size, dtype=kept.dtype)
    zero = np.zeros(1, dtype=kept.dtype)
    for start in range(0, size, CHUNK):
        chunk = dense[start : start + CHUNK]
        flags = _flags(format, flags_from[start // 8 : (start + CHUNK) // 8], chunk.size)
        # The number of every weight among the chunk's kept ones, from 1; 0, where a zero stands, for the others.
        index = np.cumsum(flags, dtype=np.intp)
        count = int(index[-1])
        index *= flags
        np.take(np.concatenate([zero, kept[done : done + count]]), index, out=chunk, mode="clip")
        done += count
    if done != kept.size:
        raise ValueError(f"its places are those of {done} values, and {kept.size} are stored")
    return torch.from_numpy(dense).view(values.dtype).view(shape)


def described(format: Format, shapes: dict[str, list[int]]) -> dict[str, str]:
    """The metadata of a file in which matrices of these names and shapes are packed."""
    return {KEY: json.dumps({"format": format, "shapes": shapes})} if shapes else {}


def config_as_stored(config: bytes, format: Format | None) -> bytes:
    """The content of config.json, made to say how the weights are stored; None for plainly.

    transformers reads `quantization_config` and warns that it does not know the method, vLLM refuses.
    """
    content = json.loads(config)
    if format is None and QUANTISATION not in content:
        return config
    content.pop(QUANTISATION, None)
    if format:
        content[QUANTISATION] = {"quant_method": METHOD, "format": format}
    return (json.dumps(content, indent=2) + "\n").encode()


def _raw(weight: Tensor) -> Raw:
    """The bits of a tensor as a row of integers, on which -0.0 and NaN are values like any other."""
    return weight.detach().contiguous().view(-1).view(_INTEGERS[weight.dtype.itemsize]).numpy()


def _nonzeros(raw: Raw) -> Bytes:
    """A bit for each weight, 1 where it is not zero."""
    return np.packbits(raw != 0, bitorder="little")


def _flags(format: Format, places: Bytes, size: int) -> npt.NDArray[np.bool_]:
    """Which of `size` weights are kept, by the bytes of their places; bool."""
    bits = _TO_BITS[places] if format == "packed24" else places
    return np.unpackbits(bits, count=size, bitorder="little").view(np.bool_)
