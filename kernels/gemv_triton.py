"""The Triton kernels behind `gemv`: leave inputs out where the weights are loaded, so that their bytes never move.

Two stages without atomics, so that the same bits come out whenever it runs, in any dtype:

1. `partial`, grid (outputs / BLOCK_O, splits): each program goes through its share of the inputs, BLOCK_I at a time. The test
   |x| <= tau masks the load of the weights, a row of which is BLOCK_O weights side by side. Sums are float32.
2. `combine` adds the splits' sums in order, and the bias.

TEAL's kernel (arXiv 2408.14690, section 4.4) adds up float16 sums by atomics, in whatever order programs end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_I, BLOCK_O, WARPS = 16, 256, 4
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
def combine(sums_ptr, bias_ptr, y_ptr, outputs, splits, HAS_BIAS: tl.constexpr, BLOCK_O: tl.constexpr):
    """The sums of all splits in order, and the bias, in the output's dtype."""
    column = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    there = column < outputs
    total = tl.zeros((BLOCK_O,), tl.float32)
    for split in range(splits):
        total += tl.load(sums_ptr + split * outputs + column, mask=there, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=there, other=0.0).to(tl.float32)
    tl.store(y_ptr + column, total.to(y_ptr.dtype.element_ty), mask=there)


def gemv(x_I: Tensor, weight_IO: Tensor, tau_I: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """One token's outputs [O]; arguments as `gemv.gemv` has checked them."""
    inputs, outputs = weight_IO.shape
    blocks = triton.cdiv(outputs, BLOCK_O)
    steps = triton.cdiv(inputs, BLOCK_I)
    splits = max(1, min(steps, MOST_SPLITS, PROGRAMS // blocks))
    share = triton.cdiv(steps, splits) * BLOCK_I
    sums_SO = torch.empty((splits, outputs), dtype=torch.float32, device=x_I.device)
    y_O = torch.empty(outputs, dtype=x_I.dtype, device=x_I.device)
    # Triton launches on torch's current device, which need not be the tensors'.
    with torch.cuda.device_of(x_I):
        partial[(blocks, splits)](
            x_I, weight_IO, tau_I, sums_SO, inputs, outputs, share, BLOCK_I=BLOCK_I, BLOCK_O=BLOCK_O, num_warps=WARPS
        )
        combine[(blocks,)](
            sums_SO, y_O if bias_O is None else bias_O, y_O, outputs, splits, HAS_BIAS=bias_O is not None, BLOCK_O=BLOCK_O
        )
    return y_O
