"""From YAML text and ``--set`` overrides to a checked recipe, with errors that name the path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

import slimkit
from slimkit.artifact import PathLike
from slimkit.errors import RecipeError, nearest
from slimkit.recipe.overriding import override
from slimkit.recipe.schema.explaining import explain_problems
from slimkit.recipe.schema.recipe import Recipe
from slimkit.recipe.yaml_text import MOST_BYTES, MOST_LEVELS, parse_yaml

__all__ = ["dump_recipe", "load_recipe", "parse_recipe"]


def _untold(message: str) -> None:
    """For callers whom nothing need be told."""


def load_recipe(
    path: PathLike, overrides: Sequence[str] = (), *, tell: Callable[[str], None] = _untold
) -> Recipe:
    """Read a recipe file.

    A checkpoint is looked for beside the recipe first, then (when it is read) in the current
    folder and under ``$SLIMKIT_CHECKPOINTS``.

    Args:
        path: a YAML file, or the name of a recipe that comes with Slimkit (``quickstart``).
        overrides: ``"stages.prune.macs=0.5"`` …, as given to ``--set``; values are YAML. One of
            several settings that exclude each other, such as the targets of pruning, takes the
            place of the one that the file has.
        tell: is told what an override replaced beside its own setting.

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
    return _beside(parse_recipe(data, overrides, tell=tell), source.parent)


def _beside(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the paths of checkpoints that lie beside its file."""

    def found(settings: Any) -> Any:
        name = settings.checkpoint
        if name is None or Path(name).is_absolute() or not (folder / name).is_file():
            return settings
        return settings.model_copy(update={"checkpoint": str(folder / name)})

    teachers = {name: found(teacher) for name, teacher in recipe.teachers.items()}
    return recipe.model_copy(update={"model": found(recipe.model), "teachers": teachers})


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


def parse_recipe(
    data: object, overrides: Sequence[str] = (), *, tell: Callable[[str], None] = _untold
) -> Recipe:
    """Check a recipe that is given as plain values.

    Args:
        data: what the YAML says: mappings, lists, strings, numbers.
        overrides: as in :func:`load_recipe`.
        tell: likewise.

    Raises:
        RecipeError: all mistakes, one a line, each with its path and the nearest valid choice.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"a recipe is a mapping, this is {type(data).__name__}",
            hint="start with name:, data:, model:, stages: and variants:",
        )
    values = _plain(data)
    override(values, overrides, tell)
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
