"""Options of a command that are made from the fields of a settings class."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, Literal, get_origin

import typer

__all__ = ["options_of"]

Command = Callable[..., Any]


def options_of(kind: type, *, into: str) -> Callable[[Command], Command]:
    """A decorator: a command gets one option per field of a dataclass.

    Fields with a ``help`` among their metadata count; ``max_drop`` is ``--max-drop``. Names,
    types, defaults and help are written in one place, the class. The class itself checks values.

    Args:
        kind: a dataclass.
        into: the parameter of the command that is given the options as a dictionary.
    """
    if not is_dataclass(kind):
        raise TypeError(f"{kind.__name__} is no dataclass")
    types = typing.get_type_hints(kind)
    own = [field for field in fields(kind) if "help" in field.metadata]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def mirrored(**given: Any) -> Any:
            chosen = {field.name: given.pop(field.name) for field in own}
            return command(**given, **{into: chosen})

        hints = typing.get_type_hints(command, include_extras=True)
        signature = inspect.signature(command)
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
            for name, parameter in signature.parameters.items()
            if name != into
        ]
        parameters += [_parameter(field, types[field.name]) for field in own]
        mirrored.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        mirrored.__annotations__ = {p.name: p.annotation for p in parameters}
        del mirrored.__wrapped__  # its signature is another
        return mirrored

    return decorate


def _parameter(field: Field[Any], annotation: Any) -> inspect.Parameter:
    if field.default is MISSING:
        raise TypeError(f"{field.name} has no default")
    plain = str if get_origin(annotation) is Literal else annotation
    shown = field.metadata.get("show_default", field.default is not None)
    option = typer.Option(help=field.metadata["help"], show_default=shown)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default,
        annotation=Annotated[plain, option],
    )
