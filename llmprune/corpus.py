"""Where text comes from: one string names a source, and its rows come out as records, read only as far as needed.

A source is `c4` or `wikitext2`; a Hub dataset `org/name[:config][:split][:column]`; a file (.txt, .json, .jsonl, each
also as .gz; .parquet, .arrow), a folder of such files or a `save_to_disk` folder, each with an optional `:column`. The
two words win over files of that name (write `./c4`), files win over Hub datasets. Without a column it is `input_ids`
(ready token ids), else `text`, else the first that holds text.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal, TextIO

from .errors import LLMPruneError

Use = Literal["calibration", "evaluation"]
# One row, by column.
Record = dict[str, object]

HUB_TIMEOUT_S = 3.0


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


def open_corpus(source: str, use: Use, limit: int | None) -> tuple[str, str, Iterator[Record]]:
    """Find a source and look at its first record.

    Args:
        source: see the module's docstring.
        use: which split to read where the source has several and names none.
        limit: characters that will be read, None for all of them; a text file is read no further.

    Returns:
        The source's resolved name, the column to read and the records.

    Raises:
        LLMPruneError: the source does not exist, is empty or has no such column. Damage further on is raised where the
            records are read.
    """
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
            f"{dataset.path} is no file or folder here and the Hub, where to look for {dataset}, does not answer: "
            f"{advice}, or set HF_HUB_OFFLINE=1 if it is in the cache"
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
            f"{dataset.path} is no file or folder here and the Hub dataset {dataset} cannot be opened ({reason}): "
            f"check its name, configuration and split, or {advice}"
        ) from error
    finally:
        if not bars_hidden:
            datasets.enable_progress_bars()
    return islice(stream, dataset.rows)


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
