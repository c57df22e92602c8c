"""Compile a Triton kernel for a GPU that is not there, and read what the binary says of it.

TRITON_INTERPRET has to be unset in the process: it changes what @triton.jit returns.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
# Shared memory that one program may have.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on a target. `loads` counts the instructions that load from global memory by their width."""

    registers: int
    spills: int
    shared: int
    loads: Counter[str]


def compile_for(kernel, target: str, signature: dict[str, str], constants: dict[str, object], **options) -> Compiled:
    """Compile a @triton.jit function.

    Args:
        target: a key of TARGETS.
        signature: type of every argument at run time, as "*bf16", "*fp32", "i32".
        constants: values of the constexpr arguments.
        options: num_warps and the like.
    """
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    # What the launcher would say of pointers and of sizes that are multiples of 16; without it loads are narrow.
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in signature}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=divisible)
    binary = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("sm"):
        registers, spills = _nvidia(binary.asm["cubin"])
        loads = Counter(re.findall(r"ld\.global\S*?\.(v\d\.[bfu]\d+|[bfus]\d+)\s", binary.asm["ptx"]))
    else:
        text = binary.asm["amdgcn"]
        registers, spills = _number(text, "vgpr_count"), _number(text, "vgpr_spill_count") + _number(text, "sgpr_spill_count")
        loads = Counter(re.findall(r"(?:global|buffer)_load_(\w+)", text))
    return Compiled(registers, spills, binary.metadata.shared, loads)


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers, and instructions that spill them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    assert found, "cuobjdump says nothing of registers"
    return int(found[1]), len(re.findall(r"\b(?:LDL|STL)\b", code))


def _number(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    assert found, f"no {name} in the assembly"
    return int(found[1])
