"""``requires_grad`` while a method trains something: of chosen parameters, and no others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["learning_only"]


@contextmanager
def learning_only(model: nn.Module, learned: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Inside, these parameters of ``model`` take part in gradients, and no others.

    Afterwards those do that did before, and none keeps a gradient.
    """
    wanted = {id(parameter) for parameter in learned}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None
