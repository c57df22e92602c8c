"""Which compute backends the kernels can run on here, and why the others cannot.

    python -c "from llmprune.kernels.availability import backends; print(backends())"

Importing this module imports neither torch nor triton; asking does import torch.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple


class Backend(NamedTuple):
    """Whether a backend can be used, and the sentence that says why."""

    available: bool
    reason: str


def backends() -> dict[str, Backend]:
    """Look up the backends of this process.

    Returns:
        One entry for each of `cpu`, `cuda` and `triton`, in that order.
    """
    cuda = _cuda()
    return {"cpu": Backend(True, "torch on the CPU"), "cuda": cuda, "triton": _triton(cuda)}


def _cuda() -> Backend:
    import torch

    if torch.cuda.is_available():
        return Backend(True, f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if torch.version.cuda is None and torch.version.hip is None:
        return Backend(False, f"torch {torch.__version__} is a build without GPU support")
    return Backend(False, f"torch {torch.__version__} finds no GPU or no driver")


def _triton(cuda: Backend) -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Backend(True, "triton's interpreter, because TRITON_INTERPRET=1 is set (slow, for tests)")
    if not cuda.available:
        return Backend(False, f"triton is installed but {cuda.reason}")
    return Backend(True, f"triton on {cuda.reason}")
