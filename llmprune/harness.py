"""Everything that touches the lm-evaluation-harness: named suites, its tasks over local files, a model scored on a task.

A task is the harness's own: its prompts, metrics and version. Only where its documents come from may differ. A file
evals/tasks/TASK.yaml names the files that hold them in the schema of the Hub's data set; where `$LLMPRUNE_DATA/lm_eval/TASK`
has these files they are read, otherwise the Hub is asked.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal, TextIO
from unittest import mock

import yaml

from .corpus import hub_reachable
from .errors import LLMPruneError
from .gguf import quiet_transformers
from .progress import bar
from .scores import AGGREGATIONS, Documents, Scores

try:
    import lm_eval
    import lm_eval.tasks
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    raise LLMPruneError(
        f"Evaluation needs the lm-evaluation-harness, which is not installed ({error}): pip install 'llmprune[eval]'."
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUITES, TASKS = Path(__file__).parent / "suites", Path(__file__).parent / "tasks"
DATA = "LLMPRUNE_DATA"
# ((context, continuation), context's tokens, continuation's tokens)
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
# Token perplexity by llmprune's own protocol, asked for like a task.
PERPLEXITY = "perplexity"
HARNESS_TASKS = Path(lm_eval.tasks.__file__).parent


@dataclass(frozen=True)
class Suite:
    """Tasks under a name.

    Attributes:
        about: one line.
        limit: documents of each task; None for all.
        metric: the main metric of the tasks that have it.
    """

    about: str
    tasks: list[str]
    limit: int | None = None
    metric: str | None = None


def load_suite(name: str) -> Suite:
    """Read evals/suites/NAME.yaml.

    Raises:
        LLMPruneError: there is none of that name.
    """
    names = sorted(file.stem for file in SUITES.glob("*.yaml"))
    if name not in names:
        raise LLMPruneError(f"Unknown suite {name!r}: use {', '.join(names)}, or name tasks with --tasks.")
    return Suite(**yaml.safe_load((SUITES / f"{name}.yaml").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Seeds:
    """What the harness seeds; these are its own defaults."""

    random: int = 0
    numpy: int = 1234
    torch: int = 1234
    fewshot: int = 1234


@dataclass(frozen=True)
class LocalTask:
    """A task whose documents can come from files.

    Attributes:
        defined_in: the folder of the harness's tasks that defines it.
        splits: `validation` and `test` to the name of a file.
    """

    task: str
    defined_in: str
    splits: dict[str, str]

    def files(self) -> dict[str, Path]:
        """Where the files have to be, by split; empty without a data folder."""
        folder = os.environ.get(DATA)
        if not folder:
            return {}
        return {split: Path(folder).expanduser() / "lm_eval" / self.task / name for split, name in self.splits.items()}


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A task of the harness with its documents.

    Attributes:
        source: where the documents come from.
        sha256: of the file that is scored, or of the Hub's documents as JSON lines.
        examples_sha256: of the file that few-shot examples come from, where that is another local one.
    """

    name: str
    task: Task
    source: Literal["local", "hub"]
    sha256: str
    examples_sha256: str | None = None

    @property
    def scores_whole_texts(self) -> bool:
        return bool(self.task.OUTPUT_TYPE == "loglikelihood_rolling")


def local_tasks() -> dict[str, LocalTask]:
    """The tasks that can be read from files, by name."""
    read = (LocalTask(**yaml.safe_load(file.read_text(encoding="utf-8"))) for file in sorted(TASKS.glob("*.yaml")))
    return {local.task: local for local in read}


