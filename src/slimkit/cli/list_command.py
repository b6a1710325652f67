"""``slimkit list``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from slimkit.errors import UnknownNameError, nearest

__all__ = ["list_command"]

Rows = list[tuple[str, str]]


def list_command(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]",
            help="models, stages, criteria, allocations, sparsity, samplers, losses, connectors, "
            "data_free, observers, methods, targets, tasks, metrics, data, backends; or "
            "torchvision, timm for all of theirs.",
            show_default="everything",
        ),
    ] = None,
) -> None:
    """List what a recipe may name.

    Example: slimkit list criteria
    """
    from rich.markup import escape

    from slimkit.cli.console import output

    if kind is not None and kind not in _KINDS | _LIBRARIES:
        raise UnknownNameError(
            f"there is no list of {kind!r}", where="KIND", hint=nearest(kind, _KINDS | _LIBRARIES)
        )
    if kind is not None:
        for name, about in (_KINDS | _LIBRARIES)[kind]():
            output.print(escape(f"{name:<24} {about}".rstrip()))
        return
    for title, rows in _KINDS.items():
        output.print(title, style="bold")
        for name, about in rows():
            output.print(escape(f"  {name:<24} {about}".rstrip()))


def _first_line(thing: Any) -> str:
    """What an entry says of itself: its ``summary``, else the first line of its docstring."""
    text = getattr(thing, "summary", None) or getattr(thing, "__doc__", None) or ""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return re.sub(r"(?::\w+:)?`{1,2}([^`]+)`{1,2}", r"\1", line)


def _registered(reference: str) -> Callable[[], Rows]:
    def rows() -> Rows:
        from slimkit.registry import Registry, import_object

        registry: Any = import_object(reference)
        names = registry.names() if isinstance(registry, Registry) else sorted(registry)
        get = registry.get if isinstance(registry, Registry) else registry.__getitem__
        return [(name, _first_line(get(name))) for name in names]

    return rows


def _models() -> Rows:
    from slimkit.models import MODELS

    own = [(f"slimkit:{name}", _first_line(MODELS.get(name))) for name in MODELS.names()]
    return [
        *own,
        ("torchvision:NAME", "any model of torchvision; slimkit list torchvision"),
        ("timm:NAME", "any model of timm, if it is installed; slimkit list timm"),
        ("package.module:factory", "a function of your own that returns an nn.Module"),
    ]


def _library(source: str) -> Callable[[], Rows]:
    def rows() -> Rows:
        from slimkit.models import list_models

        return [(name, "") for name in list_models(source)]

    return rows


def _backends() -> Rows:
    from slimkit.runtime import available_backends

    return [
        (name, str(status.version) if status.version else f"not here: {status.reason}")
        for name, status in available_backends().items()
    ]


def _metrics() -> Rows:
    from slimkit.tasks import TASKS

    tasks = [TASKS.get(name) for name in TASKS.names()]
    return [
        (metric.name, f"{metric.label}, of {task.model_fields['type'].default}")
        for task in tasks
        for metric in task.metrics
    ]


def _data() -> Rows:
    images = _registered("slimkit.tasks.data:SOURCES")()
    scenes = _registered("slimkit.tasks.detection.loading:SCENE_SOURCES")()
    masks = _registered("slimkit.tasks.segmentation.loading:MASK_SOURCES")()
    own = ("package.module:function", "a function of your own that returns its splits")
    return [*images, *scenes, *masks, own]


_KINDS: dict[str, Callable[[], Rows]] = {
    "models": _models,
    "stages": _registered("slimkit.recipe.stages.interface:STAGES"),
    "criteria": _registered("slimkit.prune.criteria.scores:CRITERIA"),
    "allocations": _registered("slimkit.prune.allocation.ranking:ALLOCATIONS"),
    "sparsity": _registered("slimkit.recipe.stages.training:SPARSITY"),
    "samplers": _registered("slimkit.search.samplers:SAMPLERS"),
    "losses": _registered("slimkit.distill:DISTILL_LOSSES"),
    "connectors": _registered("slimkit.distill:CONNECTORS"),
    "data_free": _registered("slimkit.distill:GENERATION"),
    "observers": _registered("slimkit.quantize.observers.ranges:OBSERVERS"),
    "methods": _registered("slimkit.quantize:METHODS"),
    "targets": _registered("slimkit.quantize.targets:TARGETS"),
    "tasks": _registered("slimkit.tasks:TASKS"),
    "metrics": _metrics,
    "data": _data,
    "backends": _backends,
}
_LIBRARIES: dict[str, Callable[[], Rows]] = {
    "torchvision": _library("torchvision"),
    "timm": _library("timm"),
}
