"""`llmprune compare`: pruned models and their dense parents side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories that `llmprune prune` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    import json

    from .. import compare

    found = compare.compare(directories)
    if as_json:
        print(json.dumps(compare.as_json(found), indent=2))
    else:
        compare.show(found)
