"""`llmprune export`: a model stored in fewer bytes, or turned back."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from .prune import _interrupt


def command(
    model: Annotated[
        str,
        typer.Argument(metavar="DIR", help="What llmprune wrote, or any model directory or Hub id with zeros in safetensors."),
    ],
    *,
    format: Annotated[
        str,
        typer.Option(
            help="packed24: matrices that are 2:4 and have a multiple of 16 inputs, in 0.56 of the bytes. bitmask: any zeros, "
            "in 1/16 plus what is left. dense: either of them turned back.",
            metavar="packed24|bitmask|dense",
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Where to write. [default: DIR-FORMAT]", metavar="PATH")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in the output directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the export's record as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    silent = quiet or as_json
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        from ..exporting import run

        say = (lambda line: None) if silent else lambda line: print(line, flush=True)
        result = run(model, format, output, overwrite=overwrite, say=say, quiet=silent)
    except KeyboardInterrupt:
        again = shlex.join([arg for arg in sys.argv[1:] if arg != "--overwrite"])
        print(f"\nInterrupted: finished shards are kept. To go on: llmprune {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps({"output": str(result.directory), **result.record}, indent=2))
    elif not quiet:
        print(f"model: {result.directory}")
