"""`llmprune plan`: what a run would cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ..recipe import Recipe
from .options import takes_recipe


@takes_recipe
def command(
    *,
    recipe: Recipe,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Check the options only.")] = False,
) -> None:
    from ..output import check_directory
    from ..plan import make_plan
    from ..pruning import coverage_line, output_directory, prepare
    from ..tables import show_plan

    silent = quiet or as_json
    ready = prepare(recipe, (lambda line: None) if silent else print)
    # A disk that is too small is for the plan to show and no reason to refuse it.
    check_directory(output_directory(ready), ready.source.directory, overwrite=ready.recipe.overwrite)
    plan = make_plan(ready)
    if as_json:
        settled = ready.recipe.model_dump(mode="json", exclude_none=True)
        print(json.dumps({"recipe": settled, "reasons": ready.reasons, **asdict(plan)}, indent=2))
    elif not quiet:
        print(coverage_line(ready))
        show_plan(ready, plan)
