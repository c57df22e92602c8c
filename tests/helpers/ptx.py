"""Read PTX: instructions, registers and labels of a compiled kernel, and the numbers that registers hold. See ptxemu.py."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np

KINDS = {
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    # Held as float32 where it is computed with.
    "bf16": np.dtype("u2"),
    "bf16x2": np.dtype("u4"),
    "f16x2": np.dtype("u4"),
}


class EmulationError(Exception):
    """The kernel did what a GPU would not have done, or what this emulator cannot do."""


@dataclass(frozen=True)
class Instruction:
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str
    text: str

    @property
    def kind(self) -> str:
        """The type it computes in."""
        return self.modifiers[-1]


@dataclass(frozen=True)
class Program:
    parameters: list[tuple[str, str]]
    threads: int
    code: list[Instruction]
    labels: dict[str, int]
    registers: dict[str, str]
    shared_names: frozenset[str]


def parse(ptx: str) -> Program:
    """Instructions, labels, and the types of parameters and registers."""
    text = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\s[^\n]*", "", ptx, flags=re.MULTILINE)
    entry = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)([^{]*)\{", text)
    if entry is None:
        raise EmulationError("the PTX has no entry point")
    parameters = [(name, kind) for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", entry[1].strip())]
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry[2])
    if threads is None:
        raise EmulationError("the entry point does not say how many threads it is for")
    depth, end = 1, entry.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    registers: dict[str, str] = {}
    for statement in text[entry.end() : end - 1].split(";"):
        # Scopes are ignored: the names declared in them are declared alike wherever they come again.
        while found := re.match(r"\s*(?:([$\w]+):(?!:)|[{}])", statement):
            if found[1]:
                labels[found[1]] = len(code)
            statement = statement[found.end() :]
        statement = " ".join(statement.split())
        if statement.startswith(".reg"):
            _, kind, names = statement.split(maxsplit=2)
            for name in names.split(","):
                registers[re.sub(r"<\d+>", "", name.strip())] = kind[1:]
        elif statement and not statement.startswith("."):
            code.append(_instruction(statement))
    shared_names = frozenset(re.findall(r"\.shared\s[^;]*?(\w+)\[\d*\]", text))
    return Program(parameters, int(threads[1]), code, labels, registers, shared_names)


def _instruction(text: str) -> Instruction:
    found = re.match(r"(?:@(!?%?\w+)\s+)?(\w+)((?:(?:\.|::)\w+)*)\s*(.*)$", text)
    if found is None:
        raise EmulationError(f"cannot read {text!r}")
    modifiers = tuple(filter(None, found[3].split(".")))
    operands = tuple(each.strip() for each in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", found[4]))
    return Instruction(found[2], modifiers, operands, found[1] or "", text)


@functools.cache
def constant(name: str) -> np.ndarray | None:
    """A number's bits [1], or None for a register."""
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", name):
        return np.array([int(found[1], 16)], np.uint32)
    if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", name):
        return np.array([int(found[1], 16)], np.uint64)
    if re.fullmatch(r"-?(?:0x[0-9a-fA-F]+|\d+)U?", name):
        return np.array([int(name.rstrip("U"), 0) & 0xFFFFFFFFFFFFFFFF], np.uint64)
    return None


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, to the nearest, ties to even."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def unpack(bits: np.ndarray, kind: str) -> list[np.ndarray]:
    """The two numbers of a 32-bit register, as float32: low half first."""
    halves = [(bits & 0xFFFF).astype(np.uint16), (bits >> 16).astype(np.uint16)]
    return [widen(each) if kind == "bf16" else each.view(np.float16).astype(np.float32) for each in halves]


def pack(low: np.ndarray, high: np.ndarray, kind: str) -> np.ndarray:
    bits = [narrow(each) if kind == "bf16" else each.astype(np.float16).view(np.uint16) for each in (low, high)]
    return bits[0].astype(np.uint32) | bits[1].astype(np.uint32) << 16
