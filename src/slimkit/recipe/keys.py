"""Keys of the stage cache: a hash of everything that a stage's result depends on.

Settings at their default are left out, so that a setting which a later version adds does not
change the keys of results that never used it; a change of what a stage does under the same
settings raises the stage's ``version`` instead. The source of Slimkit itself is not part of a
key, the source of a user's own factory or stage is.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from slimkit.artifact import content_hash
from slimkit.errors import ArtifactError
from slimkit.recipe.chains import Chain, Step
from slimkit.recipe.schema.recipe import ModelSettings, Recipe
from slimkit.recipe.stages.interface import Stage
from slimkit.registry import import_object

__all__ = ["Keys", "essence"]

KEY_FORMAT = 1
_EXPORTING = ("runtime", "quantize", "graph")
_WITHOUT_EFFECT = {"teacher", "log_every", "device"}
"""Of stages; the key of the teacher stands for its name."""


class Keys:
    """Computes the keys of one run.

    Args:
        recipe: the recipe.
        steps: its steps, by chain.
        fingerprint: of the data.
        smoke: keys of a smoke run are others than those of a real one.
    """

    def __init__(
        self, recipe: Recipe, steps: Mapping[Chain, Step], fingerprint: str, *, smoke: bool = False
    ) -> None:
        self.recipe = recipe
        self.steps = steps
        self.fingerprint = fingerprint
        self.smoke = smoke
        self._known: dict[Chain, str] = {}

    def model(self, settings: ModelSettings) -> str:
        """The key of a network with its first weights."""
        return content_hash(
            {
                "format": KEY_FORMAT,
                "name": settings.name,
                "args": settings.args,
                "checkpoint": self._checkpoint(settings.checkpoint),
                "factory": factory_source(settings.name),
                "seed": self.recipe.seed,
                "torch": _torch_version(),
            }
        )

    def export(self, chain: Chain, metadata: Mapping[str, str]) -> str:
        """The key of the ONNX file of what comes out of ``chain``.

        Unlike a stage's, it has the source of the exporting packages in it: exporting again
        takes seconds, and a file that an older exporter wrote would tell little.
        """
        return content_hash(
            {
                "format": KEY_FORMAT,
                "network": self.chain(chain),
                "metadata": dict(metadata),
                "source": [_package_hash(f"slimkit.{name}") for name in _EXPORTING],
                "versions": [_version(name) for name in ("torch", "onnx", "onnxscript")],
            }
        )

    def work(self, step: Step) -> str:
        """A key of how much work a stage is, whatever the seed: for estimates of time."""
        return content_hash(
            {
                "type": step.settings.type,
                "settings": essence(step.settings),
                "model": essence(self.recipe.model),
                "chain": [essence(self.recipe.stages[name]) for name in step.parent],
                "data": self.fingerprint,
                "smoke": self.smoke,
            }
        )

    def _checkpoint(self, path: str | None) -> str | None:
        if self.smoke and path is not None and not Path(path).is_file():
            return None  # a smoke run needs no files
        return file_hash(path)

    def chain(self, chain: Chain) -> str:
        """The key of what comes out of the last stage of ``chain``."""
        if not chain:
            return self.model(self.recipe.model)
        if chain not in self._known:
            step = self.steps[chain]
            teachers = {
                name: self.chain(of) if of is not None else self.model(self.recipe.teachers[name])
                for name, of in step.teachers.items()
            }
            teacher: Any = teachers or None
            if len(teachers) == 1:  # what it is called makes no difference
                teacher = next(iter(teachers.values()))
            value = {
                "format": KEY_FORMAT,
                "type": step.settings.type,
                "version": step.settings.version,
                "source": class_source(type(step.settings)),
                "settings": essence(step.settings),
                "parent": self.chain(step.parent),
                "teacher": teacher,
                "seed": self.recipe.seed,
                "torch": _torch_version(),
                "data": self.fingerprint,
            }
            if step.settings.sees_eval_batches:
                value["eval_batch_size"] = self.recipe.data.eval_batch_size
            if facts := step.settings.facts():
                value["facts"] = dict(facts)
            if self.smoke:
                value["smoke"] = True
            self._known[chain] = content_hash(value)
        return self._known[chain]


def essence(value: Any) -> Any:
    """Settings without what is at its default or has no effect on a result."""
    if isinstance(value, BaseModel):
        kept: dict[str, Any] = {}
        for name, field in type(value).model_fields.items():
            item = getattr(value, name)
            if name in _WITHOUT_EFFECT and isinstance(value, Stage):
                continue
            default = field.get_default(call_default_factory=True)
            if name == "type" or field.is_required() or item != default:
                kept[name] = essence(item)
        return kept
    if isinstance(value, Mapping):
        return {str(key): essence(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [essence(item) for item in value]
    return value


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


def factory_source(name: str) -> str | None:
    """What the code behind a model name is: a version for libraries, a hash for a user's own."""
    source = name.partition(":")[0]
    if source == "slimkit":
        return None
    if source in {"torchvision", "timm"}:
        return _version(source)
    return _module_hash(getattr(import_object(name), "__module__", source))


def class_source(settings: type) -> str | None:
    """A hash of the module of a stage that is not Slimkit's own."""
    module = settings.__module__
    return None if module.startswith("slimkit.") else _module_hash(module)


def _module_hash(module: str) -> str | None:
    try:
        text = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):  # built in, or typed into a session
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _package_hash(package: str) -> str:
    """A hash of all modules of a package."""
    folder = Path(str(importlib.import_module(package).__file__)).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_version() -> str:
    import torch

    return torch.__version__
