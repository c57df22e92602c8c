"""2:4 product in portable Triton (NVIDIA, AMD): 0.5625 of the dense weight's bytes in 16-bit types, 0.53125 in float32.

The weight is in the simple layout of `sparse24`, and goes with the int16 word of four groups' nibbles.

- Up to MOST_TOKENS_GEMV tokens, `gemv`: each kept weight is multiplied by the input that its position selects.
- More, `expand`: a tile is expanded to its dense form in registers and multiplied on tensor cores. The work is that of the
  dense product, the bytes are not, so this gains as long as memory is what limits the dense one.

Both have the grid (blocks of outputs, splits, blocks of tokens), go through a share of the inputs, and leave float32 sums that
`gemv_triton.combine` adds in order, with the bias: the same bits whenever they run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemv_triton import combined
from .sparse24 import Packed24

MOST_TOKENS_GEMV = 4
# Outputs and groups of four inputs of a tile, and warps.
GEMV = (16, 64, 4)
EXPAND = (64, 64, 4)
# Tokens of a tile; 16 is the least that tensor cores take. More tokens or wider types go with fewer groups, as shared memory
# holds the tiles.
LEAST_TILE, LARGEST_TILE = 16, 64
# Programs that keep a large GPU busy, and trips below which a split is not worth its sums.
PROGRAMS, FEWEST_TRIPS = 512, 4


@triton.jit
def _kept(words_ptr, meta_ptr, row, start, rows, groups, BLOCK_G: tl.constexpr, VALUE: tl.constexpr):
    """Of a tile [outputs, groups]: the two kept weights of every group, and their positions."""
    group = start + tl.arange(0, BLOCK_G)
    row = row[:, None].to(tl.int64)
    there = row < rows
    # One word of nibbles for four groups, whose words are one load of 16 bytes.
    quad = start // 4 + tl.arange(0, BLOCK_G // 4)[None, :]
    meta = tl.load(
        meta_ptr + row * (groups // 4) + quad,
        mask=there & (quad < groups // 4),
        other=0,
        eviction_policy="evict_first",
    ).to(tl.int32)
    nibbles = tl.reshape((meta[:, :, None] >> (4 * tl.arange(0, 4))[None, None, :]) & 15, (row.shape[0], BLOCK_G))
    if VALUE.primitive_bitwidth == 32:
        pair = 2 * start + tl.arange(0, 2 * BLOCK_G)[None, :]
        words = tl.load(
            words_ptr + row * (2 * groups) + pair, mask=there & (pair < 2 * groups), other=0, eviction_policy="evict_first"
        )
        first, second = tl.split(tl.reshape(words, (row.shape[0], BLOCK_G, 2)))
        first, second = first.to(VALUE, bitcast=True), second.to(VALUE, bitcast=True)
    else:
        mask = there & (group < groups)[None, :]
        words = tl.load(words_ptr + row * groups + group[None, :], mask=mask, other=0, eviction_policy="evict_first")
        first = (words & 0xFFFF).to(tl.int16).to(VALUE, bitcast=True)
        second = (words >> 16).to(tl.int16).to(VALUE, bitcast=True)
    return first, second, nibbles & 3, nibbles >> 2


@triton.jit
def gemv(
    words_ptr,
    meta_ptr,
    x_ptr,
    sums_ptr,
    outputs,
    groups,
    share,
    tokens,
    TOKENS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Sums of `share` groups for TOKENS tokens, float32 [splits, tokens, outputs]."""
    row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, BLOCK_O, BLOCK_G), tl.float32)
    for start in range(split * share, min((split + 1) * share, groups), BLOCK_G):
        first, second, at_first, at_second = _kept(
            words_ptr, meta_ptr, row, start, outputs, groups, BLOCK_G, x_ptr.dtype.element_ty
        )
        column = 4 * start + tl.arange(0, 4 * BLOCK_G)
        there = (token < tokens)[:, None] & (column < 4 * groups)[None, :]
        x = tl.load(
            x_ptr + token[:, None] * (4 * groups) + column[None, :], mask=there, other=0.0, eviction_policy="evict_last"
        )
        even, odd = tl.split(tl.reshape(x.to(tl.float32), (TOKENS, 2 * BLOCK_G, 2)))
        x0, x2 = tl.split(tl.reshape(even, (TOKENS, BLOCK_G, 2)))
        x1, x3 = tl.split(tl.reshape(odd, (TOKENS, BLOCK_G, 2)))
        x0, x1, x2, x3 = x0[:, None, :], x1[:, None, :], x2[:, None, :], x3[:, None, :]
        # The first of two positions is never the last, nor the second the first one.
        at_first, at_second = at_first[None, :, :], at_second[None, :, :]
        x_first = tl.where(at_first == 0, x0, tl.where(at_first == 1, x1, x2))
        x_second = tl.where(at_second == 1, x1, tl.where(at_second == 2, x2, x3))
        total += first.to(tl.float32)[None, :, :] * x_first + second.to(tl.float32)[None, :, :] * x_second
    at = (split * tokens + token[:, None]) * outputs + row[None, :]
    tl.store(sums_ptr + at, tl.sum(total, 2), mask=(token < tokens)[:, None] & (row < outputs)[None, :])


