"""The command line: one file per command. Nothing here imports torch or transformers until a command runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ..errors import LLMPruneError
from . import bench, compare, env, eval, export, methods, models, plan, prune, push, recover, report, sweep, verify

app = typer.Typer(
    name="llmprune",
    help="Post-training pruning of language models, streamed block by block.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    # Boxes around the help would cost a third of its time.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from .._version import __version__

        typer.echo(f"llmprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


app.command("prune", help="Prune a model and write it to a directory that transformers loads.")(prune.command)
app.command("plan", help="Predict what `prune` with the same options will cost, before anything heavy is loaded.")(plan.command)
app.command("verify", help="Check a pruned directory against its record.")(verify.command)
app.command("eval", help="Score a model on the harness's tasks, beside its dense parent.")(eval.command)
app.command("bench", help="Measure how fast a model writes text here, beside what the bytes it reads allow.")(bench.command)
app.command("export", help="Store a model's zeros in fewer bytes, or turn such a model back.")(export.command)
app.command("report", help="Write one HTML page, with pictures, about a pruned model.")(report.command)
app.command("recover", help="Train a pruned model's low-rank adapters for a while and merge them; masks stay.")(recover.command)
app.command("push", help="Share a pruned model on the Hugging Face Hub.")(push.command)
app.command("compare", help="Show pruned models and their dense parents in one table.")(compare.command)
app.command("sweep", help="Prune over methods, sparsities and patterns, and draw the frontier.")(sweep.command)
app.command("models", help="List the aliases and the supported architectures.")(models.command)
app.command("methods", help="List the pruning methods.")(methods.command)
app.command("env", help="Show versions and devices, for bug reports.")(env.command)


def main() -> None:
    """Entry point. Bad input is one sentence on stderr and exit code 2; defects keep their traceback."""
    try:
        app()
    except LLMPruneError as error:
        # What all ranks raise, the first one says.
        if os.environ.get("RANK", "0") == "0" or "SharedError" not in {kind.__name__ for kind in type(error).__mro__}:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
