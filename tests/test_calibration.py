"""Laws of llmprune.calibration, most of them on a tokenizer whose token ids are the text's bytes."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmprune import calibration
from llmprune.calibration import CHARACTERS_PER_TOKEN, calibration_set, evaluation_set
from llmprune.corpus import Record
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
    assert calibration._draw(100, 6, 0) == [40, 35, 52, 97, 75, 25]
    assert calibration.random_ids(512, 1, 6, 0).tolist() == [[432, 388, 215, 132, 261, 207]]


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


# Rows.


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_are_joined_by_blank_lines_and_nulls_skipped(tmp_path: Path, corpus: Path) -> None:
    rows: list[dict[str, object]] = [{"text": None}]
    for row in ROWS:
        rows += [{"text": row}, {"text": None}]
    file = write(tmp_path / "a.jsonl", rows)
    assert draw(file).sha256 == draw(corpus).sha256
    assert evaluation_set(str(file), PLAIN, seqlen=8).sha256 == evaluation_set(str(corpus), PLAIN, seqlen=8).sha256


def test_ready_ids_are_used_as_they_are(tmp_path: Path) -> None:
    rows = [list(range(number, number + 20)) for number in range(9)]
    file = write(tmp_path / "a.jsonl", [{"text": "not this", "input_ids": row} for row in rows])
    drawn = draw(file, samples=5, seqlen=16, seed=3)
    assert drawn.ids_NT.tolist() == [row[:16] for row in rows[:5]]
    assert draw(file, samples=5, seqlen=16, seed=4).sha256 == drawn.sha256
    assert evaluation_set(str(file), PLAIN, seqlen=20).ids_NT.tolist() == rows
    with pytest.raises(LLMPruneError, match="too short"):
        draw(f"{file}:text", samples=50)


def test_calibration_reads_the_split_train_and_evaluation_the_split_test(tmp_path: Path) -> None:
    splits = {split: datasets.Dataset.from_dict({"text": [split * 20]}) for split in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert draw(tmp_path / "saved").ids_NT.unique().tolist() == sorted(set(ids_of("train")))
    assert evaluation_set(str(tmp_path / "saved"), PLAIN, seqlen=8).ids_NT.unique().tolist() == sorted(set(ids_of("test")))


def test_only_as_much_is_read_as_the_pool_needs() -> None:
    taken = 0

    def endless() -> Iterator[Record]:
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
    assert "1,024 characters" in evaluation_set(str(file), PLAIN, windows=4, seqlen=16).note


# Errors.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text in column 'text'"),
        ("a.txt", b"short", r"too short for 3 windows of 16 tokens \(48 tokens\), it holds 5 tokens"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": 3}', "'text' is of type int in row 2"),
        ("a.jsonl", b'{"text": "fine"}\n{"body": ""}', "'text' is missing in row 2"),
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


def test_impossible_sizes_are_refused(corpus: Path) -> None:
    with pytest.raises(LLMPruneError, match="calibration samples is 0: give at least 1"):
        draw(corpus, samples=0)
    with pytest.raises(LLMPruneError, match="sequence length is 1: give at least 2"):
        draw(corpus, seqlen=1)
    with pytest.raises(LLMPruneError, match="evaluation windows is 0"):
        evaluation_set(str(corpus), PLAIN, seqlen=8, windows=0)
    with pytest.raises(LLMPruneError, match="too short for 1 windows"):
        evaluation_set(str(corpus), PLAIN, seqlen=99999)


def test_evaluation_takes_as_many_windows_as_there_are_up_to_the_number(corpus: Path) -> None:
    whole = evaluation_set(str(corpus), PLAIN, seqlen=8).ids_NT
    assert torch.equal(evaluation_set(str(corpus), PLAIN, seqlen=8, windows=9999).ids_NT, whole)
    assert torch.equal(evaluation_set(str(corpus), PLAIN, seqlen=8, windows=2).ids_NT, whole[:2])


def test_nothing_is_measured_on_self_or_random() -> None:
    for source in ("self", "random"):
        with pytest.raises(LLMPruneError, match="measures nothing"):
            evaluation_set(source, PLAIN, seqlen=8)


def test_text_without_a_tokenizer_is_refused(corpus: Path) -> None:
    with pytest.raises(LLMPruneError, match="no tokenizer"):
        calibration_set(str(corpus), None, vocab_size=10, samples=1, seqlen=8, seed=0)


# Real data.


def test_the_gold_calibration_ids_are_used_as_they_are(data_dir: Path) -> None:
    file = data_dir / "golden" / "calibration_ids.parquet"
    drawn = calibration_set(str(file), None, vocab_size=49152, samples=32, seqlen=512, seed=0)
    assert drawn.ids_NT.tolist() == pq.read_table(file)["input_ids"].to_pylist()


def test_the_first_windows_of_wikitext_are_those_of_the_whole_text(data_dir: Path, stories260k: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    file = data_dir / "wikitext-2-raw-v1" / "test.parquet"
    first = evaluation_set(str(file), tokenizer, seqlen=512, windows=8)
    assert first.ids_NT.shape == (8, 512)
    ids = tokenizer("\n\n".join(pq.read_table(file)["text"].to_pylist()), add_special_tokens=False).input_ids
    assert first.ids_NT[:, 1:].flatten().tolist() == ids[: 8 * 511]


def test_c4_documents_calibrate_a_real_tokenizer(data_dir: Path, stories260k: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    drawn = draw(data_dir / "c4" / "c4_en_train00000_first1000.jsonl", samples=16, seqlen=128, tokenizer=tokenizer)
    assert drawn.ids_NT.shape == (16, 128)
    assert (drawn.ids_NT[:, 0] == tokenizer.bos_token_id).all()


def test_wikitext_has_the_gold_protocols_tokens(data_dir: Path, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    whole = evaluation_set(str(data_dir / "wikitext-2-raw-v1" / "test.parquet"), tokenizer, seqlen=512)
    assert whole.note.startswith("first 595 disjoint windows of 512 tokens; 304,978 tokens of text")


def test_importing_needs_no_transformers_datasets_or_pyarrow(run_python: Callable[[str], str]) -> None:
    heavy = {"transformers", "datasets", "pyarrow", "rich"}
    assert run_python(f"import sys, llmprune.sampling, llmprune.calibration; print({heavy} & set(sys.modules))") == "set()"
