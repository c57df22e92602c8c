"""The recipe's options as command-line flags, derived from `Recipe` so that there is one list of them."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ..recipe import Recipe, from_options


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every option of `Recipe`, and `--recipe FILE`; it receives the resulting recipe as `recipe`.

    Values stay text until pydantic reads them, so a flag and a line of YAML are checked by the same rules.
    """
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "recipe"]
    fields = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(name))
        for name in Recipe.model_fields
    ]
    file = inspect.Parameter(
        "recipe",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option("--recipe", metavar="FILE.yaml", help="Options from a file; flags override them."),
        ],
    )

    @functools.wraps(command)
    def wrapper(recipe: Path | None, **values: object) -> None:
        options = {name: values.pop(name) for name in Recipe.model_fields}
        command(recipe=from_options(options, recipe), **values)

    parameters = [*fields, file, *own]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _flag(name: str) -> object:
    field = Recipe.model_fields[name]
    option = "--" + name.replace("_", "-")
    if field.annotation is bool:
        return Annotated[bool | None, typer.Option(option, help=field.description, show_default=False)]
    help_text = field.description or ""
    if not field.is_required() and field.default is not None:
        help_text += f" [default: {field.default}]"
    return Annotated[str | None, typer.Option(option, help=help_text, metavar=_metavar(field.annotation))]


def _metavar(annotation: object) -> str:
    """What a value looks like: its choices where there are some, else its type."""
    members = [member for member in typing.get_args(annotation) if member is not type(None)] or [annotation]
    if typing.get_origin(annotation) is typing.Literal:
        members = [annotation]
    if choices := typing.get_args(members[0]):
        return "|".join(str(choice) for choice in choices)
    return {int: "INT", float: "FLOAT", Path: "PATH"}.get(typing.cast(type, members[0]), "TEXT")
