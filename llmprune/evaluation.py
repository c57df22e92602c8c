"""`llmprune eval`: a model's scores on tasks, beside its dense parent's, as a record that others can check.

    evaluate(Request(model="llama-sparse", baseline="llama", suite="quick"), say=print, quiet=False)

Every finished task is kept in the cache under everything that decides its outcome, so that an interrupted evaluation goes
on where it was, and a dense model is evaluated once for all that is pruned from it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field

from . import __version__, calibration, card
from .calibration import TokenSet
from .checkpoint import Checkpoint, write_text
from .errors import LLMPruneError
from .harness import DATA, PERPLEXITY, LoadedTask, Seeds, Suite, load_suite, load_tasks, score
from .loading import check_model, load
from .models import Skeleton, load_tokenizer, resolve
from .output import RECORD, held, write_record
from .perplexity import check_unchanged, described, gates_of, identity, measure, numerics
from .pruning import CPU_WINDOWS, Say
from .recipe import Dtype, from_options, validated
from .record import find
from .scores import Scores, difference, keep, kept
from .settings import CPU_SEQLEN, PAPER_SEQLEN, choose_device
from .verify import read_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_SUITE = "quick"
BATCH_SIZE = 8
# Two tokenizers that agree on this and on their vocabularies cut texts alike.
PROBE = "The quick brown fox — 12,345 jumps; naïve café! \n\tdef f(x): return x**2"


class Request(BaseModel):
    """What to evaluate. None means: the default, which the record states."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    baseline: str | None = None
    tasks: str | None = None
    suite: str | None = None
    limit: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    fewshot: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=0, lt=2**32)
    device: str | None = None
    dtype: Dtype | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    output: Path | None = None


def request(**options: object) -> Request:
    """Options that may be text, as from a command line.

    Raises:
        LLMPruneError: a value that is not allowed.
    """
    return validated(Request, options)


@dataclass(frozen=True, eq=False)
class Side:
    """A model being evaluated. `identity` changes with its weights, configuration or tokenizer."""

    name: str
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    stored: torch.dtype
    identity: str


@dataclass(frozen=True)
class Protocol:
    """How scores were measured."""

    lm_eval: str
    transformers: str
    torch: str
    llmprune: str
    limit: int | None
    batch_size: int
    dtype: str
    device: str
    seeds: Seeds
    suite: str | None
    baseline: str | None


def evaluate(request: Request, *, say: Say, quiet: bool) -> dict[str, dict[str, object]]:
    """Evaluate a model, write its record, and return what was measured (`evaluation` in llmprune.json).

    Args:
        say: gets a line at a time for people.
        quiet: hide progress bars.

    Raises:
        LLMPruneError: bad input. Finished tasks are kept.
    """
    suite, names = _chosen(request)
    if request.output:
        _check_output(request.output)
    device, _ = choose_device(from_options({"model": request.model, "device": request.device}))
    side = _open(request.model, request.revision, request, say)
    baseline = _open(request.baseline, None, request, say) if request.baseline else None
    if baseline:
        _check_same_tokens(side, baseline)
        _warn_of_other_parent(side, baseline, request, say)
    tasks = load_tasks([name for name in names if name != PERPLEXITY])
    for warning in _warnings(tasks, request):
        say(f"warning: {warning}.")
    protocol = Protocol(
        **{package: version(package) for package in ("lm_eval", "transformers", "torch")},
        llmprune=__version__,
        limit=request.limit or suite.limit,
        batch_size=request.batch_size or BATCH_SIZE,
        dtype=request.dtype or ("float32" if device == "cpu" else str(side.stored).removeprefix("torch.")),
        device=device,
        seeds=Seeds() if request.seed is None else Seeds(*[request.seed] * 4),
        suite=None if request.tasks else request.suite or DEFAULT_SUITE,
        baseline=request.baseline,
    )
    run = _Run(request, protocol, say, quiet)
    text = run.text(side) if PERPLEXITY in names else None
    found = run.scores(side, tasks)
    dense = run.scores(baseline, tasks) if baseline else {}
    entries: dict[str, object] = {
        task.name: _entry(task, suite.metric, found[task.name], dense.get(task.name), run.settled(task)) for task in tasks
    }
    evaluation = {"tasks": entries, "protocol": asdict(protocol)}
    if text:
        ours = run.perplexity(side, text)
        theirs = run.perplexity(baseline, text) if baseline else None
        evaluation["perplexity"] = {
            **described(text),
            "windows": len(text.ids_NT),
            "token": ours.metrics["perplexity"],
            "dense": theirs.metrics["perplexity"] if theirs else None,
            "difference": _difference("perplexity", ours, theirs, protocol.seeds),
        }
    _write(evaluation, request, side)
    return evaluation


# Before anything runs.


