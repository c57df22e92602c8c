"""The GPU kernels of the 2:4 product and of the gated product beside torch's dense one, on the NVIDIA GPU at hand.

    make bench-gpu

For every linear of Llama 2 7B and Llama 3 8B in bfloat16: microseconds of each kernel (median of Triton's do_bench, which
empties the cache between calls), the bytes that the call has to move, and how long those take at the speed of a copy on this
GPU. For the 2:4 kernels the bytes of weight are those that the compiled code fetches (tests/kernels/test_sparse24_compiled.py).
Writes results/gpu-kernels-DEVICE.csv.
"""

import re
import sys
from collections.abc import Callable, Iterator

import torch
from common import save

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336)]
TOKENS = (1, 4, 8, 16, 32, 64, 128)
KEPT = 0.5
DTYPE = torch.bfloat16


def calls(shape: tuple[int, int], tokens: int) -> Iterator[tuple[str, Callable[[], object], int]]:
    """Name, call, and bytes of weight, for a random weight."""
    from llmprune.kernels import gemv_triton, sparse24_gluon, sparse24_triton
    from llmprune.kernels.sparse24 import mask24, pack24

    inputs = shape[1]
    dense_OI = torch.randn(shape, device="cuda", dtype=DTYPE)
    x_NI = torch.randn(tokens, inputs, device="cuda", dtype=DTYPE)
    yield "dense", lambda: torch.nn.functional.linear(x_NI, dense_OI), dense_OI.nbytes
    simple = pack24(dense_OI.where(mask24(dense_OI), 0))
    yield "2:4 portable", lambda: sparse24_triton.matmul(x_NI, simple), simple.nbytes
    if tokens <= sparse24_gluon.MOST_TOKENS and torch.cuda.get_device_capability() >= (8, 0):
        fragment = simple.to_layout("fragment")
        yield "2:4 mma.sp", lambda: sparse24_gluon.matmul(x_NI, fragment), fragment.nbytes
    if tokens == 1:
        weight_IO = dense_OI.T.contiguous()
        tau_I = x_NI[0].float().abs().quantile(1 - KEPT).expand(inputs).contiguous()
        bytes_ = round(KEPT * weight_IO.nbytes) + tau_I.nbytes
        yield "gated, 50 % kept", lambda: gemv_triton.gemv(x_NI[0], weight_IO, tau_I), bytes_
        yield "gated and compacted, 50 % kept", lambda: gemv_triton.gemv_compacted(x_NI[0], weight_IO, tau_I), bytes_


def copy_speed() -> float:
    """Bytes that a copy within the GPU's memory moves in a microsecond, to and fro."""
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1000 * do_bench(lambda: target.copy_(source), return_mode="median"))


def main() -> None:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        print(f"skipped: torch {torch.__version__} finds no NVIDIA GPU")
        sys.exit(0)
    from triton.testing import do_bench

    device = torch.cuda.get_device_name()
    torch.manual_seed(0)
    bytes_per_microsecond = copy_speed()
    rows: list[dict[str, object]] = []
    for outputs, inputs in SHAPES:
        for tokens in TOKENS:
            dense = 0.0
            for name, call, weight_bytes in calls((outputs, inputs), tokens):
                microseconds = 1000 * do_bench(call, return_mode="median")
                dense = dense or microseconds
                moved = weight_bytes + tokens * (inputs + outputs) * DTYPE.itemsize
                rows.append(
                    {
                        "device": device,
                        "kernel": name,
                        "outputs": outputs,
                        "inputs": inputs,
                        "tokens": tokens,
                        "microseconds": round(microseconds, 1),
                        "over_dense": round(dense / microseconds, 2),
                        "bytes": moved,
                        "floor_microseconds": round(moved / bytes_per_microsecond, 1),
                    }
                )
    save(f"gpu-kernels-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}", rows)


if __name__ == "__main__":
    main()
