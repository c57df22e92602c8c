"""`llmprune eval`: how good a model is, on the harness's tasks and in perplexity."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .prune import _interrupt


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, Hub id, GGUF file or alias.")],
    *,
    baseline: Annotated[str | None, typer.Option(help="The dense model, to compare with in pairs.", metavar="MODEL")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of the harness, or `perplexity`, separated by commas.", metavar="A,B")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="quick, paper-zero-shot or perplexity. [default: quick]", metavar="NAME")
    ] = None,
    limit: Annotated[str | None, typer.Option(help="Documents of each task. [default: the suite's]", metavar="INT")] = None,
    batch_size: Annotated[str | None, typer.Option(help="[default: 8; 1 for whole texts]", metavar="INT")] = None,
    fewshot: Annotated[
        str | None, typer.Option(help="Examples before each document. [default: the task's own]", metavar="INT")
    ] = None,
    seed: Annotated[str | None, typer.Option(help="[default: the harness's own]", metavar="INT")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.", metavar="TEXT")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="[default: float32 on a CPU, else as the weights are stored]", metavar="float32|bfloat16|float16"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", metavar="TEXT")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the scores there as JSON.", metavar="FILE.json")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    silent = quiet or as_json
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        from ..evaluation import evaluate, request

        evaluation = evaluate(
            request(
                model=model,
                baseline=baseline,
                tasks=tasks,
                suite=suite,
                limit=limit,
                batch_size=batch_size,
                fewshot=fewshot,
                seed=seed,
                device=device,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
                output=output,
            ),
            say=(lambda line: None) if silent else lambda line: print(line, flush=True),
            quiet=silent,
        )
    except KeyboardInterrupt:
        again = shlex.join(sys.argv[1:])
        print(
            f"\nInterrupted: the task in work was dropped, finished tasks are kept. To go on: llmprune {again}", file=sys.stderr
        )
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps({"model": model, "evaluation": evaluation}, indent=2))
    elif not quiet:
        _show(evaluation)


def _show(evaluation: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    protocol = evaluation["protocol"]
    compared = protocol["baseline"] is not None
    table = Table("task", "metric")
    for column in ("dense", "pruned", "difference [95 %]", "samples") if compared else ("score", "samples"):
        table.add_column(column, justify="right")
    for name, task in evaluation["tasks"].items():
        if compared:
            scores = [f"{task['dense']['value']:.4f}", f"{task['value']:.4f}", _interval(task["difference"])]
        else:
            scores = [f"{task['value']:.4f}" + (f" ± {task['stderr']:.4f}" if task["stderr"] is not None else "")]
        table.add_row(name, task["metric"], *scores, str(task["samples"]))
    if text := evaluation.get("perplexity"):
        dense = [f"{text['dense']:.4f}"] if compared else []
        gap = [_interval(text["difference"])] if compared else []
        table.add_row("perplexity", "token_perplexity", *dense, f"{text['token']:.4f}", *gap, str(text["windows"]))
    console = Console()
    if not console.is_terminal:
        # A file is wider than the 80 columns that rich assumes.
        console.width = 120
    console.print(table)
    if text:
        console.print(f"{text['protocol']}, of {text['text']}", highlight=False, soft_wrap=True)
    console.print(
        f"lm-eval {protocol['lm_eval']}, {protocol['dtype']} on {protocol['device']}, batches of {protocol['batch_size']}",
        highlight=False,
        soft_wrap=True,
    )


def _interval(difference: Mapping[str, Any] | None) -> str:
    return "" if difference is None else f"{difference['value']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
