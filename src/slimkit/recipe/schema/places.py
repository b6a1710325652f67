"""Where in a recipe an error belongs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from slimkit.errors import DataError, ModelError, SlimkitError

__all__ = ["at"]


@contextmanager
def at(where: str, *, replacing: bool = False) -> Iterator[None]:
    """Put the path in the recipe in front of the place that an error names.

    Args:
        where: the path.
        replacing: the error's own place is no path of the recipe: leave it out.
    """
    try:
        yield
    except SlimkitError as error:
        own = error.where
        if own is None or replacing or own == where or own.startswith(f"{where}."):
            place = where if own is None or replacing else own
        elif isinstance(error, DataError | ModelError) and own == where.split(".", maxsplit=1)[0]:
            place = where
        else:
            deeper = own.partition(": ")[0].isidentifier()  # a key, perhaps with a file behind it
            place = f"{where}.{own}" if deeper else f"{where}: {own}"
        raise type(error)(error.message, where=place, hint=error.hint) from error
