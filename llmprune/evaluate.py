"""Token perplexity, streamed block by block: it needs no more memory than pruning does.

The papers' protocol: the text's rows joined by a blank line, tokenised once, cut into disjoint windows of `seqlen` tokens;
the mean over windows of the mean negative log-likelihood of the seqlen - 1 predicted tokens, exponentiated.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .errors import LLMPruneError
from .models import Skeleton
from .stream import Stream

# Positions whose logits exist at one time: 512 x a vocabulary of 128k in float32 are 256 MB.
POSITIONS = 512


def perplexity(
    skeleton: Skeleton,
    ids_NT: Tensor,
    *,
    micro_batch: int = 1,
    advance_progress: Callable[[str], None] = lambda name: None,
) -> float:
    """exp of the mean negative log-likelihood per predicted token.

    Args:
        skeleton: the model.
        ids_NT: windows of token ids, int64 [windows, tokens].
        micro_batch: windows per forward.
        advance_progress: called once per block, then once per micro-batch.
    """
    stream = Stream(skeleton, ids_NT, micro_batch=micro_batch, keep_last=True, advance_progress=advance_progress)
    for _ in stream.blocks():
        pass
    total = 0.0
    with stream.outer_loaded(head=True):
        for batch in range(len(stream.batches)):
            total += _loss(stream, batch)
            advance_progress(f"window {batch}")
    # Every window predicts the same number of tokens, so the mean over windows is the mean over tokens.
    value = math.exp(total / len(ids_NT))
    if not math.isfinite(value):
        raise LLMPruneError("The perplexity is not finite: the model's logits overflow; try --dtype float32.")
    return value


def _loss(stream: Stream, batch: int) -> float:
    """Sum over a micro-batch's windows of the mean loss per predicted token."""
    ids_BT = stream._ids(batch)
    final_BTI = stream.hidden(batch)
    last = len(stream.skeleton.blocks) - 1
    model = stream.skeleton.model

    def pass_through(block: int, hidden: Tensor | None = None, *args: object, **kwargs: object) -> Tensor:
        return final_BTI if block == last else _first(hidden, kwargs)

    # The model's own head: final norm, projections, soft-capping, whatever the architecture does.
    takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters
    total = 0.0
    length = ids_BT.shape[1]
    with stream.blocks_replaced(pass_through):
        for start in range(0, length - 1, POSITIONS):
            positions = torch.arange(start, min(start + POSITIONS, length - 1), device=ids_BT.device)
            options = {"logits_to_keep": positions} if takes_positions else {}
            logits_BTV = model(input_ids=ids_BT, use_cache=False, **options).logits
            if not takes_positions:
                logits_BTV = logits_BTV[:, positions]
            total += float(cross_entropy(logits_BTV.float().flatten(0, 1), ids_BT[:, positions + 1].flatten(), reduction="sum"))
    return total / (length - 1)


def _first(hidden: Tensor | None, kwargs: dict[str, object]) -> Tensor:
    value = hidden if hidden is not None else kwargs["hidden_states"]
    assert isinstance(value, Tensor)
    return value
