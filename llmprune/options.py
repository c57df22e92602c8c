"""What single methods can be told beside what every run can. Imports nothing slow, since `--help` shows it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import LLMPruneError

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]
# Options of the paper's own ordering and stopping rule.
_PAPER_ONLY = ("threshold", "threshold_tokens", "variance_power", "same_sign")


class DsnotOptions(BaseModel):
    """How DSnoT swaps kept and removed weights. The names in brackets are the published code's."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    accept: Literal["error", "always"] = Field(
        default="error", description="Swap only where it lowers the expected squared error, or always, in the paper's order."
    )
    cycles: int = Field(default=50, ge=0, description="Swaps per row at most [max_cycle_time].")
    skip: tuple[Role, ...] = Field(
        default=(), description="Roles that keep the mask they start with [skip_layer, skip_sub_layer]."
    )
    threshold: float = Field(
        default=0.1,
        ge=0,
        description="A row is left when its expected error is no larger; accept=always only [update_threshold].",
    )
    threshold_tokens: int = Field(
        default=2048, ge=1, description="Tokens that the threshold's error is summed over; accept=always only [seqlen]."
    )
    variance_power: float = Field(
        default=1.0, ge=0, description="Weights are grown by mean / variance^power; accept=always only [pow_of_var_regrowing]."
    )
    same_sign: bool = Field(
        default=False, description="A row is left before its error changes sign; accept=always only [not without_same_sign]."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.accept == "error":
            for name in _PAPER_ONLY:
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise LLMPruneError(
                        f"DSnoT's {name} is {value}, which means nothing with accept=error: give accept=always or leave it out."
                    )
        return self


class IcbsOptions(BaseModel):
    """How iCBS searches for a better mask. The names in brackets are the published code's."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    steps: int = Field(default=40, ge=1, le=30_000, description="Batches to learn from.")
    scope: Literal["model", "linear"] = Field(
        default="model", description="A step changes one block of weights in every linear at once, or in one linear."
    )
    batch_size: int = Field(
        default=16, ge=1, description="Calibration samples of a step; all that are not held out where those are fewer."
    )
    block_size: int | None = Field(
        default=None,
        ge=2,
        description="Weights of a linear that one step may change: 512, or a quarter of small linears [block_size].",
    )
    select: Literal["change", "gradient", "random"] = Field(
        default="change",
        description="Which weights: those whose change lowers the loss most to first order, with its sign, or by size alone "
        "[selection_method=gradient], or at random.",
    )
    target: Literal["text", "dense"] = Field(
        default="text", description="What the loss compares with: the next token, or what the dense model predicts."
    )
    fisher: Literal["token", "sequence"] = Field(
        default="token",
        description="Curvature from the gradients at single positions, or of whole sequences [gradient_per_sample].",
    )
    positions: int = Field(
        default=512, ge=1, description="Positions of a batch that the curvature is taken from; fisher=token only."
    )
    gamma: float = Field(
        default=0.1, gt=0, le=1, description="Weight of the gradient against the curvature, at first [grad_multiplier]."
    )
    adapt: bool = Field(
        default=True, description="Halve gamma after a step that was not accepted whole, raise it after others."
    )
    margin: float = Field(
        default=1.0, ge=0, description="Standard errors of a weight's gradient that a change of it has to be worth."
    )
    ridge: float = Field(
        default=0.0, ge=0, description="Cost of the squared distance that a step moves the weights [ridge_multiplier]."
    )
    solver: Literal["auto", "descent", "anneal"] = Field(default="descent", description="How a block is solved.")
    tabu: float = Field(
        default=0.4,
        ge=0,
        lt=1,
        description="Share of a linear's weights, the latest looked at, that are left alone [tabu_frac].",
    )
    fix_pruned: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the pruned weights, the lowest scores, that stay pruned [fix_frac_prune].",
    )
    fix_kept: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the kept weights, the highest scores, that stay kept [fix_frac_keep]."
    )
    holdout: int = Field(default=8, ge=2, description="Every so many-th calibration sample is held out of the batches.")
    accept: Literal["holdout", "batch", "none"] = Field(
        default="holdout", description="A step must lower the loss of the held-out samples, of its own batch, or nothing."
    )
    retries: int = Field(default=2, ge=0, description="How often a step that does not is tried again with its better half.")
    keep_best: bool = Field(default=True, description="End with the masks of the lowest held-out loss, not with the last.")
    save_every: int = Field(default=5, ge=1, description="Steps between two savings of the search's state.")


class SearchOptions(BaseModel):
    """How Týr, or `--allocation searched`, looks for the best distribution of a sparsity. In brackets the published values."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    iterations: int = Field(
        default=2, ge=0, le=8, description="Searches, each over levels half as far apart as the last one's; 0: uniform [4]."
    )
    interval: float = Field(default=0.125, gt=0, lt=1, description="Sparsity between two levels of the first search [0.125].")
    levels: int = Field(default=9, ge=3, description="Levels of each sub-layer, its present one in the middle [9].")
    generations: int = Field(default=6, ge=0, description="Generations of a search [50].")
    offspring: int = Field(default=12, ge=1, description="Candidates of a generation [128].")
    stages: tuple[tuple[int, int], ...] = Field(
        default=((4, 512), (1, 2048)),
        min_length=1,
        description="How many candidates survive on how many tokens, stage by stage [16 on 2048, 4 on 16384, 1 on 131072].",
    )
    top_k: int = Field(
        default=512, ge=1, description="Logits per token that the dense model's predictions are compared on; the rest is one."
    )
    accumulate: Literal["expectation", "uniform", "center", "none"] = Field(
        default="expectation",
        description="What later blocks see of earlier ones while levels are made: all levels weighted by density, or alike, "
        "the middle one, or the dense model.",
    )
    first_order: Literal["abs", "off", "signed"] = Field(
        default="off", description="How the gradient enters a unit's score: not at all, the paper's way, or its code's [abs]."
    )
    step: int = Field(default=16, ge=1, description="FFN channels removed between two updates of the others [16].")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.levels % 2 == 0:
            raise LLMPruneError(
                f"The search's levels are {self.levels}: give an odd number, the present level and as many each side."
            )
        if any(survivors < 1 or tokens < 1 for survivors, tokens in self.stages):
            raise LLMPruneError(f"The search's stages are {self.stages}: each needs at least one survivor and one token.")
        return self


# Named settings. "paper" is what was published: DSnoT's leave the MLP's masks as they are; iCBS's are those for a language
# model (Mistral-7B), but for the tabu list, which is by visit stamps here as well.
PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "dsnot": {"paper": {"accept": "always", "skip": ("gate", "up", "gate_up", "down")}},
    "icbs": {
        "paper": {
            "steps": 3000,
            "scope": "linear",
            "block_size": 4096,
            "select": "gradient",
            "fisher": "sequence",
            "gamma": 0.75,
            "adapt": False,
            "margin": 0.0,
            "ridge": 1e-3,
            "solver": "anneal",
            "fix_pruned": 0.42,
            "fix_kept": 0.35,
            "accept": "none",
            "keep_best": False,
        }
    },
    "search": {
        "smoke": {"iterations": 1, "generations": 2, "offspring": 4, "stages": ((2, 256), (1, 512))},
        "fast": {},
        "paper": {
            "iterations": 4,
            "generations": 50,
            "offspring": 128,
            "stages": ((16, 2048), (4, 16384), (1, 131072)),
            "top_k": 8192,
            "first_order": "abs",
        },
    },
}
