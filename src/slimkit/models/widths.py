"""Width multiplier: numbers of channels scaled and rounded to multiples of 8."""

from __future__ import annotations

from slimkit.errors import ModelError

__all__ = ["scaled_channels"]


def scaled_channels(base: int, width: float) -> int:
    """``base * width`` channels, to the nearest multiple of 8 and at least 8.

    Raises:
        ModelError: the width is not positive.
    """
    if not width > 0:
        raise ModelError(f"width must be positive, got {width}", where="width")
    return max(8, int(base * width / 8 + 0.5) * 8)
