"""Several pruned models and their dense parents in one table.

    llmprune compare llama-wanda-0.5 llama-sparsegpt-0.5

A number that was measured in another way than the first of its column is marked, and a note says what differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .record import Record, Task, read
from .tables import count, size, weights_bytes

PERPLEXITY = "token perplexity"
MARKS = "abcdefghijklmnopqrstuvwxyz"
# What of an evaluation's protocol changes scores. Batch size and device do so by rounding only.
DECISIVE = ("lm_eval", "limit", "dtype", "seeds", "baseline")


@dataclass(frozen=True)
class Value:
    """A measured number, how it was measured, and, for a task, its difference to the dense model."""

    value: float
    protocol: Mapping[str, object]
    difference: float | None = None
    dense: float | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class Row:
    """One model. `method` is empty for a dense parent; `parent` is the fingerprint of the dense weights.

    `pattern` says what was removed, in zeros or in units; `nonzero` counts the parameters that are left.
    """

    name: str
    parent: str
    method: str
    pattern: str
    sparsity: float
    nonzero: int
    disk_bytes: int | None
    values: dict[str, Value] = field(default_factory=dict)
    structured: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Comparison:
    """Rows, each parent before its prunings.

    Attributes:
        columns: what was measured, in order.
        notes: what differs, by mark.
        marks: the mark of a (row, column) that was measured otherwise.
    """

    rows: list[Row]
    columns: list[str]
    notes: dict[str, str]
    marks: dict[tuple[int, str], str]


def compare(directories: Sequence[Path]) -> Comparison:
    """Read the records of finished output directories.

    Raises:
        LLMPruneError: one is not a finished result.
    """
    records = [(directory, read(directory)) for directory in directories]
    pruned: dict[str, list[Row]] = {}
    for directory, record in records:
        row = pruned_row(directory, record)
        pruned.setdefault(row.parent, []).append(row)
    first = {record.identity["model weights"]: record for _, record in reversed(records)}
    rows = [row for parent, group in pruned.items() for row in (_dense_row(first[parent], group), *group)]
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    # Perplexity stands first, whoever measured it.
    columns.sort(key=lambda column: column != PERPLEXITY)
    notes: dict[str, str] = {}
    marks = {}
    for column in columns:
        usual = next(row.values[column].protocol for row in rows if column in row.values)
        for number, row in enumerate(rows):
            if (found := row.values.get(column)) and (text := deviation(found.protocol, usual)):
                marks[number, column] = notes.setdefault(text, MARKS[len(notes) % len(MARKS)])
    return Comparison(rows, columns, {mark: text for text, mark in notes.items()}, marks)


def pruned_row(directory: Path, record: Record) -> Row:
    """What a record says, as a row."""
    values = {}
    if one := record.perplexity:
        protocol = {"text": one.text, "windows": one.protocol, "tokens": one.tokens_sha256[:12]}
        values[PERPLEXITY] = Value(one.pruned, protocol, dense=one.dense)
    elif record.evaluation and (other := record.evaluation.perplexity):
        protocol = {"text": other.text, "windows": other.protocol}
        if other.tokens_sha256:
            protocol["tokens"] = other.tokens_sha256[:12]
        values[PERPLEXITY] = Value(other.token, protocol, dense=other.dense)
    if record.evaluation:
        last = record.evaluation.protocol
        values |= {name: _task_value(task, task.protocol or last) for name, task in record.evaluation.tasks.items()}
    return Row(
        directory.resolve().name,
        record.identity["model weights"],
        record.method,
        record.what,
        record.gating.measured if record.gating else record.sparsity,
        record.parameters.left,
        weights_bytes(directory),
        values,
        record.structured,
        record.storage is not None,
    )


def _task_value(task: Task, measured: Mapping[str, object]) -> Value:
    protocol = {
        "metric": task.metric,
        "samples": task.samples,
        "few-shot": task.fewshot,
        "version": task.version,
        "data": task.data,
        **{key: measured.get(key) for key in DECISIVE},
    }
    if task.difference is None:
        del protocol["baseline"]
    return Value(
        task.value,
        protocol,
        task.difference.value if task.difference else None,
        task.dense.value if task.dense else None,
        task.higher_is_better,
    )


def _dense_row(record: Record, group: Sequence[Row]) -> Row:
    """The parent of a group, by what its prunings' records say of it."""
    values: dict[str, Value] = {}
    for row in group:
        for column, found in row.values.items():
            if found.dense is not None:
                values.setdefault(column, Value(found.dense, found.protocol))
    # Zeros take as much room as other weights.
    as_large = next((row.disk_bytes for row in group if not (row.structured or row.packed)), None)
    disk_bytes = as_large or record.parameters.dense_bytes
    return Row(record.model.name, group[0].parent, "", "", 0.0, record.parameters.total, disk_bytes, values)


