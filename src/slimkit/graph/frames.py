"""Frames: running modules, and what their values are called inside of them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

__all__ = ["Frame"]


class Frame:
    """One running module. The names are explained in :mod:`slimkit.graph.call_table`.

    Args:
        path: of the module.
        label: of this run of it.
        module: the module, or a proxy that shares its dictionary.
        operands: names, in the caller, of the tensors that it was given.

    Attributes:
        tainted: names that passed through a call which the capture has not seen.
        region: where activations are kept; see :func:`slimkit.graph.recomputation.region`.
    """

    __slots__ = ("label", "module", "names", "operands", "path", "region", "tainted")

    def __init__(
        self, path: str, label: str, module: nn.Module, operands: tuple[str, ...] = ()
    ) -> None:
        self.path, self.label, self.module, self.operands = path, label, module, operands
        # A weak reference tells whether an identity still is that tensor's. Names kept as
        # attributes of tensors would travel with what the model returns.
        self.names: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.tainted: set[str] = set()
        self.region: Any = None

    def give_name(self, tensor: Tensor, name: str) -> None:
        """From now on ``tensor`` is called ``name``."""
        self.names[id(tensor)] = (weakref.ref(tensor), name)

    def made(self, tensor: Tensor) -> str | None:
        """The name of a tensor that this module was given or has made."""
        held = self.names.get(id(tensor))
        return held[1] if held is not None and held[0]() is tensor else None

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of a tensor that it was given, has made or owns."""
        held = self.names.get(id(tensor))
        if held is not None and held[0]() is tensor:
            return held[1]
        module = self.module
        for name, own in module._parameters.items():
            if own is tensor:
                return "." + name
        for name, buffer in module._buffers.items():
            if buffer is tensor:
                return "." + name
        if "_former_parameters" in module.__dict__:  # a replica of nn.DataParallel
            former: dict[str, Tensor] = module.__dict__["_former_parameters"]
            for name, shared in former.items():
                if shared is tensor:
                    return "." + name
        return None
