"""The page of a pruned model: one HTML file that needs nothing else, and its pictures as PNG files.

    llmprune report llama-sparse

The same record gives the same bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from . import pictures
from .compare import DECISIVE, deviation
from .errors import LLMPruneError
from .output import REPORT
from .pictures import Picture, render
from .record import Evaluation, Record, Task, read
from .statistics import SplitHessian
from .tables import SIMULATED, count, size, use_of, weights_bytes
from .verify import block_of

# All that a page may hold: an earlier page's are removed.
PICTURES = ("perplexity", "tasks", "sparsity", "kept", "blocks", "outliers", "search", "errors", "parameters", "time")
# Sparsities that differ by less are one number: rounding to whole weights, not a decision.
SAME = 0.005
# What a run's clock measures; the rest of its time passes before the first block and after the last.
CLOCK = {
    "capture": "embedding the calibration set",
    "observe": "forwards that observe",
    "decide": "choosing weights",
    "advance": "forwards of pruned blocks",
    "read_wait": "waiting for the disk to read",
    "write_wait": "waiting for the disk to write",
}
KEPT = {
    "ffn": "feed-forward width kept",
    "heads": "attention heads kept",
    "experts": "experts kept",
    "expert_ffn": "experts' channels kept",
}

# What iCBS's `accept` asks of a step.
JUDGED = {
    "holdout": "A step that does not lower it is undone, or kept in part.",
    "batch": "A step that does not lower the loss of its own batch is undone, or kept in part.",
    "none": "Every step is kept.",
}


def write_report(directory: Path, file: Path | None = None) -> Path:
    """Write the page of a finished output directory, and its pictures into the folder of the page's name.

    Args:
        directory: what `llmprune prune` wrote.
        file: the page; by default `report.html` in the directory.

    Returns:
        The page.

    Raises:
        LLMPruneError: the directory is not a finished result, or the page cannot be written.
    """
    html, drawn = page(read(directory), weights_bytes(directory))
    return write_page(html, drawn, file or directory / REPORT)


def write_page(html: str, drawn: Sequence[Picture], file: Path) -> Path:
    """Write a page, and its pictures as PNG into the folder of its name.

    Raises:
        LLMPruneError: the file is not named as a page, or cannot be written.
    """
    if file.suffix != ".html":
        raise LLMPruneError(f"The page {file} has no name that ends in .html: give one.")
    folder = file.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(html, encoding="utf-8")
        for name in PICTURES:
            (folder / f"{name}.png").unlink(missing_ok=True)
        for picture in drawn:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
    except OSError as error:
        raise LLMPruneError(f"The page {file} could not be written ({error}): give another --output.") from error
    return file


def page(record: Record, disk_bytes: int) -> tuple[str, list[Picture]]:
    """The page's HTML, and the pictures in it.

    Args:
        record: what the run wrote down.
        disk_bytes: size of the weights as they are stored.
    """
    drawn = {picture.name: picture for picture in _pictures(record)}
    evaluation = record.evaluation
    # Zeros take as much room as other weights.
    smaller = bool(record.kept) or record.storage is not None
    dense_bytes = record.parameters.dense_bytes if smaller else disk_bytes
    recipe = {key: value for key, value in record.recipe.items() if key not in ("output", "overwrite")}
    html = fill(
        "report.html.j2",
        record=record,
        pictures=drawn,
        disk_bytes=disk_bytes,
        dense_bytes=dense_bytes,
        dense_size="" if dense_bytes is None else "same as dense" if not smaller else f"dense {size(dense_bytes)}",
        use=use_of(record),
        simulated=SIMULATED,
        perplexities=perplexities(record),
        tasks=evaluation.tasks if evaluation else {},
        protocol=_flat(evaluation.protocol) if evaluation else {},
        otherwise=_otherwise(evaluation) if evaluation else {},
        roles=role_table(record),
        experts=expert_table(record),
        routed=routed_table(record),
        times=clock(record),
        errors=record.errors,
        searched=searched(record),
        judged=JUDGED,
        every=SplitHessian.EVERY,
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
    )
    return html, list(drawn.values())


def fill(template: str, **values: object) -> str:
    """A template of this package with values in it, escaped, and the colours of the pictures."""
    environment = Environment(
        loader=PackageLoader("llmprune"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": count, "size": size, "signed": signed, "breakable": breakable}
    return environment.get_template(template).render(light=pictures.LIGHT, dark=pictures.DARK, **values)


@dataclass(frozen=True)
class Measured:
    """A token perplexity of the pruned model, beside the dense model's where that is known."""

    text: str
    dense: float | None
    pruned: float
    protocol: str


