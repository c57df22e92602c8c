"""`llmprune prune`: make a sparse model."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from typing import Annotated

import typer

from ..recipe import Recipe
from .options import takes_recipe


@takes_recipe
def command(
    *,
    recipe: Recipe,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="USER/NAME", help="Share the result in this repository on the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create that repository as a private one.")] = False,
    push_revision: Annotated[
        str | None, typer.Option("--push-revision", metavar="BRANCH", help="Push to this branch, created if missing.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Push as a pull request.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's record as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    main = os.environ.get("RANK", "0") == "0"
    silent = quiet or as_json
    # The other ranks, perhaps waiting inside a collective, just end.
    signal.signal(signal.SIGTERM, _interrupt if main else signal.SIG_DFL)
    if push_to_hub and main:
        from ..hub import check

        check(push_to_hub)  # before hours of work
    try:
        from ..pruning import run

        result = run(recipe, say=(lambda line: None) if silent else lambda line: print(line, flush=True), quiet=silent)
    except KeyboardInterrupt:
        again = shlex.join([arg for arg in sys.argv[1:] if arg != "--overwrite"])
        if main:
            print(
                f"\nInterrupted: finished work is kept, what was in the making was dropped. To go on: llmprune {again}",
                file=sys.stderr,
            )
        raise typer.Exit(130) from None
    if not main:
        return
    if as_json:
        print(json.dumps({"output": str(result.directory), **result.record}, indent=2))
    elif not quiet:
        from ..tables import show

        show(result)
    if push_to_hub:
        from ..hub import push

        url = push(result.directory, push_to_hub, private=private, revision=push_revision, create_pr=create_pr, quiet=silent)
        print(url, file=sys.stderr if as_json else sys.stdout)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