def load_tasks(names: Sequence[str]) -> list[LoadedTask]:
    """Find tasks and their documents. A group or tag of the harness stands for its tasks.

    Raises:
        LLMPruneError: an unknown task, data that is missing, empty or damaged, or a task that runs what the model writes.
    """
    local = local_tasks()
    wanted = list(dict.fromkeys(member for name in names for member in ([name] if name in local else _members(name))))
    obstacle = functools.cache(_hub_obstacle)
    loaded: list[LoadedTask] = []
    missing: dict[str, str] = {}
    for name in wanted:
        files = local[name].files() if name in local else {}
        absent = [str(file) for file in files.values() if not file.is_file()]
        if files and not absent:
            loaded.append(_load_local(local[name], files))
        elif reason := obstacle():
            missing[name] = reason
        else:
            try:
                loaded += _load_from_hub(name, local[name].defined_in if name in local else None)
            except Exception as error:  # the Hub's client, `datasets` and a task's own code each have a family of errors
                missing[name] = " ".join(str(error).split()) or type(error).__name__
    if missing:
        raise LLMPruneError(_missing(missing, [task.name for task in loaded], local))
    if unsafe := [task.name for task in loaded if getattr(task.task, "UNSAFE_CODE", False)]:
        raise LLMPruneError(
            f"{', '.join(unsafe)} would run code that the model writes, which llmprune does not: choose other tasks."
        )
    return loaded


def _missing(reasons: dict[str, str], rest: list[str], local: dict[str, LocalTask]) -> str:
    """The sentence on tasks without data."""
    folder = os.environ.get(DATA)
    if not folder:
        here = f"{DATA}, the folder of local data, is not set"
    else:
        absent = [str(file) for name in reasons if name in local for file in local[name].files().values() if not file.is_file()]
        here = f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing" if absent else f"{DATA} has no such task"
    others = f", or evaluate the rest: --tasks {','.join(rest)}" if rest else ""
    return (
        f"There is no data for {', '.join(reasons)}: {here}, and the Hub does not give it ({next(iter(reasons.values()))}); "
        f"put the files into {DATA}/lm_eval/TASK or go online{others}."
    )


def _hub_obstacle() -> str:
    """Why it is of no use to ask the Hub; empty where it may be."""
    from huggingface_hub import constants

    # Offline by wish, `datasets` reads its cache or fails at once; else it retries a deaf Hub for half a minute.
    return "" if constants.HF_HUB_OFFLINE or hub_reachable() else "it does not answer"


@functools.cache
def _defined(folder: str | None) -> TaskManager:
    """The harness's tasks of one folder, or all of them: reading those thousands of files takes seconds."""
    with _silence():
        return TaskManager(include_defaults=False, include_path=HARNESS_TASKS / folder) if folder else TaskManager()


def _members(name: str) -> list[str]:
    """A tag's tasks, or the one name given; a group's tasks come with the group."""
    manager = _defined(None)
    index = manager.task_index
    if name not in index:
        near = difflib.get_close_matches(name, [*local_tasks(), PERPLEXITY, *index], 3)
        hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "`lm-eval ls tasks` lists them."
        raise LLMPruneError(f"Unknown task {name!r}: neither the harness nor llmprune has one of that name; {hint}")
    return sorted(index[name].tags) if name in manager.all_tags else [name]


def _load_local(local: LocalTask, files: dict[str, Path]) -> LoadedTask:
    digests = {}
    for split, file in files.items():
        content = file.read_bytes()
        if not content.strip():
            raise LLMPruneError(f"{file} is empty: give a file with one document a line, or unset {DATA} to ask the Hub.")
        digests[split] = hashlib.sha256(content).hexdigest()
    override = {
        "task": local.task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
        "training_split": None,
        **{f"{split}_split": split if split in files else None for split in ("validation", "test")},
    }
    try:
        with _silence():
            # A task given by itself would lose what the harness says about it; a group's member is merged with that.
            task = _defined(local.defined_in).load([{"group": "local", "task": [override]}])["tasks"][local.task]
    except Exception as error:  # whatever a damaged line or a missing column sets off in datasets or in the task
        reason = " ".join(str(error.__cause__ or error).split())
        raise LLMPruneError(
            f"The files of {local.task} ({', '.join(map(str, files.values()))}) cannot be read ({reason}): write one JSON "
            "object a line, with the columns of the Hub's data set."
        ) from error
    scored = "test" if "test" in files else "validation"
    others = [digest for split, digest in digests.items() if split != scored]
    return LoadedTask(local.task, task, "local", digests[scored], *others)


def _load_from_hub(name: str, folder: str | None) -> list[LoadedTask]:
    with _silence():
        tasks = _defined(folder).load([name])["tasks"]
    loaded = []
    for member, task in tasks.items():
        digest = hashlib.sha256()
        for document in task.eval_docs:
            digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
        loaded.append(LoadedTask(member, task, "hub", digest.hexdigest()))
    return loaded


