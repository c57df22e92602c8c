"""What a run does, in one frozen model: read from YAML, overridden by flags, saved beside the weights.

Values left out are filled in by `settings.settle`, which gives a reason for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import LLMPruneError
from .options import PRESETS, DsnotOptions, IcbsOptions, SearchOptions

if TYPE_CHECKING:
    from .patterns import Pattern

M = TypeVar("M", bound=BaseModel)
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


# What a method's name stands for, where the recipe does not say otherwise.
IMPLIED: dict[str, dict[str, object]] = {
    "sparsegpt": {"reconstruct": "sparsegpt"},
    "dsnot": {"refine": "dsnot"},
    "best": {
        "allocation": "block-influence",
        "reconstruct": "lstsq",
        "rounds": 15,
        "match": "dense",
        "sequential": "sublayer",
    },
    "cfsp": {"allocation": "block-influence", "compensate": "lstsq", "sequential": "sublayer"},
    "reap": {"metric": "reap", "propagate": "dense"},
    "tyr": {"allocation": "searched", "sequential": "sublayer"},
    "wina": {"allocation": "closed-form", "propagate": "dense"},
}
# Methods that remove FFN channels, attention heads or experts, and what belongs to them alone.
STRUCTURED = ("cfsp", "reap", "tyr")
STRUCTURAL = ("of", "target_params", "multiple_of", "heads", "metric", "compensate", "format", "plan", "type_coupling")
# How a structured method can share its budget, and score what it chooses among.
ALLOCATIONS = {"cfsp": ("uniform", "block-influence"), "reap": ("uniform",), "tyr": ("uniform", "searched")}
METRICS = {
    "cfsp": ("act", "wanda_sp", "rel", "out_energy", "wifv", "magnitude", "random"),
    "reap": ("reap", "frequency", "random"),
}
# What only methods that choose single weights can be told.
WEIGHTWISE = ("pattern", "group", "refine", "reconstruct", "rounds")
# What belongs to activation sparsity alone.
GATING = ("score", "share", "form", "basis")
# Which method or option takes each group of options.
OPTIONS: dict[str, type[BaseModel]] = {"dsnot": DsnotOptions, "icbs": IcbsOptions, "search": SearchOptions}


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
    refine: Literal["none", "dsnot", "icbs"] = Field(
        "none", description="Improve the method's mask by swaps: DSnoT's, or iCBS's on each row's reconstruction error."
    )
    reconstruct: Literal["none", "sparsegpt", "lstsq"] = Field(
        "none", description="Fit the kept weights anew: SparseGPT's one sweep, or least squares."
    )
    allocation: Literal["uniform", "owl", "block-influence", "searched", "greedy", "closed-form"] = Field(
        "uniform",
        description="Every block loses the same share, or less where outliers are many (OWL), where it changes the hidden "
        "states more, or as an evolutionary search finds best; WINA shares it among a block's linears, step by step (greedy) "
        "or by one equation (closed-form).",
    )
    of: Literal["prunable", "model"] = Field(
        "prunable", description="What --sparsity is a fraction of: what the method can remove, or the whole model."
    )
    target_params: str | None = Field(None, description="Parameters to end with, as 100M or 6.5B, instead of --sparsity.")
    multiple_of: int | None = Field(None, ge=1, description="FFN widths are multiples of this; by default 128, 32 or 16.")
    heads: Literal["kv_group", "q_balanced"] = Field(
        "kv_group",
        description="Attention loses key-value heads with all their queries, or one query head of each key-value head.",
    )
    metric: Literal["act", "wanda_sp", "rel", "out_energy", "wifv", "magnitude", "random", "reap", "frequency"] = Field(
        "act", description="How CFSP scores the channels of an FFN; REAP scores experts by reap, frequency or random."
    )
    compensate: Literal["none", "bias", "lstsq"] = Field(
        "none", description="What CFSP does for the channels that are gone: a bias, or the others fitted by least squares."
    )
    format: Literal["auto", "padded", "masked"] = Field(
        "auto",
        description="Smaller matrices, in a class of llmprune's where widths differ; padded to equal widths; zeros in place.",
    )
    plan: Path | None = Field(
        None, description="A llmprune_plan.json: CFSP removes what it says instead of choosing, so leave --sparsity out."
    )
    type_coupling: Literal["separate", "joint"] = Field(
        "separate", description="Týr conserves heads and channels each, or lets one trade with the other at equal parameters."
    )
    score: Literal["wina", "wina-released", "teal"] = Field(
        "wina", description="What WINA drops inputs by: |x| times the column's norm, that for k and gate only, or |x|."
    )
    share: bool = Field(False, description="WINA: q, k and v drop the same inputs, and so do gate and up.")
    form: Literal["sidecar", "folded"] = Field(
        "sidecar", description="WINA: a plan beside untouched weights, or norms folded into weights that stock code loads."
    )
    basis: Literal["native", "stacked", "kgate", "auto"] = Field(
        "native",
        description="WINA: inputs are dropped as they are, or rotated to make columns orthogonal, at a matrix product more.",
    )
    min_expert_tokens: int = Field(
        64, ge=1, description="An expert that fewer calibration tokens were routed to is pruned by magnitude, and named."
    )
    rounds: int = Field(0, ge=0, description="Rounds in which least squares chooses the mask anew (ADMM).")
    match: Literal["block", "dense"] = Field(
        "block",
        description="Fits and iCBS's swaps aim at a linear's output on its own inputs, or at what the dense model has there.",
    )
    damping: float | None = Field(
        None, gt=0, lt=1, description="Share of the Hessian's diagonal in iCBS's row errors, least squares and Týr."
    )
    preset: Literal["smoke", "fast", "paper"] | None = Field(
        None, description="DSnoT, iCBS or a search with the published settings; a search also fast or as a smoke test."
    )
    dsnot: DsnotOptions | None = Field(None, description="DSnoT's own options, as 'cycles: 10, accept: always'.")
    icbs: IcbsOptions | None = Field(None, description="iCBS's own options (method icbs), as 'steps: 100, gamma: 0.5'.")
    search: SearchOptions | None = Field(None, description="The search's own options, as 'generations: 20, offspring: 32'.")
    steps: int | None = Field(None, description="Steps of method icbs, short for --icbs 'steps: N'.")
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

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, data: dict[str, object]) -> dict[str, object]:
        implied = dict(IMPLIED.get(str(data.get("method")), {}))
        if ":" in str(data.get("pattern")):  # every block of N:M loses the same
            implied.pop("allocation", None)
        data = {**implied, **data}
        if data.get("form") == "folded":
            data.setdefault("share", True)
        used = {
            "dsnot": data.get("refine") == "dsnot",
            "icbs": data.get("method") == "icbs",
            "search": data.get("allocation") == "searched" or data.get("method") == "tyr",
        }
        for name, own in used.items():
            given = data.get(name)
            if isinstance(given, str):
                given = _flow_mapping(name, given)
            if own and (given is None or isinstance(given, dict)):
                preset = PRESETS[name].get(str(data.get("preset")), {})
                steps = {"steps": data["steps"]} if name == "icbs" and data.get("steps") is not None else {}
                given = {**preset, **(given or {}), **steps}
            data[name] = given
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_structure()
        self._check_gating()
        self._check_parts()
        nm = parse_nm(self.pattern)
        if self.sparsity is not None:
            if not 0 <= self.sparsity < 1:
                raise LLMPruneError(f"Sparsity {self.sparsity} is outside [0, 1): give the fraction to remove, such as 0.5.")
            if nm and abs(self.sparsity - _removed(nm)) > 1e-9:
                raise LLMPruneError(
                    f"Pattern {self.pattern} removes {_removed(nm):g} of the weights, which contradicts sparsity "
                    f"{self.sparsity}: leave --sparsity out or make them agree."
                )
        if nm and self.allocation != "uniform":
            raise LLMPruneError(
                f"--allocation {self.allocation} has no meaning with pattern {self.pattern}, which removes the same share "
                "everywhere: leave --allocation out."
            )
        if nm and self.group:
            raise LLMPruneError(
                f"--group {self.group} has no meaning with pattern {self.pattern}: weights compete within groups of "
                f"{nm[1]} only; leave --group out."
            )
        return self

    def _check_parts(self) -> None:
        """Raise `LLMPruneError` where refinement and reconstruction contradict each other or the rest."""
        if self.method == "best" and self.reconstruct != "lstsq":
            raise LLMPruneError(
                f"--method best fits least squares, which --reconstruct {self.reconstruct} takes from it: leave --reconstruct "
                "out."
            )
        if self.rounds and self.reconstruct != "lstsq":
            raise LLMPruneError(
                f"--rounds {self.rounds} belongs to least squares, but --reconstruct is {self.reconstruct}: give --reconstruct "
                "lstsq or leave --rounds out."
            )
        if self.match == "dense":
            if not (self.reconstruct == "lstsq" or self.refine == "icbs" or self.compensate == "lstsq" or self.method == "tyr"):
                raise LLMPruneError(
                    f"--match dense is for least squares and iCBS's swaps, but --reconstruct is {self.reconstruct} and "
                    f"--refine {self.refine}: give --reconstruct lstsq or --refine icbs, or leave --match out."
                )
            if self.sequential != "sublayer" or self.propagate != "pruned":
                what = "--method best, which implies --match dense, " if self.method == "best" else "--match dense "
                raise LLMPruneError(
                    f"{what}compares the two models linear by linear, which --sequential {self.sequential} --propagate "
                    f"{self.propagate} does not: give --sequential sublayer --propagate pruned."
                )
        if self.method == "icbs" and self.reconstruct != "none":
            raise LLMPruneError(
                f"--reconstruct {self.reconstruct} fits weights block by block, where --method icbs swaps them by the whole "
                "model's loss: leave --reconstruct out, or give --refine icbs without --method icbs."
            )
        if self.method == "icbs" and self.allocation == "searched":
            raise LLMPruneError(
                "--allocation searched and --method icbs are two searches by the whole model's loss, and a run makes one: take "
                "another --allocation."
            )
        if self.target == 0 and self.refine != "none":
            raise LLMPruneError(f"With --sparsity 0 --refine {self.refine} has no mask to refine: give a sparsity above 0.")
        searches = self.allocation == "searched" or self.method == "tyr"
        for name, used, wanted in (
            ("dsnot", self.refine == "dsnot", "--refine dsnot or --method dsnot"),
            ("icbs", self.method == "icbs", "--method icbs"),
            ("search", searches, "--method tyr or --allocation searched"),
        ):
            if getattr(self, name) is not None and not used:
                raise LLMPruneError(
                    f"--{name} has no effect with --method {self.method} --refine {self.refine}: give {wanted}."
                )
        presets = {preset for name in OPTIONS if getattr(self, name) is not None for preset in PRESETS[name]}
        for flag, value, used in (
            ("steps", self.steps, self.method == "icbs"),
            ("preset", self.preset, self.preset in presets),
        ):
            if value is not None and not used:
                raise LLMPruneError(f"--{flag} {value} has no effect with --method {self.method}: leave it out.")

    def _check_gating(self) -> None:
        """Raise `LLMPruneError` where activation sparsity and pruning of weights are mixed up."""
        gates = self.method == "wina"
        for name in (*WEIGHTWISE, "match") if gates else GATING:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise LLMPruneError(
                    f"--{name} {getattr(self, name)} is about weights, and --method wina leaves them as they are and drops "
                    "inputs: leave it out."
                    if gates
                    else f"--{name} {getattr(self, name)} belongs to --method wina, not to {self.method}: leave it out."
                )
        allocations = ("uniform", "greedy", "closed-form")
        if (self.allocation not in allocations) if gates else (self.allocation in allocations[1:]):
            raise LLMPruneError(
                f"--allocation {self.allocation} is not for --method {self.method}: "
                + (f"give {', '.join(allocations)}." if gates else "--method wina shares a block's sparsity so.")
            )
        if not gates:
            return
        if self.propagate != "dense" or self.sequential != "block":
            raise LLMPruneError(
                f"--method wina looks at the dense model, which --propagate {self.propagate} --sequential {self.sequential} "
                "does not: leave them out."
            )
        if self.form == "folded" and self.score == "wina-released":
            raise LLMPruneError(
                "--form folded puts one norm on what q, k and v read, and --score wina-released has one for k: give another."
            )
        if self.form == "folded" and (not self.share or self.basis != "native"):
            raise LLMPruneError(
                f"--form folded puts one scale on what q, k and v read, and gate and up, which --share {self.share} --basis "
                f"{self.basis} does not allow: leave them out."
            )

    def _check_structure(self) -> None:
        """Raise `LLMPruneError` where structured pruning and pruning of single weights are mixed up."""
        given = self.model_fields_set
        if self.method not in STRUCTURED:
            for name in STRUCTURAL:
                if name in given and getattr(self, name) != type(self).model_fields[name].default:
                    raise LLMPruneError(
                        f"--{name.replace('_', '-')} {getattr(self, name)} is for methods that remove channels or heads "
                        f"({', '.join(STRUCTURED)}), not for {self.method}: leave it out."
                    )
            return
        whole = "experts" if self.method == "reap" else "channels or heads"
        for name in WEIGHTWISE:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise LLMPruneError(
                    f"--{name} {getattr(self, name)} is about single weights, and --method {self.method} removes whole "
                    f"{whole}: leave it out."
                )
        if self.plan is not None and (self.sparsity is not None or self.target_params is not None):
            raise LLMPruneError(f"--plan {self.plan} says how much to remove: leave --sparsity and --target-params out.")
        if self.target_params is not None and (self.sparsity is not None or self.of == "model"):
            raise LLMPruneError(
                f"--target-params {self.target_params} says how much to remove, and so does --sparsity: give one of them."
            )
        if self.allocation not in ALLOCATIONS[self.method]:
            raise LLMPruneError(
                f"--method {self.method} shares its budget by {' or '.join(ALLOCATIONS[self.method])}, not by "
                f"{self.allocation}: give another --allocation."
            )
        if self.metric not in METRICS.get(self.method, (self.metric,)):
            raise LLMPruneError(
                f"--metric {self.metric} is none of --method {self.method}'s: give {', '.join(METRICS[self.method])}."
            )
        if self.method == "reap" and (self.propagate, self.sequential) != ("dense", "block"):
            raise LLMPruneError(
                f"--method reap looks at the dense model, which --propagate {self.propagate} --sequential {self.sequential} "
                "does not: leave them out."
            )
        for flag, methods in (
            ("metric", ("cfsp", "reap")),
            ("multiple_of", ("cfsp", "tyr")),
            ("format", ("cfsp", "tyr")),
            ("compensate", ("cfsp",)),
            ("plan", ("cfsp",)),
            ("heads", ("tyr",)),
            ("type_coupling", ("tyr",)),
        ):
            if self.method not in methods and getattr(self, flag) != type(self).model_fields[flag].default:
                raise LLMPruneError(
                    f"--{flag.replace('_', '-')} {getattr(self, flag)} has no effect with --method {self.method}: leave it out."
                )

    @property
    def structured(self) -> bool:
        """Whether whole channels or heads are removed."""
        return self.method in STRUCTURED

    @property
    def target(self) -> float:
        """The fraction of weights to remove: what was asked for, or what the pattern implies, or a half."""
        if nm := parse_nm(self.pattern):
            return _removed(nm)
        return 0.5 if self.sparsity is None else self.sparsity

    def competition(self, *, default: Group, sparsity: float | None = None) -> Pattern:
        """The pattern that decides which scores are compared.

        Args:
            default: the method's own group.
            sparsity: where it is not the recipe's.
        """
        from .patterns import NM, Unstructured

        nm = parse_nm(self.pattern)
        return NM(*nm) if nm else Unstructured(self.target if sparsity is None else sparsity, self.group or default)

    def to_yaml(self) -> str:
        """The options that were given or settled on, as YAML that `from_file` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)


