"""Which stage runs on what: variants and teachers resolved into steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from slimkit.errors import RecipeError
from slimkit.recipe.schema.links import full_link, stage_of
from slimkit.recipe.schema.recipe import Recipe
from slimkit.recipe.stages.interface import ORIGINAL, UNPRUNED, Stage

__all__ = ["Chain", "ChainStep", "check_teachers", "of_stage", "resolve_steps", "teacher_chain"]

Chain = tuple[str, ...]
"""Stage names from the recipe's model on; a stage's place in it is what a result depends on.

Of a stage that leaves several networks a chain names one: ``search.small``.
"""


_BEGINNINGS = {
    UNPRUNED: ({"prune", "sparsify"}, "prunes, or makes sparse"),
    ORIGINAL: ({"prune", "sparsify", "ptq", "qat"}, "prunes, makes sparse or quantizes"),
}
"""Teachers that a chain has by itself → types of the stage that they begin, and what it does."""


@dataclass(frozen=True)
class ChainStep:
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
        return stage_of(self.chain[-1])

    @property
    def parent(self) -> Chain:
        """What it runs on; empty for the recipe's model itself."""
        return self.chain[:-1]

    @property
    def of_stage(self) -> Chain:
        """The chain as the stage runs it, whichever of its networks is taken."""
        return of_stage(self.chain)


def of_stage(chain: Chain) -> Chain:
    """A chain whose last link names the stage alone: its networks come of one run."""
    return (*chain[:-1], stage_of(chain[-1])) if chain else chain


def resolve_steps(recipe: Recipe, chains: Iterable[Chain] | None = None) -> dict[Chain, ChainStep]:
    """All steps that chains need, each once, in an order in which they can run.

    Args:
        recipe: of the chains.
        chains: those of the variants by default.
    """
    steps: dict[Chain, ChainStep] = {}

    def visit(chain: Chain) -> None:
        if not chain or chain in steps:
            return
        visit(chain[:-1])
        settings = recipe.stages[stage_of(chain[-1])]
        teachers: dict[str, Chain | None] = {}
        for name, place in settings.teacher_names().items():
            teachers[name] = None
            if name not in recipe.teachers:
                teachers[name] = found = teacher_chain(recipe, name, chain, place)
                visit(found)
        steps[chain] = ChainStep(chain, settings, teachers)

    for wanted in recipe.variants.values() if chains is None else chains:
        visit(wanted)
    return steps


def teacher_chain(recipe: Recipe, teacher: str, chain: Chain, place: str = "teacher") -> Chain:
    """The chain whose result teaches the last stage of ``chain``.

    Args:
        recipe: of both.
        teacher: name of a stage (or STAGE.PART), which runs on the recipe's model when no variant
            has it; or ``unpruned`` for what the first stage of ``chain`` began with that prunes
            or makes sparse, ``original`` for the first that compresses in any way.
        chain: of the student.
        place: where in the stage the teacher is named, for the error.

    Raises:
        RecipeError: several variants run the stage on different things, or nothing in
            ``chain`` prunes.
    """
    where = f"stages.{stage_of(chain[-1])}.{place}"
    if teacher in _BEGINNINGS and teacher not in recipe.stages:
        types, what = _BEGINNINGS[teacher]
        for position, stage in enumerate(chain):
            if recipe.stages[stage_of(stage)].type in types:
                return chain[:position]
        raise RecipeError(
            f"no stage of {' → '.join(chain)} {what}",
            where=where,
            hint="name a teacher, or a stage",
        )
    found: list[Chain] = []
    link = full_link(teacher, recipe.stages)
    for other in recipe.variants.values():
        names = [stage_of(each) for each in other]
        if stage_of(link) in names:  # whichever of its networks the variant goes on with
            prefix = (*other[: names.index(stage_of(link))], link)
            if prefix not in found:
                found.append(prefix)
    if len(found) > 1:
        shown = " and ".join(" → ".join(prefix) for prefix in found[:3])
        raise RecipeError(
            f"{teacher!r} has several results: {shown}",
            where=where,
            hint="give the stage that shall teach a name of its own",
        )
    return found[0] if found else (link,)


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
                where=f"stages.{stage_of(chain[-1])}.teacher",
                hint="a teacher must not depend on its student",
            )
        path = (*waiting, chain)
        visit(chain[:-1], path)
        for name, place in recipe.stages[stage_of(chain[-1])].teacher_names().items():
            if name not in recipe.teachers:
                visit(teacher_chain(recipe, name, chain, place), path)
        done.add(chain)

    for variant in recipe.variants.values():
        visit(variant, ())
