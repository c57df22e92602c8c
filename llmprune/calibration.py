"""Where tokens come from: calibration samples to observe a model on, evaluation windows to measure it on.

A source is one string: `c4` or `wikitext2`; a Hub dataset `org/name[:config][:split][:column]`; a file (.txt,
.json, .jsonl, each also as .gz; .parquet, .arrow), a folder of such files or a `save_to_disk` folder, each with
an optional `:column`; `self` (text the model writes); `random` (uniform ids, for dry runs). The four words win over
files of that name (write `./c4`), files win over Hub datasets.

Calibration reads rows in order up to 16 characters per token asked for, joins them with blank lines, tokenises the
text once without special tokens, cuts it into disjoint windows and draws from them. Evaluation takes the windows in
order, which is the papers' protocol. If the tokenizer itself puts BOS before a text, every window starts with BOS:
Gemma and others are useless without. A column `input_ids` holds ready token ids, used as they are.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import numpy as np
import torch
from torch import Tensor

from .errors import LLMPruneError
from .progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Use = Literal["calibration", "evaluation"]
Sampler = Callable[[int, int, int], Tensor]
Record = dict[str, object]

# English has 4.2 characters per token, Chinese 1.5, code at most 8: there are always more tokens to draw from than
# were asked for. Tokenising takes 22 s and 2.5 GB for 128 x 2048 tokens at 64 characters, a quarter at 16.
CHARACTERS_PER_TOKEN = 16
HUB_TIMEOUT_S = 3.0
# Sequences generated together: fixed, because the random numbers that a sequence gets depend on it.
SAMPLING_BATCH = 32


@dataclass(frozen=True)
class HubDataset:
    """One split of a Hub dataset, or one `file` of it, or only its first `rows`."""

    path: str
    config: str | None
    split: str
    column: str | None
    file: str | None = None
    rows: int | None = None

    def __str__(self) -> str:
        return ", ".join(part for part in (self.path, self.config, self.file, self.split) if part)


# What the pruning papers use. They evaluate C4 on the first 1100 documents of this shard.
ALIASES: dict[str, dict[Use, HubDataset]] = {
    "c4": {
        "calibration": HubDataset("allenai/c4", None, "train", "text", "en/c4-train.00000-of-01024.json.gz"),
        "evaluation": HubDataset(
            "allenai/c4", None, "validation", "text", "en/c4-validation.00000-of-00008.json.gz", rows=1100
        ),
    },
    "wikitext2": {
        "calibration": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
        "evaluation": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    },
}
SPLITS: dict[Use, str] = {"calibration": "train", "evaluation": "test"}


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
        source: see the module's docstring.
        tokenizer: the model's own; only text needs it if `vocab_size` is given.
        samples: how many, at least 1.
        seqlen: tokens in each, BOS included, at least 2.
        seed: which windows of a text are drawn and in which order; ready ids do not depend on it.
        vocab_size: ready and random ids lie below it; by default the tokenizer's.
        sampler: what `self` calls: `(samples, seqlen, seed)` to int64 [samples, seqlen]; see `sample_from_model`.

    Raises:
        LLMPruneError: the source does not exist, cannot be read, or holds too little.
    """
    _check_at_least(samples, 1, "the number of calibration samples")
    _check_at_least(seqlen, 2, "the sequence length")
    if source == "random":
        ids_NT = _random_ids(_vocabulary(vocab_size, tokenizer), samples, seqlen, seed)
        return _token_set(ids_NT, source, f"{samples} samples of {seqlen} uniform random ids, seed {seed}")
    if source == "self":
        if sampler is None:
            raise LLMPruneError("'self' needs a model to sample from and none was given: pass a sampler")
        note = f"{samples} samples of {seqlen} tokens written by the model at temperature 1, seed {seed}"
        return _token_set(sampler(samples, seqlen, seed), source, note)

    limit = CHARACTERS_PER_TOKEN * samples * seqlen
    name, column, records = _open(source, "calibration", limit)
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
        source: see the module's docstring; `self` and `random` measure nothing and are refused.
        tokenizer: the model's own; only text needs it if `vocab_size` is given.
        seqlen: tokens in each window, BOS included, at least 2.
        windows: only the first so many; None for all of the text.
        vocab_size: ready ids lie below it; by default the tokenizer's.

    Raises:
        LLMPruneError: the source does not exist, cannot be read, or holds too little.
    """
    least = 1 if windows is None else windows
    _check_at_least(least, 1, "the number of evaluation windows")
    _check_at_least(seqlen, 2, "the sequence length")
    if source in ("self", "random"):
        raise LLMPruneError(f"perplexity on {source!r} tokens measures nothing: give a text, e.g. wikitext2")

    limit = None if windows is None else CHARACTERS_PER_TOKEN * windows * seqlen
    name, column, records = _open(source, "evaluation", limit)
    if column == "input_ids":
        return _ready_ids(records, name, _vocabulary(vocab_size, tokenizer), windows, seqlen)
    windows_WT, text_note = _windows(records, name, column, tokenizer, seqlen, limit, least=least)
    ids_NT = windows_WT[:windows].clone()  # a view would keep all the windows in memory
    return _token_set(ids_NT, name, f"first {len(ids_NT):,} disjoint windows of {seqlen} tokens; {text_note}")


def hub_reachable() -> bool:
    """Whether the Hub answers within three seconds; False at once under HF_HUB_OFFLINE=1."""
    if _offline_asked():
        return False
    answers: list[bool] = []

    def ask() -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S).status_code < 500)
        except Exception:  # the client is requests, httpx or httpx2, each with its own family of errors
            answers.append(False)

    # A thread, because no client's timeout covers the name look-up, which can take half a minute behind a firewall.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answers == [True]


def _offline_asked() -> bool:
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


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


def _random_ids(vocabulary: int, samples: int, seqlen: int, seed: int) -> Tensor:
    generator = random.Random(seed)
    ids = [int(generator.random() * vocabulary) for _ in range(samples * seqlen)]
    return torch.tensor(ids, dtype=torch.int64).view(samples, seqlen)


def _token_set(ids_NT: Tensor, source: str, note: str) -> TokenSet:
    digest = hashlib.sha256(np.array(ids_NT.shape, dtype="<i8").tobytes())
    digest.update(ids_NT.numpy().astype("<i8").tobytes())
    return TokenSet(ids_NT, source, digest.hexdigest(), note)


# From a source to records: one dictionary a row, read once and only as far as needed.


def _open(source: str, use: Use, limit: int | None) -> tuple[str, str, Iterator[Record]]:
    """The source's name, the column to read and the records."""
    name, column, records = _find(source, use, limit)
    first = next(records, None)
    if first is None:
        raise LLMPruneError(f"{name} is empty: give a source with text in it")
    columns = ", ".join(first)
    if column is None:
        texts = [key for key, value in first.items() if isinstance(value, str)]
        column = next((key for key in ("input_ids", "text", *texts) if key in first), None)
    if column is None:
        raise LLMPruneError(f"{name} has no column of text (its columns: {columns}): give data with one")
    if column not in first:
        raise LLMPruneError(f"{name} has no column {column!r}: choose one of its columns ({columns})")
    if column != "input_ids" and not isinstance(first[column], str | None):
        raise LLMPruneError(
            f"column {column!r} of {name} holds a {type(first[column]).__name__}, expected text: "
            f"choose another of its columns ({columns})"
        )
    return name, column, chain([first], records)


