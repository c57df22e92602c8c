"""How many bytes a model reads to write one token, and how fast a device reads.

At batch 1 every weight is used once for every token, so reading them is what takes the time, and

    seconds per token >= bytes per token / bandwidth.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .runtime.dispatch import synchronize

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from .runtime.gating import Gated

# What is read to measure the bandwidth: several times any cache.
PROBE_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
PROBE_WIDTH = 4096
CACHE_FOLDS = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that must be read to write one token after others, in one sequence: see `BenchResult`."""

    linears: float
    head: float
    other: float
    gates: float = 0.0
    cache: float = 0.0

    @property
    def total(self) -> float:
        return self.linears + self.head + self.other + self.gates + self.cache


def weights_read(model: PreTrainedModel, active: Mapping[str, float] | None = None) -> Traffic:
    """What of a model's weights is read for a token.

    Args:
        active: by name of a linear the share of its weight that is read; all of it where nothing is said.
    """
    head = model.get_output_embeddings()
    sums = {"linears": 0.0, "head": 0.0, "other": 0.0}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                sums["other"] += parameter.shape[-1] * parameter.itemsize
            elif parameter.ndim < 2:
                sums["other"] += parameter.nbytes
            elif module is head:
                sums["head"] += parameter.nbytes
            else:
                sums["linears"] += parameter.nbytes * (active or {}).get(name, 1.0)
    return Traffic(**sums)


def gated_weights_read(model: PreTrainedModel, gates: Gated, active: Mapping[str, float]) -> Traffic:
    """The same of a gated model.

    Args:
        gates: its gates at work. A linear that they run dense, or as the reference does, is read as a whole.
        active: by name of a linear the share of its inputs that it read.
    """
    skipping = [each.name for each in gates.report() if each.backend not in ("dense", "reference")]
    read = weights_read(model, {name: active[name] for name in skipping})
    thresholds = sum(gates.plan.gates[name].tau_I.nbytes for name in skipping)
    return replace(read, gates=thresholds + sum(basis_II.nbytes for basis_II in gates.bases.values()))


def cache_bytes(cache: Cache, model: nn.Module) -> int:
    """What the keys and values take that a cache holds. An attention that was removed reads none of its placeholder."""
    absent = {module.layer_idx for module in model.modules() if type(module).__name__ == "AbsentAttention"}
    total = 0
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if index not in absent and isinstance(keys, Tensor) and isinstance(values, Tensor):
            total += keys.nbytes + values.nbytes
    return total


class Probe:
    """Measures the bandwidth of reading, by what a linear does for one token, on a matrix larger than the caches."""

    def __init__(self, device: torch.device) -> None:
        size = max(PROBE_BYTES[device.type], CACHE_FOLDS * (last_level_cache(device) or 0))
        rows = size // (PROBE_WIDTH * 4)
        self.weight_OI = torch.ones(rows, PROBE_WIDTH, device=device)
        self.inputs_I = torch.ones(PROBE_WIDTH, device=device)
        self.rates: list[float] = []
        self.measure()
        self.rates.clear()

    @property
    def description(self) -> str:
        return f"matrix-vector product, float32, {self.weight_OI.nbytes / 2**20:.0f} MiB"

    def measure(self) -> None:
        """Add a rate, in bytes per second."""
        device = self.weight_OI.device
        synchronize(device)
        start = time.perf_counter()
        torch.mv(self.weight_OI, self.inputs_I)
        synchronize(device)
        self.rates.append(self.weight_OI.nbytes / (time.perf_counter() - start))


def last_level_cache(device: torch.device) -> int | None:
    """Bytes of all caches of the last level, None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes: dict[tuple[int, str], int] = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level, size, shared = ((cache / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
            sizes[int(level), shared] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in sizes), default=None)
    return sum(size for (level, _), size in sizes.items() if level == last) or None


def device_name(device: torch.device) -> str:
    """What the device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
