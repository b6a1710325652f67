"""What a model is called with (:class:`Inputs`), and what a loader yields (:class:`Batch`).

Training, calibration, criteria, batch-norm statistics, export and tasks all read batches by
:func:`as_batch`, so that what one of them takes, every one takes, and in the same way.

How examples are counted: a tensor that is an argument counts by its first dimension, a list that
is an argument by its length (a detector's images, which may differ in size). What is nested
deeper does not count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimkit.errors import InputError
from slimkit.outside import run_forward

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Batch",
    "ExampleInputs",
    "Inputs",
    "LossOfBatch",
    "as_batch",
    "as_inputs",
    "join",
    "map_tensors",
    "tensors_of",
]


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """A copy of nested lists, tuples and mappings with ``function`` applied to every tensor.

    Mappings that are no dictionaries (Hugging Face's ``BatchEncoding``) become dictionaries; what
    is neither a tensor nor a container is handed on.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (list, tuple)):
        mapped = [map_tensors(function, item) for item in tree]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    if isinstance(tree, dict):
        changed = copy.copy(tree)  # keeps the class, and its order or default
        for key, value in tree.items():
            changed[key] = map_tensors(function, value)
        return changed
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    return tree


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and mappings, in order of appearance."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors_of(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_of(item)


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one forward call.

    Attributes:
        args: positional arguments, tensors or any nesting of them.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: tuple[object, object] = self.args, self.kwargs
        if not isinstance(given[0], tuple) or not isinstance(given[1], Mapping):
            kinds = " and ".join(type(value).__name__ for value in given)
            raise InputError(
                f"expected a tuple of arguments and a mapping of keywords, got {kinds}",
                where="Inputs",
                hint="Inputs((x,)) for one argument",
            )

    def call(self, model: nn.Module) -> Any:
        """``model(*args, **kwargs)``, whatever it raises."""
        return model(*self.args, **self.kwargs)

    def run(self, model: nn.Module) -> Any:
        """``model(*args, **kwargs)`` of a network of the user's.

        Raises:
            CaptureError: the forward raised; names the module that was running.
        """
        return run_forward(model, self.args, self.kwargs)

    def tensors(self) -> list[Tensor]:
        """All tensors in order of appearance."""
        return [*tensors_of(self.args), *tensors_of(dict(self.kwargs))]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """A copy with ``function`` applied to every tensor."""
        kwargs = map_tensors(function, dict(self.kwargs)) if self.kwargs else {}
        return Inputs(map_tensors(function, self.args), kwargs)

    @property
    def plain(self) -> Any:
        """As a user wrote it: the one argument, a tuple of positional ones, or a dict of keywords.

        Itself where nothing of that says the same: positional beside keyword arguments, or one
        argument that is a tuple or a mapping.
        """
        if self.kwargs:
            return self if self.args else dict(self.kwargs)
        if len(self.args) != 1:
            return self.args
        only = self.args[0]
        return self if isinstance(only, (tuple, Mapping)) else only

    @property
    def examples(self) -> int | None:
        """How many examples there are; None where the arguments do not agree on a number.

        Tensors without dimensions, numbers, strings and None count nothing.
        """
        if len(self.args) == 1 and not self.kwargs:  # the usual call, once in every step
            only = _length(self.args[0])
            return None if only == _UNCOUNTED else only
        sizes = {_length(argument) for argument in (*self.args, *self.kwargs.values())}
        sizes.discard(_UNCOUNTED)
        return sizes.pop() if len(sizes) == 1 else None

    def part(self, start: int, end: int) -> Inputs:
        """The examples ``start`` … ``end − 1``.

        Raises:
            InputError: the arguments do not agree on a number of examples.
        """
        if self.examples is None:
            raise InputError("the examples of this batch cannot be told apart", where="inputs")
        chosen = slice(start, end)
        return Inputs(
            tuple(_slice(argument, chosen) for argument in self.args),
            {name: _slice(argument, chosen) for name, argument in self.kwargs.items()},
        )

    def split(self, size: int) -> list[Inputs]:
        """In parts of ``size`` examples; in one piece where they cannot be told apart."""
        count = self.examples
        if not count:
            return [self]
        return [self.part(start, start + size) for start in range(0, count, size)]

    def to(
        self,
        device: torch.device | str,
        *,
        layout: torch.memory_format = torch.preserve_format,
    ) -> Inputs:
        """A copy with every tensor on ``device``, images (N, C, H, W) in the memory ``layout``."""
        return self.map(lambda tensor: _moved(tensor, device, layout))


ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | Inputs
"""What public functions take: a tensor, a tuple (positional), a dict (keywords) or Inputs."""