def _find(source: str, use: Use, limit: int | None) -> tuple[str, str | None, Iterator[Record]]:
    """The source's name, the column it asks for and the records."""
    if source in ALIASES:
        dataset = ALIASES[source][use]
        return f"{source} ({dataset})", dataset.column, _read_hub(dataset)
    # A path may hold colons itself, so the whole is tried first and then what is before the last one.
    before, _, column = source.rpartition(":")
    candidates: tuple[tuple[str, str | None], ...] = ((source, None), (before, column))
    for name, asked in candidates:
        path = Path(name).expanduser()
        if name and path.exists():
            return name, asked, _read_path(path, name, use, limit)
    name, *fields = source.split(":")
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and len(fields) <= 3 and _format(Path(name)) not in READERS:
        config, split, asked = (field or None for field in (*fields, "", "", "")[:3])
        dataset = HubDataset(name, config, split or SPLITS[use], asked)
        return str(dataset), asked, _read_hub(dataset)
    raise LLMPruneError(
        f"there is no data at {source!r}: give {', '.join(ALIASES)}, self, random, a file ({', '.join(READERS)}), "
        "a folder of such files or a Hub dataset org/name[:config][:split][:column]"
    )


def _read_path(path: Path, name: str, use: Use, limit: int | None) -> Iterator[Record]:
    if not path.is_dir():
        reader = READERS.get(_format(path))
        if reader is None:
            raise LLMPruneError(f"{name} is of an unknown kind: give a file of {', '.join(READERS)}, or a folder")
        return reader(path, name, limit)
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        if SPLITS[use] not in splits:
            raise LLMPruneError(f"{name} has no split {SPLITS[use]}: give one of its folders ({', '.join(splits)})")
        return _read_path(path / SPLITS[use], f"{name}/{SPLITS[use]}", use, limit)
    if (path / "state.json").exists():
        files = [path / part["filename"] for part in json.loads((path / "state.json").read_text())["_data_files"]]
    else:
        files = sorted(file for file in path.iterdir() if _format(file) in READERS)
    if not files:
        raise LLMPruneError(f"folder {name} holds no data: put files of {', '.join(READERS)} there")
    return chain.from_iterable(_read_path(file, f"{name}/{file.name}", use, limit) for file in files)


