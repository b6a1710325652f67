"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from slimkit.errors import TrainingError
from slimkit.train.settings import TrainSettings

__all__ = ["build_optimizer", "learning_rate"]


@runtime_checkable
class _Sparing(Protocol):
    def no_weight_decay(self) -> set[str]: ...


def build_optimizer(
    model: nn.Module, settings: TrainSettings, extra: Iterable[nn.Parameter] = ()
) -> Optimizer:
    """SGD or AdamW over all parameters that require gradients.

    Names that a method ``no_weight_decay()`` of the model returns are not decayed.

    Args:
        model: its parameters, tied ones once.
        settings: optimizer, rates and decay.
        extra: parameters outside of the model, such as distillation connectors.

    Raises:
        TrainingError: nothing requires gradients.
    """
    seen: set[int] = set()
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    named = dict(model.named_parameters())
    names = model.no_weight_decay() if isinstance(model, _Sparing) else set()
    undecayed = {id(named[name]) for name in names if name in named}
    for parameter in (*model.parameters(), *extra):
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        spared = parameter.dim() <= 1 and not settings.decay_norms
        spared = spared or id(parameter) in undecayed
        (plain if spared else decayed).append(parameter)
    if not seen:
        raise TrainingError(
            "no parameter requires gradients: there is nothing to train",
            where="model",
            hint="model.requires_grad_(True)",
        )
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}] if decayed else []
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    # one kernel for all tensors halves the time of a step of many small ones
    fused = all(
        p.dtype == torch.float32 and p.device.type in {"cpu", "cuda"} for p in (*decayed, *plain)
    )
    if settings.optimizer == "adamw":
        return AdamW(groups, lr=settings.lr, fused=fused)
    sgd = SGD(
        groups,
        lr=settings.lr,
        fused=fused,
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
    )
    if fused and settings.momentum:
        # The fused kernel takes all buffers or none, so a gradient that comes late fails. From
        # zero, the first update makes the buffer the gradient, as it is without.
        for parameter in (*decayed, *plain):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def learning_rate(settings: TrainSettings, step: int, total: int, steps_per_epoch: int) -> float:
    """The learning rate of a step.

    Args:
        settings: schedule, peak and warm-up.
        step: 0 … total - 1.
        total: steps of the whole run.
        steps_per_epoch: to turn ``warmup_epochs`` into steps.
    """
    rise = min(settings.warmup_epochs * steps_per_epoch, float(total))
    if settings.schedule == "one_cycle":
        rise = rise or 0.3 * total
        if step < rise:
            return settings.lr * _between(1 / 25, 1.0, step / rise)
        return settings.lr * _between(1.0, 1e-4, (step - rise) / max(1.0, total - rise))
    if step < rise:
        return settings.lr * (step + 1) / (rise + 1)
    left = (step - rise) / max(1.0, total - rise)
    if settings.schedule == "cosine":
        return settings.lr * _between(1.0, 0.0, left)
    return settings.lr * (1 - left if settings.schedule == "linear" else 1.0)


def _between(first: float, last: float, position: float) -> float:
    """Half a cosine wave from ``first`` (position 0) to ``last`` (position 1)."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * position))
