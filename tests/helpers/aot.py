"""Compile a kernel for a GPU that is not there, and read what the binary says of it.

    compiled = aot.compile_for(kernel, "sm_90", {"x_ptr": "*bf16", "rows": "i32"}, {"BLOCK": 64}, num_warps=4)

A @triton.jit or @gluon.jit function. TRITON_INTERPRET has to be unset in the process: it changes what @triton.jit returns.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one program may have.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on a target.

    Attributes:
        registers: of a thread.
        spills: instructions that spill them (NVIDIA), or registers spilt (AMD).
        shared: bytes of shared memory.
        loads: instructions that load from global memory, by their width.
        opcodes: instructions of the binary, by their full name, as HMMA.SP.16832.F32.BF16.
    """

    registers: int
    spills: int
    shared: int
    loads: Counter[str]
    opcodes: Counter[str]


def compile_for(
    kernel,
    target: str,
    signature: dict[str, str],
    constants: dict[str, object],
    divisible: Collection[str] | None = None,
    **options,
) -> Compiled:
    """What the binary says of a kernel; arguments as `binary`."""
    built = binary(kernel, target, signature, constants, divisible, **options)
    shared = built.metadata.shared
    if target.startswith("sm"):
        registers, opcodes = _nvidia(built.asm["cubin"])
        spills = sum(count for name, count in opcodes.items() if name.startswith(("LDL", "STL")))
        loads = Counter(re.findall(r"ld\.global\S*?\.(v\d\.[bfu]\d+|[bfus]\d+)\s", built.asm["ptx"]))
        return Compiled(registers, spills, shared, loads, opcodes)
    text = built.asm["amdgcn"]
    registers, spills = _number(text, "vgpr_count"), _number(text, "vgpr_spill_count") + _number(text, "sgpr_spill_count")
    loads = Counter(re.findall(r"(?:global|buffer)_load_(\w+)", text))
    return Compiled(registers, spills, shared, loads, Counter(re.findall(r"^\s+([a-z]+_\w+)", text, re.MULTILINE)))


def binary(
    kernel,
    target: str,
    signature: dict[str, str],
    constants: dict[str, object],
    divisible: Collection[str] | None = None,
    **options,
) -> CompiledKernel:
    """Compile a @triton.jit or @gluon.jit function; its `asm["ptx"]` and `metadata.shared` are what `ptxemu.run` takes.

    Args:
        target: a key of TARGETS.
        signature: type of every argument at run time, as "*bf16", "*fp32", "i32".
        constants: values of the constexpr arguments.
        divisible: the arguments that the launcher would find to be multiples of 16, pointers and sizes; by default all.
            Without it loads are narrow.
        options: num_warps and the like.
    """
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in (signature if divisible is None else divisible)}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = _source_class(kernel)(fn=kernel, signature=types, constexprs=values, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def _source_class(kernel) -> type[ASTSource]:
    # Gluon is younger than Triton.
    if type(kernel).__name__ == "GluonJITFunction":
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    return ASTSource


def _nvidia(cubin: bytes) -> tuple[int, Counter[str]]:
    """Registers, and the instructions."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    assert found, "cuobjdump says nothing of registers"
    return int(found[1]), Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE))


def _number(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    assert found, f"no {name} in the assembly"
    return int(found[1])