@triton.jit
def expand(
    words_ptr,
    meta_ptr,
    x_ptr,
    sums_ptr,
    outputs,
    groups,
    share,
    tokens,
    TOKENS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The same sums, on tensor cores."""
    row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    # A long prompt's inputs can be more than 32 bits count.
    token = (tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    total = tl.zeros((BLOCK_O, TOKENS), tl.float32)
    for start in range(split * share, min((split + 1) * share, groups), BLOCK_G):
        first, second, at_first, at_second = _kept(
            words_ptr, meta_ptr, row, start, outputs, groups, BLOCK_G, x_ptr.dtype.element_ty
        )
        zero = tl.zeros_like(first)
        w0 = tl.where(at_first == 0, first, zero)
        w1 = tl.where(at_first == 1, first, tl.where(at_second == 1, second, zero))
        w2 = tl.where(at_first == 2, first, tl.where(at_second == 2, second, zero))
        w3 = tl.where(at_second == 3, second, zero)
        weight = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_O, 4 * BLOCK_G))
        column = 4 * start + tl.arange(0, 4 * BLOCK_G)
        there = (token < tokens)[None, :] & (column < 4 * groups)[:, None]
        x = tl.load(x_ptr + token[None, :] * (4 * groups) + column[:, None], mask=there, other=0.0)
        total = tl.dot(weight, x, total, input_precision="ieee")
    at = (split * tokens + token[None, :]) * outputs + row[:, None]
    tl.store(sums_ptr + at, total, mask=(token < tokens)[None, :] & (row < outputs)[:, None])


def matmul(x_NI: Tensor, packed: Packed24, bias_O: Tensor | None = None) -> Tensor:
    """The product with a weight in the simple layout; see `sparse24`."""
    (tokens, inputs), outputs = x_NI.shape, packed.shape[0]
    assert packed.layout == "simple"
    assert tokens > 0
    if tokens <= MOST_TOKENS_GEMV:
        kernel, (block_o, block_g, warps), tile = gemv, GEMV, triton.next_power_of_2(tokens)
    else:
        kernel, (block_o, block_g, warps) = expand, EXPAND
        tile = min(max(triton.next_power_of_2(tokens), LEAST_TILE), LARGEST_TILE)
        block_g = block_g * LEAST_TILE * 2 // (tile * x_NI.element_size())
    groups = inputs // 4
    blocks, tiles = triton.cdiv(outputs, block_o), triton.cdiv(tokens, tile)
    trips = triton.cdiv(groups, block_g)
    splits = max(1, min(trips // FEWEST_TRIPS, PROGRAMS // (blocks * tiles)))
    share = triton.cdiv(trips, splits) * block_g
    splits = triton.cdiv(groups, share)
    sums_SNO = torch.empty((splits, tokens, outputs), dtype=torch.float32, device=x_NI.device)
    # Triton launches on torch's current device, which need not be the tensors'.
    with torch.cuda.device_of(x_NI):
        kernel[(blocks, splits, tiles)](
            packed.words,
            packed.meta,
            x_NI,
            sums_SNO,
            outputs,
            groups,
            share,
            tokens,
            TOKENS=tile,
            BLOCK_O=block_o,
            BLOCK_G=block_g,
            num_warps=warps,
        )
        return combined(sums_SNO, x_NI.dtype, bias_O)
