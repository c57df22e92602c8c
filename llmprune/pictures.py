"""Pictures of a run, by matplotlib: each for a phone and for a desktop, the same bytes for the same numbers.

An SVG's colours are CSS variables that the page sets, so one drawing serves light and dark mode. Its text stays text, in the
page's font; matplotlib reserves room for its own, wider one. Categories have the colours of Okabe and Ito, which colour-blind
readers tell apart, and maps use cividis.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .errors import LLMPruneError

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
except ImportError as error:
    raise LLMPruneError("Pictures need matplotlib, which is not installed: pip install 'llmprune[eval]'.") from error

# CSS pixels: what fits a small phone, and the page's text width.
NARROW, WIDE = 336, 760

# Variable name to its colour; the drawings use LIGHT's, which must all differ.
LIGHT = {
    "ink": "#1c2128",
    "muted": "#59636e",
    "line": "#d5dae0",
    "paper": "#ffffff",
    "dense": "#6e7781",
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
}
DARK = {
    "ink": "#e6e9ee",
    "muted": "#9aa5b1",
    "line": "#3a424c",
    "paper": "#14181d",
    "dense": "#a3adb8",
    "blue": "#56b4e9",
    "vermillion": "#e8762c",
    "green": "#1fb58a",
    "purple": "#dd93bb",
    "orange": "#e69f00",
}
SERIES = [LIGHT[name] for name in ("blue", "vermillion", "green", "purple", "orange")]
# Of methods, and of N:M patterns.
MARKERS, STARS = "osD^v", "*PXph8"
MAP = "cividis"

_FONT_PX = 12
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": _FONT_PX * 0.75,
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": "medium",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "figure.facecolor": LIGHT["paper"],
    "grid.color": LIGHT["line"],
    "hatch.color": LIGHT["muted"],
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
}

Draw = Callable[[int], Figure]


@dataclass(frozen=True)
class Picture:
    """A drawing at both widths as SVG, and the wide one as PNG.

    Attributes:
        alt: what it shows, for who cannot see it.
    """

    name: str
    alt: str
    narrow: str
    wide: str
    png: bytes


def render(name: str, alt: str, draw: Draw) -> Picture:
    """`draw` makes the figure for a width in CSS pixels."""
    with matplotlib.rc_context(_STYLE):
        return Picture(name, alt, _svg(draw(NARROW), f"{name}-narrow"), _svg(draw(WIDE), f"{name}-wide"), _png(draw(WIDE)))


def _svg(figure: Figure, salt: str) -> str:
    """An SVG element to put into a page; ids of different salts do not meet."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.id": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    # The elements' own numbering repeats in every picture, and nothing refers to it.
    text = re.sub(r'<g id="[\w.]+_\d+"', "<g", text)
    return text.replace("'DejaVu Sans'", "inherit")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=192, metadata={"Software": None})
    return buffer.getvalue()


def _figure(width: int, height: float) -> Figure:
    """An empty figure; sizes in CSS pixels."""
    return Figure(figsize=(width / 96, height / 96), dpi=96, layout="constrained")


@contextmanager
def _rows(width: int, labels: Sequence[str], notes: Sequence[str], height: int, legend: int) -> Iterator[tuple[Figure, Axes]]:
    """Axes with a row per label, `height` pixels each; the label stands above its row, and its note at the right end."""
    figure = _figure(width, len(labels) * height + legend)
    axes = figure.add_subplot()
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    yield figure, axes
    across = axes.get_yaxis_transform()
    for row, (label, note) in enumerate(zip(labels, notes, strict=True)):
        room = (width - 24) // 7 - len(note)
        short = label if len(label) <= room else label[: room - 1] + "…"
        # On paper of its own, for where a grid line passes.
        paper = {"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1}
        axes.text(0, row - 0.3, short, transform=across, va="center", bbox=paper)
        if note:
            axes.text(1, row - 0.3, note, transform=across, va="center", ha="right", bbox=paper)


def _ticks(most: int, *, integer: bool = False) -> MaxNLocator:
    """Round numbers, at most so many steps."""
    return MaxNLocator(most, integer=integer, steps=[1, 2, 5, 10])


def _number(value: float, place: int = 0) -> str:
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}").replace("-", "−")


