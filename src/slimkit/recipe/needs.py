"""What a recipe needs and is not there, told before anything else is done."""

from __future__ import annotations

from slimkit.errors import SlimkitError
from slimkit.models import find_checkpoint
from slimkit.recipe.schema.links import stage_of
from slimkit.recipe.schema.places import at
from slimkit.recipe.schema.recipe import Recipe

__all__ = ["check_needs", "untrained"]

_OURS = ("slimkit:", "torchvision:", "timm:")
"""Sources of networks whose weights are random unless arguments or a checkpoint say otherwise."""
_WEIGHTS = frozenset({"weights", "pretrained", "checkpoint_path"})
"""Arguments of such networks that bring weights."""


def untrained(recipe: Recipe) -> str | None:
    """A sentence about variants that start from random weights without training; None for none."""
    model = recipe.model
    given = model.checkpoint is not None or _WEIGHTS & set(model.args)
    if given or not model.name.startswith(_OURS):
        return None
    names = [
        name
        for name, chain in recipe.variants.items()
        if not any(recipe.stages[stage_of(link)].training_epochs() for link in chain)
    ]
    if not names:
        return None
    return (
        f"the weights of {model.name} are random: no checkpoint was given, and "
        f"{', '.join(names)} trains nothing, so that its metrics mean nothing"
    )


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
