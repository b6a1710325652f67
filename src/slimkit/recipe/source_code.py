"""What code stands behind a name: a hash of the user's own files, a version of everything else.

The imports between the user's files are followed, so that a helper module counts as much as the
module that a recipe names. What cannot be seen in the text of a file (``importlib.import_module``,
data that is read at run time) is not followed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import sys
import uuid
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["code_behind", "version_of"]

_INSTALLED = {"site-packages", "dist-packages"}
"""Folders of installed distributions: their versions count, not their files."""
_READ: dict[str, tuple[object, bytes]] = {}
"""Loaded module → (its spec, its text when it was first asked for).

A file that is edited after it was loaded is not the code that runs: what is loaded counts, until
the module is loaded again.
"""
_TYPED: dict[int, tuple[object, str]] = {}
"""Objects without a source, such as of an interactive session → a number of this process alone."""


def code_behind(mentions: Iterable[object]) -> dict[str, str]:
    """Module → hash of its text for the user's own, package → version for installed ones.

    Slimkit's own modules are left out: its stages and methods have version numbers.

    Args:
        mentions: classes, functions, instances, and strings ``package.module:name``; a string
            whose module does not exist is no mention.
    """
    found: dict[str, str] = {}
    waiting: list[str] = []
    for thing in mentions:
        if isinstance(thing, str):
            waiting.append(thing.partition(":")[0])
        target = _target(thing) if isinstance(thing, str) else thing
        if target is None:  # not loaded: its imports will say where it comes from
            continue
        home = _home(target)
        waiting.append(home)
        if _is_typed(home):
            found[f"{home}:{_name(target)}"] = _typed_source(target)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        kind = _kind(name)
        if kind == "own":
            text = _text(name)
            if text is not None:
                found[name] = hashlib.sha256(text).hexdigest()
                waiting += _imports(name, text)
            waiting += [name.rpartition(".")[0]] if "." in name else []  # its package runs first
        elif kind is not None:
            found[kind] = version_of(kind) or "unknown"
    return found


@functools.cache
def version_of(package: str) -> str | None:
    """Version of the distribution that brings a package; of Python for ``"python"``."""
    if package == "python":
        return ".".join(platform.python_version_tuple()[:2])
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    for distribution in importlib.metadata.packages_distributions().get(package, ()):
        return importlib.metadata.version(distribution)
    return getattr(sys.modules.get(package), "__version__", None)


def _target(reference: str) -> object:
    """What ``package.module:name`` is, if the module is loaded and it can be described by code."""
    name, _, attribute = reference.partition(":")
    target: object = sys.modules.get(name)
    for part in attribute.split("."):
        target = getattr(target, part, None)
    return None if isinstance(target, str) else target


def _home(thing: object) -> str:
    """The module in which an object, or the class of it, was written."""
    thing = getattr(thing, "func", thing)  # of functools.partial
    module = getattr(thing, "__module__", None)
    return module if isinstance(module, str) else type(thing).__module__


def _kind(name: str) -> str | None:
    """``"own"``, the name of an installed package, ``"python"``; None for what does not count."""
    top = name.partition(".")[0]
    if top == "slimkit":
        return None
    if top in sys.stdlib_module_names:
        return "python"
    spec = _spec(top)
    if spec is None:
        return "own" if top in sys.modules else None
    places = [spec.origin or "", *(spec.submodule_search_locations or ())]
    installed = any(_INSTALLED & set(Path(place).parts) for place in places)
    return top if installed else "own"


def _spec(name: str) -> ModuleSpec | None:
    """How a module is found, without importing it or its packages."""
    module = sys.modules.get(name)
    if module is not None:
        return module.__spec__
    above, _, _ = name.rpartition(".")
    path: Any = None
    if above:
        package = _spec(above)
        path = package.submodule_search_locations if package is not None else None
        if path is None:
            return None
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except (AttributeError, ImportError, ValueError):
            continue
        if spec is not None:
            return spec
    return None


def _text(name: str) -> bytes | None:
    """The text of a module; None if it has none, as a folder without ``__init__.py``."""
    module = sys.modules.get(name)
    spec = _spec(name)
    if module is None:
        return _file(spec, None)
    held = _READ.get(name)
    mark = module if spec is None else spec
    if held is None or held[0] is not mark:
        text = _file(spec, module)
        if text is None:
            return None
        _READ[name] = held = (mark, text)
    return held[1]


def _file(spec: ModuleSpec | None, module: ModuleType | None) -> bytes | None:
    origin = getattr(module, "__file__", None) or (spec.origin if spec is not None else None)
    try:
        return Path(origin).read_bytes() if origin else None
    except OSError:
        pass
    loader: Any = spec.loader if spec is not None else None
    try:  # in an archive
        text = loader.get_source(spec.name)  # type: ignore[union-attr]
    except (AttributeError, ImportError):
        return None
    return None if text is None else str(text).encode()


def _imports(name: str, text: bytes) -> Iterator[str]:
    """The modules that the text of a module imports, wherever in it."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # compiled
        return
    spec = _spec(name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                source = importlib.util.resolve_name(
                    "." * node.level + (node.module or ""), package or None
                )
            except ImportError:  # relative, outside of a package
                continue
            yield source
            if _kind(source) == "own":
                below = (f"{source}.{alias.name}" for alias in node.names)
                yield from (module for module in below if _spec(module) is not None)


def _is_typed(name: str) -> bool:
    """Whether a module has no file: typed into a session, or made by a program."""
    return _kind(name) == "own" and name in sys.modules and _text(name) is None


def _name(thing: object) -> str:
    return getattr(thing, "__qualname__", None) or type(thing).__qualname__


def _typed_source(thing: object) -> str:
    """The text of an object as a notebook keeps it; else a number that no other process has."""
    subject: Any = thing if inspect.isclass(thing) or inspect.isroutine(thing) else type(thing)
    try:
        return hashlib.sha256(inspect.getsource(subject).encode()).hexdigest()
    except (OSError, TypeError):
        return _TYPED.setdefault(id(subject), (subject, uuid.uuid4().hex))[1]
