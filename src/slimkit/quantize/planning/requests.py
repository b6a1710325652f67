"""What a user asks for, held against what the target can do."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import get_args

from slimkit.doors import door
from slimkit.errors import InputError, nearest
from slimkit.quantize.targets import Granularity, Mode, Target

__all__ = ["GROUP_SIZE", "PerGroup", "Request", "check_request", "granularity_of"]

GROUP_SIZE = 32
"""Weights that share a scale with ``granularity="group"``, unless the user says otherwise: the
smallest group that every target has, and the one that loses least."""


@door
@dataclass(frozen=True)
class PerGroup:
    """Granularity: one weight scale per group of inputs of each output channel.

    Attributes:
        size: inputs of one group; what is possible, the target says.
    """

    size: int = GROUP_SIZE


def granularity_of(name: str, group_size: int | None) -> str | PerGroup:
    """The granularity that two plain settings describe.

    Raises:
        InputError: there is a size, but no groups.
    """
    if group_size is None:
        return name
    if name != "group":
        raise InputError(
            f"{name!r} scales have no groups of {group_size}",
            where="group_size",
            hint="use granularity='group'",
        )
    return PerGroup(group_size)


@dataclass(frozen=True)
class Request:
    """A valid request.

    Attributes:
        mode: see :data:`~slimkit.quantize.targets.Mode`.
        granularity: see :data:`~slimkit.quantize.targets.Granularity`.
        group_size: inputs that share a weight scale; ``None`` without groups.
        weight_bits: module path → bits of its weight, where they are not the target's.
    """

    mode: str = "static"
    granularity: str = "channel"
    group_size: int | None = None
    weight_bits: Mapping[str, int] = field(default_factory=dict)


def check_request(
    target: Target,
    *,
    mode: str,
    granularity: str | PerGroup,
    weight_bits: Mapping[str, int],
) -> Request:
    """The request, if ``target`` can express it.

    Raises:
        InputError: names the argument and the nearest choice that the target has.
    """
    group_size = granularity.size if isinstance(granularity, PerGroup) else GROUP_SIZE
    granularity = "group" if isinstance(granularity, PerGroup) else granularity
    _check_choice("mode", mode, get_args(Mode), target.modes, target)
    _check_choice("granularity", granularity, get_args(Granularity), target.granularities, target)
    for bits in weight_bits.values():
        _check_number("weight_bits", bits, target.weight_bits, f"{target.name} has no {bits}-bit")
    if granularity != "group":
        return Request(mode, granularity, None, weight_bits)
    if mode != "weights":
        raise InputError(
            "integer kernels take one weight scale per output channel, not one per group",
            where="granularity",
            hint="use mode='weights', or granularity='channel'",
        )
    message = f"{target.name} has no groups of {group_size}"
    _check_number("group_size", group_size, target.group_sizes, message)
    return Request(mode, granularity, group_size, weight_bits)


def _check_choice(
    where: str, value: str, known: tuple[str, ...], possible: Collection[str], target: Target
) -> None:
    if value not in known:
        raise InputError(f"unknown {where} {value!r}", where=where, hint=nearest(value, known))
    if value not in possible:
        choices = ", ".join(repr(name) for name in known if name in possible)
        raise InputError(f"{target.name} has no {value!r}", where=where, hint=f"use {choices}")


def _check_number(where: str, value: int, possible: Iterable[int], message: str) -> None:
    if value not in possible:
        best = min(possible, key=lambda other: (abs(other - value), -other))
        raise InputError(f"{message} weights", where=where, hint=f"the nearest is {best}")
