"""Models and inputs as they are named on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimkit.errors import InputError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["model_and_input", "parse_arguments", "parse_shape", "parse_weight_bits"]


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


def model_and_input(
    name: str, input_shape: str | None, arguments: list[str] | None, checkpoint: str | None = None
) -> tuple[nn.Module, Any]:
    """Build a model in evaluation mode, and an example input for it.

    Args:
        name: such as ``torchvision:resnet18``.
        input_shape: ``N,C,H,W``; by default what a model of that name takes.
        arguments: of the factory.
        checkpoint: a safetensors file with its weights.
    """
    import torch

    from slimkit.models import build_model, example_input, load_checkpoint

    keywords = parse_arguments(arguments)
    shape = parse_shape(input_shape) if input_shape else None
    model = build_model(name, **keywords).eval()
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    if shape is not None:
        return model, torch.zeros(shape)
    channels = keywords.get("in_channels", keywords.get("in_chans", 3))
    return model, example_input(name, model, in_channels=channels)
