"""`llmprune sweep`: one recipe over methods, sparsities and patterns."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Annotated

import typer

from ..errors import LLMPruneError
from ..recipe import Recipe
from .options import takes_recipe
from .prune import _interrupt


@takes_recipe
def command(
    *,
    recipe: Recipe,
    methods: Annotated[str | None, typer.Option(metavar="A,B", help="Methods; default: --method.")] = None,
    sparsities: Annotated[str | None, typer.Option(metavar="0.3,0.5", help="Sparsities of unstructured runs.")] = None,
    patterns: Annotated[str | None, typer.Option(metavar="2:4,4:8", help="N:M patterns.")] = None,
    suite: Annotated[str | None, typer.Option(metavar="NAME", help="Evaluate every model on a suite of tasks.")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Evaluate every model on these tasks.")] = None,
    limit: Annotated[str | None, typer.Option(metavar="INT", help="Documents of each task.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    main = os.environ.get("RANK", "0") == "0"
    signal.signal(signal.SIGTERM, _interrupt if main else signal.SIG_DFL)
    silent = quiet or as_json

    def say(line: str) -> None:
        if not silent:
            print(line, flush=True)

    try:
        from .. import compare, sweep

        runs = sweep.combinations(
            recipe, _listed("--methods", methods), _listed("--sparsities", sparsities), _listed("--patterns", patterns)
        )
        if not recipe.evaluate:
            say(f"evaluate = {sweep.TEXT}: what the papers measure on")
        done = sweep.sweep(runs, sweep.evaluations(runs, suite=suite, tasks=tasks, limit=limit), say=say, quiet=silent)
    except KeyboardInterrupt:
        if main:
            print("\nInterrupted: what is finished is kept. To go on, give the same command again.", file=sys.stderr)
        raise typer.Exit(130) from None
    if not main:
        return
    assert recipe.output
    found = sweep.write_summary(recipe.output, done)
    if as_json:
        print(json.dumps(compare.as_json(found), indent=2))
    elif not quiet:
        compare.show(found)
        print(f"frontier: {recipe.output / sweep.PAGE}")


def _listed(option: str, text: str | None) -> list[str]:
    """The values of a comma-separated option; none where it was not given."""
    values = [value.strip() for value in (text or "").split(",")]
    if text is not None and not all(values):
        raise LLMPruneError(f"{option} is {text!r}: give values with commas between them.")
    return values if text is not None else []
