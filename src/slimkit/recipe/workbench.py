"""Running the steps of a recipe: build, look up in the cache, or do the work and file it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slimkit.errors import CheckpointError, SlimkitError
from slimkit.models import build_model, load_checkpoint
from slimkit.models.building import takes_argument
from slimkit.plan import load
from slimkit.recipe.cache import Cache
from slimkit.recipe.chains import Chain, ChainStep, of_stage, resolve_steps
from slimkit.recipe.keys import Keys
from slimkit.recipe.needs import check_needs
from slimkit.recipe.schema.links import part_of, stage_of
from slimkit.recipe.schema.places import at
from slimkit.recipe.schema.recipe import ModelSettings, Recipe
from slimkit.recipe.stages.interface import StageContext, StageResult, ignore_event
from slimkit.tasks.splits import first_batches
from slimkit.train import reestimate_batch_norm

if TYPE_CHECKING:
    from torch import nn

    from slimkit.inputs import Inputs
    from slimkit.tasks.splits import Splits

__all__ = ["Event", "StageRecord", "Workbench"]

Event = Callable[[Mapping[str, Any]], None]
SMOKE_STEPS = 2
_UNTRAINED: dict[str, dict[str, Any]] = {
    "torchvision": {"weights": None},
    "timm": {"pretrained": False},
}


@dataclass(frozen=True)
class StageRecord:
    """What is known of a finished stage.

    Attributes:
        key: in the cache.
        seconds: the work took, whenever it was done (its last part, if it was interrupted).
        cached: whether it was there already when this run came to it.
        extra: facts for the report.
    """

    key: str
    seconds: float
    cached: bool
    extra: Mapping[str, Any] = field(default_factory=dict)


class Workbench:
    """Everything that the stages of one run share.

    Args:
        recipe: what to run.
        cache: where results are kept.
        smoke: synthetic data, two steps per stage.
        progress: show progress bars.
        emit: is told what happens.
        log_dir: TensorBoard scalars go to a folder per stage in here; None for none.
    """

    def __init__(
        self,
        recipe: Recipe,
        cache: Cache,
        *,
        smoke: bool = False,
        progress: bool = False,
        emit: Event = ignore_event,
        log_dir: Path | None = None,
    ) -> None:
        self.recipe = recipe
        self.cache = cache
        self.smoke = smoke
        self.progress = progress
        self.emit = emit
        self.log_dir = log_dir
        self.task = recipe.task
        self.steps = resolve_steps(recipe)
        self._records: dict[Chain, StageRecord] = {}
        self._arguments: Mapping[str, Any] = {}
        if not smoke:
            check_needs(recipe)
        started = time.perf_counter()
        self.splits = self._load_data()
        self._arguments = self.task.model_arguments(self.splits)
        emit({"event": "data", "seconds": time.perf_counter() - started, **self.data_facts()})
        self.keys = Keys(recipe, self.steps, self.splits.fingerprint, smoke=smoke)

    @property
    def example_inputs(self) -> Inputs:
        """A call of the model with one sample."""
        return self.task.example_inputs(self.splits)

    def data_facts(self) -> dict[str, Any]:
        """What the report says about the data."""
        splits = self.splits
        validation = splits.validation.samples if splits.validation is not None else 0
        return {
            "source": "synthetic" if self.smoke else getattr(self.recipe.data, "source", "data"),
            "fingerprint": splits.fingerprint,
            "classes": list(splits.classes),
            "train": splits.train.samples,
            "validation": validation,
            "test": splits.test.samples,
            **splits.facts,
        }

    def check_models(self) -> None:
        """Build the model and the teachers once, so that a mistake in them shows at once.

        Raises:
            ModelError: a network does not fit the data.
            CheckpointError: a checkpoint does not fit its network.
        """
        self.build(self.recipe.model, "model")
        for name, settings in self.recipe.teachers.items():
            self.build(settings, f"teachers.{name}")

    def build(self, settings: ModelSettings, where: str) -> nn.Module:
        """A network with its first weights, the same every time.

        Raises:
            ModelError, UnknownNameError, CheckpointError: with the path in the recipe.
        """
        model = self._bare(settings, where)
        with at(where):
            self.task.check_head(model, self.splits)
        return model

    def expect(self, chain: Chain) -> None:
        """Prepare for a chain that no variant has."""
        self.steps.update(resolve_steps(self.recipe, [chain]))

    def result(self, chain: Chain) -> nn.Module:
        """The network that comes out of ``chain``; its stages are run if need be."""
        if not chain:
            return self.build(self.recipe.model, "model")
        key, part = self.record(chain).key, part_of(chain[-1])
        try:
            return self._load(key, part)
        except SlimkitError as error:
            if not self.record(chain).cached:
                raise
            stage = stage_of(chain[-1])
            self._discard(stage, key, str(error))
            del self._records[of_stage(chain)]
            return self._load(self.record(chain).key, part)

    def note(self, kind: str, key: str) -> Any:
        """A small JSON value in the cache, or None; a damaged one is told and counts as none."""
        return self.cache.note(kind, key, lambda problem: self.damaged(kind, key, problem))

    def damaged(self, kind: str, key: str, problem: str) -> None:
        """Tell that an entry of the cache, other than a stage, is damaged and is made again."""
        self.emit({"event": "damaged", "kind": kind, "key": key, "problem": problem})

    def _discard(self, stage: str, key: str, problem: str) -> None:
        self.emit({"event": "damaged", "stage": stage, "key": key, "problem": problem})
        self.cache.discard(key)

    def _load(self, key: str, part: str | None) -> nn.Module:
        self.cache.check_model(key, part)
        model = self._bare(self.recipe.model, "model", checkpoint=False)
        return load(self.cache.model_folder(key, part), model=model)

    def record(self, chain: Chain) -> StageRecord:
        """The record of the last stage of ``chain``, which is run unless it is cached."""
        known = of_stage(chain)  # of a stage that leaves several networks there is one record
        if known not in self._records:
            self._records[known] = self._look_up(chain) or self._run(self.steps[chain])
        return self._records[known]

    def ran(self, chain: Chain) -> StageRecord | None:
        """The record of the last stage of ``chain``, if it is known by now."""
        return self._records.get(of_stage(chain))

    def is_cached(self, chain: Chain) -> bool:
        """Whether the last stage of ``chain`` would be taken from the cache."""
        return self.cache.find(self.keys.stage(chain)) is not None

    def context(
        self, step: ChainStep, teachers: Mapping[str, nn.Module], work: Path | None
    ) -> StageContext:
        """What the stage of ``step`` gets to see."""
        name = step.name
        return StageContext(
            name=name,
            splits=self.splits,
            task=self.task,
            seed=self.recipe.seed,
            example_inputs=self.example_inputs,
            teacher=next(iter(teachers.values()), None),
            teachers=teachers,
            work=work,
            log_dir=self.log_dir / "-".join(step.of_stage) if self.log_dir else None,
            max_steps=SMOKE_STEPS if self.smoke else None,
            progress=self.progress,
            emit=lambda event: self.emit({"stage": name, **event}),
        )

    def preview_teachers(self, step: ChainStep) -> dict[str, nn.Module]:
        """The teachers of a step without their weights."""
        return {
            name: self.preview(chain)
            if chain is not None
            else self._bare(self.recipe.teachers[name], f"teachers.{name}", checkpoint=False)
            for name, chain in step.teachers.items()
        }

    def _bare(self, settings: ModelSettings, where: str, *, checkpoint: bool = True) -> nn.Module:
        arguments = dict(settings.args)
        if self.smoke:  # a smoke run downloads nothing and needs no files
            checkpoint = False  # its classes are made up: no file would fit them
            arguments |= _UNTRAINED.get(settings.name.partition(":")[0], {})
        if not arguments.get("weights"):
            for name, value in self._arguments.items():
                if takes_argument(settings.name, name):
                    arguments.setdefault(name, value)
        seed_everything(self.recipe.seed)
        with at(f"{where}.name", replacing=True):
            model = build_model(settings.name, **arguments)
        if checkpoint and settings.checkpoint is not None:
            with at(f"{where}.checkpoint"):
                load_checkpoint(model, settings.checkpoint)
        return model

    def _load_data(self) -> Splits:
        with at("data"):
            if not self.smoke:
                return self.task.load(self.recipe.data)
            model = self._bare(self.recipe.model, "model", checkpoint=False)
            return self.task.synthetic(self.recipe.data, model, batches=SMOKE_STEPS)

    def _look_up(self, chain: Chain) -> StageRecord | None:
        key = self.keys.stage(chain)
        told = of_stage(chain)
        found = self.cache.find(key, lambda problem: self._discard(told[-1], key, problem))
        if found is None:
            return None
        self.emit({"event": "cached", "stage": told[-1], "chain": list(told), "key": key})
        return StageRecord(key, found["seconds"], True, found["extra"])

    def _run(self, step: ChainStep) -> StageRecord:
        key = self.keys.stage(step.chain)
        teachers = self._teachers(step)
        if step.parent:
            self.record(step.parent)
        waiting = {"event": "waiting", "stage": step.name, "key": key}
        with self.cache.lock(key, lambda: self.emit(waiting)):
            found = self._look_up(step.chain)  # another process may have done it meanwhile
            if found is not None:
                return found
            told = list(step.of_stage)
            self.emit({"event": "start", "stage": step.name, "chain": told, "key": key})
            started = time.perf_counter()
            result = self._work(step, teachers, key)
            extra = dict(result.extra)
            seconds = time.perf_counter() - started
            self.cache.store(
                key,
                result.models if result.model is None else result.model,
                {
                    "type": step.settings.type,
                    "name": step.name,
                    "seconds": seconds,
                    "settings": step.settings.model_dump(mode="json"),
                    "extra": extra,
                },
            )
        self.cache.keep("timings", self.keys.work(step), seconds)
        self.emit({"event": "end", "stage": step.name, "seconds": seconds, "key": key})
        return StageRecord(key, seconds, False, extra)

    def _work(self, step: ChainStep, teachers: Mapping[str, nn.Module], key: str) -> StageResult:
        """Run a stage; once more from its start, if it cannot go on where an earlier run was."""
        interrupted = self.cache.has_work(key)
        try:
            return self._attempt(step, teachers, key)
        except CheckpointError:
            if not interrupted:  # an error of the stage's own: it would only come again
                raise
        # the checkpoint of an interrupted run that another version of the library left
        self.cache.reset_work(key)
        self.emit({"event": "restart", "stage": step.name, "key": key})
        return self._attempt(step, self._teachers(step), key)

    def _attempt(self, step: ChainStep, teachers: Mapping[str, nn.Module], key: str) -> StageResult:
        where = f"stages.{step.name}"
        model = self.result(step.parent)
        context = self.context(step, teachers, self.cache.work(key))
        seed_everything(self.recipe.seed)
        self.splits.train.set_seed(self.recipe.seed)
        with at(where):
            result = step.settings.run(model, context)
        if not isinstance(result, StageResult):
            raise SlimkitError(
                f"run() returned {type(result).__name__}, not a StageResult", where=where
            )
        _check_parts(step, result.models, where)
        return result

    def _teachers(self, step: ChainStep) -> dict[str, nn.Module]:
        return {
            name: self.result(chain).eval() if chain is not None else self._teacher(name)
            for name, chain in step.teachers.items()
        }

    def _teacher(self, name: str) -> nn.Module:
        settings = self.recipe.teachers[name]
        model = self.build(settings, f"teachers.{name}")
        if self.smoke:
            # the answers of an untrained deep network would grow beyond all measure, and with
            # them a student's losses: it is at least normalised as a trained one is
            reestimate_batch_norm(model, first_batches(self.splits.train, SMOKE_STEPS))
        return model.eval()

    def preview(self, chain: Chain) -> nn.Module:
        """The structure that comes out of ``chain``, on untrained weights.

        Raises:
            SlimkitError: a stage's settings do not fit its network.
        """
        if not chain:
            return self._bare(self.recipe.model, "model", checkpoint=False)
        step = self.steps[chain]
        teachers = self.preview_teachers(step)
        model = self.preview(step.parent)
        where = f"stages.{step.name}"
        with at(where):
            found = step.settings.preview(model, self.context(step, teachers, None))
        if not isinstance(found, Mapping):
            return found
        _check_parts(step, found, where)
        return found[str(part_of(chain[-1]))]


def _check_parts(step: ChainStep, models: Mapping[str, object], where: str) -> None:
    """Make sure that a stage leaves the networks that it announced."""
    announced = step.settings.parts()
    if set(models) != set(announced):
        left, told = (", ".join(names) or "one network" for names in (models, announced))
        raise SlimkitError(f"it left {left}, and parts() says {told}", where=where)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  user code may draw from the global generator
    torch.manual_seed(seed)
