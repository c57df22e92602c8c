"""llmprune: post-training pruning of language models, streamed block by block.

    import llmprune

    result = llmprune.prune("llama", method="wanda", sparsity=0.5, output="llama-sparse")

Importing this package is cheap: torch and transformers are loaded when a function first needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import registration
from ._version import __version__

if TYPE_CHECKING:
    from .errors import LLMPruneError
    from .exporting import Exported, export
    from .loading import load
    from .pruning import Result, prune
    from .recipe import Recipe

__all__ = ["Exported", "LLMPruneError", "Recipe", "Result", "__version__", "export", "load", "prune"]

# Models of blocks with different widths load with `AutoModelForCausalLM` from here on.
registration.register_on_use()

_HOMES = {
    "Exported": "exporting",
    "LLMPruneError": "errors",
    "Recipe": "recipe",
    "Result": "pruning",
    "export": "exporting",
    "load": "loading",
    "prune": "pruning",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
