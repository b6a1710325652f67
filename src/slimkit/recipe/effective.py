"""Effective settings: every field of a stage with its value, defaults too, and what code they name.

Both are parts of a cache key (:mod:`slimkit.recipe.keys`). A setting that is left out and one that
is written with the value of its default are the same; a default that changes is another setting.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ValidationError

from slimkit.errors import SlimkitError
from slimkit.recipe.schema.fields import REFERENCE, OneOf, TypedBy
from slimkit.recipe.schema.methods import MethodField
from slimkit.recipe.stages.interface import Stage
from slimkit.train.settings import TrainSettings

__all__ = ["Effective", "essence"]

Mark = OneOf | TypedBy
_WITHOUT_EFFECT: dict[str, type[BaseModel]] = {
    "teacher": Stage,
    "log_every": TrainSettings,
    "device": TrainSettings,
}
"""Fields that no result depends on → of which class. The key of a teacher stands for its name."""
_LATER: dict[str, type[BaseModel]] = {"minutes": TrainSettings}
"""Fields that came later: not there as long as they are None, so that keys stay what they were."""
_reference = re.compile(REFERENCE)


def essence(value: Any) -> Any:
    """All settings in ``value`` as JSON-able values, defaults written out."""
    return Effective().read(value)


class Effective:
    """Reads settings, and collects the classes, functions and names of such that they mention.

    Attributes:
        mentions: objects, and strings of the form ``package.module:name``, as they were met.
    """

    def __init__(self) -> None:
        self.mentions: list[object] = []

    def field(self, settings: BaseModel, name: str) -> Any:
        """One field of ``settings``, read as the registries say that its type names."""
        return self.read(getattr(settings, name), _marks(type(settings)).get(name, ()))

    def read(self, value: Any, marks: tuple[Mark, ...] = ()) -> Any:
        """``value`` as JSON-able values.

        Args:
            value: settings, or a part of them.
            marks: registries that strings in it are names in.
        """
        for kinds, read in self._readers():
            if isinstance(value, kinds):
                return read(value, marks)
        self.mentions.append(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._dataclass(value)
        if callable(value):
            return f"{value.__module__}:{getattr(value, '__qualname__', type(value).__qualname__)}"
        return str(value)

    def _readers(self) -> tuple[tuple[Any, Callable[[Any, tuple[Mark, ...]], Any]], ...]:
        """Kinds of values → how they are read; the first that fits counts."""
        return (
            (enum.Enum, lambda value, marks: self.read(value.value, marks)),
            (str, self._string),
            (bool | int | None, lambda value, _: value),
            # 10 in the code of a default is 10.0 when a recipe says it
            (float, lambda value, _: int(value) if value.is_integer() else value),
            (BaseModel, lambda value, _: self._model(value)),
            (Mapping, self._mapping),
            (list | tuple, lambda value, marks: [self.read(item, marks) for item in value]),
            (set | frozenset, self._set),
            (PurePath, lambda value, _: str(value)),
        )

    def _string(self, value: str, marks: tuple[Mark, ...]) -> Any:
        for mark in marks:
            try:
                named = (
                    mark.method(value)
                    if isinstance(mark, MethodField)
                    else mark.registry.get(value)
                )
            except SlimkitError:
                continue
            self.mentions += [named] if ":" not in value else [value, named]
            if isinstance(mark, MethodField):
                return self._method(mark, value)
        if _reference.match(value):
            self.mentions.append(value)
        return value

    def _method(self, mark: MethodField, name: str) -> Any:
        """A name alone is the method with its defaults."""
        settings = mark.settings_class(name)
        try:
            return {"type": name} if settings is None else self._model(settings())
        except ValidationError:  # it has no default for something: building it will say so
            return {"type": name}

    def _model(self, value: BaseModel) -> dict[str, Any]:
        self.mentions.append(type(value))
        kept = {
            name: self.field(value, name)
            for name in type(value).model_fields
            if not isinstance(value, _WITHOUT_EFFECT.get(name, ()))
            and not (isinstance(value, _LATER.get(name, ())) and getattr(value, name) is None)
        }
        return {**kept, **self._mapping(value.model_extra or {})}

    def _dataclass(self, value: Any) -> dict[str, Any]:
        fields = dataclasses.fields(value)
        read = {field.name: self.read(getattr(value, field.name)) for field in fields}
        return {"type": type(value).__qualname__, **read}

    def _mapping(self, value: Mapping[Any, Any], marks: tuple[Mark, ...] = ()) -> dict[str, Any]:
        for key in value:
            self.read(key)  # layers by the class of one's own, for instance
        return {str(key): self.read(item, marks) for key, item in value.items()}

    def _set(self, value: Any, marks: tuple[Mark, ...]) -> list[Any]:
        return sorted((self.read(item, marks) for item in value), key=json.dumps)


@functools.cache
def _marks(settings: type[BaseModel]) -> dict[str, tuple[Mark, ...]]:
    """Field → the registries that its type speaks of, wherever in the type."""
    return {
        name: (*_marked(tuple(field.metadata)), *_inside(field.annotation))
        for name, field in settings.model_fields.items()
    }


def _inside(annotation: Any) -> tuple[Mark, ...]:
    own = _marked(getattr(annotation, "__metadata__", ()))
    return (*own, *(mark for part in typing.get_args(annotation) for mark in _inside(part)))


def _marked(metadata: tuple[Any, ...]) -> tuple[Mark, ...]:
    return tuple(item for item in metadata if isinstance(item, OneOf | TypedBy))
