"""What a quantization plan is made of: quantizers, and what is rounded at which call, as values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from slimkit.errors import PlanError, nearest
from slimkit.quantize.targets import NumberFormat

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["CallRule", "Decision", "QuantizerSpec", "check_names", "named_weights"]


@dataclass(frozen=True)
class QuantizerSpec:
    """One quantizer.

    Attributes:
        name: key in ``QuantizedModel.quantizers``.
        form: number format.
        parameter: the weight that it rounds, ``None`` for an activation.
        channels: number of scales of a weight, ``None`` for one per tensor.
        axis: dimension of the weight that the channels lie on.
        pairs: no two products with it may exceed 16 bits; see
            :func:`slimkit.quantize.scales.pair_sums`.
        scale: ``"follows"`` the largest magnitude of a weight at every call, or what is observed
            of an activation; of a weight ``"fixed"``; ``"learned"`` as a parameter (LSQ); of an
            activation ``"clip"``: up to a learned bound (PACT).
        blocks: a weight has so many scales per output channel, each for equally many inputs.
        dynamic: of an activation: scale and zero point are computed from each tensor.
        compact: of a weight: scales are powers of 2^(1/16), see
            :func:`slimkit.runtime.fake_quantize.on_grid`.
        bounds: of an activation: a range known beforehand, such as that of a sigmoid.
    """

    name: str
    form: NumberFormat
    parameter: str | None = None
    channels: int | None = None
    axis: int = 0
    pairs: bool = False
    scale: Literal["follows", "fixed", "learned", "clip"] = "follows"
    blocks: int | None = None
    dynamic: bool = False
    compact: bool = False
    bounds: tuple[float, float] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it needs data before it can round."""
        return self.parameter is None and not self.dynamic and self.bounds is None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantizerSpec:
        """Read what :func:`dataclasses.asdict` gave."""
        bounds = data.get("bounds")
        given = {**data, "form": NumberFormat(**data["form"])}
        return cls(**{**given, "bounds": None if bounds is None else tuple(bounds)})


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that can be the weight of a layer, by name: parameters, and fixed filters."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {**buffers, **dict(model.named_parameters(remove_duplicate=False))}


@dataclass(frozen=True)
class CallRule:
    """What is rounded at one call.

    Attributes:
        inputs: position among the tensors in the arguments → quantizer.
        outputs: position among the tensors in the result → quantizer.
        gate: of ``x · sigmoid(x)`` in one call: the quantizer of the second factor.
    """

    inputs: Mapping[int, str]
    outputs: Mapping[int, str]
    gate: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Positions as strings; without what is not there."""
        data: dict[str, Any] = {
            "inputs": {str(k): v for k, v in self.inputs.items()},
            "outputs": {str(k): v for k, v in self.outputs.items()},
        }
        return data if self.gate is None else {**data, "gate": self.gate}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CallRule:
        """Read what :meth:`to_json` wrote."""
        return cls(
            {int(k): str(v) for k, v in data["inputs"].items()},
            {int(k): str(v) for k, v in data["outputs"].items()},
            data.get("gate"),
        )

    def names(self) -> Iterator[str]:
        """All quantizers in it."""
        yield from self.inputs.values()
        yield from self.outputs.values()
        if self.gate is not None:
            yield self.gate


@dataclass(frozen=True)
class Decision:
    """Whether a call computes with integers, and why not.

    A call that computes in float may still keep its weight as integers: it has a ``weight``.

    Attributes:
        address: ``"module:function#ordinal"``.
        module: of the weights, or else the one that makes the call.
        integer: it does.
        reason: for a call left in float; empty otherwise.
        reads: quantizers of its data inputs.
        weight: quantizer of its weight, if it has one.
        writes: quantizer of its output, perhaps behind a clipping activation function; ``None``
            when the output leaves in float.
        macs: multiply-accumulates of the call for the whole example.
    """

    address: str
    module: str
    integer: bool
    reason: str = ""
    reads: tuple[str, ...] = ()
    weight: str | None = None
    writes: str | None = None
    macs: int = 0


def check_names(
    quantizers: Iterable[QuantizerSpec],
    calls: Mapping[str, CallRule],
    decisions: Iterable[Decision],
) -> None:
    """Every quantizer is used by a call, and whatever is used is a quantizer.

    Raises:
        PlanError: a name is missing, there twice, or there for nothing; a call rounds nothing.
    """
    names = [spec.name for spec in quantizers]
    known = set(names)
    if len(known) < len(names):
        raise PlanError(
            "two quantizers have this name",
            where=next(name for name in names if names.count(name) > 1),
        )
    used: set[str] = set()
    for address, rule in calls.items():
        found = set(rule.names())
        if not found:
            raise PlanError("nothing is rounded at this call", where=address)
        _check_known(found, known, address)
        used |= found
    if known - used:
        raise PlanError("no call uses this quantizer", where=min(known - used))
    for decision in decisions:  # what it writes may never have got a scale, and is left in float
        read = {*decision.reads, *([] if decision.weight is None else [decision.weight])}
        _check_known(read, known, decision.address)


def _check_known(found: Set[str], known: Set[str], address: str) -> None:
    missing = found - known
    if missing:
        name = min(missing)
        raise PlanError(f"there is no quantizer {name!r}", where=address, hint=nearest(name, known))