def _chosen(request: Request) -> tuple[Suite, list[str]]:
    """The suite, an unnamed one for tasks given by name, and the tasks."""
    if request.tasks is None:
        suite = load_suite(request.suite or DEFAULT_SUITE)
        return suite, suite.tasks
    if request.suite:
        raise LLMPruneError(f"Both --tasks {request.tasks} and --suite {request.suite} were given: give one of them.")
    names = [name.strip() for name in request.tasks.split(",") if name.strip()]
    if not names:
        raise LLMPruneError("--tasks names no task: give names separated by commas, such as arc_easy,piqa.")
    return Suite("", names), names


def _check_output(file: Path) -> None:
    if file.is_dir() or not os.access(file.absolute().parent, os.W_OK | os.X_OK):
        raise LLMPruneError(f"--output {file} cannot be written: give a file in a folder that exists and where you may write.")


def _open(model: str, revision: str | None, request: Request, say: Say) -> Side:
    """Find a model and check all that needs no weights."""
    source = resolve(model, revision=revision, say=say)
    checkpoint = check_model(source.directory, trust_remote_code=request.trust_remote_code)
    tokenizer = load_tokenizer(source.directory, trust_remote_code=request.trust_remote_code)
    if tokenizer is None:
        raise LLMPruneError(
            f"{source.directory} has no tokenizer, which tasks of text need: copy the files of its tokenizer there."
        )
    stored = next(entry.dtype for entry in checkpoint.entries.values() if entry.dtype.is_floating_point)
    return Side(source.name, checkpoint, tokenizer, stored, identity(checkpoint))


def _check_same_tokens(side: Side, baseline: Side) -> None:
    one, other = side.tokenizer, baseline.tokenizer
    if one.get_vocab() != other.get_vocab() or one(PROBE).input_ids != other(PROBE).input_ids:
        raise LLMPruneError(
            f"--baseline {baseline.name} cuts text into other tokens than {side.name} ({len(other)} and {len(one)} in their "
            "vocabularies): give the dense model that it was pruned from."
        )


def _warn_of_other_parent(side: Side, baseline: Side, request: Request, say: Say) -> None:
    """The record will call the baseline dense."""
    directory = side.checkpoint.directory
    if (directory / RECORD).is_file():
        parent = read_record(directory)["identity"]["model weights"]
        if not baseline.checkpoint.fingerprint().startswith(parent):
            say(f"warning: --baseline {request.baseline} is not the model that {side.name} was pruned from.")


def _warnings(tasks: Sequence[LoadedTask], request: Request) -> list[str]:
    """What becomes of --fewshot where it does not mean what it says."""
    if not request.fewshot:
        return []
    fixed = [task.name for task in tasks if task.task.get_config("num_fewshot") == 0]
    local = [task.name for task in tasks if task.source == "local" and task.name not in fixed]
    warnings = []
    if fixed:
        warnings.append(f"--fewshot does not change {', '.join(fixed)}, which the harness defines without examples")
    if local:
        warnings.append(
            f"the examples for {', '.join(local)} come from local files, which hold no training split: on the Hub's data the "
            "scores would be others"
        )
    return warnings


# Scores.


