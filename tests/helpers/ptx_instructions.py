"""What the instructions of PTX do, for ptxemu.py: a function of the machine, the instruction, and the mask of threads [T]."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from ptx import KINDS, EmulationError, Instruction, pack, unpack

if TYPE_CHECKING:
    from ptxemu import Machine

Handler = Callable[["Machine", Instruction, np.ndarray], None]
HANDLERS: dict[str, Handler] = {}


def executes(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


@dataclass(frozen=True)
class Copy:
    """An asynchronous copy under way: bytes, and for every thread its group, addresses, and whether it reads or fills zeros."""

    size: int
    group_T: np.ndarray
    into_T: np.ndarray
    source_T: np.ndarray
    wanted_T: np.ndarray
    mask_T: np.ndarray


def _list(operand: str) -> list[str]:
    """The registers of {a, b}, or the one register."""
    return [each.strip() for each in operand.strip("{}").split(",")]


def _among(instruction: Instruction, *choices: str) -> str:
    """The one modifier of these that the instruction has, or an empty text."""
    return next((each for each in choices if each in instruction.modifiers), "")


# Moves


@executes("mov")
def _mov(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    into, source = op.operands
    if "{" not in into + source:
        kind = "pred" if op.kind == "pred" else f"b{8 * KINDS[op.kind].itemsize}"
        machine.write(into, machine.read(source, kind), kind, mask)
        return
    parts = _list(into if "{" in into else source)
    width = 8 * KINDS[op.kind].itemsize // len(parts)
    if "{" in into:
        bits = machine.read(source, op.kind)
        for index, part in enumerate(parts):
            machine.write(part, bits >> (width * index), f"b{width}", mask)
    else:
        pieces = [machine.read(part, f"b{width}").astype(np.uint64) << (width * index) for index, part in enumerate(parts)]
        machine.write(into, functools.reduce(np.bitwise_or, pieces), op.kind, mask)


@executes("cvta")
def _cvta(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    machine.write(op.operands[0], machine.read(op.operands[1], op.kind), op.kind, mask)


@executes("cvt")
def _cvt(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    kinds = [each for each in op.modifiers if each in KINDS]
    if _among(op, "sat", "satfinite", "relu") or len(kinds) != 2:
        raise EmulationError("such a conversion is not known")
    to, source = kinds
    values = machine.read(op.operands[1], source)
    if to.endswith("x2"):
        low = machine.read(op.operands[2], source)
        machine.write(op.operands[0], pack(*np.broadcast_arrays(low, values), to.removesuffix("x2")), to, mask)
        return
    if values.dtype.kind == "f":
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        if way := _among(op, *rounding):
            values = rounding[way](values)
        if to[0] in "us":
            limits = np.iinfo(KINDS[to])
            values = np.nan_to_num(values.astype(np.float64)).clip(limits.min, limits.max)
    if to == "bf16" and "rz" in op.modifiers:
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    machine.write(op.operands[0], values, to, mask)


@executes("selp")
def _selp(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    kind = f"b{8 * KINDS[op.kind].itemsize}"
    first, second = (machine.read(each, kind) for each in op.operands[1:3])
    machine.write(op.operands[0], np.where(machine.read(op.operands[3], "pred"), first, second), kind, mask)


@executes("prmt")
def _prmt(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    low, high, selector = (machine.read(each, "u32").astype(np.uint64) for each in op.operands[1:])
    source = low | high << 32
    out = np.zeros(1, np.uint64)
    for index in range(4):
        choice = (selector >> (4 * index)) & 0xF
        byte = (source >> ((choice & 7) * 8)) & 0xFF
        sign = np.where(byte & 0x80, np.uint64(0xFF), np.uint64(0))
        out = out | np.where(choice & 8, sign, byte) << (8 * index)
    machine.write(op.operands[0], out, "u32", mask)


@executes("shfl")
def _shfl(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    lane = np.arange(machine.size) % 32
    by = machine.read(op.operands[2], "u32").astype(int)
    source = {"bfly": lane ^ by, "idx": lane * 0 + by, "up": lane - by, "down": lane + by}[
        _among(op, "bfly", "idx", "up", "down")
    ]
    inside = (source >= 0) & (source < 32)
    values = np.broadcast_to(machine.read(op.operands[1], "b32"), (machine.size,))
    into, _, predicate = op.operands[0].partition("|")
    machine.write(into, values[np.arange(machine.size) - lane + np.where(inside, source, lane)], "b32", mask)
    if predicate:
        machine.write(predicate, inside, "pred", mask)


@executes("vote", "redux")
def _across(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    """Over the active lanes of a warp."""
    way = _among(op, "ballot", "any", "all", "add", "min", "max", "and", "or", "xor")
    kind = "pred" if op.name == "vote" else op.kind
    values = np.broadcast_to(machine.read(op.operands[1], kind), (machine.size,)).reshape(-1, 32)
    active = mask.reshape(-1, 32)
    if way == "ballot":
        out = ((values & active).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
    elif way in ("any", "all"):
        out = (values & active).any(1) if way == "any" else (values | ~active).all(1)
    elif active.all(1).any() and (active.any(1) != active.all(1)).any():
        raise EmulationError("a reduction over part of a warp is not known")
    else:
        ufunc = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
        out = ufunc.get(way, np.bitwise_xor).reduce(values, axis=1)
    machine.write(op.operands[0], np.repeat(out, 32), "b32" if way == "ballot" else kind, mask)


# Memory


@executes("ld")
def _ld(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    if "param" in op.modifiers:
        value = machine.parameters[op.operands[1].strip("[] ")]
        machine.write(op.operands[0].strip("{} "), np.array([value]), f"b{8 * KINDS[op.kind].itemsize}", mask)
        return
    dtype, into = KINDS[op.kind], _list(op.operands[0])
    space = "shared" if any(each.startswith("shared") for each in op.modifiers) else "global"
    data = machine.load(space, machine.address(op.operands[1]), dtype.itemsize * len(into), mask)
    values = data.view(dtype)
    for index, name in enumerate(into):
        machine.write(name, values[:, index], op.kind if op.kind[0] == "s" else f"b{8 * dtype.itemsize}", mask)


@executes("st")
def _st(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    size = KINDS[op.kind].itemsize
    space = "shared" if any(each.startswith("shared") for each in op.modifiers) else "global"
    parts = [np.broadcast_to(machine.read(name, f"b{8 * size}"), (machine.size,)) for name in _list(op.operands[1])]
    machine.store(space, machine.address(op.operands[0]), np.stack(parts, axis=1).view(np.uint8), mask)


@executes("cp")
def _cp(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    """cp.async: a copy to shared memory, which is carried out when its group is waited for."""
    if "async" not in op.modifiers or "bulk" in op.modifiers:
        raise EmulationError("such a copy is not known")
    if "commit_group" in op.modifiers:
        machine.groups_T = machine.groups_T + mask
        return
    if way := _among(op, "wait_group", "wait_all"):
        _wait(machine, int(op.operands[0], 0) if way == "wait_group" else -1, mask)
        return
    size = int(op.operands[2], 0)
    wanted = machine.read(op.operands[3], "u32") if len(op.operands) > 3 else np.array([size], np.uint32)
    wanted_T = np.broadcast_to(wanted, (machine.size,)).copy()
    if not np.isin(wanted_T[mask], (0, size)).all():
        raise EmulationError("a copy of part of its bytes is not known")
    into_T, source_T = machine.address(op.operands[0]), machine.address(op.operands[1])
    machine.copies.append(Copy(size, machine.groups_T, into_T, source_T, wanted_T > 0, mask))


def _wait(machine: Machine, latest: int, mask: np.ndarray) -> None:
    """Carry out all copies but those of the latest groups (all, with -1)."""
    left = []
    for copy in machine.copies:
        due_T = copy.mask_T & mask & (copy.group_T < machine.groups_T - latest)
        if due_T.any():
            data = machine.load("global", copy.source_T, copy.size, due_T & copy.wanted_T)
            machine.store("shared", copy.into_T, data, due_T)
        if (copy.mask_T & ~due_T).any():
            left.append(replace(copy, mask_T=copy.mask_T & ~due_T))
    machine.copies = left


@executes("ldmatrix")
def _ldmatrix(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    address_T = machine.address(op.operands[1])
    if (address_T[mask] % 16).any():
        raise EmulationError("misaligned: a row of a matrix in shared memory")
    lane = np.arange(machine.size) % 32
    warp = np.arange(machine.size) - lane
    for index, name in enumerate(_list(op.operands[0])):
        halves = []
        for second in range(2):
            row, column = lane >> 2, 2 * (lane & 3) + second
            if "trans" in op.modifiers:
                row, column = column, row
            # Lanes 8i to 8i+7 hold the addresses of the rows of matrix i.
            at_T = address_T[warp + 8 * index + row] + 2 * column
            halves.append(machine.load("shared", at_T, 2, mask).view(np.uint16)[:, 0].astype(np.uint32))
        machine.write(name, halves[0] | halves[1] << 16, "b32", mask)


@executes("createpolicy", "fence", "membar", "prefetch", "griddepcontrol", "discard", "applypriority")
def _nothing(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    """Hints, and orders among threads, which here go one instruction at a time."""


# Arithmetic


def _each(machine: Machine, op: Instruction, mask: np.ndarray, function: Callable[..., np.ndarray], wide: bool = False) -> None:
    """Apply a function to the operands; packed halves one by one; `wide`: floats in float64, then rounded."""
    into, *names = op.operands
    if op.kind.endswith("x2"):
        kind = op.kind.removesuffix("x2")
        halves = zip(*(unpack(machine.read(name, "b32"), kind) for name in names), strict=True)
        low, high = (function(*each) for each in halves)
        machine.write(into, pack(low, high, kind), "b32", mask)
        return
    values = [machine.read(name, op.kind) for name in names]
    if wide and values[0].dtype.kind == "f":
        values = [each.astype(np.float64) for each in values]
    machine.write(into, function(*values), op.kind, mask)


@executes("add", "sub", "and", "or", "xor", "min", "max")
def _binary(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    if _among(op, "cc", "sat"):
        raise EmulationError("carries and saturation are not known")
    functions = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    quiet = {"min": np.fmin, "max": np.fmax}
    loud = {"min": np.minimum, "max": np.maximum}
    function = (functions | (loud if "NaN" in op.modifiers else quiet))[op.name]
    if op.kind == "pred":
        first, second = (machine.read(name, "pred") for name in op.operands[1:])
        machine.write(op.operands[0], function(first, second), "pred", mask)
    else:
        _each(machine, op, mask, function)


@executes("not", "neg", "abs", "ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh", "sin", "cos")
def _unary(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    if op.name == "not" and op.kind == "pred":
        machine.write(op.operands[0], ~machine.read(op.operands[1], "pred"), "pred", mask)
        return
    functions = {
        "not": np.invert,
        "neg": np.negative,
        "abs": np.abs,
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": np.reciprocal,
        "sqrt": np.sqrt,
        "rsqrt": lambda values: 1 / np.sqrt(values),
        "tanh": np.tanh,
        "sin": np.sin,
        "cos": np.cos,
    }
    _each(machine, op, mask, functions[op.name], wide=True)


@executes("fma")
def _fma(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    _each(machine, op, mask, lambda a, b, c: a.astype(np.float64) * b + c)


@executes("mul", "mad")
def _mul(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    """mul.lo, .hi, .wide and the products of floats; mad adds a third operand."""
    if op.kind[0] not in "us":
        _each(machine, op, mask, lambda a, b, *rest: sum(rest, a * b))
        return
    first, second = (machine.read(name, op.kind) for name in op.operands[1:3])
    bits = 8 * KINDS[op.kind].itemsize
    kind = op.kind
    if "lo" in op.modifiers:
        out = first * second
    else:
        # No product of 64 bits by 64 is asked for its upper half.
        assert bits < 64
        wide = KINDS[f"{kind[0]}{2 * bits}"]
        out = first.astype(wide) * second.astype(wide)
        if "wide" in op.modifiers:
            kind = f"{kind[0]}{2 * bits}"
        else:
            out = (out >> bits).astype(KINDS[kind])
    if op.name == "mad":
        out = out + machine.read(op.operands[3], kind)
    machine.write(op.operands[0], out, kind, mask)


@executes("div", "rem")
def _div(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    first, second = (machine.read(name, op.kind) for name in op.operands[1:])
    if op.kind[0] == "f":
        machine.write(op.operands[0], first / second, op.kind, mask)
        return
    if (np.broadcast_to(second, (machine.size,))[mask] == 0).any():
        raise EmulationError("a division by zero")
    # Towards zero, as numpy's fmod rounds and its // does not.
    second = np.where(second == 0, second.dtype.type(1), second)
    rest = np.fmod(first, second)
    machine.write(op.operands[0], rest if op.name == "rem" else (first - rest) // second, op.kind, mask)


@executes("shl", "shr")
def _shift(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    """By more than all bits: zero, or for a signed number its sign."""
    bits = 8 * KINDS[op.kind].itemsize
    values = machine.read(op.operands[1], op.kind)
    by = machine.read(op.operands[2], "u32").astype(np.int64)
    inside = np.minimum(by, bits - 1).astype(values.dtype)
    out = values << inside if op.name == "shl" else values >> inside
    machine.write(op.operands[0], out if op.kind[0] == "s" else np.where(by < bits, out, 0), op.kind, mask)


@executes("shf")
def _funnel(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    low, high, by = (machine.read(name, "u32").astype(np.uint64) for name in op.operands[1:])
    by = by & 31 if "wrap" in op.modifiers else np.minimum(by, np.uint64(32))
    both = low | high << 32
    out = both >> by if "r" in op.modifiers else (both << by) >> 32
    machine.write(op.operands[0], out.astype(np.uint32), "u32", mask)


@executes("bfe", "bfi")
def _field(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    """Take a field of bits out (bfe, with its sign for a signed type), or put one in (bfi)."""
    bits = 8 * KINDS[op.kind].itemsize
    *sources, position, length = op.operands[1:]
    values = [machine.read(name, f"u{bits}").astype(np.uint64) for name in sources]
    at, count = (machine.read(name, "u32").astype(np.uint64) for name in (position, length))
    ones = (np.uint64(1) << count) - np.uint64(1)
    if op.name == "bfi":
        field = ones << at
        out = (values[1] & ~field) | ((values[0] << at) & field)
    else:
        out = (values[0] >> at) & ones
        negative = (out >> (np.maximum(count, 1) - 1)) & 1 if op.kind[0] == "s" else np.uint64(0)
        out = np.where(negative, out | ~ones, out)
    machine.write(op.operands[0], out, f"b{bits}", mask)


@executes("lop3")
def _lop3(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    a, b, c = (machine.read(name, "u32") for name in op.operands[1:4])
    table = int(op.operands[4], 0)
    out = np.zeros(1, np.uint32)
    for row in range(8):
        if table >> row & 1:
            out = out | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    machine.write(op.operands[0], out, "u32", mask)


@executes("popc")
def _popc(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    machine.write(op.operands[0], np.bitwise_count(machine.read(op.operands[1], op.kind)), "u32", mask)


COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


@executes("setp")
def _setp(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    a, b = (machine.read(name, op.kind) for name in op.operands[1:3])
    test = op.modifiers[0]
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.False_
    if test in ("nan", "num"):
        out = unordered if test == "nan" else ~unordered
    else:
        name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(test, test[:2])
        out = COMPARISONS[name](a, b)
        # ltu, equ, ...: true of NaN.
        out = np.where(unordered, len(test) == 3, out)
    if len(op.operands) > 3:
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
        out = combine[_among(op, *combine)](out, machine.read(op.operands[3], "pred"))
    machine.write(op.operands[0], out, "pred", mask)


# Tensor cores. A fragment's lane is 4 * row + quarter; W is warps.


@executes("mma")
def _mma(machine: Machine, op: Instruction, mask: np.ndarray) -> None:
    """D = A B + C for 16 x K times K x 8; with `sp`, A holds two of each four columns and a word says which."""
    whole_W = mask.reshape(-1, 32).all(1)
    if (mask.reshape(-1, 32).any(1) != whole_W).any():
        raise EmulationError("a tensor core needs all lanes of a warp")
    shape = next(each for each in op.modifiers if re.fullmatch(r"m16n8k\d+", each))
    depth, kind = int(shape.removeprefix("m16n8k")), op.modifiers[-3]
    if op.modifiers[-4:-3] == ("f16",) or op.modifiers[-1] != "f32" or kind not in ("bf16", "f16", "tf32"):
        raise EmulationError("such types of a product are not known")
    sparse = any(each.split("::")[0] == "sp" for each in op.modifiers)
    a_WMK = _first_factor(machine, _list(op.operands[1]), kind)
    if sparse:
        words_WL = np.broadcast_to(machine.read(op.operands[4], "u32"), (machine.size,)).reshape(-1, 32)
        a_WMK = _spread(a_WMK, words_WL, int(op.operands[5], 0), whole_W)
    b_WKN = _second_factor(machine, _list(op.operands[2]), kind)
    assert a_WMK.shape[2] == b_WKN.shape[1] == depth
    row, column = np.divmod(np.arange(32), 4)
    sums = a_WMK.astype(np.float64) @ b_WKN.astype(np.float64)
    for index, (into, start) in enumerate(zip(_list(op.operands[0]), _list(op.operands[3]), strict=True)):
        part_T = sums[:, row + 8 * (index >> 1), 2 * column + (index & 1)].reshape(-1)
        machine.write(into, part_T + machine.read(start, "f32"), "f32", mask)


def _numbers(machine: Machine, name: str, kind: str) -> list[np.ndarray]:
    """The numbers of one register, [W, 32] each."""
    bits = np.broadcast_to(machine.read(name, "b32"), (machine.size,))
    found = [(bits & 0xFFFFE000).view(np.float32)] if kind == "tf32" else unpack(bits, kind)
    return [each.reshape(-1, 32) for each in found]


def _first_factor(machine: Machine, names: list[str], kind: str) -> np.ndarray:
    """A [W, 16, K]: registers go by 8 rows first, then by the next columns."""
    row, column = np.divmod(np.arange(32), 4)
    each = 1 if kind == "tf32" else 2
    out = np.zeros((machine.size // 32, 16, 2 * each * len(names)), np.float32)
    for index, name in enumerate(names):
        for second, values in enumerate(_numbers(machine, name, kind)):
            out[:, row + 8 * (index & 1), each * column + second + 4 * each * (index >> 1)] = values
    return out


def _second_factor(machine: Machine, names: list[str], kind: str) -> np.ndarray:
    """B [W, K, 8]: registers go along K."""
    column, row = np.divmod(np.arange(32), 4)
    each = 1 if kind == "tf32" else 2
    out = np.zeros((machine.size // 32, 4 * each * len(names), 8), np.float32)
    for index, name in enumerate(names):
        for second, values in enumerate(_numbers(machine, name, kind)):
            out[:, each * row + second + 4 * each * index, column] = values
    return out


def _spread(kept_WMK: np.ndarray, words_WL: np.ndarray, selector: int, whole_W: np.ndarray) -> np.ndarray:
    """A of m16n8k32 [W, 16, 32] of its kept columns [W, 16, 16].

    PTX ISA, "Sparse mma.m16n8k32": of every four lanes, number 2 * selector + p gives the positions of columns 16p to 16p + 15:
    in its low 16 bits those of row lane / 4, in its high ones those of row lane / 4 + 8. A field of four bits is of four
    columns, and each half of it a position.
    """
    words = words_WL.reshape(-1, 8, 4)[:, :, 2 * selector : 2 * selector + 2]
    halves = np.concatenate([words & 0xFFFF, words >> 16], axis=1)
    fields = (halves[..., None] >> (4 * np.arange(4, dtype=np.uint32))) & 0xF
    first, second = fields & 3, fields >> 2
    if (first >= second)[whole_W].any():
        raise EmulationError("2:4 metadata is not in order")
    # [W, row, p, group, position]
    groups = np.zeros((*fields.shape, 4), np.float32)
    kept = kept_WMK.reshape(*fields.shape, 2)
    np.put_along_axis(groups, first[..., None].astype(int), kept[..., :1], axis=-1)
    np.put_along_axis(groups, second[..., None].astype(int), kept[..., 1:], axis=-1)
    return groups.reshape(len(kept_WMK), 16, 32)
