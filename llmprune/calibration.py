"""Tokens to observe a model on and tokens to measure it on: a corpus is tokenised and cut into windows.

Calibration reads rows in order up to 16 characters per token asked for, joins them with blank lines, tokenises the
text once without special tokens, cuts it into disjoint windows and draws from them. Evaluation takes the windows in
order, which is the papers' protocol. If the tokenizer itself puts BOS before a text, every window starts with BOS:
Gemma and others are useless without. A column `input_ids` holds ready token ids, used as they are. Besides a corpus,
calibration takes `self` (text the model writes) and `random` (uniform ids, for dry runs); write `./self` for a file.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .corpus import Record, open_corpus
from .errors import LLMPruneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sampler = Callable[[int, int, int], Tensor]

# English has 4.2 characters per token, Chinese 1.5, code at most 8: there are always more tokens to draw from than
# were asked for. Tokenising takes 22 s and 2.5 GB for 128 x 2048 tokens at 64 characters, a quarter at 16.
CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Token ids and where they come from.

    Attributes:
        ids_NT: int64 [samples, seqlen], on the CPU.
        source: what the user gave, resolved, e.g. "wikitext2 (Salesforce/wikitext, wikitext-2-raw-v1, test)".
        sha256: of the shape and the ids as little-endian int64: the same on every machine.
        note: one line on how the samples were drawn and from how much text.
    """

    ids_NT: Tensor
    source: str
    sha256: str
    note: str


def calibration_set(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    vocab_size: int | None = None,
    sampler: Sampler | None = None,
) -> TokenSet:
    """Draw calibration samples from any source.

    Args:
        source: `self`, `random` or a corpus, see `llmprune.corpus`.
        tokenizer: the model's own; only text needs it if `vocab_size` is given.
        samples: how many, at least 1.
        seqlen: tokens in each, BOS included, at least 2.
        seed: which windows of a text are drawn and in which order; ready ids do not depend on it.
        vocab_size: ready and random ids lie below it; by default the tokenizer's.
        sampler: what `self` calls: `(samples, seqlen, seed)` to int64 [samples, seqlen]; see `sampling.sample_from_model`.

    Raises:
        LLMPruneError: the source does not exist, cannot be read, or holds too little.
    """
    _check_at_least(samples, 1, "the number of calibration samples")
    _check_at_least(seqlen, 2, "the sequence length")
    if source == "random":
        ids_NT = random_ids(_vocabulary(vocab_size, tokenizer), samples, seqlen, seed)
        return _token_set(ids_NT, source, f"{samples} samples of {seqlen} uniform random ids, seed {seed}")
    if source == "self":
        if sampler is None:
            raise LLMPruneError("'self' needs a model to sample from and none was given: pass a sampler")
        note = f"{samples} samples of {seqlen} tokens written by the model at temperature 1, seed {seed}"
        return _token_set(sampler(samples, seqlen, seed), source, note)

    limit = CHARACTERS_PER_TOKEN * samples * seqlen
    name, column, records = open_corpus(source, "calibration", limit)
    if column == "input_ids":
        return _ready_ids(records, name, _vocabulary(vocab_size, tokenizer), samples, seqlen)
    windows_WT, text_note = _windows(records, name, column, tokenizer, seqlen, limit, least=samples)
    note = f"{samples} of {len(windows_WT):,} disjoint windows of {seqlen} tokens, seed {seed}; {text_note}"
    return _token_set(windows_WT[_draw(len(windows_WT), samples, seed)], name, note)


def evaluation_set(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seqlen: int,
    windows: int | None = None,
    vocab_size: int | None = None,
) -> TokenSet:
    """Cut a text into disjoint consecutive windows and drop the tail that fills none.

    Args:
        source: a corpus, see `llmprune.corpus`; `self` and `random` measure nothing and are refused.
        tokenizer: the model's own; only text needs it if `vocab_size` is given.
        seqlen: tokens in each window, BOS included, at least 2.
        windows: at most the first so many; None for all of the text.
        vocab_size: ready ids lie below it; by default the tokenizer's.

    Raises:
        LLMPruneError: the source does not exist, cannot be read, or holds too little.
    """
    _check_at_least(1 if windows is None else windows, 1, "the number of evaluation windows")
    _check_at_least(seqlen, 2, "the sequence length")
    if source in ("self", "random"):
        raise LLMPruneError(f"perplexity on {source!r} tokens measures nothing: give a text, e.g. wikitext2")

    limit = None if windows is None else CHARACTERS_PER_TOKEN * windows * seqlen
    name, column, records = open_corpus(source, "evaluation", limit)
    if column == "input_ids":
        return _ready_ids(records, name, _vocabulary(vocab_size, tokenizer), windows, seqlen)
    windows_WT, text_note = _windows(records, name, column, tokenizer, seqlen, limit, least=1)
    ids_NT = windows_WT[:windows].clone()  # a view would keep all the windows in memory
    return _token_set(ids_NT, name, f"first {len(ids_NT):,} disjoint windows of {seqlen} tokens; {text_note}")