@dataclass(frozen=True)
class _Run:
    """Scoring of models by one protocol. What was scored before comes from the cache."""

    request: Request
    protocol: Protocol
    say: Say
    quiet: bool

    def settled(self, task: LoadedTask) -> Protocol:
        """The protocol of one task: whole texts go one at a time unless asked otherwise, or their logits would fill memory."""
        alone = task.scores_whole_texts and self.request.batch_size is None
        return replace(self.protocol, batch_size=1) if alone else self.protocol

    def scores(self, side: Side, tasks: Sequence[LoadedTask]) -> dict[str, Scores]:
        """A model's scores on every task."""
        keys = {task.name: self._key(side, task) for task in tasks}
        found = {name: scores for name, key in keys.items() if (scores := kept(key))}
        if found:
            self.say(f"{side.name}: {', '.join(found)} read from the cache, evaluated before.")
        model: PreTrainedModel | None = None
        for number, task in enumerate(tasks, 1):
            if task.name in found:
                continue
            model = model or load(
                side.checkpoint.directory,
                device=self.protocol.device,
                dtype=self.protocol.dtype,
                trust_remote_code=self.request.trust_remote_code,
                gated=False,
            )
            with gates_of(side.checkpoint.directory, model):
                scores = score(
                    model,
                    side.tokenizer,
                    task,
                    limit=self.protocol.limit,
                    fewshot=self.request.fewshot,
                    batch_size=self.settled(task).batch_size,
                    seeds=self.protocol.seeds,
                    label=f"{side.name}, {task.name}, task {number} of {len(tasks)}",
                    quiet=self.quiet,
                )
            _check_finite(side, task, scores)
            check_unchanged(side.checkpoint, side.identity)
            keep(keys[task.name], scores)
            found[task.name] = scores
            metric = scores.main_metric()
            self.say(f"{side.name}: {task.name}, {metric} {scores.metrics[metric]:.4f} on {scores.samples} documents.")
        return found

    def text(self, side: Side) -> TokenSet:
        """wikitext-2 test, from the data folder where it is there, in the papers' windows; on a CPU shorter and fewer."""
        file = Path(os.environ.get(DATA, "")).expanduser() / "wikitext-2-raw-v1" / "test.parquet"
        skeleton = self._skeleton(side)
        longest, windows = (PAPER_SEQLEN, None) if skeleton.device.type == "cuda" else (CPU_SEQLEN, CPU_WINDOWS)
        return calibration.evaluation_set(
            str(file) if file.is_file() else "wikitext2",
            side.tokenizer,
            seqlen=min(skeleton.max_tokens or longest, longest),
            windows=self.protocol.limit or windows,
            vocab_size=skeleton.vocab_size,
        )

    def perplexity(self, side: Side, text: TokenSet) -> Scores:
        """Streamed block by block, so that the model need not fit in memory."""
        return measure(self._skeleton(side), text, label=side.name, quiet=self.quiet)

    def _skeleton(self, side: Side) -> Skeleton:
        return Skeleton(
            side.checkpoint.directory,
            dtype=getattr(torch, self.protocol.dtype),
            device=self.protocol.device,
            trust_remote_code=self.request.trust_remote_code,
        )

    def _key(self, side: Side, task: LoadedTask) -> dict[str, object]:
        """Everything that decides a task's outcome."""
        return {
            "model": side.identity,
            "task": task.name,
            "version": task.task.VERSION,
            "data": [task.source, task.sha256, task.examples_sha256],
            "limit": self.protocol.limit,
            "fewshot": self.request.fewshot,
            "batch_size": self.settled(task).batch_size,
            "seeds": asdict(self.protocol.seeds),
            "lm_eval": self.protocol.lm_eval,
            **numerics(getattr(torch, self.protocol.dtype), torch.device(self.protocol.device)),
        }


def _check_finite(side: Side, task: LoadedTask, scores: Scores) -> None:
    for metric, value in scores.metrics.items():
        if value is not None and not math.isfinite(value):
            raise LLMPruneError(
                f"{side.name} scores {value} in {metric} of {task.name}: its logits overflow or its weights are damaged; try "
                "--dtype float32, or `llmprune verify`."
            )


def _entry(task: LoadedTask, wanted: str | None, scores: Scores, dense: Scores | None, protocol: Protocol) -> dict[str, object]:
    """A task as llmprune.json has it."""
    metric = scores.main_metric(wanted)
    return {
        "metric": metric,
        "value": scores.metrics[metric],
        "stderr": scores.stderr(metric),
        "samples": scores.samples,
        "fewshot": scores.fewshot,
        "version": scores.version,
        "data": {"source": task.source, "sha256": task.sha256},
        "metrics": scores.metrics,
        "higher_is_better": scores.higher_is_better[metric],
        "dense": {"value": dense.metrics[metric], "stderr": dense.stderr(metric)} if dense else None,
        "difference": _difference(metric, scores, dense, protocol.seeds),
        # Its own, because tasks of several evaluations come together in one record.
        "protocol": asdict(protocol),
    }


def _difference(metric: str, scores: Scores, dense: Scores | None, seeds: Seeds) -> dict[str, object] | None:
    if dense is None or metric not in scores.documents:
        return None
    assert scores.documents_sha256 == dense.documents_sha256, "a pair is scored on the same documents"
    return asdict(difference(scores.documents[metric], dense.documents[metric], seed=seeds.random))


# The record.


def _write(evaluation: dict[str, dict[str, object]], request: Request, side: Side) -> None:
    """Write the scores to --output, and into the record and the card if the model is a directory that llmprune wrote."""
    try:
        if request.output:
            write_text(request.output, json.dumps({"model": request.model, "evaluation": evaluation}, indent=2) + "\n")
        directory = side.checkpoint.directory
        # Not into a copy in some cache.
        if Path(request.model).expanduser().is_dir() and find(directory):
            with held(directory):
                check_unchanged(side.checkpoint, side.identity)
                record = read_record(directory)
                earlier = record.get("evaluation", {})
                tasks = {**earlier.get("tasks", {}), **evaluation["tasks"]}
                record["evaluation"] = {**earlier, **evaluation, "tasks": tasks}
                write_record(directory, record)
                card.write(directory)
    except OSError as error:
        raise LLMPruneError(
            f"The scores could not be written ({error}): make room or mend the rights, then give the same command again; "
            "finished tasks are kept."
        ) from error
