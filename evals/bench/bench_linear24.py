"""Products of one token with the linears of a 1B-shaped Llama, packed 2:4, beside equally good dense ones.

    OMP_NUM_THREADS=1 python evals/bench/bench_linear24.py [--blocks 16] [--hidden 2048] [--ffn 8192] [--rounds 15]

Random weights, 16 blocks of q k v o gate up down with hidden 2048, FFN 8192 and 8 of 32 heads for keys and values: those of
Llama 3.2 1B. Contenders take turns within every round, so that noise hits them alike, in an order that moves on with each:

- packed: `Linear24`, as a model runs it; raw: the C++ function it calls, with no dispatch.
- dense C++: a product of the same making, in bf16 or float32 (sparse24.cpp).
- torch: `torch.nn.functional.linear`.
- packed, N tokens and torch, N tokens: the same for a prompt.

Seconds are this thread's processor time (with several threads, the clock's) for all linears once. Ratios are of a round;
medians and quartiles over rounds. The last row is what one call costs over the raw function, on a weight so small that nothing
else counts.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from common import save
from torch import Tensor
from torch.nn.functional import linear

from llmprune.kernels import native
from llmprune.kernels.linear24 import Linear24, linear24
from llmprune.kernels.sparse24 import Packed24, mask24, pack24

KV_SHARE = 4


def shapes(hidden: int, ffn: int) -> list[tuple[int, int]]:
    kv = hidden // KV_SHARE
    return [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (ffn, hidden), (ffn, hidden), (hidden, ffn)]


def function(name: str, dtype: torch.dtype, pointers: int, sizes: int) -> Callable[..., None]:
    library = native.library("sparse24")
    if isinstance(library, str):
        raise SystemExit(f"skipped: {library}")
    found = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")
    found.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * sizes + [ctypes.c_int]
    found.restype = None
    return found


class Contenders:
    """All linears, in each form."""

    def __init__(self, every: list[tuple[int, int]], dtype: torch.dtype, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dense: list[Tensor] = []
        self.modules: list[Linear24] = []
        for shape in every:
            weight_OI = torch.randn(shape, generator=generator) * 0.02
            self.dense.append((weight_OI * mask24(weight_OI)).to(dtype))
            self.modules.append(Linear24.from_packed(pack24(self.dense[-1], "vector")))
        widths = {shape[1] for shape in every}
        self.one = {width: torch.randn((1, width), generator=generator).to(dtype) for width in widths}
        self.prompt = {width: torch.randn((tokens, width), generator=generator).to(dtype) for width in widths}
        self.matmul, self.product = function("matmul24", dtype, 5, 3), function("dense", dtype, 4, 2)
        self.runs: dict[str, Callable[[], None]] = {
            "packed": lambda: self.packed(self.one),
            "raw": lambda: self.raw([module.packed for module in self.modules]),
            "dense C++": self.dense_cpp,
            "torch": lambda: self.torch(self.one),
        }
        if tokens:
            self.runs[f"packed, {tokens} tokens"] = lambda: self.packed(self.prompt)
            self.runs[f"torch, {tokens} tokens"] = lambda: self.torch(self.prompt)

    def packed(self, inputs: dict[int, Tensor]) -> None:
        for module in self.modules:
            module(inputs[module.in_features])

    def raw(self, packed: list[Packed24]) -> None:
        for each in packed:
            outputs, inputs = each.shape
            x, y = self.one[inputs], torch.empty((1, outputs), dtype=each.dtype)
            parts = (x.data_ptr(), each.words.data_ptr(), each.meta.data_ptr(), None, y.data_ptr())
            self.matmul(*parts, 1, outputs, inputs, torch.get_num_threads())

    def dense_cpp(self) -> None:
        for weight_OI in self.dense:
            outputs, inputs = weight_OI.shape
            x, y = self.one[inputs], torch.empty((1, outputs), dtype=weight_OI.dtype)
            parts = (x.data_ptr(), weight_OI.data_ptr(), None, y.data_ptr())
            self.product(*parts, outputs, inputs, torch.get_num_threads())

    def torch(self, inputs: dict[int, Tensor]) -> None:
        for weight_OI in self.dense:
            linear(inputs[weight_OI.shape[1]], weight_OI)


def seconds(run: Callable[[], None], repeats: int = 1) -> float:
    start = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
    for _ in range(repeats):
        run()
    end = time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
    return (end - start) / repeats


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, middle, high


def overhead(rounds: int) -> tuple[float, float, float]:
    """Microseconds of `linear24` over the raw function, on 16 x 32."""
    packed = pack24(torch.zeros(16, 32), "vector")
    x = torch.zeros(1, 32)
    matmul = function("matmul24", torch.float32, 5, 3)

    def raw() -> None:
        y = torch.empty((1, 16), dtype=torch.float32)
        matmul(x.data_ptr(), packed.words.data_ptr(), packed.meta.data_ptr(), None, y.data_ptr(), 1, 16, 32, 1)

    return quartiles([1e6 * (seconds(lambda: linear24(x, packed), 2000) - seconds(raw, 2000)) for _ in range(rounds)])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("blocks", 16), ("hidden", 2048), ("ffn", 8192), ("rounds", 15), ("tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    contenders = Contenders(shapes(options.hidden, options.ffn) * options.blocks, dtype, options.tokens)
    times: dict[str, list[float]] = {name: [] for name in contenders.runs}
    order = list(contenders.runs)
    for turn in range(options.rounds + 1):
        for place in range(len(order)):
            name = order[(turn + place) % len(order)]
            taken = seconds(contenders.runs[name])
            # The first round fills caches and page tables.
            if turn:
                times[name].append(taken)
    dense_bytes = sum(weight.nbytes for weight in contenders.dense)
    packed_bytes = sum(module.nbytes for module in contenders.modules)
    rows: list[dict[str, object]] = []
    for name, taken in times.items():
        low, middle, high = quartiles(taken)
        against = times[name.replace("torch", "packed") if "tokens" in name else "packed"]
        slow, ratio, fast = quartiles([mine / packed for mine, packed in zip(taken, against, strict=True)])
        rows.append(
            {
                "what": name,
                "dtype": options.dtype,
                "blocks": options.blocks,
                "rounds": options.rounds,
                "megabytes": round((packed_bytes if name.startswith(("packed", "raw")) else dense_bytes) / 1e6, 1),
                "seconds": round(middle, 5),
                "seconds low": round(low, 5),
                "seconds high": round(high, 5),
                "packed is faster by": round(ratio, 3),
                "low": round(slow, 3),
                "high": round(fast, 3),
            }
        )
    low, middle, high = overhead(options.rounds)
    rows.append(
        dict.fromkeys(rows[0], "")
        | {"what": "microseconds a call over raw", "seconds": round(middle, 2), "seconds low": round(low, 2)}
        | {"seconds high": round(high, 2), "rounds": options.rounds}
    )
    if options.no_save:
        for row in rows:
            print(row)
    else:
        save(f"linear24-{options.dtype}-{torch.get_num_threads()}", rows)


if __name__ == "__main__":
    main()