def perplexities(record: Record) -> list[Measured]:
    found = []
    if one := record.perplexity:
        found.append(Measured(one.text, one.dense, one.pruned, one.protocol))
    if record.evaluation and (other := record.evaluation.perplexity):
        found.append(Measured(other.text, other.dense, other.token, other.protocol))
    return found


@dataclass(frozen=True)
class Grid:
    """A value per block and role; NaN where a block has no such linear, or it was not measured."""

    roles: tuple[str, ...]
    cells: tuple[tuple[float, ...], ...]

    def column(self, role: str) -> list[float]:
        """The values of one role that are there."""
        place = self.roles.index(role)
        return [row[place] for row in self.cells if not math.isnan(row[place])]

    def range(self) -> tuple[float, float]:
        values = [value for row in self.cells for value in row if not math.isnan(value)]
        return min(values), max(values)


def sparsity_grid(record: Record) -> Grid:
    """Fraction of zeros, or of inputs left out, per block and role; linears that share both, such as experts, together."""
    if record.gating:
        left_out = {
            name: (linear.gate_measured * linear.size, linear.size)
            for name, linear in record.linears.items()
            if linear.gate_measured is not None
        }
        return _grid(record, left_out)
    return _grid(record, {name: (linear.zeros, linear.size) for name, linear in record.linears.items()})


def outlier_grid(record: Record) -> Grid | None:
    """Outlier ratio per block and role, or None where no linear has one."""
    ratios = {
        name: (linear.outlier_ratio * linear.size, linear.size)
        for name, linear in record.linears.items()
        if linear.outlier_ratio is not None
    }
    return _grid(record, ratios) if ratios else None


def error_grids(record: Record) -> tuple[Grid, Grid] | None:
    """Held-out output error per block and role at the start and at the end, or None where it was not measured."""
    both = {name: (errors, linear.size) for name, linear in record.linears.items() if (errors := linear.held_out_errors)}
    if not both:
        return None
    start, end = (_grid(record, {name: (errors[i] * size, size) for name, (errors, size) in both.items()}) for i in (0, 1))
    return start, end


@dataclass(frozen=True)
class Searched:
    """What a search came to: `predicted` and `true` are the changes of the loss by all steps that were kept."""

    start: float
    end: float
    outcomes: dict[str, int]
    predicted: float
    true: float


def searched(record: Record) -> Searched | None:
    if not record.search:
        return None
    changes = _changes(record)
    outcomes: Counter[str] = Counter(step.outcome for step in record.search if step.outcome)
    return Searched(
        record.search[0].held_out,
        record.found,
        {name: outcomes[name] for name in pictures.OUTCOMES if name in outcomes},
        sum(predicted for predicted, _ in changes.values()),
        sum(true for _, true in changes.values()),
    )


def _changes(record: Record) -> dict[int, tuple[float, float]]:
    """Predicted and true change of the held-out loss by every step that was kept."""
    return {
        step.step: (step.predicted, step.held_out - earlier.held_out)
        for earlier, step in pairwise(record.search)
        if step.swaps and step.predicted is not None
    }


