"""Tells transformers of the model types in modeling_llmprune.py and of our attention, once somebody loads a model.

`import llmprune` must cost nothing, so it imports neither torch nor transformers; and model classes cannot be built while
transformers is half imported, as it is when its auto classes appear. Hence two steps: when the module of `AutoConfig` has
been imported, the two functions that make a configuration (every auto class calls one first) get a call to `register` in front.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

AUTO = "transformers.models.auto.configuration_auto"
# Permuted block-sparse attention, see runtime/pbs.py.
ATTENTION = "llmprune_pbs"


@functools.cache
def register() -> None:
    """Make transformers know our attention, and its auto classes our model types."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
    from transformers.masking_utils import sdpa_mask

    from .modeling_llmprune import MODELS

    AttentionInterface.register(ATTENTION, _attention)
    # Models drop every mask, of padding too, for an attention that has no function for masks.
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    for model in MODELS:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


def _attention(*args: object, **options: object) -> object:
    from .runtime.pbs import attention

    return attention(*args, **options)  # type: ignore[arg-type]


def register_on_use() -> None:
    """Call `register` the first time transformers is asked for a configuration, in whatever order things are imported."""
    if module := sys.modules.get(AUTO):
        _prepare(module)
    else:
        sys.meta_path.insert(0, _Finder())


def _prepare(module: ModuleType) -> None:
    for name in ("from_pretrained", "for_model"):
        setattr(module.AutoConfig, name, classmethod(_registering(getattr(module.AutoConfig, name).__func__)))


def _registering(original: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(original)
    def wrapped(*args: object, **options: object) -> object:
        register()
        return original(*args, **options)

    return wrapped


class _Finder:
    """Finds the module of `AutoConfig` as it is found anyway, but prepared once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec and spec.loader:
            run = spec.loader.exec_module

            def run_and_prepare(module: ModuleType) -> None:
                run(module)
                _prepare(module)

            spec.loader.exec_module = run_and_prepare  # type: ignore[method-assign]
        return spec
