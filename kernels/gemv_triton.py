"""The Triton kernels behind `gemv`: leave inputs out where the weights are loaded, so that their bytes never move.

Two stages without atomics, so that the same bits come out whenever it runs, in any dtype:

1. `partial`, grid (outputs / BLOCK_O, splits): each program goes through its share of the inputs, BLOCK_I at a time. The test
   |x| <= tau masks the load of the weights, a row of which is BLOCK_O weights side by side. Sums are float32.
2. `combine` adds the splits' sums in order, and the bias.

`gemv_compacted` first writes down which inputs are kept (`compact`), and then goes through these rows only
(`partial_of_rows`): no instruction is spent on rows that are left out, for one more launch.

TEAL's kernel (arXiv 2408.14690, section 4.4) adds up float16 sums by atomics, in whatever order programs end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_I, BLOCK_O, WARPS = 16, 256, 4
BLOCK_COMPACT = 1024
# Programs that keep a large GPU busy: a few for each of its multiprocessors.
PROGRAMS = 512
MOST_SPLITS = 16


@triton.jit
def partial(
    x_ptr,
    weight_ptr,
    tau_ptr,
    sums_ptr,
    inputs,
    outputs,
    share,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Sums of `share` inputs for BLOCK_O outputs, float32 [splits, outputs]."""
    column = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    for start in range(split * share, min((split + 1) * share, inputs), BLOCK_I):
        row = start + tl.arange(0, BLOCK_I)
        there = row < inputs
        # Every program reads these: they are to stay in the cache, as weights are not.
        x = tl.load(x_ptr + row, mask=there, other=0.0, eviction_policy="evict_last").to(tl.float32)
        tau = tl.load(tau_ptr + row, mask=there, other=0.0, eviction_policy="evict_last")
        # Not the comparison turned around: NaN is kept.
        kept = there & ((tl.abs(x) <= tau) == 0)
        at = row[:, None].to(tl.int64) * outputs + column[None, :]
        mask = kept[:, None] & (column < outputs)[None, :]
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        total += weight * tl.where(kept, x, 0.0)[:, None]
    tl.store(sums_ptr + split * outputs + column, tl.sum(total, 0), mask=column < outputs)


@triton.jit
def compact(x_ptr, tau_ptr, rows_ptr, count_ptr, inputs, BLOCK: tl.constexpr):
    """One program: the inputs that are kept, in order, and their number."""
    count = 0
    for start in range(0, inputs, BLOCK):
        row = start + tl.arange(0, BLOCK)
        there = row < inputs
        x = tl.load(x_ptr + row, mask=there, other=0.0).to(tl.float32)
        kept = there & ((tl.abs(x) <= tl.load(tau_ptr + row, mask=there, other=0.0)) == 0)
        place = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(rows_ptr + count + place, row, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    tl.store(count_ptr, count)


@triton.jit
def partial_of_rows(
    x_ptr,
    weight_ptr,
    rows_ptr,
    count_ptr,
    sums_ptr,
    outputs,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Sums of a split's share of the rows that are kept, as `partial`."""
    column = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    count = tl.load(count_ptr)
    share = tl.cdiv(tl.cdiv(count, BLOCK_I), tl.num_programs(1)) * BLOCK_I
    total = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    for start in range(split * share, min((split + 1) * share, count), BLOCK_I):
        place = start + tl.arange(0, BLOCK_I)
        there = place < count
        row = tl.load(rows_ptr + place, mask=there, other=0)
        x = tl.load(x_ptr + row, mask=there, other=0.0, eviction_policy="evict_last").to(tl.float32)
        at = row[:, None].to(tl.int64) * outputs + column[None, :]
        mask = there[:, None] & (column < outputs)[None, :]
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        total += weight * x[:, None]
    tl.store(sums_ptr + split * outputs + column, tl.sum(total, 0), mask=column < outputs)


@triton.jit
def combine(sums_ptr, bias_ptr, y_ptr, outputs, splits, HAS_BIAS: tl.constexpr, BLOCK_O: tl.constexpr):
    """The sums [splits, tokens, outputs] of all splits in order, and the bias, in the output's dtype; grid (tokens, blocks)."""
    column = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    at = tl.program_id(0).to(tl.int64) * outputs + column
    size = tl.num_programs(0).to(tl.int64) * outputs
    there = column < outputs
    total = tl.zeros((BLOCK_O,), tl.float32)
    for split in range(splits):
        total += tl.load(sums_ptr + split * size + at, mask=there, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=there, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=there)


def gemv(x_I: Tensor, weight_IO: Tensor, tau_I: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """One token's outputs [O]; arguments as `gemv.gemv` has checked them."""
    inputs, outputs = weight_IO.shape
    blocks, splits = _grid(inputs, outputs)
    share = triton.cdiv(triton.cdiv(inputs, BLOCK_I), splits) * BLOCK_I
    sums_SO = torch.empty((splits, outputs), dtype=torch.float32, device=x_I.device)
    # Triton launches on torch's current device, which need not be the tensors'.
    with torch.cuda.device_of(x_I):
        partial[(blocks, splits)](
            x_I, weight_IO, tau_I, sums_SO, inputs, outputs, share, BLOCK_I=BLOCK_I, BLOCK_O=BLOCK_O, num_warps=WARPS
        )
        return combined(sums_SO[:, None], x_I.dtype, bias_O)[0]


def gemv_compacted(x_I: Tensor, weight_IO: Tensor, tau_I: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The same outputs, by way of a list of the inputs that are kept."""
    inputs, outputs = weight_IO.shape
    blocks, splits = _grid(inputs, outputs)
    rows_I = torch.empty(inputs, dtype=torch.int32, device=x_I.device)
    count = torch.empty(1, dtype=torch.int32, device=x_I.device)
    sums_SO = torch.empty((splits, outputs), dtype=torch.float32, device=x_I.device)
    with torch.cuda.device_of(x_I):
        compact[(1,)](x_I, tau_I, rows_I, count, inputs, BLOCK=BLOCK_COMPACT, num_warps=WARPS)
        partial_of_rows[(blocks, splits)](
            x_I, weight_IO, rows_I, count, sums_SO, outputs, BLOCK_I=BLOCK_I, BLOCK_O=BLOCK_O, num_warps=WARPS
        )
        return combined(sums_SO[:, None], x_I.dtype, bias_O)[0]


def _grid(inputs: int, outputs: int) -> tuple[int, int]:
    """Blocks of outputs, and splits of the inputs."""
    blocks = triton.cdiv(outputs, BLOCK_O)
    return blocks, max(1, min(triton.cdiv(inputs, BLOCK_I), MOST_SPLITS, PROGRAMS // blocks))


def combined(sums_SNO: Tensor, dtype: torch.dtype, bias_O: Tensor | None) -> Tensor:
    """What `combine` makes of the splits' sums, float32 and contiguous: y [N, O]. The caller has made their device current."""
    splits, tokens, outputs = sums_SNO.shape
    y_NO = torch.empty((tokens, outputs), dtype=dtype, device=sums_SNO.device)
    bias = y_NO if bias_O is None else bias_O
    grid = (tokens, triton.cdiv(outputs, BLOCK_O))
    combine[grid](sums_SNO, bias, y_NO, outputs, splits, HAS_BIAS=bias_O is not None, BLOCK_O=BLOCK_O)
    return y_NO
