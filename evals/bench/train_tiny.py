"""Tiny models of several architectures that have learnt to write children's stories, each in minutes of one CPU core.

    LLMPRUNE_DATA=... python evals/bench/train_tiny.py [FAMILY ...]

Text: what `models/stories260K` (a Llama of 0.26 M parameters, trained on TinyStories, arXiv 2305.07759; vocabulary 512)
writes at temperature 1 from BOS, so that nothing is seen twice and the best possible perplexity on held-out text is known: the
writer's. Training: AdamW (0.9, 0.95), decay 0.1 on all matrices, clipped at norm 1, linear warm-up over a twentieth of the
steps, cosine to a tenth of the peak. Initial weights, text and its order depend on the seed only, so a machine trains the same
bytes every time. Models lie in `$LLMPRUNE_CACHE/tiny`, by default ~/.cache/llmprune/tiny, with `training.json`: the loss along
the way.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import data_dir
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

WRITER = "models/stories260K"
VOCABULARY, BOS = 512, 1
COPIED = ("tokenizer.json", "tokenizer_config.json")
BALANCE = 0.01  # of the experts' load-balancing loss

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": True}
_LLAMA = {
    **_TOKENS,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
_GEMMA = {"attn_implementation": "eager", "sliding_window": 64, "query_pre_attn_scalar": 32}
_MIXTRAL = {"num_hidden_layers": 4, "intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 128, "n_layer": 5, "n_head": 4, "n_positions": 256, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
# Configurations by model type: 1.05, 1.07, 1.05 and 1.84 M parameters.
SHAPES: dict[str, dict[str, object]] = {
    "qwen3": _LLAMA,
    "gpt2": {**_TOKENS, **_GPT2},
    "gemma2": {**_LLAMA, **_GEMMA},
    "mixtral": {**_LLAMA, **_MIXTRAL},
}


@dataclass(frozen=True)
class Protocol:
    """How much is written and learnt."""

    steps: int = 600
    batch: int = 8
    seqlen: int = 128
    peak: float = 3e-3
    calibration: int = 128
    test: int = 256
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Stories:
    """Samples of token ids that start with BOS; every part is text of its own."""

    train_NT: Tensor
    calibration_NT: Tensor
    test_NT: Tensor
    sha256: str


def cache() -> Path:
    """Where models and their text lie."""
    return Path(os.environ.get("LLMPRUNE_CACHE") or "~/.cache/llmprune").expanduser() / "tiny"


def stories(protocol: Protocol, root: Path) -> Stories:
    """The text of a protocol, from the cache if it was written before."""
    parts = (protocol.calibration, protocol.test, protocol.steps * protocol.batch)
    file = root / f"stories-{sum(parts)}x{protocol.seqlen}-{protocol.seed}.safetensors"
    if not file.exists():
        ids_NT = _write(sum(parts), protocol.seqlen, protocol.seed)
        root.mkdir(parents=True, exist_ok=True)
        save_file({"ids_NT": ids_NT}, f"{file}.part")
        os.replace(f"{file}.part", file)
    ids_NT = load_file(file)["ids_NT"]
    calibration_NT, test_NT, train_NT = ids_NT.split(parts)
    return Stories(train_NT, calibration_NT, test_NT, hashlib.sha256(ids_NT.numpy().astype("<i8").tobytes()).hexdigest())


def _write(samples: int, seqlen: int, seed: int, together: int = 512) -> Tensor:
    """Let the writer write, int64 [samples, seqlen]; after the end of a story comes the next one."""
    writer = AutoModelForCausalLM.from_pretrained(data_dir() / WRITER, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    written = []
    for start in range(0, samples, together):
        ids_NT = next_N1 = torch.full((min(together, samples - start), 1), BOS)
        past = None
        with torch.inference_mode():
            while ids_NT.shape[1] < seqlen:
                out = writer(input_ids=next_N1, past_key_values=past, use_cache=True)
                past = out.past_key_values
                next_N1 = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
                ids_NT = torch.cat([ids_NT, next_N1], dim=1)
        written.append(ids_NT)
    return torch.cat(written)


def trained(family: str, protocol: Protocol, root: Path) -> Path:
    """A model directory of that family, trained if it is not in the cache."""
    text = stories(protocol, root)
    config = SHAPES[family]
    key = json.dumps([config, asdict(protocol), text.sha256], sort_keys=True)
    folder = root / f"{family}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    torch.manual_seed(protocol.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    facts = {"family": family, "parameters": sum(p.numel() for p in model.parameters()), **asdict(protocol)}
    facts |= {"stories_sha256": text.sha256, **train(model, text.train_NT, protocol)}
    with tempfile.TemporaryDirectory(dir=root) as aside:
        part = Path(aside) / "model"
        model.save_pretrained(part)
        for name in COPIED:
            shutil.copy(data_dir() / WRITER / name, part)
        (part / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(part, folder)
    return folder


def train(model: nn.Module, train_NT: Tensor, protocol: Protocol) -> dict[str, object]:
    """Train in place, every sample once in order; returns the seconds it took and the mean loss of every twentieth."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=protocol.peak, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, protocol.steps))
    routed = {"output_router_logits": True} if hasattr(model.config, "num_local_experts") else {}
    losses: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    model.train()
    for step, ids_BT in enumerate(train_NT.split(protocol.batch)):
        out = model(input_ids=ids_BT, use_cache=False, **routed)
        loss = cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        losses.append(loss.item())
        (loss + BALANCE * out.aux_loss if routed else loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 20 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}, {time.process_time() - cpu:.0f} CPU seconds", flush=True)
    model.eval()
    every = math.ceil(len(losses) / 20)
    curve = [round(sum(part) / len(part), 4) for part in (losses[i : i + every] for i in range(0, len(losses), every))]
    return {"curve": curve, "seconds": round(time.perf_counter() - wall), "cpu_seconds": round(time.process_time() - cpu)}


def rate(step: int, steps: int) -> float:
    """The learning rate of a step as a share of the peak."""
    warmup = max(steps // 20, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def main() -> None:
    for family in sys.argv[1:] or list(SHAPES):
        folder = trained(family, Protocol(), cache())
        print(folder, (folder / "training.json").read_text())


if __name__ == "__main__":
    main()
