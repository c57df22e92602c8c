"""Token perplexity, streamed block by block: it needs no more memory than pruning does.

The papers' protocol: the text's rows joined by a blank line, tokenised once, cut into disjoint windows of `seqlen` tokens;
the mean over windows of the mean negative log-likelihood of the seqlen - 1 predicted tokens, exponentiated.
What was measured before comes from the cache, so that a dense model is measured once for all that is pruned from it.
A model with gates is measured as it decodes: `runtime.simulate`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import activation_plan
from .activation_plan import Plan
from .calibration import TokenSet
from .checkpoint import Checkpoint
from .errors import LLMPruneError
from .models import Skeleton
from .output import COPIED, RECORD, read_record
from .progress import bar
from .runtime import simulate
from .scores import Documents, Scores, keep, kept
from .stream import Stream

# Positions whose logits exist at one time: 512 x a vocabulary of 128k in float32 are 256 MB.
POSITIONS = 512


def measure(skeleton: Skeleton, text: TokenSet, *, label: str, quiet: bool) -> Scores:
    """A model's token perplexity over all windows and the log-likelihood of each, from the cache if measured before."""
    model = identity(skeleton.checkpoint)
    key = {"model": model, "task": "token perplexity", "tokens": text.sha256, **numerics(skeleton.dtype, skeleton.device)}
    if scores := kept(key):
        return scores
    steps = len(skeleton.blocks) + len(text.ids_NT)
    gates = gates_of(skeleton.checkpoint.directory, skeleton.model)
    with gates, bar(f"{label}, perplexity", steps, quiet=quiet) as advance:
        losses = window_losses(skeleton, text.ids_NT, advance_progress=advance)
    check_unchanged(skeleton.checkpoint, model)
    scores = Scores(
        samples=len(losses),
        fewshot=0,
        version=None,
        metrics={"perplexity": _exponential(losses)},
        higher_is_better={"perplexity": False},
        documents={"perplexity": Documents("perplexity", [-loss for loss in losses])},
        documents_sha256=text.sha256,
    )
    keep(key, scores)
    return scores


def gates_of(directory: Path, model: nn.Module) -> AbstractContextManager[object]:
    """Inside, a model runs with the gates that lie beside its weights, if any, over whole texts as in decoding."""
    plan = Plan.load(directory)
    return simulate(model, plan) if plan else nullcontext()


def described(text: TokenSet) -> dict[str, object]:
    """How a perplexity was measured, for a record."""
    windows, seqlen = text.ids_NT.shape
    return {
        "text": text.source,
        "protocol": f"token perplexity, {windows} disjoint windows of {seqlen} tokens",
        "tokens_sha256": text.sha256,
    }


def identity(checkpoint: Checkpoint) -> str:
    """A hash that changes with a model's weights, configuration or tokenizer."""
    directory = checkpoint.directory
    digest = hashlib.sha256(checkpoint.fingerprint().encode())
    if (directory / RECORD).is_file():
        # The fingerprint samples the weights; the record has the hash of every byte.
        digest.update(json.dumps(read_record(directory)["shards"]).encode())
    for pattern in (*COPIED, "*.py", activation_plan.FILE):
        for file in sorted(directory.glob(pattern)):
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def check_unchanged(checkpoint: Checkpoint, before: str) -> None:
    """Raise `LLMPruneError` if a model is not the one that `identity` gave `before`."""
    directory = checkpoint.directory
    if not (directory / "config.json").is_file() or identity(Checkpoint.open(directory)) != before:
        raise LLMPruneError(
            f"{directory} changed while it was being evaluated, so this score belongs to no model: wait until nothing writes "
            "there, then give the same command again."
        )


def numerics(dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """What decides how a forward rounds."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        **{package: version(package) for package in ("transformers", "torch")},
    }


def perplexity(
    skeleton: Skeleton,
    ids_NT: Tensor,
    *,
    micro_batch: int = 1,
    advance_progress: Callable[[str], None] = lambda name: None,
) -> float:
    """exp of the mean negative log-likelihood per predicted token; see `window_losses`."""
    return _exponential(window_losses(skeleton, ids_NT, micro_batch=micro_batch, advance_progress=advance_progress))


def _exponential(losses: list[float]) -> float:
    # Every window predicts the same number of tokens, so the mean over windows is the mean over tokens.
    return math.exp(fmean(losses))


def window_losses(
    skeleton: Skeleton,
    ids_NT: Tensor,
    *,
    micro_batch: int = 1,
    advance_progress: Callable[[str], None] = lambda name: None,
) -> list[float]:
    """The mean negative log-likelihood per predicted token of every window.

    Args:
        skeleton: the model.
        ids_NT: windows of token ids, int64 [windows, tokens].
        micro_batch: windows per forward.
        advance_progress: called once per block, then once per micro-batch.

    Raises:
        LLMPruneError: one is not finite, or so large that no perplexity is.
    """
    stream = Stream(skeleton, ids_NT, micro_batch=micro_batch, keep_last=True, advance_progress=advance_progress)
    for _ in stream.blocks():
        pass
    losses: list[float] = []
    with stream.outer_loaded(head=True):
        for batch in range(len(stream.batches)):
            losses += _losses(stream, batch)
            advance_progress(f"window {batch}")
    # exp(700) is about the largest float.
    if not all(loss < 700 for loss in losses):
        raise LLMPruneError("The perplexity is not finite: the model's logits overflow; try --dtype float32.")
    return losses


def _losses(stream: Stream, batch: int) -> list[float]:
    """The mean loss per predicted token of each of a micro-batch's windows."""
    ids_BT = stream._ids(batch)
    final_BTI = stream.hidden(batch)
    last = len(stream.skeleton.blocks) - 1
    model = stream.skeleton.model

    def pass_through(block: int, hidden: Tensor | None = None, *args: object, **kwargs: object) -> Tensor:
        return final_BTI if block == last else _first(hidden, kwargs)

    # The model's own head: final norm, projections, soft-capping, whatever the architecture does.
    takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters
    length = ids_BT.shape[1]
    total_B = torch.zeros(len(ids_BT), dtype=torch.float64)
    with stream.blocks_replaced(pass_through):
        for start in range(0, length - 1, POSITIONS):
            positions = torch.arange(start, min(start + POSITIONS, length - 1), device=ids_BT.device)
            options = {"logits_to_keep": positions} if takes_positions else {}
            logits_BTV = model(input_ids=ids_BT, use_cache=False, **options).logits
            if not takes_positions:
                logits_BTV = logits_BTV[:, positions]
            loss_BT = cross_entropy(logits_BTV.float().transpose(1, 2), ids_BT[:, positions + 1], reduction="none")
            total_B += loss_BT.double().sum(dim=1).cpu()
    return (total_B / (length - 1)).tolist()


def _first(hidden: Tensor | None, kwargs: dict[str, object]) -> Tensor:
    value = hidden if hidden is not None else kwargs["hidden_states"]
    assert isinstance(value, Tensor)
    return value
