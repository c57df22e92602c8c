"""`llmprune report`: one page about a pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `llmprune prune` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE.html", help="The page; default: DIR/report.html.", show_default=False),
    ] = None,
) -> None:
    from ..report import write_report

    print(f"report: {write_report(directory, output)}")
