"""Permuted block-sparse attention in Hugging Face models: long prompts are read faster, by leaving blocks of keys out.

    from llmprune.runtime import enable_pbs

    pbs = enable_pbs(model, threshold=0.9)
    with pbs.collecting() as seen:
        model.generate(ids)
    seen.heads()                          # how many blocks each head read, and how much of its attention lies there
    disable_pbs(model)

The method (kernels/pbs_attention.py, arXiv 2510.21270) is for whole prompts under plain causal attention. Everything else, and
prompts so short that choosing blocks takes longer than it saves, runs on transformers' sdpa attention with the same arguments;
soft-capped scores and attention sinks, which sdpa does not know, on the model's own eager attention. A forward whose gradients
are recorded runs on sdpa, too, with a warning: call the model under `torch.no_grad()`, as `generate` does.

`from_pretrained(..., attn_implementation="llmprune_pbs")` is `enable_pbs(model)` without a handle, once llmprune is imported.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import llmprune.kernels.pbs_attention as kernel
from llmprune.kernels.pbs_attention import Rule, Selection

from .. import registration
from ..errors import LLMPruneError

HANDLE = "pbs_attention"
# With fewer tokens the paper's attention is slower than full attention (table 7, H100: 0.60 times as fast at 8K, 1.17 at 16K).
MIN_LENGTH = 16384
# Queries per prompt for which the covered mass is computed.
ROWS = 64

# Arguments of transformers' attention functions that make it something else than causal softmax over all keys.
UNLIKE = {
    "sliding_window": "sliding window",
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "position bias",
    "block_indices": "blocks of the model's own choice",
    "cache": "paged cache",
}
# An obstacle of its own, because it goes away under `torch.no_grad()`.
TRAINING = "training"
# Of the above, those that sdpa leaves out of account or refuses.
EAGER = ("softcap", "s_aux", "sinks")


def enable_pbs(
    model: nn.Module,
    *,
    threshold: float = 0.9,
    block: int = 128,
    segment: int = 256,
    share_heads: bool = True,
    keep_first: bool = True,
    scores: Literal["mean", "antidiagonal"] = "mean",
    skip_layers: Collection[int] = (),
    min_length: int = MIN_LENGTH,
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> PBS:
    """Read the model's long prompts with permuted block-sparse attention.

    Args:
        model: of transformers, on any device.
        threshold: share of the estimated attention that the kept blocks have to reach, in (0, 1]; 1 is full attention.
        block: tokens of a block; a multiple of 16 on a GPU.
        segment: tokens that are sorted together, a multiple of `block`.
        share_heads: one order for all query heads that share keys, instead of one each.
        keep_first: every query reads the block that holds the first token.
        scores: mean (PBS-Attn) or antidiagonal (PBS-Attn+).
        skip_layers: layers that keep full attention, counted from 0.
        min_length: prompts of fewer tokens keep full attention; so do those of no more than a segment.
        backend: triton on CUDA, else torch; see kernels/pbs_attention.py.

    Returns:
        The handle, which collects statistics.

    Raises:
        LLMPruneError: a value out of range, or a model that has PBS already or does not choose its attention by name. The model
            is unchanged then.
    """
    try:
        rule = Rule(threshold, block, segment, share_heads, keep_first, scores)
    except ValueError as error:
        raise LLMPruneError(str(error)) from None
    if backend not in ("auto", "torch", "triton"):
        raise LLMPruneError(f"Unknown backend {backend!r}: give auto, torch or triton.")
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation() or not model._supports_sdpa:
        raise LLMPruneError(
            f"{name} is no model of transformers that can run on sdpa attention, which PBS stands in for: use a model that can."
        )
    if pbs_of(model):
        raise LLMPruneError(f"This {name} has PBS already: disable_pbs(model) first.")
    layers = {index for each in model.modules() if isinstance(index := getattr(each, "layer_idx", None), int)}
    if unknown := sorted(set(skip_layers) - layers):
        raise LLMPruneError(f"There is no layer {unknown[0]} to skip: {name} has the layers 0 to {max(layers, default=-1)}.")
    registration.register()
    handle = PBS(rule, frozenset(skip_layers), min_length, backend, _implementations(model))
    model.set_attn_implementation(registration.ATTENTION)
    for module in model.modules():
        if module is model or hasattr(module, "layer_idx"):
            setattr(module, HANDLE, handle)
    return handle


def disable_pbs(model: nn.Module) -> None:
    """Give a model back the attention that it had; one without PBS stays as it is."""
    if handle := pbs_of(model):
        cast(PreTrainedModel, model).set_attn_implementation(handle.before)
        for module in model.modules():
            module.__dict__.pop(HANDLE, None)


def pbs_of(model: nn.Module) -> PBS | None:
    """The handle of a model or of one of its attention modules, None where there is none."""
    handle = model.__dict__.get(HANDLE)
    assert handle is None or isinstance(handle, PBS)
    return handle


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for `llmprune_pbs`; its arguments and results are those of `sdpa_attention_forward`.

    Args:
        query: [B, H, q, D].
        key, value: [B, K, kv, D], not repeated.
        attention_mask: None where attention is causal, or full for one query; else bool [B, 1, q, kv].

    Returns:
        [B, q, H, D].
    """
    handle = pbs_of(module) or DEFAULT
    obstacle = handle.obstacle(module, query, key, value, attention_mask, dropout, options)
    if obstacle is None:
        return handle.attend(module, query, key, value, scaling), None
    if handle.collected:
        handle.collected.fallbacks[obstacle] += 1
    if obstacle == TRAINING and not module.training and not handle.warned:
        handle.warned = True
        warnings.warn(
            "A prompt ran on full attention because its gradients are recorded: call the model under torch.no_grad() to read "
            "it with PBS.",
            stacklevel=2,
        )
    if any(options.get(name) is not None for name in EAGER):
        return _eager(module, query, key, value, attention_mask, dropout, scaling, options)
    sdpa: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
    return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)


