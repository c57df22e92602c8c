"""C++ kernels for the CPU, compiled when they are first used, for the processor at hand.

    python -c "from llmprune.kernels import native; print(native.reason('gemv') or 'builds')"

The library lies in a cache (`$XDG_CACHE_HOME/llmprune/kernels`) under a hash of everything that decides its content: source,
compiler, flags, processor. OpenMP's calls are left open when it is linked and found in the runtime that torch has loaded, so
that there is one pool of threads; where that is not possible the library is built without threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC")
SECONDS = 300


@functools.cache
def library(name: str) -> ctypes.CDLL | str:
    """The compiled `kernels/NAME.cpp`, or in a sentence why there is none. What failed is not tried again in this process."""
    compiler = shutil.which(os.environ.get("CXX", "")) or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        return "no C++ compiler was found (g++, c++, clang++ or $CXX)"
    import torch  # noqa: F401  its OpenMP runtime

    reason = ""
    for parallel in (True, False):
        try:
            return ctypes.CDLL(str(_built(name, compiler, parallel)))
        except subprocess.CalledProcessError as error:
            reason = f"{compiler} does not compile {name}.cpp: {_last_line(error.stderr)}"
        # RuntimeError: there is no home directory to cache it in.
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            reason = f"{name}.cpp could not be built or loaded: {error}"
    return reason


def reason(name: str) -> str:
    """Why a library cannot be had; empty if it can."""
    found = library(name)
    return found if isinstance(found, str) else ""


def _built(name: str, compiler: str, parallel: bool) -> Path:
    """The library's file, compiled if it is not there yet."""
    source = Path(__file__).resolve().with_name(f"{name}.cpp")
    flags = [*FLAGS, *(["-fopenmp"] if parallel else [])]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=SECONDS).stdout
    # A source may include any of the headers beside it.
    texts = b"".join(each.read_bytes() for each in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256("\0".join([version, *flags, processor()]).encode() + texts).hexdigest()[:16]
    file = folder() / f"{name}-{key}.so"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as work:
            compiled, linked = f"{work}/{name}.o", f"{work}/{name}.so"
            for command in (
                [compiler, *flags, "-c", str(source), "-o", compiled],
                [compiler, "-shared", compiled, "-o", linked],
            ):
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
            # In one step, since another process may be building the same.
            os.replace(linked, file)
    return file


def folder() -> Path:
    """Where libraries are kept, and what kernels measured of this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmprune" / "kernels"


def names() -> list[str]:
    """The libraries that there can be."""
    return sorted(file.stem for file in Path(__file__).resolve().parent.glob("*.cpp"))


def processor() -> str:
    """What -march=native looks at, since a home directory may be shared by unlike machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "it says nothing"
