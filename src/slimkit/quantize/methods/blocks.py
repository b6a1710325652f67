"""Blocks: the modules of a network that can run alone, one after the other.

Repairing a layer needs the tensors that reach it, after everything before it was repaired. To run
the whole network up to every layer costs as many forwards as there are layers. A network is mostly
a chain of modules, though, each reading what the last one made: with the inputs of one of them at
hand, everything in it is reached by running it alone, and the next one's inputs are its outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimkit.graph.addressing import AddressMode
from slimkit.inputs import Inputs

__all__ = ["Block", "Outline", "outline"]


@dataclass(frozen=True)
class Block:
    """A module that runs once, takes one tensor and gives one.

    Attributes:
        path: of the module.
        addresses: of the calls inside.
        reads: path of the block whose output is its input, ``None`` if something else is.
    """

    path: str
    addresses: frozenset[str]
    reads: str | None


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


def outline(model: nn.Module, example: Inputs, layers: Set[str], *, largest: int = 8) -> Outline:
    """Run ``model`` once and find its blocks.

    They are the outermost modules that can run alone and are no ``nn.Sequential``, with at most
    ``largest`` layers inside: residual blocks, the blocks of a transformer, and single modules
    between those. The network as a whole is none.

    Args:
        model: in evaluation mode.
        example: one call.
        layers: addresses of the layers that count.
        largest: a module with more of them is taken apart.
    """
    trace = _Trace(model)
    with torch.no_grad(), trace.watching_modules(), trace:
        example.call(model)
    blocks: dict[str, Block] = {}
    made_by: dict[_Identity, str] = {}
    for run in trace.cut(trace.root, layers, largest):
        blocks[run.path] = Block(run.path, frozenset(run.addresses), made_by.get(run.reads))
        made_by[run.makes] = run.path
    return Outline(tuple(trace.root.addresses), blocks, trace.functions)


_Identity = tuple[int, int]
"""Of a tensor: which object, and how often it was changed in place."""
_UNKNOWN = (0, 0)


@dataclass
class _Run:
    """One run of a module; ``reads`` and ``makes`` stay unknown unless they are one tensor."""

    path: str
    module: nn.Module
    reads: _Identity = _UNKNOWN
    makes: _Identity = _UNKNOWN
    addresses: list[str] = field(default_factory=list)
    inside: list[_Run] = field(default_factory=list)


class _Trace(AddressMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
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
            reads = self._identity(args[0]) if len(args) == 1 and not kwargs else _UNKNOWN
            run = _Run(path, module, reads)
            self._runs[path] += 1
            self._running[-1].inside.append(run)
            self._running.append(run)

        return enter

    def _leave_hook(self) -> Callable[..., None]:
        def leave(_module: nn.Module, _args: Any, result: Any) -> None:
            self._running.pop().makes = self._identity(result)

        return leave

    def _identity(self, value: Any) -> _Identity:
        if not isinstance(value, Tensor):
            return _UNKNOWN
        self._kept.append(value)
        with torch._C.DisableTorchFunction():  # reading an attribute counts as a call
            return id(value), value._version

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
        if _UNKNOWN in (run.reads, run.makes) or self._runs[run.path] > 1:
            return False
        inside = Counter(address.partition(":")[0] for address in run.addresses)
        own = all(f"{path}.".startswith(f"{run.path}.") for path in inside)
        return own and all(self._calls[path] == count for path, count in inside.items())