def _grid(record: Record, shares: Mapping[str, tuple[float, int]]) -> Grid:
    """Sum of parts over sum of sizes, for every block and role."""
    roles = tuple(dict.fromkeys(linear.role for linear in record.linears.values()))
    blocks = 1 + max(map(block_of, record.linears))
    part = [[0.0] * len(roles) for _ in range(blocks)]
    whole = [[0] * len(roles) for _ in range(blocks)]
    for name, (amount, of) in shares.items():
        block, column = block_of(name), roles.index(record.linears[name].role)
        part[block][column] += amount
        whole[block][column] += of
    rows = zip(part, whole, strict=True)
    return Grid(roles, tuple(tuple(p / w if w else math.nan for p, w in zip(*row, strict=True)) for row in rows))


@dataclass(frozen=True)
class RoleRow:
    """What became of all linears of one role."""

    role: str
    shapes: str
    parameters: int
    zeros: int
    low: float
    high: float

    @property
    def even(self) -> bool:
        return self.high - self.low < SAME


def role_table(record: Record) -> list[RoleRow]:
    grid = sparsity_grid(record)
    rows = []
    for role in grid.roles:
        linears = [linear for linear in record.linears.values() if linear.role == role]
        shapes = " × ".join(_span([linear.shape[side] for linear in linears]) for side in (0, 1))
        values = grid.column(role)
        rows.append(
            RoleRow(
                role,
                shapes,
                sum(linear.size for linear in linears),
                sum(linear.zeros for linear in linears),
                min(values),
                max(values),
            )
        )
    return rows


@dataclass(frozen=True)
class ExpertRow:
    """What was seen of a block's experts, as text: numbers of experts, and ranges over those removed and those kept."""

    block: int
    removed: str
    idle: str
    low: str
    high: str
    tokens: str


def expert_table(record: Record) -> list[ExpertRow]:
    """One row for each block whose experts a method chose among."""
    rows = []
    for index, block in enumerate(record.blocks):
        if experts := block.experts:
            removed = experts.removed
            low, high = (_range([experts.saliency[expert] for expert in group]) for group in (removed, experts.kept))
            idle = ", ".join(map(str, experts.idle))
            rows.append(ExpertRow(index, ", ".join(map(str, removed)) or "–", idle, low, high, _span(experts.tokens)))
    return rows


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.4g} … {max(values):.4g}" if values else "–"


@dataclass(frozen=True)
class RoutedRow:
    """The tokens that a block's experts saw, ascending, and the numbers of those that were pruned by magnitude, as text."""

    block: int
    tokens: list[int]
    starved: str


def routed_table(record: Record) -> list[RoutedRow]:
    """One row for each block whose experts' weights were pruned by what they saw."""
    seen: dict[int, dict[int, tuple[int, bool]]] = {}
    for name, linear in record.linears.items():
        if linear.expert is not None and linear.tokens is not None:
            seen.setdefault(block_of(name), {})[linear.expert] = (linear.tokens, linear.fallback == "magnitude")
    return [
        RoutedRow(
            block,
            sorted(tokens for tokens, _ in experts.values()),
            ", ".join(str(expert) for expert, (_, starved) in experts.items() if starved) or "–",
        )
        for block, experts in seen.items()
    ]


def _span(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low} … {high}"


def clock(record: Record) -> list[tuple[str, float]]:
    """Where the run's time went, in seconds."""
    times = [(label, record.clock_seconds[key]) for key, label in CLOCK.items() if key in record.clock_seconds]
    rest = record.seconds - sum(seconds for _, seconds in times)
    return [*times, ("everything before and after the blocks", max(rest, 0.0))]


def _pictures(record: Record) -> list[Picture]:
    found: list[Picture | None] = [
        _perplexity_picture(record),
        _score_picture(record),
        _sparsity_picture(record),
        _kept_picture(record),
        _influence_picture(record),
        _outlier_picture(record),
        _search_picture(record),
        _error_picture(record),
        _parameter_picture(record),
        _time_picture(record),
    ]
    return [picture for picture in found if picture]


