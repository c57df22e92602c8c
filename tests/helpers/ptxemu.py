"""Run the PTX of a compiled kernel in numpy: what the compiler made of it, checked without a GPU.

    built = aot.binary(kernel, "sm_80", signature, constants, num_warps=4)
    run = ptxemu.run(built.asm["ptx"], (programs, splits), [x, weight, y, rows], built.metadata.shared)
    run.fetched[1] / weight.nbytes            # what the warps asked for, in sectors of 32 bytes

Or, with the kernel's own launcher, see `launches.Launches`.

Tensors (on the CPU) are written in place. Raised as errors: an access beyond a tensor's end, a misaligned one, a tensor core
used by part of a warp, 2:4 metadata out of order, a barrier that not all threads reach, an instruction that is not known.

All threads of some programs are the lanes of numpy's vectors. Where threads part, those with the lowest program counter go
first. Memory and registers that nothing has written hold NaN. An asynchronous copy (cp.async) arrives as late as it may, when
its group is waited for, so that a missing wait shows. Not seen: races, time. Not known: what sm_90 and later brought (wgmma,
TMA). Products on tensor cores are added in float64, and a fused operation is rounded twice (float64, then float32).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from ptx import KINDS, EmulationError, Instruction, Program, constant, narrow, parse, widen
from ptx_instructions import HANDLERS, Copy

# Programs that are run side by side.
TOGETHER = 32
SECTOR = 32
# Every tensor has this much of the address space, so that one kernel argument's pointer never reaches into another's.
SEGMENT = 40
CONTROL = {"bra", "ret", "exit", "bar", "barrier"}


@dataclass(frozen=True)
class Run:
    """What was counted.

    Attributes:
        fetched: bytes that loads asked for, per argument, in whole sectors.
        executed: instructions by name, those of all threads at once as one.
    """

    fetched: list[int]
    executed: Counter[str]


def run(ptx: str, grid: Sequence[int], arguments: Sequence[torch.Tensor | int | float], shared: int = 0) -> Run:
    """Run a kernel.

    Args:
        ptx: one entry point, compiled for sm_80.
        grid: programs along x, y, z.
        arguments: what the entry point takes; those that the compiler adds at the end are null.
        shared: bytes of shared memory.
    """
    program = parse(ptx)
    memory = Memory([each for each in arguments if isinstance(each, torch.Tensor)])
    numbers = iter(range(1, 1 + len(memory.segments)))
    values = [next(numbers) << SEGMENT if isinstance(each, torch.Tensor) else _bits(each) for each in arguments]
    values += [0] * (len(program.parameters) - len(values))
    executed: Counter[str] = Counter()
    grid = (*grid, 1, 1)[:3]
    places = [place[::-1] for place in product(*map(range, reversed(grid)))]
    with np.errstate(all="ignore"):
        for start in range(0, len(places), TOGETHER):
            executed += Machine(program, values, places[start : start + TOGETHER], grid, shared, memory).run()
    fetched = iter(memory.fetched)
    return Run([next(fetched) if isinstance(each, torch.Tensor) else 0 for each in arguments], executed)


def _bits(value: int | float) -> int:
    """A scalar argument's bits; floats are float32."""
    return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else value


class Memory:
    """Global memory: the bytes of every tensor, from its first element to its last."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.segments = [_bytes(tensor) for tensor in tensors]
        self.fetched = [0] * len(tensors)

    def load(self, address_T: np.ndarray, size: int, mask_T: np.ndarray) -> np.ndarray:
        """Bytes [T, size]; zeros where the mask is off."""
        out = np.zeros((len(address_T), size), np.uint8)
        for segment, there_T in self._parts(address_T, size, mask_T):
            rows, index = _rows(self.segments[segment], address_T[there_T], size)
            out[there_T] = rows[index]
            # Aligned accesses of at most 32 bytes lie in one sector; a warp fetches each once.
            sector = np.sort(np.where(there_T, address_T // SECTOR, -1).reshape(-1, 32), axis=1)
            different = np.diff(sector, axis=1, prepend=-1) != 0
            self.fetched[segment] += int(different.sum()) * SECTOR
        return out

    def store(self, address_T: np.ndarray, data: np.ndarray, mask_T: np.ndarray) -> None:
        for segment, there_T in self._parts(address_T, data.shape[1], mask_T):
            rows, index = _rows(self.segments[segment], address_T[there_T], data.shape[1])
            rows[index] = data[there_T]

    def _parts(self, address_T: np.ndarray, size: int, mask_T: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The lanes of each tensor that is accessed."""
        number_T = (address_T >> SEGMENT) - 1
        for number in np.unique(number_T[mask_T]):
            there_T = mask_T & (number_T == number)
            if not 0 <= number < len(self.segments):
                raise EmulationError(f"no tensor has the address {int(address_T[there_T][0]):#x}")
            offset = address_T[there_T] & ((1 << SEGMENT) - 1)
            if offset.max() + size > len(self.segments[number]):
                bytes_ = f"bytes {offset.max()} to {offset.max() + size}"
                raise EmulationError(f"out of bounds: {bytes_} of tensor {number}, which has {len(self.segments[number])}")
            if (offset % size).any():
                raise EmulationError(f"misaligned: {size} bytes of tensor {number} at byte {offset[offset % size != 0][0]}")
            yield int(number), there_T


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """A view of a tensor's bytes, whatever its strides."""
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    start = tensor.storage_offset() * tensor.element_size()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size() if tensor.numel() else 0
    return storage[start : start + length].numpy()


