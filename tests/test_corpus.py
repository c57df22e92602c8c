"""Laws of llmprune.corpus: every format gives the same rows, and a source that cannot be read says why."""

import gzip
import json
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmprune import corpus
from llmprune.corpus import ALIASES, Use, hub_reachable, open_corpus
from llmprune.errors import LLMPruneError

ROWS = [f"Row {number} says {'abc' * number}, é and 漢." for number in range(40)]


def read(source: Path | str, use: Use = "calibration") -> list[object]:
    """The whole column."""
    _, column, records = open_corpus(str(source), use, None)
    return [record[column] for record in records]


# Files.


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """The rows in the format that the path's name tells; a folder is a `save_to_disk` folder."""
    table = pa.Table.from_pylist(rows)
    lines = "".join(json.dumps(row) + "\n\n" for row in rows)
    if path.name == "file.arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif path.name == "stream.arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    elif path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
    elif path.suffix == ".jsonl":
        path.write_text(lines, encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        datasets.Dataset(table).save_to_disk(path, num_shards=3)
    return path


FORMATS = ["a.jsonl", "a.json", "a.json.gz", "a.jsonl.gz", "a.parquet", "file.arrow", "stream.arrow", "saved"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_rows_in_order(tmp_path: Path, name: str) -> None:
    texts = [None, *ROWS, None, ""]
    file = write(tmp_path / name, [{"id": number, "text": text} for number, text in enumerate(texts)])
    assert read(file) == read(file, "evaluation") == texts


@pytest.mark.parametrize("name", FORMATS)
def test_ready_ids_go_before_text_in_every_format(tmp_path: Path, name: str) -> None:
    ids = [list(range(number, number + 20)) for number in range(9)]
    file = write(tmp_path / name, [{"text": "not this", "input_ids": row} for row in ids])
    assert read(file) == ids
    assert read(f"{file}:text") == ["not this"] * 9


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_one_row_without_byte_order_mark_and_carriage_returns(tmp_path: Path, name: str) -> None:
    windows = b"\xef\xbb\xbf" + "\r\n".join(ROWS).encode()
    (tmp_path / name).write_bytes(gzip.compress(windows) if name.endswith(".gz") else windows)
    assert read(tmp_path / name) == ["\n".join(ROWS)]


def test_a_text_file_is_read_only_up_to_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_bytes(b"a" * 100_000 + b"\xff" * 10)  # reading to the end would raise
    _, column, records = open_corpus(str(file), "calibration", 512)
    assert [record[column] for record in records] == ["a" * 512]


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", [{"text": row} for row in ROWS[15:25]])
    write(tmp_path / "a.jsonl", [{"text": row} for row in ROWS[:15]])
    (tmp_path / "c.txt").write_text("the end", encoding="utf-8")
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path) == [*ROWS[:25], "the end"]


def test_a_saved_dataset_dict_is_read_by_its_split(tmp_path: Path) -> None:
    splits = {"train": datasets.Dataset.from_dict({"text": ROWS}), "validation": datasets.Dataset.from_dict({"text": ["x"]})}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ROWS
    with pytest.raises(LLMPruneError, match=r"no split test: give one of its folders \(train, validation\)"):
        read(tmp_path / "saved", "evaluation")


def test_the_column_is_the_one_named_else_text_else_the_first_of_text(tmp_path: Path) -> None:
    row: dict[str, object] = {"id": 1, "title": "t", "text": "x", "body": "b"}
    file = write(tmp_path / "with:colon.jsonl", [row] * 4)
    without = write(tmp_path / "without.parquet", [{key: row[key] for key in ("id", "title", "body")}] * 4)
    for source, letter in ((file, "x"), (f"{file}:body", "b"), (without, "t"), (f"{without}:body", "b")):
        assert read(source) == [letter] * 4


# Errors.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.parquet", b"", "not a whole parquet file"),
        ("a.parquet", b"PAR1 but not really", "not a whole parquet file"),
        ("a.arrow", b"", "not a whole arrow file"),
        ("a.arrow", b"ARROW1 but not really", "not a whole arrow file"),
        ("a.csv", b"text\nx", r"unknown kind: give a file of \.txt, \.json, \.jsonl, \.parquet, \.arrow"),
        ("a.txt", b"caf\xe9 " * 99, "not UTF-8 text"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "not UTF-8 text"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00 no gzip", "not UTF-8 text"),
        ("a.txt.gz", b"plain", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": "cut', "line 3 of .* is not JSON"),
        ("a.json", b'[{"text": "fine"},\n{"text": }]', "line 2 of .* is not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n"text"\n', "line 2 of .* is no JSON object"),
        ("a.json", b'["text"]', "line 1 of .* is no JSON object"),
        ("a.jsonl", b'{"text": 3, "b": ""}', r"'text' .* holds a int, expected text: choose another .*\(text, b\)"),
        ("a.jsonl", b'{"n": 3, "m": 4}', r"no column of text \(its columns: n, m\)"),
    ],
)
def test_a_bad_file_is_refused_by_its_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(LLMPruneError, match=message) as raised:
        read(file)
    assert name in str(raised.value)


def test_a_missing_column_is_refused_with_those_there_are(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [{"id": 1, "text": "x"}])
    with pytest.raises(LLMPruneError, match=r"no column 'body': choose one of its columns \(id, text\)"):
        read(f"{file}:body")


def test_a_source_that_is_nothing_is_refused_with_what_there_is(tmp_path: Path) -> None:
    for source in (tmp_path / "gone.txt", "gone", "folder/gone.jsonl", "", "a/b:c:d:e:f", "./org/name"):
        with pytest.raises(LLMPruneError, match=r"no data at .* give c4, wikitext2, self, random, a file"):
            read(source)
    with pytest.raises(LLMPruneError, match="holds no data"):
        read(tmp_path)


# The Hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """A Hub whose every dataset is an endless stream; records how it was asked."""
    calls: list[tuple[object, ...]] = []

    def load_dataset(path: str, name: str | None, *, data_files: object, split: str, streaming: bool):
        calls.append((path, name, data_files, split, streaming))
        return ({"text": f"text {number}", "title": f"title {number}"} for number in count())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(corpus, "hub_reachable", lambda: True)
    return calls


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("org/name", ("org/name", None, None, "train", True)),
        ("org/name:en", ("org/name", "en", None, "train", True)),
        ("org/name::validation:title", ("org/name", None, None, "validation", True)),
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "train", True)),
        ("c4", ("allenai/c4", None, {"train": "en/c4-train.00000-of-01024.json.gz"}, "train", True)),
    ],
)
def test_a_hub_dataset_is_streamed(hub: list[tuple[object, ...]], source: str, call: tuple[object, ...]) -> None:
    name, column, records = open_corpus(source, "calibration", None)
    assert hub == [call]
    assert str(call[0]) in name
    assert column == ("title" if source.endswith("title") else "text")
    assert [record[column] for record in islice(records, 3)] == [f"{column} {number}" for number in range(3)]


