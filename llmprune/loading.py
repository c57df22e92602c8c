"""`llmprune.load`: one call from any model that llmprune reads or writes to a ready transformers model.

    model = llmprune.load("llama-sparse")

Every format that llmprune writes is a Hugging Face directory that transformers loads, by our own classes where blocks have
different widths (see registration.py); a format that is not gets a function beside `_plain`. A plan of gates that lies beside
the weights is applied (see runtime/gating.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from .activation_plan import Plan
from .checkpoint import Checkpoint
from .errors import LLMPruneError
from .gguf import quiet_transformers
from .models import resolve
from .output import RECORD, STATE
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
    loaded = _plain(directory, dtype or "auto", trust_remote_code=trust_remote_code)
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


def _plain(directory: Path, dtype: str, *, trust_remote_code: bool) -> PreTrainedModel:
    try:
        with quiet_transformers():
            found = auto_class(directory).from_pretrained(
                directory, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # whatever a value or shape of the wrong kind sets off in transformers
        reason = " ".join(str(error).split())
        raise LLMPruneError(
            f"transformers cannot load {directory} as a causal language model ({reason}): download it again, or give another."
        ) from error
    # Typed as the model alone, whatever output_loading_info says.
    model, loading = cast("tuple[PreTrainedModel, dict[str, set[str]]]", found)
    if missing := sorted(loading["missing_keys"]):
        # transformers fills them with random numbers.
        raise LLMPruneError(
            f"{directory} lacks {len(missing)} tensors that its config.json calls for, {missing[0]} among them: the checkpoint "
            "is incomplete or belongs to another configuration."
        )
    return model
