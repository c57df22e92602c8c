"""Timing what can compute a 2:4 linear on this machine, so that the fastest does (`llmprune bench --tune`).

    times, file = tune_model("llama-2to4", say=print)

A product's time depends on the shape of its weight, on how many tokens come together and on the dtype, so each of these is
timed by itself: with every kernel that runs here, and with torch's product of a dense weight, which packing replaces. The
times are kept for `llmprune.kernels.linear24`; its conversion leaves linears dense whose dense product was the fastest for one
token.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from .checkpoint import Checkpoint
from .errors import LLMPruneError
from .kernels import linear24 as kernel
from .kernels.sparse24 import DTYPES, Layout, Packed24, mask24, pack24
from .models import resolve
from .pruning import Say
from .recipe import from_options
from .runtime.dispatch import synchronize
from .settings import choose_device

# A block's number in the name of a weight.
BLOCK = re.compile(r"\.\d+\.")
# Weights that one timing goes through, so that no cache holds them, and rounds.
SAMPLE_BYTES, MOST_WEIGHTS, ROUNDS = 64 << 20, 256, 5


@dataclass(frozen=True)
class Timed:
    """What one product takes with so many tokens: seconds by backend, and as "dense" those of a dense weight."""

    shape: tuple[int, int]
    tokens: int
    seconds: dict[str, float]

    @property
    def fastest(self) -> str:
        return min(self.seconds, key=lambda name: self.seconds[name])


def tune_model(
    model: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    say: Say,
    advance: Callable[[str], None] = lambda what: None,
) -> tuple[list[Timed], Path]:
    """`tune` for the shapes of a model's linears, of which only the files' headers are read.

    Args:
        model: any model directory, Hub id or alias.
        device: cpu, cuda or cuda:N; by default the GPU where there is one.
        dtype: float32, bfloat16 or float16; by default as the weights are stored.

    Raises:
        LLMPruneError: there is no such model or device, or none of its linears can be packed.
    """
    where, _ = choose_device(from_options({"model": model, "device": device, "dtype": dtype}))
    checkpoint = Checkpoint.open(resolve(model, say=say).directory)
    linears = [
        entry
        for name, entry in checkpoint.entries.items()
        if BLOCK.search(name) and name.endswith(".weight") and len(entry.shape) == 2 and entry.shape[1] % 16 == 0
    ]
    if not linears:
        raise LLMPruneError(f"{model} has no linear with a multiple of 16 inputs, as 2:4 kernels want: give another model.")
    stored = linears[0].dtype if dtype is None else getattr(torch, dtype)
    return tune(((each.shape[0], each.shape[1]) for each in linears), stored, torch.device(where), advance=advance)


def tune(
    shapes: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens: Sequence[int] = kernel.BUCKETS,
    advance: Callable[[str], None] = lambda what: None,
) -> tuple[list[Timed], Path]:
    """Time every backend for random weights of these shapes, and keep the times.

    Args:
        shapes: [O, I], each of them timed once.
        dtype: float32, bfloat16 or float16.
        tokens: some of `linear24.BUCKETS`.
        advance: gets a word after each timing.

    Returns:
        The times, and the file that they are kept in.

    Raises:
        LLMPruneError: another dtype, or the file cannot be written.
    """
    if dtype not in DTYPES:
        raise LLMPruneError(f"2:4 kernels compute float32, bfloat16 and float16, not {dtype}: give --dtype.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    found: list[Timed] = []
    table: dict[tuple[torch.dtype, Layout, tuple[int, int], int], dict[str, float]] = {}
    for shape in dict.fromkeys(shapes):
        generator = torch.Generator().manual_seed(0)
        weight_OI = torch.randn(shape, generator=generator)
        first_OI = (weight_OI * mask24(weight_OI)).to(device, dtype)
        layout = kernel.best_layout(device, dtype, shape)
        packed = pack24(first_OI, layout)
        copies = range(min(max(1, SAMPLE_BYTES // first_OI.nbytes), MOST_WEIGHTS))
        dense = [first_OI.clone() for _ in copies]
        packs = [Packed24(packed.words.clone(), packed.meta.clone(), shape, dtype, layout) for _ in copies]
        for count in tokens:
            x_NI = torch.randn((count, shape[1]), generator=generator).to(device, dtype)
            timed = Timed(shape, count, _seconds(x_NI, dense, packs, kernel.usable(device, dtype, shape, count)))
            table[dtype, layout, shape, count] = timed.seconds
            found.append(timed)
            advance(f"[{shape[0]}, {shape[1]}], {count} tokens")
    try:
        return found, kernel.record(device, table)
    except OSError as error:
        raise LLMPruneError(
            f"The times cannot be kept ({error}): set XDG_CACHE_HOME to a folder that can be written."
        ) from error


def _seconds(x_NI: Tensor, dense: Sequence[Tensor], packed: Sequence[Packed24], names: Sequence[str]) -> dict[str, float]:
    """The least time of one product, by backend, over rounds in which they take turns."""
    # With many tokens a product's time is arithmetic's, and it does not matter where a weight lies.
    count = max(1, len(dense) // len(x_NI))

    def packed_by(backend: str) -> None:
        for each in packed[:count]:
            kernel.linear24(x_NI, each, backend=backend)

    def by_torch() -> None:
        for each in dense[:count]:
            linear(x_NI, each)

    runs: dict[str, Callable[[], None]] = {"dense": by_torch}
    # Unpacking is what is left where nothing else runs.
    for name in names if names == ["unpack"] else [name for name in names if name != "unpack"]:
        runs[name] = functools.partial(packed_by, name)
    least = dict.fromkeys(runs, float("inf"))
    # The first round fills caches and compiles kernels.
    for number in range(ROUNDS + 1):
        for name, run in runs.items():
            synchronize(x_NI.device)
            start = time.perf_counter()
            run()
            synchronize(x_NI.device)
            if number:
                least[name] = min(least[name], (time.perf_counter() - start) / count)
    return least
