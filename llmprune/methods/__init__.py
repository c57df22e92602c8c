"""One file per method, named as the command line names it.

A method module has a docstring whose first line says what it does, a `STATISTIC` (what it observes at a linear's input, or
None when it needs no calibration data), and a `prune(stream, recipe)` that reads like its paper.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from ..errors import LLMPruneError

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..statistics import Statistic
    from ..stream import Stream


class Method(Protocol):
    """What a method module offers."""

    STATISTIC: type[Statistic] | None

    def prune(self, stream: Stream, recipe: Recipe) -> None:
        """Decide every linear of every block."""


def names() -> list[str]:
    """The methods there are, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def summary(name: str) -> str:
    """First line of a method's docstring, without importing it."""
    text = (Path(__path__[0]) / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


def load(name: str) -> Method:
    """The method module of that name.

    Raises:
        LLMPruneError: there is none.
    """
    if name not in names():
        raise LLMPruneError(f"Unknown method {name!r}: use one of {', '.join(names())}.")
    return cast(Method, importlib.import_module(f".{name}", __name__))
