"""What a plan is to reach: one fraction that goes, of the channels or of a cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from slimkit.doors import door
from slimkit.errors import InputError

__all__ = ["RemovalTarget", "TargetKind", "checked_target", "is_number"]

TargetKind = Literal["ratio", "macs", "params", "latency"]


@door
@dataclass(frozen=True)
class RemovalTarget:
    """How much to remove; a budget, given as the part that goes.

    Attributes:
        kind: ``"ratio"`` (of the channels), ``"macs"``, ``"params"`` or ``"latency"`` (of the
            milliseconds measured in a runtime).
        fraction: the part that goes, between 0 and 1.
    """

    kind: TargetKind
    fraction: float

    def __str__(self) -> str:
        return f"{self.kind}={self.fraction:g}"


def checked_target(**targets: float | None) -> RemovalTarget:
    """The one target that was given.

    Raises:
        InputError: none, several, or no fraction between 0 and 1.
    """
    given = {kind: value for kind, value in targets.items() if value is not None}
    if len(given) != 1:
        names = " and ".join(f"{kind}=" for kind in given) or "none"
        raise InputError(
            f"give exactly one target, got {names}",
            where="prune.plan",
            hint=f"{', '.join(f'{kind}=' for kind in targets)}: the fraction to remove",
        )
    ((kind, fraction),) = given.items()
    if not is_number(fraction) or not 0.0 < fraction < 1.0:
        raise InputError(
            f"expected a fraction to remove between 0 and 1, got {fraction!r}",
            where=kind,
            hint="0.5 removes half",
        )
    return RemovalTarget(cast("TargetKind", kind), fraction)


def is_number(value: object) -> bool:
    """Whether a value is an integer or a float (and no truth value)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
