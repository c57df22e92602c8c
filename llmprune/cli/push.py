"""`llmprune push`: share a pruned model on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `llmprune prune` wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the Hub, created if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private repository.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Commit to this branch, created if missing.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the address only.")] = False,
) -> None:
    from ..hub import push

    print(push(directory, repo_id, private=private, revision=revision, create_pr=create_pr, quiet=quiet))
