"""Fields of recipes that choose a method, with or without its own settings.

A criterion or an allocation is a frozen dataclass: its fields are its settings. A recipe writes
the name alone, or a mapping with the name as its ``type``::

    allocation: sensitivity
    allocation: {type: sensitivity, ratios: [0.25, 0.5, 0.75]}

What only a running stage has (training batches, a file to resume from) is no setting: the stage
adds it when it builds the method.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, TypeAdapter, create_model
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema

from slimkit.errors import SlimkitError, nearest
from slimkit.recipe.schema.fields import REFERENCE, TypedBy, wrong
from slimkit.registry import import_object

__all__ = ["MethodField", "build_method"]


class MethodField(TypedBy):
    """A method by its name, or a mapping whose ``type`` names it beside its settings.

    The value is the name, or a pydantic object whose fields are those of the method.

    Args:
        reference: the registry of methods that need nothing, ``"package.module:REGISTRY"``.
        more: name → ``"package.module:Class"`` of methods that a stage has to complete.
        given: fields that the stage fills in, which a recipe cannot set.
    """

    def __init__(
        self,
        reference: str,
        more: Mapping[str, str] | None = None,
        *,
        given: Collection[str] = (),
    ) -> None:
        super().__init__(reference)
        self.more = dict(more or {})
        self.given = frozenset(given)

    def names(self) -> list[str]:
        """Every name that a recipe can write."""
        return sorted({*self.registry.names(), *self.more})

    def method(self, name: str) -> Any:
        """The class or the object behind a name.

        Raises:
            UnknownNameError: with the nearest names.
        """
        if name in self.more:
            return import_object(self.more[name])
        try:
            return self.registry.get(name)
        except SlimkitError as error:
            if ":" in name:
                raise
            hint = nearest(name, self.names())
            raise type(error)(error.message, where=error.where, hint=hint) from error

    def settings_class(self, name: str) -> type[BaseModel] | None:
        """The settings of the method called ``name``; None if there is no such method."""
        try:
            method = self.method(name)
        except SlimkitError:
            return None
        return _settings_class(name, _Hashed(method), self.given)

    def _read(self, value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        mapping = isinstance(value, Mapping)
        name = value.get("type") if mapping else value
        if not isinstance(name, str):
            kind = self.registry.kind
            raise wrong(
                f"expected the name of a {kind}, or a mapping with its type, got {value!r}",
                nearest("", self.names()),
            )
        try:
            method = self.method(name)
        except SlimkitError as error:
            raise wrong(error.message, error.hint, path="type" if mapping else None) from error
        if not mapping:
            return name
        settings = _settings_class(name, _Hashed(method), self.given)
        return settings.model_validate({k: v for k, v in value.items() if k != "type"})

    def _write(self, value: Any) -> Any:
        if isinstance(value, str):
            return value
        return {"type": value.type, **value.model_dump(mode="json", exclude={"type"})}

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        reference = {"type": "string", "pattern": REFERENCE}
        choices: list[JsonSchemaValue] = [
            {"enum": self.names()},
            {**reference, "description": "package.module:attribute"},
        ]
        for name in self.names():
            settings = self.settings_class(name)
            if settings is not None:
                found = handler(settings.__pydantic_core_schema__)
                handler.resolve_ref_schema(found)["required"] = ["type"]
                choices.append(found)
        own = {"type": "object", "properties": {"type": reference}, "required": ["type"]}
        return {"anyOf": [*choices, own]}


def build_method(mark: MethodField, choice: str | BaseModel, given: Mapping[str, Any]) -> Any:
    """The method that a recipe chose.

    Args:
        mark: of the field.
        choice: its value.
        given: what the stage fills in; only fields that the method has are used.

    Returns:
        An object to call; a function is returned as it is.
    """
    name = choice if isinstance(choice, str) else str(getattr(choice, "type", ""))
    method = mark.method(name)
    if not dataclasses.is_dataclass(method):
        return method
    own = {f.name for f in dataclasses.fields(method) if f.init}
    values = {key: value for key, value in given.items() if key in own and key in mark.given}
    if isinstance(choice, BaseModel):
        values |= {key: value for key, value in choice if key != "type"}
    if isinstance(method, type):
        return method(**values)
    return dataclasses.replace(method, **values)


@dataclasses.dataclass(frozen=True)
class _Hashed:
    """A method as a key of a cache, by identity: some dataclasses have no hash."""

    method: Any = dataclasses.field(compare=False)
    identity: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", id(self.method))


@functools.cache
def _settings_class(name: str, held: _Hashed, given: frozenset[str]) -> type[BaseModel]:
    """A pydantic class with the fields of a dataclass that plain values can fill."""
    method = held.method
    kind = method if isinstance(method, type) else type(method)
    fields: dict[str, Any] = {"type": (typing.Literal[name], name)}
    for field, annotation in _plain_fields(kind, given):
        default = _default(field) if isinstance(method, type) else getattr(method, field.name)
        fields[field.name] = (annotation, default)
    return create_model(
        name,
        __config__=ConfigDict(extra="forbid", frozen=True),
        __doc__=inspect.cleandoc(kind.__doc__ or "") if dataclasses.is_dataclass(kind) else "",
        __module__=kind.__module__,
        **fields,
    )


def _plain_fields(
    kind: type, given: frozenset[str]
) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a dataclass that JSON can fill, with their types."""
    if not dataclasses.is_dataclass(kind):
        return
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.init and field.name not in given:
            annotation = _plain_part(hints[field.name])
            if annotation is not None:
                yield field, annotation


def _plain_part(annotation: Any) -> Any:
    """What of a type JSON can hold, sequences as tuples; None if that is nothing."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [_plain_part(m) for m in members if m is not type(None)]
        parts = [part for part in parts if part is not None]
        if parts and type(None) in members:
            parts.append(None)
        return typing.Union[tuple(parts)] if parts else None  # noqa: UP007 - of a list
    if origin is Sequence:
        item = _plain_part(members[0])
        return None if item is None else types.GenericAlias(tuple, (item, ...))
    try:
        TypeAdapter(annotation).json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError):
        return None
    return annotation


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ...
