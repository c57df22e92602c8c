"""A page on how a model reads prompts with permuted block-sparse attention: density, covered mass, and one head's block map.

pbs = enable_pbs(model, min_length=0)
with pbs.collecting() as seen, torch.no_grad():
    model(ids)
write_pbs_report(seen, "pbs.html")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import LLMPruneError
from ..pictures import LIGHT, WIDE, Draw, Picture, heatmap, render
from ..report import fill, write_page
from .pbs import BlockMap, Collected, HeadStatistics


def write_pbs_report(seen: Collected, file: str | Path) -> Path:
    """Write the page, and its pictures into the folder of the page's name.

    Args:
        seen: what `PBS.collecting` gave, after at least one prompt.
        file: ends in .html.

    Returns:
        The page.

    Raises:
        LLMPruneError: no prompt was read with PBS, the page cannot be written, or matplotlib is not installed.
    """
    whole = seen.whole()
    if whole is None or seen.map is None:
        why = ", ".join(f"{reason} ({count} calls)" for reason, count in seen.fallbacks.most_common())
        raise LLMPruneError(
            f"No prompt was read with block-sparse attention while statistics were collected ({why or 'there was none'}): give "
            "a longer prompt without padding, or a smaller min_length."
        )
    heads = seen.heads()
    drawn = {picture.name: picture for picture in _pictures(heads, seen.map)}
    html = fill(
        "pbs.html.j2",
        rule=seen.rule,
        whole=whole,
        layers=[_together(heads, layer) for layer in sorted({each.layer for each in heads})],
        map=seen.map,
        pictures=drawn,
        fallbacks=seen.fallbacks,
    )
    return write_page(html, list(drawn.values()), Path(file))


def _together(heads: Sequence[HeadStatistics], layer: int) -> HeadStatistics:
    return HeadStatistics.mean([each for each in heads if each.layer == layer], layer, -1)


def _pictures(heads: Sequence[HeadStatistics], found: BlockMap) -> list[Picture]:
    numbers = range(max(each.head for each in heads) + 1)
    density = {(each.layer, each.head): each.density for each in heads}
    cells = [[density.get((layer, head), float("nan")) for head in numbers] for layer in sorted({each.layer for each in heads})]
    values = list(density.values())
    limits = (min(values), max(max(values), min(values) + 1e-6))
    return [
        render("map", "Blocks that one head reads, without sorting its keys and with", block_maps(found)),
        render(
            "density",
            "Share of the blocks of full attention that each head reads",
            heatmap(cells, [f"head {head}" for head in numbers], limits, "density"),
        ),
    ]


def block_maps(found: BlockMap) -> Draw:
    """Two maps: a row per block of queries, a column per block of keys, a colour where it is read."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    looks = {"read": LIGHT["blue"], "left out": LIGHT["line"]}
    panels = {"keys where they are": found.unsorted_TT, "keys sorted in segments": found.sorted_TT}
    causal_TT = torch.ones_like(found.sorted_TT).tril()

    def draw(width: int) -> Figure:
        wide = width == WIDE
        figure = Figure(figsize=(width / 96, (440 if wide else 690) / 96), dpi=96, layout="constrained")
        grid = figure.subplots(*((1, 2) if wide else (2, 1)))
        for axes, (title, read_TT) in zip(grid, panels.items(), strict=True):
            # Nothing is drawn where nothing could be read.
            cells_TT = torch.where(causal_TT | read_TT, (~read_TT).float(), torch.nan)
            axes.imshow(cells_TT.numpy(), cmap=ListedColormap(list(looks.values())), vmin=0, vmax=1, interpolation="none")
            axes.set_title(f"{title}: {int(read_TT.sum())} of {int(causal_TT.sum())}", loc="left", fontsize="medium")
            axes.set_xlabel("block of keys")
            axes.set_ylabel("block of queries")
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        handles = [Patch(color=colour, label=name) for name, colour in looks.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=2, handlelength=1.4, borderpad=0)
        return figure

    return draw
