"""2:4 product on sparse tensor cores (NVIDIA, sm_80 and later) for up to 32 tokens: 0.5625 of the dense weight's bytes.

Triton has no sparse product, so the instruction mma.sp.m16n8k32 (PTX ISA) is written as inline assembly in Gluon, whose layouts
say which register of which lane holds what. The weight is the first factor, in the fragment layout of `sparse24`: each lane
loads its own registers, 16 bytes at a time, and nothing passes through shared memory.

1. `partial`, grid (rows of tiles / WARPS, splits): each warp goes through its share of the inputs for 16 outputs and all
   tokens, PAIRS pairs of steps of 32 inputs a trip. Every step of a trip has sums of its own, so that no instruction waits for
   the one before. Sums are float32.
2. `gemv_triton.combine` adds the splits' sums in order, and the bias: the same bits whenever it runs.

A lane needs 4 bytes of a token's inputs here and there. From REORDERED_FROM tokens on they are brought into its order first,
by one copy: loads of 4 bytes of that many rows would take longer than those of the weight.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gemv_triton import combined
from .sparse24 import Packed24

MOST_TOKENS = 32
REORDERED_FROM = 5
WARPS, PAIRS = 4, 2
# Programs that keep a large GPU busy, and trips below which a split is not worth its sums.
PROGRAMS, FEWEST_TRIPS = 512, 4
TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}


@gluon.constexpr_function
def _products(value_type):
    """Two steps, whose metadata is in one word: operands are eight registers each of sums, weights, inputs, sums, metadata."""
    lines = []
    for step in range(2):
        sums, weights, inputs, start = (
            "{" + ", ".join(f"${8 * part + 4 * step + i}" for i in range(4)) + "}" for part in range(4)
        )
        types = f"f32.{value_type}.{value_type}.f32"
        instruction = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.{types}"
        lines.append(f"{instruction} {sums}, {weights}, {inputs}, {start}, $32, {step};")
    return "\n".join(lines)


@gluon.constexpr_function
def _constraints():
    return ",".join(["=&f"] * 8 + ["r"] * 16 + ["f"] * 8 + ["r"] * 8)


@gluon.constexpr_function
def _layout(warps, tiles, pairs, steps, registers):
    """Of [warp, tile of tokens, pair of steps, lane, step, register], where a thread has all but warp and lane."""
    return gl.BlockedLayout(
        [1, tiles, pairs, 1, steps, registers], [1, 1, 1, 32, 1, 1], [warps, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )


@gluon.constexpr_function
def _without(layout, *axes):
    """The layout where these axes, in falling order, are taken away."""
    for axis in axes:
        layout = gl.SliceLayout(axis, layout)
    return layout


@gluon.constexpr_function
def _only(layout, axis, axes):
    return _without(layout, *(other for other in reversed(range(axes)) if other != axis))


@gluon.jit
def _along(size: gl.constexpr, axis: gl.constexpr, axes: gl.constexpr, layout: gl.constexpr):
    """0 to size - 1 along one of some axes of a layout, the others being 1."""
    index = gl.arange(0, size, _only(layout, axis, axes))
    for other in gl.static_range(axes):
        if other != axis:
            index = gl.expand_dims(index, other)
    return index


@gluon.jit
def partial(
    words_ptr,
    meta_ptr,
    x_ptr,
    sums_ptr,
    rows,
    pairs,
    share,
    tokens,
    token_stride,
    step_stride,
    LANE_STRIDE: gl.constexpr,
    REGISTER_STRIDE: gl.constexpr,
    TILES: gl.constexpr,
    TYPE: gl.constexpr,
    WARPS: gl.constexpr,
    PAIRS: gl.constexpr,
):
    """Sums of `share` pairs of steps, float32 [splits, tokens, 16 * rows]; `rows` of tiles. x is in words of two inputs."""
    ALL: gl.constexpr = _layout(WARPS, TILES, PAIRS, 2, 4)
    WEIGHT: gl.constexpr = _layout(WARPS, 1, PAIRS, 2, 4)
    META: gl.constexpr = _layout(WARPS, 1, PAIRS, 1, 1)
    split = gl.program_id(1)
    first = split * share
    last = gl.minimum(first + share, pairs)

    row = gl.program_id(0) * WARPS + _along(WARPS, 0, 6, WEIGHT)
    pair = first + _along(PAIRS, 2, 6, WEIGHT)
    inside = _along(2, 4, 6, WEIGHT) * 128 + _along(32, 3, 6, WEIGHT) * 4 + _along(4, 5, 6, WEIGHT)
    words_at = words_ptr + (row.to(gl.int64) * pairs + pair) * 256 + inside
    row_there = row < rows

    meta_row = gl.program_id(0) * WARPS + _along(WARPS, 0, 6, META)
    meta_pair = first + _along(PAIRS, 2, 6, META)
    meta_at = meta_ptr + (meta_row.to(gl.int64) * pairs + meta_pair) * 32 + _along(32, 3, 6, META)
    meta_there = meta_row < rows

    lane = _along(32, 3, 6, ALL)
    token = _along(TILES, 1, 6, ALL) * 8 + (lane >> 2)
    x_pair = first + _along(PAIRS, 2, 6, ALL)
    x_inside = (lane & 3) * LANE_STRIDE + _along(4, 5, 6, ALL) * REGISTER_STRIDE
    x_at = x_ptr + token * token_stride + (2 * x_pair + _along(2, 4, 6, ALL)) * step_stride + x_inside
    token_there = token < tokens

    sums = gl.zeros([WARPS, TILES, PAIRS, 32, 2, 4], gl.float32, ALL)
    for _ in range(first, last, PAIRS):
        weight = gl.load(words_at, mask=row_there & (pair < last), other=0, eviction_policy="evict_first")
        # Positions 0 and 1 of every group: the instruction wants them in order.
        meta = gl.load(meta_at, mask=meta_there & (meta_pair < last), other=0x44444444, eviction_policy="evict_first")
        x = gl.load(x_at, mask=token_there & (x_pair < last), other=0, eviction_policy="evict_last")
        # Nothing moves: a thread's registers are repeated for every tile of tokens, and the word for every register.
        weight = gl.convert_layout(weight, ALL, assert_trivial=True)
        meta = gl.convert_layout(meta, ALL, assert_trivial=True)
        sums = gl.inline_asm_elementwise(
            _products(TYPE), _constraints(), [weight, x, sums, meta], gl.float32, is_pure=True, pack=8
        )
        words_at += PAIRS * 256
        meta_at += PAIRS * 32
        x_at += 2 * PAIRS * step_stride
        pair += PAIRS
        meta_pair += PAIRS
        x_pair += PAIRS
    total = gl.sum(gl.sum(sums, 4), 2)

    # [warp, tile, lane, register]
    TOTAL: gl.constexpr = _without(ALL, 4, 2)
    out_lane = _along(32, 2, 4, TOTAL)
    register = _along(4, 3, 4, TOTAL)
    out_row = gl.program_id(0) * WARPS + _along(WARPS, 0, 4, TOTAL)
    output = out_row * 16 + (out_lane >> 2) + 8 * (register >> 1)
    out_token = _along(TILES, 1, 4, TOTAL) * 8 + 2 * (out_lane & 3) + (register & 1)
    there = (out_token < tokens) & (out_row < rows)
    gl.store(sums_ptr + (split * tokens + out_token) * (16 * rows) + output, total, mask=there)


def matmul(x_NI: Tensor, packed: Packed24, bias_O: Tensor | None = None) -> Tensor:
    """The product of at most MOST_TOKENS tokens with a weight in the fragment layout; see `sparse24`."""
    (tokens, inputs), outputs = x_NI.shape, packed.shape[0]
    assert packed.layout == "fragment"
    assert 0 < tokens <= MOST_TOKENS
    rows, pairs = outputs // 16, inputs // 64
    blocks = triton.cdiv(rows, WARPS)
    trips = triton.cdiv(pairs, PAIRS)
    splits = max(1, min(trips // FEWEST_TRIPS, PROGRAMS // blocks))
    share = triton.cdiv(trips, splits) * PAIRS
    splits = triton.cdiv(pairs, share)
    x = x_NI.view(torch.int32)
    strides = (inputs // 2, 16, 1, 4)
    if tokens >= REORDERED_FROM:
        # [token, step, register, quarter of a lane's row] as [step, token, quarter, register].
        x = x.view(tokens, inputs // 32, 4, 4).permute(1, 0, 3, 2).contiguous()
        strides = (16, 16 * tokens, 4, 1)
    sums_SNO = torch.empty((splits, tokens, outputs), dtype=torch.float32, device=x.device)
    # Triton launches on torch's current device, which need not be the tensors'.
    with torch.cuda.device_of(x):
        partial[(blocks, splits)](
            packed.words,
            packed.meta,
            x,
            sums_SNO,
            rows,
            pairs,
            share,
            tokens,
            *strides,
            TILES=triton.next_power_of_2(triton.cdiv(tokens, 8)),
            TYPE=TYPES[x_NI.dtype],
            WARPS=WARPS,
            PAIRS=PAIRS,
            num_warps=WARPS,
        )
        return combined(sums_SNO, x_NI.dtype, bias_O)
