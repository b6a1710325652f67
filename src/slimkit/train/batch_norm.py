"""Measuring batch-norm statistics anew, after weights were averaged, pruned or quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimkit.doors import door
from slimkit.errors import InputError
from slimkit.inputs import as_batch
from slimkit.modules import evaluation
from slimkit.outside import iterated

__all__ = ["frozen_batch_norm", "reestimate_batch_norm", "tracking_norms"]


def tracking_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


@door
@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace running statistics by the plain mean over ``batches``.

    Unlike an exponential average it forgets nothing and starts from nothing ("precise BN",
    Wu & Johnson 2021, section 3.2). Everything but batch norm runs in eval mode, so that
    dropout does not disturb it; training flags are restored.

    Args:
        model: changed in place.
        batches: of training data, as a loader yields them: inputs alone or with targets; see
            :func:`slimkit.inputs.as_batch`.

    Returns:
        How many batches were used; 0 when the model has no batch norm.

    Raises:
        InputError: there are no batches, or something that is none.
        DataError, CaptureError: ``batches`` or the model's forward raised.
    """
    norms = tracking_norms(model)
    if not norms:
        return 0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    momenta = [norm.momentum for norm in norms]
    before = [{name: b.clone() for name, b in norm.named_buffers(recurse=False)} for norm in norms]
    count = 0
    try:
        with evaluation(model):
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # torch's spelling of a cumulative average
            for batch in iterated(batches, where="batches"):
                as_batch(batch, where="batches").inputs.to(device).run(model)
                count += 1
    finally:
        for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if not count:
                for name, buffer in norm.named_buffers(recurse=False):
                    buffer.copy_(buffers[name])
    if not count:
        raise InputError("there are no batches to measure batch norm on", where="batches")
    return count


@contextlib.contextmanager
def frozen_batch_norm(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Batch norm uses and keeps its running statistics inside of the ``with`` block."""
    norms = [norm for norm in tracking_norms(model) if norm.training] if enabled else []
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