def deviation(protocol: Mapping[str, object], usual: Mapping[str, object]) -> str:
    """What differs, in words; empty if nothing does."""
    keys = [key for key in protocol if key in usual and protocol[key] != usual[key]]
    return "; ".join(f"{key}: {_text(protocol[key])} instead of {_text(usual[key])}" for key in keys)


def _text(value: object) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def cell(comparison: Comparison, number: int, column: str) -> str:
    """A row's measured value as text: its difference in brackets, its mark behind."""
    found = comparison.rows[number].values.get(column)
    if found is None:
        return "–"
    text = f"{found.value:.3f}"
    if found.difference is not None:
        text += f" ({found.difference:+.3f})"
    mark = comparison.marks.get((number, column))
    return f"{text} [{mark}]" if mark else text


def header(comparison: Comparison) -> list[str]:
    return ["model", "method", "pattern", "sparsity", "non-zero", "on disk", *comparison.columns]


def cells(comparison: Comparison) -> list[list[str]]:
    """The table as text, without its header."""
    lines = []
    for number, row in enumerate(comparison.rows):
        disk = "–" if row.disk_bytes is None else size(row.disk_bytes)
        line = [row.name, row.method or "dense", row.pattern or "–", f"{row.sparsity:.2%}", count(row.nonzero), disk]
        lines.append(line + [cell(comparison, number, column) for column in comparison.columns])
    return lines


def show(comparison: Comparison) -> None:
    """The table in the terminal, a model a line or, where more was measured than there are models, a model a column."""
    lines = [header(comparison), *cells(comparison)]
    texts = 3
    if len(lines) < len(lines[0]):
        lines = list(map(list, zip(*lines, strict=True)))
        texts = 1
    drawn = Table()
    for number, name in enumerate(lines[0]):
        drawn.add_column(escape(name), justify="left" if number < texts else "right", overflow="fold")
    for line in lines[1:]:
        drawn.add_row(*map(escape, line))
    console = Console()
    if not console.is_terminal:
        console.width = 10_000  # a file has no edge to wrap at
    console.print(drawn)
    for note in notes(comparison):
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the table has to know."""
    lines = []
    if any(value.difference is not None for row in comparison.rows for value in row.values.values()):
        lines.append("In brackets: pruned minus dense.")
    if len({row.structured for row in comparison.rows if row.method}) > 1:
        lines.append("Sparsity is a share of what a method may remove: of all prunable weights, or of channels and heads.")
    return lines + [f"[{mark}] measured otherwise: {text}." for mark, text in comparison.notes.items()]


def as_json(comparison: Comparison) -> dict[str, object]:
    """The comparison for other programs; `note` of a value says what differs from the first of its column."""
    rows = []
    for number, row in enumerate(comparison.rows):
        values = {}
        for column, found in row.values.items():
            mark = comparison.marks.get((number, column))
            values[column] = {
                "value": found.value,
                "difference": found.difference,
                "protocol": found.protocol,
                "note": comparison.notes[mark] if mark else None,
            }
        rows.append(
            {
                "model": row.name,
                "parent": row.parent,
                "method": row.method or None,
                "pattern": row.pattern or None,
                "sparsity": row.sparsity,
                "nonzero_parameters": row.nonzero,
                "disk_bytes": row.disk_bytes,
                "values": values,
            }
        )
    return {"rows": rows}
