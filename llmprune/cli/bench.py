"""`llmprune bench`: how fast models write text here, beside what the bytes they read allow."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .prune import _interrupt

if TYPE_CHECKING:
    from ..bench_result import BenchResult


def command(
    model: Annotated[str, typer.Argument(metavar="DIR", help="What llmprune wrote, any model directory, Hub id or alias.")],
    *,
    against: Annotated[
        list[str] | None, typer.Option(help="One more model to measure; may be given several times.", metavar="DIR")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What speed-ups are over; none for none. [default: the same weights without gates, else the dense model it "
            "was made from]",
            metavar="MODEL",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Tokens of the prompt. [default: 128, or what the model takes]", metavar="INT")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens written in every round. [default: 32]", metavar="INT")] = None,
    repeats: Annotated[str | None, typer.Option(help="Rounds. [default: 5]", metavar="INT")] = None,
    no_prefill: Annotated[
        bool, typer.Option("--no-prefill", help="Read the prompt once and time only what is written after it.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.", metavar="TEXT")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of all models. [default: as the weights of DIR are stored]", metavar="float32|bfloat16|float16"),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="What computes gated linears. [default: auto]", metavar="NAME")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that a model brings.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Add the results to this file. (No model's own record is changed.)", metavar="FILE.csv|.json"),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Time what computes 2:4 linears of DIR's shapes here, keep which is the fastest, and let no model write.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    silent = quiet or as_json
    signal.signal(signal.SIGTERM, _interrupt)
    if tune:
        others: dict[str, object] = {"--against": against, "--baseline": baseline, "--prompt": prompt, "--tokens": tokens}
        others |= {"--repeats": repeats, "--no-prefill": no_prefill, "--backend": backend, "--output": output}
        ignored = [name for name, value in others.items() if value]
        _tune(model, device, dtype, ignored, as_json=as_json, quiet=silent)
        return
    try:
        from ..bench import bench, request

        results = bench(
            request(
                model=model,
                against=against,
                baseline=baseline,
                prompt=prompt,
                tokens=tokens,
                repeats=repeats,
                prefill=not no_prefill,
                device=device,
                dtype=dtype,
                backend=backend,
                trust_remote_code=trust_remote_code,
                output=output,
            ),
            say=(lambda line: None) if silent else lambda line: print(line, flush=True),
            quiet=silent,
        )
    except KeyboardInterrupt:
        print("\nInterrupted: what was measured was dropped, and nothing was written.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    elif not quiet:
        _show(results)


def _tune(model: str, device: str | None, dtype: str | None, ignored: Sequence[str], *, as_json: bool, quiet: bool) -> None:
    from ..errors import LLMPruneError
    from ..kernels.linear24 import BUCKETS
    from ..tuning import tune_model

    if ignored:
        raise LLMPruneError(f"--tune times kernels and lets no model write: leave out {' and '.join(ignored)}.")
    say = (lambda line: None) if quiet else lambda line: print(line, flush=True)
    try:
        times, file = tune_model(model, device=device, dtype=dtype, say=say, advance=lambda what: say(f"timed {what}"))
    except KeyboardInterrupt:
        print("\nInterrupted: what was timed was dropped, and nothing was written.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps({"file": str(file), "times": [asdict(timed) for timed in times]}, indent=2))
        return
    if quiet:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("weight", *(f"{tokens}" for tokens in BUCKETS), title="fastest, and its speed-up over dense, by tokens")
    for shape in dict.fromkeys(timed.shape for timed in times):
        rows = [timed for timed in times if timed.shape == shape]
        cells = (f"{timed.fastest} {timed.seconds['dense'] / timed.seconds[timed.fastest]:.2f}" for timed in rows)
        table.add_row(f"{shape[0]} x {shape[1]}", *cells)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    console.print(f"Kept in {file}.", highlight=False, soft_wrap=True)


def _show(results: Sequence[BenchResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = results[0]
    compared, prefilled = first.speedup is not None, first.prefill_tokens_per_second is not None
    columns = [*["prefill, tokens/s"] * prefilled, "tokens/s [quartiles]", "floor", "MB/token", "GB/s", "of the floor"]
    table = Table("model")
    for column in [*columns, *["speed-up [quartiles]", "by bytes"] * compared]:
        table.add_column(column, justify="right")
    for result in results:
        middle, low, high = (
            result.decode_tokens_per_second,
            result.decode_tokens_per_second_low,
            result.decode_tokens_per_second_high,
        )
        row = [f"{result.prefill_tokens_per_second:.1f}"] if result.prefill_tokens_per_second else []
        row += [
            f"{middle:.2f} [{low:.2f}, {high:.2f}]",
            f"{result.floor_tokens_per_second:.2f}",
            f"{result.bytes_per_token / 1e6:.1f}",
            f"{result.gb_per_second:.2f}",
            f"{result.share_of_floor:.0%}",
        ]
        if compared:
            row += [
                f"{result.speedup:.2f} [{result.speedup_low:.2f}, {result.speedup_high:.2f}]",
                f"{result.predicted_speedup:.2f}",
            ]
        table.add_row(result.name, *row)
    console = Console()
    if not console.is_terminal:
        # A file is wider than the 80 columns that rich assumes.
        console.width = 160
    console.print(table)
    threads = f" with {first.threads} threads" if first.device == "cpu" else ""
    for line in (
        f"{first.dtype} on {first.device_name}{threads}; torch {first.torch}, llmprune {first.llmprune}",
        f"one sequence, {first.new_tokens} tokens after a prompt of {first.prompt_tokens}; medians of {first.repeats} rounds",
        f"floor: what {first.bandwidth_gb_per_second:.2f} GB/s allow, read in the same run ({first.bandwidth_probe}; quartiles "
        f"{first.bandwidth_gb_per_second_low:.2f} to {first.bandwidth_gb_per_second_high:.2f})",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    for result in results:
        if result.active is not None:
            read = f"{result.name}: {result.active:.1%} of the gated weights read, by {result.backend}"
            console.print(read, highlight=False, soft_wrap=True)
