"""Example inputs: one value for every way in which a model is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from slimkit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ExampleInputs", "Inputs", "as_inputs"]


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one forward call.

    Attributes:
        args: positional arguments, tensors or any nesting of them.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def call(self, model: nn.Module) -> Any:
        """``model(*args, **kwargs)``."""
        return model(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """All tensors in order of appearance."""
        leaves = tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """A copy with ``function`` applied to every tensor."""

        def on_leaf(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, torch.Tensor) else leaf

        args, kwargs = tree_map(on_leaf, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    @property
    def examples(self) -> int | None:
        """How many examples there are, if the first dimension of all tensors counts them."""
        sizes = {tensor.shape[0] if tensor.dim() else None for tensor in self.tensors()}
        return sizes.pop() if len(sizes) == 1 else None

    def split(self, size: int) -> list[Inputs]:
        """In parts of ``size`` examples; in one piece where they cannot be told apart."""
        count = self.examples
        if not count:
            return [self]
        starts = range(0, count, size)
        return [self.map(itemgetter(slice(start, start + size))) for start in starts]

    def to(self, device: torch.device | str) -> Inputs:
        """A copy with every tensor on ``device``."""
        return self.map(lambda tensor: tensor.to(device))


ExampleInputs = torch.Tensor | tuple[Any, ...] | Mapping[str, Any] | Inputs
"""What public functions take: a tensor, a tuple (positional), a dict (keywords) or Inputs."""


def as_inputs(example_inputs: ExampleInputs) -> Inputs:
    """Normalise what the user passed.

    Raises:
        InputError: it is none of the accepted kinds, or holds no tensor.
    """
    if isinstance(example_inputs, Inputs):
        inputs = example_inputs
    elif isinstance(example_inputs, torch.Tensor):
        inputs = Inputs((example_inputs,))
    elif isinstance(example_inputs, tuple):
        inputs = Inputs(example_inputs)
    elif isinstance(example_inputs, Mapping):
        inputs = Inputs((), dict(example_inputs))
    else:
        raise InputError(
            f"expected a tensor, a tuple, a dict or slimkit.Inputs, "
            f"got {type(example_inputs).__name__}",
            where="example_inputs",
            hint="a model that takes one list gets a 1-tuple holding the list",
        )
    if not inputs.tensors():
        raise InputError("there is no tensor in them", where="example_inputs")
    return inputs
