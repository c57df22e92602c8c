"""Llama, Mistral, Qwen2 and Qwen3 with blocks of different widths, as llmprune's structured pruning leaves them.

This one file is the whole of it. A copy lies beside the weights of such a model, so that it loads where llmprune is not
installed: `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`. After `import llmprune` it loads without
`trust_remote_code`.

Each class is transformers' own with one difference: block i is built from `config.per_layer_config[i]`, where transformers
keeps `intermediate_size`, `num_attention_heads`, `num_key_value_heads` of a single layer, and `skip` names sub-layers
("attention", "mlp") that the block lacks. With `down_proj_bias`, down_proj has a bias. What blocks compute is transformers'
code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

if not hasattr(PretrainedConfig, "per_layer_config"):
    raise ImportError("Models with blocks of different widths need a transformers that has per_layer_config: update it.")


class AbsentAttention(nn.Module):
    """In place of an attention that was removed: adds nothing to the residual stream."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, past_key_values: Cache | None = None, cache: Cache | None = None, **_: object
    ) -> tuple[Tensor, None]:
        # The one argument has two names: `cache` from transformers 5.24 on.
        cache = past_key_values if cache is None else cache
        if cache is not None:
            # A cache counts the tokens it has seen by what a layer holds, the first one as a rule: this layer must hold
            # something, too, of one head and size 1 unless the cache has set memory aside for more.
            batch, tokens = hidden_states.shape[:2]
            heads, size = 1, 1
            layers = cache.layers
            held = getattr(layers[self.layer_idx], "keys", None) if self.layer_idx < len(layers) else None
            if isinstance(held, Tensor) and held.ndim == 4:
                heads, size = held.shape[1], held.shape[3]
            nothing = hidden_states.new_zeros(1).expand(batch, heads, tokens, size)
            cache.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class AbsentMLP(nn.Module):
    """In place of an MLP that was removed: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


@contextmanager
def _without_blocks(config: PretrainedConfig) -> Iterator[None]:
    """Let a stock class build all but its blocks: it would give them the widths that the configuration has at its top.

    transformers also refuses to read those widths at the top, where they are of no single layer.
    """
    allowed, blocks = config.allow_global_per_layer_attribute_access, config.num_hidden_layers
    config.allow_global_per_layer_attribute_access, config.num_hidden_layers = True, 0
    try:
        yield
    finally:
        config.allow_global_per_layer_attribute_access, config.num_hidden_layers = allowed, blocks


def _layers(config: PretrainedConfig) -> Sequence[PretrainedConfig]:
    """Every block's configuration; early releases with per_layer_config have none where all blocks are alike."""
    return config.per_layer_config or [config] * config.num_hidden_layers


class PerLayerConfig:
    """In front of a stock configuration. Subclasses are @strict again, or the checks of the parent stay in force."""

    def validate_architecture(self) -> None:
        # Not the parent's: that hidden_size is a multiple of the heads need not be so once heads are gone.
        for index, layer in enumerate(_layers(self)):  # type: ignore[arg-type]
            if layer.num_attention_heads % layer.num_key_value_heads:
                raise ValueError(
                    f"Layer {index} has {layer.num_attention_heads} query heads, which is not a multiple of its "
                    f"{layer.num_key_value_heads} key-value heads."
                )

    def validate_rope(self) -> None:
        # The parent's, of one layer: it asks for the number of heads, which must not be read where layers differ in it.
        super(PerLayerConfig, _layers(self)[0]).validate_rope()  # type: ignore[arg-type,misc]


class PerLayerModel:
    """In front of a stock model: its blocks, each from its own configuration."""

    decoder_layer: type[nn.Module]

    def __init__(self, config: PretrainedConfig) -> None:
        with _without_blocks(config):
            super().__init__(config)  # type: ignore[call-arg]
        model: nn.Module = self.model  # type: ignore[attr-defined]
        layers = _layers(config)
        model.layers = nn.ModuleList(self._block(config, layers[index], index) for index in range(len(layers)))
        # Rotary embeddings are computed again while the model runs or loads; a layer's configuration answers all they ask.
        model.rotary_emb.config = layers[0]  # type: ignore[union-attr]
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers judges by the source of a model's module, and this one computes no attention itself.
        return True

    def _block(self, config: PretrainedConfig, layer: PretrainedConfig, index: int) -> nn.Module:
        block = self.decoder_layer(layer, index)
        # The model's configuration, not a copy: that is where set_attn_implementation says what runs attention.
        block.self_attn.config = config  # type: ignore[union-attr]
        skip = getattr(layer, "skip", ())
        if "attention" in skip:
            block.self_attn, block.input_layernorm = AbsentAttention(index), nn.Identity()
        if "mlp" in skip:
            block.mlp, block.post_attention_layernorm = AbsentMLP(), nn.Identity()
        elif getattr(layer, "down_proj_bias", False):
            # Makes up for channels that were removed.
            block.get_submodule("mlp").down_proj = nn.Linear(layer.intermediate_size, layer.hidden_size)
        return block


@strict
class LLMPruneLlamaConfig(PerLayerConfig, LlamaConfig):
    model_type = "llmprune_llama"


class LLMPruneLlamaForCausalLM(PerLayerModel, LlamaForCausalLM):
    config_class = LLMPruneLlamaConfig
    decoder_layer = LlamaDecoderLayer


@strict
class LLMPruneMistralConfig(PerLayerConfig, MistralConfig):
    model_type = "llmprune_mistral"


class LLMPruneMistralForCausalLM(PerLayerModel, MistralForCausalLM):
    config_class = LLMPruneMistralConfig
    decoder_layer = MistralDecoderLayer


@strict
class LLMPruneQwen2Config(PerLayerConfig, Qwen2Config):
    model_type = "llmprune_qwen2"


class LLMPruneQwen2ForCausalLM(PerLayerModel, Qwen2ForCausalLM):
    config_class = LLMPruneQwen2Config
    decoder_layer = Qwen2DecoderLayer


@strict
class LLMPruneQwen3Config(PerLayerConfig, Qwen3Config):
    model_type = "llmprune_qwen3"


class LLMPruneQwen3ForCausalLM(PerLayerModel, Qwen3ForCausalLM):
    config_class = LLMPruneQwen3Config
    decoder_layer = Qwen3DecoderLayer


MODELS = (
    LLMPruneLlamaForCausalLM,
    LLMPruneMistralForCausalLM,
    LLMPruneQwen2ForCausalLM,
    LLMPruneQwen3ForCausalLM,
)
for _model in MODELS:
    # So that save_pretrained puts this file beside the weights.
    _model.config_class.register_for_auto_class("AutoConfig")
    _model.register_for_auto_class("AutoModelForCausalLM")
