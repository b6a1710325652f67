"""What an annotation admits: type hints compiled to tests of values, for :mod:`slimkit.doors`.

Shallow where looking would use a value up: what an iterator yields is admitted unseen. Names that
are imported for type checkers only admit everything.
"""

from __future__ import annotations

import builtins
import collections.abc
import inspect
import math
import numbers
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["ANY", "Kind", "kinds_of"]


@dataclass(frozen=True, eq=False)
class Kind:
    """What an annotation admits.

    Attributes:
        expected: completes "expected …".
        admits: whether a value is of this kind.
        choices: valid names, where there are few.
        module: whether it may be a network.
        path: whether it may be a path.
        whole, real: whether it may be a whole or a real number.
        containers: what it may be that has entries of its own.
    """

    expected: str
    admits: Callable[[Any], bool]
    choices: tuple[str, ...] = ()
    module: bool = False
    path: bool = False
    whole: bool = False
    real: bool = False
    containers: tuple[_Container, ...] = ()

    def fault(self, value: Any, place: str) -> tuple[str, Kind, Any]:
        """Of a value that is not admitted the innermost entry to blame: (place, kind, value)."""
        for container in self.containers:
            if container.holds(value):
                for name, kind, item in container.entries(value):
                    if not kind.admits(item):
                        return kind.fault(item, f"{place}.{name}")
        return place, self, value


@dataclass(frozen=True, eq=False)
class _Container:
    """A value with entries: whether something is one, and its (name, kind, entry)."""

    holds: Callable[[Any], bool]
    entries: Callable[[Any], Iterator[tuple[object, Kind, Any]]]


ANY = Kind("anything", lambda _: True)
_NONE = Kind("None", lambda value: value is None)


class _Unknown:
    """Stands for a name that is imported for type checkers only; admits everything."""

    def __class_getitem__(cls, _: Any) -> type[_Unknown]:
        return cls


class _Names(dict[str, Any]):
    """What the names in annotations mean: the function's own module, torch's, or unknown."""

    def __init__(self, own: Mapping[str, Any]) -> None:
        super().__init__()
        self._own = own

    def __missing__(self, name: str) -> Any:
        if name in self._own:
            return self._own[name]
        if hasattr(builtins, name):
            return getattr(builtins, name)
        if name in {"nn", "torch", "Tensor"}:
            import torch

            return {"nn": torch.nn, "torch": torch, "Tensor": torch.Tensor}[name]
        return _own(name)


def _own(name: str) -> Any:
    """Our class or union of that name; unknown if it was never imported, or there are two."""
    home = __name__.partition(".")[0] + "."
    found = {
        value
        for path, module in tuple(sys.modules.items())
        if path.startswith(home)
        and isinstance(value := vars(module).get(name), (type, types.UnionType))
        and getattr(value, "__module__", path) in (path, "types")
    }
    return found.pop() if len(found) == 1 else _Unknown


def kinds_of(
    function: Callable[..., Any], signature: inspect.Signature
) -> Iterator[tuple[str, Kind]]:
    """(parameter, what its annotation admits) of every parameter that has one."""
    names = _Names(getattr(inspect.unwrap(function), "__globals__", {}))
    for name, parameter in signature.parameters.items():
        hint = parameter.annotation
        if hint is inspect.Parameter.empty or parameter.kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ):
            continue
        if isinstance(hint, str):
            try:
                hint = eval(hint, {}, names)
            except TypeError:  # such as ``Unknown.attribute | None``
                continue
        kind = _kind(hint)
        if parameter.default is None and kind is not ANY:
            kind = _either([kind, _NONE])
        yield name, kind