def _rows(buffer: np.ndarray, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A buffer as rows of `size` bytes, and which of them the aligned addresses are."""
    whole = len(buffer) // size * size
    return buffer[:whole].reshape(-1, size), (address & ((1 << SEGMENT) - 1)) // size


class Machine:
    """Some programs side by side; T = programs * threads."""

    def __init__(self, program: Program, values: list, places: list, grid: Sequence[int], shared: int, memory: Memory) -> None:
        self.program, self.memory = program, memory
        self.size = len(places) * program.threads
        self.parameters = dict(zip((name for name, _ in program.parameters), values, strict=True))
        # 0xFF: NaN.
        self.shared_size, self.stride = shared, -(-max(shared, 16) // 16) * 16
        self.shared = np.full(len(places) * self.stride, 0xFF, np.uint8)
        self.block_T = np.repeat(np.arange(len(places)), program.threads)
        thread_T = np.tile(np.arange(program.threads, dtype=np.uint32), len(places))
        one = np.ones(self.size, np.uint32)
        self.registers: dict[str, np.ndarray] = {"%tid.x": thread_T, "%tid.y": 0 * one, "%tid.z": 0 * one}
        self.registers |= {"%ntid.x": one * program.threads, "%ntid.y": one, "%ntid.z": one}
        self.registers |= {"%laneid": thread_T % 32, "%warpid": thread_T // 32}
        for axis, name in enumerate("xyz"):
            self.registers[f"%ctaid.{name}"] = np.array([place[axis] for place in places], np.uint32)[self.block_T]
            self.registers[f"%nctaid.{name}"] = one * grid[axis]
        # Of asynchronous copies: how many groups every thread has closed, and those under way.
        self.groups_T = np.zeros(self.size, int)
        self.copies: list[Copy] = []

    # Control

    def run(self) -> Counter[str]:
        code, end = self.program.code, len(self.program.code)
        executed: Counter[str] = Counter()
        counter_T = np.zeros(self.size, int)
        waiting_T = np.zeros(self.size, bool)
        while (counter_T < end).any():
            ready_T = (counter_T < end) & ~waiting_T
            here = int(counter_T[ready_T].min())
            active_T = ready_T & (counter_T == here)
            others = counter_T[ready_T & ~active_T]
            stop = int(others.min()) if others.size else end
            # As far as these threads go together, and before any others would come along.
            while here < stop and code[here].name not in CONTROL:
                instruction = code[here]
                executed[instruction.name] += 1
                self.execute(instruction, active_T)
                here += 1
            counter_T[active_T] = here
            if here < stop:
                self.control(code[here], active_T, counter_T, waiting_T)
        return executed

    def execute(self, instruction: Instruction, active_T: np.ndarray) -> None:
        handler = HANDLERS.get(instruction.name)
        if handler is None:
            raise EmulationError(f"no such instruction is known: {instruction.text}")
        try:
            handler(self, instruction, active_T & self.guard(instruction))
        except EmulationError as error:
            raise EmulationError(f"{error} in {instruction.text!r}") from error

    def control(self, instruction: Instruction, active_T, counter_T, waiting_T) -> None:
        """Move the threads on, as a branch, an exit or a barrier wants it."""
        taken_T = active_T & self.guard(instruction)
        here = int(counter_T[active_T][0])
        counter_T[active_T] = here + 1
        if instruction.name == "bra":
            counter_T[taken_T] = self.program.labels[instruction.operands[0]]
        elif instruction.name in ("ret", "exit"):
            counter_T[taken_T] = len(self.program.code)
        elif int(instruction.operands[0], 0) or len(instruction.operands) > 1:
            raise EmulationError(f"barriers of some threads are not known: {instruction.text}")
        else:
            waiting_T |= taken_T
        if waiting_T.any():
            self._meet(counter_T, waiting_T)

    def _meet(self, counter_T: np.ndarray, waiting_T: np.ndarray) -> None:
        """Let the threads of every program go on that have all come to the same barrier."""
        counter, waiting = (each.reshape(-1, self.program.threads) for each in (counter_T, waiting_T))
        stopped = (waiting | (counter == len(self.program.code))).all(1)
        if (stopped & waiting.any(1) & ~(waiting.all(1) & (counter == counter[:, :1]).all(1))).any():
            raise EmulationError("a barrier that some threads of its program do not reach")
        waiting &= ~stopped[:, None]

    def guard(self, instruction: Instruction) -> np.ndarray:
        return self.read(instruction.guard, "pred") if instruction.guard else np.True_

    # Operands

    def register(self, name: str) -> np.ndarray:
        """Its bits [T], unsigned and as wide as it was declared, or bool."""
        found = self.registers.get(name)
        if found is None:
            kind = self.program.registers.get(name) or self.program.registers[name.rstrip("0123456789")]
            dtype = np.dtype(bool) if kind == "pred" else np.dtype(f"u{KINDS[kind].itemsize}")
            found = np.full(self.size, False if kind == "pred" else np.iinfo(dtype).max, dtype)
            self.registers[name] = found
        return found

    def read(self, name: str, kind: str) -> np.ndarray:
        """An operand's values, [T], or [1] for a constant; bf16 as float32."""
        if name.startswith("!"):
            return ~self.read(name[1:], kind)
        bits = constant(name)
        if bits is None:
            bits = np.zeros(1, np.uint32) if name in self.program.shared_names else self.register(name)
        if kind == "pred":
            return bits.astype(bool)
        dtype = KINDS[kind]
        if bits.itemsize != dtype.itemsize:
            bits = bits.astype(f"u{dtype.itemsize}")
        return widen(bits) if kind == "bf16" else bits.view(dtype)

    def write(self, name: str, values: np.ndarray, kind: str, mask_T: np.ndarray) -> None:
        if name == "_":
            return
        register = self.register(name)
        values = np.asarray(values)
        if kind == "pred":
            bits = values.astype(bool)
        elif kind == "bf16":
            bits = narrow(values)
        else:
            bits = values.astype(KINDS[kind], copy=False)
            if kind[0] == "s" and bits.itemsize < register.itemsize:
                bits = bits.astype(f"i{register.itemsize}")
            bits = bits.view(f"u{bits.itemsize}")
        np.copyto(register, bits, where=mask_T, casting="unsafe")

    def address(self, operand: str) -> np.ndarray:
        """[T] of an operand such as [%rd1+16]."""
        base, _, offset = operand.strip("[]").partition("+")
        start = self.read(base.strip(), "u64").astype(np.int64)
        return np.broadcast_to(start + int(offset or "0", 0), (self.size,))

    # Memory

    def load(self, space: str, address_T: np.ndarray, size: int, mask_T: np.ndarray) -> np.ndarray:
        if space == "global":
            return self.memory.load(address_T, size, mask_T)
        out = np.zeros((self.size, size), np.uint8)
        rows, index_T = self._shared_rows(address_T, size, mask_T)
        out[mask_T] = rows[index_T[mask_T]]
        return out

    def store(self, space: str, address_T: np.ndarray, data: np.ndarray, mask_T: np.ndarray) -> None:
        if space == "global":
            self.memory.store(address_T, data, mask_T)
            return
        rows, index_T = self._shared_rows(address_T, data.shape[1], mask_T)
        rows[index_T[mask_T]] = data[mask_T]

    def _shared_rows(self, address_T: np.ndarray, size: int, mask_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        used = address_T[mask_T]
        if used.size and (used.min() < 0 or used.max() + size > self.shared_size):
            raise EmulationError(f"out of bounds: bytes {used.min()} to {used.max() + size} of {self.shared_size} shared ones")
        if (used % size).any():
            raise EmulationError(f"misaligned: {size} shared bytes at {used[used % size != 0][0]}")
        return self.shared.reshape(-1, size), (address_T + self.block_T * self.stride) // size
