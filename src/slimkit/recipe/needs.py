"""What a recipe needs and is not there, told before anything else is done."""

from __future__ import annotations

from slimkit.errors import SlimkitError
from slimkit.models import find_checkpoint
from slimkit.recipe.schema.places import at
from slimkit.recipe.schema.recipe import Recipe

__all__ = ["check_needs"]


def check_needs(recipe: Recipe) -> None:
    """Make sure that data and checkpoints are there, in no time.

    Raises:
        DataError, ArtifactError: something is missing. Everything that is missing is in one
            message, with what the recipe says about where it comes from and how long it takes.
    """
    missing = _missing(recipe)
    if not missing:
        return
    first, *others = missing
    lines = [first.message, *(f"  {other.where}: {other.message}" for other in others)]
    if recipe.needs:
        lines += [f"{recipe.name} needs", *(f"  {k}: {v}" for k, v in recipe.needs.items())]
    if recipe.takes:
        lines.append(f"It takes {recipe.takes.strip()}.")
    lines.append("Every stage runs on made-up data, for a try, with --smoke.")
    hint = first.hint
    if hint and len(lines) > 1:
        lines[0] += f" ({hint})"
    raise type(first)("\n".join(lines), where=first.where)


def _missing(recipe: Recipe) -> list[SlimkitError]:
    found: list[SlimkitError] = []
    told: set[str] = set()
    places = {"model": recipe.model}
    places |= {f"teachers.{name}": settings for name, settings in recipe.teachers.items()}
    try:
        with at("data"):
            recipe.task.locate(recipe.data)
    except SlimkitError as error:
        found.append(error)
    for place, settings in places.items():
        try:
            with at(f"{place}.checkpoint"):
                if settings.checkpoint is not None and settings.checkpoint not in told:
                    told.add(settings.checkpoint)
                    find_checkpoint(settings.checkpoint)
        except SlimkitError as error:
            found.append(error)
    return found
