"""Which compute backends the kernels can run on here, and why the others cannot.

    python -c "from llmprune.kernels.availability import backends; print(backends())"

Importing this module imports neither torch nor triton; asking does import torch.
"""

from __future__ import annotations

import importlib.util
import os


def backends() -> dict[str, str]:
    """Describe the backends of this process.

    Returns:
        For each of `cpu`, `cuda` and `triton`, in that order, "available: ..." or "unavailable: ..." with the reason.
    """
    cuda, cuda_reason = _cuda()
    triton, triton_reason = _triton(cuda, cuda_reason)
    rows = {"cpu": (True, "torch on the CPU"), "cuda": (cuda, cuda_reason), "triton": (triton, triton_reason)}
    return {name: f"{'available' if usable else 'unavailable'}: {reason}" for name, (usable, reason) in rows.items()}


def _cuda() -> tuple[bool, str]:
    import torch

    if torch.cuda.is_available():
        return True, f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    if torch.version.cuda is None and torch.version.hip is None:
        return False, f"torch {torch.__version__} is a build without GPU support"
    return False, f"torch {torch.__version__} finds no GPU or no driver"


def _triton(cuda: bool, cuda_reason: str) -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, "triton's interpreter, because TRITON_INTERPRET=1 is set (slow, for tests)"
    if not cuda:
        return False, f"triton is installed but {cuda_reason}"
    return True, f"triton on {cuda_reason}"
