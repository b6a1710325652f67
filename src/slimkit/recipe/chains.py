"""Which stage runs on what: variants and teachers resolved into steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slimkit.errors import RecipeError
from slimkit.recipe.schema.recipe import Recipe
from slimkit.recipe.stages.interface import UNPRUNED, Stage

__all__ = ["Chain", "Step", "check_teachers", "resolve_steps", "teacher_chain"]

Chain = tuple[str, ...]
"""Stage names from the recipe's model on; a stage's place in it is what a result depends on."""


@dataclass(frozen=True)
class Step:
    """One stage at its place in a chain.

    Attributes:
        chain: the stages up to and including this one.
        settings: of the stage.
        teachers: name of a teacher → the chain whose result it is, or None for a network
            under ``teachers:``.
    """

    chain: Chain
    settings: Stage
    teachers: Mapping[str, Chain | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The stage's name in the recipe."""
        return self.chain[-1]

    @property
    def parent(self) -> Chain:
        """What it runs on; empty for the recipe's model itself."""
        return self.chain[:-1]


def resolve_steps(recipe: Recipe) -> dict[Chain, Step]:
    """All steps that the variants need, each once, in an order in which they can run."""
    steps: dict[Chain, Step] = {}

    def visit(chain: Chain) -> None:
        if not chain or chain in steps:
            return
        visit(chain[:-1])
        settings = recipe.stages[chain[-1]]
        teachers: dict[str, Chain | None] = {}
        for name, place in settings.teacher_names().items():
            teachers[name] = None
            if name not in recipe.teachers:
                teachers[name] = found = teacher_chain(recipe, name, chain, place)
                visit(found)
        steps[chain] = Step(chain, settings, teachers)

    for variant in recipe.variants.values():
        visit(variant)
    return steps


def teacher_chain(recipe: Recipe, teacher: str, chain: Chain, place: str = "teacher") -> Chain:
    """The chain whose result teaches the last stage of ``chain``.

    Args:
        recipe: of both.
        teacher: name of a stage, which runs on the recipe's model when no variant has it; or
            ``unpruned`` for what the first pruning stage of ``chain`` began with.
        chain: of the student.
        place: where in the stage the teacher is named, for the error.

    Raises:
        RecipeError: several variants run the stage on different things, or nothing in
            ``chain`` prunes.
    """
    where = f"stages.{chain[-1]}.{place}"
    if teacher == UNPRUNED and teacher not in recipe.stages:
        for position, stage in enumerate(chain[:-1]):
            if recipe.stages[stage].type == "prune":
                return chain[:position]
        raise RecipeError(
            f"no stage of {' → '.join(chain)} prunes before {chain[-1]}",
            where=where,
            hint="name a teacher, or a stage",
        )
    found: list[Chain] = []
    for other in recipe.variants.values():
        if teacher in other:
            prefix = other[: other.index(teacher) + 1]
            if prefix not in found:
                found.append(prefix)
    if len(found) > 1:
        shown = " and ".join(" → ".join(prefix) for prefix in found[:3])
        raise RecipeError(
            f"{teacher!r} has several results: {shown}",
            where=where,
            hint="give the stage that shall teach a name of its own",
        )
    return found[0] if found else (teacher,)


def check_teachers(recipe: Recipe) -> None:
    """Make sure that no stage waits for its own result.

    Raises:
        RecipeError: ambiguous teacher, or a cycle, which is shown.
    """
    done: set[Chain] = set()

    def visit(chain: Chain, waiting: tuple[Chain, ...]) -> None:
        if not chain or chain in done:
            return
        if chain in waiting:
            cycle = [link[-1] for link in waiting[waiting.index(chain) :]] + [chain[-1]]
            raise RecipeError(
                f"a cycle: {' waits for '.join(cycle)}",
                where=f"stages.{chain[-1]}.teacher",
                hint="a teacher must not depend on its student",
            )
        path = (*waiting, chain)
        visit(chain[:-1], path)
        for name, place in recipe.stages[chain[-1]].teacher_names().items():
            if name not in recipe.teachers:
                visit(teacher_chain(recipe, name, chain, place), path)
        done.add(chain)

    for variant in recipe.variants.values():
        visit(variant, ())
