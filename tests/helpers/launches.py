"""What a launcher launches, without a GPU: recorded, compiled for any target, and run on the CPU as the code for sm_80.

    partial = Launches(gemv_triton.partial)
    monkeypatch.setattr(gemv_triton, "partial", partial)
    y_O = gemv_triton.gemv(x_I, weight_IO, tau_I)       # the kernel's machine code in ptxemu: bfloat16, inline assembly and all
    partial.launches[0].fetched["weight_ptr"]           # bytes
    partial.launches[0].compile("sm_90").spills

So grid, types, strides and block sizes are the launcher's own. TRITON_INTERPRET has to be unset in the process.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import aot
import ptxemu
import torch

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass
class Launch:
    """A kernel with its arguments: `fetched` bytes of each and instructions `executed`, where it was run."""

    kernel: object
    grid: tuple[int, ...]
    arguments: dict[str, torch.Tensor | int | float]
    constants: dict[str, object]
    options: dict[str, object]
    fetched: dict[str, int] = field(default_factory=dict)
    executed: Counter[str] = field(default_factory=Counter)

    def compile(self, target: str) -> aot.Compiled:
        """What the binary says of it, compiled as the launcher would: it knows which pointers and sizes are multiples of 16."""
        return aot.compile_for(*self._source(target), **self.options)

    def run(self) -> None:
        built = aot.binary(*self._source("sm_80"), **self.options)
        found = ptxemu.run(built.asm["ptx"], self.grid, list(self.arguments.values()), built.metadata.shared)
        self.fetched = dict(zip(self.arguments, found.fetched, strict=True))
        self.executed = found.executed

    def _source(self, target: str) -> tuple[object, str, dict[str, str], dict[str, object], list[str]]:
        types = {name: _type(value) for name, value in self.arguments.items()}
        divisible = [name for name, value in self.arguments.items() if _divisible(value)]
        return self.kernel, target, types, self.constants, divisible


class Launches:
    """Stands in for a kernel: `kernel[grid](...)` is recorded and, unless `run` is False, run."""

    def __init__(self, kernel, *, run: bool = True) -> None:
        self.kernel, self.run = kernel, run
        self.launches: list[Launch] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*values, **named) -> None:
            options = {name: value for name, value in named.items() if name not in self.kernel.arg_names}
            bound = inspect.signature(self.kernel.fn).bind(
                *values, **{name: value for name, value in named.items() if name not in options}
            )
            bound.apply_defaults()
            constants = {}
            for parameter in self.kernel.params:
                value = bound.arguments[parameter.name]
                # What the launcher compiles in: None and, unless told not to, 1.
                fixed = value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize)
                if parameter.is_constexpr or fixed:
                    constants[parameter.name] = value
            arguments = {name: value for name, value in bound.arguments.items() if name not in constants}
            self.launches.append(Launch(self.kernel, grid, arguments, constants, options))
            if self.run:
                self.launches[-1].run()

        return launch


def _type(value: torch.Tensor | int | float) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _divisible(value: torch.Tensor | int | float) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0
