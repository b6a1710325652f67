"""Registries, names → objects: how recipes and arguments find criteria, losses, models, stages.

A registry maps a name to an object, or to ``"package.module:attribute"`` which is imported
on first use, so that listing what exists costs no heavy import. A name of that very form
is accepted wherever a registered name is: a user's own function needs no registration.
"""

from __future__ import annotations

import importlib
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from slimkit.errors import (
    InputError,
    MissingDependencyError,
    SlimkitError,
    UnknownNameError,
    nearest,
)

__all__ = ["Registry", "import_object"]

T = TypeVar("T")


def import_object(reference: str, *, where: str | None = None) -> object:
    """Import ``"package.module:attribute"``.

    Raises:
        UnknownNameError: the module or the attribute does not exist.
        MissingDependencyError: the module imports something that is not installed.
        InputError: the module cannot be read or raises while it is imported; the message names
            its file and line.
    """
    module_name, _, attribute = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UnknownNameError(
                f"there is no module {error.name!r}", where=where or reference
            ) from error
        raise MissingDependencyError(
            f"{module_name} needs {error.name!r}, which is not installed",
            where=where or reference,
            hint=f"pip install {error.name}",
        ) from error
    except (Exception, SystemExit) as error:  # whatever a module does while it is imported
        raise InputError(
            f"importing {module_name!r} failed{_place_in_import(error)}: "
            f"{type(error).__name__}: {getattr(error, 'msg', None) or error}",
            where=where or reference,
        ) from error
    target: object = module
    for part in attribute.split("."):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            raise UnknownNameError(
                f"{module_name} has no attribute {attribute!r}",
                where=where or reference,
                hint=nearest(part, [n for n in dir(target) if not n.startswith("_")]),
            ) from error
    return target


def _place_in_import(error: BaseException) -> str:
    """`` at FILE:LINE`` of what failed, in the user's own file where one is on the way."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    run = [frame for frame in frames[1:] if not frame.filename.startswith("<frozen importlib")]
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    own = [frame for frame in run if not frame.filename.startswith(library)]
    for frame in reversed(own or run):
        return f" at {frame.filename}:{frame.lineno}"
    return ""


@dataclass(frozen=True)
class _Lazy:
    reference: str


class Registry(Generic[T]):
    """A small dictionary with lazy entries and errors that help.

    Args:
        kind: what the entries are, in the singular (``"criterion"``); used in messages.
        fits: whether an object may be one; asked of those that ``"package.module:name"`` names.

    Example:
        >>> CRITERIA: Registry[type] = Registry("criterion")
        >>> @CRITERIA.register("mine")
        ... class Mine: ...
        >>> CRITERIA.get("mine") is Mine
        True
    """

    def __init__(self, kind: str, fits: Callable[[Any], bool] | None = None) -> None:
        self.kind = kind
        self._fits = fits
        self._entries: dict[str, T | _Lazy] = {}
        self._mentions: dict[str, tuple[str, str]] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that files the decorated object under ``name``.

        Raises:
            SlimkitError: the name is taken by another object.
        """

        def decorate(thing: T) -> T:
            held = self._entries.get(name)
            if held is not None and not isinstance(held, _Lazy) and held is not thing:
                same = getattr(held, "__qualname__", 0) == getattr(thing, "__qualname__", 1)
                if not same:  # a notebook cell run again redefines its own entry
                    raise SlimkitError(f"the {self.kind} {name!r} is registered already")
            self._entries[name] = thing
            return thing

        return decorate

    def register_lazy(self, name: str, reference: str) -> None:
        """File ``"package.module:attribute"`` under ``name``; imported on first use."""
        self._entries.setdefault(name, _Lazy(reference))

    def mention(self, name: str, reason: str, *, hint: str) -> None:
        """Say why there can be no entry for a name that people will try.

        Args:
            name: a name that :meth:`get` refuses.
            reason: completes the sentence "it cannot be chosen by name: …".
            hint: what to write instead.
        """
        self._mentions[name] = (reason, hint)

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """What is registered inside is forgotten at the end: for tests and notebooks."""
        before = dict(self._entries)
        try:
            yield
        finally:
            self._entries = before

    def get(self, name: str, *, where: str | None = None) -> T:
        """The entry called ``name``, or the object that ``"package.module:attribute"`` names.

        Args:
            name: a registered name or an import reference.
            where: recipe path or argument to name in the error.

        Raises:
            UnknownNameError: with the nearest registered names.
            InputError: what is imported is nothing of this kind.
        """
        if not isinstance(name, str):
            raise InputError(f"expected text, got {type(name).__name__}", where=where or self.kind)
        entry = self._entries.get(name)
        if isinstance(entry, _Lazy):
            thing = cast("T", import_object(entry.reference))
            self._entries[name] = thing
            return thing
        if entry is not None:
            return entry
        if ":" in name:
            found = import_object(name, where=where)
            if self._fits is not None and not self._fits(found):
                raise InputError(
                    f"{name} is a {type(found).__name__} that is no {self.kind}", where=where
                )
            return cast("T", found)
        if name in self._mentions:
            reason, hint = self._mentions[name]
            raise UnknownNameError(
                f"the {self.kind} {name!r} cannot be chosen by name: {reason}",
                where=where,
                hint=hint,
            )
        known = [*self._entries, *self._mentions]
        raise UnknownNameError(
            f"unknown {self.kind} {name!r}", where=where, hint=nearest(name, known)
        )

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._entries)
