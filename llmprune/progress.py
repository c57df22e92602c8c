"""Progress bars: on a terminal, by the first rank, unless asked to be quiet."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(description: str, total: int, *, quiet: bool = False, still: bool = False) -> Iterator[Callable[[str], None]]:
    """A bar with count, elapsed and remaining time. Yields a function to call with each finished item's name.

    A `still` bar moves with finished items only: nothing draws in a thread beside what is being timed.
    """
    hidden = quiet or not sys.stderr.isatty() or int(os.environ.get("RANK", "0")) > 0
    if hidden:
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[latest]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=not still) as progress:
        task = progress.add_task(description, total=total, latest="")
        yield lambda name: progress.update(task, advance=1, latest=name, refresh=still)
