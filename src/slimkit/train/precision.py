"""fp32 or bf16? Timed on the model itself, because it depends on both model and processor.

Dense convolutions run about twice as fast under bf16 autocast where the CPU multiplies bf16
matrices; depthwise ones run slower. Nothing but a measurement tells; only where the processor has
no bf16 instructions at all is there nothing to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from slimkit.runtime.surroundings import multiplies_bf16
from slimkit.train.snapshot import undone

__all__ = ["choose_precision"]

_WARMUP, _STEPS = 1, 3
_WORTHWHILE = 0.95
"""bf16 must save 5 % of the time to be worth its rounding."""


def choose_precision(
    step: Callable[[bool], Tensor | None], things: Iterable[Any], device: torch.device
) -> tuple[Literal["fp32", "bf16"], dict[str, float]]:
    """Time forward and backward in both precisions and leave no trace.

    Args:
        step: runs one forward with (True) or without bf16 autocast and returns the loss; None
            where there is nothing to go backward from.
        things: what a step may change, the model above all; afterwards they are as before,
            see :func:`slimkit.train.snapshot.undone`.
        device: where it runs.

    Returns:
        The choice, and milliseconds per step of each; fp32 and nothing on a processor without
        bf16 instructions, or where no gradients lead from the loss.
    """
    if device.type == "cpu" and not multiplies_bf16(device):
        return "fp32", {}
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with undone(things, device):
        for repeat in range(_WARMUP + _STEPS):
            for name, seconds in times.items():  # interleaved: a busy moment hits both
                spent = _timed(step, name == "bf16", device)
                if spent is None:
                    return "fp32", {}
                if repeat >= _WARMUP:
                    seconds.append(spent)
    best = {name: 1000 * min(seconds) for name, seconds in times.items()}
    choice: Literal["fp32", "bf16"] = (
        "bf16" if best["bf16"] < _WORTHWHILE * best["fp32"] else "fp32"
    )
    return choice, {name: round(value, 3) for name, value in best.items()}


def _timed(step: Callable[[bool], Tensor | None], bf16: bool, device: torch.device) -> float | None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    loss = step(bf16)
    if loss is None:
        return None
    torch.autograd.backward(loss)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
