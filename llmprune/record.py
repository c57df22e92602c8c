"""What a run's record (llmprune.json) says, with types, for those who show it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from .errors import LLMPruneError
from .output import RECORD
from .verify import read_record


class Linear(BaseModel):
    """One pruned matrix. `shape` is (outputs, inputs)."""

    role: str
    shape: tuple[int, int]
    zeros: int
    outlier_ratio: float | None = None

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


class Block(BaseModel):
    """What was observed at a block's ends."""

    influence: float | None = None
    output_error: float | None = None


class Parameters(BaseModel):
    total: int
    decoder: int
    prunable: int
    zero: int


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
    kept: dict[str, list[int]] = {}
    dense_widths: dict[str, int | list[int]] = {}

    @property
    def method(self) -> str:
        return str(self.recipe["method"])

    @property
    def pattern(self) -> str:
        return str(self.recipe["pattern"])


def read(directory: Path) -> Record:
    """The record of a finished output directory.

    Raises:
        LLMPruneError: there is none, it is damaged, or the run is not finished.
    """
    try:
        return Record.model_validate(read_record(directory))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise LLMPruneError(f"{directory / RECORD} is damaged ({place}: {first['msg']}): prune again.") from error