def test_evaluation_reads_the_test_split_and_c4_its_first_documents(hub: list[tuple[object, ...]]) -> None:
    open_corpus("wikitext2", "evaluation", None)
    assert hub[-1][3] == "test"
    assert len(read("c4", "evaluation")) == ALIASES["c4"]["evaluation"].rows
    assert hub[-1][2] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}


def test_a_deaf_hub_is_reported_with_what_works_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "hub_reachable", lambda: False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LLMPruneError, match=r"allenai/c4.* does not answer: give a local file or folder, or `self`"):
        read("c4")


def test_offline_only_the_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(LLMPruneError, match=r"org/name, train cannot be opened \(Couldn't reach .* or `self`"):
        read("org/name")


def test_the_hub_is_not_asked_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("asked"))
    assert not hub_reachable()


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (503, False), (None, False)])
def test_the_hub_is_reachable_when_it_answers(monkeypatch: pytest.MonkeyPatch, status: int | None, reachable: bool) -> None:
    class Session:
        status_code = status

        def head(self, url: str, timeout: float) -> "Session":
            if status is None:
                raise ConnectionError(url)
            return self

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    assert hub_reachable() is reachable


def test_importing_needs_no_torch_transformers_datasets_or_pyarrow(run_python: Callable[[str], str]) -> None:
    heavy = {"torch", "transformers", "datasets", "pyarrow", "rich"}
    assert run_python(f"import sys, llmprune.corpus; print({heavy} & set(sys.modules))") == "set()"
