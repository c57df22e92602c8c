"""The model card: README.md of an output directory, with metadata that the Hub reads, and scores as `.eval_results/*.yaml`.

    python -c "from llmprune import card; from pathlib import Path; card.write(Path('llama-wanda-0.5'))"

A card is a function of the run's record and of nothing else, so it can be written again whenever the record has grown.

Scores are written twice. `model-index`, in the card's metadata, is what the Hub's model pages showed first. `.eval_results`
is its successor (https://huggingface.co/docs/hub/eval-results; format: huggingface_hub's `_eval_results.py` and
https://github.com/huggingface/hub-docs/blob/main/eval_results.yaml): one list of entries a file, each with the id of a
benchmark data set on the Hub, a task of that benchmark, a value and notes. The Hub shows those whose data set is registered
as a benchmark; the name of a task in a registration is its owner's choice, and the harness' name stands for it here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.repocard import metadata_load

from . import corpus, methods
from .checkpoint import write_text
from .errors import LLMPruneError
from .output import RECIPE
from .recipe import parse_nm
from .record import Difference, Estimate, Record, Task, read
from .tables import SIMULATED, budget, count, size, use_of, weights_bytes
from .verify import read_record
from .vision_language import auto_name

CARD = "README.md"
RESULTS = ".eval_results"
# Says that a card is ours to write again.
MARKER = "<!-- llmprune writes this card from llmprune.json; take this line out to keep your own edits. -->"
# What a pruned model has in common with the model it was made from.
INHERITED = ("license", "license_name", "license_link", "language")
# The Hub data set, configuration and split that the harness' tasks read, also where the documents come from local files.
TASK_DATA: dict[str, tuple[str, str | None, str]] = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "copa": ("aps/super_glue", "copa", "validation"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "piqa": ("baber/piqa", None, "validation"),
    "rte": ("nyu-mll/glue", "rte", "validation"),
    "sciq": ("allenai/sciq", None, "test"),
    "wikitext": ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
}


def write(directory: Path, name: str | None = None) -> None:
    """Write the card and the scores of a finished output directory; a README.md that is not ours stays as it is.

    Args:
        directory: what `prune` wrote.
        name: what the model is called, its id on the Hub if it has one; by default the directory's name.

    Raises:
        LLMPruneError: the directory is not a finished result of llmprune, or cannot be written to.
    """
    record = read(directory)
    # `Record` does not name them: a card passes them on and does not look inside.
    terms = {key: value for key, value in read_record(directory)["model"].items() if key in INHERITED}
    try:
        readme = directory / CARD
        if is_ours(readme):
            write_text(readme, render(directory, record, terms, name or directory.resolve().name))
        _write_results(directory / RESULTS, dict(_result_files(record)))
    except OSError as error:
        raise LLMPruneError(
            f"The model card in {directory} could not be written ({error}): the model itself is finished; make room or mend "
            "the rights, then give the same command again."
        ) from error


def is_ours(readme: Path) -> bool:
    """Whether a card may be written there."""
    return not readme.exists() or MARKER.encode() in readme.read_bytes()


def _write_results(folder: Path, files: dict[str, str]) -> None:
    """Write the files of scores, and remove ours that no longer hold."""
    for stale in folder.glob("llmprune-*.yaml"):
        if stale.name not in files:
            stale.unlink()
    for file, text in files.items():
        folder.mkdir(exist_ok=True)
        write_text(folder / file, text)


def inherited(directory: Path, base_model: str | None) -> dict[str, object]:
    """What a pruned model's record keeps of its source's card: the base model's Hub id, licence and language.

    Args:
        directory: the model that is pruned; its README.md is the Hub's card, or what was taken from a GGUF header.
        base_model: its Hub id where that is known; otherwise the one its card names.
    """
    try:
        found = metadata_load(directory / CARD) if (directory / CARD).is_file() else None
    # A card that somebody else broke must not end a run: what it would have said is unknown.
    except (ValueError, yaml.YAMLError):
        found = None
    found = found or {}
    if base_model is None and isinstance(found.get("base_model"), str):
        base_model = found["base_model"]
    return {"base_model": base_model, **{key: found[key] for key in INHERITED if key in found}}


def render(directory: Path, record: Record, terms: dict[str, object], name: str) -> str:
    """The card's text: metadata, then Markdown. `terms` are the base model's licence and language, as far as known."""
    base_model = record.model.base_model
    used = _hub_dataset(record.calibration.source) if record.calibration else None
    results = list(_index_entries(record))
    auto = auto_name(directory)
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if auto == "AutoModelForImageTextToText" else "text-generation",
        tags=["llmprune", "pruned", *_kind(record)],
        datasets=[used] if used else None,
        # It is the model-index that has a name.
        model_name=name if results else None,
        eval_results=results or None,
        # The Hub knows adapter, merge, quantized and finetune (https://huggingface.co/docs/hub/model-cards): new weights for
        # the same architecture, were it of other widths, are a finetune, and left to itself it guesses from file names.
        base_model_relation="finetune" if base_model else None,
    )
    for key, value in terms.items():
        data[key] = value
    protocol = record.evaluation.protocol if record.evaluation else {}
    text = _template().render(
        metadata=data.to_yaml(),
        marker=MARKER,
        name=name,
        record=record,
        method=methods.summary(record.method),
        license=terms.get("license_name") or terms.get("license"),
        auto=auto,
        license_files=sorted(file.name for file in directory.glob("LICENSE*")),
        disk_bytes=weights_bytes(directory),
        scores=list(_scores(record)),
        protocol={key: value for key, value in protocol.items() if isinstance(value, str | int | float)},
        recipe=(directory / RECIPE).read_text(encoding="utf-8").strip(),
        use=use_of(record),
        simulated=SIMULATED,
    )
    return str(ModelCard(text))


def _kind(record: Record) -> list[str]:
    """Tags that say what was done: nothing is sparse where whole channels or heads are gone."""
    if record.gating:
        return ["activation-sparsity", record.method]
    if record.structured:
        return ["structured-pruning", record.method]
    return ["sparse", record.method, *([record.pattern] if parse_nm(record.pattern) else [])]


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmprune"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": escape, "fenced": fenced, "count": count, "size": size, "budget": budget}
    return environment.get_template("card.md.j2")


def escape(value: object) -> str:
    """Text as Markdown that shows it as it is, in a sentence or a table's cell."""
    text = " ".join(str(value).split())
    # An escaped backslash before a bracket would open a formula on the Hub.
    text = text.replace("&", "&amp;").replace("\\", "&#92;")
    return re.sub(r"([`*_\[\]<>|~$])", r"\\\1", text)


