"""Permuted block-sparse attention for prompts (PBS-Attn, arXiv 2510.21270, algorithms 1 and 2).

Softmax attention does not care in which order keys come. Inside every segment of the prompt they are sorted by how much the
last queries attend to them, so that what matters lies in few blocks; each block of queries then reads the few blocks of keys
that pooled scores say hold most of its attention. Only leaving blocks out loses anything: the order by itself is exact.

    out_BHND = pbs_attention(query_BHND, key_BKND, value_BKND, Rule(threshold=0.9))

1. `key_order`: s = mean over the last `block` queries of softmax(q k^T); slots of a segment hold its keys by falling s. The
   tokens after the last complete segment stay where they are, and queries always do.
2. `block_scores`: softmax of pooled queries times pooled keys, over the blocks of earlier segments only.
3. `keep_blocks`: by falling score, a block is kept while the mass of those before it is below the threshold; besides every
   block of the query's own segment, and the block that holds the first token.
4. `attend`: attention over the kept blocks. Earlier segments are visible as a whole, and in its own a query sees the keys
   whose original place is not after its own.

Where this parts from the paper's code: a threshold of 1 keeps everything (rounded sums drop rows there); the last, shorter
block is averaged over its tokens and not over zeros too; heads that share keys share an order by default (appendix G).

`scores="antidiagonal"` is PBS-Attn+: the scores of XAttention (arXiv 2503.16428, section 3.1), sums along the antidiagonals of
8 x 8 tiles, which see what averages of rotary embeddings cancel.

Suffixes: B sequences, H query heads, K key heads, P heads with an order of their own (K or H), N tokens, D channels, T blocks.
Backends of `attend`: `torch` anywhere, one block of queries at a time; `triton` (pbs_attention_triton.py) on CUDA, or in
Triton's interpreter. Nothing of llmprune is imported, and triton only when its kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad, scaled_dot_product_attention

# Side of the tiles whose antidiagonals are summed.
STRIDE = 8


@dataclass(frozen=True)
class Rule:
    """How blocks are chosen.

    Args:
        threshold: share of the scores' mass that the kept blocks of earlier segments have to reach, in (0, 1]; 1 keeps all.
        block: tokens of a block, of queries and of keys.
        segment: tokens that are sorted together, a multiple of `block`.
        share_heads: one order for all query heads that share keys, instead of one each.
        keep_first: every query reads the block that holds the first token, on which models rest attention they have no use for.
        scores: mean (PBS-Attn) or antidiagonal (PBS-Attn+).

    Raises:
        ValueError: one of them is not as described.
    """

    threshold: float = 0.9
    block: int = 128
    segment: int = 256
    share_heads: bool = True
    keep_first: bool = True
    scores: Literal["mean", "antidiagonal"] = "mean"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"The threshold is {self.threshold}: give a share of attention in (0, 1], such as 0.9.")
        if self.block < 1 or self.segment < self.block or self.segment % self.block:
            raise ValueError(
                f"A segment of {self.segment} tokens is not made of whole blocks of {self.block}: give a multiple of the block."
            )
        if self.scores not in ("mean", "antidiagonal"):
            raise ValueError(f"Unknown scores {self.scores!r}: give mean or antidiagonal.")
        if self.scores == "antidiagonal" and self.block % STRIDE:
            raise ValueError(f"Antidiagonal scores need blocks of a multiple of {STRIDE} tokens, which {self.block} is not.")


@dataclass(frozen=True, eq=False)
class Selection:
    """What each block of queries reads.

    Args:
        order_BPN: int64, the original place of the key at every slot.
        kept_BHTT: bool, whether a block of queries reads a block of slots; those of its own segment included.
    """

    order_BPN: Tensor
    kept_BHTT: Tensor


def pbs_attention(
    query_BHND: Tensor,
    key_BKND: Tensor,
    value_BKND: Tensor,
    rule: Rule,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of a whole prompt over the blocks that the rule keeps.

    Args:
        query_BHND: after rotary embedding, in any float dtype and layout; H is a multiple of K.
        key_BKND, value_BKND: not repeated for the query heads.
        rule: which blocks.
        scale: of the scores before softmax; by default D ** -0.5.
        backend: torch, triton or auto, see `attend`.

    Returns:
        [B, H, N, D] in the query's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a backend that cannot run here.
    """
    selection = select(query_BHND, key_BKND, rule, scale=scale)
    return attend(query_BHND, key_BKND, value_BKND, selection, rule, scale=scale, backend=backend)


