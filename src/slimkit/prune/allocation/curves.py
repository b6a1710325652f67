"""Sensitivity curves: how much the metric falls when one unit alone is pruned.

The value that :func:`~slimkit.prune.allocation.sensitivity.measure_sensitivity` fills, a file that
grows with it, and the ratios that follow from a loss threshold.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slimkit.artifact import PathLike, tensors_hash
from slimkit.doors import door
from slimkit.errors import InputError, PlanError
from slimkit.measure.tables import rendered
from slimkit.search.measured_points import (
    check_question,
    numbers,
    read_table,
    texts,
    write_table,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from slimkit.prune.prune_space import Proposal, PruneSpace, Unit

    Numbers = npt.NDArray[np.float64]

__all__ = [
    "SensitivityCurves",
    "UnitCurve",
    "by_fraction",
    "fingerprint",
    "merge_sensitivities",
]

_KIND = "slimkit.sensitivity"
_VERSION = 1


@dataclass(frozen=True)
class UnitCurve:
    """The metric of a network in which one unit alone is pruned.

    Attributes:
        size: channels of the unit's largest group.
        groups: names of its groups.
        order: hash of the order in which its channels go.
        values: channels that stay → metric; it grows point by point.
    """

    size: int
    groups: tuple[str, ...]
    order: str
    values: Mapping[int, float] = field(default_factory=dict)

    def losses(self, base: float) -> tuple[Numbers, Numbers]:
        """Ratios removed, ascending from 0, and the loss at each, made monotone.

        The loss is the fall of the metric below ``base``. Noise that makes it rise and fall
        again is evened out by isotonic regression (pool adjacent violators); it starts at 0
        and is never negative.
        """
        from scipy.optimize import isotonic_regression

        kept = sorted(self.values, reverse=True)
        ratios = np.array([0.0, *(1.0 - n / self.size for n in kept)])
        falls = np.array([0.0, *(base - self.values[n] for n in kept)])
        return ratios, np.maximum(isotonic_regression(falls).x, 0.0)

    def to_json(self) -> dict[str, Any]:
        """Everything, with numbers of channels as text."""
        values = {kept: self.values[kept] for kept in sorted(self.values, reverse=True)}
        return {**self._question(), "kept": texts(values)}

    def _question(self) -> dict[str, Any]:
        return {"size": self.size, "groups": list(self.groups), "order": self.order}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> UnitCurve:
        """The inverse of :meth:`to_json`."""
        return cls(
            int(record["size"]),
            tuple(record["groups"]),
            str(record["order"]),
            numbers(record["kept"]),
        )


@dataclass(frozen=True)
class SensitivityCurves:
    """One curve per unit of a network.

    Attributes:
        base: metric of the unpruned network; None before it is measured.
        weights: tensor name → hash: the network that the curves belong to.
        units: unit name → curve.
    """

    base: float | None
    weights: Mapping[str, str]
    units: Mapping[str, UnitCurve]

    @classmethod
    def of(cls, space: PruneSpace) -> SensitivityCurves:
        """Curves without points for the units of ``space``."""
        return cls(
            None, fingerprint(space), {unit.name: _empty(space, unit) for unit in space.units}
        )

    def with_base(self, value: float) -> SensitivityCurves:
        """A copy that knows the metric of the unpruned network."""
        return replace(self, base=value)

    def with_point(self, unit: str, kept: int, value: float) -> SensitivityCurves:
        """A copy with one point more."""
        curve = self.units[unit]
        longer = replace(curve, values={**curve.values, kept: value})
        return replace(self, units={**self.units, unit: longer})

    def joined(self, other: SensitivityCurves, *, where: str) -> SensitivityCurves:
        """A copy with what ``other`` knows as well; known points stay.

        Metrics of ``other`` are shifted by the difference of the two bases, which two
        machines may round differently.

        Raises:
            PlanError: ``other`` is about another network, other channels or other data.
        """
        shared = self.units.keys() & other.units.keys()
        check_question(
            other._question(shared),
            self._question(shared),
            where=where,
            message="these sensitivities belong to another network or criterion",
            error=PlanError,
        )
        shift = 0.0
        if self.base is not None and other.base is not None:
            shift = self.base - other.base
            if abs(shift) > 0.01 * max(abs(self.base), abs(other.base)):
                raise PlanError(
                    f"the unpruned network scores {other.base:g} there and {self.base:g} here",
                    where=where,
                    hint="evaluate on the same data, or give a new file",
                )
        units = dict(self.units)
        for name, curve in other.units.items():
            moved = {kept: value + shift for kept, value in curve.values.items()}
            known = units.get(name, curve)
            units[name] = replace(known, values={**moved, **self._values(name)})
        return replace(self, base=other.base if self.base is None else self.base, units=units)

    def ratios_at(self, loss: float) -> dict[str, float]:
        """The largest part of each unit that can go alone with at most this loss.

        Between measured points the loss is interpolated; beyond the last one nothing is
        promised.

        Args:
            loss: fall of the metric, in its own unit.
        """
        found = {}
        for name, curve in self.units.items():
            ratios, losses = curve.losses(self._base)
            last = int(np.searchsorted(losses, loss, side="right")) - 1
            if last < 0:
                found[name] = 0.0
            elif last == len(losses) - 1:
                found[name] = float(ratios[-1])
            else:
                part = (loss - losses[last]) / (losses[last + 1] - losses[last])
                found[name] = float(ratios[last] + part * (ratios[last + 1] - ratios[last]))
        return found

    def proposal(self, space: PruneSpace) -> Proposal:
        """The family of equal losses: every unit gives what it can below one threshold.

        A fraction f leads to the threshold at which f of all channels go. Where curves are
        flat, units give in proportion, so that the family has no jumps.
        """
        curves = {unit.name: self.units[unit.name].losses(self._base) for unit in space.units}
        rising = np.concatenate([losses[losses > 0] for _, losses in curves.values()])
        tilt = 1e-3 * float(np.median(rising)) if len(rising) else 1.0
        tilted = {
            name: (ratios, losses + tilt * ratios) for name, (ratios, losses) in curves.items()
        }
        knots = np.unique(np.concatenate([losses for _, losses in tilted.values()]))

        def ratios_at(thresholds: Numbers) -> dict[str, Numbers]:
            return {name: np.interp(thresholds, ls, rs) for name, (rs, ls) in tilted.items()}

        return by_fraction(space, ratios_at, knots)

    def explain(self) -> str:
        """A table: what each unit loses alone at four ratios (interpolated)."""
        from rich.table import Table

        shown = (0.3, 0.5, 0.7, 0.9)
        table = Table(box=None, pad_edge=False)
        table.add_column("unit", no_wrap=True)
        for heading in ("channels", "points", *(f"−{100 * ratio:.0f} %" for ratio in shown)):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, curve in self.units.items():
            ratios, losses = curve.losses(self._base)
            falls = [
                f"{np.interp(ratio, ratios, losses):.4g}" if ratio <= ratios[-1] + 0.05 else ""
                for ratio in shown
            ]
            table.add_row(name, str(curve.size), str(len(curve.values)), *falls)
        head = f"metric of the unpruned network {self._base:.6g}; how much it falls when one unit"
        return f"{head} alone loses so many channels:\n{rendered(table, width=200)}"

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "base": self.base,
            "units": {name: curve.to_json() for name, curve in self.units.items()},
            "weights": dict(self.weights),
        }

    def save(self, path: PathLike) -> None:
        """Write a JSON file, atomically."""
        write_table(path, _KIND, _VERSION, self.to_json())

    @classmethod
    def load(cls, path: PathLike) -> SensitivityCurves:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged, or something else.
        """
        return read_table(path, _KIND, _VERSION, cls.from_json, what="sensitivity curves")

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SensitivityCurves:
        """The inverse of :meth:`to_json`."""
        return cls(
            None if record["base"] is None else float(record["base"]),
            {str(name): str(value) for name, value in record["weights"].items()},
            {str(name): UnitCurve.from_json(curve) for name, curve in record["units"].items()},
        )

    @property
    def _base(self) -> float:
        if self.base is None:
            raise PlanError("the unpruned network is not evaluated yet", where="sensitivity")
        return self.base

    def _question(self, units: Iterable[str]) -> dict[str, Any]:
        """What the points belong to; the weights first, for they explain the rest."""
        named = {unit: self.units[unit]._question() for unit in sorted(units)}
        return {"weights": dict(self.weights), **named}

    def _values(self, unit: str) -> Mapping[int, float]:
        curve = self.units.get(unit)
        return {} if curve is None else curve.values


