"""YAML text → plain values, within limits: a recipe may come from anywhere."""

from __future__ import annotations

import re
from typing import Any

import yaml

from slimkit.errors import RecipeError

__all__ = ["MOST_BYTES", "MOST_LEVELS", "MOST_NODES", "parse_yaml"]

MOST_BYTES = 2**20
"""Of a recipe; the longest of ours has 4,000."""
MOST_LEVELS = 40
"""Of mappings and lists in each other."""
MOST_NODES = 20_000
"""Values, with those that aliases repeat (which may double at every level: "billion laughs")."""
_LARGEST = 2**63
"""Integers lie below it; beyond, neither torch nor Arrow nor a JSON reader elsewhere has them."""


def parse_yaml(text: str, where: str) -> Any:
    """What the text says: mappings, lists, texts, numbers.

    Args:
        text: YAML 1.1, of which ``1e-4`` is a number here too.
        where: the file or argument, for the error.

    Raises:
        RecipeError: not YAML, a key is written twice, or it is beyond a limit (levels, values,
            64 bits of an integer); with line and column.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"not valid YAML: {problem}", where=place) from error
    except (ValueError, OverflowError, RecursionError) as error:  # such as "\\UFFFFFFFF"
        raise RecipeError(f"not valid YAML: {error}", where=where) from error


class _Loader(yaml.SafeLoader):
    """SafeLoader with limits that reads ``1e-4`` as a number and refuses a repeated key."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._level = 0
        self._nodes = 0  # so far, with those that aliases repeat
        self._sizes: dict[int, int] = {}  # id of a finished node → nodes in it, itself included

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node and all below it, counted."""
        alias = self.check_event(yaml.AliasEvent)
        events: Any = self  # its stubs leave this method without types
        mark = events.peek_event().start_mark
        before = self._nodes
        self._level += 1
        if self._level > MOST_LEVELS + 1:
            raise _problem(f"it is nested more than {MOST_LEVELS} deep", mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if alias and id(node) not in self._sizes:
            raise _problem("an alias stands within what it names", mark)
        self._nodes += self._sizes[id(node)] if alias else 1
        if self._nodes > MOST_NODES:
            raise _problem(f"it has more than {MOST_NODES} values, aliases written out", mark)
        if not alias:
            self._sizes[id(node)] = self._nodes - before
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; whatever a malformed one raises names its place."""
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # of the constructors of dates, numbers, tags
            shown = str(getattr(node, "value", ""))[:40]
            raise _problem(f"cannot read {shown!r}", node.start_mark) from error
        if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
            raise _problem("an integer of more than 64 bits", node.start_mark)
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:  # half of a surrogate pair
                raise _problem("a text that is not Unicode", node.start_mark) from error
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in the base class; a key that is there twice is a mistake."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # "<<: *anchor"; what it brings may be
                continue  # overridden
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise _problem(f"the key {key!r} is there twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _problem(text: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, text, mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789."),
)
