"""Write a random Llama of any shape, one tensor at a time, so that a model larger than memory can be made.

python evals/bench/random_llama.py DIR --blocks 32 --hidden 4096 --ffn 11008 --heads 32 --kv-heads 32 --vocab 32000
"""

import argparse
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig


def shapes(config: LlamaConfig, block: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix = f"model.layers.{block}."
    head = config.hidden_size // config.num_attention_heads
    width, ffn, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * head
    yield prefix + "self_attn.q_proj.weight", (width, width)
    yield prefix + "self_attn.k_proj.weight", (kv, width)
    yield prefix + "self_attn.v_proj.weight", (kv, width)
    yield prefix + "self_attn.o_proj.weight", (width, width)
    yield prefix + "mlp.gate_proj.weight", (ffn, width)
    yield prefix + "mlp.up_proj.weight", (ffn, width)
    yield prefix + "mlp.down_proj.weight", (width, ffn)
    yield prefix + "input_layernorm.weight", (width,)
    yield prefix + "post_attention_layernorm.weight", (width,)


def write(
    folder: Path,
    *,
    blocks: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    vocab: int = 32000,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    hollow: bool = False,
) -> None:
    """One shard per block, weights normal with the usual 0.02; `hollow` shards are all zeros in files that take no room."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}

    def save(named: list[tuple[str, tuple[int, ...]]], file: Path) -> None:
        if not hollow:
            save_file({name: tensor(shape) for name, shape in named}, file, metadata={"format": "pt"})
            return
        header, end = {}, 0
        for name, shape in named:
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with open(file, "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    outer = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for index, named in enumerate([outer.items(), *(shapes(config, block) for block in range(blocks))]):
        file = f"model-{index + 1:05}-of-{blocks + 1:05}.safetensors"
        listed = list(named)
        weight_map.update(dict.fromkeys((name for name, _ in listed), file))
        save(listed, folder / file)
    index_json = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (
        ("blocks", 32),
        ("hidden", 4096),
        ("ffn", 11008),
        ("heads", 32),
        ("kv-heads", 32),
        ("vocab", 32000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    write(options.pop("folder"), **options)


if __name__ == "__main__":
    main()
