"""Models by name: ``slimkit:``, ``torchvision:``, ``timm:`` or a factory of one's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from slimkit.doors import door
from slimkit.errors import (
    MissingDependencyError,
    ModelError,
    SlimkitError,
    UnknownNameError,
    nearest,
)
from slimkit.registry import Registry, import_object

__all__ = ["MODELS", "build_model", "list_models", "takes_argument"]

MODELS: Registry[Callable[..., nn.Module]] = Registry("model")
"""Factories behind ``slimkit:NAME``; ``@MODELS.register("mine")`` adds ``slimkit:mine``."""

MODELS.register_lazy("resnet20", "slimkit.models.resnet:resnet20")
MODELS.register_lazy("resnet56", "slimkit.models.resnet:resnet56")
MODELS.register_lazy("mobilenet_v1", "slimkit.models.mobilenet:mobilenet_v1")
MODELS.register_lazy("picodet", "slimkit.models.picodet:PicoDet")
MODELS.register_lazy("picodet_l", "slimkit.models.picodet:picodet_l")
MODELS.register_lazy("picodet_m", "slimkit.models.picodet:picodet_m")
MODELS.register_lazy("picodet_s", "slimkit.models.picodet:picodet_s")
MODELS.register_lazy("vgg16_bn", "slimkit.models.vgg:vgg16_bn")


@door
def build_model(name: str, **kwargs: Any) -> nn.Module:
    """Build a model by name, with freshly drawn weights unless ``kwargs`` ask for others.

    Args:
        name: ``"slimkit:resnet20"``, ``"torchvision:resnet18"``, ``"timm:mobilenetv3_small_100"``
            or ``"package.module:factory"``.
        **kwargs: passed to the factory (``num_classes=10`` …).

    Raises:
        UnknownNameError: no such model; the hint names the nearest.
        ModelError: the name has no source, the factory refuses the arguments, or what it
            returns is not an ``nn.Module``.
        MissingDependencyError: torchvision or timm is not installed.
    """
    factory = _factory(name)
    try:
        model = factory(**kwargs)
    except SlimkitError:
        raise
    except Exception as error:  # anything may go wrong inside a factory of the user's own
        arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise ModelError(
            f"the factory refuses ({arguments}): {type(error).__name__}: {error}", where=name
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the factory returned {type(model).__name__}, not an nn.Module", where=name
        )
    return model


@door
def list_models(source: str = "slimkit") -> list[str]:
    """Names that :func:`build_model` knows.

    Args:
        source: ``"slimkit"``, ``"torchvision"`` or ``"timm"``.

    Raises:
        ModelError: another source.
        MissingDependencyError: that library is not installed.
    """
    if source == "slimkit":
        return [f"slimkit:{name}" for name in MODELS.names()]
    if source == "torchvision":
        return [f"torchvision:{name}" for name in _library("torchvision.models").list_models()]
    if source == "timm":
        return [f"timm:{name}" for name in _library("timm").list_models()]
    hint = nearest(source, ("slimkit", "torchvision", "timm"))
    raise ModelError(f"unknown source of models {source!r}", where="source", hint=hint)


def takes_argument(name: str, argument: str) -> bool:
    """Whether the factory of a model has an argument, such as ``num_classes``.

    Those of torchvision and timm hand on what they are given: all of them take the number of
    classes, and nothing else is asked of them.
    """
    source, _, short = name.partition(":")
    if source in {"torchvision", "timm"}:
        return argument == "num_classes"
    try:
        factory = MODELS.get(short) if source == "slimkit" else import_object(name)
        return argument in inspect.signature(factory).parameters  # type: ignore[arg-type]
    except (SlimkitError, TypeError, ValueError):  # building it will say what is wrong
        return False


def _factory(name: str) -> Callable[..., nn.Module]:
    source, colon, short = name.partition(":")
    if name.endswith(".onnx"):
        raise ModelError(
            "this is an ONNX file, and a network of PyTorch is needed here",
            where=name,
            hint="profile, benchmark, evaluate and predict take files",
        )
    if not colon or not source or not short:
        raise ModelError(
            "a model is named SOURCE:NAME",
            where=name,
            hint=nearest(f"slimkit:{name}", [*list_models(), "torchvision:…", "timm:…"]),
        )
    if source == "slimkit":
        return MODELS.get(short, where=name)
    if source == "torchvision":
        models = _library("torchvision.models")
        _check_known(short, models.list_models(), name)
        untrained: dict[str, Any] = {"weights": None}
        if "weights_backbone" in inspect.signature(models.get_model_builder(short)).parameters:
            untrained["weights_backbone"] = None
        return lambda **kwargs: models.get_model(short, **{**untrained, **kwargs})
    if source == "timm":
        timm = _library("timm")
        if not timm.is_model(short.split(".")[0]):
            _check_known(short, timm.list_models(), name)
        return lambda **kwargs: timm.create_model(short, **kwargs)
    factory = import_object(name, where=name)
    if not callable(factory):
        raise ModelError(f"{short} is not callable", where=name)
    return factory


def _check_known(short: str, known: list[str], where: str) -> None:
    if short not in known:
        raise UnknownNameError(f"unknown model {short!r}", where=where, hint=nearest(short, known))


def _library(module: str) -> Any:
    """Import torchvision or timm: heavy, and timm is optional."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        what = "'slimkit[models]'" if package == "timm" else package
        raise MissingDependencyError(
            f"{package} is not installed", where=f"{package}:", hint=f"pip install {what}"
        ) from error
