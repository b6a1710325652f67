"""How much quantization may cost, or how much may stay in float: one value for the whole choice.

It stands outside of its room so that the command line can make options of it without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from slimkit.artifact import PathLike
from slimkit.doors import door
from slimkit.errors import InputError, nearest

__all__ = ["KINDS", "MOST_DB", "Fewest", "Limit"]

Fewest = Literal["layers", "macs"]
"""What of the network is left in float as little as possible."""

MOST_DB = 200.0
"""dB, what outputs without any difference count as, and its negative what outputs that are not
finite do: journals and tables hold finite numbers only. float32 rounds at about 150 dB."""

KINDS = ("max_drop", "min_sqnr", "max_float")
"""Fields of which exactly one is given."""


@door
@dataclass(frozen=True)
class Limit:
    """What :func:`~slimkit.quantize.ptq` leaves in float, as a limit of the loss or as a budget.

    Exactly one of the first three fields says how much. Their ``help`` is that of the command
    line's options, which are made from these fields.

    Attributes:
        max_drop: as few layers stay in float as it takes for the metric to fall by no more than
            this, in its own unit (0.5 points of a metric in percent); the plan names them.
        min_sqnr: the same without labels: the outputs on the calibration batches must lie so many
            dB above their difference from the float network's, 0 to 200; 20 to 30 are usual.
        max_float: so much of the network's multiply-adds may stay in float, 0.1 for a tenth: in
            the layers where that brings the outputs on the calibration batches closest to the
            float network's. A budget where the other two are goals.
        fewest: what is left in float as little as possible for either goal: ``"layers"``, or
            ``"macs"``, the multiply-adds in them, which is what they cost at run time.
        evaluate: network → metric on validation data, higher is better; for ``max_drop``.
        sensitivity: layers are ranked for either goal by estimates of their noise, from a few
            backward passes. With a file each is measured alone instead, and the file keeps it.

    Raises:
        InputError: not exactly one limit, or a value is not valid; names the field.
    """

    max_drop: float | None = field(
        default=None,
        metadata={
            "help": "Points of accuracy on validation images that may go; as few layers as "
            "possible stay in float for it.",
            "show_default": "everything is quantized",
        },
    )
    min_sqnr: float | None = field(
        default=None,
        metadata={
            "help": "dB that the outputs must lie above their difference from the float "
            "network's; as --max-drop, without labels.",
            "show_default": "everything is quantized",
        },
    )
    max_float: float | None = field(
        default=None,
        metadata={
            "help": "Share of the multiply-adds that may stay in float, 0.1 for a tenth, in the "
            "layers where that helps the outputs most.",
            "show_default": "everything is quantized",
        },
    )
    fewest: Fewest = field(
        default="layers",
        metadata={"help": "What stays in float as little as possible for a limit: layers or macs."},
    )
    evaluate: Callable[[Any], float] | None = None
    sensitivity: PathLike | None = None

    def __post_init__(self) -> None:
        if self.fewest not in get_args(Fewest):
            raise InputError(
                f"expected layers or macs, got {self.fewest!r}",
                where="fewest",
                hint=nearest(str(self.fewest), get_args(Fewest)),
            )
        given = self.given()
        if self.evaluate is not None and self.max_drop is None:
            raise InputError("evaluate needs it", where="max_drop", hint="max_drop=0.5")
        if len(given) > 1:
            raise InputError(
                f"{given[0]} says already how much stays in float",
                where=given[1],
                hint="leave one of them out",
            )
        if not given:
            raise InputError(
                f"expected one of {', '.join(KINDS)}", where="limit", hint="Limit(min_sqnr=20)"
            )
        if self.max_drop is not None:
            _check_number(self.max_drop, "max_drop")
            if not callable(self.evaluate):
                raise InputError(
                    f"expected a function of the network, got {self.evaluate!r}",
                    where="evaluate",
                    hint="evaluate=fn, model → accuracy on validation data",
                )
        if self.min_sqnr is not None:
            _check_number(self.min_sqnr, "min_sqnr")
            if self.min_sqnr >= MOST_DB:
                raise InputError(f"expected less than {MOST_DB:g} dB", where="min_sqnr", hint="20")
        if self.max_float is not None:
            _check_share(self.max_float)

    def given(self) -> tuple[str, ...]:
        """Which of the limits are given: one, where it is valid."""
        return tuple(name for name in KINDS if getattr(self, name) is not None)


def _check_number(value: Any, where: str) -> None:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or value < 0:
        raise InputError(f"expected a number ≥ 0, got {value!r}", where=where)


def _check_share(share: Any) -> None:
    numeric = isinstance(share, int | float) and not isinstance(share, bool)
    if not numeric or not 0.0 < share <= 1.0:
        hint = f"{share / 100:g}" if numeric and 1.0 < share <= 100.0 else "0.1 for a tenth"
        raise InputError(
            f"expected a share of the multiply-adds in (0, 1], got {share!r}",
            where="max_float",
            hint=hint,
        )
