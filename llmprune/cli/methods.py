"""`llmprune methods`: how weights can be chosen."""

from __future__ import annotations


def command() -> None:
    from rich.console import Console
    from rich.table import Table

    from .. import methods

    table = Table("method", "what it does")
    for name in methods.names():
        table.add_row(name, methods.summary(name).split(": ", 1)[-1])
    Console().print(table)
