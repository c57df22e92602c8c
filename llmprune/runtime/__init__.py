"""What runs a pruned model faster, or as if it ran so; and what reads long prompts faster.

from llmprune.runtime import apply, remove, simulate, simulate_decode
from llmprune.runtime import enable_sparse24, disable_sparse24, enable_pbs, disable_pbs
"""

from typing import TYPE_CHECKING

from .forwards import Activity
from .gating import Gated, apply, gated, remove
from .simulation import TEAL_PAPER, simulate, simulate_decode
from .sparse24 import disable_sparse24, enable_sparse24

if TYPE_CHECKING:
    from .pbs import disable_pbs, enable_pbs

__all__ = [
    "TEAL_PAPER",
    "Activity",
    "Gated",
    "apply",
    "disable_pbs",
    "disable_sparse24",
    "enable_pbs",
    "enable_sparse24",
    "gated",
    "remove",
    "simulate",
    "simulate_decode",
]


def __getattr__(name: str) -> object:
    # Its imports are transformers', which what runs gates does without.
    if name not in ("disable_pbs", "enable_pbs"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import pbs

    return getattr(pbs, name)
