"""`llmprune verify`: check a pruned directory against its record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `llmprune prune` wrote.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print problems only.")] = False,
) -> None:
    from ..progress import bar
    from ..record import read
    from ..tables import budget
    from ..verify import is_structured, read_record, steps, verify

    record = read_record(directory)
    with bar("verify", steps(record), quiet=quiet) as advance:
        problems = verify(directory, advance_progress=advance)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    if quiet:
        return
    whole = f"{directory} is whole: {len(record['shards'])} shards have the recorded SHA-256, "
    if storage := record.get("storage"):
        print(
            f"Its weights are packed as {storage['format']}: {storage['bytes']} bytes of {storage['dense_bytes']} "
            f"({storage['bytes'] / storage['dense_bytes']:.3f})."
        )
    if "recipe" not in record:
        print(f"{whole[:-2]}.")
    elif is_structured(record):
        print(f"{whole}weights and configuration are as planned ({budget(read(directory))}), no weight is NaN or -0.0.")
    else:
        print(
            f"{whole}{len(record['linears'])} linears are {record['recipe']['pattern']} with {record['sparsity']:.2%} zeros, "
            "none is NaN or -0.0."
        )
