"""Keys of the stage cache: a hash of everything that a stage's result depends on.

Every effective setting is in it, defaults too (:mod:`slimkit.recipe.effective`), and the source of
all code of the user's that the settings name (:mod:`slimkit.recipe.source_code`): criteria, losses,
allocations, observers, factories, tasks, stages, and what they import of the user's. The source of
Slimkit itself is not; a change of what a stage does under the same settings raises the stage's
``version``. Of installed packages the version counts.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.artifact import content_hash
from slimkit.errors import ArtifactError
from slimkit.models import MODELS, find_checkpoint
from slimkit.recipe.chains import Chain, ChainStep, of_stage
from slimkit.recipe.effective import Effective, essence
from slimkit.recipe.schema.links import part_of, stage_of
from slimkit.recipe.schema.recipe import ModelSettings, Recipe
from slimkit.recipe.source_code import code_behind, version_of

__all__ = ["Keys", "essence", "file_hash"]

KEY_FORMAT = 2
_EXPORTING = ("runtime", "quantize", "graph")


class Keys:
    """Computes the keys of one run.

    Args:
        recipe: the recipe.
        steps: its steps, by chain.
        fingerprint: of the data.
        smoke: keys of a smoke run are others than those of a real one.
    """

    def __init__(
        self,
        recipe: Recipe,
        steps: Mapping[Chain, ChainStep],
        fingerprint: str,
        *,
        smoke: bool = False,
    ) -> None:
        self.recipe = recipe
        self.steps = steps
        self.fingerprint = fingerprint
        self.smoke = smoke
        self._known: dict[Chain, str] = {}

    def model(self, settings: ModelSettings) -> str:
        """The key of a network with its first weights."""
        effective = Effective()
        arguments = effective.read(settings.args)
        source, _, short = settings.name.partition(":")
        if source == "slimkit":
            factory = MODELS.get(short)
            effective.mentions.append(factory)  # registered by the user, perhaps
            arguments = {**_defaults(factory), **arguments}
        elif source not in {"torchvision", "timm"}:
            effective.read(settings.name)
        return content_hash(
            {
                "format": KEY_FORMAT,
                "name": settings.name,
                "args": arguments,
                "checkpoint": self._checkpoint(settings.checkpoint),
                "library": version_of(source) if source in {"torchvision", "timm"} else None,
                "code": code_behind(effective.mentions),
                "seed": self.recipe.seed,
                "torch": _torch_version(),
            }
        )

    def export(self, chain: Chain, metadata: Mapping[str, str]) -> str:
        """The key of the ONNX file of what comes out of ``chain``.

        Unlike a stage's, it has the source of the exporting packages in it: exporting again
        takes seconds, and a file that an older exporter wrote would tell little. So has it the
        task, which may export a part and say how its outputs are read.
        """
        effective = Effective()
        return content_hash(
            {
                "format": KEY_FORMAT,
                "network": self.chain(chain),
                "task": effective.field(self.recipe, "task"),
                "code": code_behind(effective.mentions),
                "metadata": dict(metadata),
                "source": [_package_hash(f"slimkit.{name}") for name in _EXPORTING],
                "versions": [version_of(name) for name in ("torch", "onnx", "onnxscript")],
            }
        )

    def work(self, step: ChainStep) -> str:
        """A key of how much work a stage is, whatever the seed: for estimates of time."""
        return content_hash(
            {
                "type": step.settings.type,
                "settings": essence(step.settings),
                "model": essence(self.recipe.model),
                "chain": [essence(self.recipe.stages[stage_of(link)]) for link in step.parent],
                "data": self.fingerprint,
                "smoke": self.smoke,
            }
        )

    def _checkpoint(self, path: str | None) -> str | None:
        if self.smoke or path is None:
            return None  # a smoke run reads no checkpoint
        return file_hash(str(find_checkpoint(path)))

    def chain(self, chain: Chain) -> str:
        """The key of the network that comes out of ``chain``."""
        if not chain:
            return self.model(self.recipe.model)
        part = part_of(chain[-1])
        stage = self.stage(chain)
        return stage if part is None else content_hash({"stage": stage, "part": part})

    def stage(self, chain: Chain) -> str:
        """The key of all that the last stage of ``chain`` leaves, whichever part is named."""
        known = of_stage(chain)
        if known not in self._known:
            step = self.steps[chain]
            teachers = {
                name: self.chain(of) if of is not None else self.model(self.recipe.teachers[name])
                for name, of in step.teachers.items()
            }
            teacher: Any = teachers or None
            if len(teachers) == 1:  # what it is called makes no difference
                teacher = next(iter(teachers.values()))
            effective = Effective()
            value = {
                "format": KEY_FORMAT,
                "type": step.settings.type,
                "version": step.settings.version,
                "settings": effective.read(step.settings),
                "task": effective.field(self.recipe, "task"),
                "facts": effective.read(step.settings.facts()),
                "code": code_behind(effective.mentions),
                "parent": self.chain(step.parent),
                "teacher": teacher,
                "seed": self.recipe.seed,
                "torch": _torch_version(),
                "data": self.fingerprint,
            }
            if step.settings.sees_eval_batches:
                value["eval_batch_size"] = getattr(self.recipe.data, "eval_batch_size", None)
            if self.smoke:
                value["smoke"] = True
            self._known[known] = content_hash(value)
        return self._known[known]


def file_hash(path: str | None) -> str | None:
    """SHA-256 (hex) of a file.

    Raises:
        ArtifactError: it cannot be read.
    """
    if path is None:
        return None
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"cannot read: {error.strerror or error}", where=path) from error


def _defaults(factory: Any) -> dict[str, Any]:
    """The plain values that a factory takes for what it is not given."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # written in C
        return {}
    return {
        parameter.name: essence(parameter.default)
        for parameter in parameters.values()
        if isinstance(parameter.default, bool | int | float | str | tuple | None)
    }


def _package_hash(package: str) -> str:
    """A hash of all modules of a package."""
    folder = Path(str(importlib.import_module(package).__file__)).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _torch_version() -> str:
    import torch

    return torch.__version__