@dataclass(frozen=True)
class Batch:
    """What a loader yields: a call of the model, what it should answer, which samples these are.

    Attributes:
        inputs: the call.
        targets: what belongs to it, in any structure; None where there is nothing, or where it
            is among the inputs (a model that computes its own loss).
        ids: numbers of the samples, int64 (N,), the same in every epoch; None where unknown.
    """

    inputs: Inputs
    targets: Any = None
    ids: Tensor | None = None

    @property
    def size(self) -> int | None:
        """How many samples; by the inputs, else by the targets; None where neither tells."""
        count = self.inputs.examples
        if count is None:
            found = _length(self.targets)
            count = found if found is None or found >= 0 else None
        return count

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with ``function`` applied to every tensor of inputs and targets."""
        return Batch(self.inputs.map(function), map_tensors(function, self.targets), self.ids)

    def to(
        self,
        device: torch.device | str,
        *,
        layout: torch.memory_format = torch.preserve_format,
    ) -> Batch:
        """A copy on ``device``; images among the inputs (N, C, H, W) in the memory ``layout``."""
        return Batch(
            self.inputs.to(device, layout=layout),
            map_tensors(lambda t: _moved(t, device, torch.preserve_format), self.targets),
            None if self.ids is None else self.ids.to(device, non_blocking=True),
        )

    def split(self, size: int) -> list[Batch]:
        """In parts of ``size`` samples; in one piece where they cannot be told apart.

        Targets of as many entries are split alike: tensors and lists, and those in a mapping or
        a tuple (the maps of a segmenter, the labels of several heads); other targets go with
        every part.
        """
        count = self.inputs.examples
        if not count:
            return [self]
        parts = []
        for start in range(0, count, size):
            chosen = slice(start, start + size)
            parts.append(
                Batch(
                    self.inputs.part(start, start + size),
                    _slice_targets(self.targets, chosen, count),
                    None if self.ids is None else self.ids[chosen],
                )
            )
        return parts


@dataclass(frozen=True)
class LossOfBatch:
    """A loss inside the model, for what else takes a loss of (outputs, targets).

    Attributes:
        function: ``function(model, batch)`` → (the mean over the samples, the outputs), as a
            task's :meth:`~slimkit.tasks.Task.loss`.
    """

    function: Callable[[nn.Module, Batch], tuple[Tensor, Any]]


def join(batches: Sequence[Batch]) -> Batch:
    """One batch with the samples of all: tensors are concatenated, lists follow each other.

    Raises:
        InputError: there is none, or they are not alike.
    """
    if not batches:
        raise InputError("there is no batch to join", where="batches")
    ids = [batch.ids for batch in batches if batch.ids is not None]
    try:
        return Batch(
            Inputs(
                _joined([batch.inputs.args for batch in batches]),
                _joined([dict(batch.inputs.kwargs) for batch in batches]),
            ),
            _joined([batch.targets for batch in batches]),
            torch.cat(ids) if len(ids) == len(batches) else None,
        )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the batches are not alike: {error}", where="batches") from error


def as_inputs(example_inputs: ExampleInputs) -> Inputs:
    """Normalise what the user passed.

    Raises:
        InputError: it is none of the accepted kinds, or holds no tensor.
    """
    if isinstance(example_inputs, Inputs):
        inputs = example_inputs
    elif isinstance(example_inputs, Batch):
        inputs = example_inputs.inputs
    elif isinstance(example_inputs, (Tensor, tuple, Mapping)):
        inputs = _as_call(example_inputs)
    else:
        raise InputError(
            f"expected a tensor, a tuple, a dict or slimkit.Inputs, "
            f"got {type(example_inputs).__name__}",
            where="example_inputs",
            hint="a model that takes one list gets a 1-tuple holding the list",
        )
    tensors = inputs.tensors()
    if not tensors:
        raise InputError("there is no tensor in them", where="example_inputs")
    for tensor in tensors:
        _check_usable(tensor, "example_inputs")
    return inputs


def as_batch(item: Any, example: Inputs | None = None, *, where: str = "loader") -> Batch:
    """What a loader yields as a batch.

    ============================================  ============================================
    ``Batch``, ``Inputs``, a tensor, a mapping     itself; arguments; the argument; keywords
    ``(inputs, targets)``, with ``ids`` as third   inputs: as above, a tuple is the positional
                                                   arguments, a list is one argument
    ``(inputs,)``                                  the same without targets
    ============================================  ============================================

    Args:
        item: of a loader.
        example: a call of the model. Where it is known, a tuple that does not begin with a whole
            call is read as the call itself, with anything behind its positional arguments as
            targets; and a mapping gives the keywords that the call has (a tokenizer's labels
            stay out).
        where: what an error names.

    Raises:
        InputError: it is none of these, or holds a tensor that is nested or without values.
    """
    if isinstance(item, Batch):
        return item
    for tensor in tensors_of(item):
        _check_usable(tensor, where)
    if isinstance(item, (Inputs, Tensor)):
        return Batch(_as_call(item))
    if isinstance(item, Mapping):
        return Batch(_keywords(item, example))
    if isinstance(item, (list, tuple)) and item:
        positional = 0 if example is None else len(example.args)
        if example is not None and _is_list_of_images(item, example):
            return Batch(Inputs((item,)))
        if positional and not isinstance(item[0], (Inputs, Mapping)) and len(item) >= positional:
            whole = positional > 1 and isinstance(item[0], tuple) and len(item[0]) == positional
            if not whole:
                rest = item[positional:]
                return Batch(Inputs(tuple(item[:positional])), rest[0] if rest else None)
        if len(item) <= 3:
            first = item[0]
            inputs = _keywords(first, example) if isinstance(first, Mapping) else _as_call(first)
            ids = item[2] if len(item) == 3 else None
            if ids is None or isinstance(ids, Tensor):
                return Batch(inputs, item[1] if len(item) > 1 else None, ids)
    raise InputError(
        f"expected a tensor, a mapping, slimkit.Inputs, (inputs, targets) or (inputs, targets, "
        f"ids), got {_described(item)}",
        where=where,
    )


def _check_usable(tensor: Tensor, where: str) -> None:
    """Refuse a tensor that has no shape, or no values.

    Raises:
        InputError: it is nested, or on the device ``meta``.
    """
    if tensor.is_nested:
        raise InputError(
            "a nested tensor has no shape",
            where=where,
            hint="pad it: torch.nested.to_padded_tensor",
        )
    if tensor.is_meta:
        raise InputError(
            "a tensor on the device 'meta' holds no values",
            where=where,
            hint="torch.randn of its shape",
        )


_UNCOUNTED = -1
"""Stands for the length of what has none, such as a number: it neither counts nor disagrees."""


def _length(argument: Any) -> int | None:
    """Examples in one argument; None where it is nested and does not say."""
    if isinstance(argument, Tensor):
        return len(argument) if argument.dim() else _UNCOUNTED
    if isinstance(argument, list):
        return len(argument)
    return None if next(tensors_of(argument), None) is not None else _UNCOUNTED


def _slice(argument: Any, chosen: slice) -> Any:
    return argument if _length(argument) == _UNCOUNTED else argument[chosen]


def _slice_targets(targets: Any, chosen: slice, count: int) -> Any:
    if isinstance(targets, (Tensor, list)):
        return targets[chosen] if _length(targets) == count else targets
    if isinstance(targets, Mapping):
        return {key: _slice_targets(value, chosen, count) for key, value in targets.items()}
    if isinstance(targets, tuple):
        return tuple(_slice_targets(item, chosen, count) for item in targets)
    return targets


def _moved(tensor: Tensor, device: torch.device | str, layout: torch.memory_format) -> Tensor:
    layout = layout if tensor.dim() == 4 else torch.preserve_format
    return tensor.to(device, non_blocking=True, memory_format=layout)


def _as_call(inputs: Any) -> Inputs:
    if isinstance(inputs, Inputs):
        return inputs
    if isinstance(inputs, Mapping):
        return Inputs((), dict(inputs))
    return Inputs(inputs) if isinstance(inputs, tuple) else Inputs((inputs,))


def _keywords(item: Mapping[str, Any], example: Inputs | None) -> Inputs:
    """A mapping as keywords; only those of the example where they are known."""
    known = {} if example is None else {k: item[k] for k in example.kwargs if k in item}
    return Inputs((), known or dict(item))


def _is_list_of_images(item: Any, example: Inputs) -> bool:
    """The model takes one list, and this is that list itself, without targets."""
    takes_list = len(example.args) == 1 and isinstance(example.args[0], list)
    return takes_list and isinstance(item, list) and all(isinstance(x, Tensor) for x in item)


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if first.dim() else first
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, list):
        return [entry for part in parts for entry in part]
    if isinstance(first, tuple):
        return tuple(_joined(entries) for entries in zip(*parts, strict=True))
    if any(part != first for part in parts):
        raise ValueError(f"{first!r} is not {next(p for p in parts if p != first)!r}")
    return first


def _described(item: Any) -> str:
    if isinstance(item, (list, tuple)):
        kinds = ", ".join(type(entry).__name__ for entry in item[:4])
        return f"a {type(item).__name__} of {len(item)} ({kinds}{', …' if len(item) > 4 else ''})"
    return f"a {type(item).__name__}"
