"""What runs a pruned model faster, or as if it ran so.

from llmprune.runtime import apply, remove, simulate, simulate_decode
"""

from .forwards import Activity
from .gating import Gated, apply, gated, remove
from .simulation import TEAL_PAPER, simulate, simulate_decode

__all__ = ["TEAL_PAPER", "Activity", "Gated", "apply", "gated", "remove", "simulate", "simulate_decode"]