def select(
    query_BHND: Tensor,
    key_BKND: Tensor,
    rule: Rule,
    *,
    scale: float | None = None,
    sort: bool = True,
) -> Selection:
    """Steps 1 to 3. One key head is in work at a time, to save memory.

    Args:
        sort: without it keys stay where they are, to compare with, and no query needs a block of keys after its own.
    """
    _check(query_BHND, key_BKND, key_BKND)
    if sort:
        order_BPN = key_order(query_BHND, key_BKND, rule, scale=scale)
    else:
        order_BPN = torch.arange(key_BKND.shape[2], device=key_BKND.device).repeat(*key_BKND.shape[:2], 1)
    kept = []
    for queries, keys, orders in _groups(query_BHND.shape[1], key_BKND.shape[1], order_BPN.shape[1]):
        group = query_BHND[:, queries], key_BKND[:, keys], order_BPN[:, orders]
        kept.append(keep_blocks(block_scores(*group, rule, scale=scale), group[2], rule))
    kept_BHTT = torch.cat(kept, dim=1)
    return Selection(order_BPN, kept_BHTT if sort else kept_BHTT.tril())


def key_order(query_BHND: Tensor, key_BKND: Tensor, rule: Rule, *, scale: float | None = None) -> Tensor:
    """Step 1: which key each slot holds, int64 [B, P, N]; slots stay in their segment, and ties in their order."""
    batch, heads, tokens, width = query_BHND.shape
    kv = key_BKND.shape[1]
    orders = kv if rule.share_heads else heads
    order_BPN = torch.arange(tokens, device=query_BHND.device).repeat(batch, orders, 1)
    if tokens <= rule.segment:
        return order_BPN
    complete = tokens // rule.segment * rule.segment
    last_BHQD = query_BHND[:, :, -rule.block :].float()
    if rule.share_heads:
        last_BHQD = last_BHQD.unflatten(1, (kv, -1)).mean(dim=2)
    start_S1 = torch.arange(0, complete, rule.segment, device=order_BPN.device)[:, None]
    for head in range(orders):
        key_BLD = key_BKND[:, head * kv // orders, :complete].float()
        # Not causal: for a few of the last keys that hardly matters, and an order is never wrong.
        weights_BQL = (last_BHQD[:, head] @ key_BLD.mT * _scale(scale, width)).softmax(dim=-1)
        importance_BSX = weights_BQL.mean(dim=1).unflatten(1, (-1, rule.segment))
        places_BSX = importance_BSX.argsort(dim=-1, descending=True, stable=True)
        order_BPN[:, head, :complete] = (places_BSX + start_S1).flatten(1)
    return order_BPN


def block_scores(query_BHND: Tensor, key_BKND: Tensor, order_BPN: Tensor, rule: Rule, *, scale: float | None = None) -> Tensor:
    """Step 2: of each block of queries the share that blocks of earlier segments have in the attention to those.

    Returns:
        float32 [B, H, T, T]; rows add up to 1, but those of the first segment, which are zeros.
    """
    heads, orders, width = query_BHND.shape[1], order_BPN.shape[1], query_BHND.shape[3]
    key_BPND = key_BKND.repeat_interleave(orders // key_BKND.shape[1], dim=1)
    sorted_BPND = key_BPND.take_along_dim(order_BPN[..., None], dim=2)
    earlier_TT = earlier_blocks(query_BHND.shape[2], rule, device=query_BHND.device)
    repeats, factor = heads // orders, _scale(scale, width)
    if rule.scores == "antidiagonal":
        return _antidiagonal(query_BHND, sorted_BPND.repeat_interleave(repeats, dim=1), earlier_TT, rule, factor)
    keys_BHTD = _block_means(sorted_BPND, rule.block).repeat_interleave(repeats, dim=1)
    scores_BHTT = _block_means(query_BHND, rule.block) @ keys_BHTD.mT * factor
    return _softmax_over(scores_BHTT, earlier_TT)


def keep_blocks(scores_BHTT: Tensor, order_BPN: Tensor, rule: Rule) -> Tensor:
    """Step 3: bool [B, H, T, T]."""
    blocks, tokens = scores_BHTT.shape[-1], order_BPN.shape[-1]
    earlier_TT = earlier_blocks(tokens, rule, device=scores_BHTT.device)
    if rule.threshold >= 1:
        kept_BHTT = earlier_TT.expand_as(scores_BHTT)
    else:
        mass_BHTT, place_BHTT = scores_BHTT.sort(dim=-1, descending=True, stable=True)
        before_BHTT = pad(mass_BHTT.cumsum(dim=-1)[..., :-1], (1, 0))
        # The comparison this way round: where a score is NaN all is kept, and the output is NaN as that of full attention.
        enough_BHTT = before_BHTT >= rule.threshold
        kept_BHTT = torch.zeros_like(enough_BHTT).scatter(-1, place_BHTT, ~enough_BHTT) & earlier_TT
    if rule.keep_first:
        slot_BP = (order_BPN == 0).int().argmax(dim=-1)
        first_BPT = one_hot(slot_BP // rule.block, blocks).bool()
        first_BHT = first_BPT.repeat_interleave(scores_BHTT.shape[1] // order_BPN.shape[1], dim=1)
        kept_BHTT = kept_BHTT | (first_BHT[:, :, None] & earlier_TT)
    return kept_BHTT | own_blocks(tokens, rule, device=scores_BHTT.device)


def attend(
    query_BHND: Tensor,
    key_BKND: Tensor,
    value_BKND: Tensor,
    selection: Selection,
    rule: Rule,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Step 4: attention over the kept blocks; what is not kept is never used.

    Args:
        query_BHND, key_BKND, value_BKND: as given to `pbs_attention`.
        selection: with all blocks of own segments that hold a visible key, and none of later ones.
        rule: that selected.
        scale: of the scores before softmax; by default D ** -0.5.
        backend: torch, triton, or auto: triton on CUDA, else torch.

    Returns:
        [B, H, N, D] in the query's dtype. Its memory lies as [B, N, H, D], as a model's output projection reads it.
    """
    _check(query_BHND, key_BKND, value_BKND)
    if backend == "auto":
        backend = "triton" if query_BHND.is_cuda else "torch"
    if backend == "triton":
        from .pbs_attention_triton import attend as run

        return run(query_BHND, key_BKND, value_BKND, selection, rule, _scale(scale, query_BHND.shape[-1]))
    if backend != "torch":
        raise ValueError(f"Unknown backend {backend!r}: use auto, torch or triton.")
    return _attend_torch(query_BHND, key_BKND, value_BKND, selection, rule, scale)


def reference(
    query_BHND: Tensor,
    key_BKND: Tensor,
    value_BKND: Tensor,
    selection: Selection,
    rule: Rule,
    *,
    scale: float | None = None,
) -> Tensor:
    """What every backend of `attend` computes, with the order in an [N, N] mask per head instead of in the keys."""
    repeats = query_BHND.shape[1] // key_BKND.shape[1]
    wide = torch.promote_types(query_BHND.dtype, torch.float32)
    key_BHND, value_BHND = (each.to(wide).repeat_interleave(repeats, dim=1) for each in (key_BKND, value_BKND))
    scores_BHNN = query_BHND.to(wide) @ key_BHND.mT * _scale(scale, query_BHND.shape[-1])
    visible_BHNN = visible(selection, rule)
    return (scores_BHNN.masked_fill(~visible_BHNN, -torch.inf).softmax(dim=-1) @ value_BHND).to(query_BHND.dtype)


def visible(selection: Selection, rule: Rule) -> Tensor:
    """Which keys, at their original places, each query attends to: bool [B, H, N, N]."""
    tokens, heads = selection.order_BPN.shape[-1], selection.kept_BHTT.shape[1]
    block_BPN = selection.order_BPN.argsort(dim=-1) // rule.block
    block_BHN = block_BPN.repeat_interleave(heads // block_BPN.shape[1], dim=1)
    rows_BHNT = selection.kept_BHTT.repeat_interleave(rule.block, dim=2)[:, :, :tokens]
    kept_BHNN = rows_BHNT.take_along_dim(block_BHN[:, :, None], dim=-1)
    return kept_BHNN & torch.ones((tokens, tokens), dtype=torch.bool, device=kept_BHNN.device).tril()


def covered_mass(
    query_BHND: Tensor,
    key_BKND: Tensor,
    selection: Selection,
    rule: Rule,
    rows_R: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """The share of full attention that falls on what is kept, for some of the queries: float32 [B, H, R].

    Args:
        rows_R: places of the queries.
    """
    tokens, orders = key_BKND.shape[2], selection.order_BPN.shape[1]
    later_RN = torch.arange(tokens, device=rows_R.device) > rows_R[:, None]
    mass = []
    for head in range(query_BHND.shape[1]):
        order_BN = selection.order_BPN[:, head * orders // query_BHND.shape[1]]
        key_BND = key_BKND[:, head * key_BKND.shape[1] // query_BHND.shape[1]].float()
        scores_BRN = query_BHND[:, head, rows_R].float() @ key_BND.mT * _scale(scale, key_BND.shape[-1])
        weights_BRN = scores_BRN.masked_fill(later_RN, -torch.inf).softmax(dim=-1)
        block_BN = order_BN.argsort(dim=-1) // rule.block
        kept_BRT = selection.kept_BHTT[:, head, rows_R // rule.block]
        mass.append((weights_BRN * kept_BRT.take_along_dim(block_BN[:, None], dim=-1)).sum(dim=-1))
    return torch.stack(mass, dim=1)


def causal_blocks(tokens: int, rule: Rule) -> int:
    """Blocks that full causal attention reads, the paper's 100 %."""
    blocks = -(-tokens // rule.block)
    return blocks * (blocks + 1) // 2


def speedup_by_operations(kept_blocks: float, tokens: int, rule: Rule, *, width: int, repeats: int) -> float:
    """How many times the multiplications of PBS fit into those of full causal attention by blocks, choosing included.

    Args:
        kept_blocks: of a query head.
        tokens: of the prompt.
        rule: that selected.
        width: channels of a head.
        repeats: query heads that share keys.
    """
    per_block = 2 * rule.block**2 * width
    order = tokens * rule.block * width / (repeats if rule.share_heads else 1)
    side = -(-tokens // (STRIDE if rule.scores == "antidiagonal" else rule.block))
    scores = side**2 * width * (STRIDE if rule.scores == "antidiagonal" else 1)
    return causal_blocks(tokens, rule) * per_block / (kept_blocks * per_block + order + scores)


def earlier_blocks(tokens: int, rule: Rule, *, device: torch.device | None = None) -> Tensor:
    """Whether a block of keys lies in an earlier segment than a block of queries: bool [T, T]."""
    segment_T = _segments(tokens, rule, device)
    return segment_T[:, None] > segment_T


def own_blocks(tokens: int, rule: Rule, *, device: torch.device | None = None) -> Tensor:
    """Whether a block of keys lies in the segment of a block of queries: bool [T, T]."""
    segment_T = _segments(tokens, rule, device)
    return segment_T[:, None] == segment_T


def _segments(tokens: int, rule: Rule, device: torch.device | None) -> Tensor:
    return torch.arange(0, tokens, rule.block, device=device) // rule.segment


def _scale(scale: float | None, width: int) -> float:
    return width**-0.5 if scale is None else scale


def _groups(heads: int, kv: int, orders: int) -> Iterator[tuple[slice, slice, slice]]:
    """For each key head the query heads, the key head and the orders that go with it."""
    for head in range(kv):
        yield (
            slice(head * heads // kv, (head + 1) * heads // kv),
            slice(head, head + 1),
            slice(head * orders // kv, (head + 1) * orders // kv),
        )


def _check(query_BHND: Tensor, key_BKND: Tensor, value_BKND: Tensor) -> None:
    """Raise `ValueError` for what a kernel, which gets addresses and strides, would read wrongly or beyond the end."""
    shapes = [list(each.shape) for each in (query_BHND, key_BKND, value_BKND)]
    fits = all(len(shape) == 4 for shape in shapes) and shapes[1] == shapes[2]
    fits = fits and shapes[0][:1] + shapes[0][2:] == shapes[1][:1] + shapes[1][2:] and min(map(min, shapes)) > 0
    if not fits or shapes[0][1] % shapes[1][1]:
        raise ValueError(
            f"Query, key and value are {shapes}: they are to be [B, H, N, D], [B, K, N, D] and [B, K, N, D], H a multiple of K."
        )
    for each in (key_BKND, value_BKND):
        if each.dtype != query_BHND.dtype or each.device != query_BHND.device:
            raise ValueError(
                f"The query is {query_BHND.dtype} on {query_BHND.device}: key and value are to be of the same dtype and device."
            )


def _block_means(each_BHND: Tensor, block: int) -> Tensor:
    """Means over the tokens of each block, float32 [B, H, T, D]."""
    tokens = each_BHND.shape[2]
    blocks = -(-tokens // block)
    sums_BHTD = pad(each_BHND, (0, 0, 0, blocks * block - tokens)).unflatten(2, (blocks, block)).sum(dim=3, dtype=torch.float32)
    counts_T = torch.full((blocks,), float(block), device=each_BHND.device)
    counts_T[-1] = tokens - (blocks - 1) * block
    return sums_BHTD / counts_T[:, None]


def _softmax_over(scores: Tensor, candidates: Tensor) -> Tensor:
    """Softmax over the candidates of each row; zeros elsewhere, and in rows that have none."""
    return scores.masked_fill(~candidates, -torch.inf).softmax(dim=-1).masked_fill(~candidates, 0)


def _antidiagonal(query_BHND: Tensor, key_BHND: Tensor, earlier_TT: Tensor, rule: Rule, scale: float) -> Tensor:
    """XAttention's scores, one block of queries at a time.

    Query a * 8 + 7 - s meets key b * 8 + s, for s of 0 to 7, in one entry (a, b) of a matrix that is smaller by 8 either way.
    After softmax over b, a block's score is the sum over its b, averaged over the block's a.
    """
    tokens, blocks = query_BHND.shape[2], len(earlier_TT)
    room = (0, 0, 0, blocks * rule.block - tokens)
    query_BHAD, key_BHAD = (pad(each, room).float().unflatten(2, (-1, STRIDE)) for each in (query_BHND, key_BHND))
    query_BHAD, key_BHAD = query_BHAD.flip(3).flatten(3), key_BHAD.flatten(3)
    side = rule.block // STRIDE
    candidates_TA = earlier_TT.repeat_interleave(side, dim=1)
    rows = []
    for number in range(blocks):
        end = min((number + 1) * side, -(-tokens // STRIDE))
        scores_BHaA = query_BHAD[:, :, number * side : end] @ key_BHAD.mT * (scale / STRIDE)
        weights_BHaA = _softmax_over(scores_BHaA, candidates_TA[number])
        rows.append(weights_BHaA.mean(dim=2).unflatten(2, (blocks, side)).sum(dim=3))
    return torch.stack(rows, dim=2)


def _attend_torch(
    query_BHND: Tensor, key_BKND: Tensor, value_BKND: Tensor, selection: Selection, rule: Rule, scale: float | None
) -> Tensor:
    """Of each block of queries the keys that it reads are gathered, and dense attention does the rest."""
    batch, heads, tokens, width = query_BHND.shape
    kv, orders = key_BKND.shape[1], selection.order_BPN.shape[1]
    out_BNHD = torch.empty((batch, tokens, heads, width), dtype=query_BHND.dtype, device=query_BHND.device)
    offset_X = torch.arange(rule.block, device=query_BHND.device)
    for sequence in range(batch):
        for head in range(heads):
            order_N = selection.order_BPN[sequence, head * orders // heads]
            key_ND, value_ND = (each[sequence, head * kv // heads][order_N] for each in (key_BKND, value_BKND))
            for number, kept_T in enumerate(selection.kept_BHTT[sequence, head]):
                rows = slice(number * rule.block, min((number + 1) * rule.block, tokens))
                slots_S = (kept_T.nonzero() * rule.block + offset_X).flatten()
                slots_S = slots_S[slots_S < tokens]
                # Keys of earlier segments precede every row, so one comparison serves them and the own segment's.
                seen_QS = order_N[slots_S] <= torch.arange(rows.start, rows.stop, device=order_N.device)[:, None]
                out_BNHD[sequence, rows, head] = scaled_dot_product_attention(
                    query_BHND[sequence, head, rows][None],
                    key_ND[slots_S][None],
                    value_ND[slots_S][None],
                    attn_mask=seen_QS,
                    scale=scale,
                )[0]
    return out_BNHD.transpose(1, 2)
