"""From YAML text and ``--set`` overrides to a checked recipe, with errors that name the path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

import slimkit
from slimkit.artifact import PathLike
from slimkit.errors import RecipeError, nearest
from slimkit.recipe.schema.explaining import explain_problems
from slimkit.recipe.schema.recipe import Recipe
from slimkit.recipe.yaml_text import MOST_BYTES, MOST_LEVELS, parse_yaml

__all__ = ["dump_recipe", "load_recipe", "parse_recipe"]

_OPEN = {"stages", "teachers", "variants", "model.args"}  # mappings whose keys the user chooses


def load_recipe(path: PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file, or the name of a recipe that comes with Slimkit (``quickstart``).
        overrides: ``"stages.prune.macs=0.5"`` …, as given to ``--set``; values are YAML.

    Raises:
        RecipeError: not readable, not YAML, or not a valid recipe; all mistakes in one message.
    """
    source = find_recipe(path)
    try:
        with source.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        text = content[:MOST_BYTES].decode("utf-8")
    except OSError as error:
        raise RecipeError(
            f"cannot read the recipe: {error.strerror or error}", where=str(source)
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe is not UTF-8 text: {error}", where=str(source)) from error
    if len(content) > MOST_BYTES:
        raise RecipeError(f"it has more than {MOST_BYTES} bytes", where=str(source))
    data = parse_yaml(text, where=str(source))
    return parse_recipe(data, overrides)


def find_recipe(path: PathLike) -> Path:
    """The file that ``path`` names: itself, or a recipe that comes with Slimkit.

    Raises:
        RecipeError: there is none; with the nearest names.
    """
    given = Path(path)
    if given.exists():
        return given
    supplied: dict[str, Path] = {}
    package = Path(slimkit.__file__).parent
    for folder in (package / "recipes", package.parent.parent / "recipes"):
        for file in sorted(folder.rglob("*.yaml")):
            supplied.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
    name = given.with_suffix("").as_posix() if given.suffix == ".yaml" else given.as_posix()
    if name in supplied:
        return supplied[name]
    beside = [str(p) for p in given.parent.glob("[!.]*.y*ml")] if given.parent.is_dir() else []
    raise RecipeError(
        "there is no such recipe", where=str(given), hint=nearest(name, [*supplied, *beside])
    )


def parse_recipe(data: object, overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe that is given as plain values.

    Args:
        data: what the YAML says: mappings, lists, strings, numbers.
        overrides: as in :func:`load_recipe`.

    Raises:
        RecipeError: all mistakes, one a line, each with its path and the nearest valid choice.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"a recipe is a mapping, this is {type(data).__name__}",
            hint="start with name:, data:, model:, stages: and variants:",
        )
    values = _plain(data)
    for override in overrides:
        _override(values, override)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise explain_problems(error, values) from error
    from slimkit.recipe.chains import check_teachers

    check_teachers(recipe)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every default written out. Reads back as an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=96)


def _plain(value: Any, level: int = 0) -> Any:
    """A deep copy of mappings and lists with string keys, so that overrides can edit it."""
    if level > MOST_LEVELS:
        raise RecipeError(f"mappings and lists are nested at most {MOST_LEVELS} deep")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, level + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, level + 1) for item in value]
    return value


def _override(values: dict[str, Any], override: str) -> None:
    """Set one ``path=value`` in ``values``."""
    path, equals, text = override.partition("=")
    keys = [key for key in re.split(r"[.\[\]]+", path.strip()) if key]
    if len(keys) > MOST_LEVELS:
        raise RecipeError(f"a path has at most {MOST_LEVELS} keys, not {len(keys)}", where="--set")
    if not equals or not keys:
        raise RecipeError(
            f"expected path=value, got {override!r}",
            where="--set",
            hint="for example stages.prune.macs=0.5",
        )
    value = parse_yaml(text, where=f"--set {path}")
    target: Any = values
    for depth, key in enumerate(keys[:-1]):
        target = _child(target, key, ".".join(keys[:depth]), path, last=False)
    _child(target, keys[-1], ".".join(keys[:-1]), path, last=True, value=value)


def _child(target: Any, key: str, parent: str, path: str, *, last: bool, value: Any = None) -> Any:
    """The value at ``key`` of ``target``; with ``last`` it is replaced by ``value``."""
    if isinstance(target, list):
        if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(target):
            raise RecipeError(
                f"{parent} has entries 0 to {len(target) - 1}, there is no {key!r}",
                where=f"--set {path}",
            )
        if last:
            target[int(key)] = value
        return target[int(key)]
    if not isinstance(target, dict):
        raise RecipeError(f"{parent} is {target!r}, it has no keys", where=f"--set {path}")
    if last:
        target[key] = value
        return value
    if target.get(key) is None:
        if parent in _OPEN:
            raise RecipeError(
                f"{parent} has no {key!r}", where=f"--set {path}", hint=nearest(key, target)
            )
        _check_top(key, parent, path)
        target[key] = {}
    return target[key]


def _check_top(key: str, parent: str, path: str) -> None:
    known: Iterable[str] = Recipe.model_fields
    if not parent and key not in known:
        raise RecipeError(
            f"there is no key {key!r}", where=f"--set {path}", hint=nearest(key, known)
        )