def _flow_mapping(name: str, text: str) -> object:
    """`"cycles: 10, accept: always"` as a dict.

    Raises:
        LLMPruneError: it is no such list.
    """
    try:
        loaded = yaml.safe_load("{" + text + "}")
    except yaml.YAMLError:
        loaded = None
    if not isinstance(loaded, dict) or None in loaded.values():
        raise LLMPruneError(f"--{name} {text!r} is not a list of options: write 'name: value, name: value'.")
    return loaded


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
    "allocation",
    "refine",
    "reconstruct",
    "rounds",
    "match",
    "damping",
    "min_expert_tokens",
    "dsnot",
    "icbs",
    "search",
    "of",
    "multiple_of",
    "heads",
    "metric",
    "compensate",
    "format",
    "type_coupling",
    *GATING,
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


def validated(kind: type[M], options: Mapping[str, object]) -> M:
    """Options that may be text, as from a command line, as a model; None is an option not given.

    Raises:
        LLMPruneError: a value that is not allowed.
    """
    try:
        return kind.model_validate({key: value for key, value in options.items() if value is not None})
    except ValidationError as error:
        raise LLMPruneError(sentence(error)) from error


def sentence(error: ValidationError, file: Path | None = None) -> str:
    """The first thing pydantic found, in one sentence."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, LLMPruneError):
        return str(cause)
    option = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        where = f" in {file}" if file else ""
        known: list[str] = list(Recipe.model_fields)
        if len(first["loc"]) > 1:
            known = list(OPTIONS[str(first["loc"][0])].model_fields)
        return f"Unknown option {option!r}{where}: known are {', '.join(known)}."
    return f"Option {option} is {first['input']!r}, but {first['msg'][0].lower()}{first['msg'][1:]}."
