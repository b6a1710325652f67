"""Plans derived from a plan: some layers back in float, or with weights of other widths.

What is derived equals what :func:`slimkit.quantize.planning.laying_out.lay_out` gives when the
layers are skipped from the start, but needs no capture: the decisions say who reads and who
writes what.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from slimkit.graph.functions import function_of
from slimkit.quantize.scheme import QuantPlan
from slimkit.quantize.specs import CallRule, Decision
from slimkit.quantize.targets import Target

__all__ = ["integer_layers", "leave_in_float", "with_weight_bits"]


def integer_layers(plan: QuantPlan) -> tuple[str, ...]:
    """Paths of the modules whose weights are integers, in order of execution."""
    return tuple(
        dict.fromkeys(d.module for d in plan.decisions if d.integer and d.weight is not None)
    )


def leave_in_float(
    plan: QuantPlan,
    layers: Collection[str],
    *,
    float_outputs: Collection[str],
    reason: str = "put back to float",
) -> QuantPlan:
    """The plan with some of its integer layers in float.

    Additions, poolings … whose inputs no longer come from integer operations follow, and
    activations that no integer operation reads or makes any more are not rounded.

    Args:
        plan: of the whole network.
        layers: module paths, of :func:`integer_layers`.
        float_outputs: functions whose result is rounded only where an integer operation reads
            it; see :class:`slimkit.quantize.targets.Target`.
        reason: of the decisions.
    """
    decisions: list[Decision] = []
    written: set[str] = set()
    for decision in plan.decisions:
        off = _why_off(decision, layers, written, reason) if decision.integer else None
        if off is not None:
            kept = replace(decision, integer=False, reason=off, reads=(), weight=None)
        else:
            kept = decision
            if kept.integer and kept.writes is not None:
                written.add(kept.writes)
        decisions.append(kept)
    wanted = {name for d in decisions if d.integer for name in d.reads}
    wanted |= {
        d.writes
        for d in decisions
        if d.integer and d.writes and function_of(d.address) not in float_outputs
    }
    return _using(plan, [_with_output(d, wanted) for d in decisions], wanted)


def with_weight_bits(plan: QuantPlan, bits: Mapping[str, int], target: Target) -> QuantPlan:
    """The plan with the weights of some layers in other widths.

    Args:
        plan: any.
        bits: module path → 2 … 8.
        target: of the plan.

    Raises:
        InputError: a width that is not supported.
    """
    of_weight = {
        decision.weight: bits[decision.module]
        for decision in plan.decisions
        if decision.integer and decision.weight is not None and decision.module in bits
    }
    specs = tuple(
        replace(spec, form=target.weight_format(of_weight[spec.name]))
        if of_weight.get(spec.name, spec.form.bits) != spec.form.bits
        else spec
        for spec in plan.quantizers
    )
    return replace(plan, quantizers=specs)


def _why_off(
    decision: Decision, layers: Collection[str], written: Collection[str], reason: str
) -> str | None:
    """Why an integer operation cannot stay one; None if it can."""
    if decision.weight is not None:
        return reason if decision.module in layers else None
    if all(name in written for name in decision.reads):
        return None
    which = "its input does" if len(decision.reads) == 1 else "an input does"
    return f"{which} not come from an integer operation"


def _with_output(decision: Decision, wanted: Collection[str]) -> Decision:
    return decision if decision.writes in wanted else replace(decision, writes=None)


def _using(plan: QuantPlan, decisions: list[Decision], wanted: Collection[str]) -> QuantPlan:
    """The plan with these decisions, and of its quantizers those that they need."""
    integer = {decision.address for decision in decisions if decision.integer}
    calls: dict[str, CallRule] = {}
    for address, rule in plan.calls.items():
        inputs = rule.inputs if address in integer else {}
        outputs = {place: name for place, name in rule.outputs.items() if name in wanted}
        if inputs or outputs:
            gate = rule.gate if address in integer else None
            calls[address] = CallRule(inputs, outputs, gate)
    used = {
        name
        for rule in calls.values()
        for name in (*rule.inputs.values(), *rule.outputs.values(), rule.gate)
    }
    return replace(
        plan,
        quantizers=tuple(spec for spec in plan.quantizers if spec.name in used),
        calls=calls,
        decisions=tuple(decisions),
    )
