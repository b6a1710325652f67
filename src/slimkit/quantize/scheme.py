"""The quantization plan: which call reads and makes which tensors through which quantizer."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from slimkit.errors import PlanError, nearest
from slimkit.graph.call_table import CallTable
from slimkit.graph.computed_weights import make_plain, plain_layers, replace_layers
from slimkit.graph.folding import FusePlan
from slimkit.modules import copy_module
from slimkit.plan import Plan
from slimkit.quantize.specs import CallRule, Decision, QuantizerSpec, check_names, named_weights
from slimkit.quantize.wrapper import QuantizedModel

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["QuantPlan"]


@dataclass(frozen=True)
class QuantPlan(Plan):
    """How a network is quantized. Scales are in the state dict of the quantized model.

    Attributes:
        target: name of the target that it was made for.
        granularity: of the weights, ``"channel"``, ``"tensor"`` or ``"group"``.
        observer: how ranges of activations were found, with settings that are not the default:
            ``"minmax"``, ``"percentile(percentile=99.9)"``.
        folds: (layer, batch norm) pairs that are folded first.
        quantizers: all quantizers by name.
        calls: call address → what is rounded there.
        decisions: one per layer, addition, pooling … in order of execution.
        warnings: what a user should know, one sentence each.
        mode: ``"static"``, ``"dynamic"`` or ``"weights"``.
        opset: the oldest ONNX operator set that its file may have.
        biases: how its file holds them, ``"int32"``, ``"float16"`` or ``"float"``.
        plain: layers that computed their weight from parameters at every call, and that are
            replaced by plain ones before anything else.
        table: what the captured forward called: by it the calls of other forwards are recognised.
            ``None`` in a file of an older version: then they are counted.
    """

    kind: ClassVar[str] = "quantize"

    target: str
    granularity: str
    observer: str
    folds: tuple[tuple[str, str], ...]
    quantizers: tuple[QuantizerSpec, ...]
    calls: Mapping[str, CallRule]
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...] = ()
    mode: str = "static"
    opset: int = 18
    biases: str = "int32"
    plain: tuple[str, ...] = ()
    table: CallTable | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        data = asdict(replace(self, table=None))
        data["table"] = None if self.table is None else self.table.to_json()
        data["folds"] = [list(pair) for pair in self.folds]
        data["quantizers"] = [asdict(spec) for spec in self.quantizers]
        data["decisions"] = [asdict(decision) for decision in self.decisions]
        data["calls"] = {address: rule.to_json() for address, rule in self.calls.items()}
        data["warnings"] = list(self.warnings)
        data["plain"] = list(self.plain)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantPlan:  # noqa: ARG003
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: calls, decisions and quantizers do not name each other.
            KeyError, TypeError, ValueError: it is something else.
        """
        rules = {a: CallRule.from_json(rule) for a, rule in data["calls"].items()}
        specs = tuple(QuantizerSpec.from_json(spec) for spec in data["quantizers"])
        decisions = tuple(
            Decision(**{**entry, "reads": tuple(entry["reads"])}) for entry in data["decisions"]
        )
        check_names(specs, rules, decisions)
        return cls(
            target=str(data["target"]),
            granularity=str(data["granularity"]),
            observer=str(data["observer"]),
            folds=tuple((str(layer), str(norm)) for layer, norm in data["folds"]),
            quantizers=specs,
            calls=rules,
            decisions=decisions,
            warnings=tuple(data["warnings"]),
            mode=str(data.get("mode", "static")),
            opset=int(data.get("opset", 18)),
            biases=str(data.get("biases", "int32")),
            plain=tuple(data.get("plain", ())),
            table=CallTable.from_json(data["table"]) if data.get("table") else None,
        )

    def explain(self) -> str:
        """Every layer, addition and pooling: integer, or float and why."""
        integer = sum(decision.integer for decision in self.decisions)
        share = f" with {self.share:.0%} of the MACs" if any(d.macs for d in self.decisions) else ""
        lines = [
            f"target {self.target}, {self._method()}, weights per {self.granularity}: "
            f"{integer} of {len(self.decisions)} operations integer{share}, "
            f"{len(self.folds)} batch norms folded"
        ]
        if self.plain:
            lines.append(f"  computed weights became parameters: {', '.join(self.plain)}")
        if any(spec.pairs for spec in self.quantizers):
            lines.append("  weights leave room for x86 processors that sum two products in 16 bits")
        width = max((len(decision.address) for decision in self.decisions), default=0)
        for decision in self.decisions:
            state = "integer" if decision.integer else f"float: {decision.reason}"
            lines.append(f"  {decision.address:<{width}}  {state}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    @property
    def share(self) -> float:
        """The part of the multiply-accumulates that is computed with integers, 0 … 1."""
        macs = sum(decision.macs for decision in self.decisions)
        return sum(d.macs for d in self.decisions if d.integer) / macs if macs else 0.0

    def _method(self) -> str:
        if self.mode == "static":
            return f"observer {self.observer}"
        return "scales of each batch" if self.mode == "dynamic" else "integer weights only"

    def apply_to(self, model: nn.Module) -> QuantizedModel:
        """Fold batch norms in ``model`` and wrap it; scales come with the state dict.

        Raises:
            PlanError: a module or weight is missing or has another number of channels; nothing
                was changed.
        """
        plain = plain_layers(model, self.plain)
        folding = FusePlan(self.folds)
        folding.check(model, plain)
        parameters = named_weights(model)
        for path, layer in plain.items():
            parameters |= {f"{path}.{name}": each for name, each in named_weights(layer).items()}
        for spec in self.quantizers:
            _check_weight(spec, parameters)
        folding.apply_to(replace_layers(model, plain))
        return QuantizedModel(model, self)

    def folded(self, model: nn.Module) -> nn.Module:
        """A copy of the float ``model`` with the layers that this plan is about."""
        return FusePlan(self.folds).apply_to(make_plain(copy_module(model), self.plain))

    def bit_widths(self) -> dict[str, tuple[int, int]]:
        """Module path → (weight bits, activation bits); 32 where activations stay in float."""
        bits = {spec.name: spec.form.bits for spec in self.quantizers}
        return {
            decision.module: (
                bits[decision.weight],
                max((bits[name] for name in decision.reads), default=32),
            )
            for decision in self.decisions
            if decision.weight is not None
        }

    def restricted(self, *, called: Set[str], ready: Set[str]) -> QuantPlan:
        """The plan without what no calibration batch has reached.

        Args:
            called: addresses of the calls that ran.
            ready: names of the quantizers that have a scale.

        Returns:
            This plan, or one where the calls that did not run stay in float; a warning
            names each of them.
        """
        left = [
            decision
            for decision in self.decisions
            if decision.integer and (decision.address not in called or set(decision.reads) - ready)
        ]
        unused = {spec.name for spec in self.quantizers if spec.name not in ready}
        if not left and not unused:
            return self
        addresses = {decision.address for decision in left}
        reason = "did not run during calibration"
        calls = {}
        for address, rule in self.calls.items():
            inputs = {k: v for k, v in rule.inputs.items() if v in ready}
            outputs = {k: v for k, v in rule.outputs.items() if v in ready}
            if address not in addresses and (inputs or outputs):
                calls[address] = CallRule(inputs, outputs, rule.gate)
        used = {name for rule in calls.values() for name in rule.names()}
        return replace(
            self,
            quantizers=tuple(spec for spec in self.quantizers if spec.name in used),
            calls=calls,
            decisions=tuple(
                replace(d, integer=False, reason=reason, reads=(), weight=None)
                if d.address in addresses
                else d
                for d in self.decisions
            ),
            warnings=(*self.warnings, *(f"{d.address} {reason}: left in float" for d in left)),
        )


def _check_weight(spec: QuantizerSpec, parameters: Mapping[str, Tensor]) -> None:
    """The weight that a quantizer rounds is there, and its scales fit.

    Raises:
        PlanError: they do not.
    """
    if spec.parameter is None:
        return
    if spec.parameter not in parameters:
        raise PlanError(
            "the quantized weight does not exist",
            where=spec.parameter,
            hint=nearest(spec.parameter, parameters),
        )
    shape = tuple(parameters[spec.parameter].shape)
    if not 0 <= spec.axis < max(1, len(shape)):
        raise PlanError(f"it has shape {shape}, no dimension {spec.axis}", where=spec.parameter)
    if spec.channels is not None and shape[spec.axis] != spec.channels:
        raise PlanError(
            f"it has shape {shape}, the plan has {spec.channels} channels in dimension {spec.axis}",
            where=spec.parameter,
        )
    if spec.blocks is not None and (len(shape) < 2 or shape[1] % spec.blocks):
        raise PlanError(
            f"it has shape {shape}, the plan has {spec.blocks} groups in dimension 1",
            where=spec.parameter,
        )