def pairs(rows: Sequence[tuple[str, float | None, float]]) -> Draw:
    """Bars of (label, dense, pruned), each pair on a scale of its own that starts at zero."""

    def draw(width: int) -> Figure:
        with _rows(width, [label for label, *_ in rows], [""] * len(rows), 66, 4) as (figure, axes):
            axes.set_xlim(0, 1)
            axes.axis("off")
            for row, (_, dense, pruned) in enumerate(rows):
                longest = max(pruned, dense or 0) / (1 - 120 / width)
                bars = [("pruned", pruned, LIGHT["blue"])]
                if dense is not None:
                    bars.insert(0, ("dense", dense, LIGHT["dense"]))
                for place, (name, value, colour) in enumerate(bars):
                    y = row + 0.05 + 0.28 * place
                    start = 56 / width
                    axes.text(0, y, name, va="center", color=LIGHT["muted"])
                    axes.barh(y, value / longest, 0.2, left=start, color=colour)
                    axes.text(start + value / longest + 6 / width, y, _number(value), va="center")
        return figure

    return draw


@dataclass(frozen=True)
class Score:
    """A task's scores; an error is one standard error."""

    task: str
    pruned: float
    pruned_error: float
    dense: float | None
    dense_error: float
    difference: str
    interval: str


def scores(rows: Sequence[Score]) -> Draw:
    """A row per task: dense above pruned, with bars of one standard error."""

    def draw(width: int) -> Figure:
        notes = [f"{row.difference} {row.interval}".strip() if width == WIDE else row.difference for row in rows]
        with _rows(width, [row.task for row in rows], notes, 52, 74) as (figure, axes):
            for place, row in enumerate(rows):
                if row.dense is not None:
                    axes.errorbar(row.dense, place, xerr=row.dense_error, fmt="s", color=LIGHT["dense"], **_BAR)
                axes.errorbar(row.pruned, place + 0.22, xerr=row.pruned_error, fmt="o", color=LIGHT["blue"], **_BAR)
            axes.grid(axis="x")
            axes.set_xlabel("score")
            axes.margins(x=0.04)
            axes.xaxis.set_major_locator(_ticks(5 if width == NARROW else 10))
            legend = [("s", LIGHT["dense"], "dense")] if any(row.dense is not None for row in rows) else []
            _legend(figure, [*legend, ("o", LIGHT["blue"], "pruned")])
        return figure

    return draw


_BAR: Any = {"markersize": 5.5, "elinewidth": 1.6, "capsize": 2.5}


def _legend(figure: Figure, entries: Sequence[tuple[str, str, str]]) -> None:
    """A legend above everything, of (marker, colour, label)."""
    handles = [Line2D([], [], marker=m, color=c, linestyle="none", label=text, markersize=5.5) for m, c, text in entries]
    columns = len(handles) if figure.get_figwidth() * 96 == WIDE else 3
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handletextpad=0.4, columnspacing=1.2, borderpad=0)


def parts(bars: Sequence[tuple[str, Sequence[tuple[float, str]]]], names: Mapping[str, str]) -> Draw:
    """Stacked bars: (label, [(size, kind)]); `names` says what a kind is called, in order of the legend.

    Kinds are kept (full colour), fixed (grey), zero (hatched) and removed (empty).
    """
    look: dict[str, Any] = {
        "fixed": {"color": LIGHT["dense"]},
        "kept": {"color": LIGHT["blue"]},
        "zero": {"facecolor": LIGHT["paper"], "edgecolor": LIGHT["muted"], "hatch": "////", "linewidth": 0.8},
        "removed": {"facecolor": LIGHT["paper"], "edgecolor": LIGHT["muted"], "linewidth": 0.8},
    }

    def draw(width: int) -> Figure:
        with _rows(
            width, [label for label, _ in bars], [""] * len(bars), 48, 44 if width == WIDE else 10 + 18 * len(names)
        ) as (figure, axes):
            axes.axis("off")
            for row, (_, pieces) in enumerate(bars):
                start = 0.0
                for size, kind in pieces:
                    axes.barh(row + 0.2, size, 0.42, left=start, **look[kind])
                    start += size
            axes.set_xlim(0, max(sum(size for size, _ in pieces) for _, pieces in bars) * 1.002)
            handles = [Patch(**look[kind], label=text) for kind, text in names.items()]
            figure.legend(
                handles=handles,
                loc="outside upper left",
                ncols=len(names) if width == WIDE else 1,
                handlelength=1.4,
                borderpad=0,
            )
        return figure

    return draw


