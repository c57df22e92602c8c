"""`llmprune.load`: one call from any model that llmprune reads or writes to a ready transformers model.

    model = llmprune.load("llama-sparse")

What llmprune writes is a Hugging Face directory that transformers loads, by our own classes where blocks have different widths
(see registration.py); packed weights (see packing.py), which it refuses, are unpacked for it. A plan of gates that lies beside
the weights is applied (see runtime/gating.py).
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from .activation_plan import Plan
from .checkpoint import Checkpoint
from .errors import LLMPruneError
from .gguf import quiet_transformers
from .models import resolve
from .output import RECORD, STATE
from .packing import QUANTISATION
from .recipe import from_options
from .registration import register
from .settings import choose_device
from .verify import read_record
from .vision_language import auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    model: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gated: bool = True,
) -> PreTrainedModel:
    """Load a model to run it.

    Args:
        model: what `llmprune prune` wrote, any Hugging Face directory, Hub id, GGUF file or alias.
        device: cpu, cuda or cuda:N; by default the GPU where there is one.
        dtype: float32, bfloat16 or float16; by default as the weights are stored.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run modelling code that the model brings.
        gated: with `--method wina`, leave inputs out when writing tokens; False gives the dense model.

    Returns:
        The model in evaluation mode, on the device.

    Raises:
        LLMPruneError: there is no such model, it is unfinished, damaged or incomplete, or wants to run code of its own; its
            plan of gates is damaged or was made for other weights.
    """
    options: dict[str, object] = {"model": str(model), "device": device, "dtype": dtype}
    where, _ = choose_device(from_options(options))
    directory = resolve(str(model), revision=revision).directory
    check_model(directory, trust_remote_code=trust_remote_code)
    plan = Plan.load(directory) if gated else None
    loaded = load_weights(directory, dtype or "auto", trust_remote_code=trust_remote_code)
    loaded.to(torch.device(where))  # type: ignore[arg-type]
    loaded.eval()
    if plan:
        from .runtime.gating import apply

        apply(loaded, plan)
    return loaded


def check_model(directory: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """What can be said of a model directory from its headers.

    Raises:
        LLMPruneError: an unfinished run of llmprune, no model, a missing or truncated shard, or code that is not trusted.
    """
    if (directory / STATE).is_dir() and not (directory / RECORD).is_file():
        read_record(directory)  # says that the run is unfinished
    config = directory / "config.json"
    if not config.is_file():
        raise LLMPruneError(f"{directory} holds no config.json: give a Hugging Face model directory.")
    try:
        described = dict(json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise LLMPruneError(f"{config} is not a JSON object ({error}): download it again.") from error
    if described.get("auto_map") and not trust_remote_code and not _known(described.get("model_type")):
        raise LLMPruneError(
            f"{directory} asks to run Python code of its own (auto_map in config.json): read that code, then pass "
            "--trust-remote-code (in Python trust_remote_code=True) if you trust it."
        )
    return Checkpoint.open(directory)


def _known(model_type: object) -> bool:
    from transformers import CONFIG_MAPPING

    register()
    return model_type in CONFIG_MAPPING


def load_weights(directory: Path, dtype: str | torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model as transformers loads it, on the CPU, its weights packed or not.

    Raises:
        LLMPruneError: transformers cannot, or tensors are missing or damaged.
    """
    checkpoint = Checkpoint.open(directory)
    load = _load_packed if checkpoint.format else _load_plain
    try:
        with quiet_transformers():
            model, missing = load(checkpoint, dtype, trust_remote_code=trust_remote_code)
    except LLMPruneError:
        raise
    except Exception as error:  # whatever a value or shape of the wrong kind sets off in transformers
        reason = " ".join(str(error).split())
        raise LLMPruneError(
            f"transformers cannot load {directory} as a causal language model ({reason}): download it again, or give another."
        ) from error
    if missing:
        # transformers fills them with random numbers.
        raise LLMPruneError(
            f"{directory} lacks {len(missing)} tensors that its config.json calls for, {missing[0]} among them: the checkpoint "
            "is incomplete or belongs to another configuration."
        )
    return model


Loaded = tuple["PreTrainedModel", list[str]]


def _load_plain(checkpoint: Checkpoint, dtype: str | torch.dtype, *, trust_remote_code: bool) -> Loaded:
    """The model and the names of what its files lack."""
    found = auto_class(checkpoint.directory).from_pretrained(
        checkpoint.directory, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
    )
    return _with_missing(found)


def _load_packed(checkpoint: Checkpoint, dtype: str | torch.dtype, *, trust_remote_code: bool) -> Loaded:
    """The same of weights that are unpacked here: transformers takes weights from memory for a class of models only."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)
    if hasattr(config, QUANTISATION):
        delattr(config, QUANTISATION)
    with torch.device("meta"):
        kind = type(auto_class(checkpoint.directory).from_config(config, trust_remote_code=trust_remote_code))
    weights = {name: checkpoint.read(name) for name in checkpoint.entries}
    found = kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)
    model, missing = _with_missing(found)
    model.name_or_path = model.config.name_or_path = str(checkpoint.directory)
    with suppress(OSError):  # where there is none it follows from the configuration
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model, missing


def _with_missing(found: object) -> Loaded:
    # Typed as the model alone, whatever output_loading_info says.
    model, loading = cast("tuple[PreTrainedModel, dict[str, set[str]]]", found)
    return model, sorted(loading["missing_keys"])
