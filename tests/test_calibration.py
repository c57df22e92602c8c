"""Laws of llmprune.calibration, most of them on a tokenizer whose token ids are the text's bytes."""

import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmprune import calibration
from llmprune.calibration import (
    ALIASES,
    CHARACTERS_PER_TOKEN,
    calibration_set,
    evaluation_set,
    hub_reachable,
    sample_from_model,
)
from llmprune.errors import LLMPruneError

ROWS = [f"Row {number} says {'abc' * number}, é and 漢." for number in range(40)]
TEXT = "\n\n".join(ROWS)


def byte_tokenizer(*, leads_with_bos: bool) -> PreTrainedTokenizerFast:
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: id_ for id_, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if leads_with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


PLAIN = byte_tokenizer(leads_with_bos=False)
WITH_BOS = byte_tokenizer(leads_with_bos=True)


def ids_of(text: str) -> list[int]:
    return PLAIN(text, add_special_tokens=False).input_ids


def draw(source: Path | str, *, samples: int = 3, seqlen: int = 16, seed: int = 0, tokenizer=PLAIN):
    return calibration_set(str(source), tokenizer, samples=samples, seqlen=seqlen, seed=seed)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


# Drawing and cutting.


def test_a_seed_gives_one_set_and_another_seed_another(corpus: Path) -> None:
    first, again, other = draw(corpus), draw(corpus), draw(corpus, seed=1)
    assert torch.equal(first.ids_NT, again.ids_NT)
    assert first.sha256 == again.sha256 != other.sha256
    assert not torch.equal(first.ids_NT, other.ids_NT)


def test_the_drawn_windows_never_change() -> None:
    # Written down once: a Python, NumPy or torch that draws others would silently break every recorded result.
    assert calibration._draw(100, 6, 0) == [88, 21, 84, 80, 35, 55]
    assert calibration._random_ids(512, 1, 6, 0).tolist() == [[432, 388, 215, 132, 261, 207]]


def test_the_hash_is_of_the_shape_and_the_ids_as_little_endian_int64() -> None:
    def sha256(ids_NT: torch.Tensor) -> str:
        return calibration._token_set(ids_NT, "", "").sha256

    ids_NT = torch.tensor([[1, 2, 3], [4, 5, 60_000]])
    assert sha256(ids_NT) == hashlib.sha256(struct.pack("<8q", 2, 3, 1, 2, 3, 4, 5, 60_000)).hexdigest()
    assert sha256(ids_NT.t()) == sha256(ids_NT.t().contiguous()) != sha256(ids_NT) != sha256(ids_NT.view(3, 2))


