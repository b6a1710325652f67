"""Field types of recipes whose valid values live in a registry.

:class:`OneOf` is a name in a registry (a criterion). :class:`TypedBy` is a mapping whose
``type`` selects the settings class that reads the rest (a stage, a distillation loss). Both
answer a mistake with the nearest valid name, at its own path in the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from slimkit.errors import SlimkitError, nearest
from slimkit.registry import Registry, import_object

__all__ = [
    "MOST_THREADS",
    "OneOf",
    "SettingsOf",
    "TypedBy",
    "registered_class",
    "type_reference",
    "wrong",
]

MOST_THREADS = 1024
"""Within one inference; a process of more fails, or starves everything else."""
REFERENCE = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"


def wrong(message: str, hint: str | None = None, *, path: str | None = None) -> PydanticCustomError:
    """The error that a validator raises so that the recipe's reader can show the hint.

    Args:
        message: what is wrong.
        hint: the nearest valid choice.
        path: path below the validated field, when that is more precise.
    """
    # the message goes through a template: braces in it would be taken for place-holders
    return PydanticCustomError(
        "slimkit", "{message}", {"message": message, "hint": hint or "", "path": path or ""}
    )


class OneOf:
    """A string that names an entry of a registry (or ``package.module:attribute``).

    Args:
        reference: where the registry is, ``"package.module:REGISTRY"``; imported when needed.
    """

    def __init__(self, reference: str) -> None:
        self.reference = reference

    @property
    def registry(self) -> Registry[Any]:
        """The registry itself."""
        registry = import_object(self.reference)
        assert isinstance(registry, Registry)
        return registry

    def _check(self, value: str) -> str:
        try:
            self.registry.get(value)
        except SlimkitError as error:
            raise wrong(error.message, error.hint) from error
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        # taken from the registry, so that what a user registered is in the schema too
        return {
            "anyOf": [
                {"enum": self.registry.names()},
                {"type": "string", "pattern": REFERENCE, "description": "package.module:attribute"},
            ]
        }


class TypedBy:
    """A settings object chosen by the ``type`` key among the classes of a registry.

    Args:
        reference: where the registry is, ``"package.module:REGISTRY"``.
        optional: None is a value, too.
        by_name: a name alone stands for settings at their defaults, and is written for them.
    """

    def __init__(self, reference: str, *, optional: bool = False, by_name: bool = False) -> None:
        self.reference = reference
        self.optional = optional
        self.by_name = by_name

    @property
    def registry(self) -> Registry[Any]:
        """The registry itself."""
        registry = import_object(self.reference)
        assert isinstance(registry, Registry)
        return registry

    def settings_class(self, name: str) -> type[BaseModel] | None:
        """The class that reads a mapping whose ``type`` is ``name``, if there is one."""
        try:
            found = self.registry.get(name)
        except SlimkitError:
            return None
        return found if isinstance(found, type) and issubclass(found, BaseModel) else None

    def _read(self, value: Any) -> Any:
        if isinstance(value, BaseModel) or (self.optional and value is None):
            return value
        if self.by_name and isinstance(value, str):
            value = {"type": value}
            try:
                registered_class(self.registry, value["type"])
            except PydanticCustomError as error:  # the path of a name is that of the field
                context = error.context or {}
                raise wrong(str(context["message"]), str(context["hint"]) or None) from error
        if not isinstance(value, Mapping):
            raise wrong(f"expected a mapping with a type, got {value!r}", "write {type: …}")
        settings = registered_class(self.registry, value.get("type"))
        # a class reached by package.module:Class has its own literal as its type
        literal = settings.model_fields["type"].default
        return settings.model_validate({**value, "type": literal})

    def _write(self, value: BaseModel | None) -> dict[str, Any] | str | None:
        if value is None:
            return None
        name = type_reference(self.registry, value)
        if self.by_name and value == type(value).model_construct():
            return name
        return {"type": name, **_without_type(value.model_dump(mode="json"))}

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._read,
            serialization=core_schema.plain_serializer_function_ser_schema(self._write),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        choices: list[JsonSchemaValue] = []
        for name in self.registry.names():
            settings = self.registry.get(name)
            reference = handler(settings.__pydantic_core_schema__)
            written = handler.resolve_ref_schema(reference)
            written["required"] = sorted({*written.get("required", ()), "type"})
            choices.append(reference)
        own = {
            "type": "object",
            "properties": {"type": {"type": "string", "pattern": REFERENCE}},
            "required": ["type"],
            "description": "a class of one's own, as package.module:Class",
        }
        alone: list[JsonSchemaValue] = [{"type": "null"}] if self.optional else []
        if self.by_name:
            alone += [{"enum": self.registry.names()}, {"type": "string", "pattern": REFERENCE}]
        return {"anyOf": [*choices, own, *alone]}


class SettingsOf:
    """A mapping that is read as another field of the same model says.

    Args:
        field: the one that decides; it stands before this one.
        attribute: of its value: the settings class.
        choices: how the deciding field is read, for the path of a mistake and the schema.
        default: what decides where the model says nothing.
    """

    def __init__(self, field: str, attribute: str, choices: TypedBy, *, default: str) -> None:
        self.field = field
        self.attribute = attribute
        self.choices = choices
        self.default = default

    def settings_class_in(self, whole: Any) -> type[BaseModel] | None:
        """The class that reads the mapping, where the raw values of the model are ``whole``."""
        chosen = whole.get(self.field) if isinstance(whole, Mapping) else None
        name = chosen.get("type") if isinstance(chosen, Mapping) else chosen
        owner = self.choices.settings_class(str(name or self.default))
        found: type[BaseModel] | None = getattr(owner, self.attribute, None)
        return found

    def _read(self, value: Any, info: core_schema.ValidationInfo) -> Any:
        decided = info.data.get(self.field)
        if decided is None:  # which is a mistake of its own
            return None
        settings: type[BaseModel] = getattr(decided, self.attribute)
        if isinstance(value, settings):
            return value
        if not isinstance(value, Mapping):
            raise wrong(f"expected a mapping, got {value!r}")
        return settings.model_validate(dict(value))

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._read,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: value.model_dump(mode="json")
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "object"}  # see conditions()

    def conditions(self) -> list[tuple[str, type[BaseModel]]]:
        """Name of every registered choice → the settings class that it asks for."""
        registry = self.choices.registry
        return [(name, getattr(registry.get(name), self.attribute)) for name in registry.names()]


def _without_type(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "type"}


def registered_class(registry: Registry[Any], name: object) -> type[BaseModel]:
    """The settings class called ``name``.

    Raises:
        PydanticCustomError: with the path ``type`` and the nearest names.
    """
    if not isinstance(name, str):
        raise wrong(
            f"the {registry.kind} is missing", nearest(str(name or ""), registry), path="type"
        )
    try:
        settings = registry.get(name)
    except SlimkitError as error:
        raise wrong(error.message, error.hint, path="type") from error
    if not (isinstance(settings, type) and issubclass(settings, BaseModel)):
        raise wrong(f"{name} is not a settings class", path="type")
    if "type" not in settings.model_fields or not settings.model_fields["type"].default:
        raise wrong(
            f"{name} has no default for its type",
            'write: type: Literal["name"] = "name"',
            path="type",
        )
    if lacking := sorted(getattr(settings, "__abstractmethods__", ())):
        raise wrong(f"{name} has no {', '.join(lacking)}", "write what it does", path="type")
    return settings


def type_reference(registry: Registry[Any], settings: BaseModel) -> str:
    """The registered name of a settings object, or ``package.module:Class``."""
    name = str(getattr(settings, "type", ""))
    if name in registry and registry.get(name) is type(settings):
        return name
    return f"{type(settings).__module__}:{type(settings).__qualname__}"