def heatmap(cells: Sequence[Sequence[float]], columns: Sequence[str], limits: tuple[float, float], label: str) -> Draw:
    """Values [blocks][columns] in colour. NaN cells stay blank. Blocks go down a phone and across a desktop."""
    low, high = limits

    def draw(width: int) -> Figure:
        blocks = len(cells)
        wide = width == WIDE
        cell = max(6, min(22, 560 // blocks))
        figure = _figure(width, (26 * len(columns) if wide else cell * blocks + 24) + 88)
        axes = figure.add_subplot()
        data = list(zip(*cells, strict=True)) if wide else cells
        image = axes.imshow(data, cmap=MAP, vmin=low, vmax=high, aspect="auto", interpolation="none")
        across, down = (axes.xaxis, axes.yaxis) if wide else (axes.yaxis, axes.xaxis)
        across.set_major_locator(_ticks(12, integer=True))
        across.set_label_text("block")
        down.set_major_locator(FixedLocator(range(len(columns))))
        names = [name if wide else name.replace(" ", "\n") for name in columns]
        down.set_major_formatter(FuncFormatter(lambda place, _: names[int(place)]))
        if not wide:
            axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, orientation="horizontal", fraction=0.05, aspect=40, pad=0.02, label=label)
        bar.outline.set_visible(False)
        bar.ax.xaxis.set_major_locator(_ticks(5))
        bar.ax.xaxis.set_major_formatter(FuncFormatter(_number))
        return figure

    return draw


def per_block(series: Sequence[tuple[str, Sequence[float | None], float | None]]) -> Draw:
    """Bars over the blocks, one panel per (label, values, dense value or None)."""

    def draw(width: int) -> Figure:
        figure = _figure(width, 150 * len(series) + 20)
        panels = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (label, values, dense) in zip(panels, series, strict=True):
            axes.bar(range(len(values)), [math.nan if value is None else value for value in values], 0.8, color=LIGHT["blue"])
            if dense is not None:
                axes.axhline(dense, color=LIGHT["dense"], linestyle="--", label=f"dense: {_number(dense)}")
                axes.set_ylim(0, dense * 1.3)
                axes.legend(loc="upper right", borderpad=0)
            axes.set_title(label, loc="left", fontsize="medium")
            axes.grid(axis="y")
            axes.yaxis.set_major_locator(_ticks(4))
            axes.yaxis.set_major_formatter(FuncFormatter(_number))
            axes.set_xlim(-0.6, len(values) - 0.4)
        panels[-1].set_xlabel("block")
        panels[-1].xaxis.set_major_locator(_ticks(6 if width == NARROW else 12, integer=True))
        return figure

    return draw


def before_after(panels: Sequence[tuple[str, Sequence[float], Sequence[float]]], names: tuple[str, str]) -> Draw:
    """Two values over the blocks, one small panel with a scale of its own per (label, before, after). NaN leaves a gap."""

    def draw(width: int) -> Figure:
        columns = 4 if width == WIDE else 2
        rows = math.ceil(len(panels) / columns)
        figure = _figure(width, 140 * rows + 50)
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        looks = (("s", LIGHT["dense"], names[0]), ("o", LIGHT["blue"], names[1]))
        for axes, (label, *values) in zip(grid.flat, panels, strict=False):
            for (marker, colour, _), values_B in zip(looks, values, strict=True):
                axes.plot(range(len(values_B)), values_B, color=colour, marker=marker, markersize=2.5, linewidth=1)
            axes.set_title(label, loc="left", fontsize="medium")
            axes.grid(axis="y")
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(_ticks(3))
            axes.yaxis.set_major_formatter(FuncFormatter(_number))
            axes.xaxis.set_major_locator(_ticks(4, integer=True))
        for place, axes in enumerate(grid.flat):
            axes.set_visible(place < len(panels))
            # The lowest of its column, which is not always in the last row.
            if place < len(panels) <= place + columns:
                axes.set_xlabel("block")
                axes.tick_params(labelbottom=True)
        _legend(figure, looks)
        return figure

    return draw


OUTCOMES = {
    "kept": ("o", LIGHT["blue"]),
    "kept in part": ("^", LIGHT["green"]),
    "undone": ("x", LIGHT["vermillion"]),
    "nothing to swap": ("|", LIGHT["dense"]),
}
# Steps from which on there is no room to mark each.
CROWD = 300


def search(losses: Sequence[float], outcomes: Sequence[str | None], changes: Mapping[int, tuple[float, float]]) -> Draw:
    """Loss over steps, with marks for what became of them, above the changes (predicted, true) of single steps.

    Args:
        outcomes: keys of `OUTCOMES`, or None where nothing was tried; as many as losses.
        changes: by step; there need not be any.
    """
    seen = [name for name in OUTCOMES if name in outcomes] if len(losses) < CROWD else []

    def draw(width: int) -> Figure:
        figure = _figure(width, 440 if changes else 270)
        panels = figure.subplots(2 if changes else 1, 1, sharex=True, squeeze=False)[:, 0]
        size = min(5.5, max(2.0, 0.5 * width / len(losses)))
        panels[0].plot(losses, color=LIGHT["blue"], linewidth=1)
        for name in seen:
            marker, colour = OUTCOMES[name]
            steps = [step for step, outcome in enumerate(outcomes) if outcome == name]
            values = [losses[step] for step in steps]
            panels[0].plot(steps, values, color=colour, marker=marker, markersize=size, linestyle="none")
        panels[0].set_title("held-out loss", loc="left", fontsize="medium")
        if changes:
            panels[1].axhline(0, color=LIGHT["dense"], linewidth=1)
            for side, (marker, colour) in enumerate((("D", LIGHT["orange"]), ("o", LIGHT["blue"]))):
                values = [both[side] for both in changes.values()]
                panels[1].plot(list(changes), values, color=colour, linewidth=1, marker=marker if seen else "", markersize=size)
            panels[1].set_title("its change by the steps kept", loc="left", fontsize="medium")
        for axes in panels:
            axes.grid(axis="y")
            axes.yaxis.set_major_locator(_ticks(5))
            axes.yaxis.set_major_formatter(FuncFormatter(_number))
        panels[-1].set_xlabel("step")
        panels[-1].xaxis.set_major_locator(_ticks(6 if width == NARROW else 12, integer=True))
        legend = [(*OUTCOMES[name], name) for name in seen]
        _legend(figure, [*legend, ("D", LIGHT["orange"], "predicted")] if changes else legend)
        return figure

    return draw


def timings(rows: Sequence[tuple[str, float]]) -> Draw:
    """Bars of (label, seconds)."""

    def draw(width: int) -> Figure:
        longest = max(seconds for _, seconds in rows) or 1.0
        notes = [f"{seconds:,.1f} s" if longest >= 10 else f"{seconds:.3f} s" for _, seconds in rows]
        with _rows(width, [label for label, _ in rows], notes, 40, 4) as (figure, axes):
            axes.axis("off")
            axes.set_xlim(0, longest)
            axes.barh([row + 0.18 for row in range(len(rows))], [seconds for _, seconds in rows], 0.26, color=LIGHT["blue"])
        return figure

    return draw


@dataclass(frozen=True)
class Point:
    """One pruned model of a frontier. `pattern` is given where it is N:M."""

    series: str
    sparsity: float
    quality: float
    pattern: str | None = None


def frontier(
    points: Sequence[Point], dense: float | None, label: str, *, log: bool, total: int, prunable: int, across: str
) -> Draw:
    """Quality against sparsity, a line per series, N:M apart; the upper axis counts the parameters that are left.

    Args:
        total, prunable: parameters, and those that a sparsity is a share of.
        across: what a sparsity is called.
    """
    names = list(dict.fromkeys(point.series for point in points))
    patterns = list(dict.fromkeys(point.pattern for point in points if point.pattern))

    def nonzero(share: Any) -> Any:
        return (total - share * prunable) / 1e6

    def sparsity(millions: Any) -> Any:
        return (total - millions * 1e6) / prunable

    def draw(width: int) -> Figure:
        figure = _figure(width, 420 if width == WIDE else 380)
        axes = figure.add_subplot()
        entries = []
        for number, name in enumerate(names):
            colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            entries.append((marker, colour, name))
            plain = sorted((p.sparsity, p.quality) for p in points if p.series == name and not p.pattern)
            axes.plot([x for x, _ in plain], [y for _, y in plain], color=colour, marker=marker, markersize=5.5)
            for point in points:
                if point.series == name and point.pattern:
                    star = STARS[patterns.index(point.pattern) % len(STARS)]
                    axes.plot(point.sparsity, point.quality, color=colour, marker=star, markersize=9, linestyle="none")
        entries += [(STARS[number % len(STARS)], LIGHT["muted"], pattern) for number, pattern in enumerate(patterns)]
        if dense is not None:
            axes.axhline(dense, color=LIGHT["dense"], linestyle="--")
            entries.append(("_", LIGHT["dense"], f"dense: {_number(dense)}"))
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            ticks = [m * 10.0**e for e in range(-1, 12) for m in ((1, 2, 5) if high < 100 * low else (1,))]
            axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high] or [low, high]))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(_number))
        axes.grid()
        axes.margins(x=0.08)
        axes.set_ylabel(label)
        axes.set_xlabel(across)
        axes.xaxis.set_major_locator(_ticks(9))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        size = axes.secondary_xaxis("top", functions=(nonzero, sparsity))
        size.set_xlabel("parameters left, millions" if prunable == total else "non-zero parameters, millions")
        size.xaxis.set_major_locator(_ticks(4 if width == NARROW else 8))
        size.spines["top"].set_visible(False)
        _legend(figure, entries)
        return figure

    return draw