def _format(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


@contextmanager
def _open_text(path: Path, name: str) -> Iterator[TextIO]:
    # utf-8-sig drops the byte order mark that Windows editors write.
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LLMPruneError(f"{name} is not UTF-8 text ({error}): convert it or fetch it again") from error


def _read_txt(path: Path, name: str, limit: int | None) -> Iterator[Record]:
    with _open_text(path, name) as file:
        yield {"text": file.read(-1 if limit is None else limit)}


def _read_json(path: Path, name: str, limit: int | None) -> Iterator[Record]:
    """One object a line, or one array of objects."""

    def parse(text: str, line: int) -> list[Record]:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            where = f"line {line + error.lineno - 1} of {name}"
            raise LLMPruneError(f"{where} is not JSON ({error.msg}): write one object a line") from error
        records = value if isinstance(value, list) else [value]
        if not all(isinstance(record, dict) for record in records):
            raise LLMPruneError(f"line {line} of {name} is no JSON object: write one object a line")
        return records

    with _open_text(path, name) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith("["):
                line += file.read()
            if line.strip():
                yield from parse(line, number)


def _read_arrow(path: Path, name: str, limit: int | None) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            batches = pq.ParquetFile(path).iter_batches(256)
        else:
            # Mapped, so that reading all of the table reads nothing yet.
            source = pa.memory_map(str(path))
            reader = pa.ipc.open_file if source.read(6) == b"ARROW1" else pa.ipc.open_stream
            source.seek(0)
            batches = reader(source).read_all().to_batches(256)
    except (pa.ArrowInvalid, OSError) as error:
        raise LLMPruneError(f"{name} is not a whole {path.suffix[1:]} file ({error}): make it again") from error
    for batch in batches:
        yield from batch.to_pylist()


READERS: dict[str, Callable[[Path, str, int | None], Iterator[Record]]] = {
    ".txt": _read_txt,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
}


def _read_hub(dataset: HubDataset) -> Iterator[Record]:
    """The rows of a Hub dataset as a stream: what is not read is not downloaded."""
    advice = "give a local file or folder, or `self` to calibrate on text the model writes"
    # Offline by wish, `datasets` reads its cache or fails at once; else it retries a deaf Hub for half a minute.
    if not _offline_asked() and not hub_reachable():
        raise LLMPruneError(
            f"there is no file {dataset.path} and the Hub, which may have {dataset}, does not answer: {advice}, or "
            "set HF_HUB_OFFLINE=1 if it is in the cache"
        )
    import datasets

    files = None if dataset.file is None else {dataset.split: dataset.file}
    bars_hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        stream = datasets.load_dataset(dataset.path, dataset.config, data_files=files, split=dataset.split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise LLMPruneError(
            f"there is no file {dataset.path} and the Hub dataset {dataset} cannot be opened ({reason}): check its "
            f"name, configuration and split, or {advice}"
        ) from error
    finally:
        if not bars_hidden:
            datasets.enable_progress_bars()
    return islice(stream, dataset.rows)


# Text the model writes.


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
    from transformers import AutoModelForCausalLM

    with private:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
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
    return _random_ids(model.config.get_text_config().vocab_size, samples, 1, seed)
