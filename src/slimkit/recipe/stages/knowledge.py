"""Knowledge in recipes: a stage that learns from teachers elsewhere, and those teachers themselves.

pyarrow is imported when a stage uses knowledge, not when a recipe is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.errors import RecipeError, nearest
from slimkit.recipe.keys import file_hash
from slimkit.recipe.schema.fields import wrong
from slimkit.recipe.schema.links import full_link, link_problem
from slimkit.recipe.schema.places import at
from slimkit.recipe.stages.interface import StageContext

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimkit.distill.knowledge import KnowledgeDistiller, NetworkTeacher, Source
    from slimkit.inputs import Inputs
    from slimkit.recipe.schema.recipe import Recipe
    from slimkit.recipe.stages.teachers import DistillOptions
    from slimkit.tasks.data import ImageSplits
    from slimkit.tasks.splits import Splits

__all__ = ["check_place", "knowing", "knowledge_facts", "recipe_teacher"]

_SCHEMES = ("file", "grpc", "grpc+tls")


def check_place(place: str, path: str) -> None:
    """Make sure that a place of knowledge is written as one.

    Raises:
        PydanticCustomError: with its path and the nearest way to write it.
    """
    scheme, _, rest = place.partition(":")
    if scheme not in _SCHEMES or not rest or (scheme != "file" and not rest.startswith("//")):
        raise wrong(
            f"{place!r} is no place for knowledge",
            f"{nearest(scheme, _SCHEMES)} Write file:DIR, grpc://host:port or grpc+tls://host:port",
            path=path,
        )


def knowledge_facts(places: Sequence[str]) -> Mapping[str, Any]:
    """What a stage's result depends on: contents of files, and addresses as they are written."""
    if not places:
        return {}
    known: list[str | None] = []
    for place in places:
        index = Path(place.removeprefix("file:")) / "index.json"
        local = place.startswith("file:") and index.is_file()
        known.append(file_hash(str(index)) if local else place)
    return {"knowledge": known}


@contextlib.contextmanager
def knowing(
    model: nn.Module, options: DistillOptions, context: StageContext
) -> Iterator[KnowledgeDistiller]:
    """The stage's knowledge as an extra loss for :func:`slimkit.train.fit`.

    A smoke run has synthetic images, of which no teacher knows: a stand-in answers.
    """
    from slimkit.distill.knowledge import Knowledge, KnowledgeDistiller

    splits = numbered(context.splits)
    example = context.examples(2)
    sources: Sequence[str | Source] = options.knowledge
    if context.max_steps is not None:
        sources = [_StandIn(model, options, example)] * len(options.knowledge)
    with contextlib.ExitStack() as stack:
        with at("knowledge"):
            knowledge = stack.enter_context(Knowledge(sources, merge=options.merge))
            knowledge.check_data(splits.samples_fingerprint, splits.classes)
        with at("distill"):
            distiller = KnowledgeDistiller(
                model, knowledge, options.distill, splits.train, example_inputs=example
            )
        yield stack.enter_context(distiller)


def numbered(splits: Splits) -> ImageSplits:
    """Data whose training samples are found by their numbers, here and on a teacher's machine.

    Raises:
        RecipeError: the task's are not.
    """
    from slimkit.tasks.data import ImageSplits

    if not isinstance(splits, ImageSplits):
        raise RecipeError(
            "knowledge is about images that have numbers; the samples of this task have none",
            where="knowledge",
            hint="name a teacher in its place",
        )
    return splits


class _StandIn:
    """Answers with random numbers in the student's own shapes."""

    def __init__(self, model: nn.Module, options: DistillOptions, example: Inputs) -> None:
        from slimkit.distill.knowledge import KeySpec, KnowledgeSchema
        from slimkit.distill.knowledge.distilling import LayerSkeleton
        from slimkit.distill.knowledge.format.schema import LOGITS
        from slimkit.distill.loss_terms import NetworkComparison
        from slimkit.distill.recording.recorder import Recorder, probing, run
        from slimkit.distill.recording.records import OUTPUT

        named = [loss.teacher for loss in options.distill if isinstance(loss.teacher, str)]
        outline = LayerSkeleton([name for name, _ in model.named_modules() if name] + named)
        terms = NetworkComparison(list(enumerate(options.distill)), model, outline).terms
        taps = {term.taps["student"] for term in terms}
        recorder = Recorder(model, [OUTPUT, *taps])
        with probing(model):
            run(model, example, who="student")
        shapes = {LOGITS: tuple(recorder.records[OUTPUT].shape[1:])}
        for term in terms:
            for name, tap in term.taps.items():
                if term.sides[name] == "teacher":
                    own = recorder.records[term.taps["student"].key]
                    shapes.setdefault(tap.key or LOGITS, tuple(own.shape[1:]))
        recorder.close()
        self.name = "stand-in"
        self.schema = KnowledgeSchema(
            keys=tuple(KeySpec(name=key, shape=shape) for key, shape in shapes.items())
        )

    def stream(
        self, questions: Iterable[Any], number: int, names: Sequence[str]
    ) -> Iterator[dict[str, Tensor]]:
        import torch

        generator = torch.Generator().manual_seed(number)
        for question in questions:
            yield {
                key.name: torch.randn(len(question.ids), *key.shape, generator=generator)
                for key in self.schema.keys
                if key.name in names
            }

    def close(self) -> None:
        pass


def recipe_teacher(recipe: Recipe, name: str | None = None, **options: Any) -> NetworkTeacher:
    """A teacher for the students of a recipe: its data, its seed, one of its networks.

    Args:
        recipe: of the student.
        name: under ``teachers:``, or of a stage, whose result then teaches (from the cache, or
            run now); None takes the only one under ``teachers:``.
        **options: of :class:`slimkit.distill.knowledge.NetworkTeacher`.

    Raises:
        RecipeError: there is no such teacher, or several and no name.
        SlimkitError: data, network or checkpoint are wrong.
    """
    from slimkit.distill.knowledge import NetworkTeacher
    from slimkit.recipe.cache import Cache
    from slimkit.recipe.chains import teacher_chain
    from slimkit.recipe.workbench import Workbench
    from slimkit.tasks.data.samples import training_samples

    if name is None:
        if len(recipe.teachers) != 1:
            raise RecipeError(
                f"the recipe has {len(recipe.teachers)} teachers: name one",
                where="teachers",
                hint=nearest("", [*recipe.teachers, *recipe.stages]),
            )
        (name,) = recipe.teachers
    problem = link_problem(name, recipe.stages, others=recipe.teachers)
    if name not in recipe.teachers and problem is not None:
        raise RecipeError(problem[0], where="teachers", hint=problem[1])
    bench = Workbench(recipe, Cache(None))
    if name in recipe.teachers:
        network = bench.build(recipe.teachers[name], f"teachers.{name}")
    else:
        link = full_link(name, recipe.stages)
        chain = teacher_chain(recipe, link, (link,))
        bench.expect(chain)
        network = bench.result(chain)
    samples = training_samples(numbered(bench.splits), seed=recipe.seed)
    return NetworkTeacher(network, samples, name=name, **options)