@given(samples=st.integers(1, 20), seqlen=st.integers(2, 40), seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_samples_are_distinct_windows_of_the_text(tmp_path_factory, samples: int, seqlen: int, seed: int) -> None:
    file = tmp_path_factory.mktemp("law") / "corpus.txt"
    file.write_text(TEXT * 3, encoding="utf-8")
    drawn = draw(file, samples=samples, seqlen=seqlen, seed=seed)
    assert drawn.ids_NT.shape == (samples, seqlen)
    assert drawn.ids_NT.dtype == torch.int64

    pool = ids_of((TEXT * 3)[: CHARACTERS_PER_TOKEN * samples * seqlen])
    places: dict[tuple[int, ...], set[int]] = {}
    for start in range(0, len(pool) - seqlen + 1, seqlen):
        places.setdefault(tuple(pool[start : start + seqlen]), set()).add(start)
    for row in drawn.ids_NT.tolist():
        places[tuple(row)].pop()  # raises if a window is no window, or is drawn more often than it occurs


def test_evaluation_windows_are_the_text_in_order_without_its_tail(corpus: Path) -> None:
    every = evaluation_set(str(corpus), PLAIN, seqlen=32)
    ids = ids_of(TEXT)
    assert every.ids_NT.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert torch.equal(evaluation_set(str(corpus), PLAIN, seqlen=32, windows=2).ids_NT, every.ids_NT[:2])


def test_windows_start_with_bos_where_the_tokenizer_does(corpus: Path) -> None:
    plain, led = (evaluation_set(str(corpus), tokenizer, seqlen=32) for tokenizer in (PLAIN, WITH_BOS))
    assert "BOS" in led.note
    assert "BOS" not in plain.note
    assert (led.ids_NT[:, 0] == WITH_BOS.bos_token_id).all()
    text = led.ids_NT[:, 1:].flatten().tolist()
    assert text == ids_of(TEXT)[: len(text)]
    assert draw(corpus, tokenizer=WITH_BOS).ids_NT.shape == (3, 16)
    assert (draw(corpus, tokenizer=WITH_BOS).ids_NT[:, 0] == WITH_BOS.bos_token_id).all()


def test_random_ids_need_no_data_and_fill_the_vocabulary() -> None:
    drawn = calibration_set("random", None, vocab_size=10, samples=4, seqlen=100, seed=0)
    assert drawn.ids_NT.shape == (4, 100)
    assert drawn.ids_NT.unique().tolist() == list(range(10))
    assert draw("random").ids_NT.max() < len(PLAIN)


def test_self_calls_the_sampler_with_what_was_asked() -> None:
    def sampler(samples: int, seqlen: int, seed: int) -> torch.Tensor:
        return torch.full((samples, seqlen), seed)

    drawn = calibration_set("self", None, samples=2, seqlen=5, seed=7, sampler=sampler)
    assert drawn.ids_NT.tolist() == [[7] * 5] * 2
    with pytest.raises(LLMPruneError, match="pass a sampler"):
        calibration_set("self", None, samples=2, seqlen=5, seed=7)


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
def test_every_format_gives_the_tokens_of_the_plain_text(tmp_path: Path, corpus: Path, name: str) -> None:
    file = write(tmp_path / name, [{"id": number, "text": row} for number, row in enumerate(ROWS)])
    assert draw(file).sha256 == draw(corpus).sha256
    assert evaluation_set(str(file), PLAIN, seqlen=8).sha256 == evaluation_set(str(corpus), PLAIN, seqlen=8).sha256


@pytest.mark.parametrize("name", FORMATS)
def test_ready_ids_are_used_as_they_are_in_every_format(tmp_path: Path, name: str) -> None:
    rows = [list(range(number, number + 20)) for number in range(9)]
    file = write(tmp_path / name, [{"text": "not this", "input_ids": row} for row in rows])
    drawn = draw(file, samples=5, seqlen=16, seed=3)
    assert drawn.ids_NT.tolist() == [row[:16] for row in rows[:5]]
    assert draw(file, samples=5, seqlen=16, seed=4).sha256 == drawn.sha256
    assert evaluation_set(str(file), PLAIN, seqlen=20).ids_NT.tolist() == rows
    with pytest.raises(LLMPruneError, match="too short"):
        draw(f"{file}:text", samples=50)


def test_byte_order_mark_and_line_ends_are_no_tokens(tmp_path: Path, corpus: Path) -> None:
    windows = tmp_path / "windows.txt"
    windows.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert draw(windows).sha256 == draw(corpus).sha256


def test_a_folder_is_its_files_by_name(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "b.parquet", [{"text": row} for row in ROWS[15:25]])
    write(folder / "a.jsonl", [{"text": row} for row in ROWS[:15]])
    (folder / "c.txt").write_text("\n\n".join(ROWS[25:]), encoding="utf-8")
    (folder / "README.md").write_text("not data")
    whole = evaluation_set(str(folder), PLAIN, seqlen=8)
    assert torch.equal(whole.ids_NT, evaluation_set(str(corpus), PLAIN, seqlen=8).ids_NT)


def test_a_saved_dataset_dict_is_read_by_its_split(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    splits = {"train": datasets.Dataset.from_dict({"text": ROWS}), "validation": datasets.Dataset.from_dict({"text": ["x"]})}
    datasets.DatasetDict(splits).save_to_disk(folder)
    assert draw(folder).ids_NT.shape == (3, 16)
    with pytest.raises(LLMPruneError, match=r"no split test: give one of its folders \(train, validation\)"):
        evaluation_set(str(folder), PLAIN, seqlen=8)


def test_the_column_is_the_one_named_else_text_else_the_first_of_text(tmp_path: Path) -> None:
    rows = [{"id": 1, "title": "t" * 50, "text": "x" * 50, "body": "b" * 50}] * 4
    file = write(tmp_path / "with:colon.jsonl", rows)
    without = write(tmp_path / "without.parquet", [{key: row[key] for key in ("id", "title", "body")} for row in rows])
    for source, letter in ((file, "x"), (f"{file}:body", "b"), (without, "t"), (f"{without}:body", "b")):
        drawn = draw(source)
        assert set(drawn.ids_NT.flatten().tolist()) <= set(ids_of(letter + "\n"))
    assert "'body'" in drawn.note


def test_null_rows_are_skipped(tmp_path: Path, corpus: Path) -> None:
    rows: list[dict[str, object]] = [{"text": None}]
    for row in ROWS:
        rows += [{"text": row}, {"text": None}]
    for name in ("a.jsonl", "a.parquet"):
        assert draw(write(tmp_path / name, rows)).sha256 == draw(corpus).sha256


def test_only_as_much_is_read_as_the_pool_needs() -> None:
    taken = 0

    def endless() -> Iterator[calibration.Record]:
        nonlocal taken
        for taken in count(1):
            yield {"text": "" if taken % 2 else "word " * 20}

    text, rows = calibration._read_text(endless(), "endless", "text", 5000)
    assert len(text) == 5000
    assert rows == taken == 98


def test_a_text_file_is_read_only_up_to_the_bound(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_bytes(b"a" * 100_000 + b"\xff" * 10)  # reading to the end would raise
    assert "512 characters" in draw(file, samples=2, seqlen=16).note


# Errors.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text in column 'text'"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.parquet", b"", "not a whole parquet file"),
        ("a.parquet", b"PAR1 but not really", "not a whole parquet file"),
        ("a.arrow", b"", "not a whole arrow file"),
        ("a.arrow", b"ARROW1 but not really", "not a whole arrow file"),
        ("a.csv", b"text\nx", r"unknown kind: give a file of \.txt, \.json, \.jsonl, \.parquet, \.arrow"),
        ("a.txt", b"short", r"too short for 3 windows of 16 tokens \(48 tokens\), it holds 5 tokens"),
        ("a.txt", b"caf\xe9 " * 99, "not UTF-8 text"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "not UTF-8 text"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00 no gzip", "not UTF-8 text"),
        ("a.txt.gz", b"plain", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": "cut', "line 3 of .* is not JSON"),
        ("a.json", b'[{"text": "fine"},\n{"text": }]', "line 2 of .* is not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n"text"\n', "line 2 of .* is no JSON object"),
        ("a.json", b'["text"]', "line 1 of .* is no JSON object"),
        ("a.jsonl", b'{"text": 3, "b": ""}', r"'text' .* holds a int, expected text: choose another .*\(text, b\)"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": 3}', "'text' is of type int in row 2"),
        ("a.jsonl", b'{"text": "fine"}\n{"body": ""}', "'text' is missing in row 2"),
        ("a.jsonl", b'{"n": 3, "m": 4}', r"no column of text \(its columns: n, m\)"),
        ("a.jsonl", b'{"text": "\\ud800' + b"x" * 99 + b'"}', r"'\\ud800', which is no character"),
        ("a.jsonl", b'{"text": " "}\n{"text": null}', "no text in column"),
        ("a.jsonl", b'{"input_ids": [1, 2]}', "has 1 rows of token ids, 3 were asked for"),
        ("a.jsonl", b'{"input_ids": [1, 2]}\n' * 3, "a row of 2 token ids among its first 3, 16 were asked"),
        ("a.jsonl", (json.dumps({"input_ids": [999] * 16}) + "\n").encode() * 3, "id 999 and the vocabulary ends at 257"),
        ("a.jsonl", (json.dumps({"input_ids": [-1] * 16}) + "\n").encode() * 3, "id -1 and the vocabulary ends at 257"),
        ("a.jsonl", (json.dumps({"input_ids": [0.5] * 16}) + "\n").encode() * 3, "row 1 .* no list of token ids"),
    ],
)
def test_a_bad_file_is_refused_by_its_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(LLMPruneError, match=message) as raised:
        draw(file)
    assert name in str(raised.value)


def test_a_missing_column_is_refused_with_those_there_are(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [{"id": 1, "text": "x"}])
    with pytest.raises(LLMPruneError, match=r"no column 'body': choose one of its columns \(id, text\)"):
        draw(f"{file}:body")


def test_a_source_that_is_nothing_is_refused_with_what_there_is(tmp_path: Path) -> None:
    for source in (tmp_path / "gone.txt", "gone", "folder/gone.jsonl", "", "a/b:c:d:e:f", "./org/name"):
        with pytest.raises(LLMPruneError, match=r"no data at .* give c4, wikitext2, self, random, a file"):
            draw(source)
    with pytest.raises(LLMPruneError, match="holds no data"):
        draw(tmp_path)


def test_impossible_sizes_are_refused(corpus: Path) -> None:
    with pytest.raises(LLMPruneError, match="calibration samples is 0: give at least 1"):
        draw(corpus, samples=0)
    with pytest.raises(LLMPruneError, match="sequence length is 1: give at least 2"):
        draw(corpus, seqlen=1)
    with pytest.raises(LLMPruneError, match="evaluation windows is 0"):
        evaluation_set(str(corpus), PLAIN, seqlen=8, windows=0)
    with pytest.raises(LLMPruneError, match="too short for 9999 windows"):
        evaluation_set(str(corpus), PLAIN, seqlen=8, windows=9999)
    with pytest.raises(LLMPruneError, match="too short for 1 windows"):
        evaluation_set(str(corpus), PLAIN, seqlen=99999)


def test_nothing_is_measured_on_self_or_random() -> None:
    for source in ("self", "random"):
        with pytest.raises(LLMPruneError, match="measures nothing"):
            evaluation_set(source, PLAIN, seqlen=8)


def test_text_without_a_tokenizer_is_refused(corpus: Path) -> None:
    with pytest.raises(LLMPruneError, match="no tokenizer"):
        calibration_set(str(corpus), None, vocab_size=10, samples=1, seqlen=8, seed=0)


# The Hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """A Hub whose every dataset is an endless stream; records how it was asked."""
    calls: list[tuple[object, ...]] = []

    def load_dataset(path: str, name: str | None, *, data_files: object, split: str, streaming: bool):
        calls.append((path, name, data_files, split, streaming))
        return ({"text": row, "title": "t" * 60} for _ in count() for row in ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(calibration, "hub_reachable", lambda: True)
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
    drawn = draw(source)
    assert hub == [call]
    assert drawn.ids_NT.shape == (3, 16)
    assert call[0] in drawn.source
    assert ("t" * 16 in PLAIN.decode(drawn.ids_NT[0])) == source.endswith("title")


def test_evaluation_reads_the_test_split_and_c4_its_first_documents(hub: list[tuple[object, ...]]) -> None:
    evaluation_set("wikitext2", PLAIN, seqlen=8, windows=2)
    assert hub[-1][3] == "test"
    rows = ALIASES["c4"]["evaluation"].rows
    assert f"{rows:,} rows" in evaluation_set("c4", PLAIN, seqlen=8).note
    assert hub[-1][2] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}


def test_a_deaf_hub_is_reported_with_what_works_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "hub_reachable", lambda: False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LLMPruneError, match=r"allenai/c4.* does not answer: give a local file or folder, or `self`"):
        draw("c4")


def test_offline_only_the_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(LLMPruneError, match=r"org/name, train cannot be opened \(Couldn't reach .* or `self`"):
        draw("org/name")


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


# The model's own text.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "self"


def write_own(model_dir: Path, *, samples: int = 3, seqlen: int = 24, seed: int = 0) -> torch.Tensor:
    return sample_from_model(
        model_dir, samples, seqlen, seed, model_key=str(model_dir), device="cpu", dtype=torch.float32, quiet=True
    )


@pytest.mark.needs_data
def test_the_model_writes_the_same_text_for_a_seed_and_leaves_the_generator_alone(stories260K: Path, cache: Path) -> None:
    state = torch.random.get_rng_state()
    first, other = write_own(stories260K), write_own(stories260K, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for file in cache.iterdir():
        file.unlink()
    torch.manual_seed(99)
    assert torch.equal(write_own(stories260K), first)
    assert not torch.equal(first, other)
    assert first.shape == (3, 24)
    assert (first[:, 0] == 1).all()


@pytest.mark.needs_data
def test_the_models_generation_settings_neither_cut_nor_bend_its_text(stories260K: Path, cache: Path, tmp_path: Path) -> None:
    bent = tmp_path / "bent"
    bent.mkdir()
    for file in stories260K.iterdir():
        (bent / file.name).write_bytes(file.read_bytes())
    leaks = {"temperature": 0.1, "top_p": 0.5, "top_k": 2, "repetition_penalty": 9.0, "max_length": 5, "do_sample": True}
    everything_ends = {"bos_token_id": 1, "eos_token_id": list(range(512)), "suppress_tokens": list(range(300))}
    (bent / "generation_config.json").write_text(json.dumps(leaks | everything_ends))
    assert torch.equal(write_own(bent), write_own(stories260K))


@pytest.mark.needs_data
def test_own_text_is_cached_and_a_corrupt_cache_is_made_again(
    stories260K: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_own(stories260K)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    for corrupt in (b"", good[:-7], b"nonsense"):
        file.write_bytes(corrupt)
        assert torch.equal(write_own(stories260K), first)
        assert file.read_bytes() == good
    save_file({"input_ids": first[:2]}, file)
    assert torch.equal(write_own(stories260K), first)

    monkeypatch.setattr(calibration, "_generate", lambda *_, **__: pytest.fail("sampled again"))
    assert torch.equal(write_own(stories260K), first)
    assert list(cache.iterdir()) == [file]


@pytest.mark.needs_data
def test_more_samples_than_a_batch_are_all_written(stories260K: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SAMPLING_BATCH", 4)
    ids_NT = write_own(stories260K, samples=10, seqlen=8)
    assert ids_NT.shape == (10, 8)
    assert len({tuple(row) for row in ids_NT.tolist()}) == 10


def test_a_model_without_bos_and_eos_starts_from_seeded_ids() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def starts(seed: int, **special: int | list[int] | None) -> list[int]:
        config = LlamaConfig(
            vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, **special
        )
        return calibration._start_ids(LlamaForCausalLM(config), 4, seed).flatten().tolist()

    assert starts(0, bos_token_id=5, eos_token_id=6) == [5] * 4
    assert starts(0, bos_token_id=None, eos_token_id=[6, 7]) == [6] * 4
    neither = starts(0, bos_token_id=None, eos_token_id=None)
    assert len(set(neither)) > 1
    assert neither == starts(0, bos_token_id=None, eos_token_id=None) != starts(1, bos_token_id=None, eos_token_id=None)


def test_an_unwritable_cache_is_refused_before_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(LLMPruneError, match="set LLMPRUNE_CACHE"):
        write_own(tmp_path / "no model")


# Real data.


@pytest.mark.needs_data
def test_the_gold_calibration_ids_are_used_as_they_are(data_dir: Path) -> None:
    file = data_dir / "golden" / "calibration_ids.parquet"
    drawn = calibration_set(str(file), None, vocab_size=49152, samples=32, seqlen=512, seed=0)
    assert drawn.ids_NT.tolist() == pq.read_table(file)["input_ids"].to_pylist()


@pytest.mark.needs_data
def test_wikitext_gives_the_papers_windows(data_dir: Path, stories260K: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories260K)
    file = data_dir / "wikitext-2-raw-v1" / "test.parquet"
    whole = evaluation_set(str(file), tokenizer, seqlen=512)
    text = "\n\n".join(pq.read_table(file)["text"].to_pylist())
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 815_069
    assert whole.ids_NT.shape == (815_069 // 511, 512)  # 511 tokens of text after BOS
    assert whole.ids_NT[:, 1:].flatten().tolist() == ids[: 511 * len(whole.ids_NT)]
    first = evaluation_set(str(file), tokenizer, seqlen=512, windows=8)
    assert torch.equal(first.ids_NT, whole.ids_NT[:8])


@pytest.mark.needs_data
def test_c4_documents_calibrate_a_real_tokenizer(data_dir: Path, stories260K: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories260K)
    drawn = draw(data_dir / "c4" / "c4_en_train00000_first1000.jsonl", samples=16, seqlen=128, tokenizer=tokenizer)
    assert drawn.ids_NT.shape == (16, 128)
    assert (drawn.ids_NT[:, 0] == tokenizer.bos_token_id).all()


def test_importing_needs_no_transformers_datasets_or_pyarrow() -> None:
    code = "import sys, llmprune.calibration; print({'transformers', 'datasets', 'pyarrow', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.strip() == "set()"
