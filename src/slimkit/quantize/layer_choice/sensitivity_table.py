"""What quantizing one layer costs: the table that a sensitivity analysis fills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from slimkit.artifact import PathLike
from slimkit.errors import InputError
from slimkit.measure.tables import rendered
from slimkit.quantize.outputs.distance import decibels
from slimkit.search.measured_points import (
    check_question,
    numbers,
    read_table,
    texts,
    write_table,
)

__all__ = ["PLANNED", "LayerSensitivity", "Measure"]

_KIND = "slimkit.layer_sensitivity"
_VERSION = 1

Measure = Literal["metric", "sqnr"]
PLANNED = 0
"""In place of a width: the bits that the plan has, which may differ from layer to layer."""


@dataclass(frozen=True)
class LayerSensitivity:
    """What a network loses by the rounding of each layer. Print it for a table.

    Attributes:
        measure: ``"metric"``: values are those of the user's evaluation. ``"sqnr"``: they are
            noise-to-signal ratios of the outputs, Σ difference² / Σ output²; printed in dB.
        leave_one_out: everything is quantized but the layer; otherwise the layer alone is.
        layers: name of a layer or group → module paths, in order of execution.
        base: metric of the float network, or its noise, 0; None before it is measured.
        quantized: weight bits → value with everything quantized.
        points: layer or group → weight bits → value; it grows point by point.
        identity: what it belongs to: hashes of weights, scheme and calibrated ranges.
    """

    measure: Measure
    leave_one_out: bool
    layers: Mapping[str, tuple[str, ...]]
    base: float | None = None
    quantized: Mapping[int, float] = field(default_factory=dict)
    points: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def bits(self) -> tuple[int, ...]:
        """Widths that were measured, widest first."""
        found = {width for values in self.points.values() for width in values}
        return tuple(sorted({*found, *self.quantized}, reverse=True))

    def damage(self, layer: str, bits: int | None = None) -> float:
        """What the rounding of one layer costs, in the unit of :attr:`measure`.

        The fall of the metric, or the noise-to-signal ratio, which adds up over layers as long
        as their noise is independent. With ``leave_one_out`` it is what leaving the layer in
        float wins back. It may be negative: then rounding helped, or it is chance.

        Args:
            layer: name in :attr:`layers`.
            bits: a measured width; the smallest by default.
        """
        width = self.bits[-1] if bits is None else bits
        value = self.points[layer][width]
        whole = self.quantized[width] if self.leave_one_out else self.base
        assert whole is not None
        loss = whole - value if self.measure == "metric" else value - whole
        return -loss if self.leave_one_out else loss

    def ranking(self, bits: int | None = None) -> list[str]:
        """Layers, the most damaging first; of equal ones the first that runs."""
        return sorted(self.layers, key=lambda layer: -self.damage(layer, bits))

    # --- growing ------------------------------------------------------------------------

    @classmethod
    def empty(
        cls,
        units: Mapping[str, Sequence[str]],
        measure: str,
        *,
        leave_one_out: bool,
        identity: Mapping[str, Any],
    ) -> LayerSensitivity:
        """A table without points; without noise where nothing is rounded."""
        if measure not in get_args(Measure):
            raise InputError(f"expected one of {get_args(Measure)}", where="measure")
        layers = {name: tuple(inside) for name, inside in units.items()}
        base = 0.0 if measure == "sqnr" else None
        return cls(cast("Measure", measure), leave_one_out, layers, base, identity=identity)

    def missing(self, bits: Sequence[int]) -> list[tuple[str | None, int]]:
        """(layer, width) of the points to measure; a layer None means the whole network."""
        todo: list[tuple[str | None, int]] = [
            (None, width) for width in dict.fromkeys(bits) if width not in self.quantized
        ]
        return todo + [
            (layer, width)
            for width in dict.fromkeys(bits)
            for layer in self.layers
            if width not in self.points.get(layer, {})
        ]

    def with_base(self, value: float) -> LayerSensitivity:
        """A copy that knows the metric of the float network."""
        return replace(self, base=value)

    def with_point(self, layer: str | None, bits: int, value: float) -> LayerSensitivity:
        """A copy with one point more; of the whole network where ``layer`` is None."""
        if layer is None:
            return replace(self, quantized={**self.quantized, bits: value})
        known = self.points.get(layer, {})
        return replace(self, points={**self.points, layer: {**known, bits: value}})

    def of(self, bits: Sequence[int]) -> LayerSensitivity:
        """A copy with these widths alone."""
        points = {
            layer: {width: values[width] for width in bits if width in values}
            for layer, values in self.points.items()
        }
        return replace(
            self,
            quantized={width: self.quantized[width] for width in bits if width in self.quantized},
            points={layer: points[layer] for layer in self.layers if layer in points},
        )

    def joined(self, other: LayerSensitivity, *, where: str) -> LayerSensitivity:
        """A copy with what ``other`` knows as well.

        Raises:
            InputError: ``other`` is about another network, scheme, calibration or question.
        """
        check_question(
            other._question(),
            self._question(),
            where=where,
            message="it belongs to another analysis",
            error=InputError,
        )
        base = other.base if self.base is None else self.base
        return replace(self, base=base, quantized=other.quantized, points=other.points)

    def _question(self) -> dict[str, Any]:
        record = self.to_json()
        return {key: record[key] for key in ("measure", "leave_one_out", "layers", "identity")}

    # --- reading and writing ------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything, with widths as text."""
        return {
            "measure": self.measure,
            "leave_one_out": self.leave_one_out,
            "layers": {name: list(inside) for name, inside in self.layers.items()},
            "base": self.base,
            "quantized": texts(self.quantized),
            "points": {layer: texts(values) for layer, values in self.points.items()},
            "identity": dict(self.identity),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LayerSensitivity:
        """The inverse of :meth:`to_json`."""
        return cls(
            cast("Measure", str(record["measure"])),
            bool(record["leave_one_out"]),
            {str(name): tuple(inside) for name, inside in record["layers"].items()},
            None if record["base"] is None else float(record["base"]),
            numbers(record["quantized"]),
            {str(layer): numbers(values) for layer, values in record["points"].items()},
            dict(record["identity"]),
        )

    def save(self, path: PathLike) -> None:
        """Write a JSON file, atomically."""
        write_table(path, _KIND, _VERSION, self.to_json())

    @classmethod
    def load(cls, path: PathLike) -> LayerSensitivity:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged, or something else.
        """
        return read_table(path, _KIND, _VERSION, cls.from_json, what="layer sensitivities")

    # --- for people ---------------------------------------------------------------------

    def told(self, layer: str | None, bits: int) -> str:
        """One point as it is printed."""
        value = self.quantized[bits] if layer is None else self.points[layer][bits]
        return self._text(value)

    def _text(self, value: float) -> str:
        if self.measure == "metric":
            return f"{value:.5g}"
        return f"{decibels(value):.1f} dB" if value > 0 else "exact"

    def __str__(self) -> str:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        table.add_column("layer", no_wrap=True)
        widths = [width for width in self.bits if all(width in p for p in self.points.values())]
        for width in widths:
            table.add_column(f"{width} bits" if width else "value", justify="right", no_wrap=True)
            if self.measure == "metric":
                gain = "wins back" if self.leave_one_out else "costs"
                table.add_column(gain, justify="right", no_wrap=True)
        for layer in self.ranking() if widths and len(self.points) == len(self.layers) else []:
            cells = []
            for width in widths:
                cells.append(self._text(self.points[layer][width]))
                if self.measure == "metric":
                    cells.append(f"{self.damage(layer, width):.4g}")
            table.add_row(layer, *cells)
        return f"{self._head(widths)}\n{rendered(table, width=200)}"

    def _head(self, widths: Sequence[int]) -> str:
        whole = ", ".join(
            self._text(self.quantized[width]) + (f" at {width} bits" if width else "")
            for width in widths
            if width in self.quantized
        )
        what = "metric" if self.measure == "metric" else "signal to quantization noise of outputs"
        which = "everything but one layer is" if self.leave_one_out else "one layer alone is"
        start = f"float {self._text(self.base)}; " if self.base else ""
        return f"{what} when {which} quantized ({start}everything quantized {whole}):"
