"""The Triton kernel behind `pbs_attention`: keys and values are read where they lie, through the order and a list of blocks.

One program computes a tile of queries of one head (arXiv 2510.21270, algorithm 1, with FlashAttention-2's running softmax):

1. the blocks on its list, which lie in earlier segments: complete and visible as a whole, so nothing is masked;
2. its own segment: slot p is visible to row i if the key there came at place order[p] <= i.

Nothing is gathered and no head repeated: a row of a key is contiguous in memory wherever it lies, 256 bytes at 128 channels.
The lists are walked without a test per block, so that loads run ahead of the products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pbs_attention import Rule, Selection, earlier_blocks


@triton.jit
def _tile(
    query,
    total,
    weight,
    peak,
    key_ptr,
    value_ptr,
    order_ptr,
    first,
    tokens,
    row,
    key_stride,
    value_stride,
    scale,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    OWN: tl.constexpr,
):
    """Add TILE slots to a tile's sums: of exp(score - peak) V and of exp(score - peak), and to the peak so far."""
    slot = first + tl.arange(0, TILE)
    lane = tl.arange(0, LANES)
    there = slot < tokens
    inside = lane < WIDTH
    place = tl.load(order_ptr + slot, mask=there, other=0) if OWN else tl.load(order_ptr + slot)
    key_at = key_ptr + place[None, :] * key_stride + lane[:, None]
    value_at = value_ptr + place[:, None] * value_stride + lane[None, :]
    if OWN:
        key = tl.load(key_at, mask=there[None, :] & inside[:, None], other=0.0)
    elif WIDTH == LANES:
        key = tl.load(key_at)
    else:
        key = tl.load(key_at, mask=inside[:, None], other=0.0)
    score = tl.dot(query, key, input_precision="ieee") * scale
    if OWN:
        score = tl.where((place[None, :] <= row[:, None]) & there[None, :], score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    # In its own segment a row may have seen nothing yet, and -inf - -inf is not a number.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    share = tl.exp2(score - shift[:, None])
    fade = tl.exp2(peak - shift)
    weight = weight * fade + tl.sum(share, 1)
    if OWN:
        value = tl.load(value_at, mask=there[:, None] & inside[None, :], other=0.0)
    elif WIDTH == LANES:
        value = tl.load(value_at)
    else:
        value = tl.load(value_at, mask=inside[None, :], other=0.0)
    total = tl.dot(share.to(value.dtype), value, total * fade[:, None], input_precision="ieee")
    return total, weight, new_peak


@triton.jit
def forward(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    order_ptr,
    blocks_ptr,
    counts_ptr,
    tokens,
    heads,
    blocks,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    out_batch,
    out_head,
    out_row,
    orders,
    scale,
    SHARE_KEYS: tl.constexpr,
    SHARE_ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """ROWS queries of one head of one sequence; scale is that of the scores times log2(e)."""
    # The last rows read most, so they start first.
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    row = number * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    written = (row[:, None] < tokens) & (lane[None, :] < WIDTH)
    query_at = query_ptr + sequence * query_batch + head * query_head + row[:, None].to(tl.int64) * query_row + lane[None, :]
    query = tl.load(query_at, mask=written, other=0.0)
    key_ptr += sequence * key_batch + head // SHARE_KEYS * key_head
    value_ptr += sequence * value_batch + head // SHARE_KEYS * value_head
    order_ptr += (sequence * orders + head // SHARE_ORDER) * tokens
    total = tl.zeros((ROWS, LANES), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    line = (sequence * heads + head) * blocks + number * ROWS // BLOCK
    blocks_ptr += line * blocks
    for step in range(tl.load(counts_ptr + line) * (BLOCK // TILE)):
        # A product of 16 bits would overflow from token 32768 on.
        block = tl.load(blocks_ptr + step // (BLOCK // TILE)).to(tl.int32)
        first = block * BLOCK + step % (BLOCK // TILE) * TILE
        total, weight, peak = _tile(
            query,
            total,
            weight,
            peak,
            key_ptr,
            value_ptr,
            order_ptr,
            first,
            tokens,
            row,
            key_row,
            value_row,
            scale,
            WIDTH,
            LANES,
            TILE,
            False,
        )
    start = number * ROWS // SEGMENT * SEGMENT
    for first in range(start, min(start + SEGMENT, tokens), TILE):
        total, weight, peak = _tile(
            query,
            total,
            weight,
            peak,
            key_ptr,
            value_ptr,
            order_ptr,
            first,
            tokens,
            row,
            key_row,
            value_row,
            scale,
            WIDTH,
            LANES,
            TILE,
            True,
        )
    out_at = out_ptr + sequence * out_batch + head * out_head + row[:, None].to(tl.int64) * out_row + lane[None, :]
    # A query sees at least itself, so no weight is zero.
    tl.store(out_at, (total / weight[:, None]).to(out_ptr.dtype.element_ty), mask=written)


@dataclass(frozen=True)
class Tiling:
    """Rows and keys of a tile, and how Triton is to schedule it."""

    rows: int
    tile: int
    warps: int
    stages: int


def tiling(width: int, bytes_per_number: int, gpu: Literal["mma", "wgmma", "amd"]) -> Tiling:
    """What compiles without spilled registers and fits into shared memory.

    Args:
        gpu: wgmma where tensor cores read shared memory (compute capability 9 and 10), which leaves room in registers.
    """
    if bytes_per_number > 2:
        # Without tensor cores, whose products of float32 NVIDIA rounds to 10 bits, everything is in registers.
        return Tiling(64, 32, 4, 2) if gpu == "amd" and width <= 128 else Tiling(32, 16, 4, 1)
    if width > 128:
        return Tiling(64, 32, 8, 2)
    if gpu == "wgmma":
        return Tiling(128, 64, 8, 3)
    return Tiling(128, 32, 8, 3) if gpu == "mma" else Tiling(128, 32, 4, 2)


def _gpu(device: torch.device) -> Literal["mma", "wgmma", "amd"]:
    if torch.version.hip is not None:
        return "amd"
    return "wgmma" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10) else "mma"


def attend(query_BHND: Tensor, key_BKND: Tensor, value_BKND: Tensor, selection: Selection, rule: Rule, scale: float) -> Tensor:
    """As `pbs_attention.attend`, which has checked the arguments."""
    batch, heads, tokens, width = query_BHND.shape
    orders = selection.order_BPN.shape[1]
    chosen = tiling(width, query_BHND.element_size(), _gpu(query_BHND.device))
    # Tiles must not cross blocks. The largest power of two that divides a number is its lowest bit.
    rows, tile = (min(size, rule.block & -rule.block) for size in (chosen.rows, chosen.tile))
    _check(query_BHND, rule, tile)
    query_BHND, key_BKND, value_BKND = (
        each if each.stride(-1) == 1 else each.contiguous() for each in (query_BHND, key_BKND, value_BKND)
    )
    for each in (key_BKND, value_BKND):
        # Inside a head offsets are 32 bits wide.
        if tokens * each.stride(2) >= 2**31:
            raise ValueError(f"The keys or values of a head span {tokens * each.stride(2)} numbers, and 2^31 is the most.")
    out_BNHD = torch.empty((batch, tokens, heads, width), dtype=query_BHND.dtype, device=query_BHND.device)
    out_BHND = out_BNHD.transpose(1, 2)
    order_BPN = selection.order_BPN.int().contiguous()
    blocks_BHTT, counts_BHT = listed(selection.kept_BHTT, tokens, rule)
    # Triton launches on torch's current device, which need not be the tensors'.
    with torch.cuda.device_of(query_BHND):
        forward[(triton.cdiv(tokens, rows), heads, batch)](
            query_BHND,
            key_BKND,
            value_BKND,
            out_BHND,
            order_BPN,
            blocks_BHTT,
            counts_BHT,
            tokens,
            heads,
            blocks_BHTT.shape[-1],
            *query_BHND.stride()[:3],
            *key_BKND.stride()[:3],
            *value_BKND.stride()[:3],
            *out_BHND.stride()[:3],
            orders,
            scale * 1.4426950408889634,
            SHARE_KEYS=heads // key_BKND.shape[1],
            SHARE_ORDER=heads // orders,
            WIDTH=width,
            LANES=max(16, triton.next_power_of_2(width)),
            ROWS=rows,
            TILE=tile,
            BLOCK=rule.block,
            SEGMENT=rule.segment,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
    return out_BHND


def listed(kept_BHTT: Tensor, tokens: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """The kept blocks of earlier segments as lists, int16 [B, H, T, T] with what counts in front, and their lengths, int32."""
    blocks = kept_BHTT.shape[-1]
    if blocks >= 2**15:
        raise ValueError(f"A prompt of {tokens} tokens has {blocks} blocks of {rule.block}, and {2**15 - 1} is the most.")
    off_BHTT = kept_BHTT & earlier_blocks(tokens, rule, device=kept_BHTT.device)
    numbers_T = torch.arange(blocks, dtype=torch.int16, device=kept_BHTT.device)
    lists_BHTT = torch.where(off_BHTT, numbers_T, blocks).sort(dim=-1).values
    return lists_BHTT.contiguous(), off_BHTT.sum(dim=-1, dtype=torch.int32)


def _check(query_BHND: Tensor, rule: Rule, tile: int) -> None:
    if query_BHND.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"The Triton kernel computes float32, bfloat16 and float16, not {query_BHND.dtype}.")
    if tile < 16:
        raise ValueError(f"The Triton kernel needs blocks of a multiple of 16 tokens, which {rule.block} is not.")
    if query_BHND.shape[-1] > 256:
        raise ValueError(f"The Triton kernel takes heads of up to 256 channels, not {query_BHND.shape[-1]}.")
