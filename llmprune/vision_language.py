"""Vision-language checkpoints: the text decoder is pruned as a causal language model of its own, everything else is copied.

In `config.json` the decoder is the `text_config`. Its tensors have a prefix, which depends on who wrote the checkpoint and
when: the same model may lie under `language_model.model.`, `model.language_model.` or `model.`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

TYPES = ("gemma3", "llava", "qwen2_5_vl", "qwen3_vl")
# Decoders that transformers has within these models only, and the causal language model that computes the same on text: where
# there is no image, the three rotary positions of a token are one.
_ALONE = {"qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
_MULTIMODAL_ROPE = ("mrope_section", "mrope_interleaved")


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the text decoder as a causal language model of its own."""
    from transformers import AutoConfig

    text = config.get_text_config()
    if text.model_type in _ALONE:
        values = {key: value for key, value in text.to_dict().items() if key != "model_type"}
        rope = values.get("rope_parameters") or {}
        values["rope_parameters"] = {key: value for key, value in rope.items() if key not in _MULTIMODAL_ROPE}
        text = AutoConfig.for_model(_ALONE[text.model_type], **values)
    # Where the two disagree, transformers ties what the whole model's configuration says.
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def stored_names(name: str) -> tuple[str, str]:
    """What a parameter of the text decoder ("model.layers.0.mlp.up_proj.weight") may be called in the whole checkpoint."""
    return f"language_model.{name}", f"model.language_model.{name.removeprefix('model.')}"


def auto_name(directory: Path) -> str:
    """The class of transformers that loads a model directory."""
    file = directory / "config.json"
    model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None
    return "AutoModelForImageTextToText" if model_type in TYPES else "AutoModelForCausalLM"


def auto_class(directory: Path) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The same as a class."""
    import transformers

    found: type[AutoModelForCausalLM] | type[AutoModelForImageTextToText] = getattr(transformers, auto_name(directory))
    return found