def _vocabulary(vocab_size: int | None, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if vocab_size is not None:
        return vocab_size
    assert tokenizer is not None, "give a tokenizer or a vocabulary's size"
    return len(tokenizer)


def _check_at_least(value: int, least: int, what: str) -> None:
    if value < least:
        raise LLMPruneError(f"{what} is {value}: give at least {least}")


# From records to tokens.


def _windows(
    records: Iterator[Record],
    name: str,
    column: str,
    tokenizer: PreTrainedTokenizerBase | None,
    seqlen: int,
    limit: int | None,
    *,
    least: int,
) -> tuple[Tensor, str]:
    """All disjoint windows of a text, int64 [windows, seqlen], and how much text they were cut from."""
    if tokenizer is None:
        raise LLMPruneError(f"{name} is text and the model has no tokenizer: give token ids (a column input_ids)")
    text, count = _read_text(records, name, column, limit)
    # One call, because tokens may cross the rows' ends. verbose=False: it is meant to be longer than the model's limit.
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a").input_ids[0] != bos:
        bos = None
    step = seqlen if bos is None else seqlen - 1
    note = f"{len(ids):,} tokens of text ({len(text):,} characters, {count:,} rows of column {column!r})"
    if len(ids) < least * step:
        raise LLMPruneError(
            f"{name} is too short for {least} windows of {seqlen} tokens ({least * step:,} tokens), it holds {note}: "
            "give more text, or ask for fewer or shorter windows"
        )
    windows_WT = torch.tensor(ids[: len(ids) // step * step], dtype=torch.int64).view(-1, step)
    if bos is None:
        return windows_WT, note
    windows_WT = torch.nn.functional.pad(windows_WT, (1, 0), value=bos)
    return windows_WT, f"{note}; each window is BOS and {step} tokens of text"


def _read_text(records: Iterator[Record], name: str, column: str, limit: int | None) -> tuple[str, int]:
    """The first `limit` characters of the rows joined by blank lines, and how many rows were read; nulls are skipped."""
    texts: list[str] = []
    length = 0
    for number, record in enumerate(records, 1):
        value = record.get(column, ...)
        if value is None:
            continue
        if not isinstance(value, str):
            found = "is missing" if value is ... else f"is of type {type(value).__name__}"
            raise LLMPruneError(f"column {column!r} {found} in row {number} of {name}: give text in every row")
        texts.append(value)
        length += len(value) + 2  # with the separator, so that an endless stream of empty rows ends too
        if limit is not None and length > limit:
            break
    text = "\n\n".join(texts)[:limit]
    if not text.strip():
        raise LLMPruneError(f"{name} has no text in column {column!r}: give a source that has")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair, which no tokenizer takes
        raise LLMPruneError(f"{name} holds {text[error.start]!a}, which is no character: remove it") from error
    return text, len(texts)


def _ready_ids(records: Iterator[Record], name: str, vocabulary: int, count: int | None, seqlen: int) -> TokenSet:
    rows: list[list[int]] = []
    for number, record in enumerate(islice(records, count), 1):
        row = record.get("input_ids")
        if not isinstance(row, list) or not all(type(token) is int for token in row):
            raise LLMPruneError(f"row {number} of {name} has no list of token ids in input_ids: give one")
        rows.append(row[:seqlen])
    if count is not None and len(rows) < count:
        raise LLMPruneError(f"{name} has {len(rows)} rows of token ids, {count} were asked for: ask for fewer")
    shortest = min(map(len, rows))
    if shortest < seqlen:
        raise LLMPruneError(
            f"{name} has a row of {shortest} token ids among its first {len(rows)}, {seqlen} were asked for: "
            f"ask for a sequence length of {shortest} or less"
        )
    lowest, highest = min(map(min, rows)), max(map(max, rows))
    if lowest < 0 or highest >= vocabulary:
        raise LLMPruneError(
            f"{name} holds the token id {lowest if lowest < 0 else highest} and the vocabulary ends at "
            f"{vocabulary - 1}: give ids made with this model's tokenizer"
        )
    note = f"first {len(rows):,} rows of ready token ids, first {seqlen} of each, no seed"
    return _token_set(torch.tensor(rows, dtype=torch.int64), name, note)


def _draw(population: int, count: int, seed: int) -> list[int]:
    """`count` distinct numbers below `population`, in drawn order.

    By sorting keys from `random()`, the one method whose sequence Python promises never to change; its `sample`
    and the generators of NumPy and torch come without that promise.
    """
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(population)]
    return sorted(range(population), key=keys.__getitem__)[:count]


def random_ids(vocabulary: int, samples: int, seqlen: int, seed: int) -> Tensor:
    generator = random.Random(seed)
    ids = [int(generator.random() * vocabulary) for _ in range(samples * seqlen)]
    return torch.tensor(ids, dtype=torch.int64).view(samples, seqlen)


def _token_set(ids_NT: Tensor, source: str, note: str) -> TokenSet:
    digest = hashlib.sha256(np.array(ids_NT.shape, dtype="<i8").tobytes())
    digest.update(ids_NT.numpy().astype("<i8").tobytes())
    return TokenSet(ids_NT, source, digest.hexdigest(), note)