class _Model(HFLM):
    """A model in the harness's hands, with our progress bar in place of its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        label: str,
        terminal: TextIO,
        quiet: bool,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self._label, self._terminal, self._quiet = label, terminal, quiet
        self._advance: Callable[[str], None] = lambda name: None
        # What the harness calls after each finished request.
        self.set_cache_hook(SimpleNamespace(add_partial=self._count))

    def _count(self, kind: str, request: object, answer: object) -> None:
        if kind != "loglikelihood_rolling":  # whole texts are counted by window, below
            self._advance(kind)

    @contextmanager
    def _bar(self, total: int) -> Iterator[None]:
        # While the harness works, what it prints is swallowed; the bar is meant to be seen.
        with redirect_stderr(self._terminal), bar(self._label, total, quiet=self._quiet) as self._advance:
            yield

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._bar(len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = sum(-(-len(self.tok_encode(request.args[0])) // self.max_length) for request in requests)
        with self._bar(windows):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        with self._bar(len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        if override_bs is not None:  # windows of whole texts, for which the harness calls no hook
            for _ in answers:
                self._advance("window")
        return answers


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedTask,
    *,
    limit: int | None,
    fewshot: int | None,
    batch_size: int,
    seeds: Seeds,
    label: str = "",
    quiet: bool = False,
) -> Scores:
    """Score a model on one task, with `lm_eval.simple_evaluate`.

    Args:
        limit: documents from the first; None for all.
        fewshot: examples before each document; None for the task's own number.
        label: beside the progress bar.

    Raises:
        LLMPruneError: a perplexity that no float holds.
    """
    terminal = sys.stderr
    with _silence():
        harnessed = _Model(model, tokenizer, batch_size=batch_size, label=label, terminal=terminal, quiet=quiet)
        try:
            results = lm_eval.simple_evaluate(
                model=harnessed,
                tasks=[loaded.task],
                num_fewshot=fewshot,
                limit=limit,
                log_samples=True,
                task_manager=TaskManager(include_defaults=False),
                random_seed=seeds.random,
                numpy_random_seed=seeds.numpy,
                torch_random_seed=seeds.torch,
                fewshot_random_seed=seeds.fewshot,
            )
        except OverflowError as error:
            raise LLMPruneError(
                f"A perplexity of {loaded.name} is too large for a number: the model's logits overflow, try --dtype float32."
            ) from error
    name = loaded.task.task_name
    # A task may read its answers through several filters; the first is the one it is known by.
    first = results["samples"][name][0]["filter"]
    samples = [sample for sample in results["samples"][name] if sample["filter"] == first]
    identity = hashlib.sha256("".join(sample["doc_hash"] + sample["prompt_hash"] for sample in samples).encode())
    found = [(key.split(","), value) for key, value in results["results"][name].items() if key.endswith(f",{first}")]
    return Scores(
        samples=len(samples),
        fewshot=results["n-shot"][name],
        version=results["versions"][name],
        metrics={metric: None if value == "N/A" else float(value) for (metric, _), value in found},
        higher_is_better=results["higher_is_better"][name],
        documents={
            metric: _documents(aggregation.__name__, [sample[metric] for sample in samples])
            for metric, aggregation in loaded.task.aggregation().items()
            if aggregation.__name__ in AGGREGATIONS and all(metric in sample for sample in samples)
        },
        documents_sha256=identity.hexdigest(),
    )


def _documents(aggregation: str, items: list[float] | list[tuple[float, float]]) -> Documents:
    if isinstance(items[0], tuple):
        values, weights = zip(*items, strict=True)
        return Documents(aggregation, list(map(float, values)), list(map(float, weights)))
    return Documents(aggregation, list(map(float, items)))


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what the harness logs, prints and draws off the terminal; exceptions pass."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    # It would start git, whose complaint no redirection catches, and list the machine's packages after each task.
    about_machine = mock.patch.multiple(
        "lm_eval.evaluator", get_git_commit_hash=lambda: None, add_env_info=lambda storage: None
    )
    try:
        with quiet_transformers(), redirect_stdout(StringIO()), about_machine:
            yield
    finally:
        logger.setLevel(level)