def _perplexity_picture(record: Record) -> Picture | None:
    rows = [(f"token perplexity of {one.text}", one.dense, one.pruned) for one in perplexities(record)]
    if record.evaluation:
        # A task that is scored by a perplexity has no place on an axis of accuracies.
        others = {name: task for name, task in record.evaluation.tasks.items() if not _is_rate(task)}
        rows += [
            (f"{name}, {task.metric}", task.dense.value if task.dense else None, task.value) for name, task in others.items()
        ]
    if not rows:
        return None
    said = "; ".join(f"{name}: " + (f"dense {dense:.4g}, " if dense else "") + f"pruned {own:.4g}" for name, dense, own in rows)
    return render("perplexity", f"{said}. Lower is better.", pictures.pairs(rows))


def _is_rate(task: Task) -> bool:
    values = [task.value, *([task.dense.value] if task.dense else [])]
    return task.higher_is_better and all(0 <= value <= 1 for value in values)


def _score_picture(record: Record) -> Picture | None:
    tasks = {name: task for name, task in record.evaluation.tasks.items() if _is_rate(task)} if record.evaluation else {}
    rows = []
    for name, task in tasks.items():
        change = task.difference
        rows.append(
            pictures.Score(
                name,
                task.value,
                task.stderr or 0.0,
                task.dense.value if task.dense else None,
                (task.dense.stderr if task.dense else None) or 0.0,
                signed(change.value) if change else "",
                f"[{signed(change.low)}, {signed(change.high)}]" if change else "",
            )
        )
    if not rows:
        return None
    said = "; ".join(
        f"{row.task}: " + (f"dense {row.dense:.3f}, " if row.dense is not None else "") + f"pruned {row.pruned:.3f}"
        for row in rows
    )
    return render("tasks", f"Task scores. {said}.", pictures.scores(rows))


def _sparsity_picture(record: Record) -> Picture | None:
    if record.structured:  # what is left has hardly a zero, and zeros that fill up a shape are no decision
        return None
    grid = sparsity_grid(record)
    low, high = grid.range()
    if high - low < SAME:
        return None
    # A scale no finer than 10 points, on round numbers: colour should mean a decision.
    first, last = math.floor(low * 20) * 5, math.ceil(high * 20) * 5
    if last - first < 10:
        first = max(0, min(first, 90))
        last = first + 10
    names = [f"{row.role} {row.low:.0%}" if row.even else row.role for row in role_table(record)]
    percent = [[value * 100 for value in row] for row in grid.cells]
    alt = f"Map of sparsity per block and role, from {low:.1%} to {high:.1%}."
    what = "inputs left out, %" if record.gating else "zeros, %"
    return render("sparsity", alt, pictures.heatmap(percent, names, (first, last), what))


def _outlier_picture(record: Record) -> Picture | None:
    grid = outlier_grid(record)
    if grid is None:
        return None
    low, high = grid.range()
    percent = [[value * 100 for value in row] for row in grid.cells]
    alt = f"Map of the outlier ratio per block and role, from {low:.2%} to {high:.2%}."
    return render("outliers", alt, pictures.heatmap(percent, grid.roles, (0, high * 100 or 1), "outliers, %"))


def _search_picture(record: Record) -> Picture | None:
    found = searched(record)
    if found is None:
        return None
    said = ", ".join(f"{name} {number}" for name, number in found.outcomes.items())
    alt = f"Held-out loss over {len(record.search) - 1} steps, from {found.start:.4g} to {found.end:.4g}. Steps: {said}."
    losses, outcomes = [step.held_out for step in record.search], [step.outcome for step in record.search]
    return render("search", alt, pictures.search(losses, outcomes, _changes(record)))


def _error_picture(record: Record) -> Picture | None:
    grids = error_grids(record)
    if grids is None:
        return None
    panels, said = [], []
    for place, role in enumerate(grids[0].roles):
        means = [fmean(values) for grid in grids if (values := grid.column(role))]
        if means:
            start_B, end_B = ([row[place] for row in grid.cells] for grid in grids)
            panels.append((role, start_B, end_B))
            said.append(f"{role} from {means[0]:.3g} to {means[1]:.3g}")
    alt = f"Held-out output error per block. Means over blocks: {', '.join(said)}."
    return render("errors", alt, pictures.before_after(panels, ("the method's own mask", "the result")))


