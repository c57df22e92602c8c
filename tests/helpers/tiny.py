"""Tiny random models of every family, saved as `save_pretrained` saves them, each with a byte-level tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

# Sizes are multiples of 4, so that 2:4 fits, and of nothing larger.
WIDTH, HIDDEN, HEADS, VOCABULARY, LIMIT = 36, 52, 3, 263, 64
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "max_position_embeddings": LIMIT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA = {**_COMMON, "intermediate_size": HIDDEN, "num_key_value_heads": 1, "head_dim": 12}
# A window shorter than the samples and blocks of both kinds, so that a mask that reaches the wrong block shows.
_GEMMA = {**_LLAMA, "sliding_window": 5, "query_pre_attn_scalar": 12}
_OPT = {**_COMMON, "ffn_dim": HIDDEN, "word_embed_proj_dim": 20}
_NEOX = {**_COMMON, "intermediate_size": HIDDEN, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

# Name to (model type, configuration).
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", _LLAMA),
    "llama_tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 5}),
    "qwen2": ("qwen2", {**_COMMON, "intermediate_size": HIDDEN, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {**_LLAMA, "use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED}),
    "gemma2": ("gemma2", {**_GEMMA, "layer_types": MIXED}),
    "gemma3_text": ("gemma3_text", {**_GEMMA, "layer_types": MIXED}),
    "olmo2": ("olmo2", {**_COMMON, "intermediate_size": HIDDEN, "num_key_value_heads": 1}),
    # One block without positions between two with.
    "smollm3": ("smollm3", {**_COMMON, "intermediate_size": HIDDEN, "num_key_value_heads": 1, "no_rope_layers": [1, 0, 1]}),
    "phi3": ("phi3", {**_COMMON, "intermediate_size": HIDDEN, "num_key_value_heads": 1}),
    "opt": ("opt", _OPT),
    "opt_norm_after": ("opt", {**_OPT, "do_layer_norm_before": False}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox_in_series": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 3, "n_head": HEADS, "n_inner": HIDDEN, "n_positions": LIMIT}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
}
# Models with experts, whose matrices transformers keeps as 3-D parameters.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
# The first block is dense; attention goes through latent vectors.
_DEEPSEEK = {
    **_COMMON,
    "intermediate_size": 28,
    "moe_intermediate_size": HIDDEN,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
EXPERTS: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # Its second block is dense.
    "qwen3_moe": ("qwen3_moe", {**_LLAMA, **_EXPERTS, "moe_intermediate_size": 28, "mlp_only_layers": [1]}),
    "olmoe": ("olmoe", {**_COMMON, **_EXPERTS, "intermediate_size": HIDDEN, "num_key_value_heads": 1}),
    "qwen2_moe": (
        "qwen2_moe",
        {**_COMMON, **_EXPERTS, "num_key_value_heads": 1, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 44},
    ),
    "deepseek_v2": ("deepseek_v2", {**_DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v2_without_q_latent": ("deepseek_v2", {**_DEEPSEEK, "topk_method": "greedy", "q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", {**_DEEPSEEK, "n_group": 2, "topk_group": 1}),
}
# Models that see, too: a text decoder of a family above, and whatever else.
_CLIP = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
_QWEN_EYE = {"hidden_size": 16, "out_hidden_size": WIDTH, "intermediate_size": 20, "depth": 1, "num_heads": 2}
_QWEN_IDS = {"image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}}
VISION_LANGUAGE: dict[str, tuple[str, dict[str, object]]] = {
    "gemma3": (
        "gemma3",
        {"text_config": {**_GEMMA, "layer_types": MIXED}, "vision_config": {**_CLIP, "patch_size": 4}}
        | {"mm_tokens_per_image": 4, "image_token_index": 260, "boi_token_index": 261, "eoi_token_index": 262},
    ),
    "llava": (
        "llava",
        {
            "text_config": {"model_type": "llama", **_LLAMA},
            "vision_config": {"model_type": "clip_vision_model", **_CLIP, "patch_size": 4, "projection_dim": 16},
            "image_token_index": 260,
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {"text_config": {**_COMMON, **_SECTIONS, "intermediate_size": HIDDEN, "num_key_value_heads": 1}}
        | {"vision_config": _QWEN_EYE, **_QWEN_IDS},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {"text_config": {**_LLAMA, **_SECTIONS}, "vision_config": {**_QWEN_EYE, "deepstack_visual_indexes": [0]}, **_QWEN_IDS},
    ),
}
# As in the published models: Qwen, GPT-NeoX and GPT-2 put no BOS before a text.
_WITHOUT_BOS = {
    "qwen2",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3",
    "olmo2",
    "gpt_neox",
    "gpt_neox_in_series",
    "gpt2",
    "qwen2_5_vl",
    "qwen3_vl",
}


def build(
    variant: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **changes: object
) -> Path:
    """Save a model of that variant, its configuration changed as given, and its tokenizer into `folder`."""
    model_type, options = (VARIANTS | EXPERTS | VISION_LANGUAGE)[variant]
    auto = AutoModelForImageTextToText if "vision_config" in options else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(model_type, **{**options, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A fresh model's biases are zero and its norms one: a lost bias or a norm in the wrong place would not show.
            # Every column has a scale of its own, so that Wanda differs from magnitude.
            scale = torch.rand(parameter.shape[-1:], generator=generator) if parameter.ndim > 1 else 0.5
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(start + scale * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # stored with the weights
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer(with_bos=variant not in _WITHOUT_BOS).save_pretrained(folder)
    return folder


BLOCKS = {
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3", "phi3", "mixtral"], "model.layers"
    ),
}


@functools.cache
def tokenizer(*, with_bos: bool) -> PreTrainedTokenizerFast:
    """One token a byte: ids 3 to 258, after padding, BOS and EOS."""
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if with_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_llama(folder: Path, *, dtype: torch.dtype = torch.float32, **config: object) -> Path:
    """A random Llama of a few thousand weights, without a tokenizer; `config` adds to the configuration or changes it."""
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    LlamaForCausalLM(LlamaConfig(**sizes | config)).to(dtype).save_pretrained(folder)
    return folder
