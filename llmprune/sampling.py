"""Text that the model itself writes, to calibrate on where there is no data: sampled once, then cached."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .calibration import random_ids
from .errors import LLMPruneError
from .loading import load_weights
from .progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sequences generated together: fixed, because the random numbers that a sequence gets depend on it.
SAMPLING_BATCH = 32


def sample_from_model(
    model_dir: Path,
    samples: int,
    seqlen: int,
    seed: int,
    *,
    model_key: str,
    device: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Tensor:
    """Let the model write text: plain sampling at temperature 1 from BOS (else EOS, else a random id).

    A sequence does not end at EOS. The result is kept in `$LLMPRUNE_CACHE/self` (by default
    ~/.cache/llmprune/self) and read from there the next time.

    Args:
        model_dir: a Hugging Face model directory with safetensors.
        samples, seqlen, seed: as for `calibration_set`.
        model_key: what identifies the weights, e.g. their hash; part of the cache's key.
        device: where to run; the whole model has to fit, with a key-value cache for 32 sequences.
        dtype: of the weights and the computation.
        trust_remote_code: run the modelling code that the directory brings.
        quiet: show no progress bar.

    Returns:
        int64 [samples, seqlen] on the CPU. Another kind of device or dtype rounds differently and writes another text.

    Raises:
        LLMPruneError: the cache's folder cannot be written.
    """
    folder = Path(os.environ.get("LLMPRUNE_CACHE") or "~/.cache/llmprune").expanduser() / "self"
    key = json.dumps([model_key, samples, seqlen, seed, torch.device(device).type, str(dtype), SAMPLING_BATCH])
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    ids_NT = _read_cached(file, (samples, seqlen))
    if ids_NT is not None:
        return ids_NT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        private = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise LLMPruneError(f"{folder} cannot be written ({error}): set LLMPRUNE_CACHE to a folder that can") from error

    from safetensors.torch import save_file

    with private:
        model = load_weights(model_dir, dtype, trust_remote_code=trust_remote_code)
        model.to(torch.device(device))  # type: ignore[arg-type]
        ids_NT = _generate(model.eval(), samples, seqlen, seed, quiet=quiet)
        # Written aside and renamed: another process that samples the same never sees half a file.
        aside = Path(private.name) / file.name
        save_file({"input_ids": ids_NT}, aside, metadata={"key": key})
        os.replace(aside, file)
    return ids_NT


def _read_cached(file: Path, shape: tuple[int, int]) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not file.is_file():
        return None
    try:
        ids_NT = load(file.read_bytes())["input_ids"]
    except (SafetensorError, KeyError):
        return None
    return ids_NT if ids_NT.shape == shape and ids_NT.dtype == torch.int64 else None


def _generate(model: PreTrainedModel, samples: int, seqlen: int, seed: int, *, quiet: bool) -> Tensor:
    from transformers import GenerationConfig, StoppingCriteriaList

    start_N1 = _start_ids(model, samples, seed)
    # generate() fills what a call leaves open from the model's own settings: unless they are replaced, their EOS,
    # temperature, top-p or repetition penalty leaks in.
    config = model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=seqlen - 1, use_cache=True
    )
    batches = start_N1.to(model.device).split(SAMPLING_BATCH)
    devices = range(torch.cuda.device_count()) if model.device.type == "cuda" else ()
    total = len(batches) * (seqlen - 1)
    with bar("sampling from the model", total, quiet=quiet) as advance, torch.random.fork_rng(devices):

        def count_token(ids_NT: Tensor, scores: Tensor, **_: object) -> Tensor:
            advance("")
            return torch.zeros(len(ids_NT), dtype=torch.bool, device=ids_NT.device)

        ticks = StoppingCriteriaList([count_token])
        torch.manual_seed(seed)
        done = [
            model.generate(  # type: ignore[operator]
                ids_N1, config, attention_mask=torch.ones_like(ids_N1), stopping_criteria=ticks
            )
            for ids_N1 in batches
        ]
    return torch.cat(done).cpu()


def _start_ids(model: PreTrainedModel, samples: int, seed: int) -> Tensor:
    """int64 [samples, 1]: BOS, else EOS, else a random id for each sample."""
    for name in ("bos_token_id", "eos_token_id"):
        for config in (model.generation_config, model.config.get_text_config()):
            token = getattr(config, name, None)
            if token is not None:
                return torch.full((samples, 1), token[0] if isinstance(token, list) else token)
    return random_ids(model.config.get_text_config().vocab_size, samples, 1, seed)