def _influence_picture(record: Record) -> Picture | None:
    series = []
    said = []
    for key, label in (
        ("influence", "block influence"),
        ("importance", "importance"),
        ("output_error", "output error of the pruned block"),
    ):
        values: list[float | None] = [getattr(block, key) for block in record.blocks]
        there = {index: value for index, value in enumerate(values) if value is not None}
        if there:
            series.append((label, values, None))
            top = max(there, key=there.__getitem__)
            said.append(f"{label}: largest in block {top}, {there[top]:.3g}, least {min(there.values()):.3g}")
    return render("blocks", f"{'; '.join(said)}.", pictures.per_block(series)) if series else None


def _kept_picture(record: Record) -> Picture | None:
    series = []
    for key, values in record.kept.items():
        dense = record.dense_widths.get(key)
        series.append((KEPT.get(key, key), values, float(max(dense) if isinstance(dense, list) else dense) if dense else None))
    said = "; ".join(f"{label}: {min(values)} to {max(values)}" for label, values, _ in series)
    return render("kept", f"Kept per block. {said}.", pictures.per_block(series)) if series else None


def _parameter_picture(record: Record) -> Picture:
    own = record.parameters
    if gating := record.gating:
        left = gating.gated + gating.bases - gating.read
        names = {"fixed": f"always read: {count(own.total - gating.gated)}", "kept": f"read: {count(gating.read)}"}
        names["zero"] = f"left out: {count(left)}"
        outer = (own.total - gating.gated, "fixed")
        bars = [("dense", [outer, (gating.gated, "kept")]), ("gated", [outer, (gating.read, "kept"), (left, "zero")])]
        return render("parameters", f"Weights for a token. {'; '.join(names.values())}.", pictures.parts(bars, names))
    fixed = own.total - own.prunable
    # Of what was removed, zeros in its place; biases that make up for it are too few to see.
    zeros = min(max((own.stored or own.left) - own.left, 0), own.zero) if record.format != "auto" else 0
    if not record.structured:
        zeros = own.zero
    sizes = {
        "fixed": (fixed, "never pruned"),
        "kept": (own.prunable - own.zero, "prunable, kept"),
        "zero": (zeros, "zero"),
        "removed": (own.zero - zeros, "removed"),
    }
    shown = [kind for kind in sizes if kind in ("fixed", "kept", "removed" if record.structured else "zero") or sizes[kind][0]]
    bars = [
        ("dense", [(fixed, "fixed"), (own.prunable, "kept")]),
        ("pruned", [(sizes[kind][0], kind) for kind in shown]),
    ]
    names = {kind: f"{sizes[kind][1]}: {count(sizes[kind][0])}" for kind in shown}
    return render("parameters", f"Parameters. {'; '.join(names.values())}.", pictures.parts(bars, names))


def _time_picture(record: Record) -> Picture:
    times = clock(record)
    said = "; ".join(f"{label}: {seconds:.1f} s" for label, seconds in times)
    return render("time", f"Where the time went. {said}.", pictures.timings(times))


def _otherwise(evaluation: Evaluation) -> dict[str, str]:
    """What was different in the protocol of a task, by task, where an earlier evaluation measured it."""
    last = {key: evaluation.protocol.get(key) for key in DECISIVE}
    return {name: deviation({**last, **task.protocol}, last) for name, task in evaluation.tasks.items()}


def _flat(values: Mapping[str, object]) -> dict[str, str]:
    """A protocol's values as text, without those that were not set."""
    return {
        key.replace("_", " "): value if isinstance(value, str) else json.dumps(value)
        for key, value in values.items()
        if value is not None
    }


def breakable(name: str) -> Markup:
    """A name or path that may be broken after its underscores and slashes."""
    return Markup(re.sub(r"([_/])", r"\1<wbr>", str(escape(name))))


def signed(value: float) -> str:
    """A difference of scores, with its sign."""
    return f"{value:+.3f}".replace("-", "−")
