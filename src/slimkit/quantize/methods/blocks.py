"""Blocks: the modules of a network that can run alone, one after the other.

Repairing a layer needs the tensors that reach it, after everything before it was repaired. To run
the whole network up to every layer costs as many forwards as there are layers. A network is mostly
a chain of modules, though, each reading what earlier ones made or were given: with the inputs of
one of them at hand, everything in it is reached by running it alone, and what it makes are inputs
of the next. Attention masks, position embeddings and skip connections are such inputs, too: they
are kept for as long as a later block reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from slimkit.graph.addressing import AddressMode
from slimkit.graph.call_table import CallTable
from slimkit.inputs import Inputs

__all__ = ["Arguments", "Block", "Outline", "TensorSource", "outline", "tensors_in"]


class TensorSource(NamedTuple):
    """Where a tensor that a block reads comes from.

    Attributes:
        block: path of a block.
        made: that block made it; else it is the first to be given it, from anywhere.
        place: which of the tensors that it makes, or is given.
    """

    block: str
    made: bool
    place: int


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, apart from the tensors in them.

    Attributes:
        leaves: in order; None in the place of a tensor.
        tensors: which of the leaves are tensors.
        form: how leaves become positional and keyword arguments.
    """

    leaves: tuple[Any, ...]
    tensors: tuple[bool, ...]
    form: TreeSpec

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Of that call."""
        leaves, form = tree_flatten((args, dict(kwargs)))
        tensors = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        kept = (
            None if is_tensor else leaf for leaf, is_tensor in zip(leaves, tensors, strict=True)
        )
        return cls(tuple(kept), tensors, form)

    @property
    def plain(self) -> bool:
        """Whether they can be given again: a cache, say, would have grown."""
        return all(_is_plain(leaf) for leaf in self.leaves)

    @property
    def numbers(self) -> bool:
        """Whether there are numbers, which may differ from batch to batch, such as a width."""
        return any(
            isinstance(leaf, int | float | tuple) and not isinstance(leaf, bool)
            for leaf in self.leaves
        )

    def call(self, module: nn.Module, tensors: list[Tensor]) -> Any:
        """Run ``module`` with ``tensors`` in their places."""
        given = iter(tensors)
        pairs = zip(self.leaves, self.tensors, strict=True)
        leaves = [next(given) if is_tensor else leaf for leaf, is_tensor in pairs]
        args, kwargs = tree_unflatten(leaves, self.form)
        return module(*args, **kwargs)


@dataclass(frozen=True)
class Block:
    """A module that runs once and depends on nothing but its arguments.

    Attributes:
        path: of the module.
        addresses: of the calls inside.
        sources: of the tensors among its arguments, in order.
        arguments: of its call.
        sizes: first dimension of those tensors, −1 for none.
        size: first dimension of the first tensor that it makes.
    """

    path: str
    addresses: frozenset[str]
    sources: tuple[TensorSource, ...]
    arguments: Arguments
    sizes: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Outline:
    """How a network ran.

    Attributes:
        addresses: of all calls, in order.
        blocks: path → block, in order of execution. They do not overlap, and need not cover
            everything together.
        functions: address of a call of one tensor → the same call for another tensor.
    """

    addresses: tuple[str, ...]
    blocks: Mapping[str, Block]
    functions: Mapping[str, Callable[[Tensor], Any]]

    def around(self, addresses: Set[str]) -> Block | None:
        """The block that holds all of these calls, if one does."""
        holds = (block for block in self.blocks.values() if addresses <= block.addresses)
        return next(holds, None)

    def way(self, target: Block, have: Set[TensorSource]) -> list[Block] | None:
        """The blocks to run, in order, for the inputs of ``target`` to be at hand.

        Args:
            target: where to arrive.
            have: tensors that are at hand.

        Returns:
            None if some tensor comes from outside of blocks, so that the network has to run.
        """
        known, before = set(have), []
        ready: set[str] = set()

        def at_hand(source: TensorSource) -> bool:
            return source in known or (source.made and source.block in ready)

        for block in self.blocks.values():
            if block.path == target.path:
                break
            if all(at_hand(source) for source in block.sources):
                before.append(block)
                ready.add(block.path)
        if not all(at_hand(source) for source in target.sources):
            return None
        wanted = set(target.sources) - known
        way: list[Block] = []
        for block in reversed(before):
            if any(source.made and source.block == block.path for source in wanted):
                way.insert(0, block)
                wanted |= set(block.sources) - known
        return way

    def read_from(self, block: Block) -> set[TensorSource]:
        """What this block and those behind it read."""
        paths = list(self.blocks)
        behind = paths[paths.index(block.path) :]
        return {source for path in behind for source in self.blocks[path].sources}


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in arguments or results, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def outline(
    model: nn.Module,
    example: Inputs,
    layers: Set[str],
    *,
    table: CallTable | None = None,
    largest: int = 8,
) -> Outline:
    """Run ``model`` once and find its blocks.

    They are the outermost modules that can run alone and are no ``nn.Sequential``, with at most
    ``largest`` layers inside: residual blocks, the blocks of a transformer, and single modules
    between those. The network as a whole is none.

    Args:
        model: in evaluation mode.
        example: one call.
        layers: addresses of the layers that count.
        table: of the capture that these addresses are from; without it calls are counted.
        largest: a module with more of them is taken apart.
    """
    trace = _Trace(model, table, layers)
    with torch.no_grad(), trace.watching_modules(), trace:
        example.call(model)
    blocks: dict[str, Block] = {}
    origins: dict[_Identity, TensorSource] = {}
    for run in trace.cut(trace.root, layers, largest):
        for place, identity in enumerate(run.reads):
            origins.setdefault(identity, TensorSource(run.path, made=False, place=place))
        sources = tuple(origins[identity] for identity in run.reads)
        assert run.arguments is not None
        blocks[run.path] = Block(
            run.path, frozenset(run.addresses), sources, run.arguments, run.sizes, run.size
        )
        for place, identity in enumerate(run.makes):  # what is handed on keeps its source
            origins.setdefault(identity, TensorSource(run.path, made=True, place=place))
    return Outline(tuple(trace.root.addresses), blocks, trace.functions)


_Identity = tuple[int, int]
"""Of a tensor: which object, and how often it was changed in place."""

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format, Enum)
"""What can be given to a module again without having changed in the meantime."""


def _is_plain(leaf: Any) -> bool:
    if isinstance(leaf, tuple):  # torch.Size
        return all(_is_plain(entry) for entry in leaf)
    return isinstance(leaf, _PLAIN)


@dataclass
class _Run:
    """One run of a module."""

    path: str
    module: nn.Module
    arguments: Arguments | None = None
    reads: tuple[_Identity, ...] = ()
    makes: tuple[_Identity, ...] = ()
    sizes: tuple[int, ...] = ()
    size: int = -1
    addresses: list[str] = field(default_factory=list)
    inside: list[_Run] = field(default_factory=list)


class _Trace(AddressMode):
    def __init__(self, model: nn.Module, table: CallTable | None, layers: Set[str]) -> None:
        super().__init__(model, table, layers)
        self.root = _Run("", model)
        self.functions: dict[str, Callable[[Tensor], Any]] = {}
        self._model = model
        self._running = [self.root]
        self._calls: Counter[str] = Counter()  # module path → calls made by it
        self._runs: Counter[str] = Counter()  # module path → runs of it
        self._kept: list[Tensor] = []  # while they live, no other tensor has their identity

    def on_call(
        self,
        address: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        self._calls[address.partition(":")[0]] += 1
        for run in self._running:
            run.addresses.append(address)
        rest = args[1:]
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((rest, dict(kwargs)))):
            self.functions[address] = lambda x: func(x, *rest, **kwargs)
        return func(*args, **kwargs)

    def watching_modules(self) -> ExitStack:
        """Inside, runs of modules are noted."""
        hooks = ExitStack()
        for path, module in self._model.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):
                enter, leave = self._enter_hook(path), self._leave_hook()
                handle = module.register_forward_pre_hook(enter, with_kwargs=True)
                hooks.callback(handle.remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        return hooks

    def _enter_hook(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = tensors_in((args, kwargs))
            run = _Run(path, module, Arguments.of(args, kwargs), self._identities(tensors))
            run.sizes = tuple(_first_size(tensor) for tensor in tensors)
            self._runs[path] += 1
            self._running[-1].inside.append(run)
            self._running.append(run)

        return enter

    def _leave_hook(self) -> Callable[..., None]:
        def leave(_module: nn.Module, _args: Any, result: Any) -> None:
            run, tensors = self._running.pop(), tensors_in(result)
            run.makes = self._identities(tensors)
            run.size = _first_size(tensors[0]) if tensors else -1

        return leave

    def _identities(self, tensors: list[Tensor]) -> tuple[_Identity, ...]:
        self._kept += tensors
        with torch._C.DisableTorchFunction():  # reading an attribute counts as a call
            return tuple((id(tensor), tensor._version) for tensor in tensors)

    def cut(self, run: _Run, layers: Set[str], largest: int) -> Iterator[_Run]:
        """The runs of blocks inside ``run``, in order."""
        for child in run.inside:
            container = isinstance(child.module, nn.Sequential) and bool(child.inside)
            small = len(layers & set(child.addresses)) <= largest
            if small and not container and self._alone(child):
                yield child
            else:
                yield from self.cut(child, layers, largest)

    def _alone(self, run: _Run) -> bool:
        """Whether its module can run by itself and then makes the same calls."""
        if run.arguments is None or not run.arguments.plain or self._runs[run.path] > 1:
            return False
        if not run.reads or not run.makes:
            return False
        inside = Counter(address.partition(":")[0] for address in run.addresses)
        own = all(f"{path}.".startswith(f"{run.path}.") for path in inside)
        return own and all(self._calls[path] == count for path, count in inside.items())


def _first_size(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.shape[0] if tensor.dim() else -1
