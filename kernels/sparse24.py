"""Weights of which at most two in every four neighbouring inputs are nonzero (2:4), packed into 0.5625 of their bytes.

    python -c "import torch; from llmprune.kernels.sparse24 import *; w = torch.randn(8, 64); print(pack24(w * mask24(w)))"

Of each group of four weights along the input dimension two are stored, at positions i0 < i1, with a nibble i0 | i1 << 2: one
of 4, 8, 9, 12, 13, 14. A group with fewer than two nonzeros keeps its lowest other positions beside them, as zeros (nibble 4
for none). Zeros come back as +0.0, whatever their sign was; every other value keeps its bits, NaN and infinity included.

Three layouts, of float32, bfloat16 or float16 values (fragment: of the latter two):

simple, for storage and portable kernels; I is a multiple of 16:
    words int32 [O, I/4]: the kept pair of a group, the first one in the low half. For float32 [O, I/2], a value each.
    meta  int16 [O, I/16]: the nibbles of four groups, the first in the low bits.

fragment, as the sparse tensor cores of NVIDIA read it (PTX ISA, mma.sp.m16n8k32); O is a multiple of 16, I of 64:
    words int32 [O/16, I/32, 32 lanes, 4 registers]. A row of a step of 32 inputs has 16 kept. With lane = 4 g + t, register 0
    holds those at 2t and 2t + 1 of row g, 1 the same of row g + 8, 2 those at 8 + 2t and 9 + 2t of row g, 3 of row g + 8.
    meta  int32 [O/16, I/64, 32 lanes]. With lane = 4 g + 2 h + p, the nibbles of inputs 16 p to 16 p + 15 of step 2 j + h: of
    row g in the low half, of row g + 8 in the high one. The instruction's selector is h.

vector, as sparse24.cpp reads it; I is a multiple of 16. Padded with zeros to blocks of 4 rows and steps of 32 inputs:
    words int32 [blocks, steps, 4 pairs, 2 halves, 4 rows], the kept pair of group `pair + 4 half` of a step. For float32 there
    is one more dimension after the pairs, [.., 4 pairs, 2, 2 halves, 4 rows], of the first and the second value.
    meta  int32 [blocks, steps, 4 rows]: the nibbles of eight groups, the first in the low bits.

A kernel's module offers `matmul(x_NI, packed, bias_O) -> y_NO`, where x and the bias (or None) are contiguous, of the packed
dtype and on its device, and the sums are in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

Layout = Literal["simple", "fragment", "vector"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What moves values bit by bit: moving bfloat16 as such may change which NaN it is.
_INTEGERS = {4: torch.int32, 2: torch.int16}


def _nibble_of(nonzeros: int) -> int:
    """The nibble of a group whose nonzeros are these four bits; 255 if they are too many."""
    kept = [position for position in range(4) if nonzeros >> position & 1]
    if len(kept) > 2:
        return 255
    free = [position for position in range(4) if position not in kept]
    first, second = sorted((kept + free)[:2])
    return first | second << 2


NIBBLES = tuple(_nibble_of(nonzeros) for nonzeros in range(16))


@dataclass(frozen=True, eq=False)
class Packed24:
    """A packed weight [O, I].

    Attributes:
        words: kept values, int32.
        meta: their positions.
        shape: O and I.
        dtype: of the values.
        layout: of words and meta, as the module describes.
    """

    words: Tensor
    meta: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    layout: Layout = "simple"

    def __post_init__(self) -> None:
        _check_shape(self.shape, self.dtype, self.layout)
        words, meta, meta_dtype = part_shapes(self.shape, self.dtype, self.layout)
        for name, tensor, shape, dtype in (("words", self.words, words, torch.int32), ("meta", self.meta, meta, meta_dtype)):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"The {name} of a packed {_name(self.dtype)} weight {list(self.shape)} in the {self.layout} layout are "
                    f"{_name(dtype)} {list(shape)}, not {_name(tensor.dtype)} {list(tensor.shape)}."
                )

    def __repr__(self) -> str:
        return f"Packed24({list(self.shape)}, {_name(self.dtype)}, {self.layout}, {self.device}, {self.nbytes} bytes)"

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.meta.nbytes

    def to(self, device: torch.device | str) -> Packed24:
        return Packed24(self.words.to(device), self.meta.to(device), self.shape, self.dtype, self.layout)

    def to_layout(self, layout: Layout) -> Packed24:
        """The same weight in a layout, this one if it is in it already."""
        if layout == self.layout:
            return self
        _check_shape(self.shape, self.dtype, layout)
        if self.layout == "simple":
            words, meta = _to_fragment(self) if layout == "fragment" else _to_vector(self)
            return Packed24(words, meta, self.shape, self.dtype, layout)
        words, meta = _from_fragment(self) if self.layout == "fragment" else _from_vector(self)
        return Packed24(words, meta, self.shape, self.dtype).to_layout(layout)

    def kept(self) -> tuple[Tensor, Tensor]:
        """Values [O, I/4, 2] in the weight's dtype and their positions in the group, int64, of the same shape."""
        simple = self.to_layout("simple")
        outputs, inputs = self.shape
        values_OG2 = simple.words.view(self.dtype).reshape(outputs, inputs // 4, 2)
        shifts = torch.arange(0, 16, 2, device=self.device)
        positions_OG2 = (simple.meta.long()[..., None] >> shifts & 3).reshape(outputs, inputs // 4, 2)
        return values_OG2, positions_OG2

    def to_dense(self) -> Tensor:
        """The weight [O, I] with its zeros."""
        values_OG2, positions_OG2 = self.kept()
        outputs, inputs = self.shape
        bits_OG2 = values_OG2.view(_INTEGERS[self.dtype.itemsize])
        dense_OG4 = torch.zeros((outputs, inputs // 4, 4), dtype=bits_OG2.dtype, device=self.device)
        return dense_OG4.scatter_(-1, positions_OG2, bits_OG2).view(self.dtype).reshape(outputs, inputs)


def mask24(weight_OI: Tensor, score_OI: Tensor | None = None) -> Tensor:
    """True for the two weights of every four with the highest score, by default the magnitude; ties keep the lower index."""
    score_OI = weight_OI.abs() if score_OI is None else score_OI
    if score_OI.shape != weight_OI.shape:
        raise ValueError(f"The score is {list(score_OI.shape)}, and is to be {list(weight_OI.shape)} as the weight is.")
    _check_groups(weight_OI)
    score_G4 = score_OI.reshape(-1, 4)
    best_G2 = score_G4.sort(dim=-1, descending=True, stable=True).indices[:, :2]
    return torch.zeros_like(score_G4, dtype=torch.bool).scatter_(-1, best_G2, True).reshape(weight_OI.shape)


def check24(weight_OI: Tensor) -> None:
    """Raise `ValueError` that names the first row and group of four inputs with more than two nonzeros, if there is one."""
    _check_groups(weight_OI)
    too_many_OG = (weight_OI.reshape(len(weight_OI), -1, 4) != 0).sum(dim=-1) > 2
    if not too_many_OG.any():
        return
    row, group = (int(index) for index in too_many_OG.nonzero()[0])
    count = int((weight_OI[row, 4 * group : 4 * group + 4] != 0).sum())
    raise ValueError(
        f"The weight is not 2:4 sparse: row {row}, group {group} (inputs {4 * group} to {4 * group + 3}) has {count} nonzeros, "
        f"and {int(too_many_OG.sum())} of {too_many_OG.numel()} groups have more than 2; prune it with the pattern 2:4 or "
        "leave it dense."
    )


def pack24(weight_OI: Tensor, layout: Layout = "simple", dtype: torch.dtype | None = None) -> Packed24:
    """Pack a weight without loss.

    Args:
        weight_OI: 2:4 sparse along its inputs.
        layout: simple, fragment or vector.
        dtype: of the packed values; by default the weight's.

    Raises:
        ValueError: it is not 2:4, or no layout has its shape or dtype.
    """
    weight_OI = weight_OI.detach()
    _check_groups(weight_OI)
    dtype = weight_OI.dtype if dtype is None else dtype
    outputs, inputs = weight_OI.shape
    _check_shape((outputs, inputs), dtype, layout)
    device = weight_OI.device
    weight_OG4 = weight_OI.to(dtype).reshape(outputs, inputs // 4, 4)
    nonzeros_OG = ((weight_OG4 != 0) * torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=device)).sum(dim=-1)
    nibbles_OG = torch.tensor(NIBBLES, device=device)[nonzeros_OG]
    if (nibbles_OG == 255).any():
        check24(weight_OI)
    positions_OG2 = torch.stack([nibbles_OG & 3, nibbles_OG >> 2], dim=-1)
    # -0.0 == 0: a masked negative weight is one, and whether it is stored would depend on its neighbours.
    bits_OG4 = weight_OG4.view(_INTEGERS[dtype.itemsize]).masked_fill(weight_OG4 == 0, 0)
    words = bits_OG4.gather(-1, positions_OG2).reshape(outputs, inputs // 2).view(torch.int32)
    nibble_shifts = torch.arange(0, 16, 4, device=device)
    meta = (nibbles_OG.reshape(outputs, inputs // 16, 4) << nibble_shifts).sum(dim=-1).to(torch.int16)
    return Packed24(words, meta, (outputs, inputs), dtype).to_layout(layout)


def part_shapes(
    shape: tuple[int, int], dtype: torch.dtype, layout: Layout = "simple"
) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    """The shapes of a packed weight's words and meta, and the dtype of meta."""
    outputs, inputs = shape
    if layout == "fragment":
        return (outputs // 16, inputs // 32, 32, 4), (outputs // 16, inputs // 64, 32), torch.int32
    if layout == "vector":
        blocks, steps = -(-outputs // 4), -(-inputs // 32)
        return (blocks, steps, *_pairs(dtype), 2, 4), (blocks, steps, 4), torch.int32
    return (outputs, inputs * dtype.itemsize // 8), (outputs, inputs // 16), torch.int16


def to_cutlass(packed: Packed24) -> tuple[Tensor, Tensor]:
    """The two tensors of `torch.sparse.SparseSemiStructuredTensorCUTLASS`.

    Returns:
        Kept values [O, I/2] in the weight's dtype; positions int16 [O, I/16], in the order of CUTLASS.
    """
    outputs, inputs = packed.shape
    _check_cutlass(packed.shape, packed.dtype)
    simple = packed.to_layout("simple")
    # As the fragment's, where h is the half of a tile of 32 rows and not of a pair of steps.
    halves = simple.meta.reshape(outputs // 32, 2, 2, 8, inputs // 32, 2)
    return simple.words.view(packed.dtype), halves.permute(4, 0, 3, 1, 5, 2).reshape(outputs, inputs // 16).contiguous()


def from_cutlass(values_OK: Tensor, meta: Tensor) -> Packed24:
    """Read the two tensors of `torch.sparse.SparseSemiStructuredTensorCUTLASS` or of torch's converter; see `to_cutlass`."""
    outputs, inputs = len(values_OK), 2 * values_OK.shape[-1]
    _check_cutlass((outputs, inputs), values_OK.dtype)
    if meta.dtype != torch.int16 or meta.numel() != outputs * inputs // 16:
        raise ValueError(
            f"The positions of CUTLASS for values {list(values_OK.shape)} are int16 [{outputs}, {inputs // 16}], not "
            f"{_name(meta.dtype)} {list(meta.shape)}."
        )
    halves = meta.reshape(inputs // 32, outputs // 32, 8, 2, 2, 2).permute(1, 3, 5, 2, 0, 4)
    words = values_OK.contiguous().view(torch.int32)
    return Packed24(words, halves.reshape(outputs, inputs // 16).contiguous(), (outputs, inputs), values_OK.dtype)


def from_compressed_tensors(compressed: Tensor, bitmask_OB: Tensor, shape: tuple[int, int]) -> Packed24:
    """Read what compressed-tensors 0.9 to 0.13 wrote as `sparse-24-bitmask`: the nonzeros, and a bit for each weight."""
    bits = torch.arange(8, device=bitmask_OB.device, dtype=torch.uint8)
    kept_OI = (bitmask_OB[..., None] >> bits & 1).flatten(1)[:, : shape[1]].bool()
    if tuple(kept_OI.shape) != tuple(shape) or int(kept_OI.sum()) != compressed.numel():
        raise ValueError(
            f"A bitmask {list(bitmask_OB.shape)} with {int(kept_OI.sum())} ones does not belong to {compressed.numel()} values "
            f"of a weight {list(shape)}."
        )
    dense_OI = torch.zeros(shape, dtype=compressed.dtype, device=compressed.device)
    return pack24(dense_OI.masked_scatter_(kept_OI, compressed))


def _to_fragment(packed: Packed24) -> tuple[Tensor, Tensor]:
    outputs, inputs = packed.shape
    # [tile, row half, g, step, kept half, t] -> [tile, step, lane (g, t), register (kept half, row half)]
    words = packed.words.reshape(outputs // 16, 2, 8, inputs // 32, 2, 4).permute(0, 3, 2, 5, 4, 1)
    # [tile, row half, g, pair of steps, h, p] -> [tile, pair of steps, lane (g, h, p), row half]
    meta = packed.meta.reshape(outputs // 16, 2, 8, inputs // 64, 2, 2).permute(0, 3, 2, 4, 5, 1)
    return (
        words.reshape(outputs // 16, inputs // 32, 32, 4).contiguous(),
        meta.reshape(outputs // 16, inputs // 64, 64).contiguous().view(torch.int32),
    )


def _from_fragment(packed: Packed24) -> tuple[Tensor, Tensor]:
    outputs, inputs = packed.shape
    words = packed.words.reshape(outputs // 16, inputs // 32, 8, 4, 2, 2).permute(0, 5, 2, 1, 4, 3)
    meta = packed.meta.view(torch.int16).reshape(outputs // 16, inputs // 64, 8, 2, 2, 2).permute(0, 5, 2, 1, 3, 4)
    return words.reshape(outputs, inputs // 4).contiguous(), meta.reshape(outputs, inputs // 16).contiguous()


def _pairs(dtype: torch.dtype) -> tuple[int, ...]:
    """Of the vector layout's words, those before the halves: pairs of groups, and the values that do not share a word."""
    return (4,) if dtype.itemsize == 2 else (4, 2)


def _to_vector(packed: Packed24) -> tuple[Tensor, Tensor]:
    (blocks, steps, *_), _, _ = part_shapes(packed.shape, packed.dtype, "vector")
    outputs, inputs = packed.shape
    padding = 4 * blocks - outputs
    columns = (32 * steps - inputs) // 16
    words = pad(packed.words, (0, columns * 2 * packed.dtype.itemsize, 0, padding))
    meta = pad(packed.meta, (0, columns, 0, padding)).contiguous().view(torch.int32)
    # [block, row, step, half, pair, value] -> [block, step, pair, value, half, row]
    words = words.reshape(blocks, 4, steps, 2, 4, -1).permute(0, 2, 4, 5, 3, 1)
    return (
        words.reshape(blocks, steps, *_pairs(packed.dtype), 2, 4).contiguous(),
        meta.reshape(blocks, 4, steps).permute(0, 2, 1).contiguous(),
    )


def _from_vector(packed: Packed24) -> tuple[Tensor, Tensor]:
    outputs, inputs = packed.shape
    blocks, steps = packed.meta.shape[:2]
    words = packed.words.reshape(blocks, steps, 4, -1, 2, 4).permute(0, 5, 1, 4, 2, 3).reshape(4 * blocks, -1)
    meta = packed.meta.permute(0, 2, 1).reshape(4 * blocks, steps).contiguous().view(torch.int16)
    return words[:outputs, : inputs * packed.dtype.itemsize // 8].contiguous(), meta[:outputs, : inputs // 16].contiguous()


def _check_groups(weight_OI: Tensor) -> None:
    if weight_OI.ndim != 2 or weight_OI.shape[1] % 4:
        raise ValueError(f"A 2:4 weight is [O, I] with a multiple of 4 inputs, and this one is {list(weight_OI.shape)}.")


def _check_shape(shape: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    """Raise `ValueError` for what a layout cannot hold."""
    outputs, inputs = shape
    if layout not in get_args(Layout):
        raise ValueError(f"Unknown layout {layout!r}: use one of {', '.join(get_args(Layout))}.")
    if dtype not in DTYPES or (layout == "fragment" and dtype.itemsize != 2):
        names = "bfloat16 or float16" if layout == "fragment" else "float32, bfloat16 or float16"
        raise ValueError(f"The {layout} layout holds {names}, not {_name(dtype)}; convert the weight or leave it dense.")
    rows, columns = (16, 64) if layout == "fragment" else (1, 16)
    if outputs % rows or inputs % columns:
        outputs_too = f"a multiple of {rows} outputs and " if rows > 1 else ""
        raise ValueError(
            f"The {layout} layout takes {outputs_too}a multiple of {columns} inputs, and this weight is [{outputs}, {inputs}]; "
            "leave it dense."
        )


def _check_cutlass(shape: tuple[int, int], dtype: torch.dtype) -> None:
    outputs, inputs = shape
    if dtype.itemsize != 2 or not dtype.is_floating_point or outputs % 32 or inputs % 64:
        raise ValueError(
            "torch's CUTLASS form takes bfloat16 or float16, a multiple of 32 outputs and a multiple of 64 inputs, and this "
            f"weight is {_name(dtype)} [{outputs}, {inputs}]."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
