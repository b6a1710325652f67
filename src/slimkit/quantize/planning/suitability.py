"""Whether a network can be quantized at all, said before and after planning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from slimkit.errors import InputError, PlanError
from slimkit.quantize.specs import Decision

__all__ = ["check_network", "compiled_modules", "warn_of_nothing"]

_NAMED = 3
"""Layers, and reasons, that a message names: enough to see the pattern."""


def check_network(model: nn.Module) -> None:
    """Refuse what cannot be followed call by call, or does not compute in float32.

    Raises:
        InputError: the module is one of TorchScript, or has parameters of another floating-point
            type; says what to convert.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}", where="model")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "it was scripted or traced by TorchScript, and the calls inside cannot be followed",
            where="model",
            hint="pass the eager torch.nn.Module that it was made from",
        )
    others = [
        (name, parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.dtype != torch.float32
    ]
    if others:
        kinds = " and ".join(sorted({str(dtype).removeprefix("torch.") for _, dtype in others}))
        named = ", ".join(name for name, _ in others[:_NAMED])
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        raise InputError(
            f"parameters are {kinds}, and quantization starts from float32: {named}{more}",
            where="model",
            hint="pass model.float(), with example inputs and calibration data in float32",
        )


def compiled_modules(model: nn.Module) -> list[str]:
    """Paths of the outermost modules of TorchScript inside, which stay in float."""
    paths = [path for path, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    return [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]


def warn_of_nothing(
    decisions: Sequence[Decision], quantizers: Iterable[object], *, target: str, skipped: bool
) -> list[str]:
    """Say so where a plan has no quantizer.

    Args:
        decisions: of the plan.
        quantizers: of the plan.
        target: name of the target.
        skipped: the user took layers out.

    Returns:
        Warnings for the plan.

    Raises:
        PlanError: nothing can be quantized, and that is not what the user asked for.
    """
    if any(True for _ in quantizers):
        return []
    reasons = [f"{d.module or d.address} ({d.reason})" for d in decisions if d.reason][:_NAMED]
    told = "no layer of the network is quantized" + (f": {', '.join(reasons)}" if reasons else "")
    if not skipped:
        hint = f"another target than {target!r}, or a network with convolutions or linear layers"
        raise PlanError(told, where="model", hint=hint)
    warnings.warn(told, stacklevel=4)
    return [told]