def fenced(text: str, language: str = "") -> str:
    """A code block that its content cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _hub_dataset(resolved: str) -> str | None:
    """The id of a data set on the Hub, from the name that `corpus` gave it; None for a file."""
    for alias, uses in corpus.ALIASES.items():
        if resolved.startswith(f"{alias} ("):
            return next(iter(uses.values())).path
    # The name of a data set ends in a split, that of a file in a suffix.
    found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(, [^,]+)*, [^,./]+", resolved)
    return found[1] if found else None


def _scores(record: Record) -> Iterator[tuple[str, str, str, str]]:
    """Rows of the table before and after: what was measured, dense, pruned, difference."""
    if text := record.perplexity:
        change = _change(text.difference, 3) or f"{text.pruned - text.dense:+.3f}"
        yield "token perplexity", f"{text.dense:.3f}", f"{text.pruned:.3f}", change
    if record.evaluation is None:
        return
    if measured := record.evaluation.perplexity:
        dense = "" if measured.dense is None else f"{measured.dense:.3f}"
        yield "token perplexity (`llmprune eval`)", dense, f"{measured.token:.3f}", _change(measured.difference, 3)
    for name, task in record.evaluation.tasks.items():
        change = _change(task.difference, 4)
        yield f"{escape(name)}: {escape(_setup(task))}", _estimate(task.dense), _estimate(task), change


def _change(between: Difference | None, digits: int) -> str:
    if between is None:
        return ""
    value, low, high = (f"{number:+.{digits}f}" for number in (between.value, between.low, between.high))
    return f"{value} ({between.confidence:.0%}: {low} to {high})"


def _estimate(score: Estimate | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _setup(task: Task) -> str:
    """How a task's score came about, in a few words."""
    parts = [task.metric]
    if task.fewshot is not None:
        parts.append(f"{task.fewshot}-shot")
    if task.samples is not None:
        parts.append(f"{task.samples} documents")
    if task.version is not None:
        parts.append(f"task version {task.version}")
    return ", ".join(parts)


def _index_entries(record: Record) -> Iterator[EvalResult]:
    """The entries of `model-index`. A value that is not a number is left to the table."""
    measured = []
    if during := record.perplexity:
        measured.append((during.text, during.protocol, during.pruned))
    if record.evaluation and (later := record.evaluation.perplexity):
        measured.append((later.text, later.protocol, later.token))
    for text, protocol, value in measured:
        if math.isfinite(value):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=_hub_dataset(text) or Path(text).name,
                dataset_name=text if _hub_dataset(text) else Path(text).name,
                metric_type="perplexity",
                metric_name=protocol,
                metric_value=value,
            )
    for name, task in _tasks(record).items():
        dataset, config, split = TASK_DATA.get(name, (name, None, None))
        yield EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=name,
            dataset_config=config,
            dataset_split=split,
            metric_type=task.metric,
            metric_name=_setup(task),
            metric_value=task.value,
        )


def _result_files(record: Record) -> Iterator[tuple[str, str]]:
    """Name and content of an `.eval_results` file for every task that was scored whole and whose data set is on the Hub."""
    for name, task in _tasks(record).items():
        assert record.evaluation
        protocol = task.protocol or record.evaluation.protocol
        # The Hub ranks these beside whole ones: a score on the first 200 documents is none of them.
        if name not in TASK_DATA or protocol.get("limit"):
            continue
        harness = protocol.get("lm_eval")
        notes = f"lm-eval {harness}, {_setup(task)}" if harness else _setup(task)
        if task.stderr is not None:
            notes += f", standard error {task.stderr:.4f}"
        entry = EvalResultEntry(dataset_id=TASK_DATA[name][0], task_id=name, value=task.value, notes=notes)
        yield f"llmprune-{name}.yaml", yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)


def _tasks(record: Record) -> dict[str, Task]:
    tasks = record.evaluation.tasks if record.evaluation else {}
    return {name: task for name, task in tasks.items() if math.isfinite(task.value)}