def _kind(hint: Any) -> Kind:
    """What a resolved annotation admits."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin in (Union, types.UnionType):
        return _either([_kind(argument) for argument in arguments])
    if origin is Literal:
        return _literal(arguments)
    if hint is None or hint is type(None):
        return _NONE
    found: Any = origin if isinstance(origin, type) else hint
    return _class(found, arguments) if isinstance(found, type) else ANY


def _class(kind: Any, arguments: tuple[Any, ...]) -> Kind:
    """What an annotation admits that is a class, such as ``Mapping[str, int]``."""
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    if kind is collections.abc.Callable or getattr(kind, "_is_protocol", False):
        return _protocol(kind)
    if issubclass(kind, os.PathLike):
        return Kind("a path", lambda value: isinstance(value, os.PathLike), path=True)
    if kind.__module__ == "collections.abc" or kind in (list, dict, set, frozenset, tuple):
        return _container(kind, arguments)
    module = _is_module_class(kind)
    name = "a torch.nn.Module" if module and kind.__name__ == "Module" else _named(kind)
    return Kind(name, lambda value: isinstance(value, kind), module=module)


def _either(kinds: list[Kind]) -> Kind:
    if any(kind is ANY for kind in kinds):
        return ANY
    told = [kind.expected for kind in kinds if kind is not _NONE]
    if any(kind.path for kind in kinds):
        told = ["a path", *(text for text in told if text not in {"text", "a path"})]
    return Kind(
        " or ".join(dict.fromkeys(told)) or "None",
        lambda value: any(kind.admits(value) for kind in kinds),
        choices=tuple(choice for kind in kinds for choice in kind.choices),
        module=any(kind.module for kind in kinds),
        path=any(kind.path for kind in kinds),
        whole=any(kind.whole for kind in kinds),
        real=any(kind.real for kind in kinds),
        containers=tuple(each for kind in kinds for each in kind.containers),
    )


def _literal(values: tuple[Any, ...]) -> Kind:
    allowed = {type(value) for value in values}
    return Kind(
        " or ".join(str(value) for value in values),
        lambda value: type(value) in allowed and value in values,
        choices=tuple(value for value in values if isinstance(value, str)),
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    try:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return real and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floating-point numbers
        return False


def _is_flag(value: Any) -> bool:
    if isinstance(value, int):
        return value in (0, 1)
    return type(value).__module__ == "numpy" and type(value).__name__ in {"bool", "bool_"}


_SIMPLE: Mapping[Any, Kind] = {
    Any: ANY,
    object: ANY,
    _Unknown: ANY,
    type: Kind("a class", lambda value: isinstance(value, type)),
    bool: Kind("True or False", _is_flag),
    int: Kind("an integer", _is_whole, whole=True),
    float: Kind("a finite number", _is_real, real=True),
    str: Kind("text", lambda value: isinstance(value, str)),
    bytes: Kind("bytes", lambda value: isinstance(value, bytes)),
}


def _protocol(kind: Any) -> Kind:
    """Numbers and text have no protocol; what is called is no list or mapping either."""
    if kind is collections.abc.Callable:
        return Kind("a function", callable)
    names = {name for base in kind.__mro__ for name in (*vars(base), *_annotated(base))}
    members = {name for name in names if not name.startswith("_")}
    return Kind(_named(kind), lambda value: _follows(value, members, calls="__call__" in names))


def _annotated(kind: type) -> Iterable[str]:
    found: Mapping[str, Any] = vars(kind).get("__annotations__", {})
    return found


def _follows(value: Any, members: Iterable[str], *, calls: bool) -> bool:
    """Whether it may follow a protocol, of which some members are optional: it has one of them."""
    if isinstance(value, (numbers.Number, str, bytes, type(None))):
        return False
    if calls and callable(value):
        return True
    own = type(value).__module__ != "builtins" or not calls
    return own and (not members or any(_has(value, name) for name in members))


def _has(value: Any, name: str) -> bool:
    try:
        return hasattr(value, name)
    except Exception:  # a user's own __getattr__ may raise anything
        return False


def _named(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def _is_module_class(kind: type) -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and issubclass(kind, torch.nn.Module)


def _container(kind: Any, arguments: tuple[Any, ...]) -> Kind:
    """A mapping, a list, a set or what can be iterated over; text is none of them."""
    inside = [_kind(argument) for argument in arguments if argument is not Ellipsis]
    if issubclass(kind, collections.abc.Mapping):
        return _mapping(*(inside if len(inside) == 2 else (ANY, ANY)))
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        return _filled(
            "(" + ", ".join(each.expected for each in inside) + ")",
            lambda value: isinstance(value, (tuple, list)) and len(value) == len(inside),
            lambda value: zip(range(len(inside)), inside, value, strict=True),
        )
    item = inside[0] if len(inside) == 1 else ANY
    loop = kind is collections.abc.Iterable
    accepted: Any = collections.abc.Collection if kind in (tuple, list) else kind

    def holds(value: Any) -> bool:
        fits = isinstance(value, accepted) or (loop and _iterates(value))
        return fits and not isinstance(value, (str, bytes))

    def entries(value: Any) -> Iterator[tuple[object, Kind, Any]]:
        listed = value if isinstance(value, (list, tuple, set)) else ()  # others would be used up
        return ((number, item, entry) for number, entry in enumerate(listed))

    name = "something to iterate over" if loop else "a tuple" if kind is tuple else "a list"
    return _filled(name if item is ANY else f"{name}, of {item.expected}", holds, entries)


def _mapping(keys: Kind, held: Kind) -> Kind:
    def entries(value: Any) -> Iterator[tuple[object, Kind, Any]]:
        for key, item in value.items():
            yield key if keys.admits(key) else "keys", keys, key
            yield key, held, item

    what = "" if held is ANY else f" from {keys.expected} to {held.expected}"
    return _filled(f"a mapping{what}", lambda value: isinstance(value, Mapping), entries)


def _filled(
    expected: str,
    holds: Callable[[Any], bool],
    entries: Callable[[Any], Iterator[tuple[object, Kind, Any]]],
) -> Kind:
    def admits(value: Any) -> bool:
        return holds(value) and all(kind.admits(item) for _, kind, item in entries(value))

    return Kind(expected, admits, containers=(_Container(holds, entries),))


def _iterates(value: Iterable[Any]) -> bool:
    """Whether ``iter`` takes it: by ``__iter__``, or by ``__getitem__`` from 0 on."""
    return hasattr(type(value), "__iter__") or hasattr(type(value), "__getitem__")
