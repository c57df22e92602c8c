"""What a run does, in one frozen model: read from YAML, overridden by flags, saved beside the weights.

Values left out are filled in by `settings.settle`, which gives a reason for each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import LLMPruneError

if TYPE_CHECKING:
    from .patterns import Pattern

Dtype = Literal["float32", "bfloat16", "float16"]
Group = Literal["row", "layer"]


def parse_nm(text: str) -> tuple[int, int] | None:
    """`"2:4"` as (2, 4), None for `"unstructured"`.

    Raises:
        LLMPruneError: it is neither, or not 0 < N < M.
    """
    if text == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise LLMPruneError(f"Unknown pattern {text!r}: use 'unstructured' or N:M, such as 2:4 or 4:8.")
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise LLMPruneError(f"Pattern {text!r} keeps {n} of every {m} weights: N:M needs 0 < N < M, such as 2:4.")
    return n, m


class Recipe(BaseModel):
    """All options of a pruning run. None means: choose for this model and machine, and say why."""

    # The validator is built when it is first used: `--help` needs the fields only.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    model: str = Field(description="Directory, Hub id, GGUF file, or an alias such as llama.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    trust_remote_code: bool = Field(False, description="Run Python code that the model brings.")
    method: str = Field("wanda", description="How weights are chosen: see `llmprune methods`.")
    sparsity: float | None = Field(None, description="Fraction of the prunable weights to remove, in [0, 1).")
    pattern: str = Field("unstructured", description="unstructured, or N:M (keeps N of every M inputs), such as 2:4.")
    group: Group | None = Field(None, description="Weights of one row or of the whole layer compete (unstructured).")
    calibration: str | None = Field(
        None,
        description="c4, wikitext2, a Hub dataset, a .txt/.jsonl/.parquet/.arrow file or folder, self, or random.",
    )
    samples: int | None = Field(None, ge=1, description="Calibration samples.")
    seqlen: int | None = Field(None, ge=2, description="Tokens per calibration sample.")
    seed: int = Field(0, ge=0, lt=2**63, description="Draws calibration samples and random masks.")
    dtype: Dtype | None = Field(
        None, description="What the forward computes in. Weights are saved as the checkpoint stores them."
    )
    device: str | None = Field(None, description="cpu, cuda or cuda:N.")
    micro_batch: int | None = Field(None, ge=1, description="Samples per forward. Does not change the result.")
    propagate: Literal["pruned", "dense"] = Field("pruned", description="Which outputs the next block is calibrated on.")
    sequential: Literal["block", "sublayer"] = Field(
        "block", description="Prune a block after observing it whole, or linear by linear in one forward."
    )
    offload_activations: Path | None = Field(None, description="Directory for a memory-mapped file of the activations.")
    evaluate: str | None = Field(None, description="Text to measure token perplexity on, dense and pruned.")
    output: Path | None = Field(None, description="Directory to write; default: MODEL-METHOD-SPARSITY here.")
    overwrite: bool = Field(False, description="Start afresh, replacing a model that is already there.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        nm = parse_nm(self.pattern)
        if self.sparsity is not None:
            if not 0 <= self.sparsity < 1:
                raise LLMPruneError(f"Sparsity {self.sparsity} is outside [0, 1): give the fraction to remove, such as 0.5.")
            if nm and abs(self.sparsity - _removed(nm)) > 1e-9:
                raise LLMPruneError(
                    f"Pattern {self.pattern} removes {_removed(nm):g} of the weights, which contradicts sparsity "
                    f"{self.sparsity}: leave --sparsity out or make them agree."
                )
        if nm and self.group:
            raise LLMPruneError(
                f"--group {self.group} has no meaning with pattern {self.pattern}: weights compete within groups of "
                f"{nm[1]} only; leave --group out."
            )
        return self

    @property
    def target(self) -> float:
        """The fraction of weights to remove: what was asked for, or what the pattern implies, or a half."""
        if nm := parse_nm(self.pattern):
            return _removed(nm)
        return 0.5 if self.sparsity is None else self.sparsity

    def competition(self, *, default: Group) -> Pattern:
        """The pattern that decides which scores are compared; `default` is the method's own group."""
        from .patterns import NM, Unstructured

        nm = parse_nm(self.pattern)
        return NM(*nm) if nm else Unstructured(self.target, self.group or default)

    def to_yaml(self) -> str:
        """The options that were given or settled on, as YAML that `from_file` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)


def _removed(nm: tuple[int, int]) -> float:
    return 1 - nm[0] / nm[1]


# What decides the bytes of the result. The rest says where to put it, how fast to go or what to measure.
DECISIVE = (
    "method",
    "pattern",
    "group",
    "sparsity",
    "samples",
    "seqlen",
    "seed",
    "dtype",
    "propagate",
    "sequential",
)


def from_options(options: dict[str, object], file: Path | None = None) -> Recipe:
    """A recipe from flags over a YAML file over defaults.

    Args:
        options: flags by name; None values are flags not given.
        file: a recipe in YAML.

    Raises:
        LLMPruneError: unreadable file, unknown option, or a value that is not allowed.
    """
    merged: dict[str, object] = {}
    if file is not None:
        if not file.is_file():
            raise LLMPruneError(f"--recipe {file} does not exist: give a YAML file.")
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise LLMPruneError(f"--recipe {file} is not valid YAML ({reason}).") from error
        if not isinstance(loaded, dict):
            raise LLMPruneError(f"--recipe {file} holds no options: write lines such as 'sparsity: 0.5'.")
        merged.update(loaded)
    merged.update({key: value for key, value in options.items() if value is not None})
    if "model" not in merged:
        raise LLMPruneError("No model given: pass --model, for example --model llama.")
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise LLMPruneError(sentence(error, file)) from error


def sentence(error: ValidationError, file: Path | None = None) -> str:
    """The first thing pydantic found, in one sentence."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, LLMPruneError):
        return str(cause)
    option = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        where = f" in {file}" if file else ""
        return f"Unknown option {option!r}{where}: known are {', '.join(Recipe.model_fields)}."
    return f"Option {option} is {first['input']!r}, but {first['msg'][0].lower()}{first['msg'][1:]}."
