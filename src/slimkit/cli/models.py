"""Models and inputs as they are named on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimkit.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from slimkit.tasks import Splits, Task

__all__ = [
    "load_task",
    "model_and_input",
    "parse_arguments",
    "parse_shape",
    "parse_sizes",
    "parse_weight_bits",
    "sized",
    "with_weights",
]


def parse_shape(text: str) -> tuple[int, ...]:
    """``"1,3,224,224"`` → ``(1, 3, 224, 224)``.

    Raises:
        InputError: it is not a list of positive whole numbers.
    """
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(
            f"expected positive numbers with commas, got {text!r}",
            where="--input",
            hint="for example 1,3,224,224",
        )
    return shape


def parse_sizes(given: list[str] | None) -> dict[str, int]:
    """``["height=320"]`` → sizes of open dimensions by name.

    Raises:
        InputError: an entry is not ``NAME=N``.
    """
    sizes = {}
    for entry in given or ():
        name, equals, number = entry.partition("=")
        if not equals or not number.isdecimal() or not int(number):
            raise InputError(
                f"expected NAME=N, got {entry!r}", where="--size", hint="--size height=320"
            )
        sizes[name] = int(number)
    return sizes


def parse_arguments(given: list[str] | None) -> dict[str, Any]:
    """``["num_classes=10"]`` → keyword arguments; values are YAML.

    Raises:
        InputError: an entry is not ``name=value``.
    """
    import yaml

    arguments = {}
    for entry in given or ():
        name, equals, text = entry.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(
                f"expected name=value, got {entry!r}", where="--arg", hint="--arg num_classes=10"
            )
        try:
            arguments[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"cannot read the value {text!r}", where=f"--arg {name}") from error
    return arguments


def parse_weight_bits(given: list[str] | None) -> int | dict[str, int] | None:
    """``["4"]`` → 4; ``["layer4.*=4", "fc=8"]`` → pattern → bits; None without any.

    Raises:
        InputError: an entry is neither, or both kinds are mixed.
    """
    if not given:
        return None
    pairs = [entry.rpartition("=") for entry in given]
    try:
        bits = [int(text) for _, _, text in pairs]
    except ValueError:
        bits = []
    patterns = [pattern for pattern, _, _ in pairs]
    if not bits or (len(pairs) > 1 and not all(patterns)):
        raise InputError(
            f"expected a number, or PATTERN=NUMBER as often as you like, got {' '.join(given)!r}",
            where="--weight-bits",
            hint="--weight-bits 4, or --weight-bits 'layer4.*=4'",
        )
    return dict(zip(patterns, bits, strict=True)) if patterns[0] else bits[0]


def load_task(name: str | None, source: str, **settings: Any) -> tuple[Task, Splits]:
    """A task and its data, as the options of a command name them.

    Args:
        name: of the task; None takes the first that knows the source.
        source: of the data.
        **settings: of the data; those that are None are left out.

    Raises:
        UnknownNameError: there is no such task, or no task knows the source.
        InputError: the task's data have no such setting.
    """
    from pydantic import ValidationError

    from slimkit.errors import UnknownNameError, nearest
    from slimkit.tasks import TASKS

    if name is None:
        tasks = {n: TASKS.get(n).model_validate({}) for n in TASKS}
        name = next((n for n, task in tasks.items() if task.takes_source(source)), None)
    if name is None:
        from slimkit.tasks.data import SOURCES

        kind = source.partition(":")[0]
        raise UnknownNameError(
            f"unknown data source {kind!r}", where="--data", hint=nearest(kind, SOURCES)
        )
    task = TASKS.get(name, where="--task").model_validate({})
    given = {key: value for key, value in settings.items() if value is not None}
    try:
        return task, task.load(task.data_settings.model_validate({"source": source, **given}))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "data"
        option = {"source": "--data"}.get(key, f"--{key.replace('_', '-')}")
        known = ", ".join(task.data_settings.model_fields)
        raise InputError(
            f"the data of the task {task.type} have no such setting: {first['msg']}",
            where=option,
            hint=f"they have {known}",
        ) from error


def model_and_input(
    name: str, input_shape: str | None, arguments: list[str] | None, checkpoint: str | None = None
) -> tuple[nn.Module, Any]:
    """Build a model in evaluation mode, and an example input for it.

    Args:
        name: such as ``torchvision:resnet18``.
        input_shape: ``N,C,H,W``; by default what a model of that name takes.
        arguments: of the factory.
        checkpoint: a file with its weights, or a folder that ``sk.save`` wrote.
    """
    import torch

    from slimkit.models import build_model, example_input

    keywords = parse_arguments(arguments)
    shape = parse_shape(input_shape) if input_shape else None
    model = build_model(name, **keywords).eval()
    model = with_weights(model, checkpoint)
    if shape is not None:
        return model, torch.zeros(shape)
    channels = keywords.get("in_channels", keywords.get("in_chans", 3))
    return model, example_input(name, model, in_channels=channels)


def with_weights(model: nn.Module, checkpoint: str | None) -> nn.Module:
    """The model with weights from a file, or from a folder that ``sk.save`` wrote.

    A folder's plans are applied first, so that what comes back may be smaller, or quantized.

    Raises:
        CheckpointError, ArtifactError, PlanError: it does not fit, or cannot be read.
    """
    from slimkit.models import find_checkpoint, load_checkpoint
    from slimkit.plan import load

    if checkpoint is None:
        return model
    found = find_checkpoint(checkpoint)
    if found.is_dir():
        return load(found, model=model).eval()
    return load_checkpoint(model, checkpoint)


def sized(
    input_shape: str | None, image_size: int | None, arguments: list[str] | None
) -> str | None:
    """``--input``, or what ``--image-size`` says in its place.

    Raises:
        InputError: both are given.
    """
    if image_size is None:
        return input_shape
    if input_shape is not None:
        raise InputError("--input says it already", where="--image-size", hint="leave one out")
    keywords = parse_arguments(arguments)
    channels = keywords.get("in_channels", keywords.get("in_chans", 3))
    return f"1,{channels},{image_size},{image_size}"