@dataclass(eq=False)
class PBS:
    """How a model reads prompts.

    Attributes:
        rule: which blocks are kept.
        skip_layers, min_length, backend: as given to `enable_pbs`.
        before: the attention that the model and its parts had, for `set_attn_implementation`.
        collected: statistics while they are collected.
    """

    rule: Rule
    skip_layers: frozenset[int] = frozenset()
    min_length: int = MIN_LENGTH
    backend: str = "auto"
    before: dict[str, str] = field(default_factory=dict)
    collected: Collected | None = None
    warned: bool = field(default=False, repr=False)

    @contextmanager
    def collecting(self, head: tuple[int, int] | None = None) -> Iterator[Collected]:
        """Inside, note what is read and what it covers, which takes some time.

        Args:
            head: layer and head whose block map is kept; by default the one whose order saves most blocks.
        """
        outer, self.collected = self.collected, Collected(self.rule, head)
        try:
            yield self.collected
        finally:
            self.collected = outer

    def obstacle(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        options: dict[str, object],
    ) -> str | None:
        """Why a call keeps full attention, or None."""
        tokens, keys = query.shape[2], key.shape[2]
        if tokens == 1:
            return "decoding"
        unlike = next((reason for name, reason in UNLIKE.items() if options.get(name) is not None), None)
        causal = options.get("is_causal")
        reasons = {
            unlike or "": unlike is not None,
            "part of a prompt": mask is not None and tokens != keys,
            "padding or another mask": mask is not None,
            "not causal": not (getattr(module, "is_causal", True) if causal is None else causal),
            TRAINING: dropout > 0 or module.training or (torch.is_grad_enabled() and query.requires_grad),
            "compilation": torch.compiler.is_compiling() or torch.jit.is_tracing(),
            "short prompt": tokens <= self.rule.segment or tokens < self.min_length,
            "skipped layer": getattr(module, "layer_idx", None) in self.skip_layers,
            "values of another width than keys": value.shape[-1] != query.shape[-1],
            "no kernel for such heads": query.is_cuda and (query.shape[-1] > 256 or query.dtype == torch.float64),
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """The output [B, N, H, D] for a whole prompt."""
        # A cache of fixed size hands out all of its room; without a mask sdpa, too, takes the first as many keys as queries.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        selection = kernel.select(query, key, self.rule, scale=scale)
        if self.collected:
            self.collected.add(getattr(module, "layer_idx", 0), query, key, selection, scale)
        out_BHND = kernel.attend(query, key, value, selection, self.rule, scale=scale, backend=self.backend)
        return out_BHND.transpose(1, 2).contiguous()


# For models that were loaded with the attention's name.
DEFAULT = PBS(Rule())


@dataclass(frozen=True)
class HeadStatistics:
    """Of one head, averages over prompts.

    Args:
        layer, head: counted from 0.
        tokens: of a prompt.
        causal_blocks: that full causal attention reads.
        blocks: that PBS reads.
        unsorted_blocks: that the same selection reads without sorting the keys.
        covered: share of full attention that lies in the blocks that are read, over queries spread evenly.
        unsorted_covered: the same without sorting.
        speedup: expected of the head's attention, by operations, choosing included.
    """

    layer: int
    head: int
    tokens: float
    causal_blocks: float
    blocks: float
    unsorted_blocks: float
    covered: float
    unsorted_covered: float
    speedup: float

    @property
    def density(self) -> float:
        """Blocks read, as a share of those that full causal attention reads; at a threshold of 1 slightly above 1."""
        return self.blocks / self.causal_blocks

    @property
    def unsorted_density(self) -> float:
        return self.unsorted_blocks / self.causal_blocks

    @classmethod
    def mean(cls, records: Sequence[HeadStatistics], layer: int, head: int) -> HeadStatistics:
        """Of several records together; numbers that fit none of them are -1."""

        def mean(name: str) -> float:
            return fmean(getattr(record, name) for record in records)

        # Of times, not of speed-ups: what a head saves counts by how long it takes.
        took = fmean(record.causal_blocks / record.speedup for record in records)
        names = ("tokens", "causal_blocks", "blocks", "unsorted_blocks", "covered", "unsorted_covered")
        return cls(layer, head, **{name: mean(name) for name in names}, speedup=mean("causal_blocks") / took)


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Which blocks of keys each block of queries of a head reads, bool [T, T], without sorting the keys and with."""

    layer: int
    head: int
    unsorted_TT: Tensor
    sorted_TT: Tensor

    @property
    def saved(self) -> int:
        return int(self.unsorted_TT.sum()) - int(self.sorted_TT.sum())


class Collected:
    """What was read.

    Attributes:
        rule: that selected.
        fallbacks: calls that kept full attention, by reason.
        map: of one head and prompt; None before the first prompt.
    """

    def __init__(self, rule: Rule, head: tuple[int, int] | None) -> None:
        self.rule = rule
        self.fallbacks: Counter[str] = Counter()
        self.map: BlockMap | None = None
        self._wanted = head
        self._records: list[HeadStatistics] = []

    def add(self, layer: int, query: Tensor, key: Tensor, selection: Selection, scale: float | None) -> None:
        """Note one call."""
        heads, tokens, width = query.shape[1:]
        unsorted = kernel.select(query, key, self.rule, scale=scale, sort=False)
        # In the middle of equal parts.
        rows_R = ((torch.arange(ROWS, device=query.device) + 0.5) * tokens / ROWS).long().unique()
        causal = kernel.causal_blocks(tokens, self.rule)
        sums = []
        for each in (selection, unsorted):
            covered_BHR = kernel.covered_mass(query, key, each, self.rule, rows_R, scale=scale)
            sums.append((each.kept_BHTT.sum(dim=(2, 3)).double().mean(dim=0), covered_BHR.double().mean(dim=(0, 2))))
        (blocks_H, covered_H), (unsorted_H, unsorted_covered_H) = ([part.tolist() for part in pair] for pair in sums)
        repeats = heads // key.shape[1]
        for head in range(heads):
            speedup = kernel.speedup_by_operations(blocks_H[head], tokens, self.rule, width=width, repeats=repeats)
            self._records.append(
                HeadStatistics(
                    layer,
                    head,
                    tokens,
                    causal,
                    blocks_H[head],
                    unsorted_H[head],
                    covered_H[head],
                    unsorted_covered_H[head],
                    speedup,
                )
            )
            if self._wanted in (None, (layer, head)):
                found = BlockMap(layer, head, *(each.kept_BHTT[0, head].cpu() for each in (unsorted, selection)))
                if self.map is None or self._wanted or found.saved > self.map.saved:
                    self.map = found

    def heads(self) -> list[HeadStatistics]:
        """Every head that has read a prompt, by layer and number."""
        groups: dict[tuple[int, int], list[HeadStatistics]] = {}
        for record in self._records:
            groups.setdefault((record.layer, record.head), []).append(record)
        return [HeadStatistics.mean(groups[place], *place) for place in sorted(groups)]

    def whole(self) -> HeadStatistics | None:
        """All heads together; None if none has read a prompt."""
        return HeadStatistics.mean(self._records, -1, -1) if self._records else None


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    """The attention of a model and of its parts, as `set_attn_implementation` takes it."""
    config = model.config
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {"": config._attn_implementation, **{key: part._attn_implementation for key, part in parts.items() if part}}


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    options: dict[str, object],
) -> tuple[Tensor, Tensor | None]:
    """The eager attention that the model's own file defines, with the mask that it expects."""
    run = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if run is None:
        raise LLMPruneError(f"{type(module).__name__} has no eager attention to fall back to: load it without llmprune_pbs.")
    tokens = query.shape[2]
    if mask is None and tokens > 1:
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        mask = torch.ones((1, 1, tokens, tokens), dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype, device=query.device), torch.finfo(query.dtype).min)
    out, weights = run(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)
    return cast(Tensor, out), cast("Tensor | None", weights)
