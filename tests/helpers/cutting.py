"""Cut a tiny model by hand: the directory that structured pruning would write for a plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import llmprune.surgery
from llmprune.surgery import MODELING_FILE, Anatomy, Format, HeadsMode, Kept, Plan, anatomy, config_json, mask, pad, shrink


def anatomy_of(folder: Path) -> Anatomy:
    return anatomy(AutoConfig.from_pretrained(folder))


def cut(
    source: Path,
    kept: Sequence[Kept],
    out: Path,
    *,
    heads_mode: HeadsMode = "kv_group",
    format: Format = "auto",
    blocks: str = "model.layers",
) -> Plan:
    """Write the pruned form of the single-file model in `source` to `out`."""
    bodies = anatomy_of(source)
    plan = Plan.of(bodies, kept, parent="by hand", heads_mode=heads_mode, method="by hand")
    config, needs_file = config_json(json.loads((source / "config.json").read_text()), plan, bodies, format)
    stored = load_file(source / "model.safetensors")
    tensors = {name: tensor for name, tensor in stored.items() if f"{blocks}." not in name}
    for index, each in enumerate(kept):
        prefix = f"{blocks}.{index}."
        block = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        if format == "padded":
            block = pad(block, each, bodies, index, plan.padded(bodies))
        else:
            block = (mask if format == "masked" else shrink)(block, each, bodies, index)
        tensors |= {prefix + name: tensor for name, tensor in block.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config))
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / file).exists():
            shutil.copy(source / file, out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if needs_file:
        shutil.copy(Path(llmprune.surgery.__file__).with_name(MODELING_FILE), out)
    return plan
