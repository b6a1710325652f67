"""Random numbers of a forward of ours, drawn apart from everybody else's."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["PrivateRandomNumbers"]

_lock = threading.Lock()
_here = threading.local()
"""``lending``: a mode of this thread has put its state into a default generator."""


class PrivateRandomNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random operators draw from generators of its own while it is on, in this thread alone.

    torch's default generators belong to the whole process: to save and restore them would give
    the same numbers twice to a thread that draws meanwhile.

    Args:
        seed: of the generators; None begins where the default ones are.
    """

    supports_higher_order_operators = True

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        if seed is None:
            self._generator(torch.device("cpu"))  # where it is now, not at the first number

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        lent = getattr(_here, "lending", False)
        if lent or kwargs.get("generator") is not None or not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        device = _device(args, kwargs)
        if device.type == "meta":
            return func(*args, **kwargs)
        drawing = _with_generator(func)
        if drawing is not None:
            return drawing(*args, **{**kwargs, "generator": self._generator(device)})
        return self._lent(func, args, kwargs, device)

    def _generator(self, device: torch.device) -> torch.Generator:
        found = self._generators.get(device)
        if found is None:
            found = self._generators[device] = torch.Generator(device)
            if self._seed is None:
                found.set_state(_default(device).get_state())
            else:
                found.manual_seed(self._seed)
        return found

    def _lent(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
    ) -> Any:
        """Run an operator that knows the default generator only, for that long with our state."""
        own, default = self._generator(device), _default(device)
        with _lock:
            before = default.get_state()
            default.set_state(own.get_state())
            _here.lending = True  # to this mode, not to one around it
            try:
                return func(*args, **kwargs)
            finally:
                _here.lending = False
                own.set_state(default.get_state())
                default.set_state(before)


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws random numbers; attention does not without dropout."""
    random, place, default = _randomness(func)
    if not random or place is None:
        return random
    chance = args[place] if place < len(args) else kwargs.get("dropout_p", default)
    return not isinstance(chance, int | float) or chance != 0


@functools.cache
def _randomness(func: Any) -> tuple[bool, int | None, Any]:
    """Whether an operator may draw; place and default of its argument ``dropout_p``, if any."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False, None, None
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return True, place, argument.default_value
    return True, None, None


@functools.cache
def _with_generator(func: Any) -> Any:
    """The overload of an operator that takes a generator, and otherwise the same arguments."""
    wanted = [argument.name for argument in func._schema.arguments]
    if "generator" in wanted:
        return func
    packet = func.overloadpacket
    for name in packet.overloads():
        found = getattr(packet, name)
        names = [argument.name for argument in found._schema.arguments]
        if "generator" in names and [n for n in names if n != "generator"] == wanted:
            return found
    return None


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where an operator draws, with the number of the GPU."""
    given = kwargs.get("device")
    tensors = (item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor))
    places = [given] if given is not None else [tensor.device for tensor in tensors]
    device = torch.device(places[0] if places else "cpu")
    if device == torch.device("cuda"):  # the current one
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _default(device: torch.device) -> torch.Generator:
    """The generator that everybody draws from."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return torch.cuda.default_generators[device.index]
    return torch.default_generator
