"""`llmprune recover`: train a pruned model a little, its masks kept."""

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
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `llmprune prune` wrote.")],
    *,
    output: Annotated[Path | None, typer.Option(help="Where to write. [default: DIR-recovered]", metavar="PATH")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in the output directory.")] = False,
    steps: Annotated[str | None, typer.Option(help="Steps of training. [default: 100]", metavar="INT")] = None,
    minutes: Annotated[
        str | None, typer.Option(help="Instead: about so long, as many steps as that is on this machine.", metavar="FLOAT")
    ] = None,
    rank: Annotated[str | None, typer.Option(help="Mean rank of a block's adapters. [default: 8]", metavar="INT")] = None,
    least_rank: Annotated[str | None, typer.Option(help="Lowest rank of a block. [default: 2]", metavar="INT")] = None,
    most_rank: Annotated[str | None, typer.Option(help="Highest rank of a block. [default: 4 * rank]", metavar="INT")] = None,
    direction: Annotated[
        str | None,
        typer.Option(
            help="Which blocks get more rank: important ones, unimportant ones, those that lost most, or none. [default: "
            "importance]",
            metavar="importance|inverse|pruned|uniform",
        ),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Roles that are trained, as q,v,down. [default: all]", metavar="A,B")
    ] = None,
    learning_rate: Annotated[str | None, typer.Option(help="Highest learning rate. [default: 0.001]", metavar="FLOAT")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to train on. [default: what the model was pruned on]", metavar="TEXT")
    ] = None,
    samples: Annotated[
        str | None, typer.Option(help="Samples of it; every 8th only judges. [default: 256, on a GPU 1024]", metavar="INT")
    ] = None,
    seqlen: Annotated[str | None, typer.Option(help="Tokens of a sample. [default: as in pruning]", metavar="INT")] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Samples of a step. [default: about 1024 tokens, on a GPU 32768]", metavar="INT")
    ] = None,
    seed: Annotated[str | None, typer.Option(help="[default: as in pruning]", metavar="INT")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.", metavar="TEXT")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="What forwards compute in; adapters are float32.", metavar="float32|bfloat16|float16"),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's record as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    silent = quiet or as_json
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        from ..recovery import request, run, verdict

        options = request(
            output=output,
            overwrite=overwrite,
            steps=steps,
            minutes=minutes,
            rank=rank,
            least_rank=least_rank,
            most_rank=most_rank,
            direction=direction,
            targets=targets,
            learning_rate=learning_rate,
            calibration=calibration,
            samples=samples,
            seqlen=seqlen,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        say = (lambda line: None) if silent else lambda line: print(line, flush=True)
        result = run(directory, options, say=say, quiet=silent)
    except KeyboardInterrupt:
        again = shlex.join([arg for arg in sys.argv[1:] if arg != "--overwrite"])
        print(
            f"\nInterrupted: training up to half a minute ago is kept. To go on: llmprune {again}",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps({"output": str(result.directory), **result.record}, indent=2))
    elif not quiet:
        print(verdict(result.record))
        print(f"model: {result.directory}")
