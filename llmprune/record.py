"""What a run's record (llmprune.json) says, with types, for those who show it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from pydantic import BaseModel, ValidationError

from .errors import LLMPruneError
from .output import RECORD
from .recipe import STRUCTURED
from .surgery import MODELING_FILE
from .verify import pruned_record, read_record

UNITS = {
    "ffn": "FFN channels",
    "heads": "attention heads",
    "experts": "experts",
    "expert_ffn": "experts' FFN channels",
}


class Linear(BaseModel):
    """One pruned matrix. `shape` is (outputs, inputs).

    Of a linear of an expert, `tokens` were routed to it, and `fallback` is the rule it was pruned by where those were too few.
    Errors are squared and relative to the squared output: of the result on the tokens that it was fitted to (`error`) and on
    samples held out of the fit (`fresh_error`), and there of the method's own mask (`start_fresh_error`). Of a gated linear
    `gate_measured` is the share of its inputs that a calibration token does without, `gate_error` what that costs, and
    `teal_error` what it would cost to drop as many by TEAL's score.
    """

    role: str
    shape: tuple[int, int]
    zeros: int
    expert: int | None = None
    tokens: int | None = None
    fallback: str | None = None
    outlier_ratio: float | None = None
    error: float | None = None
    fresh_error: float | None = None
    start_fresh_error: float | None = None
    rows_refused: int | None = None
    gate_measured: float | None = None
    gate_error: float | None = None
    teal_error: float | None = None

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def held_out_errors(self) -> tuple[float, float] | None:
        """Of the method's own mask and of the result."""
        if self.start_fresh_error is None or self.fresh_error is None:
            return None
        return self.start_fresh_error, self.fresh_error


class Experts(BaseModel):
    """What REAP saw of a block's experts, by their numbers in the dense model, and which it kept.

    `saliency` is the mean, over the tokens routed to an expert, of router weight times output norm.
    """

    kept: list[int]
    tokens: list[int]
    saliency: list[float]

    @property
    def removed(self) -> list[int]:
        return sorted(set(range(len(self.tokens))) - set(self.kept))

    @property
    def idle(self) -> list[int]:
        """Experts that no token was routed to."""
        return [expert for expert, tokens in enumerate(self.tokens) if not tokens]


class Block(BaseModel):
    """What was observed at a block's ends, and of its experts."""

    influence: float | None = None
    importance: float | None = None
    output_error: float | None = None
    experts: Experts | None = None


@dataclass(frozen=True)
class Errors:
    """Means over the linears that have them. `removed` is the share of its start's error that a linear lost."""

    fitted: float
    fresh: float | None = None
    start_fresh: float | None = None
    removed: float | None = None


class Rivals(BaseModel):
    """Divergence from the dense model's predictions on held-out samples: of where a search began, and of what it found."""

    before: float
    found: float


class Generation(BaseModel):
    """A generation of a search. Losses are on windows of its own and compare within it only."""

    children: int
    evaluated_tokens: int
    parent_loss: float | None = None
    best_loss: float | None = None


class Iteration(BaseModel):
    """One search for the distribution of sparsity; the better of its rivals went on."""

    held_out: Rivals
    generations: list[Generation]

    @property
    def after(self) -> float:
        return min(self.held_out.before, self.held_out.found)


class Step(BaseModel):
    """A step of iCBS's search; the first one is where it starts and proposes nothing.

    Attributes:
        held_out: loss after the step.
        predicted: change of the loss by the swaps that were kept, by the step's quadratic model.
    """

    step: int
    held_out: float
    proposed: int | None = None
    swaps: int | None = None
    predicted: float | None = None

    @property
    def outcome(self) -> Literal["kept", "kept in part", "undone", "nothing to swap"] | None:
        if self.proposed is None:
            return None
        if not self.proposed:
            return "nothing to swap"
        return "kept" if self.swaps == self.proposed else "kept in part" if self.swaps else "undone"


class Gating(BaseModel):
    """Activation sparsity: the share of the gated weights that a token does without.

    Attributes:
        sparsity: asked for.
        measured: over the calibration tokens.
        gated: weights that have a gate.
        bases: numbers that rotations of inputs read for every token.
        compared: mean error of every basis, where they were compared.
    """

    score: str
    share: bool
    allocation: str
    basis: str
    form: str
    sparsity: float
    measured: float
    gated: int
    bases: int = 0
    compared: dict[str, float] = {}

    @property
    def read(self) -> int:
        """Numbers of the gated linears that are read for a token."""
        return round((1 - self.measured) * self.gated) + self.bases


class Parameters(BaseModel):
    """Of the dense model `total`, `decoder` and `prunable`; removed, as zeros or with their rows and columns, `zero`.

    `stored` are in the result's files, and `dense_bytes` is what the dense model takes on the disk.
    """

    total: int
    decoder: int
    prunable: int
    zero: int
    stored: int | None = None
    dense_bytes: int | None = None

    @property
    def left(self) -> int:
        return self.total - self.zero


class Model(BaseModel):
    given: str
    name: str
    base_model: str | None = None


class Calibration(BaseModel):
    source: str
    sha256: str
    note: str


class Estimate(BaseModel):
    value: float
    stderr: float | None = None


