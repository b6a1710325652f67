"""What pydantic found wrong with a recipe, told in the words of the recipe."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from slimkit.errors import RecipeError, SlimkitError, nearest
from slimkit.recipe.schema.fields import SettingsOf
from slimkit.recipe.schema.recipe import Recipe

__all__ = ["explain_problems"]

_EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a text",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def explain_problems(error: ValidationError, data: Mapping[str, Any]) -> RecipeError:
    """One error for all mistakes: each with its path, what was expected, the nearest choice.

    Args:
        error: from validating ``data`` as a :class:`Recipe`.
        data: what was validated.
    """
    found: dict[str, tuple[str, str | None]] = {}
    for problem in error.errors():
        if problem["type"] == "too_short" and problem["input"]:
            continue  # its entries are wrong, and told themselves
        path, message, hint = _explain(problem, data)
        if path in found and problem["type"] != "extra_forbidden":
            earlier, earlier_hint = found[path]  # the branches of a union complain one by one
            if message not in earlier:
                message = f"{earlier}, or {message.removeprefix('expected ')}"
            else:
                message = earlier
            hint = hint or earlier_hint
        found[path] = (message, hint)
    items = [(path, *told) for path, told in found.items()]
    path, message, hint = items[0]
    if len(items) == 1:
        return RecipeError(message, where=path or None, hint=hint)
    lines = [f"  {RecipeError(m, where=p or None, hint=h)!s}" for p, m, h in items]
    return RecipeError(f"the recipe has {len(items)} mistakes:\n" + "\n".join(lines))


def _explain(problem: Any, data: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """Path, message and hint of one of pydantic's line errors."""
    keys, owner = _locate(problem["loc"], data)
    kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "slimkit":
        path = ".".join(filter(None, [*keys, context["path"]]))
        return path, context["message"], context["hint"] or None
    message, hint = f"{problem['msg']}, got {_short(given)}", None
    if kind == "extra_forbidden":
        message, hint = f"unknown key {keys[-1]!r}", nearest(keys[-1], owner)
    elif kind == "missing":
        message = "this setting is required"
    elif kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        message = f"expected {context['expected']}, got {given!r}"
        hint = nearest(str(given), choices)
    elif kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        message = f"expected {words} {context[name]:g}, got {given!r}"
    elif kind in _EXPECTED:
        message = f"expected {_EXPECTED[kind]}, got {_short(given)}"
    elif kind == "string_pattern_mismatch":
        message, hint = f"{given!r} is not a name", "use letters, digits, _ and -"
    elif kind == "too_short":
        message, hint = "it is empty", "name at least one"
    elif isinstance(context.get("error"), SlimkitError):
        message, hint = context["error"].message, context["error"].hint
    elif isinstance(context.get("error"), Exception):
        message = str(context["error"])
    return ".".join(keys), message, hint


def _short(value: object) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _locate(location: tuple[Any, ...], data: Any) -> tuple[list[str], list[str]]:
    """Path of a problem as the user would write it, and the keys that its mapping could have.

    Pydantic mixes names of union branches and ``[key]`` into its locations; they are recognised
    by walking the annotations and the data along with them.
    """
    keys: list[str] = []
    owner: list[str] = []
    whole = data
    annotation: Any = Recipe
    for part in location:
        if part == "[key]":
            continue
        settings = _settings_class(annotation, data, whole)
        if settings is not None:
            owner = list(settings.model_fields)
            field = settings.model_fields.get(str(part))
            if field is None and not (isinstance(data, Mapping) and part in data):
                continue
            annotation = _annotation_of(field) if field is not None else None
        else:
            item = _item_annotation(annotation)
            if not isinstance(part, int) and not (isinstance(data, Mapping) and part in data):
                continue  # a branch of a union
            annotation, owner = item, []
        keys.append(str(part))
        data = _item(data, part)
    return keys, owner


def _annotation_of(field: FieldInfo) -> Any:
    """The annotation with its marks, which pydantic keeps apart."""
    if not field.metadata:
        return field.annotation
    return Annotated[field.annotation, *field.metadata]


def _item(data: Any, part: Any) -> Any:
    if isinstance(data, Mapping):
        return data.get(part)
    if isinstance(data, list | tuple) and isinstance(part, int) and part < len(data):
        return data[part]
    return None


def _settings_class(annotation: Any, data: Any, whole: Any) -> type[BaseModel] | None:
    """The settings class that reads a mapping at this place of the whole, if one does."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *marks = get_args(annotation)
        for mark in marks:
            found: type[BaseModel] | None
            if isinstance(mark, SettingsOf):
                return mark.settings_class_in(whole)
            if hasattr(mark, "settings_class"):
                name = data.get("type") if isinstance(data, Mapping) else None
                found = mark.settings_class(str(name))
                return found
        return _settings_class(inner, data, whole)
    if origin in (Union, types.UnionType):
        classes = (_settings_class(choice, data, whole) for choice in get_args(annotation))
        return next((c for c in classes if c is not None), None)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _item_annotation(annotation: Any) -> Any:
    """What the values of a mapping or list are annotated as."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (dict, tuple, list):
        arguments = [a for a in get_args(annotation) if a is not Ellipsis]
        return arguments[-1] if arguments else None
    return None
