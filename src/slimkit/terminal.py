"""Text of others made safe to print: control characters are shown instead of obeyed."""

from __future__ import annotations

from typing import Any

__all__ = ["visible", "visible_json"]

_KEPT = "\n\t"
_DIRECTIONS = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_PICTURES = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEPT}
    | {0x7F: "\u2421"}
    | dict.fromkeys([*range(0x80, 0xA0), *_DIRECTIONS], "\ufffd")
)
"""C0 controls become the control pictures of Unicode, C1 and the marks that turn the direction of
writing become replacement characters."""


def visible(text: str) -> str:
    """``text`` without what a terminal takes as a command; line breaks and tabs stay.

    Escape sequences could repaint what was printed before, set the title or type for the user.
    """
    return text if text.isascii() and text.isprintable() else text.translate(_PICTURES)


def visible_json(value: Any) -> Any:
    """The same for all keys and texts in a JSON value."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(str(key)): visible_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [visible_json(item) for item in value]
    return value
