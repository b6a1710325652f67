"""Multiply-accumulate operations (MACs) of captured operators.

One MAC is one multiplication and one addition (papers that write "FLOPs" for this figure
mean MACs). Counted are the operators that multiply matrices: convolutions (grouped,
transposed, of any dimension), linear layers, matrix products, attention, recurrent layers.
Element-wise work, normalisation and pooling count as zero, as is usual in the field.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimkit.graph.capturing import Graph, Op

__all__ = ["MAC_RULES", "OperatorCost", "operator_costs", "owner_of"]


@dataclass(frozen=True)
class OperatorCost:
    """MACs of one operator.

    Attributes:
        op: its index in :attr:`Graph.ops`.
        layer: the path of the module that is charged: the owner of the weight if it lies in
            the running module (``attention.out_proj``), else the running module itself.
        weight: name of the parameter it multiplies with; None for two activations.
        macs: for the whole example input.
        output_shape: of its first output.
        bits: (weight, activation) bits of the tensors as they were in the capture.
    """

    op: int
    layer: str
    weight: str | None
    macs: int
    output_shape: tuple[int, ...]
    bits: tuple[int, int]


Counted = tuple[int, list[Any]]
"""(MACs, references of the operands, of which one may lead to a parameter)."""


def _shape(graph: Graph, ref: Any) -> tuple[int, ...]:
    return graph.tensors[ref.id].shape


def _convolution(graph: Graph, op: Op) -> Counted:
    data, weight, transposed = op.args[0], op.args[1], bool(op.args[6])
    kernel = _shape(graph, weight)
    # Each output element sums weight[1:] products; in a transposed convolution each
    # *input* element is spread over weight[1:] outputs instead.
    elements = _shape(graph, data) if transposed else graph.tensors[op.outputs[0]].shape
    return math.prod(elements) * math.prod(kernel[1:]), [weight, data]


def _product(left: int, right: int) -> Callable[[Graph, Op], Counted]:
    """Rows × columns × depth, batched or not, of the arguments at these two positions."""

    def rule(graph: Graph, op: Op) -> Counted:
        a, b = op.args[left], op.args[right]
        columns = _shape(graph, b)[-1] if len(_shape(graph, b)) > 1 else 1
        return math.prod(_shape(graph, a)) * columns, [b, a]

    return rule


def _linear(graph: Graph, op: Op) -> Counted:
    data, weight = op.args[0], op.args[1]
    return math.prod(_shape(graph, data)) * _shape(graph, weight)[0], [weight, data]


def _attention(graph: Graph, op: Op) -> Counted:
    query, key, value = (_shape(graph, ref) for ref in op.args[:3])
    rows = math.prod(query[:-1])  # batch × heads × queries
    return rows * key[-2] * (query[-1] + value[-1]), [op.args[0]]


def _recurrent(graph: Graph, op: Op) -> Counted:
    data, to_hidden, hidden = (_shape(graph, ref) for ref in op.args[:3])
    steps = math.prod(data[:-1])
    return steps * (math.prod(to_hidden) + math.prod(hidden)), [op.args[1], op.args[0]]


MAC_RULES: dict[str, Callable[[Graph, Op], Counted]] = {
    "aten.convolution": _convolution,
    "aten.mm": _product(0, 1),
    "aten.bmm": _product(0, 1),
    "aten.matmul": _product(0, 1),
    "aten.mv": _product(0, 1),
    "aten.dot": _product(0, 1),
    "aten.addmm": _product(1, 2),
    "aten.addmv": _product(1, 2),
    "aten.baddbmm": _product(1, 2),
    "aten.addbmm": _product(1, 2),
    "aten.linear": _linear,
    "aten.scaled_dot_product_attention": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention": _attention,
    "aten._scaled_dot_product_efficient_attention": _attention,
    "aten._scaled_dot_product_cudnn_attention": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
    "aten.mkldnn_rnn_layer": _recurrent,
}
"""Operator name without its overload → (MACs, operands that may be parameters)."""

_LEADS_THROUGH = frozenset(
    {
        "aten._to_copy",
        "aten._unsafe_view",
        "aten.alias",
        "aten.clone",
        "aten.detach",
        "aten.expand",
        "aten.permute",
        "aten.reshape",
        "aten.select",
        "aten.slice",
        "aten.split",
        "aten.squeeze",
        "aten.t",
        "aten.transpose",
        "aten.unbind",
        "aten.unsqueeze",
        "aten.view",
    }
)
"""Operators whose result is a view or a copy of their first operand: a parameter stays one."""


_MASKING = frozenset({"aten.mul", "aten.where", "aten.masked_fill"})
"""Operators that give a weight zeros where a tensor of the same shape says so."""


def _parameter(graph: Graph, value: int) -> str | None:
    """The parameter that ``value`` is, or is a view, a standardised or a quantized copy of."""
    while True:
        name = graph.tensors[value].name
        if name is not None:
            return name
        op = graph.producer(value)
        if op is None or not op.inputs:
            return None
        base = op.name.rpartition(".")[0]
        if "parametrizations" in op.module.split("."):  # weight norm and the like
            shape = graph.tensors[value].shape
            alike = [ref for ref in op.inputs if graph.tensors[ref].shape == shape]
            if not alike:
                return None
            value = alike[0]
        elif base in _LEADS_THROUGH or "fake_quant" in base:
            value = op.inputs[0]
        else:  # a kernel computed from one of the same size, as in weight standardisation
            elements = math.prod(graph.tensors[value].shape)
            alike = [r for r in op.inputs if math.prod(graph.tensors[r].shape) == elements]
            if base in MAC_RULES:
                return None
            if len(alike) != 1:  # weight × mask: the mask is a buffer, or of parameters too
                names = [_parameter(graph, ref) for ref in alike] if base in _MASKING else []
                own = [n for n in names if n is not None and n not in graph.buffers]
                return own[0] if own and None not in names else None
            value = alike[0]


def owner_of(name: str) -> tuple[str, str]:
    """(path of the layer, name of the tensor in it) for the name of a parameter or buffer.

    What a parametrization computes belongs to the layer that uses it:
    ``"conv.parametrizations.weight.original0"`` is ``("conv", "weight")``; so does what
    ``torch.nn.utils.prune`` masks, ``"conv.weight_orig"``.
    """
    path, _, local = name.rpartition(".")
    local = local.removesuffix("_orig")
    head, inside, rest = path.rpartition("parametrizations.")
    return (head.rstrip("."), rest) if inside and "." not in rest else (path, local)


def operator_costs(graph: Graph) -> list[OperatorCost]:
    """MACs of every operator of ``graph`` that multiplies matrices, in execution order."""
    costs = []
    for op in graph.ops:
        rule = MAC_RULES.get(op.name.rpartition(".")[0])
        if rule is None:
            continue
        macs, operands = rule(graph, op)
        names = (_parameter(graph, ref.id) for ref in operands)
        weight = next((name for name in names if name in graph.parameters), None)
        owner = owner_of(weight)[0] if weight else op.module
        inside = not op.module or owner == op.module or owner.startswith(op.module + ".")
        widths = [8 * graph.tensors[ref.id].dtype.itemsize for ref in operands]
        costs.append(
            OperatorCost(
                op=op.index,
                layer=owner if inside else op.module,
                weight=weight,
                macs=macs,
                output_shape=graph.tensors[op.outputs[0]].shape,
                bits=(widths[0], widths[-1]),
            )
        )
    return costs