class Difference(BaseModel):
    """Pruned minus dense, with a confidence interval."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


class Perplexity(BaseModel):
    """Measured by `prune --evaluate`."""

    dense: float
    pruned: float
    difference: Difference | None = None
    text: str
    protocol: str
    tokens_sha256: str


class Task(Estimate):
    """A task's score by its main metric."""

    metric: str
    samples: int | None = None
    fewshot: int | None = None
    version: str | int | float | None = None
    data: dict[str, object] | None = None
    higher_is_better: bool = True
    dense: Estimate | None = None
    difference: Difference | None = None
    protocol: dict[str, object] = {}


class TokenPerplexity(BaseModel):
    """Measured by `llmprune eval`."""

    text: str
    protocol: str
    tokens_sha256: str | None = None
    token: float
    dense: float | None = None
    difference: Difference | None = None


class Storage(BaseModel):
    """How `llmprune export` has packed the weights: `packed` matrices of them, and not the `dense` ones.

    `bytes` are in the files, `dense_bytes` would be if nothing were packed.
    """

    format: str
    bytes: int
    dense_bytes: int
    packed: int
    dense: list[str]

    @property
    def share(self) -> float:
        return self.bytes / self.dense_bytes


class HeldOut(BaseModel):
    before: float
    after: float


class Recovery(BaseModel):
    """What `llmprune recover` did after pruning."""

    held_out: HeldOut
    best_step: int
    train_tokens: int


class Evaluation(BaseModel):
    """Tasks of several evaluations may come together; `protocol` is the last one's, and each task has its own."""

    tasks: dict[str, Task] = {}
    perplexity: TokenPerplexity | None = None
    protocol: dict[str, object] = {}


class Record(BaseModel):
    """The parts of llmprune.json that are shown. What older versions did not write is None or empty."""

    model: Model
    recipe: dict[str, object]
    reasons: dict[str, str] = {}
    warnings: list[str] = []
    versions: dict[str, str]
    identity: dict[str, str]
    calibration: Calibration | None = None
    sparsity: float
    coverage: float
    parameters: Parameters
    linears: dict[str, Linear]
    clock_seconds: dict[str, float]
    seconds: float
    peak_rss_bytes: int
    peak_gpu_bytes: int | None = None
    perplexity: Perplexity | None = None
    evaluation: Evaluation | None = None
    blocks: list[Block] = []
    search: list[Step] = []
    evolution: list[Iteration] = []
    kept: dict[str, list[int]] = {}
    dense_widths: dict[str, int | list[int]] = {}
    recovery: Recovery | None = None
    gating: Gating | None = None
    storage: Storage | None = None
    copied: dict[str, str] = {}

    @property
    def method(self) -> str:
        return str(self.recipe["method"])

    @property
    def pattern(self) -> str:
        return str(self.recipe["pattern"])

    @property
    def structured(self) -> bool:
        """Whether whole channels or heads were removed."""
        return self.method in STRUCTURED

    @property
    def format(self) -> str:
        """How a structured result lies on the disk: `auto` (smaller), `padded` or `masked`."""
        return str(self.recipe.get("format", "auto"))

    @property
    def needs_code(self) -> bool:
        """Whether stock transformers has no class for the model, and one of llmprune's lies beside it."""
        return MODELING_FILE in self.copied

    @property
    def what(self) -> str:
        """What was removed, as a table has it: a pattern of zeros, or the units that went."""
        if self.gating:
            return "inputs" if self.gating.form == "sidecar" else "inputs, folded"
        if not self.structured:
            return self.pattern
        units = ", ".join(UNITS[key].split()[-1] for key in self.kept) or "nothing"
        return units if self.format == "auto" else f"{units}, {self.format}"

    @property
    def units(self) -> dict[str, tuple[int, int]]:
        """How many units of each kind the dense model has, and how many are left, in all blocks."""
        found = {}
        for key, kept_B in self.kept.items():
            dense = self.dense_widths.get(key, 0)
            whole = sum(dense) if isinstance(dense, list) else dense * len(kept_B)
            found[UNITS.get(key, key)] = (whole, sum(kept_B))
        return found

    @property
    def errors(self) -> Errors | None:
        """What fitting layer by layer came to, or None where nothing was measured."""
        fitted = [linear.error for linear in self.linears.values() if linear.error is not None]
        fresh = [errors for linear in self.linears.values() if (errors := linear.held_out_errors)]
        if not fitted:
            return None
        if not fresh:
            return Errors(fmean(fitted))
        # A start without error has none to lose.
        removed = fmean(1 - end / start if start else 0.0 for start, end in fresh)
        return Errors(fmean(fitted), fmean(end for _, end in fresh), fmean(start for start, _ in fresh), removed)

    @property
    def found(self) -> float:
        """The held-out loss of the masks that the search ended with."""
        options = self.recipe["icbs"]
        assert isinstance(options, dict)
        return min(step.held_out for step in self.search) if options["keep_best"] else self.search[-1].held_out


def read(directory: Path) -> Record:
    """The record of a finished output directory.

    Raises:
        LLMPruneError: there is none, it is damaged, the run is not finished, or nothing was pruned.
    """
    return _read(directory, pruned_record(directory))


def _read(directory: Path, content: dict[str, object]) -> Record:
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise LLMPruneError(f"{directory / RECORD} is damaged ({place}: {first['msg']}): prune again.") from error


def find(directory: Path) -> Record | None:
    """The record of a model directory, if it is one of a pruned model. Raises `LLMPruneError` if it is damaged."""
    content = read_record(directory) if (directory / RECORD).is_file() else {}
    return _read(directory, content) if "recipe" in content else None
