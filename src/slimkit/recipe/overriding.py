"""``--set path=value``: a recipe's plain values, changed one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from slimkit.errors import RecipeError, SlimkitError, nearest
from slimkit.recipe.schema.recipe import Recipe
from slimkit.recipe.stages.interface import STAGES
from slimkit.recipe.yaml_text import MOST_LEVELS, parse_yaml

__all__ = ["override"]

_OPEN = {"stages", "teachers", "variants", "model.args"}  # mappings whose keys the user chooses


def override(values: dict[str, Any], overrides: Sequence[str], tell: Callable[[str], None]) -> None:
    """Change ``values`` in place.

    Where settings of a stage exclude each other (:attr:`Stage.exclusive`), the one that is set
    takes the place of the others, unless they were set by an override, too.

    Args:
        values: of the whole recipe.
        overrides: ``"path=value"``; values are YAML.
        tell: is told which settings of the recipe had to go.

    Raises:
        RecipeError: a path that leads nowhere, or a value that is no YAML.
    """
    given = [_set(values, text) for text in overrides]
    for keys, text in zip(given, overrides, strict=True):
        if len(keys) != 3 or keys[0] != "stages":
            continue
        stage = values["stages"][keys[1]]
        for other in _excluded(stage, keys[2]):
            if [*keys[:2], other] not in given:
                gone = stage.pop(other)
                tell(f"--set {text} takes the place of {'.'.join(keys[:2])}.{other}={gone}")


def _excluded(stage: dict[str, Any], key: str) -> list[str]:
    """Settings of a stage that cannot be there beside the value of ``key``."""
    if stage.get(key) is None:
        return []
    try:
        groups = STAGES.get(str(stage.get("type"))).exclusive
    except SlimkitError:  # told when the recipe is read
        return []
    others = {name for group in groups if key in group for name in group} - {key}
    return [name for name in stage if name in others and stage[name] is not None]


def _set(values: dict[str, Any], text_given: str) -> list[str]:
    """Set one ``path=value`` in ``values`` → the keys of its path."""
    path, equals, text = text_given.partition("=")
    keys = [key for key in re.split(r"[.\[\]]+", path.strip()) if key]
    if len(keys) > MOST_LEVELS:
        raise RecipeError(f"a path has at most {MOST_LEVELS} keys, not {len(keys)}", where="--set")
    if not equals or not keys:
        raise RecipeError(
            f"expected path=value, got {text_given!r}",
            where="--set",
            hint="for example stages.prune.macs=0.5",
        )
    value = parse_yaml(text, where=f"--set {path}")
    target: Any = values
    for depth, key in enumerate(keys[:-1]):
        target = _child(target, key, ".".join(keys[:depth]), path, last=False)
    _child(target, keys[-1], ".".join(keys[:-1]), path, last=True, value=value)
    return keys


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
