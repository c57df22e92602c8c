"""What computes a gated linear here: a backend of the kernel, or the dense product where leaving inputs out saves no time.

Everything is decided by timing on the model's own weights, in turn through as many of them as no cache holds, because decoding
reads each of them once a token.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

import llmprune.kernels.gemv as kernel

from ..errors import LLMPruneError

Backend = Literal["auto", "dense", "reference", "bag", "cpp", "triton"]

# Weights that one round of a timing reads, rounds, and the gain below which the dense product is left in place.
SAMPLE_BYTES, ROUNDS, MARGIN = 64 << 20, 5, 1.03
# A prefill on turned weights that takes longer than this many times the ordinary one's time is slow.
SLOW = 1.5


@dataclass(frozen=True)
class Choice:
    """What computes a gated linear, and why."""

    backend: str
    reason: str


def check_backend(backend: str) -> None:
    """Raise `LLMPruneError` if there is no such backend."""
    if backend not in get_args(Backend):
        raise LLMPruneError(f"Unknown backend {backend!r}: give one of {', '.join(get_args(Backend))}.")


def usable(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The kernel's backends that run here, and a word on each."""
    return {name: reason for name, reason in kernel.backends(device, dtype).items() if _is_usable(reason)}


def require(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `LLMPruneError` if a backend of the kernel cannot run here."""
    reason = kernel.backends(device, dtype).get(backend, "it is not known")
    if not _is_usable(reason):
        raise LLMPruneError(f"Backend {backend!r} cannot run here ({reason}): leave --backend out, or give another.")


def _is_usable(reason: str) -> bool:
    return reason.startswith("available")


def fastest(units: Sequence[Sequence[Tensor]], sparsity: Sequence[float], *, rotated: bool, backends: Sequence[str]) -> Choice:
    """What computes linears fastest: one of the backends or the dense product.

    Args:
        units: weights [O, I] of linears that are decided on together, for several blocks alike.
        sparsity: share of the inputs that each of a unit leaves out.
        rotated: the inputs of a unit are rotated first, which takes a product of its own.
        backends: to try.
    """
    if not backends:
        return Choice("dense", "no backend runs here")
    units = _sample(units)
    device, dtype = units[0][0].device, units[0][0].dtype
    generator = torch.Generator().manual_seed(0)
    x_I = torch.randn(units[0][0].shape[1], generator=generator)
    order = x_I.abs().sort().values
    taus = [(order[min(int(s * len(order)), len(order) - 1)] * torch.ones_like(x_I)).to(device) for s in sparsity]
    x_I = x_I.to(device, dtype)
    basis_II = torch.zeros((len(x_I), len(x_I)), dtype=dtype, device=device) if rotated else None
    turned = [[weight_OI.t().contiguous() for weight_OI in unit] for unit in units]

    def dense() -> None:
        for unit in units:
            for weight_OI in unit:
                linear(x_I, weight_OI)

    def gated(backend: str) -> None:
        for unit in turned:
            if basis_II is not None:
                linear(x_I, basis_II)
            for weight_IO, tau_I in zip(unit, taus, strict=True):
                kernel.gemv(x_I, weight_IO, tau_I, backend=backend)

    runs: dict[str, Callable[[], object]] = {"dense": dense, **{name: functools.partial(gated, name) for name in backends}}
    seconds = _least_seconds(runs, device)
    best = min(backends, key=lambda name: seconds[name])
    gain = seconds["dense"] / seconds[best]
    measured = f"{gain:.2f} times as fast as the dense product, at {sum(sparsity) / len(sparsity):.0%} left out"
    return Choice(best if gain >= MARGIN else "dense", f"{best} is {measured}")


def _sample(units: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
    size = sum(weight.nbytes for weight in units[0])
    return units[: max(1, SAMPLE_BYTES // size)]


def _least_seconds(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The least time of each, over rounds in which they take turns, so that noise hits them alike."""
    least = dict.fromkeys(runs, float("inf"))
    # The first round fills caches and compiles kernels.
    for number in range(ROUNDS + 1):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if number:
                least[name] = min(least[name], time.perf_counter() - start)
    return least


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def prefill_on_turned_weights(device: torch.device, dtype: torch.dtype) -> Choice:
    """Whether a product with many tokens is as fast on a weight [O, I] that lies in memory as [I, O].

    Returns:
        "one" if one copy of the weight does for both, "both" if it does not.
    """
    weight_OI = torch.zeros((1024, 1024), dtype=dtype, device=device)
    turned_OI, inputs_TI = weight_OI.t(), torch.zeros((16, 1024), dtype=dtype, device=device)
    runs: dict[str, Callable[[], object]] = {
        "stored": lambda: linear(inputs_TI, weight_OI),
        "turned": lambda: linear(inputs_TI, turned_OI),
    }
    seconds = _least_seconds(runs, device)
    ratio = seconds["turned"] / seconds["stored"]
    return Choice("both" if ratio > SLOW else "one", f"a prompt takes {ratio:.2f} times as long on turned weights")