@door
def merge_sensitivities(parts: Iterable[PathLike | SensitivityCurves]) -> SensitivityCurves:
    """Join curves that were measured in parts, on one machine or on several.

    Args:
        parts: files or curves; of a point in several of them the first counts.

    Raises:
        InputError: there are none.
        PlanError: they are about different networks or data; names the file and where.
        ArtifactError: a file cannot be read.
    """
    merged: SensitivityCurves | None = None
    for number, part in enumerate(parts):
        if isinstance(part, SensitivityCurves):
            where, curves = f"parts[{number}]", part
        elif isinstance(part, (str, os.PathLike)):
            where, curves = str(part), SensitivityCurves.load(part)
        else:
            raise InputError(
                f"expected a file or curves, got {type(part).__name__}", where=f"parts[{number}]"
            )
        merged = curves if merged is None else merged.joined(curves, where=where)
    if merged is None:
        raise InputError("there is nothing to merge", where="parts")
    return merged


def fingerprint(space: PruneSpace) -> dict[str, str]:
    """Tensor name → short hash of its content, for every weight and statistic of a network."""
    return {
        name: tensors_hash({"": tensor})[:16]
        for name, tensor in space.model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and not name.endswith("num_batches_tracked")
    }


def by_fraction(
    space: PruneSpace,
    ratios_at: Callable[[Numbers], Mapping[str, Numbers]],
    knots: Sequence[float] | Numbers,
) -> Proposal:
    """A family of ratios as a proposal: at fraction f, f of all channels go.

    Beyond the last level all units shrink on in proportion.

    Args:
        space: what is pruned.
        ratios_at: levels ``(n,)`` → unit name → part that goes ``(n,)``, not falling with the
            level and linear between the knots.
        knots: levels, ascending; at the first nothing goes, at the last as much as ever.
    """
    sizes = {group.name: group.size for group in space.groups}
    weight = {unit.name: sum(sizes[name] for name in unit.groups) for unit in space.units}
    levels = np.asarray(knots, dtype=np.float64)
    ratios = ratios_at(levels)
    channels = np.stack([weight[name] * ratios[name] for name in weight]).sum(axis=0)
    removed = channels / sum(weight.values())

    def proposal(fraction: float) -> dict[str, float]:
        level = np.interp([fraction], removed, levels)
        found = ratios_at(level)
        beyond = 1.0 if fraction <= removed[-1] else (1.0 - fraction) / (1.0 - removed[-1])
        return {
            name: sizes[name] * beyond * (1.0 - float(found[unit.name][0]))
            for unit in space.units
            for name in unit.groups
        }

    return proposal


def _empty(space: PruneSpace, unit: Unit) -> UnitCurve:
    digest = hashlib.sha256()
    for name in unit.groups:
        order = torch.argsort(space.scores[name], descending=True, stable=True)
        digest.update(order.to(torch.int64).numpy().tobytes())
    return UnitCurve(unit.size, unit.groups, digest.hexdigest()[:16])
